"""Measure how near a job's answers are to a baseline's, and to reference answers; without a judge model."""

import re
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.common.errors import OutputError
from pipeline.common.intervals import proportion, share_over_rows
from pipeline.report.jobs import ReportedJob, precision
from pipeline.report.prompts import Answer, Prompt

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class Difference:
    """Compare two answers, in tokens where both jobs wrote token ids, else in words."""

    unit: str  # "tokens" or "words"
    exact: bool
    divergence: int | None  # the first position that differs; None where none does
    same: int  # positions that agree
    length: int  # of the longer one

    @property
    def agreement(self) -> float:
        """Give the share of positions that agree."""
        return self.same / self.length if self.length else 1.0


def compare(answer: Answer, baseline: Answer) -> Difference | None:
    """Compare an answer with the baseline's; None where one of them is an error."""
    if answer.error or baseline.error:
        return None
    exact = answer.completion == baseline.completion
    ours: Sequence[Any]
    theirs: Sequence[Any]
    if answer.token_ids is not None and baseline.token_ids is not None:
        unit, ours, theirs = "tokens", answer.token_ids, baseline.token_ids
    else:
        unit, ours, theirs = "words", answer.completion.split(), baseline.completion.split()
    length = max(len(ours), len(theirs))
    if ours == theirs:
        return Difference(unit, exact, None, length, length)
    agree = [a == b for a, b in zip(ours, theirs, strict=False)]
    first = agree.index(False) if False in agree else len(agree)
    return Difference(unit, exact, first, sum(agree), length)


def baselines(jobs: Sequence[ReportedJob], chosen: Path | None = None) -> list[int | None]:
    """Choose for each job the one that it is compared with, by number.

    That is the chosen one for all jobs of its prompt set; else the most precise job with the same
    model, generation and prompt set. None where a job has nobody to be compared with.

    Raises:
        OutputError: the chosen folder is not among the jobs.
    """
    with_rows = [i for i, job in enumerate(jobs) if next(job.rows(), None) is not None]
    wanted = None
    if chosen is not None:
        wanted = next((i for i, job in enumerate(jobs) if job.folder.resolve() == chosen.resolve()), None)
        if wanted is None:
            raise OutputError(
                found=f"baseline={chosen}: not among the jobs", fix="Pass its folder to the report too."
            )
    found: list[int | None] = []
    for job in jobs:
        if wanted is not None and jobs[wanted].prompt_set == job.prompt_set:
            found.append(wanted)
            continue
        peers = [i for i in with_rows if _kin(jobs[i]) == _kin(job)]
        found.append(max(peers, key=lambda i: precision(jobs[i])) if len(peers) > 1 else None)
    return found


def _kin(job: ReportedJob) -> tuple[object, ...]:
    return job.model, job.generation, str(job.config.get("generation")), job.prompt_set


def compare_jobs(prompts: Sequence[Prompt], number: int, baseline: int | None) -> dict[str, Any] | None:
    """Measure a job's agreement with its baseline over all prompts that both answered; note each prompt's own.

    None without a baseline, or for the baseline itself.
    """
    if baseline is None or baseline == number:
        return None
    found: list[Difference] = []
    for prompt in prompts:
        ours, theirs = prompt.answers[number], prompt.answers[baseline]
        difference = compare(ours, theirs) if ours and theirs else None
        if difference is not None:
            prompt.agreement[number] = difference.agreement
            found.append(difference)
    divergences = [d.divergence for d in found if d.divergence is not None]
    return {
        "rows": len(found),
        "unit": "tokens" if all(d.unit == "tokens" for d in found) else "words",
        "exact_match": interval(proportion(sum(d.exact for d in found), len(found))),
        "agreement": interval(share_over_rows((d.same, d.length) for d in found)),
        "median_first_divergence": statistics.median(divergences) if divergences else None,
    }


def against_references(prompts: Sequence[Prompt], number: int) -> dict[str, Any] | None:
    """Count how often a job's answers hold the references; None where no row has one. An error is wrong."""
    marks = [
        reference_marks("" if answer.error else answer.completion, prompt.reference)
        for prompt in prompts
        if prompt.reference is not None and (answer := prompt.answers[number]) is not None
    ]
    if not marks:
        return None
    numeric = [m["numeric"] for m in marks if m["numeric"] is not None]
    return {
        "rows": len(marks),
        "exact": interval(proportion(sum(bool(m["exact"]) for m in marks), len(marks))),
        "contains": interval(proportion(sum(bool(m["contains"]) for m in marks), len(marks))),
        "numeric": interval(proportion(sum(numeric), len(numeric))),
        "numeric_rows": len(numeric),
    }


def reference_marks(completion: str, reference: Any) -> dict[str, bool | None]:
    """Say whether a completion is the reference, contains it, or ends in its number.

    A reference with #### in it, as GSM8K's are, is what follows that. Case, outer punctuation and the kind
    of blanks do not count. A list of references holds alternatives. numeric compares the completion's last
    number, and is None for one that is no number.
    """
    given = reference if isinstance(reference, list) else [reference]
    options = [str(option).rpartition("####")[2].strip() for option in given]
    text = _plain(completion)
    wanted = [_plain(option) for option in options]
    numbers = [n for option in options if (n := _number(option)) is not None]
    last = NUMBER.findall(completion.replace("−", "-"))
    said = _number(last[-1]) if last else None
    return {
        "exact": text in wanted,
        "contains": any(_contains(text, w) for w in wanted if w),
        "numeric": any(_near(said, n) for n in numbers) if numbers else None,
    }


def interval(value: Any) -> dict[str, float | None] | None:
    """Give an interval as plain data."""
    return None if value is None else asdict(value)


def _plain(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?\"'`*()[]。！？、，「」")


def _contains(text: str, wanted: str) -> bool:
    """Look for whole words only, where the script has blanks between them: 4 is not in 14."""
    before = r"(?<![0-9a-z])" if re.match("[0-9a-z]", wanted) else ""
    after = r"(?![0-9a-z])" if re.search("[0-9a-z]$", wanted) else ""
    return re.search(before + re.escape(wanted) + after, text) is not None


def _number(text: str) -> float | None:
    match = NUMBER.fullmatch(text.rstrip("."))
    return float(match[0].replace(",", "")) if match else None


def _near(said: float | None, wanted: float) -> bool:
    return said is not None and abs(said - wanted) <= 1e-6 * max(1.0, abs(wanted))
