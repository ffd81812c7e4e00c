"""Show a person progress and tables in the terminal. Model output is shown, never obeyed."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Screen(Console):
    """A console whose command goes on when nobody reads any longer, as after `| head`."""

    def on_broken_pipe(self) -> None:
        """Write to nowhere from now on."""
        self.quiet = True
        to_nowhere(self.file)


class Unfailing:
    """Wrap a stream so that what cannot be shown is lost, and never an error: its terminal may be gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        with self._to_nowhere_at_an_error():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand it on."""
        with self._to_nowhere_at_an_error():
            self._stream.flush()

    @contextlib.contextmanager
    def _to_nowhere_at_an_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: it was closed
            with contextlib.suppress(OSError, ValueError):
                to_nowhere(self._stream)


def to_nowhere(stream: Any) -> None:
    """Send all that a stream still holds or gets to nowhere, so that the interpreter's last flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Let no standard stream end a command: whether closed, in ASCII, or of a terminal that goes away."""
    # A closed one would lend its number to the next file that is opened, say outputs.jsonl.
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stderr(cast(TextIO, Unfailing(sys.stderr or open(2, "w", encoding="utf-8")))):
        yield


console = Screen(stderr=True, highlight=False)  # for what is said meanwhile
answer = Screen(highlight=False)  # for what was asked for, on standard output


def how_many(number: int, word: str) -> str:
    """Show how many things there are: 1 row, 1,024 rows."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def visible(text: str) -> str:
    """Spell out a text's control and direction characters, so that a terminal obeys none of them."""
    return CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def say(text: str, style: str = "") -> None:
    console.print(Text(visible(text), style=style), soft_wrap=True)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print rows as a table; numbers and words as they are given."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(visible(str(cell))) for cell in row))
    console.print(made)


def aligned(columns: Sequence[str], rows: Iterable[Sequence[Any] | Text]) -> Text:
    """Set rows in columns to the right, but for the last, which is never cut; a text is a line of its own."""
    rows = list(rows)
    cells = [columns, *([visible(str(cell)) for cell in row] for row in rows if not isinstance(row, Text))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[Any]) -> str:
        *figures, last = (visible(str(cell)) for cell in row)
        shown = [figure.rjust(width) for figure, width in zip(figures, widths, strict=False)]
        return "  ".join([*shown, last])

    lines = [row if isinstance(row, Text) else Text(line(row)) for row in rows]
    return Text("\n").join([Text(line(columns), style="bold"), *lines])


def facts(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, one a line, however long."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    console.print(Text(title, style="bold"))
    for name, value in rows:
        line = Text(f"  {name:{width}}  ", style="dim")
        line.append(Text(visible(str(value)), style="not dim"))
        console.print(line, soft_wrap=True)
