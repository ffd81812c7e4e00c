"""Whatever is done to a job in whatever order, status, submit, merge and the next run are right about its rows."""

import contextlib
import copy
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from job_helper import arguments, run_job, write_rows

from pipeline.common import terminal
from pipeline.common.errors import ConfigError, OutputError
from pipeline.common.fingerprint import row_key
from pipeline.config.compose import job_folder, read_config
from pipeline.job import run
from pipeline.job.folder import JobFolder
from pipeline.job.load import load
from pipeline.job.merge import merge
from pipeline.job.paths import JobPaths
from pipeline.job.ready import Ready
from pipeline.job.rows import read_rows
from pipeline.prompts.count import count_once, prompts_sha256
from pipeline.prompts.reader import open_prompts
from pipeline.slurm.cells import find_cells
from pipeline.slurm.state import state_of

STEPS, SEQUENCES = 10, 4
SHARDS = 3


class Killed(BaseException):
    """The job's process ends here."""


class World:
    """A prompt file, a job over it whole and in shards, and what must be true of them."""

    def __init__(self, folder: Path, model: Path, draw: random.Random, patch: pytest.MonkeyPatch) -> None:
        self.prompts, self.draw, self.patch = folder / "prompts.jsonl", draw, patch
        self.line: Callable[..., list[str]] = lambda *more: arguments(
            model, self.prompts, folder / "outputs", "generation.max_new_tokens=2", *more
        )
        self.made = 0
        self.rows: list[dict[str, Any]] = []
        self.append()

    # What may happen.

    def append(self) -> None:
        for _ in range(self.draw.randrange(1, 4)):
            self.made += 1
            row: dict[str, Any] = {"id": f"r{self.made}", "prompt": f"Say {self.made}."}
            if self.draw.random() < 0.2:
                row["generation"] = {"n": 2}
            if self.draw.random() < 0.1:
                row["prompt"] = 5  # a row that fails
            self.rows.insert(self.draw.choice((len(self.rows), len(self.rows), 0)), row)
        self._write()

    def edit(self) -> None:
        self.draw.choice(self.rows)["prompt"] = f"Say {self.draw.choice('abcdefgh')}."
        before = self.prompts.stat()
        self._write()
        if self.draw.random() < 0.3:  # an edit that no time tells, as by a clock that was set back
            os.utime(self.prompts, ns=(before.st_atime_ns, before.st_mtime_ns))

    def remove(self) -> None:
        if len(self.rows) > 1:
            self.rows.remove(self.draw.choice(self.rows))
            self._write()

    def run(self) -> None:
        run_job(self._any_line())

    def kill(self) -> None:
        """End a run at one of its writes, which may tear a line, and lose the note of who held the folder."""
        left, append, write_json = self.draw.randrange(4), JobFolder.append, JobFolder.write_json

        def dies(write: Callable[..., None]) -> Callable[..., None]:
            def wrapped(folder: JobFolder, *what: Any) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    if write is append and self.draw.random() < 0.5:
                        with folder.rows.open("ab") as file:
                            file.write(b'{"id": "torn')
                    raise Killed
                write(folder, *what)

            return wrapped

        with self.patch.context() as patch:
            patch.setattr(JobFolder, "append", dies(append))
            patch.setattr(JobFolder, "write_json", dies(write_json))
            with contextlib.suppress(Killed):
                run_job(self._any_line())

    def lose(self) -> None:
        """Somebody deletes the results, or the last of them."""
        for folder in self._folders():
            path = folder / "outputs.jsonl"
            if path.exists() and self.draw.random() < 0.3:
                lines = path.read_bytes().splitlines(keepends=True)
                path.write_bytes(b"".join(lines[: self.draw.randrange(len(lines) + 1)]))

    def merge(self) -> None:
        shards = [[f"shard={part}/{SHARDS}"] for part in range(SHARDS)]
        try:
            lines = merge(self._folder(self.line()))
        except OutputError:
            return
        limit = {json.loads((self._folder(self.line(*s)) / "todo.json").read_text())["limit"] for s in shards}
        assert len(limit) == 1
        wanted = self._wanted(*[f"limit={one}" for one in limit if one is not None])
        written = [
            (row["key"], row["sample"]) for row in read_rows(self._folder(self.line()) / "outputs.jsonl")
        ]
        assert written == wanted
        assert lines == len(wanted)

    # What must be true after each of them.

    def check(self) -> None:
        for more in self._lines():
            folder = self._folder(self.line(*more))
            if "merged_from" in _json(folder / "manifest.json"):
                continue
            wanted, written = set(self._wanted(*more)), self._written(folder)
            missing = wanted - written
            if self.draw.random() < 0.4 and self._submit_takes_for_complete(more):
                assert not missing, f"submit takes {more} for complete"
            state, todo = state_of(folder), _json(folder / "todo.json")
            if state.kind == "complete":
                assert state.counts.done == state.counts.total
                if todo and todo["limit"] is None and "written since" not in state.text:
                    same = prompts_sha256(str(self.prompts)) == todo["prompts_sha256"]
                    assert not same or not set(self._wanted(*[m for m in more if "shard" in m])) - written

    def settle(self) -> None:
        """After the same command once more, nothing is missing, and everybody says so."""
        for more in self._lines():
            folder = self._folder(self.line(*more))
            if "merged_from" in _json(folder / "manifest.json"):
                continue
            wanted = self._wanted(*more)
            if not any("limit" in word for word in more):
                errors = any(row["prompt"] == 5 for row in self.rows)
                assert run_job(self.line(*more)) in ((0, 1) if errors else (0,))
                assert sorted(self._list(folder)) == sorted(wanted)
                assert state_of(folder).kind == "complete"
                assert self._submit_takes_for_complete(more)
        whole = self._folder(self.line())
        if "merged_from" in _json(whole / "manifest.json") or not (whole / "outputs.jsonl").exists():
            assert merge(whole) == len(self._wanted())

    def _submit_takes_for_complete(self, more: list[str]) -> bool:
        count_once.cache_clear()
        try:
            ((cell,), _) = find_cells([*self.line(*more), "submit.dry_run=true"])
        except ConfigError:  # more shards than rows, and this one has never run
            assert not JobPaths(self._folder(self.line(*more))).is_job
            return False
        return cell.complete

    @staticmethod
    def _folder(line: list[str]) -> Path:
        return _cached_folder(tuple(line))

    def _any_line(self) -> list[str]:
        more = [] if self.draw.random() < 0.3 else [f"shard={self.draw.randrange(SHARDS)}/{SHARDS}"]
        if not more and "merged_from" in _json(self._folder(self.line()) / "manifest.json"):
            more = ["shard=0/3"]
        if self.draw.random() < 0.3:
            more.append(f"limit={self.draw.randrange(1, 5)}")
        return self.line(*more)

    def _lines(self) -> list[list[str]]:
        return [[], ["limit=2"], *([f"shard={part}/{SHARDS}"] for part in range(SHARDS))]

    def _folders(self) -> list[Path]:
        return [self._folder(self.line(*more)) for more in self._lines()]

    def _wanted(self, *more: str) -> list[tuple[str, int]]:
        """What a run of this line would have to have written, by plain reading of the prompt file."""
        rows = open_prompts(read_config(self.line(*more)))
        return [
            (row_key(row), s) for row in rows for s in range(row.params.n if hasattr(row, "params") else 1)
        ]

    def _written(self, folder: Path) -> set[tuple[str, int]]:
        return set(self._list(folder))

    def _list(self, folder: Path) -> list[tuple[str, int]]:
        found = [(row["key"], row["sample"]) for row in read_rows(folder / "outputs.jsonl")]
        assert len(found) == len(set(found)), "a row is there twice"
        return found

    def _write(self) -> None:
        write_rows(self.prompts, self.rows)


@cache
def _cached_folder(line: tuple[str, ...]) -> Path:  # composing takes a tenth of a second
    return job_folder(list(line))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def ready(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """The tiny model, loaded once for every run of these tests."""
    nowhere = tmp_path_factory.mktemp("none")
    return load(read_config(arguments(tiny_folder, nowhere, nowhere)), "", JobPaths(nowhere))


def fresh(ready: Ready) -> Ready:
    """A copy for one run, which changes how the model attends."""
    return replace(ready, loaded=replace(ready.loaded, model=copy.deepcopy(ready.model)))


@pytest.mark.parametrize("sequence", range(SEQUENCES))
def test_what_is_said_of_rows_is_right_after_any_sequence(
    sequence: int, ready: Ready, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(run, "load", lambda *job: fresh(ready))
    monkeypatch.setattr(Ready, "release", lambda ready: None)
    monkeypatch.setattr(terminal.console, "quiet", True)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    world = World(tmp_path, tiny_folder, random.Random(seed), monkeypatch)
    deeds = [world.append, world.edit, world.remove, world.run, world.run, world.kill, world.kill, world.lose]
    for _ in range(STEPS):
        deed = world.draw.choice([*deeds, world.merge])
        print(deed.__name__)
        deed()
        world.check()
    world.settle()
