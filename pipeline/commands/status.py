"""`python -m pipeline.commands.status [FOLDER] [watch=true]`: a table of the jobs, cells and shards in a folder."""

import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.terminal import console, say, visible
from pipeline.common.units import duration
from pipeline.job.merge import is_merged
from pipeline.job.shards import fleet_tokens_per_sec
from pipeline.slurm.state import JobState, find_folders, states_of

STYLES = {"complete": "green", "running": "cyan", "failed": "red", "cancelled": "yellow", "stopped": "yellow"}
EVERY_SEC = 5.0
HELP = """\
How far jobs are, from their own files; where there is a Slurm, also what it does with them.

  python -m pipeline.commands.status                          everything in outputs/
  python -m pipeline.commands.status outputs/big              one prompt set, job or shard
  python -m pipeline.commands.status outputs/big watch=true   again every 5 seconds, until all is done

Exit status: 0 all complete, 1 some failed or were cancelled or stopped, 75 some are queued or running."""


def main() -> int:
    """Run the command line. Returns the exit status that HELP describes, or 2 or 3 for an error."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    try:
        top, watch = _parse(arguments)
        return _watch(top) if watch else _once(top)
    except PipelineError as error:
        say(f"Error: {error}", style="red")
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str]) -> tuple[Path, bool]:
    watch = "watch=true" in arguments
    folders = [a for a in arguments if a not in ("watch=true", "watch=false")]
    if len(folders) > 1 or any("=" in a and not Path(a).exists() for a in folders):
        raise ConfigError(f"{' '.join(arguments)}: give one folder, and watch=true if you like.")
    top = Path(folders[0] if folders else "outputs")
    if not top.is_dir():
        raise ConfigError(
            f"{top}: no such folder. Jobs write to outputs/ unless outputs_dir= says otherwise."
        )
    return top, watch


def _once(top: Path) -> int:
    states = _states(top)
    console.print(_picture(top, states))
    return exit_status(states)


def _watch(top: Path) -> int:
    """Refresh until nothing is queued or running."""
    states = _states(top)
    with Live(_picture(top, states), console=console, auto_refresh=False) as live:
        while exit_status(states) == 75:
            time.sleep(EVERY_SEC)
            states = _states(top)
            live.update(_picture(top, states), refresh=True)
    return exit_status(states)


def exit_status(states: list[JobState]) -> int:
    """0 all complete, 75 some queued or running, else 1."""
    kinds = {state.kind for state in states}
    if kinds & {"running", "queued"}:
        return 75
    return 0 if kinds <= {"complete"} else 1


def _states(top: Path) -> list[JobState]:
    """Of every job; what merged shards made is left out, since the shards are there."""
    folders = [folder for folder in find_folders(top) if not is_merged(folder)]
    if not folders:
        raise ConfigError(f"{top}: holds no jobs.")
    return list(states_of(folders))


def _picture(top: Path, states: list[JobState]) -> Group:
    table = Table(header_style="bold")
    table.add_column("job", overflow="fold")
    for name in ("rows", "errors", "tokens/s", "left"):
        table.add_column(name, justify="right")
    table.add_column("state", overflow="fold")
    for state in states:
        counts = state.counts
        table.add_row(
            Text(visible(_name(state.folder, top))),
            counts.shown,
            f"{'' if counts.exact else '~'}{counts.errors}",
            f"{state.tokens_per_sec:,.1f}" if state.tokens_per_sec else "-",
            duration(state.left_sec),
            Text(visible(state.text), style=STYLES.get(state.kind, "")),
        )
    return Group(table, Text(_summary(states)))


def _name(folder: Path, top: Path) -> str:
    return str(folder.relative_to(top)) if folder != top else folder.name


def _summary(states: list[JobState]) -> str:
    kinds = Counter(state.kind for state in states)
    done, totals = sum(s.counts.done for s in states), [s.counts.total for s in states]
    total = "?" if None in totals else sum(t for t in totals if t is not None)
    words = [", ".join(f"{n} {kind}" for kind, n in kinds.items()), f"{done} of {total} rows"]
    running = [s for s in states if s.kind == "running"]
    if speed := fleet_tokens_per_sec(s.tokens_per_sec for s in running):
        words.append(f"{speed:,.1f} tokens/s")
    if left := [s.left_sec for s in running if s.left_sec is not None]:
        words.append(f"{duration(max(left))} left for what is running")
    return "; ".join(words) + "."


if __name__ == "__main__":
    sys.exit(main())
