"""Join the shards of a job into one outputs.jsonl, in the order of the prompt file.

Nothing is merged unless every row is there exactly once. Memory: 24 bytes a row.
"""

import datetime
import json
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.commands.arguments import take_paths
from pipeline.common.errors import ConfigError, OutputError, PromptError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.request import GenerationParams
from pipeline.common.terminal import say
from pipeline.job.counts import read_standing
from pipeline.job.folder import MANIFEST, ROWS, STATS, JobFolder, read_json
from pipeline.job.merge_stats import merge_stats
from pipeline.job.todo import Todo
from pipeline.prompts.count import prompts_sha256
from pipeline.prompts.reader import read_prompts

SHARD = re.compile(r"shard-(\d+)-of-(\d+)")
SAME = ("model", "revision", "prompts_sha256", "limit")  # what shards of one job must agree on
AGAIN = "Submit or run all shards again, with the same limit=: just what is missing is done."
NAMED = 10  # rows that an error names
HELP = """\
  python -m pipeline merge outputs/big/phi-nf4-greedy-1a2b3c4d       shard-I-of-N in it into its outputs.jsonl

Refuses unless every row is there exactly once. Doing it again gives the same file.
"""


@dataclass(frozen=True, slots=True)
class Shard:
    """Hold where the lines of one shard are, in the order of their rows: parallel arrays."""

    folder: Path
    rows: "array[int]"  # index in the prompt file
    samples: "array[int]"
    offsets: "array[int]"  # of the line in outputs.jsonl


def main(arguments: list[str]) -> ExitStatus:
    """Merge the shards in one folder, and say how many lines they made.

    Raises:
        ConfigError: the command line is wrong.
        OutputError: as `merge`.
    """
    folders, _ = take_paths(arguments, {})
    if len(folders) != 1:
        raise ConfigError("one folder is merged at a time", "Give the one that holds the shards.")
    say(f"{merge(folders[0])} lines in {folders[0] / ROWS}", style="green")
    return ExitStatus.DONE


def merge(folder: Path) -> int:
    """Merge the folder's shards; return the number of lines.

    Raises:
        OutputError: a shard is missing or not complete, rows are missing or there twice, the shards
            are not of one job or of one prompt file as it is now, or the folder holds results of its own.
            Then nothing has changed.
    """
    folders = _find_shards(folder)
    todos = [_read_todo(shard) for shard in folders]
    manifests = [
        {**(read_json(shard / MANIFEST) or {}), "prompts_sha256": todo.prompts_sha256, "limit": todo.limit}
        for shard, todo in zip(folders, todos, strict=True)
    ]
    _check_alike(folders, manifests)
    _check_prompts(todos[0])
    before = read_json(folder / MANIFEST) or {}
    if (folder / ROWS).exists() and "merged_from" not in before:
        found = f"{folder / ROWS}: holds the results of a job that was run without shards"
        raise OutputError(found, "Move it away to merge.")
    shards = [_read_shard(shard, todo.limit) for shard, todo in zip(folders, todos, strict=True)]
    _check_rows(shards, todos)
    errors = sum(read_standing(shard).errors for shard in folders)
    with JobFolder(folder) as results:
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        merged_from = [shard.folder.name for shard in shards]
        # First, so that what is merged can be told from a job's own results at any moment.
        results.write_json(MANIFEST, {**manifests[0], "when": when, "merged_from": merged_from})
        lines = _write(shards, folder / ROWS)
        stats = merge_stats([read_json(shard / STATS) or {} for shard in folders])
        stats["rows"] = {**(stats.get("rows") or {}), "total": lines, "done": lines, "errors": errors}
        results.write_json(STATS, stats)
    return lines


def _read_todo(shard: Path) -> Todo:
    todo = Todo.read(shard)
    if todo is None:
        raise OutputError(f"{shard}: does not say which rows it has to do", AGAIN)
    return todo


def _find_shards(folder: Path) -> list[Path]:
    """Find all N of them, in order."""
    found = {m: path for path in folder.glob("shard-*-of-*") if (m := SHARD.fullmatch(path.name))}
    splits = {int(match[2]) for match in found}
    if not splits:
        raise OutputError(f"{folder}: holds no shards (shard-0-of-4 …)", "Give the folder that does.")
    if len(splits) > 1:
        names = ", ".join(sorted(path.name for path in found.values()))
        raise OutputError(
            f"{folder}: shards of different splits: {names}", "Move away those that you do not want."
        )
    by_number = {int(match[1]): path for match, path in found.items()}
    missing = [i for i in range(splits.pop()) if i not in by_number]
    if missing:
        raise OutputError(f"{folder}: shards {_some(missing)} are missing", "Submit or run them first.")
    return [by_number[i] for i in sorted(by_number)]


def _check_alike(folders: list[Path], manifests: list[dict[str, Any]]) -> None:
    for shard, manifest in zip(folders, manifests, strict=True):
        for key in SAME:
            if manifest.get(key) != manifests[0].get(key):
                raise OutputError(
                    f"{shard}: its {key} is {manifest.get(key)}, and that of {folders[0].name} is "
                    f"{manifests[0].get(key)}",
                    AGAIN,
                )


def _check_prompts(todo: Todo) -> None:
    """Refuse where rows were edited or added since; a file that is gone can ask for no more."""
    sha256 = prompts_sha256(todo.prompts)
    if sha256 is not None and sha256 != todo.prompts_sha256:
        raise OutputError(f"{todo.prompts}: has changed since the shards read it", AGAIN)


def _read_shard(folder: Path, limit: int | None) -> Shard:
    """Note where each line begins, and keep nothing of it. Leave out rows that a larger limit made."""
    keys: list[tuple[int, int, int]] = []
    offset = 0
    with _open(folder) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if limit is None or row["index"] < limit:
                    keys.append((row["index"], row.get("sample", 0), offset))
            except (ValueError, KeyError, TypeError) as error:
                found = f"{folder / ROWS}:{number}: a damaged line"
                raise OutputError(found, "Run the shard again: it will be mended.") from error
            offset += len(line)
    keys.sort()
    columns = zip(*keys, strict=True) if keys else ((), (), ())
    return Shard(folder, *(array("q", column) for column in columns))


def _check_rows(shards: list[Shard], todos: list[Todo]) -> None:
    """Refuse unless every row that the prompt file gives a shard is there, each sample of it once."""
    parts = len(shards)
    for part, (shard, todo) in enumerate(zip(shards, todos, strict=True)):
        keys = zip(shard.rows, shard.samples, strict=True)
        twice = [a[0] for a, b in pairwise(keys) if a == b]
        if twice:
            raise OutputError(
                f"{shard.folder}: {_ids(twice, todo)} are there twice",
                f"Move {ROWS} away and run the shard again.",
            )
        expected = range(part, part + todo.rows * parts, parts)
        there = set(shard.rows)
        if strange := sorted(there.difference(expected)):
            raise OutputError(
                f"{shard.folder}: {_ids(strange, todo)} belong to another shard",
                f"Move {ROWS} away and run the shard again.",
            )
        done = f"{shard.folder}: {len(shard.rows)} of {todo.total} rows done"
        if gaps := [row for row in expected if row not in there]:
            raise OutputError(f"{done}; {_ids(gaps, todo)} are missing", AGAIN)
        if len(shard.rows) < todo.total:
            raise OutputError(f"{done}; samples of some are missing", AGAIN)


def _write(shards: list[Shard], target: Path) -> int:
    """Write row 0 from shard 0, row 1 from shard 1, and so on around; a row's samples follow each other."""
    fresh = target.with_suffix(".new")
    lines = 0
    try:
        with ExitStack() as stack, fresh.open("wb") as new:
            files = [stack.enter_context(_open(shard.folder)) for shard in shards]
            for line in _in_order(shards, files):
                new.write(line)
                lines += 1
            new.flush()
            os.fsync(new.fileno())
        fresh.replace(target)
    except OSError as error:
        fix = "Make room, and merge again: the shards are whole."
        raise OutputError(f"{target}: {error.strerror}", fix) from error
    return lines


def _in_order(shards: list[Shard], files: list[BinaryIO]) -> Iterator[bytes]:
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


def _open(folder: Path) -> BinaryIO:
    try:
        return (folder / ROWS).open("rb")
    except OSError as error:
        raise OutputError(f"{folder / ROWS}: {error.strerror}", "Run the shard again.") from error


def _ids(rows: list[int], todo: Todo) -> str:
    """Name some rows by the ids that the prompt file gives them, or by number where it cannot be read."""
    named = dict.fromkeys(rows[:NAMED], "")
    try:
        for row in read_prompts(todo.prompts, GenerationParams(), limit=max(named) + 1):
            if row.index in named:
                named[row.index] = row.id
    except PromptError:
        pass
    words = [f"{row} ({name})" if name else str(row) for row, name in named.items()]
    return "rows " + ", ".join(words) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED])) + (" …" if len(numbers) > NAMED else "")
