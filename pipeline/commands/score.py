"""What did quantization change? A baseline's completions, read by other models.

    python -m pipeline.commands.score FOLDER… baseline=FOLDER [rows=N] [text=FILE] [window=512]

FOLDER is a job's folder, or one that holds jobs; each gets a scores.json that the report shows: mean
negative log-likelihood per token, perplexity, KL divergence from the baseline over the whole vocabulary,
and how often both find the same token most probable, with 95 % intervals. text= reads a text file too,
in windows of that many tokens.
"""

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.engine.allocator import set_allocator

set_allocator()  # the next lines import torch

from pipeline.common import terminal
from pipeline.common.errors import ConfigError, JobError, PipelineError
from pipeline.common.fingerprint import row_key
from pipeline.common.request import PromptRow
from pipeline.config.compose import to_config
from pipeline.config.schema import Config
from pipeline.job.folder import JobFolder
from pipeline.job.paths import JobPaths
from pipeline.job.rows import read_rows
from pipeline.models.loading import Loaded, load_model, release
from pipeline.models.scoring import Scores, TextRow, score
from pipeline.prompts.chat import prepare_chat, render
from pipeline.prompts.reader import open_prompts
from pipeline.report.jobs import ReportedJob, find_jobs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line, taken apart."""

    folders: list[Path]
    baseline: Path
    rows: int | None
    text: Path | None
    window: int


def main() -> int:
    """Run the command line. Returns the exit status: 0, 2 for a wrong command, 3 where a job failed."""
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0 if sys.argv[1:] else 2
    try:
        return score_jobs(parse(sys.argv[1:]))
    except PipelineError as error:
        terminal.say(f"Error: {error}", style="red")
        return error.exit_status


def parse(arguments: list[str]) -> Arguments:
    """The command line as values.

    Raises:
        ConfigError: an unknown key, no folder, no baseline, or a number that is none.
    """
    values = dict(a.partition("=")[::2] for a in arguments if "=" in a and not Path(a).exists())
    if unknown := values.keys() - {"baseline", "rows", "text", "window"}:
        raise ConfigError(f"{min(unknown)}=: no such key. There are: baseline, rows, text, window.")
    folders = [Path(a) for a in arguments if a.partition("=")[0] not in values]
    if not folders or not values.get("baseline"):
        raise ConfigError(
            "Say which jobs, and against which: python -m pipeline.commands.score outputs/jokes baseline=FOLDER"
        )
    try:
        rows = int(values["rows"]) if "rows" in values else None
        window = int(values.get("window", "512"))
    except ValueError as error:
        raise ConfigError(f"rows= and window= are whole numbers: {error}.") from error
    if window < 2 or (rows is not None and rows < 1):
        raise ConfigError("rows= is at least 1, and window= at least 2.")
    return Arguments(
        folders, Path(values["baseline"]), rows, Path(values["text"]) if "text" in values else None, window
    )


def score_jobs(arguments: Arguments) -> int:
    """Score every job; one that cannot be loaded does not stop the others.

    Raises:
        PipelineError: the baseline cannot be read or loaded.
    """
    jobs = find_jobs(arguments.folders)
    config = job_config(arguments.baseline)
    terminal.say(f"Loading the baseline, {config.model.name} ({arguments.baseline.name})")
    baseline = load_model(config.model, config.quant, config.models_dir)
    tasks = {"completions": completion_rows(arguments.baseline, config, baseline.tokenizer, arguments.rows)}
    if arguments.text:
        tasks["text"] = text_rows(arguments.text, baseline.tokenizer, arguments.window)
    status, lines = 0, []
    for job in jobs:
        terminal.say(f"Scoring {job.label}")
        try:
            scores = score_job(job, arguments, baseline, tasks)
        except PipelineError as error:
            terminal.say(f"Error: {error}", style="red")
            status = error.exit_status
            continue
        lines.append(_line(job, scores))
    release(baseline)
    columns = ("job", "tokens", "perplexity", "KL divergence", "same top token")
    terminal.table(f"Scored on the completions of {arguments.baseline.name}", columns, lines)
    return status


def score_job(
    job: ReportedJob, arguments: Arguments, baseline: Loaded, tasks: dict[str, list[TextRow]]
) -> dict[str, Any]:
    """Read all rows with the job's model, and write its scores.json.

    Raises:
        PipelineError: the model cannot be loaded, or reads other tokens than the baseline.
    """
    is_baseline = job.folder.resolve() == arguments.baseline.resolve()
    config = job_config(job.folder)
    loaded = baseline if is_baseline else load_model(config.model, config.quant, config.models_dir)
    if loaded.tokenizer.get_vocab() != baseline.tokenizer.get_vocab():
        raise JobError(
            f"{job.folder}: its tokenizer is not the baseline's. Choose a baseline of the same model family."
        )
    summaries = {
        name: Scores(list(score(loaded.model, baseline.model, rows))).summary()
        for name, rows in tasks.items()
    }
    if not is_baseline:
        release(loaded)
    scores = {
        "baseline": str(arguments.baseline),
        **summaries["completions"],
        **({"text": {"file": str(arguments.text), **summaries["text"]}} if "text" in summaries else {}),
    }
    with JobFolder(job.folder) as folder:
        folder.write_json(folder.scores, scores)
    return scores


def job_config(folder: Path) -> Config:
    """The config that a job ran with.

    Raises:
        ConfigError: it is not there, or not one of this version's.
    """
    job = JobPaths(folder)
    found = [paths.config for paths in (job, *map(JobPaths, job.shards)) if paths.config.is_file()]
    if not found:
        raise ConfigError(found=f"{job.config}: no such file", fix="Pass the folder of a job that was run.")
    path = found[0]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: not a config of this version ({str(error).splitlines()[0]}).") from error
    return to_config(merged)  # type: ignore[arg-type]


def completion_rows(folder: Path, config: Config, tokenizer: Any, limit: int | None) -> list[TextRow]:
    """A job's completions after their prompts, which are read and rendered again.

    Raises:
        JobError: no completion is left to score.
        PromptError: the prompt file cannot be read.
    """
    asked = _prompts(folder, config)
    chat = prepare_chat(tokenizer, config)
    rows: list[TextRow] = []
    parts = JobPaths(folder).shards or [folder]
    answered = [row for part in parts for row in read_rows(JobPaths(part).rows)]
    for row in sorted(answered, key=lambda row: (row["index"], row.get("sample", 0))):
        prompt = asked.get(row["key"])
        if row["error"] or prompt is None or ("thinking" in row and "token_ids" not in row):
            continue
        made = row.get("token_ids") or tokenizer.encode(row["completion"], add_special_tokens=False)
        before = render(prompt, chat)
        if made and before:
            rows.append(TextRow((*before, *made), len(before)))
    if not rows:
        raise JobError(
            f"{folder}: no completion can be scored: none was written, the prompt file changed since, or the "
            "thinking text was parted without token_ids=true. Run the job again."
        )
    return rows[:limit]


def _prompts(folder: Path, config: Config) -> dict[str, PromptRow]:
    """The good rows of the job's prompt file, by their key."""
    kept = str(JobPaths(folder).prompts) if config.prompts == "-" else None
    rows = open_prompts(replace(config, shard=None), kept)
    return {row_key(row): row for row in rows if isinstance(row, PromptRow)}


def text_rows(path: Path, tokenizer: Any, window: int) -> list[TextRow]:
    """A text in windows that do not overlap; every token but a window's first is scored.

    Raises:
        JobError: the file cannot be read, or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise JobError(f"text={path}: cannot be read ({error}). Pass a UTF-8 text file.") from error
    token_ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    windows = [token_ids[i : i + window] for i in range(0, len(token_ids), window)]
    rows = [TextRow(tuple(ids), 1) for ids in windows if len(ids) > 1]
    if not rows:
        raise JobError(f"text={path}: holds fewer than two tokens. Pass a longer text.")
    return rows


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


if __name__ == "__main__":
    sys.exit(main())
