"""The command line: every key can be set, free text takes escapes, and no folder beside the user is a group."""

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_type_hints

import pytest
from job_helper import command

from pipeline.common.errors import ConfigError
from pipeline.config.compose import job_keys, options, read_config
from pipeline.config.overrides import dictionary_keys
from pipeline.config.schema import Config
from pipeline.config.sources import GROUPS

TYPED = {  # what is typed, and what it is; keys that are not here are taken by their type
    "model.device_map": ("{model.embed: 0, lm_head: cpu}", {"model.embed": 0, "lm_head": "cpu"}),
    "model.max_memory": ("{0: 20GiB, cpu: 200MB}", {0: "20GiB", "cpu": "200MB"}),
    "model.chat_template_kwargs": ("{enable_thinking: false}", {"enable_thinking": False}),
    "model.template_date": ("2026-11-27", "2026-11-27"),
    "submit.environment": ("{A: b, C: '1 2'}", {"A": "b", "C": "1 2"}),
    "prompt_template": ("Sum up, please: {{ text }}", "Sum up, please: {{ text }}"),
    "devices": ("2", "2"),
    "columns": ("{id: qid, prompt: the question}", {"id": "qid", "prompt": "the question"}),
    "submit.memory": ("32G", "32G"),
    "submit.gpu_memory": ("80G", "80G"),
    "generation.top_p": ("0.5", 0.5),
    "generation.min_p": ("0.5", 0.5),
    "generation.choice": ("[yes,'a b']", ["yes", "a b"]),
    "generation.thinking_tags": ("['<a>','</a>']", ["<a>", "</a>"]),
    "engine.memory_fraction": ("0.5", 0.5),
}


def leaves(schema: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every key that holds a value, with its type."""
    found: dict[str, Any] = {}
    for field in fields(schema):
        kind = get_type_hints(schema)[field.name]
        name = prefix + field.name
        found |= leaves(kind, f"{name}.") if is_dataclass(kind) else {name: kind}
    return found


def typed(key: str, kind: Any) -> tuple[str, Any]:
    if key in TYPED:
        return TYPED[key]
    kinds = [kind, *getattr(kind, "__args__", ())]
    for each in kinds:
        if isinstance(each, type) and issubclass(each, Enum):
            member = list(each)[-1]
            return member.name, member
    for each, pair in {
        bool: ("true", True),
        int: ("7", 7),
        float: ("3.5", 3.5),
        str: ("some", "some"),
    }.items():
        if each in kinds and not str(kind).startswith(("list", "dict")):
            return pair
    return ("[some,'a b']", ["some", "a b"]) if str(kind).startswith("list") else ("{a: 1}", {"a": 1})


@pytest.mark.parametrize("key", leaves())
def test_every_key_is_set_from_the_command_line(key):
    text, meant = typed(key, leaves()[key])
    beside = {
        "model.adapter": ["model=smollm2"],  # alone, it would say which model
        "generation.label_logprobs": ["generation.choice=[yes,no]"],
    }.get(key, [])
    value: Any = read_config([*beside, f"{key}={text}"])
    for name in key.split("."):
        value = getattr(value, name)
    if key == "model.architecture":  # laid over what conf/model says
        value = {name: value[name] for name in meant}
    assert value == meant


def test_one_entry_of_a_dictionary_is_set_with_and_without_a_plus():
    for plus in ("", "+", "++"):
        config = read_config([f"{plus}model.max_memory.cpu=1GB", f"{plus}model.chat_template_kwargs.day=x y"])
        assert (config.model.max_memory, config.model.chat_template_kwargs) == (
            {"cpu": "1GB"},
            {"day": "x y"},
        )
    assert set(dictionary_keys()) == {
        "model.device_map", "model.max_memory", "model.chat_template_kwargs", "model.architecture",
        "submit.environment", "generation.json_schema", "generation.choice", "prompt_template", "columns",
        "engine.extra",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"a\nb", "a\nb"),
        (r'"a\nb"', "a\nb"),
        (r"'a\tb\r'", "a\tb\r"),
        (r'"a\\nb"', r"a\nb"),
        (r'"\u5b66 \ud83d\ude00"', "学 😀"),
        (r'"say \"yes\"\n"', 'say "yes"\n'),
        (r'"\d+"', r"\d+"),
        ('"a\nb"', "a\nb"),
    ],
)
def test_free_text_takes_the_usual_escapes(typed, meant):
    assert read_config([f"system={typed}"]).system == meant
    assert read_config([f"generation.stop=[{typed},END]"]).generation.stop == [meant, "END"]
    kwargs = read_config([f"model.chat_template_kwargs={{a: {typed}, b: true}}"]).model.chat_template_kwargs
    assert kwargs == {"a": meant, "b": True}
    assert read_config([f"model.chat_template={typed}"]).model.chat_template == meant


def test_other_keys_take_a_backslash_as_it_is():
    assert read_config([r"prompts='new\n.jsonl'"]).prompts == r"new\n.jsonl"


def test_half_a_character_is_refused():
    with pytest.raises(ConfigError, match="half a character"):
        read_config([r"system='\ud83d'"])


@pytest.mark.parametrize("folder", ["prompts", "model", "engine", "system", "conf/prompts", "jobs/prompts"])
def test_a_folder_called_like_a_key_is_no_group(folder, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "smollm2.yaml").write_text("name: wrong\n")
    done = command(["--cfg", "job", "prompts=x.jsonl", "model=smollm2", "system=Hi"], where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prompts: x.jsonl" in done.stdout
    assert "system: Hi" in done.stdout
    assert "wrong" not in done.stdout


def test_a_conf_where_the_user_stands_is_searched_first(tmp_path, monkeypatch):
    for group, name, text in (
        ("conf/model", "mine", "defaults: [schema, _self_]\nname: org/Mine\n"),
        ("conf/generation", "greedy", "defaults: [schema, _self_]\nmax_new_tokens: 7\n"),
        ("jobs", "night", "# @package _global_\nlimit: 3\n"),
    ):
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / f"{name}.yaml").write_text(text)
    (tmp_path / "conf" / "config.yaml").write_text("of: another program\n")
    monkeypatch.chdir(tmp_path)
    config = read_config(["model=mine", "jobs=night"])
    assert (config.model.name, config.generation.max_new_tokens, config.limit) == ("org/Mine", 7, 3)
    assert read_config(["jobs=korean_sampled"]).generation.n == 3
    assert {"mine", "smollm2"} <= set(options("model"))
    with pytest.raises(ConfigError, match=r"Did you mean mine\?"):
        read_config(["model=mien"])


def test_every_group_is_a_key():
    assert set(GROUPS) <= set(job_keys())
