"""Note what a job has to do and how much of it is written, in its folder: todo.json.

The runner writes the note whenever it has held the prompt file against the written rows. What it says, with
the lines written since, is the one answer to "is it complete?", for runner, status, merge and submit.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, get_type_hints

from pipeline.job.events import read_events
from pipeline.job.folder import JobFolder
from pipeline.job.ledger import Ledger
from pipeline.job.paths import JobPaths, read_json
from pipeline.prompts.address import absolute, files_of
from pipeline.prompts.count import prompts_sha256

FORMAT = 1  # of row keys


@dataclass(frozen=True, slots=True)
class PromptState:
    """Hold a prompt file as it was before it was read: whatever changes later is seen to have changed."""

    prompts: str
    prompts_bytes: int
    prompts_changed_ns: int

    @classmethod
    def look(cls, prompts: str) -> Self:
        """Look at the file without reading it; one that is not there looks empty."""
        return cls(absolute(prompts), *_looks(*files_of(prompts)))


@dataclass(frozen=True, slots=True)
class Todo(PromptState):
    """Hold what there is to do. Counts are of completions, but for `rows`: a row with n samples counts n times."""

    prompts_sha256: str | None  # None: it could not be read to its end
    format: int
    limit: int | None
    rows: int
    total: int
    done: int
    errors: int
    rows_bytes: int  # of outputs.jsonl, when `done` was counted: each whole line after it is one more
    rows_changed_ns: int
    submissions: int  # of the job to Slurm, before the prompt file was read

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read what `note` wrote; None if it never did, or the file is damaged."""
        value, types = read_json(JobPaths(folder).todo) or {}, get_type_hints(cls)
        if value.keys() != types.keys() or not all(isinstance(value[name], types[name]) for name in types):
            return None
        if (
            any(isinstance(part, int) and not 0 <= part < 2**62 for part in value.values())
            or "\0" in value["prompts"]
        ):
            return None
        return cls(**value)

    @classmethod
    def note(
        cls,
        results: JobFolder,
        state: PromptState,
        sha256: str | None,
        limit: int | None,
        ledger: Ledger,
        submissions: int,
    ) -> Self:
        """Write down how far the job is, now that every line of outputs.jsonl is in the ledger."""
        todo = cls(
            state.prompts, state.prompts_bytes, state.prompts_changed_ns, sha256, FORMAT, limit,
            ledger.rows, ledger.total, ledger.done, ledger.errors, *_looks(results.rows), submissions,
        )  # fmt: skip
        results.write_json(results.todo, asdict(todo))
        return todo

    def untouched(self, prompts: str, sha256: str | None, limit: int | None, folder: Path) -> bool:
        """Say whether prompts and limit are what they were, and the rows look it: then no row needs to be read."""
        own = self.prompts, self.prompts_sha256, self.format, self.limit
        now = absolute(prompts), sha256, FORMAT, limit
        same = sha256 is not None and own == now
        return same and (self.rows_bytes, self.rows_changed_ns) == _looks(JobPaths(folder).rows)

    @property
    def prompts_written_since(self) -> bool:
        """Say whether the prompt file is another than the job read; one that is gone asks for no more."""
        size, changed_ns = _looks(*files_of(self.prompts))
        if (size, changed_ns) in ((0, 0), (self.prompts_bytes, self.prompts_changed_ns)):
            return False
        return size != self.prompts_bytes or prompts_sha256(self.prompts) != self.prompts_sha256

    def covers(self, limit: int | None) -> bool:
        """Say whether the rows that a limit leaves are among these."""
        return self.limit is None or (limit is not None and limit <= self.limit)


def count_submissions(folder: Path) -> int:
    """Count how often the job was submitted to Slurm until now."""
    return len(read_events(folder).submitted)


def _looks(*paths: Path) -> tuple[int, int]:
    """Give the length of files and when one last changed; of what is not there, zeros."""
    try:
        found = [path.stat() for path in paths]
    except OSError:
        return 0, 0
    # Anybody can set a file's time of writing back, but not that of its last change (of its name, on Windows).
    changed = [max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in found]
    return sum(stat.st_size for stat in found), max(changed, default=0)
