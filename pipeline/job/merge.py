"""Merge the shards of a job into one outputs.jsonl, in the order of the prompt file.

Nothing is merged unless every row is there exactly once. Memory: 24 bytes a row.
"""

import datetime
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.common.errors import OutputError
from pipeline.common.terminal import how_many, say
from pipeline.job.counts import read_counts
from pipeline.job.folder import JobFolder
from pipeline.job.paths import JobPaths, shard_of
from pipeline.job.row_ids import row_ids
from pipeline.job.rows import parse_row
from pipeline.job.shards import combine
from pipeline.job.stored import read_manifest, read_stats
from pipeline.job.todo import Todo
from pipeline.prompts.count import prompts_sha256

SAME_ROWS = ("prompts_sha256", "limit")  # what shards of one job must agree on
SAME = ("model", "revision", "quantized_experts", *SAME_ROWS)  # and those that have rows
AGAIN = "Submit or run all shards again, with the same limit=: just what is missing is done."
ANEW = "Run one of the two again as the other was, with resume=never, or move it away and submit again."
NAMED = 10  # rows that an error names


@dataclass(frozen=True, slots=True)
class Shard:
    """Hold the lines of one shard in the order of their rows, as parallel arrays."""

    paths: JobPaths
    todo: Todo
    rows: "array[int]"  # index in the prompt file
    samples: "array[int]"
    offsets: "array[int]"  # of the line in outputs.jsonl


def merge(folder: Path) -> int:
    """Merge the folder's shards; return the number of lines.

    Raises:
        OutputError: a shard is missing or not complete, rows are missing or there twice, the shards
            are not of one job or of one prompt file as it is now, or the folder holds results of its own.
            Then nothing has changed.
    """
    parts = [JobPaths(shard) for shard in _find_shards(folder)]
    todos = [_read_todo(part) for part in parts]
    manifests = [_manifest(part, todo) for part, todo in zip(parts, todos, strict=True)]
    _check_alike(parts, todos, manifests)
    _check_prompts(todos[0])
    check_whole(JobPaths(folder))
    shards = [_read_shard(part, todo) for part, todo in zip(parts, todos, strict=True)]
    for part, shard in enumerate(shards):
        _check_rows(shard, part, len(shards))
    errors = sum(read_counts(part.folder).errors for part in parts)
    with JobFolder(folder) as results:
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = {"when": when, **_day(manifests), "merged_from": [part.folder.name for part in parts]}
        # First, so that what is merged can be told from a job's own results at any moment.
        results.write_json(results.manifest, {**manifests[0], **facts})
        lines = _write(shards, results)
        stats = combine([read_stats(shard.paths) for shard in shards if shard.todo.rows])
        stats["rows"] = {**(stats.get("rows") or {}), "total": lines, "done": lines, "errors": errors}
        results.write_json(results.stats, stats)
    return lines


def is_merged(folder: Path) -> bool:
    """Say whether a folder's results were merged from shards, and are no job's own."""
    return "merged_from" in read_manifest(JobPaths(folder))


def _find_shards(folder: Path) -> list[Path]:
    """Find all N of them, in order."""
    found = {place: path for path in JobPaths(folder).shards if (place := shard_of(path))}
    splits = {parts for _, parts in found}
    if not splits:
        raise OutputError(
            found=f"{folder}: holds no shards (shard-0-of-4 …)", fix="Give the folder that does."
        )
    if len(splits) > 1:
        names = ", ".join(sorted(path.name for path in found.values()))
        raise OutputError(
            found=f"{folder}: shards of different splits: {names}",
            fix="Move away those that you do not want.",
        )
    by_number = {part: path for (part, _), path in found.items()}
    missing = [i for i in range(splits.pop()) if i not in by_number]
    if missing:
        raise OutputError(
            found=f"{folder}: shards {_some(missing)} are missing", fix="Submit or run them first."
        )
    return [by_number[i] for i in sorted(by_number)]


def _read_todo(shard: JobPaths) -> Todo:
    todo = Todo.read(shard.folder)
    if todo is None:
        raise OutputError(found=f"{shard.folder}: does not say which rows it has to do", fix=AGAIN)
    return todo


def _manifest(shard: JobPaths, todo: Todo) -> dict[str, Any]:
    """Read a shard's manifest; what the rows answer is as the last run found it."""
    before = {"quantized_experts": False}  # of versions that wrote no such key
    return {**before, **read_manifest(shard), "prompts_sha256": todo.prompts_sha256, "limit": todo.limit}


def _check_alike(shards: list[JobPaths], todos: list[Todo], manifests: list[dict[str, Any]]) -> None:
    for shard, todo, manifest in zip(shards, todos, manifests, strict=True):
        for key in SAME if todo.rows else SAME_ROWS:
            if manifest.get(key) != manifests[0].get(key):
                raise OutputError(
                    found=f"{shard.folder}: its {key} is {manifest.get(key)}, and that of "
                    f"{shards[0].folder.name} is {manifests[0].get(key)}",
                    fix=AGAIN if key in SAME_ROWS else ANEW,
                )


def _day(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Say that prompts have the dates of several days, where they do: all are noted then; else none is new."""
    days = sorted({str(m.get("template_date")) for m in manifests if m.get("prompts_have_date")})
    if len(days) < 2:
        return {}
    say(
        f"The chat template writes the date, and the shards began on different days ({', '.join(days)}): their "
        "prompts differ by that. model.template_date=… gives all of them one.",
        style="yellow",
    )
    return {"template_date": days}


def _check_prompts(todo: Todo) -> None:
    """Refuse a prompt file that changed: what is new in it is missing. One that is gone asks for no more."""
    sha256 = prompts_sha256(todo.prompts)
    if sha256 is not None and sha256 != todo.prompts_sha256:
        raise OutputError(found=f"{todo.prompts}: has changed since the shards read it", fix=AGAIN)


def check_whole(whole: JobPaths) -> None:
    """Refuse to write over results that were not merged."""
    if whole.rows.exists() and not is_merged(whole.folder):
        raise OutputError(
            found=f"{whole.rows}: holds the results of a job that was run without shards",
            fix="Move it away to merge.",
        )


def _read_shard(paths: JobPaths, todo: Todo) -> Shard:
    """Find where each line begins; what it says is not kept. Rows that a larger limit made are left out."""
    keys: list[tuple[int, int, int]] = []
    offset = 0
    with _open(paths.rows) as file:
        for number, line in enumerate(file, 1):
            row = parse_row(line)
            if row is None:
                raise OutputError(
                    found=f"{paths.rows}:{number}: a damaged line",
                    fix="Run the shard again: it will be mended.",
                )
            if todo.limit is None or row["index"] < todo.limit:
                keys.append((row["index"], row["sample"], offset))
            offset += len(line)
    keys.sort()
    columns = zip(*keys, strict=True) if keys else ((), (), ())
    return Shard(paths, todo, *(array("q", column) for column in columns))


def _check_rows(shard: Shard, part: int, parts: int) -> None:
    """Check that every row of the prompt file's that is this shard's is there, with all its samples, once."""
    folder, todo = shard.paths.folder, shard.todo
    keys = zip(shard.rows, shard.samples, strict=True)
    if twice := [a[0] for a, b in pairwise(keys) if a == b]:
        raise OutputError(
            found=f"{folder}: {_ids(twice, shard)} are there twice",
            fix=f"Move {shard.paths.rows.name} away and run the shard again.",
        )
    expected = range(part, part + todo.rows * parts, parts)
    there = set(shard.rows)
    if strange := sorted(there.difference(expected)):
        raise OutputError(
            found=f"{folder}: {_ids(strange, shard)} belong to another shard",
            fix="Move the shard's folder away and run it again.",
        )
    done = f"{folder}: {len(shard.rows):,} of {how_many(todo.total, 'row')} done"
    if gaps := todo.rows - len(there):
        named = list(islice((row for row in expected if row not in there), NAMED))
        raise OutputError(found=f"{done}; {_ids(named, shard, gaps)} are missing", fix=AGAIN)
    if len(shard.rows) < todo.total:
        raise OutputError(found=f"{done}; samples of some are missing", fix=AGAIN)


def _write(shards: list[Shard], results: JobFolder) -> int:
    with ExitStack() as stack:
        files = [stack.enter_context(_open(shard.paths.rows)) for shard in shards]
        return results.write_lines(results.rows, _in_order(shards, files))


def _in_order(shards: list[Shard], files: list[BinaryIO]) -> Iterator[bytes]:
    """Go around: row 0 lies in shard 0, row 1 in shard 1, and so on; a row's samples follow each other."""
    places = [0] * len(shards)
    row = 0
    while True:
        part = row % len(shards)
        shard, place = shards[part], places[part]
        if place == len(shard.rows):
            return
        while place < len(shard.rows) and shard.rows[place] == row:
            files[part].seek(shard.offsets[place])
            yield files[part].readline()
            place += 1
        places[part] = place
        row += 1


def _open(rows: Path) -> BinaryIO:
    try:
        return rows.open("rb")
    except FileNotFoundError:  # of a shard that got no rows; of another, all are missing
        return BytesIO()
    except OSError as error:
        raise OutputError(found=f"{rows}: {error.strerror}", fix="Run the shard again.") from error


def _ids(rows: list[int], shard: Shard, count: int | None = None) -> str:
    """Name some rows by their ids in the prompt file; by their numbers where it cannot be read."""
    named = row_ids(shard.paths.folder, shard.todo.prompts, rows[:NAMED])
    words = [f"{row} ({name})" if name else str(row) for row, name in named.items()]
    more = (count or len(rows)) - len(words)
    return "rows " + ", ".join(words) + (f" and {more} more" if more > 0 else "")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED])) + (" …" if len(numbers) > NAMED else "")
