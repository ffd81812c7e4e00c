"""Let models read a baseline's completions, and write what they find. The heavy half of `score`."""

from pathlib import Path
from typing import Any

from pipeline.commands.score_rows import completion_rows, text_rows
from pipeline.common.errors import JobError, PipelineError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.terminal import say, table
from pipeline.job.folder import JobFolder
from pipeline.job.manifest import check_same_experts
from pipeline.job.recorded import job_config
from pipeline.models.loading import Loaded, load_model, release
from pipeline.models.quantized_experts import has_quantized_experts
from pipeline.models.scoring import Scores, TextRow, score
from pipeline.report.jobs import ReportedJob, find_jobs


def score_jobs(
    folders: list[Path], baseline: Path, rows: int | None, text: Path | None, window: int
) -> ExitStatus:
    """Score every job; one that cannot be loaded does not stop the others.

    Raises:
        PipelineError: the baseline cannot be read or loaded.
    """
    jobs = find_jobs(folders)
    config = job_config(baseline)
    say(f"Loading the baseline, {config.model.name} ({baseline.name})")
    loaded = load_model(config.model, config.quant, config.models_dir)
    tasks = {"completions": completion_rows(baseline, config, loaded.tokenizer, rows)}
    if text:
        tasks["text"] = text_rows(text, loaded.tokenizer, window)
    status, lines = ExitStatus.DONE, []
    for job in jobs:
        say(f"Scoring {job.label}")
        try:
            scores = _scores(job, baseline, loaded, tasks)
            if text:
                scores["text"] = {"file": str(text), **scores["text"]}
            with JobFolder(job.folder) as folder:
                folder.write_json(folder.scores, scores)
        except PipelineError as error:
            say(f"Error: {error}", style="red")
            status = error.exit_status
            continue
        lines.append(_line(job, scores))
    release(loaded)
    columns = ("job", "tokens", "perplexity", "KL divergence", "same top token")
    table(f"Scored on the completions of {baseline.name}", columns, lines)
    return status


def _scores(
    job: ReportedJob, baseline: Path, reference: Loaded, tasks: dict[str, list[TextRow]]
) -> dict[str, Any]:
    """Read all rows with the job's model beside the baseline's; return what scores.json holds.

    Raises:
        PipelineError: the model cannot be loaded, is not held as it was, or reads other tokens than the baseline.
    """
    is_baseline = job.folder.resolve() == baseline.resolve()
    config = job_config(job.folder)
    loaded = reference if is_baseline else load_model(config.model, config.quant, config.models_dir)
    check_same_experts(job.folder, has_quantized_experts(loaded.model))
    if loaded.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise JobError(
            f"{job.folder}: its tokenizer is not the baseline's",
            "Choose a baseline of the same model family.",
        )
    summaries = {
        name: Scores(list(score(loaded.model, reference.model, rows))).summary()
        for name, rows in tasks.items()
    }
    if not is_baseline:
        release(loaded)
    completions = summaries.pop("completions")
    return {"baseline": str(baseline), **completions, **summaries}


def _line(job: ReportedJob, scores: dict[str, Any]) -> tuple[str, ...]:
    def shown(name: str, form: str) -> str:
        found = scores[name]
        if found["low"] is None:
            return format(found["value"], form)
        return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"

    return (
        job.label,
        str(scores["tokens"]),
        shown("perplexity", ".3f"),
        shown("kl", ".5f"),
        shown("top1", ".1%"),
    )
