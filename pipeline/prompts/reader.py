"""Read prompt files of every format, streamed into prompt rows.

A row is `{"prompt": …}`, `{"messages": […]}` or an OpenAI batch line; one that cannot be run becomes
a BadRow that says why, and the next one is read. Memory does not grow with the file, but for the ids
that rows bring: an 8-byte hash each, about 80 bytes in Python (two different ids of a million are taken
for the same with a chance of 3 in 10⁸). Where rows bring none, the file is looked through once for ids that
are like generated ones: a user's wins, wherever it stands.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any

from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.request import BadRow, GenerationParams, PromptRow
from pipeline.common.streams import is_stream
from pipeline.common.suggestions import did_you_mean
from pipeline.config.schema import Config, root
from pipeline.prompts.address import Address, dataset_address, pinned
from pipeline.prompts.constraint import job_params
from pipeline.prompts.lines import SUFFIXES, before_number, read_lines, suffix_of
from pipeline.prompts.row import parse_line, pop_id, to_row
from pipeline.prompts.settings import BadLine, show
from pipeline.prompts.shape import PLAIN, Shape, Shaper, Turns, turns_of
from pipeline.prompts.torn import Torn

_GENERATED_ID = re.compile(r"row-[0-9]+(-[0-9]+)?")


def open_prompts(
    config: Config, path: str | None = None, params: GenerationParams | None = None
) -> Iterator[PromptRow | BadRow]:
    """Read the rows of a job as its config asks for them: its file, parameters, shape, limit and shard.

    Args:
        path: of the prompt file, where it was found before, or kept from standard input.
        params: None are the config's.

    Raises:
        ConfigError, PromptError: as `find_prompts`, `read_prompts` and `job_params`.
    """
    return read_prompts(
        path or find_prompts(config.prompts),
        params or job_params(config),
        shape=Shape.of(config),
        limit=config.limit,
        shard=config.shard,
    )


def find_prompts(name: str, jobs_dir: Path | None = None) -> str:
    """Find what `name` means: a path, a name in `jobs_dir`, a dataset, or - for standard input.

    The address of a dataset on the hub comes back with the commit that its revision is now.

    Args:
        jobs_dir: None is the jobs/ that comes with the pipeline.

    Raises:
        PromptError: there is none; the message names the nearest one.
    """
    if name == "-":
        return name
    if address := _address(name):
        return pinned(address).shown
    jobs_dir = jobs_dir or root() / "jobs"
    tried = [Path(name), *(jobs_dir / f"{name}{suffix}" for suffix in ("", ".jsonl", ".jsonl.gz"))]
    for path in tried:
        if _is_readable(path):
            return str(path)
    near = did_you_mean(name, [*_names(jobs_dir), *_names(Path(name).parent)])
    raise PromptError(
        found=f"prompts={name}: no such file, and none of that name in {jobs_dir}",
        fix=f"{near} Pass a path, a name of that folder, or - for standard input.",
    )


def read_prompts(
    path: str | Path,
    params: GenerationParams,
    *,
    shape: Shape = PLAIN,
    limit: int | None = None,
    shard: str | None = None,
) -> Iterator[PromptRow | BadRow]:
    """Give one row for each line that is not blank, in the file's order, read as they are asked for.

    Args:
        path: of a file or dataset as `find_prompts` gives it, or - for standard input.
        params: the job's; a row's own overrides are laid over them.
        shape: how the file's columns become prompts.
        limit: only the file's first rows.
        shard: "1/4" keeps the rows whose index % 4 is 1; ids and indices stay those of the whole file.

    Raises:
        ConfigError: `limit` or `shard` makes no sense, or a template is not Jinja.
        PromptError: the examples cannot be used; (while reading) the file cannot be read, or holds no rows.
    """
    if limit is not None and limit < 1:
        raise ConfigError(found=f"limit={limit}: must be at least 1", fix="Pass null for all rows.")
    part, parts = (0, 1) if shard is None else parse_shard(shard)
    shaper = Shaper(shape, _examples(shape, params) if shape.examples else [])
    rows = islice(_rows(str(path), params, shaper), limit)
    return (row for row in rows if row.index % parts == part)


def listed_prompts(
    prompts: Iterable[str | dict[str, Any]], params: GenerationParams
) -> Iterator[PromptRow | BadRow]:
    """Give one row for each text or row of a list."""
    for index, prompt in enumerate(prompts):
        source = f"prompts[{index}]"
        fields = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        row_id = str(fields.pop("id", f"row-{index}"))
        try:
            yield to_row(fields, index, row_id, source, params, "prompt")
        except BadLine as bad:
            yield BadRow(index, row_id, source, f"{source}: {bad}")


def _examples(shape: Shape, params: GenerationParams) -> Turns:
    """Read the turns that go before every row's own, from the first rows of the examples' file."""
    path = find_prompts(shape.examples or "")
    rows = list(read_prompts(path, params, shape=replace(shape, examples=None), limit=shape.shots))
    if bad := next((row for row in rows if isinstance(row, BadRow)), None):
        raise PromptError(found=f"examples: {bad.error}")
    if len(rows) < shape.shots:
        raise PromptError(
            found=f"examples={path}: holds {len(rows)} rows, and shots={shape.shots}", fix="Lower shots=…."
        )
    return [turn for row in rows if isinstance(row, PromptRow) for turn in turns_of(row)]


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


def _rows(path: str, params: GenerationParams, shaper: Shaper) -> Iterator[PromptRow | BadRow]:
    name = "<stdin>" if path == "-" else path
    ids, place = _Ids(path, shaper), before_number(path)
    index = number = 0
    try:
        for number, line in read_lines(path):
            if isinstance(line, BadLine) or line.strip():
                yield _row(line, index, f"{place}{number}", ids, params, shaper)
                index += 1
    except Torn as torn:
        if index == 0:
            raise PromptError(
                found=f"{name}: not a whole {torn.kind} file ({torn.why})", fix="Copy it again."
            ) from torn
        bad = BadLine(
            f"the {torn.kind} data breaks off here ({torn.why}); later rows are lost", "Copy the file again."
        )
        yield _row(bad, index, f"{place}{number + 1}", ids, params, shaper)
    except OSError as error:
        raise PromptError(
            found=f"{name}: cannot be read ({error.strerror or error})", fix="Check the path."
        ) from error
    if index == 0:
        raise PromptError(
            found=f"{name}: holds no rows", fix='Write one JSON object a line, as {"prompt": "Hello"}.'
        )


def _row(
    line: bytes | BadLine, index: int, source: str, ids: "_Ids", params: GenerationParams, shaper: Shaper
) -> PromptRow | BadRow:
    row_id = None
    try:
        if isinstance(line, BadLine):
            raise line
        columns = parse_line(line)
        fields = shaper.named(columns)
        row_id = ids.take(pop_id(fields), index)
        row = to_row(shaper.asked(fields, columns), index, row_id, source, params, shaper.prompt_field)
        return shaper.row(row)
    except BadLine as bad:
        return BadRow(index, row_id or ids.make(index), source, f"{source}: {bad}")


class _Ids:
    """Give every row an id of its own; an id that a row brings is never taken for another. The costs: see above."""

    def __init__(self, path: str, shaper: Shaper) -> None:
        self._path, self._shaper = path, shaper
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
            self._claimed = set(_claimed(self._path, self._shaper))
        names = (f"row-{index}-{n}" if n > 1 else f"row-{index}" for n in count(1))
        return next(
            name for name in names if _hash(name) not in self._claimed and _hash(name) not in self._given
        )


def _claimed(path: str, shaper: Shaper) -> Iterator[int]:
    """Hash the ids that look like generated ones, of the whole file; a row's own place is no claim on another's."""
    if path == "-" or is_stream(path):  # which is read once
        return
    with suppress(OSError, PromptError, Torn):
        lines = (line for _, line in read_lines(path) if isinstance(line, BadLine) or line.strip())
        for index, line in enumerate(lines):
            if isinstance(line, bytes) and b'"row-' in line:
                with suppress(BadLine):
                    own = pop_id(shaper.named(parse_line(line)))
                    if own is not None and _GENERATED_ID.fullmatch(own) and own != f"row-{index}":
                        yield _hash(own)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _address(name: str) -> Address | None:
    """Read the address of a dataset; None where the words name a file, or nothing that there is."""
    try:
        return dataset_address(name)
    except (OSError, ValueError):
        return None


def _is_readable(path: Path) -> bool:
    """Say whether it is a file, or a pipe, as of a shell's <(…), and no folder."""
    try:
        return path.exists() and not path.is_dir()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if suffix_of(path.name) in SUFFIXES)
    except (OSError, ValueError):
        return []
