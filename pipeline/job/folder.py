"""A job's folder on disk: rows appended as they finish, everything else replaced in one move."""

import contextlib
import json
import logging
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from pipeline.common.errors import OutputError

log = logging.getLogger(__name__)

ROWS, STATS, MANIFEST, REPLACED = "outputs.jsonl", "stats.json", "manifest.json", "replaced.jsonl"
TODO = "todo.json"  # see pipeline/job/todo.py
FSYNC_ROWS, FSYNC_SEC = 256, 5.0  # what a power cut can cost at most
KEEP, DROP = -1, -2  # verdicts on a line; any other number is the row's new index


class JobFolder:
    """The rows of one job, held by one process at a time.

    Raises:
        OutputError: the folder cannot be written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: int | None = None  # file descriptor of outputs.jsonl
        self._end = 0  # its length in whole lines
        self._unsynced, self._synced_at = 0, time.monotonic()
        with reported(path):
            path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.close()
        except OutputError:
            if kind is None:
                raise
            log.exception("While closing")

    def _take_lock(self) -> FileLock:
        holder = self.path / ".holder"
        lock = FileLock(self.path / ".lock")
        with reported(self.path):
            try:
                lock.acquire(blocking=False)  # a system lock: it ends with its process, however that ends
            except Timeout:
                who = _read_text(holder) or "another process"
                raise OutputError(
                    f"{self.path}: {who} is writing this job. Wait for it, or stop it and run again."
                ) from None
            who = f"process {os.getpid()} on {os.uname().nodename} (since {time.strftime('%F %T')})"
            holder.write_text(who, encoding="utf-8")
        return lock

    def set_aside(self) -> None:
        """Move an earlier run's results into a folder of their own, run-1, run-2 …"""
        # todo.json first: without it nothing counts as complete, wherever the process dies in between.
        names = (TODO, ROWS, STATS, MANIFEST, REPLACED)
        old = [self.path / name for name in names if (self.path / name).exists()]
        if not old:
            return
        taken = [int(p.name[4:]) for p in self.path.glob("run-*") if p.name[4:].isdigit()]
        aside = self.path / f"run-{max(taken, default=0) + 1}"
        with reported(aside):
            aside.mkdir()
            for path in old:
                path.rename(aside / path.name)

    def sift(
        self,
        judge: Callable[[dict[str, Any] | None, int], int],
        corrected: Callable[[int], dict[str, Any]] = lambda index: {},
    ) -> int:
        """Ask about every line of outputs.jsonl; the file is written again only if that changes it.

        Args:
            judge: gets a row (None where the line is torn or damaged) and its line number from 1. Returns
                KEEP, DROP (the line goes to replaced.jsonl), or the index that the row now has.
            corrected: gets that index, once all lines are judged. Returns what else of the row is new.

        Returns:
            How many lines were dropped.
        """
        rows = self.path / ROWS
        if not rows.exists():
            return 0
        with reported(rows), rows.open("rb") as file:
            verdicts = array("q", (judge(parse_row(line), n) for n, line in enumerate(file, 1)))
        if any(verdict != KEEP for verdict in verdicts):
            self._rewrite(rows, verdicts, corrected)
        return verdicts.count(DROP)

    def _rewrite(
        self, rows: Path, verdicts: "array[int]", corrected: Callable[[int], dict[str, Any]]
    ) -> None:
        fresh, replaced = rows.with_suffix(".new"), self.path / REPLACED
        with reported(rows), _removed_on_error(fresh):
            with rows.open("rb") as old, fresh.open("wb") as new, replaced.open("ab") as dropped:
                for line, verdict in zip(old, verdicts, strict=True):
                    if verdict == DROP:
                        dropped.write(line if line.endswith(b"\n") else line + b"\n")
                    elif verdict == KEEP:
                        new.write(line)
                    else:
                        new.write(_line({**json.loads(line), "index": verdict, **corrected(verdict)}))
                _sync(dropped)  # first: a line may be in both files, but never in none
                _sync(new)
            fresh.replace(rows)
            _sync_folder(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is handed to the system at once, and to the disk at a bounded interval."""
        line = _line(row)
        with reported(self.path / ROWS):
            if self._rows is None:
                self._rows = os.open(self.path / ROWS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                self._end = os.fstat(self._rows).st_size
                _sync_folder(self.path)
            try:
                left = line
                while left:
                    left = left[os.write(self._rows, left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._rows, self._end)  # no half of a line on a full disk
                raise
            self._end += len(line)
        self._unsynced += 1
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """Bring rows to the disk, if there are many or the last time was long ago."""
        due = self._unsynced >= FSYNC_ROWS or time.monotonic() - self._synced_at > FSYNC_SEC
        if self._unsynced and due:
            self.sync()

    def sync(self) -> None:
        """Bring all rows to the disk."""
        if self._rows is not None:
            with reported(self.path / ROWS):
                os.fsync(self._rows)
        self._unsynced, self._synced_at = 0, time.monotonic()

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace a JSON file in one move."""
        target = self.path / name
        fresh = target.with_name(f"{name}.new")
        with reported(target), _removed_on_error(fresh):
            with fresh.open("w", encoding="utf-8", errors="replace") as file:
                json.dump(value, file, indent=2, ensure_ascii=False, default=str)
                file.write("\n")
                _sync(file)
            fresh.replace(target)
            _sync_folder(self.path)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with reported(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def save(self, name: str, stream: Any) -> Path:
        """Keep a stream of bytes as a file of this folder."""
        target = self.path / name
        fresh = target.with_name(f"{name}.new")
        with reported(target), _removed_on_error(fresh):
            with fresh.open("wb") as file:
                shutil.copyfileobj(stream, file)
                _sync(file)
            fresh.replace(target)
        return target

    def close(self) -> None:
        """Bring all rows to the disk and let the folder go."""
        try:
            self.sync()
        finally:
            if self._rows is not None:
                with contextlib.suppress(OSError):
                    os.close(self._rows)
                self._rows = None
            with contextlib.suppress(OSError):
                self._lock.release()


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a job's folder; damaged lines are left out."""
    path = folder / ROWS
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                row = parse_row(line)
                if row is not None:
                    yield row


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line of outputs.jsonl as this program writes it; None if it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        key, sample, index = row["key"], row["sample"], row["index"]
        whole = len(key) == 16 and int(key, 16) >= 0 and sample >= 0 and index >= 0
        whole = whole and type(sample) is type(index) is int and ("completion" in row and "error" in row)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return row if whole else None


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn the system's errors into ones that say what to do.

    Raises:
        OutputError: for an OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}. What was written before stays valid: make room or mend the "
            "folder, or choose another with outputs_dir=…, and run the same command again."
        ) from error


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8", "replace")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """So that a renamed or new file is found after a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
