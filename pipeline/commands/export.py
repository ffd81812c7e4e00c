"""Write a job's answers in the shape that another tool reads."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.commands.arguments import take_paths
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.suggestions import did_you_mean
from pipeline.common.terminal import how_many, say
from pipeline.job.counts import read_counts
from pipeline.job.exports import DATASET, FORMATS, Answers
from pipeline.job.merge import is_merged
from pipeline.job.paths import JobPaths

EXAMPLES = {"to": "csv", "file": "answers.csv"}
HELP = """\
  python -m pipeline export outputs/jokes/phi-nf4-greedy-1a2b3c4d to=csv
  python -m pipeline export outputs/big/phi-nf4-greedy-1a2b3c4d to=openai file=answers.jsonl

to=openai    OpenAI's batch output: a line a row, its samples as choices
to=parquet   a row a completion, its metadata as columns (the data extra)
to=csv       the same as CSV; a text that a spreadsheet would compute gets a ' before it
to=jsonl     the same as JSON Lines
to=datasets  a folder that datasets.load_dataset reads, with a card (the data extra)

In the order of the prompt file, into exports/ in the job's folder, or file=PATH. outputs.jsonl stays as it is.
"""


def main(arguments: list[str]) -> ExitStatus:
    """Export one job, of its shards all that there is, and say where to.

    Raises:
        ConfigError: the command line is wrong, or pyarrow is wanted and not there.
        OutputError: the folder holds no answers.
    """
    folders, options = take_paths(arguments, EXAMPLES)
    if len(folders) != 1:
        raise ConfigError("one folder is exported at a time", "Give a job's folder.")
    to = options.get("to", "")
    if to not in FORMATS:
        there_are = f"{did_you_mean(to, FORMATS)} There are: {', '.join(FORMATS)}."
        raise ConfigError(f"to={to}: no such format", there_are)
    name, write = FORMATS[to]
    answers = Answers.find(folders[0], lambda where: say(f"{where}: a damaged line is left out", "yellow"))
    target = Path(options["file"]) if "file" in options else JobPaths(folders[0]).exports / name
    _check(target, answers, whole=to == "datasets")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
        fresh = Path(folder) / target.name
        write(answers, fresh)
        if target.is_dir():
            shutil.rmtree(target)
        fresh.replace(target)
    say(f"{how_many(len(answers.places), 'answer')} in {target}", "green")
    if not is_merged(folders[0]) and not all(read_counts(file.parent).complete for file in answers.files):
        say("The job is not complete: what is missing is not exported.", "yellow")
    return ExitStatus.DONE


def _check(target: Path, answers: Answers, *, whole: bool) -> None:
    """Refuse to write over the answers themselves, or over a folder that no export made.

    Args:
        whole: a folder is written, and no file.
    """
    if target.resolve() in [file.resolve() for file in answers.files]:
        raise ConfigError(f"file={target}: is what is exported", "Name another file.")
    if target.is_dir() and not whole:
        raise ConfigError(f"{target}: is a folder", "Name a file with file=….")
    if target.is_dir() and not {path.relative_to(target) for path in target.rglob("*")} <= DATASET:
        raise ConfigError(f"{target}: is a folder with other files in it", "Name another with file=….")
    if target.is_file() and whole:
        raise ConfigError(f"{target}: is a file", "Name a folder with file=….")
