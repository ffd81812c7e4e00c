"""What the jobs gave, side by side.

    python -m pipeline report FOLDER… [baseline=FOLDER] [out=FOLDER]

FOLDER is a job's folder, or one that holds jobs (outputs/). Writes report.html, which opens from disk,
report.md for a pull request, report.json, and plots/. Jobs are compared with the most precise one of
the same model, or with baseline=.
"""

import sys
from pathlib import Path

from pipeline.common import terminal
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.report.write import write_report


def main() -> int:
    """Run the command line. Returns the exit status: 0, 2 for a wrong command, 3 for what cannot be read."""
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0 if sys.argv[1:] else 2
    try:
        folders, values = parse(sys.argv[1:])
        page = write_report(folders, values.get("out"), values.get("baseline"))
    except PipelineError as error:
        terminal.say(f"Error: {error}", style="red")
        return error.exit_status
    terminal.say(f"Report: {page}")
    return 0


def parse(arguments: list[str]) -> tuple[list[Path], dict[str, Path]]:
    """Folders, and the values of baseline= and out=.

    Raises:
        ConfigError: an unknown key, a key without a value, or no folder.
    """
    folders: list[Path] = []
    values: dict[str, Path] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("baseline", "out") and value:
            values[key] = Path(value)
        elif equals and not Path(argument).exists():
            raise ConfigError(f"{argument}: not a folder, and not baseline=FOLDER or out=FOLDER.")
        else:
            folders.append(Path(argument))
    if not folders:
        raise ConfigError(
            "No folder. Pass a job's folder, or one that holds jobs: python -m pipeline report outputs/"
        )
    return folders, values


if __name__ == "__main__":
    sys.exit(main())
