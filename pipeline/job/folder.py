"""Write a job's folder: rows are appended as they finish, everything else is replaced in one move."""

import contextlib
import json
import logging
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from pipeline.common.errors import OutputError
from pipeline.common.units import MIB
from pipeline.job.holder import Holder
from pipeline.job.paths import JobPaths
from pipeline.job.rows import encode_row, parse_row

log = logging.getLogger(__name__)

FSYNC_ROWS, FSYNC_SEC = 256, 5.0  # what a power cut can cost at most
KEEP, DROP = -1, -2  # verdicts on a line; any other number is the row's new index


class JobFolder(JobPaths):
    """Hold a job's folder: one process at a time writes it.

    Raises:
        OutputError: the folder cannot be written, or another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file: int | None = None  # descriptor of outputs.jsonl
        self._end = 0  # its length in whole lines
        self._unsynced, self._synced_at = 0, time.monotonic()
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
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
        lock = FileLock(self.lock)
        with reported(self.folder):
            try:
                lock.acquire(blocking=False)  # a system lock: it ends with its process, however that ends
            except Timeout:
                who = Holder.read(self.holder) or "another process"
                raise OutputError(
                    found=f"{self.folder}: {who} is writing this job",
                    fix="Wait for it, or stop it and run again.",
                ) from None
            Holder.me().write(self.holder)
        return lock

    def set_aside(self) -> None:
        """Move an earlier run's results into a folder of their own, run-1, run-2 …"""
        # todo.json first: without it nothing counts as complete, wherever the process dies in between.
        results = (self.todo, self.rows, self.stats, self.manifest, self.replaced, self.tracker)
        old = [path for path in results if path.exists()]
        if not old:
            return
        aside = self.next_aside
        with reported(aside):
            aside.mkdir()
            for path in old:
                if path.is_symlink():  # which may be relative
                    (aside / path.name).symlink_to(path.resolve())
                    path.unlink()
                else:
                    path.rename(aside / path.name)

    def sift(
        self,
        judge: Callable[[dict[str, Any] | None, int], int],
        corrected: Callable[[int], dict[str, Any]] = lambda index: {},
    ) -> int:
        """Ask about every line of outputs.jsonl; write the file again only if that changes it.

        Args:
            judge: gets a row (None where the line is torn or damaged) and its line number from 1. Returns
                KEEP, DROP (the line goes to replaced.jsonl), or the index that the row now has.
            corrected: gets that index, once all lines are judged. Returns what else of the row is new.

        Returns:
            How many lines were dropped.
        """
        if not self.rows.exists():
            return 0
        with reported(self.rows), self.rows.open("rb") as file:
            verdicts = array("q", (judge(parse_row(line), n) for n, line in enumerate(file, 1)))
        if any(verdict != KEEP for verdict in verdicts):
            self._rewrite(verdicts, corrected)
        return verdicts.count(DROP)

    def _rewrite(self, verdicts: "array[int]", corrected: Callable[[int], dict[str, Any]]) -> None:
        with (
            self._replacing(self.rows) as fresh,
            self.rows.open("rb") as old,
            fresh.open("wb") as new,
            self.replaced.open("ab") as dropped,
        ):
            for line, verdict in zip(old, verdicts, strict=True):
                if verdict == DROP:
                    dropped.write(line if line.endswith(b"\n") else line + b"\n")
                elif verdict == KEEP:
                    new.write(line)
                else:
                    new.write(encode_row({**json.loads(line), "index": verdict, **corrected(verdict)}))
            _sync(dropped)  # first: a line may be in both files, but never in none
            _sync(new)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is handed to the system at once, and to the disk at a bounded interval."""
        line = encode_row(row)
        with reported(self.rows):
            if self._file is None:
                self._file = os.open(self.rows, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                self._end = os.fstat(self._file).st_size
                _sync_folder(self.folder)
            try:
                left = line
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)  # no half of a line on a full disk
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
        if self._file is not None:
            with reported(self.rows):
                os.fsync(self._file)
        self._unsynced, self._synced_at = 0, time.monotonic()

    def write_json(self, target: Path, value: dict[str, Any]) -> None:
        """Replace a JSON file of this folder in one move."""
        with (
            self._replacing(target) as fresh,
            fresh.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            json.dump(value, file, indent=2, ensure_ascii=False, default=str)
            file.write("\n")
            _sync(file)

    def write_stream(self, target: Path, stream: Any) -> None:
        """Keep a stream of bytes as a file of this folder; one that brings nothing leaves what was kept before."""
        first = stream.read(MIB)
        if not first and target.exists():
            return
        with self._replacing(target) as fresh, fresh.open("wb") as file:
            file.write(first)
            shutil.copyfileobj(stream, file)
            _sync(file)

    def write_lines(self, target: Path, lines: Iterable[bytes]) -> int:
        """Replace a file of this folder by these lines, in one move; return how many they are."""
        count = 0
        with self._replacing(target) as fresh, fresh.open("wb") as file:
            for line in lines:
                file.write(line)
                count += 1
            _sync(file)
        return count

    @contextlib.contextmanager
    def _replacing(self, target: Path) -> Iterator[Path]:
        """Give a new file's path, and put that file in the target's place when it is written."""
        with reported(target):
            place = Path(os.path.realpath(target))  # a link stays a link: what it names is replaced
            fresh = place.with_name(f"{place.name}.new")
            try:
                yield fresh
                fresh.replace(place)
            except BaseException:
                with contextlib.suppress(OSError):
                    fresh.unlink(missing_ok=True)
                raise
            _sync_folder(place.parent)

    def remove(self, path: Path) -> None:
        """Delete a file, if it is there."""
        with reported(path):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Bring all rows to the disk and let the folder go."""
        try:
            self.sync()
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    os.close(self._file)
                self._file = None
            with contextlib.suppress(OSError):
                self.holder.unlink(missing_ok=True)  # while it is ours
            with contextlib.suppress(OSError):
                self._lock.release()


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
            found=f"{path}: {error.strerror or error}",
            fix="What was written before stays valid: make room or mend the folder, or choose another with "
            "outputs_dir=…, and run the same command again.",
        ) from error


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Let a renamed or new file be found after a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
