"""Line up the same prompt in every job: what each of them answered."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.common.fingerprint import fingerprint
from pipeline.report.jobs import ReportedJob


@dataclass(slots=True)
class Answer:
    """Hold what one job made of a prompt: a completion or an error."""

    completion: str
    error: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    token_ids: "array[int] | None"
    thinking: str | None
    complete: bool | None = None  # whole by its constraint; None without one


@dataclass(slots=True)
class Prompt:
    """Hold one prompt of a prompt set (one sample of it), and the answers in the order of the jobs."""

    id: str
    index: int
    sample: int
    prompt_set: str
    asked: Any  # text, a list of messages, or None where the line could not be read
    reference: Any
    answers: list[Answer | None]
    agreement: list[float | None]  # with the baseline's answer, filled in by `quality`


def align(jobs: Sequence[ReportedJob]) -> list[Prompt]:
    """Collect all prompts of all jobs, by prompt set and index. The same text under the same id is the same."""
    prompts: dict[tuple[Any, ...], Prompt] = {}
    for number, job in enumerate(jobs):
        for row in job.rows():
            asked = row.get("messages") or row.get("prompt")
            text = asked if isinstance(asked, str) else json.dumps(asked, sort_keys=True)
            sample = int(row.get("sample") or 0)
            key = (job.prompt_set, str(row.get("id")), sample, fingerprint(text))
            if key not in prompts:
                prompts[key] = _prompt(row, asked, job.prompt_set, len(jobs))
            prompts[key].answers[number] = _answer(row)
    return sorted(prompts.values(), key=lambda p: (p.prompt_set, p.index, p.sample, p.id))


def _prompt(row: dict[str, Any], asked: Any, prompt_set: str, jobs: int) -> Prompt:
    metadata = row.get("metadata") or {}
    return Prompt(
        id=str(row.get("id")),
        index=int(row.get("index") or 0),
        sample=int(row.get("sample") or 0),
        prompt_set=prompt_set,
        asked=asked,
        reference=metadata.get("reference") if isinstance(metadata, dict) else None,
        answers=[None] * jobs,
        agreement=[None] * jobs,
    )


def _answer(row: dict[str, Any]) -> Answer:
    usage = row.get("usage") or {}
    return Answer(
        completion=str(row.get("completion") or ""),
        error=str(row["error"]) if row.get("error") else None,
        finish_reason=row.get("finish_reason"),
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        token_ids=_token_ids(row.get("token_ids")),
        thinking=row.get("thinking"),
        complete=row.get("complete"),
    )


def _token_ids(ids: Any) -> "array[int] | None":
    try:
        return array("I", ids) if isinstance(ids, list) else None
    except (TypeError, OverflowError):  # not as we wrote them: then words are compared
        return None
