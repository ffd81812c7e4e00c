"""Write the page that shows how far jobs are: one file, in the report's style, that a browser loads again and again."""

import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from pipeline.common.errors import OutputError
from pipeline.common.units import duration
from pipeline.report.page import HERE, csp_hash, templates
from pipeline.slurm.state import JobState


def write_progress(
    path: Path, top: Path, states: Sequence[JobState], summary: str, again_sec: float | None
) -> None:
    """Write the page in one move.

    Args:
        top: the folder that the jobs lie in.
        summary: all of them in a sentence.
        again_sec: when the page will be written again, and a browser is to look; None is never.

    Raises:
        OutputError: the file cannot be written.
    """
    environment = templates()
    environment.filters["duration"] = duration
    style = (HERE / "page.css").read_text(encoding="utf-8")
    text = environment.get_template("progress.html.j2").render(
        title=str(top),
        summary=summary,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        again_sec=again_sec and round(again_sec),
        states=states,
        parent=lambda state: (
            "" if state.folder.parent in (top, top.parent) else state.folder.parent.relative_to(top)
        ),
        style=Markup(style),
        style_hash=csp_hash(style),
    )
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text, "utf-8", "replace")
        fresh.replace(path)
    except OSError as error:
        raise OutputError(
            found=f"html={path}: cannot be written ({error.strerror or error})",
            fix="Name a file in a folder that is there.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()
