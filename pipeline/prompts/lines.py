"""Read a prompt file's rows as lines of JSON, whatever its format: JSON Lines, a JSON array, CSV, TSV or a table.

One row is held at a time, and never more than MAX_LINE_BYTES of it.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.common.errors import PromptError
from pipeline.common.terminal import how_many
from pipeline.common.units import MIB
from pipeline.prompts.address import dataset_address
from pipeline.prompts.settings import BadLine, is_setting, show
from pipeline.prompts.torn import Torn

MAX_LINE_BYTES = 16 * MIB
TABLES = (".parquet", ".arrow", ".feather", ".ipc")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", *TABLES)
_BOM = b"\xef\xbb\xbf"
_MARK = re.compile(rb'\\.|["{}\[\],\n]', re.DOTALL)
_NOT_TEXT = ("messages", "generation", "body", "chat_template_kwargs", "continue_final_message")

Lines = Iterator[tuple[int, bytes | BadLine]]


def read_lines(path: str) -> Lines:
    """Read the rows, each with its line in the file from 1, or in a table its number from 1.

    Raises:
        PromptError: the file is not what its name says.
        Torn: it breaks off, or is damaged.
    """
    if is_table(path):
        from pipeline.prompts.tables import read_table

        yield from read_table(path, MAX_LINE_BYTES)
        return
    with _torn_gzip(), _open(path) as stream:
        match suffix_of(path):
            case ".csv":
                yield from _separated(stream, path, ",")
            case ".tsv":
                yield from _separated(stream, path, "\t")
            case ".json":
                yield from _json(stream)
            case _:
                yield from _json_lines(stream)


def is_table(path: str) -> bool:
    """Say whether rows are read through pyarrow or datasets: they have numbers and no lines."""
    return suffix_of(path) in TABLES or dataset_address(path) is not None


def before_number(path: str) -> str:
    """Say what stands before a row's number, for an error."""
    return f"{path}, row " if is_table(path) else f"{'<stdin>' if path == '-' else path}:"


def suffix_of(path: str) -> str:
    """Tell a file's format by its name; what is packed is what was packed."""
    return Path(path.lower().removesuffix(".gz")).suffix


def _open(path: str) -> AbstractContextManager[BinaryIO]:
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    if path.endswith(".gz"):
        return cast(AbstractContextManager[BinaryIO], gzip.open(path, "rb"))
    return Path(path).open("rb")


@contextmanager
def _torn_gzip() -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Torn("gzip", error) from error


def _json_lines(stream: BinaryIO, before: bytes = b"") -> Lines:
    """Read a line at a time.

    Args:
        before: what was read of the first line, to look at it.
    """
    for number in count(1):
        line = _read_line(stream) if number > 1 or not before else _go_on(before, stream)
        if line == b"":
            return
        yield number, line.removeprefix(_BOM) if number == 1 and isinstance(line, bytes) else line


def _go_on(before: bytes, stream: BinaryIO) -> bytes | BadLine:
    """Read the rest of a line."""
    if before.endswith(b"\n"):
        return before
    rest = _read_line(stream)
    return rest if isinstance(rest, BadLine) else before + rest


def _read_line(stream: BinaryIO) -> bytes | BadLine:
    """Read the next line, b"" at the end. Of a line that is too long, no more than the limit is ever held."""
    line = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
        return line
    size = len(line)
    while line and not line.endswith(b"\n"):
        line = stream.readline(MIB)
        size += len(line)
    return _too_long("line", size)


def _too_long(what: str, size: int) -> BadLine:
    return BadLine(f"the {what} is {size} bytes long; the limit is {MAX_LINE_BYTES}", "Split or shorten it.")


def _json(stream: BinaryIO) -> Lines:
    """Read an array's elements; a .json file that begins otherwise is JSON Lines under another name."""
    first = stream.readline(MIB)
    blank = 0  # lines before what is looked at
    while first.removeprefix(_BOM) and not first.removeprefix(_BOM).strip():
        blank, first = blank + 1, stream.readline(MIB)
    is_array = first.removeprefix(_BOM).lstrip().startswith(b"[")
    rows = _elements(stream, first.removeprefix(_BOM)) if is_array else _json_lines(stream, first)
    return ((number + blank, line) for number, line in rows)


def _elements(stream: BinaryIO, first: bytes) -> Lines:
    """Cut an array into the texts of its elements, each with the line that it begins in."""
    depth, quoted, line = 0, False, 1
    element, size, begun = bytearray(), 0, 1
    for chunk in _whole_escapes(chain([first], iter(lambda: stream.read(MIB), b"")), stream):
        start = 0  # of what belongs to the element
        for mark in _MARK.finditer(chunk):
            kind = mark[0]
            line += kind == b"\n"
            quoted ^= kind == b'"'
            if quoted or kind[0] in b'\\"\n':
                continue
            depth += (kind in b"[{") - (kind in b"]}")
            if kind == b"[" and depth == 1:
                start = mark.end()
            elif depth == 0 or (depth == 1 and kind == b","):
                size += mark.start() - start
                element += chunk[start : mark.start()]
                yield _element(element, size, begun)
                element, size, begun, start = bytearray(), 0, line, mark.end()
            if depth == 0:
                if (chunk[start:] + stream.read(MIB)).strip():
                    yield line, BadLine("there is more after the array's end", "Keep one array.")
                return
        size += len(chunk) - start
        if size <= MAX_LINE_BYTES:
            element += chunk[start:]
    yield begun, BadLine("the array is not closed: the file breaks off in this row", "Copy the file again.")


def _element(text: bytearray, size: int, begun: int) -> tuple[int, bytes | BadLine]:
    number = begun + text[: len(text) - len(text.lstrip())].count(b"\n")
    return number, _too_long("element", size) if size > MAX_LINE_BYTES else bytes(text)


def _whole_escapes(chunks: Iterable[bytes], stream: BinaryIO) -> Iterator[bytes]:
    """Read on where a chunk ends between a backslash and what it escapes."""
    for chunk in chunks:
        while (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 and (more := stream.read(1)):
            chunk += more
        yield chunk


class _Texts:
    """Give csv one decoded line after another; bytes that are no UTF-8 are found when the row is whole."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._first = True

    def __iter__(self) -> "_Texts":
        return self

    def __next__(self) -> str:
        line = _read_line(self._stream)
        if isinstance(line, BadLine):
            raise line
        if not line:
            raise StopIteration
        if self._first:
            self._first, line = False, line.removeprefix(_BOM)
        return line.decode("utf-8", "surrogateescape")


def _separated(stream: BinaryIO, path: str, delimiter: str) -> Lines:
    """Read CSV or TSV: the first row names the columns."""
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader(_Texts(stream), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except (csv.Error, BadLine) as error:
            # Nobody can say where the next row begins: no guess is run.
            fault = BadLine(f"{_words(error)}; what follows is not read", "Correct it: quotes go in pairs.")
            if names is None:
                raise PromptError(f"{path}:{number}: {fault.found}", fault.fix) from error
            yield number, fault
            return
        if names is None and cells:
            names = _header(cells, path, number)
        elif cells:
            yield number, _fields(names or [], cells)


def _words(error: Exception) -> str:
    if isinstance(error, BadLine):
        return error.found
    text = str(error)
    return (
        "a quote is opened here and never closed" if text == "unexpected end of data" else f"not CSV ({text})"
    )


def _header(names: list[str], path: str, number: int) -> list[str]:
    if broken := next((name for name in names if not _is_text(name)), None):
        raise PromptError(f"{path}:{number}: {show(broken)} is not UTF-8 text", "Save the file as UTF-8.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PromptError(f"{path}:{number}: two columns are called {show(twice)}", "Give each its own name.")
    return names


def _fields(names: list[str], cells: list[str]) -> bytes | BadLine:
    """Make a row; an empty cell of a column that says how, and not what, says nothing."""
    if len(cells) != len(names):
        return BadLine(
            f"has {how_many(len(cells), 'cell')}, and the first row names {how_many(len(names), 'column')}",
            "Put cells with the separator in quotes.",
        )
    for name, cell in zip(names, cells, strict=True):
        if not _is_text(cell):
            what = "holds NUL bytes" if "\0" in cell else "is not UTF-8"
            return BadLine(f"the cell of {show(name)} {what}", "Save the file as UTF-8 text.")
    fields = dict(zip(names, map(_value, names, cells), strict=True))
    line = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
    return line if len(line) <= MAX_LINE_BYTES else _too_long("row", len(line))


def _value(name: str, cell: str) -> object:
    """Read a cell as text; where the pipeline wants no text, as JSON."""
    typed = name in _NOT_TEXT or is_setting(name)
    if not cell and (typed or name in ("id", "custom_id", "system")):
        return None
    try:
        return json.loads(cell) if typed else cell
    except (ValueError, RecursionError):
        return cell  # whoever wants no text says so


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\udc80" <= character <= "\udcff" for character in text)
