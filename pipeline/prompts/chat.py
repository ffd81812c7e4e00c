"""Turn a prompt row into token ids, through the model's chat template.

A template is rendered once and encoded without the tokenizer's own special tokens, because it writes
them itself: so there is never a second BOS, and the ids are those of `tokenizer.apply_chat_template`.

Typed control tokens are text. Where a row spells a control token (`<|im_end|>`, `<|eot_id|>`), it could
end its turn and speak as the system. So each such place is hidden behind a mark while the template is
rendered, and then encoded by the bare model of the tokenizer, which knows no added tokens: the model
reads the same characters, as ordinary tokens. Control tokens are the tokenizer's special tokens and the
added tokens that its template writes. (`<think>` and `</think>` in an assistant's message stay as they
are: they are its own, and templates cut there.) The same holds for prompts without a template.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.request import PromptRow
from pipeline.config.schema import Config
from pipeline.prompts.answer import END_THINK, THINK

Messages = list[dict[str, str]]

_MARK = "\ufdd0"  # a code point that Unicode sets aside for use inside programs
_HIDDEN = re.compile(f"{_MARK}([0-9]+){_MARK}")
_PROBE = "A system text to look for."
# What a template's code can raise; jinja2 lets Python's own errors through.
_PYTHON_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_TEMPLATE_ERRORS = (jinja2.TemplateError, *_PYTHON_ERRORS)


@dataclass(frozen=True)
class Chat:
    """Hold a job's chat settings, and what was found out about its tokenizer. Made once, by `prepare_chat`."""

    tokenizer: PreTrainedTokenizerBase
    system: str | None  # for rows that have none of their own
    template: str | None  # Jinja; None is a base model
    template_kwargs: dict[str, Any]
    has_system_role: bool
    control_tokens: re.Pattern[str]
    prefix_token_ids: tuple[int, ...]  # before a prompt without a template, as BOS


def prepare_chat(tokenizer: PreTrainedTokenizerBase, config: Config) -> Chat:
    """Look once at what the template and the tokenizer do.

    A template that writes today's date makes other prompts tomorrow, unless model.chat_template_kwargs says
    date_string.

    Raises:
        ConfigError: the template cannot be read or is not Jinja, or an argument is not a template's.
    """
    kwargs = dict(config.model.chat_template_kwargs)
    _check_kwargs(tokenizer, kwargs)
    source = _template_source(tokenizer, config.model.chat_template)
    probe = "" if source is None else _render_probe(tokenizer, source, kwargs)
    return Chat(
        tokenizer=tokenizer,
        system=config.system,
        template=source,
        template_kwargs=kwargs,
        has_system_role=_PROBE in probe,
        control_tokens=_control_tokens(tokenizer, (source or "") + probe),
        prefix_token_ids=() if source else _prefix_token_ids(tokenizer),
    )


def render(row: PromptRow, chat: Chat) -> list[int]:
    """Make the token ids that the model is to continue.

    The system text is the row's own, else the job's; where the template has no system role it goes
    before the first user message, with an empty line between. An empty system text is one: it replaces
    the default that some templates write.

    Raises:
        PromptError: the template raises, messages have no template, or the tokenizer cannot but make
            a control token of the row's text.
    """
    hidden: list[str] = []
    messages = [_hide(message, chat.control_tokens, hidden) for message in conversation(row, chat)]
    if chat.template is not None:
        try:
            text = _apply(chat.tokenizer, chat.template, messages, chat.template_kwargs)
        except _TEMPLATE_ERRORS as error:
            raise PromptError(
                found=f"{row.source}: the chat template fails: {error}",
                fix="Change the row's messages, or pass another model.chat_template.",
            ) from error
        return _encode(chat.tokenizer, text, hidden, row.source)
    if row.messages is not None:
        raise PromptError(
            found=f"{row.source}: has messages, but the model has no chat template",
            fix="Write a 'prompt', pass model.chat_template=<a file>, or take the model's instruct variant.",
        )
    return [*chat.prefix_token_ids, *_encode(chat.tokenizer, messages[0]["content"], hidden, row.source)]


def conversation(row: PromptRow, chat: Chat) -> Messages:
    """List the messages that the template is given, the system text among them."""
    messages = row.messages or [{"role": "user", "content": row.prompt or ""}]
    system = chat.system if row.system is None else row.system
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if system is None:
        return messages
    if chat.has_system_role:
        return [{"role": "system", "content": system}, *messages]
    return _fold(system, messages) if system else messages


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Take the tokenizer's pad, else its eos, else 0. The mask is always explicit: any id would do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def eos_token_ids(
    generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Collect every token that ends a completion: the model's generation config's, and the tokenizer's."""
    of_model = getattr(generation_config, "eos_token_id", None)
    ends = [*(of_model if isinstance(of_model, list | tuple) else [of_model]), tokenizer.eos_token_id]
    return frozenset(int(token_id) for token_id in ends if token_id is not None)


def _check_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    if wrong := sorted(taken & kwargs.keys()):
        raise ConfigError(
            found=f"model.chat_template_kwargs: {', '.join(wrong)} is set by the pipeline",
            fix="Remove it; only the template's own arguments go here.",
        )


def _template_source(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    try:
        if template is None:
            return tokenizer.get_chat_template() if tokenizer.chat_template else None
        return template if "{" in template else Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            found=f"model.chat_template={template}: cannot be used ({error})",
            fix="Pass a Jinja template or its file.",
        ) from error


def _render_probe(tokenizer: PreTrainedTokenizerBase, template: str, kwargs: dict[str, Any]) -> str:
    """Render a conversation with a system message; "" if the template refuses one."""
    messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hello"}]
    try:
        return _apply(tokenizer, template, messages, kwargs)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            found=f"the chat template is not valid Jinja: {error.message} (line {error.lineno})",
            fix="Correct it, or pass another model.chat_template.",
        ) from error
    except _TEMPLATE_ERRORS:
        return ""


def _apply(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, kwargs: dict[str, Any]
) -> str:
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **kwargs
    )
    assert isinstance(text, str)
    return text


def _fold(system: str, messages: Messages) -> Messages:
    """Put the system text before the first user message, or make it one if there is none."""
    for i, message in enumerate(messages):
        if message["role"] == "user":
            folded = {"role": "user", "content": f"{system}\n\n{message['content']}"}
            return [*messages[:i], folded, *messages[i + 1 :]]
    return [{"role": "user", "content": system}, *messages]


def _control_tokens(tokenizer: PreTrainedTokenizerBase, written: str) -> re.Pattern[str]:
    """Match what must not be typed: special tokens, and added tokens that the template has `written`.

    The mark itself too, so that nobody can type what hides. Added tokens of blanks alone (Gemma has
    some) are no control tokens.
    """
    added = tokenizer.added_tokens_decoder.values()
    used = {token.content for token in added if token.special or token.content in written}
    tokens = {token for token in used | set(tokenizer.all_special_tokens) if token.strip()}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, [*longest_first, _MARK])))


def _hide(message: dict[str, str], control_tokens: re.Pattern[str], hidden: list[str]) -> dict[str, str]:
    """Put a mark in the place of each typed control token, and the token in `hidden`."""
    own = (THINK, END_THINK) if message["role"] == "assistant" else ()

    def mark(match: re.Match[str]) -> str:
        if match[0] in own:
            return match[0]
        hidden.append(match[0])
        return f"{_MARK}{len(hidden) - 1}{_MARK}"

    return {**message, "content": control_tokens.sub(mark, message["content"])}


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, hidden: list[str], source: str) -> list[int]:
    """Encode a rendered text, what is hidden as ordinary tokens."""
    first, *pieces = _HIDDEN.split(text)
    token_ids = _encode_text(tokenizer, first)
    for number, following in zip(pieces[::2], pieces[1::2], strict=True):
        typed = hidden[int(number)]
        bare = _encode_inside(lambda piece: _encode_bare(tokenizer, piece), typed)
        if tokenizer.convert_tokens_to_ids(typed) in bare and typed != _MARK:
            raise PromptError(
                found=f"{source}: holds {typed!r}, which this tokenizer can only read as a control token",
                fix="Write it in another way.",
            )
        token_ids += bare + _encode_inside(lambda piece: _encode_text(tokenizer, piece), following)
    return token_ids


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # not verbose: a prompt longer than the context is the runner's to report
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _encode_bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text in which no added token is looked for.

    `split_special_tokens` does this for special tokens only; the steps of a fast tokenizer do for all.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    splits = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
    return [token.id for split, _ in splits for token in backend.model.tokenize(split)]


def _encode_inside(encode: Callable[[str], list[int]], piece: str) -> list[int]:
    """Encode a piece from inside a text: some tokenizers put a blank before the first word of a text."""
    if not piece:
        return []
    newline, with_newline = encode("\n"), encode("\n" + piece)
    if with_newline[: len(newline)] == newline:
        return with_newline[len(newline) :]
    return encode(piece)


def _prefix_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Find what the tokenizer puts before a text. What it would put after it, an end, is left out."""
    plain, whole = _encode_text(tokenizer, "a"), list(tokenizer.encode("a"))
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])
