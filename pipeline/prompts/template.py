"""Render a chat template, and find out once what it does."""

import inspect
import re
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.signals import RENDER_SEC, TookTooLong, time_limit
from pipeline.common.suggestions import did_you_mean
from pipeline.prompts.sandbox import RENDER_ERRORS

Messages = list[dict[str, Any]]

_SYSTEM, _USER, _REPLY = "A system text to look for.", "A user's text to look for.", "A reply to look for."
_DATES = datetime(2001, 2, 3, 4, 5), datetime(1999, 11, 12, 13, 14)


@dataclass(frozen=True)
class Template:
    """Render conversations with a tokenizer's own template, or with another."""

    tokenizer: PreTrainedTokenizerBase
    source: str  # Jinja
    kwargs: dict[str, Any]
    date: datetime  # what it takes for now, so that all rows of a job read the same day
    parts: bool = False  # it wants each message's content as a list of parts
    for_tools: str | None = None  # what the tokenizer has in its place where there are tools

    def render(
        self,
        messages: Messages,
        kwargs: dict[str, Any] | None = None,
        *,
        ask: bool = True,
        go_on: bool = False,
    ) -> str:
        """Render; a TookTooLong ends a template that loops.

        Args:
            ask: write what makes the model answer.
            go_on: leave the last message open, for the model to continue it.
        """
        given: Any = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        said = {**self.kwargs, **(kwargs or {})}
        source = self.for_tools if self.for_tools and said.get("tools") else self.source
        with time_limit(RENDER_SEC):
            text = self.tokenizer.apply_chat_template(
                given if self.parts else messages,
                chat_template=_dated(source, self.date),
                tokenize=False,
                add_generation_prompt=ask and not go_on,
                continue_final_message=go_on,
                **said,
            )
        assert isinstance(text, str)
        return text

    def reads(self, name: str) -> bool:
        """Say whether the template has this word, without which it reads no such argument."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def unread(self, kwargs: dict[str, Any]) -> str:
        """Name the arguments that the template never reads, with what may be meant; "" if it reads all."""
        if not (names := [name for name in kwargs if not self.reads(name)]):
            return ""
        words = set(re.findall(r"[A-Za-z_]\w*", self.source))
        named = [f"{name}. {did_you_mean(name, words)}" for name in names]
        return "; ".join(text.strip().rstrip(".") for text in named)


@dataclass(frozen=True)
class Findings:
    """Hold what was found out about a template."""

    written: str  # a conversation with a system text, as it renders it
    has_system_role: bool
    writes_date: bool  # today's, so that tomorrow's prompt is another one
    after_reply: str  # what it writes after an assistant's message


def find_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, kwargs: dict[str, Any], date: datetime
) -> Template | None:
    """Take the job's template or the tokenizer's, in the form that writes the prompt; None is a base model.

    Raises:
        ConfigError: it cannot be read, is not Jinja or does not end, or an argument is not a template's.
        PromptError: it writes no user's text.
    """
    _check_kwargs(tokenizer, kwargs)
    source = _source(tokenizer, template)
    if source is None:
        return None
    named = tokenizer.chat_template
    for_tools = named.get("tool_use") if template is None and isinstance(named, dict) else None
    found = Template(tokenizer, source, kwargs, date, for_tools=for_tools)
    asked = [
        _try(found, [_turn("user", _USER)]),
        _try(found, [_turn("system", _SYSTEM), _turn("user", _USER)]),
    ]
    if any(text is not None and _USER in text for text in asked) or asked == [None, None]:
        return found  # one that raises on both tells with each row why
    parts = replace(found, parts=True)
    if _USER in (_try(parts, [_turn("user", _USER)]) or ""):
        return parts
    raise PromptError(
        found="the chat template never writes a user's text: every row would be the same prompt",
        fix="Pass model.chat_template=<a file> that writes each message's content.",
    )


def examine(template: Template) -> Findings:
    """Try the template on conversations whose texts are looked for in what it writes."""
    user = _turn("user", _USER)
    written = _try(template, [_turn("system", _SYSTEM), user]) or ""
    days = [_try(replace(template, date=day), [user]) for day in _DATES]
    replied = _try(template, [user, _turn("assistant", _REPLY)], ask=False) or ""
    return Findings(
        written=written,
        has_system_role=_SYSTEM in written,
        writes_date=days[0] != days[1],
        after_reply=replied.partition(_REPLY)[2],
    )


@lru_cache(maxsize=8)
def _dated(source: str, date: datetime) -> str:
    """Let strftime_now in a template tell this date, by a macro of that name: its arguments are plain data."""
    if "strftime_now" not in source:
        return source
    codes = [f"%{dash}{letter}" for dash in ("-", "") for letter in "aAwdbBmyYHIpMSfjUWcxXGuV"]
    told = "".join(f"|replace({code!r}, {date.strftime(code)!r})" for code in codes)
    # Jinja drops the line's end after a block, so that the template begins a line as it does alone.
    return f"{{% macro strftime_now(format) %}}{{{{ format{told} }}}}{{% endmacro %}}\n{source}"


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _check_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    if wrong := sorted(taken & kwargs.keys()):
        raise ConfigError(
            found=f"model.chat_template_kwargs: {', '.join(wrong)} is set by the pipeline",
            fix="Remove it; only the template's own arguments go here.",
        )


def _source(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    try:
        if template is None:
            return tokenizer.get_chat_template() if tokenizer.chat_template else None
        return template if "{" in template else Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            found=f"model.chat_template={template}: cannot be used ({error})",
            fix="Pass a Jinja template or its file.",
        ) from error


def _try(template: Template, messages: Messages, *, ask: bool = True) -> str | None:
    """Render; None if the template refuses this conversation."""
    try:
        return template.render(messages, ask=ask)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            found=f"the chat template is not valid Jinja: {error.message} (line {error.lineno})",
            fix="Correct it, or pass another model.chat_template.",
        ) from error
    except TookTooLong as error:
        raise ConfigError(
            found=f"the chat template is not done with one message after {RENDER_SEC:g} s",
            fix="Pass another model.chat_template: this one loops.",
        ) from error
    except RENDER_ERRORS:
        return None
