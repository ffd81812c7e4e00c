"""A job's folder on disk: rows appended as they finish, everything else replaced in one move."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from pipeline.errors import OutputError

ROWS, STATS, MANIFEST, REPLACED = "outputs.jsonl", "stats.json", "manifest.json", "replaced.jsonl"
FSYNC_ROWS, FSYNC_SEC = 256, 5.0  # what a power cut can cost at most


class JobFolder:
    """The rows of one job, held by one process at a time.

    Raises:
        OutputError: the folder cannot be written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reported(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / ".lock")
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                holder = _read_text(path / ".holder") or "another process"
                raise OutputError(
                    f"{path}: {holder} is writing this job. Wait for it, or stop it and run again."
                ) from None
            (path / ".holder").write_text(f"process {os.getpid()} on {os.uname().nodename}", encoding="utf-8")
        self._file: Any = None
        self._unsynced, self._synced_at = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def set_aside(self) -> None:
        """Move an earlier run's results into a folder of their own."""
        if (self.path / ROWS).exists():
            taken = [int(p.name[4:]) for p in self.path.glob("run-*") if p.name[4:].isdigit()]
            aside = self.path / f"run-{max(taken, default=0) + 1}"
            with _reported(aside):
                aside.mkdir()
                for name in (ROWS, STATS, MANIFEST, REPLACED):
                    if (self.path / name).exists():
                        (self.path / name).rename(aside / name)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Drop the rows that are not wanted, to replaced.jsonl, and lines that are torn or damaged.

        Returns:
            How many lines were dropped. The file is rewritten only if there were any.
        """
        rows, dropped = self.path / ROWS, []
        if not rows.exists():
            return 0
        fresh = rows.with_suffix(".new")
        with _reported(rows), rows.open("rb") as old, fresh.open("wb") as new:
            for line in old:
                row = _parse(line)
                if row is not None and wanted(row):
                    new.write(line)
                else:
                    dropped.append(line if line.endswith(b"\n") else line + b"\n")
            _sync(new)
        with _reported(rows):
            if not dropped:
                fresh.unlink()
                return 0
            with (self.path / REPLACED).open("ab") as replaced:
                replaced.writelines(dropped)
                _sync(replaced)
            fresh.replace(rows)
        return len(dropped)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is handed to the system at once, and to the disk at a bounded interval."""
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
        with _reported(self.path / ROWS):
            if self._file is None:
                self._file = (self.path / ROWS).open("ab")
            self._file.write(line.encode("utf-8", "replace"))
            self._file.flush()
            self._unsynced += 1
            if self._unsynced >= FSYNC_ROWS or time.monotonic() - self._synced_at > FSYNC_SEC:
                self.sync()

    def sync(self) -> None:
        if self._file is not None:
            with _reported(self.path / ROWS):
                os.fsync(self._file.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace a JSON file in one move."""
        target = self.path / name
        fresh = target.with_suffix(".new")
        with _reported(target):
            with fresh.open("w", encoding="utf-8") as file:
                json.dump(value, file, indent=2, ensure_ascii=False, default=str)
                file.write("\n")
                _sync(file)
            fresh.replace(target)

    def close(self) -> None:
        try:
            self.sync()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._lock.release()


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a job's folder; damaged lines are left out."""
    path = folder / ROWS
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                row = _parse(line)
                if row is not None:
                    yield row


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and isinstance(row, dict) and "key" in row else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn the system's errors into ones that say what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}. What was written before stays valid: make room or mend the "
            "folder, or choose another with outputs_dir=…, and run the same command again."
        ) from error
