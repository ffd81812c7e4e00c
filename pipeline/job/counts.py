"""Count how far a job is, by its own files: rows, errors, speed.

Slurm's view is never needed for this, and never believed over it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.units import MIB
from pipeline.job.events import read_events
from pipeline.job.paths import JobPaths
from pipeline.job.rows import is_error
from pipeline.job.stored import read_stats
from pipeline.job.todo import Todo

COUNTED_BYTES = 64 * MIB  # larger files are not counted but estimated, from a piece of each end
PIECE_BYTES = MIB


@dataclass(frozen=True, slots=True)
class Counts:
    """Hold how far a job is. Counts are of completions: a row with n samples counts n times."""

    done: int
    errors: int
    total: int | None  # None: nobody has counted yet
    exact: bool  # else `done` and `errors` are estimates
    tokens_per_sec: float | None  # of the last run that ended by itself
    todo: Todo | None  # the job's own note; None where there is none that still holds

    @property
    def complete(self) -> bool:
        """Say whether every row of the prompt file, as the job last read it, is written."""
        return self.exact and self.todo is not None and self.done >= self.todo.total

    @property
    def shown(self) -> str:
        """Show rows done of rows to do: 3/8, ~3/8 where they are estimates, 3/? where nobody has counted."""
        return f"{'' if self.exact else '~'}{self.done}/{'?' if self.total is None else self.total}"


def read_counts(folder: Path) -> Counts:
    """Take what todo.json says, and count the lines written since: each is a completion that was missing."""
    paths, todo = JobPaths(folder), Todo.read(folder)
    size = paths.rows.stat().st_size if paths.rows.is_file() else 0
    # A file that is shorter than it was is not what was counted: no more than its lines can be told.
    whole = todo is not None and todo.rows_bytes <= size
    start, done, errors = (todo.rows_bytes, todo.done, todo.errors) if todo and whole else (0, 0, 0)
    exact = size - start <= COUNTED_BYTES
    if size > start:
        more = _count(paths.rows, start) if exact else _estimate(paths.rows, start)
        done, errors = done + more[0], errors + more[1]
    submitted, total = read_events(folder).submitted, todo.total if todo else None
    if submitted and _is_news(submitted, todo):
        total, whole = int(submitted[-1]["total"]), False
    speed = read_stats(paths).get("tokens_per_sec")
    return Counts(done, errors, total, exact, speed, todo if whole else None)


def tokens_per_row(folder: Path) -> float | None:
    """Take the mean completion tokens of the rows written last."""
    try:
        with JobPaths(folder).rows.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - PIECE_BYTES))
            counts = [int(n) for n in re.findall(rb'"completion_tokens":(\d{1,9})', file.read())]
    except OSError:
        return None
    return sum(counts) / len(counts) if counts else None


def _is_news(submitted: list[dict[str, Any]], todo: Todo | None) -> bool:
    """Say whether the last submission asks for rows that the folder's note does not know of, and came after it."""
    if todo is None:
        return True
    last = submitted[-1]
    known = last.get("prompts_sha256", "") == todo.prompts_sha256 and todo.covers(last.get("limit"))
    return not known and len(submitted) > todo.submissions


def _count(rows: Path, start: int) -> tuple[int, int]:
    """Count completions and errors from this byte on; a torn last line is none."""
    done = errors = 0
    with rows.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            if line.endswith(b"\n"):
                done += 1
                errors += is_error(line)
    return done, errors


def _estimate(rows: Path, start: int) -> tuple[int, int]:
    """Estimate completions and errors from the first and the last piece of what was written since."""
    # Counting 70 GB takes minutes, and `status watch=true` asks every 5 seconds.
    with rows.open("rb") as file:
        size = file.seek(0, 2) - start
        file.seek(start)
        piece = file.read(PIECE_BYTES)
        file.seek(start + size - PIECE_BYTES)
        piece = piece[: piece.rfind(b"\n") + 1] + file.read(PIECE_BYTES).partition(b"\n")[2]
    lines = piece.splitlines(keepends=True)
    scale = size / len(piece) if piece else 0  # one torn line, however long
    return round(len(lines) * scale), round(sum(map(is_error, lines)) * scale)
