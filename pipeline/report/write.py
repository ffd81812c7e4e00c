"""Write a report's files: report.html, report.md, report.json and plots/."""

import datetime
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.errors import OutputError
from pipeline.report.jobs import find_jobs
from pipeline.report.page import write_page
from pipeline.report.prompts import align
from pipeline.report.seeds import repeated
from pipeline.report.summary import Record, summarize
from pipeline.report.table import columns, lines, notes


def write_report(folders: Sequence[Path], out: Path | None = None, baseline: Path | None = None) -> Path:
    """Report on all jobs in these folders.

    Args:
        out: where to; None is `report` in the folder that holds all the jobs.
        baseline: the job that others are compared with; None is the most precise one.

    Returns:
        The page.

    Raises:
        OutputError: there is no job, or the report cannot be written.
    """
    jobs = find_jobs(folders)
    if out is None:
        out = Path(os.path.commonpath([job.folder.resolve().parent for job in jobs])) / "report"
    prompts = align(jobs)
    records = summarize(jobs, prompts, baseline)
    for place in [place for job in jobs for place in job.damaged]:
        terminal.say(f"Damaged, and left out: {place}", style="yellow")
    title = ", ".join(sorted({job.prompt_set for job in jobs}))
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        drawn, missing = _draw(records, out / "plots")
        write_page(out / "report.html", title, made, records, prompts, drawn, missing)
        seeds = [group.plain() for group in repeated(records)]
        whole = {"title": title, "made": made, "prompts": len(prompts), "jobs": records, "seeds": seeds}
        (out / "report.json").write_text(
            json.dumps(whole, indent=1, ensure_ascii=False, default=str, skipkeys=True) + "\n",
            "utf-8",
            "backslashreplace",
        )
        (out / "report.md").write_text("\n".join(_markdown(title, records, drawn)) + "\n", "utf-8", "replace")
    except OSError as error:
        raise OutputError(
            found=f"{out}: {error.strerror or error}", fix="Choose another folder with out=FOLDER."
        ) from error
    return out / "report.html"


def _draw(records: Sequence[Record], folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Write every plot; return those for the page, and the titles of those without data."""
    try:
        import matplotlib.pyplot as plt

        from pipeline.report.plots import NARROW_INCHES, PLOTS, WIDE_INCHES, draw, save, svg
    except ImportError:
        terminal.say(
            "No plots: matplotlib is not installed. pip install 'llm-job-pipeline[report]'", style="yellow"
        )
        return [], []
    drawn, missing = [], []
    for plot in PLOTS:
        figures = {
            width + theme: draw(plot, records, theme, inches)
            for width, inches in (("", WIDE_INCHES), ("narrow ", NARROW_INCHES))
            for theme in ("light", "dark")
        }
        if (light := figures["light"]) is None:
            missing.append(plot.title)
            continue
        images = {name: svg(figure) for name, figure in figures.items() if figure}
        save(light, folder / f"{plot.name}.png")
        (folder / f"{plot.name}.svg").write_text(images["light"], "utf-8")
        (folder / f"{plot.name}-dark.svg").write_text(images["dark"], "utf-8")
        drawn.append({"name": plot.name, "title": plot.title, "caption": plot.caption, "images": images})
        plt.close("all")
    return drawn, missing


def _markdown(title: str, records: Sequence[Record], plots: Sequence[dict[str, Any]]) -> Iterator[str]:
    shown = columns(records)
    yield f"# Report: {_inline(title)}\n"
    yield "| " + " | ".join(column.title for column in shown) + " |"
    yield "|" + "|".join("---" if column.text else "---:" for column in shown) + "|"
    for line in lines(records):
        cells = [_inline(line.label) + (" (baseline)" if line.baseline else "")]
        for cell in line.cells:
            small = f" ({_inline(cell.small)})" if cell.small else ""
            cells.append((f"**{_inline(cell.shown)}**" if cell.best else _inline(cell.shown)) + small)
        cells += ["–"] * (len(shown) - len(cells))
        yield "| " + " | ".join(cells) + " |"
    yield "\nBold is the best value of its column; in brackets are 95 % intervals, or what was predicted."
    yield f"{_inline(notes(records))}\n"
    for record in records:
        if record["reason"]:
            yield f"- {_inline(record['label'])}: {_inline(record['reason'])}"
    for plot in plots:
        yield f"\n## {plot['title']}\n\n![{plot['title']}](plots/{plot['name']}.png)\n\n{plot['caption']}"
    yield "\n## To repeat it\n"
    for record in records:
        yield f"    {terminal.visible(shlex.join(record['setup']['command'])).replace(chr(10), ' ')}"


def _inline(text: Any) -> str:
    """Escape text that Markdown is to show as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(terminal.visible(str(text)).split()))
