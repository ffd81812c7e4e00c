"""Turn a prompt row into token ids, through the model's chat template.

A template is rendered once and encoded without the tokenizer's own special tokens, because it writes
them itself: so there is never a second BOS, and the ids are those of `tokenizer.apply_chat_template`.
Whatever a row says is in its prompt, or the row is refused. Typed control tokens are text (control.py).
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.common import terminal
from pipeline.common.errors import PromptError
from pipeline.common.request import PromptRow
from pipeline.common.signals import RENDER_SEC, TookTooLong
from pipeline.config.schema import Config
from pipeline.prompts.answer import Tags, find_tags
from pipeline.prompts.control import control_tokens, encode, encode_text, hide, hide_in
from pipeline.prompts.sandbox import RENDER_ERRORS
from pipeline.prompts.template import (
    Findings,
    Messages,
    Template,
    examine,
    find_template,
)
from pipeline.prompts.tools import with_text_arguments


@dataclass(frozen=True)
class Chat:
    """Hold a job's chat settings, and what was found out about its tokenizer. Made once, by `prepare_chat`."""

    tokenizer: PreTrainedTokenizerBase
    system: str | None  # for rows that have none of their own
    template: Template | None  # None is a base model
    found: Findings
    tags: Tags  # around thinking
    control_tokens: re.Pattern[str]
    prefix_token_ids: tuple[int, ...]  # before a prompt without a template, as BOS
    continue_final_message: bool  # of rows that do not say
    embeddings: int | None  # how many tokens the model knows, where there is a model

    @property
    def has_system_role(self) -> bool:
        """Say whether the template writes a system text."""
        return self.found.has_system_role

    @property
    def source(self) -> str:
        """Give the template's text; "" for a base model."""
        return self.template.source if self.template else ""

    @property
    def turn_end(self) -> str | None:
        """Name the control token that the template writes after an assistant's message, if it writes one."""
        match = self.control_tokens.search(self.found.after_reply)
        return match[0] if match else None


def prepare_chat(tokenizer: PreTrainedTokenizerBase, config: Config, embeddings: int | None = None) -> Chat:
    """Look once at what the template and the tokenizer do.

    Args:
        embeddings: how many tokens the model has a vector for; None does not look at ids.

    Raises:
        ConfigError: the template cannot be read, is not Jinja or loops, or an argument is not a template's.
        PromptError: the template never writes a user's text.
    """
    model = config.model
    date = datetime.fromisoformat(model.template_date) if model.template_date else datetime.now()
    kwargs = dict(model.chat_template_kwargs)
    template = find_template(tokenizer, model.chat_template, kwargs, date)
    found = examine(template) if template else Findings("", False, False, "")
    source = template.source if template else ""
    if template and (unread := template.unread(kwargs)):
        terminal.say(
            f"Warning: the chat template does not read model.chat_template_kwargs.{unread}", "yellow"
        )
    return Chat(
        tokenizer=tokenizer,
        system=config.system,
        template=template,
        found=found,
        tags=find_tags(tokenizer, source, config.generation.thinking_tags),
        control_tokens=control_tokens(tokenizer, source + found.written),
        prefix_token_ids=() if template else _prefix_token_ids(tokenizer),
        continue_final_message=config.continue_final_message,
        embeddings=embeddings,
    )


def render(row: PromptRow, chat: Chat) -> list[int]:
    """Make the token ids that the model is to continue.

    The system text is the row's own, else the job's; where the template has no system role it goes
    before the first user message, with an empty line between. An empty system text is one: it replaces
    the default that some templates write.

    Raises:
        PromptError: the template raises, loops or leaves the row's text out, messages have no template,
            the assistant has the last word, the tokenizer cannot but make a control token of the row's
            text, or the model has no vector for a token.
    """
    hidden: list[str] = []
    own = (chat.tags.open, chat.tags.close)
    messages = [hide(message, chat.control_tokens, own, hidden) for message in conversation(row, chat)]
    if chat.template is not None:
        kwargs = {**row.template_kwargs}
        if kwargs.get("tools"):
            kwargs["tools"] = hide_in(kwargs["tools"], chat.control_tokens, hidden)
        text = _rendered(row, messages, kwargs, chat, chat.template)
        token_ids = encode(chat.tokenizer, text, hidden, row.source)
    elif row.template_kwargs.get("tools"):
        raise _no_tools(row, chat)
    elif row.messages is not None:
        raise PromptError(
            found=f"{row.source}: has messages, but the model has no chat template",
            fix="Write a 'prompt', pass model.chat_template=<a file>, or take the model's instruct variant.",
        )
    else:
        token_ids = encode(chat.tokenizer, messages[0]["content"], hidden, row.source)
        token_ids = [*chat.prefix_token_ids, *token_ids]
    _check_ids(token_ids, row, chat)
    return token_ids


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


def missing_end(chat: Chat, ends: frozenset[int]) -> str | None:
    """Name the token with which the template ends a turn, if it does not end a completion; else None."""
    token = chat.turn_end
    return None if token is None or chat.tokenizer.convert_tokens_to_ids(token) in ends else token


def say_what_matters(config: Config, chat: Chat, ends: frozenset[int]) -> None:
    """Say what of the template a user would not expect."""
    if chat.found.writes_date and config.model.template_date:
        terminal.say(
            f"The chat template writes the date: all prompts of this job have {config.model.template_date}, also "
            "when it goes on another day; model.template_date=… chooses one."
        )
    token = missing_end(chat, ends)
    if token is not None and token not in config.generation.stop:
        terminal.say(
            f"Warning: the chat template ends a turn with {token}, which does not end a completion of this "
            f"model. 'generation.stop=[\"{token}\"]' does that.",
            style="yellow",
        )


def _rendered(
    row: PromptRow, messages: Messages, kwargs: dict[str, Any], chat: Chat, template: Template
) -> str:
    if unread := template.unread({key: value for key, value in kwargs.items() if key != "tools"}):
        raise PromptError(
            found=f"{row.source}: the chat template does not read chat_template_kwargs.{unread}",
            fix="Correct the name, or leave it out.",
        )
    go_on = _goes_on(row, chat)
    try:
        text = _render_calls(template, messages, kwargs, go_on)
    except TookTooLong:
        raise PromptError(
            found=f"{row.source}: the chat template is not done after {RENDER_SEC:g} s",
            fix="Change the row's messages, or pass another model.chat_template.",
        ) from None
    except RENDER_ERRORS as error:
        raise PromptError(
            found=f"{row.source}: the chat template fails: {error}",
            fix="Change the row's messages, or pass another model.chat_template.",
        ) from error
    asked = next((m for m in reversed(messages) if m["role"] != "assistant"), None)
    if asked is not None and not _holds(text, asked["content"].strip()):
        raise PromptError(
            found=f"{row.source}: the chat template leaves out the text of the last {asked['role']} message",
            fix="Write it as a user's message, or pass another model.chat_template.",
        )
    if kwargs.get("tools") and text == _tried(template, messages, {**kwargs, "tools": None}, go_on):
        raise _no_tools(row, chat)
    silent = [{key: said for key, said in m.items() if key != "tool_calls"} for m in messages]
    if silent != messages and text == _tried(template, silent, kwargs, go_on):
        raise PromptError(
            found=f"{row.source}: the chat template leaves out the calls of tools",
            fix="Write them as text in 'content', or pass another model.chat_template.",
        )
    return text


def _tried(template: Template, messages: Messages, kwargs: dict[str, Any], go_on: bool) -> str | None:
    """Render what a row is without a part of it; None where that fails."""
    try:
        return _render_calls(template, messages, kwargs, go_on)
    except (TookTooLong, *RENDER_ERRORS):
        return None


def _render_calls(template: Template, messages: Messages, kwargs: dict[str, Any], go_on: bool) -> str:
    """Render; the arguments of calls as objects, or as JSON where the template wants texts."""
    try:
        return template.render(messages, kwargs, go_on=go_on)
    except RENDER_ERRORS:
        if not any("tool_calls" in message for message in messages):
            raise
        return template.render(with_text_arguments(messages), kwargs, go_on=go_on)


def _holds(text: str, said: str) -> bool:
    """Say whether a rendered text has what was said, as it is or inside of JSON."""
    return (
        said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text or json.dumps(said)[1:-1] in text
    )


def _no_tools(row: PromptRow, chat: Chat) -> PromptError:
    name = Path(chat.tokenizer.name_or_path).name or "this model"
    return PromptError(
        found=f"{row.source}: the chat template of {name} does not take tools",
        fix="Choose a model whose template does, pass its model.chat_template, or write them into the messages.",
    )


def _goes_on(row: PromptRow, chat: Chat) -> bool:
    """Say whether the model continues the row's last message, instead of answering it."""
    asked = row.continue_final_message
    last = row.messages[-1] if row.messages else {"role": "user", "content": ""}
    if last["role"] != "assistant":
        if asked:
            raise PromptError(
                found=f"{row.source}: continue_final_message, but the last message is the {last['role']}'s",
                fix="End with the assistant's message that is to be continued.",
            )
        return False
    if not (chat.continue_final_message if asked is None else asked):
        raise PromptError(
            found=f"{row.source}: the last message is the assistant's, and nothing is left to answer",
            fix="Pass continue_final_message=true to have it continued, or end with a user's message.",
        )
    if not last["content"].strip():
        raise PromptError(
            found=f"{row.source}: the assistant's message that is to be continued is empty",
            fix="Remove it.",
        )
    return True


def _check_ids(token_ids: list[int], row: PromptRow, chat: Chat) -> None:
    if not token_ids:
        raise PromptError(
            found=f"{row.source}: its prompt has no tokens: the chat template writes nothing for it",
            fix="Add a user's message, or pass another model.chat_template.",
        )
    largest = max(token_ids)
    if chat.embeddings is not None and largest >= chat.embeddings:
        raise PromptError(
            found=f"{row.source}: holds {chat.tokenizer.convert_ids_to_tokens(largest)!r}, token {largest}, and "
            f"the model knows {chat.embeddings} tokens",
            fix="Take the tokenizer that the model was trained with, or write it in another way.",
        )


def _fold(system: str, messages: Messages) -> Messages:
    """Put the system text before the first user message, or make it one if there is none."""
    for i, message in enumerate(messages):
        if message["role"] == "user":
            folded = {**message, "content": f"{system}\n\n{message['content']}"}
            return [*messages[:i], folded, *messages[i + 1 :]]
    return [{"role": "user", "content": system}, *messages]


def _prefix_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Find what the tokenizer puts before a text. What it would put after it, an end, is left out."""
    plain, whole = encode_text(tokenizer, "a"), list(tokenizer.encode("a"))
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])
