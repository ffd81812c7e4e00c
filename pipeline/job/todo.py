"""What a job has to do and how much of it is written, noted in its folder: todo.json.

The runner writes the note whenever it has held the prompt file against the written rows. What it says, with
the lines written since, is the one answer to "is it complete?", for runner, status, merge and submit.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, get_type_hints

from pipeline.job.folder import ROWS, TODO, JobFolder, read_json
from pipeline.job.ledger import Ledger

FORMAT = 1  # of row keys


@dataclass(frozen=True, slots=True)
class PromptState:
    """A prompt file as it was before it was read, so that whatever changes later is seen to have changed."""

    prompts: str
    prompts_bytes: int
    prompts_mtime_ns: int

    @classmethod
    def look(cls, prompts: str) -> Self:
        """Look at the file without reading it; one that is not there looks empty."""
        return cls(str(Path(prompts).absolute()), *_looks(Path(prompts)))


@dataclass(frozen=True, slots=True)
class Todo(PromptState):
    """Counts are of completions, but for `rows`: a row with n samples counts n times."""

    prompts_sha256: str | None  # None: it could not be read to its end
    format: int
    limit: int | None
    rows: int
    total: int
    done: int
    errors: int
    rows_bytes: int  # of outputs.jsonl, when `done` was counted: each whole line after it is one more
    rows_mtime_ns: int

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read what `note` wrote; None if it never did, or the file is damaged."""
        value, types = read_json(folder / TODO) or {}, get_type_hints(cls)
        if value.keys() != types.keys() or not all(isinstance(value[name], types[name]) for name in types):
            return None
        return cls(**value)

    @classmethod
    def note(
        cls, results: JobFolder, state: PromptState, sha256: str | None, limit: int | None, ledger: Ledger
    ) -> Self:
        """Write down how far the job is, now that every line of outputs.jsonl is in the ledger."""
        todo = cls(
            state.prompts, state.prompts_bytes, state.prompts_mtime_ns, sha256, FORMAT, limit,
            ledger.rows, ledger.total, ledger.done, ledger.errors, *_looks(results.path / ROWS),
        )  # fmt: skip
        results.write_json(TODO, asdict(todo))
        return todo

    def untouched(self, prompts: PromptState, limit: int | None, folder: Path) -> bool:
        """Say whether prompt file, rows and limit look as they did: then nothing needs to be read again."""
        own = self.prompts, self.prompts_bytes, self.prompts_mtime_ns, self.format, self.limit
        now = prompts.prompts, prompts.prompts_bytes, prompts.prompts_mtime_ns, FORMAT, limit
        return own == now and (self.rows_bytes, self.rows_mtime_ns) == _looks(folder / ROWS)

    @property
    def prompts_written_since(self) -> bool:
        """Say whether somebody wrote the prompt file after the job read it; one that is gone asks for no more."""
        return _looks(Path(self.prompts)) not in ((0, 0), (self.prompts_bytes, self.prompts_mtime_ns))

    def covers(self, limit: int | None) -> bool:
        """Say whether the rows that a limit leaves are among these."""
        return self.limit is None or (limit is not None and limit <= self.limit)


def _looks(path: Path) -> tuple[int, int]:
    """Length and time of a file; of one that is not there, zeros."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
