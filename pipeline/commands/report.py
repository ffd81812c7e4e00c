"""Set jobs side by side."""

from pathlib import Path

from pipeline.commands.arguments import take_paths
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.terminal import say
from pipeline.report.write import write_report

EXAMPLES = {"baseline": "FOLDER", "out": "FOLDER"}
HELP = """\
  python -m pipeline report outputs/questions                   all jobs in a folder, and in those inside it
  python -m pipeline report FOLDER FOLDER baseline=FOLDER       these, compared with that one

Writes report.html, which opens from disk, report.md for a pull request, report.json, and plots/.

  baseline=FOLDER   compare with this job; else with the most precise one of the same model
  out=FOLDER        where the report goes
"""


def main(arguments: list[str]) -> ExitStatus:
    """Write the report, and say where it lies.

    Raises:
        ConfigError: the command line is wrong.
        JobError: a job cannot be read.
    """
    folders, values = parse(arguments)
    say(f"Report: {write_report(folders, values.get('out'), values.get('baseline'))}")
    return ExitStatus.DONE


def parse(arguments: list[str]) -> tuple[list[Path], dict[str, Path]]:
    """Take folders and the values of baseline= and out= apart.

    Raises:
        ConfigError: an unknown key, a key without a value, or no folder.
    """
    folders, values = take_paths(arguments, EXAMPLES)
    if not folders:
        fix = "Pass a job's folder, or one that holds jobs: python -m pipeline report outputs/"
        raise ConfigError("no folder to report on", fix)
    return folders, {key: Path(value) for key, value in values.items()}
