"""Say what quantization changed: other models read a baseline's completions."""

from pathlib import Path
from typing import NamedTuple

from pipeline.commands.arguments import take_paths, whole_number
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus

EXAMPLES = {"baseline": "FOLDER", "rows": "32", "text": "FILE", "window": "512"}
HELP = """\
  python -m pipeline score outputs/questions baseline=outputs/questions/smollm2-none-greedy-1a2b3c4d

Each job gets a scores.json that the report shows: mean negative log-likelihood per token, perplexity, KL
divergence from the baseline over the whole vocabulary, and how often both find the same token most probable,
with 95 % intervals.

  baseline=FOLDER   the job whose completions all models read
  rows=N            only the first N of them
  text=FILE         read a text file too
  window=512        in windows of that many tokens
"""


class Arguments(NamedTuple):
    """Hold the command line, taken apart."""

    folders: list[Path]
    baseline: Path
    rows: int | None
    text: Path | None
    window: int


def main(arguments: list[str]) -> ExitStatus:
    """Score every job; one that cannot be loaded does not stop the others.

    Raises:
        PipelineError: the command line is wrong, or the baseline cannot be read or loaded.
    """
    parsed = parse(arguments)
    from pipeline.commands.score_jobs import score_jobs  # torch and transformers

    return score_jobs(*parsed)


def parse(arguments: list[str]) -> Arguments:
    """Turn the command line into values.

    Raises:
        ConfigError: an unknown key, no folder, no baseline, or a number that is none.
    """
    folders, values = take_paths(arguments, EXAMPLES)
    if not folders or "baseline" not in values:
        fix = "As in python -m pipeline score outputs/jokes baseline=FOLDER"
        raise ConfigError("say which jobs, and against which", fix)
    rows = whole_number(values["rows"], "rows", EXAMPLES["rows"], 1) if "rows" in values else None
    window = whole_number(values.get("window", "512"), "window", EXAMPLES["window"], 2)
    text = Path(values["text"]) if "text" in values else None
    return Arguments(folders, Path(values["baseline"]), rows, text, window)
