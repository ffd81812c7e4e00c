"""What a job still has to do: its prompt file against its folder. No model, no torch."""

import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.errors import PromptError
from pipeline.common.fingerprint import metadata_key, row_key
from pipeline.common.request import BadRow, GenerationParams, PromptRow
from pipeline.config.schema import Config, OnError, root
from pipeline.job.folder import DROP, KEEP, REPLACED, ROWS, TODO, JobFolder
from pipeline.job.ledger import Ledger
from pipeline.job.todo import PromptState, Todo
from pipeline.prompts.reader import find_prompts, read_prompts


def locate_prompts(config: Config, results: JobFolder) -> str:
    """The prompt file's path; standard input is kept in the job's folder, for it is read twice.

    Raises:
        PromptError: there is no such file.
    """
    prompts = find_prompts(config.prompts, root() / "jobs")
    return str(results.save("prompts.jsonl", sys.stdin.buffer)) if prompts == "-" else prompts


def rows_of(config: Config, prompts: str) -> Iterator[PromptRow | BadRow]:
    """The job's rows, as `read_prompts` gives them."""
    params = {name: getattr(config.generation, name) for name in GenerationParams.__dataclass_fields__}
    return read_prompts(
        prompts,
        GenerationParams(**params),
        prompt_field=config.prompt_field,
        limit=config.limit,
        shard=config.shard,
    )


def survey(config: Config, prompts: str, results: JobFolder) -> Ledger:
    """Read the prompt file and the written rows once; lines that no longer answer a row are moved aside.

    Raises:
        PromptError: the prompt file cannot be read, or has a bad row and on_error=fail.
        OutputError: the folder cannot be read or written.
    """
    ledger = _read(config, prompts)
    found: Counter[str] = Counter()
    damaged: list[int] = []
    stale: set[int] = set()  # indices of rows whose lines have other metadata

    def judge(line: dict[str, Any] | None, number: int) -> int:
        if line is None:
            damaged.append(number)
            return DROP
        row = ledger.find(line["key"])
        if row is None:
            if config.limit is not None and line["index"] >= config.limit:
                return KEEP  # of a run without the limit
            found["changed"] += 1
            return DROP
        failed = line["error"] is not None
        if failed and config.retry_errors:
            found["failed"] += 1
            return DROP
        if not ledger.mark(row, line["sample"], failed=failed):
            found["repeated"] += 1
            return DROP
        index = ledger.index(row)
        if metadata_key(line) != ledger.metadata(row):
            stale.add(index)
            return index
        return KEEP if line["index"] == index else index

    @cache
    def metadata() -> dict[int, dict[str, Any]]:  # read when every line is judged, and only if one asks
        return _metadata(config, prompts, stale)

    results.remove(TODO)  # from here on the lines are those of the new prompt file, and the note of the old
    dropped = results.sift(judge, lambda index: metadata().get(index, {}))
    if stale:
        terminal.say(
            f"{len(stale)} rows have other metadata than before: their lines are brought up to date."
        )
    if dropped:
        _say_dropped(results.path, found, damaged)
    if ledger.done:
        terminal.say(f"Going on: {ledger.done} of {ledger.total} rows were done before.")
    return ledger


def _read(config: Config, prompts: str) -> Ledger:
    """Read the prompt file's rows; nothing is known yet of what is written."""
    ledger = Ledger()
    for row in rows_of(config, prompts):
        if isinstance(row, BadRow) and config.on_error is OnError.fail:
            raise PromptError(row.error)
        samples = row.params.n if isinstance(row, PromptRow) else 1
        ledger.add(row_key(row), row.index, samples, metadata_key(row))
    return ledger


def _metadata(config: Config, prompts: str, stale: set[int]) -> dict[int, dict[str, Any]]:
    """Read again what some rows carry along, and hold it until their lines are written."""
    rows = (row for row in rows_of(config, prompts) if row.index in stale) if stale else ()
    return {row.index: {"metadata": row.metadata if isinstance(row, PromptRow) else {}} for row in rows}


def _say_dropped(folder: Path, found: Counter[str], damaged: list[int]) -> None:
    reasons = [
        f"{found[kind]} {why}"
        for kind, why in (
            ("changed", "whose prompts changed or are gone"),
            ("failed", "that had failed"),
            ("repeated", "that were written twice"),
        )
        if found[kind]
    ]
    if damaged:
        shown = ", ".join(f"{ROWS}:{number}" for number in damaged[:5])
        reasons.append(f"{len(damaged)} damaged ({shown}{', …' if len(damaged) > 5 else ''})")
    terminal.say(
        f"Lines of an earlier run that are moved to {folder / REPLACED}: {'; '.join(reasons)}. "
        "What is missing of their rows is done again.",
        style="yellow",
    )


def finished_before(config: Config, prompts: PromptState, results: JobFolder) -> Todo | None:
    """Find that the job lacked nothing when it was last surveyed, and has not been touched since; else None."""
    todo = Todo.read(results.path)
    if todo is None or todo.done < todo.total or not todo.untouched(prompts, config.limit, results.path):
        return None
    if todo.errors and (config.retry_errors or config.on_error is OnError.fail):
        return None
    return todo
