"""Merge the shards of a job."""

import sys
from pathlib import Path

from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.terminal import say
from pipeline.job.merge import merge
from pipeline.job.paths import JobPaths

HELP = """\
Merge the shards of a job: FOLDER/shard-I-of-N into FOLDER/outputs.jsonl, in the order of the prompt file.

  python -m pipeline.commands.merge outputs/big/phi-nf4-greedy-1a2b3c4d

Refuses unless every row is there exactly once. Doing it again gives the same file."""


def main() -> int:
    """Run the command line. Returns the exit status: 0 merged, 2 or 3 an error."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    try:
        if len(arguments) != 1:
            raise ConfigError(found="merge takes the one folder that holds the shards", fix="See --help.")
        lines = merge(Path(arguments[0]))
    except PipelineError as error:
        say(f"Error: {error}", style="red")
        return error.exit_status
    say(f"{lines} lines in {JobPaths(Path(arguments[0])).rows}", style="green")
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
