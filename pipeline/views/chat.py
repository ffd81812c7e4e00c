"""Show what the model is really sent for one prompt row: whose text each token is, and what the template adds."""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.common.request import PromptRow
from pipeline.prompts.chat import Chat, conversation, render
from pipeline.prompts.sandbox import RENDER_ERRORS
from pipeline.views.tokens import split_tokens, token_bytes

CONTROL, ROLE, TEMPLATE = "control", "role", "template"
_ROLE_NAME = re.compile(r"\s*(system|developer|user|assistant|model|tool|ipython)\b", re.IGNORECASE)
_THINKING = re.compile(r"enable_thinking|<think>")


@dataclass(frozen=True, slots=True)
class Segment:
    """Hold neighbouring tokens of one kind.

    The kind is control (a special token), role (a role's name after one), template (words that the
    template adds by itself), or the role of the message whose content it is: system, user, assistant, tool.
    """

    kind: str
    text: str
    token_ids: list[int]
    generation_prompt: bool  # what makes the model answer, after the last message


@dataclass(frozen=True, slots=True)
class ChatView:
    """Hold a rendered prompt, and what its template does."""

    id: str  # the row's
    source: str
    has_template: bool
    has_system_role: bool
    token_ids: list[int]
    text: str
    segments: list[Segment]
    added: list[str]  # by the template, as a system prompt or a date
    generation_prompt: str
    bos_count: int
    leading_bos_count: int  # more than one is a fault: something wrote it twice
    writes_date: bool  # the template writes today's date, so that tomorrow's prompt is another one
    thinking_switch: bool  # the template knows enable_thinking, or writes <think>
    opens_thinking: bool


def chat_view(row: PromptRow, chat: Chat) -> ChatView:
    """Tell the ids apart that a job sends for this row.

    Raises:
        PromptError: as `render`.
    """
    token_ids = render(row, chat)
    raws = [token_bytes(chat.tokenizer, token_id) for token_id in token_ids]
    text = b"".join(raws).decode(errors="replace")
    start = len(text.encode()) - len(_generation_prompt(row, chat, text).encode())
    segments = _segments(chat.tokenizer, token_ids, _kinds(row, chat, text), start)
    bos = chat.tokenizer.bos_token_id
    return ChatView(
        id=row.id,
        source=row.source,
        has_template=chat.template is not None,
        has_system_role=chat.has_system_role,
        token_ids=token_ids,
        text=text,
        segments=segments,
        added=[s.text.strip() for s in segments if s.kind == TEMPLATE and s.text.strip()],
        generation_prompt="".join(s.text for s in segments if s.generation_prompt),
        bos_count=token_ids.count(bos),
        leading_bos_count=next(
            (i for i, token_id in enumerate(token_ids) if token_id != bos), len(token_ids)
        ),
        writes_date=chat.found.writes_date,
        thinking_switch=_THINKING.search(chat.source) is not None or chat.tags.open in chat.source,
        opens_thinking=text.rstrip().endswith(chat.tags.open),
    )


def _generation_prompt(row: PromptRow, chat: Chat, text: str) -> str:
    """Return what the template writes only when an answer is asked for: the end of `text`, or nothing."""
    if chat.template is None:
        return ""
    messages = conversation(row, chat)
    try:
        without, whole = (
            chat.template.render(messages, row.template_kwargs, ask=ask) for ask in (False, True)
        )
    except RENDER_ERRORS:
        return ""
    end = whole[len(without) :] if whole.startswith(without) else ""
    return end if text.endswith(end) else ""


def _kinds(row: PromptRow, chat: Chat, text: str) -> list[str]:
    """Tell the kind of each byte of the rendered text: a message's role, or template."""
    kinds = [TEMPLATE] * len(text.encode())
    place = 0
    for message in conversation(row, chat):
        content = message["content"]
        found = text.find(content, place)
        if found < 0:  # most templates trim
            content = content.strip()
            found = text.find(content, place)
        if found < 0 or not content:
            continue
        place = found + len(content)
        start, end = len(text[:found].encode()), len(text[:place].encode())
        kinds[start:end] = [message["role"]] * (end - start)
    return kinds


def _segments(tokenizer: Any, token_ids: list[int], kinds: list[str], generation_start: int) -> list[Segment]:
    """Label each token by its first byte, and join neighbours of one kind."""
    labelled: list[tuple[str, bool, int, bytes]] = []
    place = 0
    name_left = 0  # bytes of a role's name still to come
    for token in split_tokens(tokenizer, token_ids):
        raw = bytes.fromhex(token.bytes)
        kind = kinds[place] if place < len(kinds) else TEMPLATE
        if token.special and kind == TEMPLATE:
            kind = CONTROL
            name_left = _role_name(tokenizer, token_ids[token.index + 1 : token.index + 5])
        elif name_left > 0 and kind == TEMPLATE:
            kind = ROLE
            name_left -= len(raw)
        labelled.append((kind, place >= generation_start, token.id, raw))
        place += len(raw)
    return _joined(labelled)


def _role_name(tokenizer: Any, following: list[int]) -> int:
    """Count the bytes of the role's name that these tokens begin with."""
    text = b"".join(token_bytes(tokenizer, token_id) for token_id in following).decode(errors="replace")
    match = _ROLE_NAME.match(text)
    return len(match[0].encode()) if match else 0


def _joined(labelled: list[tuple[str, bool, int, bytes]]) -> list[Segment]:
    groups: list[tuple[str, bool, list[int], list[bytes]]] = []
    for kind, generation, token_id, raw in labelled:
        if groups and groups[-1][:2] == (kind, generation) and kind != CONTROL:
            groups[-1][2].append(token_id)
            groups[-1][3].append(raw)
        else:
            groups.append((kind, generation, [token_id], [raw]))
    return [
        Segment(kind, b"".join(raws).decode(errors="replace"), ids, generation)
        for kind, generation, ids, raws in groups
    ]
