"""Merge the shards of a job."""

from pipeline.commands.arguments import take_paths
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.terminal import how_many, say
from pipeline.job.merge import merge
from pipeline.job.paths import JobPaths

HELP = """\
  python -m pipeline merge outputs/big/phi-nf4-greedy-1a2b3c4d       shard-I-of-N in it into its outputs.jsonl

Refuses unless every row is there exactly once. Doing it again gives the same file.
"""


def main(arguments: list[str]) -> ExitStatus:
    """Merge the shards in one folder, and say how many lines they made.

    Raises:
        ConfigError: the command line is wrong.
        OutputError: as `merge`.
    """
    folders, _ = take_paths(arguments, {})
    if len(folders) != 1:
        raise ConfigError("one folder is merged at a time", "Give the one that holds the shards.")
    say(f"{how_many(merge(folders[0]), 'line')} in {JobPaths(folders[0]).rows}", style="green")
    return ExitStatus.DONE
