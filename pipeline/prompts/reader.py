"""Read prompt files: JSON Lines, streamed into prompt rows.

A line is `{"prompt": …}`, `{"messages": […]}` or an OpenAI batch line; a line that cannot be run becomes
a BadRow that says why, and the next line is read. Memory does not grow with the file, but for the ids
that rows bring: an 8-byte hash each, about 80 bytes in Python (two different ids of a million are taken
for the same with a chance of 3 in 10⁸). Where rows bring none, the file is looked through once for ids that
are like generated ones: a user's wins, wherever it stands.
"""

import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.request import BadRow, GenerationParams, PromptRow
from pipeline.common.suggestions import did_you_mean
from pipeline.common.units import MIB
from pipeline.config.schema import Config, root
from pipeline.prompts.constraint import job_params
from pipeline.prompts.row import parse_line, pop_id, to_row
from pipeline.prompts.settings import BadLine, show

MAX_LINE_BYTES = 16 * MIB
_BOM = b"\xef\xbb\xbf"
_GENERATED_ID = re.compile(r"row-[0-9]+(-[0-9]+)?")


def open_prompts(config: Config, path: str | None = None) -> Iterator[PromptRow | BadRow]:
    """Read the rows of a job as its config asks for them: its file, parameters, prompt field, limit and shard.

    Args:
        path: of the prompt file, where it was found before, or kept from standard input.

    Raises:
        ConfigError, PromptError: as `find_prompts`, `read_prompts` and `job_params`.
    """
    return read_prompts(
        path or find_prompts(config.prompts),
        job_params(config),
        prompt_field=config.prompt_field,
        limit=config.limit,
        shard=config.shard,
    )


def find_prompts(name: str, jobs_dir: Path | None = None) -> str:
    """Find the prompt file that `name` means: a path, a name in `jobs_dir`, or - for standard input.

    Args:
        jobs_dir: None is the jobs/ that comes with the pipeline.

    Raises:
        PromptError: there is none; the message names the nearest one.
    """
    if name == "-":
        return name
    jobs_dir = jobs_dir or root() / "jobs"
    tried = [Path(name), *(jobs_dir / f"{name}{suffix}" for suffix in ("", ".jsonl", ".jsonl.gz"))]
    for path in tried:
        if _is_readable(path):
            return str(path)
    with suppress(OSError):
        if Path(name).is_dir():
            raise PromptError(found=f"prompts={name}: is a folder", fix="Name one file in it.")
    near = did_you_mean(name, [*_names(jobs_dir), *_names(Path(name).parent)])
    raise PromptError(
        found=f"prompts={name}: no such file, and no {name}, {name}.jsonl or {name}.jsonl.gz in {jobs_dir}",
        fix=f"{near} Pass a path, a name of that folder, or - for standard input.",
    )


def read_prompts(
    path: str | Path,
    params: GenerationParams,
    *,
    prompt_field: str = "prompt",
    limit: int | None = None,
    shard: str | None = None,
) -> Iterator[PromptRow | BadRow]:
    """Give one row for each line that is not blank, in the file's order, read as they are asked for.

    Args:
        path: a .jsonl or .jsonl.gz file, or - for standard input.
        params: the job's; a row's own overrides are laid over them.
        limit: only the file's first rows.
        shard: "1/4" keeps the rows whose index % 4 is 1; ids and indices stay those of the whole file.

    Raises:
        ConfigError: `limit` or `shard` makes no sense.
        PromptError: (while reading) the file cannot be read, or holds no rows.
    """
    if limit is not None and limit < 1:
        raise ConfigError(found=f"limit={limit}: must be at least 1", fix="Pass null for all rows.")
    part, parts = (0, 1) if shard is None else parse_shard(shard)
    rows = islice(_rows(str(path), params, prompt_field), limit)
    return (row for row in rows if row.index % parts == part)


def parse_shard(shard: str) -> tuple[int, int]:
    """Read "1/4" as (1, 4).

    Raises:
        ConfigError: not of this form, or not one of the shards.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(
            found=f"shard={shard}: must be I/N with I from 0 to N-1", fix="Write it as 0/4, 1/4, 2/4 or 3/4."
        )
    return int(match[1]), int(match[2])


def _rows(path: str, params: GenerationParams, prompt_field: str) -> Iterator[PromptRow | BadRow]:
    name = "<stdin>" if path == "-" else path
    ids = _Ids(path)
    index = number = 0
    try:
        for number, line in _lines(path):
            if isinstance(line, BadLine) or line.strip():
                yield _row(line, index, f"{name}:{number}", ids, params, prompt_field)
                index += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if index == 0:
            raise PromptError(
                found=f"{name}: not a whole gzip file ({error})", fix="Copy it again."
            ) from error
        torn = BadLine(
            f"the gzip data breaks off here ({error}); later rows are lost", "Copy the file again."
        )
        yield _row(torn, index, f"{name}:{number + 1}", ids, params, prompt_field)
    except OSError as error:
        raise PromptError(
            found=f"{name}: cannot be read ({error.strerror or error})", fix="Check the path."
        ) from error
    if index == 0:
        raise PromptError(
            found=f"{name}: holds no rows", fix='Write one JSON object a line, as {"prompt": "Hello"}.'
        )


def _row(
    line: bytes | BadLine, index: int, source: str, ids: "_Ids", params: GenerationParams, prompt_field: str
) -> PromptRow | BadRow:
    row_id = None
    try:
        if isinstance(line, BadLine):
            raise line
        fields = parse_line(line)
        row_id = ids.take(pop_id(fields), index)
        return to_row(fields, index, row_id, source, params, prompt_field)
    except BadLine as bad:
        return BadRow(index, row_id or ids.make(index), source, f"{source}: {bad}")


def _lines(path: str) -> Iterator[tuple[int, bytes | BadLine]]:
    """Read the lines, each with its number from 1."""
    with _open(path) as stream:
        for number in count(1):
            line = _read_line(stream)
            if line == b"":
                return
            yield number, line.removeprefix(_BOM) if number == 1 and isinstance(line, bytes) else line


def _open(path: str) -> AbstractContextManager[BinaryIO]:
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    if path.endswith(".gz"):
        return cast(AbstractContextManager[BinaryIO], gzip.open(path, "rb"))
    return Path(path).open("rb")


def _read_line(stream: BinaryIO) -> bytes | BadLine:
    """Read the next line, b"" at the end. Of a line that is too long, no more than the limit is ever held."""
    line = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
        return line
    size = len(line)
    while line and not line.endswith(b"\n"):
        line = stream.readline(MIB)
        size += len(line)
    return BadLine(f"the line is {size} bytes long; the limit is {MAX_LINE_BYTES}", "Split or shorten it.")


class _Ids:
    """Give every row an id of its own; an id that a row brings is never taken for another. The costs: see above."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._given: set[int] = set()  # hashes
        self._claimed: set[int] | None = (
            None  # hashes of ids as row-7 that other rows bring; None: not looked for
        )

    def take(self, own: str | None, index: int) -> str:
        """Take the row's own id, or make one if it brings none."""
        if own is None:
            return self.make(index)
        if _hash(own) in self._given:
            raise BadLine(f"repeats the id {show(own)} of an earlier row", "Give each row an id of its own.")
        self._given.add(_hash(own))
        return own

    def make(self, index: int) -> str:
        """Make row-<index>, or where another row brings that as its own id, row-<index>-2 and so on."""
        if self._claimed is None:
            self._claimed = set(_claimed(self._path))
        names = (f"row-{index}-{n}" if n > 1 else f"row-{index}" for n in count(1))
        return next(
            name for name in names if _hash(name) not in self._claimed and _hash(name) not in self._given
        )


def _claimed(path: str) -> Iterator[int]:
    """Hash the ids that look like generated ones, of the whole file; a row's own place is no claim on another's."""
    if not Path(path).is_file():  # standard input is read once
        return
    with suppress(OSError, EOFError, zlib.error):
        lines = (line for _, line in _lines(path) if isinstance(line, BadLine) or line.strip())
        for index, line in enumerate(lines):
            if isinstance(line, bytes) and b'"row-' in line:
                with suppress(BadLine):
                    own = pop_id(parse_line(line))
                    if own is not None and _GENERATED_ID.fullmatch(own) and own != f"row-{index}":
                        yield _hash(own)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _is_readable(path: Path) -> bool:
    """Say whether it is a file, or a pipe, as of a shell's <(…), and no folder."""
    try:
        return path.exists() and not path.is_dir()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.glob("*.jsonl*"))
    except (OSError, ValueError):
        return []
