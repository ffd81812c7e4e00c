"""Count the tokens of a prompt file's rows without transformers, for memory plans."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.errors import PromptError
from pipeline.common.request import BadRow, PromptRow
from pipeline.common.signals import RENDER_SEC, TookTooLong, time_limit
from pipeline.config.schema import Config
from pipeline.prompts.reader import open_prompts

CHARACTERS_PER_TOKEN = 4  # English prose, most tokenizers
TEMPLATE_TOKENS = 8  # a message's role and marks, where no template is at hand
ASSUMED_PROMPT_TOKENS = 512
ASSUMED_ROWS = 1024

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Hold what a job's rows ask for.

    `samples` has (prompt tokens, max_new_tokens) of each completion, the longest sum first.
    """

    counted_by: str
    rows: int
    bad_rows: int
    too_long_rows: int  # longer than the model's context
    samples: tuple[tuple[int, int], ...]
    copies_logits: bool  # some row's params do


Counter = Callable[[Sequence[Messages]], list[int]]


def assumed_lengths(max_new_tokens: int, context: int, copies_logits: bool) -> PromptLengths:
    """Assume many prompts of one length, where there is no prompt file."""
    prompt = min(ASSUMED_PROMPT_TOKENS, context)
    samples = ((prompt, min(max_new_tokens, context - prompt)),) * ASSUMED_ROWS
    text = f"no prompt file: prompts of {prompt} tokens are assumed"
    return PromptLengths(text, 0, 0, 0, samples, copies_logits)


def expect_lengths(config: Config, tokenizer: Path | None, context: int, *, given: bool) -> PromptLengths:
    """Measure the prompt file, as `measure_prompts`; assume lengths for a default that is not there.

    Raises:
        PromptError: a file that was given cannot be read.
    """
    try:
        return measure_prompts(config, tokenizer, context)
    except PromptError:
        if given:
            raise
        return assumed_lengths(config.generation.max_new_tokens, context, config.generation.copies_logits)


def measure_prompts(config: Config, tokenizer: Path | None, context: int) -> PromptLengths:
    """Measure a job's prompt file.

    Args:
        tokenizer: the folder with the model's tokenizer; None to count characters.
        context: the model's, in tokens.

    Raises:
        PromptError: the file cannot be read.
    """
    rows = open_prompts(config)
    if tokenizer is None:
        return prompt_lengths(rows, config.system, by_characters, "characters ÷ 4, an estimate", context)
    count = by_tokenizer(tokenizer, config.model.chat_template, config.model.chat_template_kwargs)
    return prompt_lengths(rows, config.system, count, "the model's tokenizer", context)


def prompt_lengths(
    rows: Iterable[PromptRow | BadRow], system: str | None, count: Counter, counted_by: str, context: int
) -> PromptLengths:
    """Count every row's prompt tokens, and how many more it may make."""
    read = list(rows)
    good = [row for row in read if isinstance(row, PromptRow)]
    samples: list[tuple[int, int]] = []
    too_long = 0
    for row, prompt in zip(good, count([messages_of(row, system) for row in good]), strict=True):
        if prompt >= context:
            too_long += 1
            continue
        samples += [(prompt, min(row.params.max_new_tokens, context - prompt))] * row.params.n
    samples.sort(key=lambda sample: (sum(sample), sample), reverse=True)
    copies_logits = any(row.params.copies_logits for row in good)
    return PromptLengths(
        counted_by, len(read), len(read) - len(good), too_long, tuple(samples), copies_logits
    )


def by_characters(conversations: Sequence[Messages]) -> list[int]:
    """Estimate, for want of a tokenizer."""
    return [
        sum(len(m["content"]) // CHARACTERS_PER_TOKEN + 1 + TEMPLATE_TOKENS for m in messages)
        for messages in conversations
    ]


def by_tokenizer(
    folder: Path, template: str | None = None, template_kwargs: dict[str, Any] | None = None
) -> Counter:
    """Count with the tokenizer.json of a model's folder, and its chat template.

    A template that cannot be rendered, as Gemma's with a system message, or that leaves the text out, costs
    TEMPLATE_TOKENS a message.

    Args:
        template: Jinja, or a file's path; None is the folder's own.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other kind
        raise PromptError(
            found=f"{file}: not a tokenizer ({str(error).splitlines()[0]})",
            fix="Copy or download the folder again.",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    render = _renderer(folder, template, template_kwargs or {})

    def count(conversations: Sequence[Messages]) -> list[int]:
        texts, extra = [], []
        for messages in conversations:
            text = render(messages)
            if text is not None and messages[-1]["content"].strip() not in text:
                text = None
            texts.append("\n".join(m["content"] for m in messages) if text is None else text)
            extra.append(TEMPLATE_TOKENS * len(messages) if text is None else 0)
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(e) + more for e, more in zip(encodings, extra, strict=True)]

    return count


def messages_of(row: PromptRow, system: str | None) -> Messages:
    """List a row's messages: a prompt is a user's turn; the row's system text goes first, else the job's.

    Tools and calls are counted as the JSON that most templates write.
    """
    messages = row.messages or [{"role": "user", "content": row.prompt or ""}]
    messages = [{**m, "content": _said(m)} for m in messages]
    if tools := row.template_kwargs.get("tools"):
        messages[0]["content"] = f"{json.dumps(tools, ensure_ascii=False)}\n{messages[0]['content']}"
    text = row.system if row.system is not None else system
    if text is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text}, *messages]


def _said(message: dict[str, Any]) -> str:
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls])


def _renderer(
    folder: Path, template: str | None, template_kwargs: dict[str, Any]
) -> Callable[[Messages], str | None]:
    """Make what renders messages to text; it gives None where there is no template, or it raises."""
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    source = _template_source(folder, template, tokenizer_config)
    if source is None:
        return lambda _: None
    import jinja2

    from pipeline.prompts.sandbox import RENDER_ERRORS, sandbox

    environment = sandbox()
    environment.globals["strftime_now"] = lambda _: "01 Jan 2025"
    try:
        compiled = environment.from_string(source)
    except jinja2.TemplateError:
        return lambda _: None
    tokens = {k: v.get("content", "") if isinstance(v, dict) else v for k, v in tokenizer_config.items()
              if k.endswith("_token")}  # fmt: skip
    fixed = {"bos_token": "", "eos_token": ""} | tokens | {"add_generation_prompt": True} | template_kwargs

    loops = False

    def render(messages: Messages) -> str | None:
        nonlocal loops
        try:
            with time_limit(RENDER_SEC):
                return None if loops else compiled.render(messages=messages, **fixed)
        except TookTooLong:
            loops = True
            return None
        except RENDER_ERRORS:
            return None

    return render


def _template_source(folder: Path, template: str | None, tokenizer_config: dict[str, Any]) -> str | None:
    if template is not None:
        return template if "{" in template else Path(template).expanduser().read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    own = tokenizer_config.get("chat_template")
    if isinstance(own, list):  # several, by name
        own = next(
            (t.get("template") for t in own if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return own if isinstance(own, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
