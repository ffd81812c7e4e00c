"""Draw the views on text: tokens, chat, batch. Colours tell kinds apart, and words say them again."""

import unicodedata

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.common.terminal import how_many
from pipeline.views.batch import BatchView, PaddedRows
from pipeline.views.chat import ChatView, Segment
from pipeline.views.tokens import Token, TokensView

_SPELT = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\", " ": "␣"}
# Told apart on light and dark themes alike, so without green, yellow, cyan and blue, which fade on one of them.
COLOURS = {
    "control": "magenta",
    "role": "bold magenta",
    "template": "red",
    "system": "underline",
    "assistant": "bold",
    "tool": "italic",
}
_CELL = 6  # columns of the screen for a number of the batch view
_NAMES = 14
_LISTED = 12  # special tokens on the screen; all of them are in the JSON


def shown(text: str, *, blanks: bool = True) -> str:
    """Spell a text so that a terminal can show it and does not obey: invisible characters spelt out, blanks as ␣."""
    made: list[str] = []
    for i, character in enumerate(text):
        kind = unicodedata.category(character)
        if character in _SPELT and (blanks or character != " "):
            made.append(_SPELT[character])
        elif kind[0] == "C" or kind in ("Zl", "Zp") or "\ufe00" <= character <= "\ufe0f":
            code = ord(character)
            made.append(
                f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
            )
        else:
            made.append(f"◌{character}" if kind[0] == "M" and i == 0 else character)  # a mark needs a carrier
    return "".join(made)


def draw_tokens(view: TokensView, console: Console) -> None:
    """Draw facts, then a line for each token; the text is last, so that right-to-left text moves nothing else."""
    roles = [f"{'/'.join(s.roles)} {s.text} {s.id}" for s in view.special_tokens if s.roles]
    others = [f"{s.text} {s.id}" for s in view.special_tokens if not s.roles]
    listed = ", ".join(others[:_LISTED]) + (
        f" … {len(others) - _LISTED} more" if len(others) > _LISTED else ""
    )
    around = f"{view.added_before or 'nothing'} before, {view.added_after or 'nothing'} after"
    facts(
        console,
        [
            ("text", shown(view.text, blanks=False)),
            ("vocabulary", f"{view.vocabulary:,} tokens"),
            ("special tokens", shown(", ".join(roles), blanks=False) or "none"),
            *([("other added", shown(listed, blanks=False))] if others else []),
            ("tokenizer adds", around),
            ("ids", " ".join(map(str, view.token_ids))),
            (
                "round trip",
                "exact" if view.exact else f"NOT exact: {shown(view.difference or '', blanks=False)}",
            ),
        ],
    )
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("#", "id"):
        table.add_column(name, justify="right")
    table.add_column("bytes", overflow="fold")
    table.add_column("text", overflow="fold")
    for token in view.tokens:
        table.add_row(str(token.index), str(token.id), _bytes(token), _token_text(token))
    console.print(table)


def draw_chat(view: ChatView, console: Console) -> None:
    """Draw the prompt as it is sent, in colours, then segment by segment with ids."""
    added = "; ".join(shown(text, blanks=False) for text in view.added) or "nothing"
    kinds = dict.fromkeys(segment.kind for segment in view.segments)
    facts(
        console,
        [
            ("row", f"{view.id} ({view.source})"),
            ("tokens", str(len(view.token_ids))),
            ("chat template", _template_words(view)),
            ("template adds", added),
            ("asks with", shown(view.generation_prompt, blanks=False) or "nothing"),
            ("BOS", _bos_words(view)),
            ("thinking", _thinking_words(view)),
        ],
    )
    console.print(
        Text.assemble("\n", *(part for kind in kinds for part in ((kind, COLOURS.get(kind, "")), "  ")))
    )
    prompt = Text()
    for segment in view.segments:
        prompt.append(_keep_lines(segment.text), COLOURS.get(segment.kind, ""))
    console.print(prompt)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("kind", no_wrap=True)
    table.add_column("ids", overflow="fold", ratio=1)
    table.add_column("text", overflow="fold", ratio=1)
    for segment in view.segments:
        table.add_row(
            _kind(segment), " ".join(map(str, segment.token_ids)), shown(segment.text, blanks=False)
        )
    console.print()
    console.print(table)


def draw_batch(view: BatchView, console: Console) -> None:
    """Draw left padding, then right; of wide rows their first and last columns."""
    for padded in (view.left, view.right):
        _draw_padded(padded, view, console)
    console.print(
        Text(
            "Left, because every row then ends in the same column: the batch writes all its next tokens there, "
            "and no row has a hole between its prompt and its answer. Padding is masked, and a position counts "
            f"a row's own tokens, so the pads (id {view.pad_token_id}) change nothing."
        )
    )


def facts(console: Console, rows: list[tuple[str, str]]) -> None:
    """Draw names and values, one a line; a long value goes on below itself."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)


def _bytes(token: Token) -> Text:
    return Text(token.bytes if token.text is None else "", style="magenta")


def _token_text(token: Token) -> Text:
    if token.special:
        return Text(shown(token.text or ""), style=COLOURS["control"])
    if token.text is not None:
        return Text(shown(token.text))
    whole = f"of {shown(token.part_of)}" if token.part_of else "no whole character"
    return Text(whole, style=COLOURS["control"])


def _template_words(view: ChatView) -> str:
    if not view.has_template:
        return "none: a base model, the prompt is sent as it is"
    role = (
        "with a system role"
        if view.has_system_role
        else "no system role: system text goes into the user's turn"
    )
    return role + (
        "; can write today's date (fix it with model.chat_template_kwargs.date_string)"
        if view.writes_date
        else ""
    )


def _bos_words(view: ChatView) -> str:
    extra = "" if view.leading_bos_count <= 1 else " TWICE: the template and something else write it"
    return f"{view.leading_bos_count} at the start, {view.bos_count} in all{extra}"


def _thinking_words(view: ChatView) -> str:
    if not view.thinking_switch:
        return "the template knows none"
    opened = "the prompt opens it" if view.opens_thinking else "the prompt does not open it"
    return f"the template knows it; {opened}"


def _kind(segment: Segment) -> Text:
    mark = " →" if segment.generation_prompt else ""
    return Text(segment.kind + mark, style=COLOURS.get(segment.kind, ""))


def _keep_lines(text: str) -> str:
    return "\n".join(shown(line, blanks=False) for line in text.split("\n"))


def _draw_padded(padded: PaddedRows, view: BatchView, console: Console) -> None:
    width = len(padded.input_ids[0])
    room = max(2, (console.width - _NAMES - 6 - _CELL) // _CELL)
    columns = (
        list(range(width))
        if width <= room
        else [*range(room // 2), *range(width - (room - room // 2), width)]
    )
    console.print(
        Text(
            f"{padded.side} padding: {how_many(len(view.prompts), 'row')} × {how_many(width, 'column')}, "
            f"{padded.padding:.0%} padding",
            style="bold",
        )
    )
    console.print(_line("", "column", [str(c) for c in columns], columns, style="dim"))
    for row, name in enumerate(view.prompts):
        mask = padded.attention_mask[row]
        for label, values in (
            ("ids", padded.input_ids[row]),
            ("mask", mask),
            ("pos", padded.position_ids[row]),
        ):
            line = _line(
                name if label == "ids" else "", label, [str(values[c]) for c in columns], columns, mask
            )
            console.print(line)
    ends = sorted(set(padded.next_columns))
    where = (
        f"column {ends[0]} for all rows" if len(ends) == 1 else f"columns {', '.join(map(str, ends))}: ragged"
    )
    console.print(Text(f"The next tokens go to {where}.\n"))


def _line(
    name: str,
    label: str,
    cells: list[str],
    columns: list[int],
    mask: list[int] | None = None,
    style: str = "",
) -> Text:
    head = f"{shown(name, blanks=False)[: _NAMES - 1]:{_NAMES}}{label:6}"
    line = Text.assemble((head, "bold" if mask else style))
    for i, (cell, column) in enumerate(zip(cells, columns, strict=True)):
        if i and column != columns[i - 1] + 1:
            line.append(f"{'…':>{_CELL}}", "dim")
        pad = mask is not None and not mask[column]
        line.append(f"{cell:>{_CELL}}", "dim" if pad else style)
    return line
