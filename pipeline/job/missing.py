"""Find what a job still has to do: hold its prompt file against its folder."""

import gzip
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.errors import PromptError
from pipeline.common.fingerprint import metadata_key, row_key
from pipeline.common.request import BadRow, PromptRow
from pipeline.common.streams import is_stream, opened
from pipeline.config.schema import Config, OnError
from pipeline.job.folder import DROP, KEEP, JobFolder
from pipeline.job.ledger import Ledger
from pipeline.job.rows import error_row
from pipeline.job.todo import Todo
from pipeline.prompts.lines import is_table, suffix_of
from pipeline.prompts.reader import find_prompts, open_prompts

MAX_HELD = 100_000  # bad rows
SHOWN = 3  # of their errors, where there is nothing else


def locate_prompts(config: Config, results: JobFolder) -> str:
    """Find the prompt file; what can be read only once is kept in the job's folder first, for it is read again.

    Raises:
        PromptError: there is no such file.
    """
    path = find_prompts(config.prompts)
    if not is_stream(path):
        return path
    with opened(path) as stream:
        results.write_stream(results.prompts, stream)
    return str(results.prompts)


def find_missing(config: Config, prompts: str, results: JobFolder) -> Ledger:
    """Read the prompt file and the written rows once; lines that no longer answer a row are moved aside.

    Raises:
        PromptError: the prompt file cannot be read, or has a bad row and on_error=fail.
        OutputError: the folder cannot be read or written.
    """
    ledger = _read(config, prompts)
    judge = _Judge(config, ledger)

    @cache
    def metadata() -> dict[int, dict[str, Any]]:  # read when every line is judged, and only if one asks
        return _metadata(config, prompts, judge.stale)

    # From here on the lines are those of the new prompt file, and the note of the old.
    results.remove(results.todo)
    dropped = results.sift(judge, lambda index: metadata().get(index, {}))
    if judge.stale:
        rows = terminal.how_many(len(judge.stale), "row")
        terminal.say(f"{rows} with other metadata than before: the lines are brought up to date.")
    if dropped:
        _say_dropped(results, judge)
    if ledger.done:
        terminal.say(f"Going on: {ledger.shown} were done before.")
    return ledger


def write_bad_rows(config: Config, prompts: str, results: JobFolder, ledger: Ledger) -> bool:
    """Write the rows that are missing, if none of them can be run: no model is needed for that.

    Returns:
        whether that was so, and all is done now.
    """
    missing = list[tuple[int, BadRow]]()
    for number, row in enumerate(open_prompts(config, prompts)):
        if number == ledger.rows or not ledger.missing_samples(number, row_key(row)):
            continue
        if isinstance(row, PromptRow) or len(missing) == MAX_HELD:
            return False
        missing.append((number, row))
    for number, row in missing:
        results.append(error_row(row, row.error))
        ledger.mark(number, 0, failed=True)
    results.sync()
    if missing and ledger.errors == ledger.total:
        shown = "\n".join(f"  {row.error}" for _, row in missing[:SHOWN])
        terminal.say(
            f"No row of {prompts} can be run; no model was loaded.\n{shown}\n{_advice(prompts)}", style="red"
        )
    return not ledger.missing


def _advice(prompts: str) -> str:
    if not is_table(prompts) and suffix_of(prompts) not in (".csv", ".tsv"):
        with gzip.open(prompts) if prompts.endswith(".gz") else Path(prompts).open("rb") as file:
            if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                return "An array is read where the file's name ends in .json, and its elements are objects."
        return 'Write one JSON object a line, as {"prompt": "Hello"}; prompt_field=NAME names another field.'
    return "The column called prompt is asked; columns.prompt=NAME takes another, prompt_template=… several."


class _Judge:
    """Decide for each line of an earlier run whether it still holds, and note in the ledger what does."""

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self.found: Counter[str] = Counter()  # why lines are dropped
        self.damaged: list[int] = []  # line numbers
        self.stale: set[int] = set()  # indices of rows whose lines have other metadata

    def __call__(self, line: dict[str, Any] | None, number: int) -> int:
        if line is None:
            self.damaged.append(number)
            return DROP
        row = self._ledger.find(line["key"])
        if row is None:
            if self._config.limit is not None and line["index"] >= self._config.limit:
                return KEEP  # of a run without the limit
            return self._drop("changed")
        failed = line["error"] is not None
        if failed and self._config.retry_errors:
            return self._drop("failed")
        if not self._ledger.mark(row, line["sample"], failed=failed):
            return self._drop("repeated")
        index = self._ledger.index(row)
        if metadata_key(line) != self._ledger.metadata(row):
            self.stale.add(index)
            return index
        return KEEP if line["index"] == index else index

    def _drop(self, why: str) -> int:
        self.found[why] += 1
        return DROP


def _read(config: Config, prompts: str) -> Ledger:
    """Read the prompt file's rows; nothing is known yet of what is written."""
    ledger = Ledger()
    for row in open_prompts(config, prompts):
        if isinstance(row, BadRow) and config.on_error is OnError.fail:
            raise PromptError(found=row.error)
        samples = row.params.n if isinstance(row, PromptRow) else 1
        ledger.add(row_key(row), row.index, samples, metadata_key(row))
    return ledger


def _metadata(config: Config, prompts: str, stale: set[int]) -> dict[int, dict[str, Any]]:
    """Read again what some rows carry along, and hold it until their lines are written."""
    rows = (row for row in open_prompts(config, prompts) if row.index in stale) if stale else ()
    return {row.index: {"metadata": row.metadata if isinstance(row, PromptRow) else {}} for row in rows}


def _say_dropped(results: JobFolder, judge: _Judge) -> None:
    reasons = [
        f"{judge.found[kind]} {why}"
        for kind, why in (
            ("changed", "whose prompts changed or are gone"),
            ("failed", "that had failed"),
            ("repeated", "that were written twice"),
        )
        if judge.found[kind]
    ]
    if judge.damaged:
        shown = ", ".join(f"{results.rows.name}:{number}" for number in judge.damaged[:5])
        reasons.append(f"{len(judge.damaged)} damaged ({shown}{', …' if len(judge.damaged) > 5 else ''})")
    terminal.say(
        f"Lines of an earlier run that are moved to {results.replaced}: {'; '.join(reasons)}. "
        "What is missing of their rows is done again.",
        style="yellow",
    )


def finished_before(config: Config, prompts: str, sha256: str | None, results: JobFolder) -> Todo | None:
    """Find that the job lacked nothing when that was last asked, and has not been touched since; else None."""
    todo = Todo.read(results.folder)
    if todo is None or todo.done < todo.total:
        return None
    if not todo.untouched(prompts, sha256, config.limit, results.folder):
        return None
    if todo.errors and (config.retry_errors or config.on_error is OnError.fail):
        return None
    return todo
