"""Show how far the jobs, cells and shards in a folder are."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from pipeline.commands.arguments import take_paths
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.terminal import aligned, console, how_many, say, visible
from pipeline.common.units import duration
from pipeline.job.damage import damage
from pipeline.job.merge import is_merged
from pipeline.job.shards import fleet_tokens_per_sec
from pipeline.slurm.state import JobState, find_folders, states_of

STYLES = {"complete": "green", "running": "cyan", "failed": "red", "cancelled": "yellow", "stopped": "yellow"}
EVERY_SEC = 5.0
EXAMPLES = {"watch": "true", "html": "progress.html"}
HELP = """\
  python -m pipeline status                          everything in outputs/
  python -m pipeline status outputs/big              one prompt set, job or shard
  python -m pipeline status outputs/big watch=true   again every 5 seconds, until all is done
  python -m pipeline status watch=true html=progress.html
      as a page too, which a browser loads again by itself

Reads the jobs' own files; where there is a Slurm, it also says what Slurm does with them.

Exit status: 0 all complete, 1 some failed or were cancelled or stopped, 75 some are queued or running.
"""


def main(arguments: list[str]) -> ExitStatus:
    """Show the table once, or again and again with watch=true.

    Raises:
        ConfigError: the command line is wrong, or the folder holds no jobs.
    """
    top, watch, page = _parse(arguments)
    for place in [place for folder in find_folders(top) for place in damage(folder)]:
        say(f"Damaged, and left out: {place}", style="yellow")
    return _watch(top, page) if watch else _once(top, page)


def _parse(arguments: list[str]) -> tuple[Path, bool, Path | None]:
    folders, values = take_paths(arguments, EXAMPLES)
    watch = values.get("watch", "false")
    if watch not in ("true", "false"):
        raise ConfigError(f"watch={watch}: neither true nor false", "Choose one of them.")
    if len(folders) > 1:
        raise ConfigError(f"{' '.join(map(str, folders))}: too many", "Give one folder.")
    top = folders[0] if folders else Path("outputs")
    if not top.is_dir():
        fix = "Jobs write to outputs/ unless outputs_dir= says otherwise."
        raise ConfigError(f"{top}: no such folder", fix)
    page = Path(values["html"]) if "html" in values else None
    if page is not None and page.suffix != ".html":  # whatever else it is, it is not to be written over
        raise ConfigError(f"html={page}: is no name of a page", "Let it end in .html.")
    return top, watch == "true", page


def _once(top: Path, page: Path | None) -> ExitStatus:
    states = _states(top)
    _write(page, top, states)
    console.print(_picture(top, states), soft_wrap=True)
    return exit_status(states)


def _watch(top: Path, page: Path | None) -> ExitStatus:
    """Refresh until nothing is queued or running."""
    states = _states(top)
    try:
        with Live(_picture(top, states), console=console, auto_refresh=False) as live:
            while exit_status(states) is ExitStatus.RUN_AGAIN:
                _write(page, top, states, EVERY_SEC)
                time.sleep(EVERY_SEC)
                states = _states(top)
                live.update(_picture(top, states), refresh=True)
    finally:  # also where nobody watches any longer: a page that comes no more is not to be waited for
        _write(page, top, states)
    return exit_status(states)


def _write(page: Path | None, top: Path, states: list[JobState], again_sec: float | None = None) -> None:
    if page is not None:
        from pipeline.report.progress import write_progress

        write_progress(page, top, states, _summary(states), again_sec)


def exit_status(states: list[JobState]) -> ExitStatus:
    """Say whether all are complete, some are queued or running, or some failed."""
    kinds = {state.kind for state in states}
    if kinds & {"running", "queued"}:
        return ExitStatus.RUN_AGAIN
    return ExitStatus.DONE if kinds <= {"complete"} else ExitStatus.SOME_FAILED


def _states(top: Path) -> list[JobState]:
    """Look at every job but what merged shards made, since the shards are there."""
    folders = [folder for folder in find_folders(top) if not is_merged(folder)]
    if not folders:
        raise ConfigError(f"{top}: holds no jobs", "Give a folder that does.")
    return list(states_of(folders))


def _picture(top: Path, states: list[JobState]) -> Text:
    """Show a line a job under the folder that it lies in, and a second one where there is more to say of it."""
    columns, lines, shown = ("rows", "errors", "tokens/s", "left", "state", "job"), list[Any](), Path()
    for state in states:
        if (parent := _parent(state.folder, top)) != shown:
            shown = parent
            lines.append(Text(visible(str(shown)), style="bold"))
        counts = state.counts
        lines.append((
            counts.shown,
            f"{'' if counts.exact else '~'}{counts.errors}",
            f"{state.tokens_per_sec:,.1f}" if state.tokens_per_sec else "-",
            duration(state.left_sec),
            state.kind,
            state.folder.name,
        ))  # fmt: skip
        if state.text != state.kind:
            lines.append(Text(f"    {visible(state.text)}", style=STYLES.get(state.kind, "")))
    return aligned(columns, [*lines, Text(_summary(states))])


def _parent(folder: Path, top: Path) -> Path:
    """Name the folder that a job lies in, from `top` on; a job that is `top` itself has none to be named."""
    return folder.parent.relative_to(top) if folder != top else Path()


def _summary(states: list[JobState]) -> str:
    kinds = Counter(state.kind for state in states)
    done, totals = sum(s.counts.done for s in states), [s.counts.total for s in states]
    total = "? rows" if None in totals else how_many(sum(t for t in totals if t is not None), "row")
    words = [", ".join(f"{n} {kind}" for kind, n in kinds.items()), f"{done:,} of {total}"]
    running = [s for s in states if s.kind == "running"]
    if speed := fleet_tokens_per_sec(s.tokens_per_sec for s in running):
        words.append(f"{speed:,.1f} tokens/s")
    if left := [s.left_sec for s in running if s.left_sec is not None]:
        words.append(f"{duration(max(left))} left for what is running")
    return "; ".join(words) + "."
