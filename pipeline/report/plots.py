"""Draw the plots, each readable alone: light and dark, as SVG for the page and PNG for everything else."""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.common.units import MB
from pipeline.report.summary import Record
from pipeline.report.tradeoff import draw_tradeoff

# Okabe and Ito's colours (2008), told apart with every kind of colour blindness. Grey is what is left.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#B2B2B2")
GREY = "#8A8F98"
WIDE_INCHES, NARROW_INCHES = 7.6, 4.0  # for a screen, and for a phone, where the letters stay as large
# Parts of 8 that are drawn and left out. Lines on top of each other begin at the same place: each leaves a gap
# in which those below it show.
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (4, 4)), (0, (2, 6)))
THEMES = {
    "light": {"text": "#1d2430", "muted": "#667080", "grid": "#e3e6eb", "back": "#ffffff"},
    "dark": {"text": "#e8eaee", "muted": "#9aa3b2", "grid": "#333a46", "back": "#1a1f27"},
}


@dataclass(frozen=True, slots=True)
class Plot:
    """Describe one plot: a name for its files, a title, what it shows, and how to draw it on `axes`."""

    name: str
    title: str
    caption: str
    draw: Callable[[Axes, Sequence[Record], dict[str, str]], None]
    has_data: Callable[[Record], bool]
    rows: bool = True  # one line a job, so that its height grows with their number


def draw(plot: Plot, records: Sequence[Record], theme: str, inches: float = WIDE_INCHES) -> Figure | None:
    """Draw the plot in one theme; None where no job has the data."""
    shown = [record for record in records if plot.has_data(record)]
    if not shown:
        return None
    colours = THEMES[theme]
    style: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
        "font.size": 9.5,
        "text.color": colours["text"],
        "axes.labelcolor": colours["muted"],
        "axes.edgecolor": colours["grid"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["text"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": colours["back"],
        "axes.facecolor": colours["back"],
        "savefig.facecolor": colours["back"],
        "svg.hashsalt": plot.name,  # the same file for the same figures
        "text.parse_math": False,  # a name may hold dollar signs
    }
    with matplotlib.rc_context(style):
        height = 1.3 + 0.34 * len(shown) if plot.rows else 4.4
        figure, axes = plt.subplots(figsize=(inches, max(2.4, height)), layout="constrained")
        if plot.rows:
            axes.grid(axis="x", color=colours["grid"], linewidth=0.8)
            axes.tick_params(length=0)
            axes.spines["left"].set_visible(False)
        else:
            axes.grid(color=colours["grid"], linewidth=0.8)
            axes.tick_params(length=0, labelcolor=colours["muted"])
        axes.set_axisbelow(True)
        plot.draw(axes, shown, colours)
    return figure


def svg(figure: Figure) -> str:
    """Give the figure as SVG text, its letters as paths."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file."""
    figure.savefig(path, dpi=150)


def _names(axes: Axes, records: Sequence[Record]) -> list[int]:
    """Give each job a line of its own, the first at the top."""
    places = list(range(len(records)))
    axes.set_yticks(places, [record["label"] for record in records])
    axes.set_ylim(len(records) - 0.4, -0.6)
    return places


def _legend(axes: Axes, columns: int, handle: float = 1.0) -> None:
    figure = axes.get_figure(root=True)
    narrow = figure is not None and figure.get_figwidth() < WIDE_INCHES
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2 if narrow else columns, frameon=False, handlelength=handle,
        handleheight=1.0, columnspacing=1.2, borderaxespad=0.2, fontsize=8.5,
    )  # fmt: skip


def _memory(axes: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    places = _names(axes, records)
    parts = list(dict.fromkeys(part for record in records for part in record["memory"]["parts"]))
    parts.sort(key=lambda part: part == "rest")  # the rest comes last
    left = [0.0] * len(records)
    for number, part in enumerate(parts):
        sizes = [record["memory"]["parts"].get(part, 0) / MB for record in records]
        colour = GREY if part == "rest" else COLOURS[number % len(COLOURS)]
        axes.barh(
            places, sizes, 0.62, left=left, color=colour, label=part, alpha=0.45 if part == "rest" else 1
        )
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    marks = [
        (p, predicted / MB)
        for p, r in zip(places, records, strict=True)
        if (predicted := r["memory"]["predicted_peak_bytes"])
    ]
    if marks:
        axes.scatter(
            [size for _, size in marks], [place for place, _ in marks], marker="D", s=34, zorder=3,
            color=colours["back"], edgecolors=colours["text"], linewidths=1.3, label="predicted peak",
        )  # fmt: skip
    axes.set_xlabel("MB")
    _legend(axes, 4)


def _speed(axes: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    places = _names(axes, records)
    speeds = [record["tokens_per_sec"] for record in records]
    axes.barh(places, speeds, 0.62, color=COLOURS[0])
    for place, record in zip(places, records, strict=True):
        spread = speed_spread(record["timeline"])
        if spread:
            axes.plot(spread, [place, place], color=colours["text"], linewidth=1.6, solid_capstyle="butt")
        end = max(record["tokens_per_sec"], spread[1] if spread else 0)
        axes.annotate(
            f"{record['tokens_per_sec']:,.0f}", (end, place), (5, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=colours["muted"],
        )  # fmt: skip
    axes.set_xlabel("tokens per second")
    axes.margins(x=0.08)


def speed_spread(timeline: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Find the 10th and the 90th percentile of the speeds between a run's samples; None of fewer than five."""
    pairs = itertools.pairwise(timeline)
    speeds = sorted((b[2] - a[2]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0])
    if len(speeds) < 5:
        return None
    return speeds[len(speeds) // 10], speeds[-1 - len(speeds) // 10]


def _lengths(axes: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    places = _names(axes, records)
    line = {"color": colours["text"], "linewidth": 1.1}
    axes.boxplot(
        [record["completions"]["lengths"] for record in records],
        positions=places, orientation="horizontal", widths=0.5, patch_artist=True,
        manage_ticks=False, whis=(5, 95), showfliers=False, capprops={"linewidth": 0}, whiskerprops=line,
        medianprops={"color": colours["text"], "linewidth": 2},
        boxprops={"facecolor": COLOURS[4], "edgecolor": "none"},
    )  # fmt: skip
    axes.set_xlabel("tokens in a completion")
    axes.set_xlim(left=0)


def _finish(axes: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    places = _names(axes, records)
    known = {"stop": COLOURS[0], "length": COLOURS[1], "error": COLOURS[5]}
    reasons = [r for r in known if any(r in record["completions"]["finish_reasons"] for record in records)]
    left = [0.0] * len(records)
    for reason in reasons:
        counts = [record["completions"]["finish_reasons"] for record in records]
        shares = [100 * c.get(reason, 0) / sum(c.values()) for c in counts]
        axes.barh(places, shares, 0.62, left=left, color=known[reason], label=reason)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of rows")
    _legend(axes, 3)


def _over_time(axes: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    for number, record in enumerate(records):
        seconds = [point[0] for point in record["timeline"]]
        axes.plot(
            seconds, [point[1] / MB for point in record["timeline"]], label=record["label"],
            color=COLOURS[number % len(COLOURS)], linestyle=DASHES[number % len(DASHES)], dash_capstyle="butt",
            linewidth=max(1.5, 4.5 - 2 * (number // len(DASHES))),  # so that what lies below shows at both sides too
        )  # fmt: skip
    axes.set_xlabel("seconds since loading began")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    _legend(axes, 3, handle=4.0)


PLOTS = (
    Plot(
        "tradeoff",
        "The trade-off",
        "Up is faster, left is smaller, and the colour is how near the answers are to the baseline's. The line "
        "joins the jobs that no other job beats in both memory and speed.",
        draw_tradeoff,
        lambda r: bool(r["tokens_per_sec"] and r["memory"]["peak_bytes"]),
        rows=False,
    ),
    Plot(
        "over_time",
        "Memory over time",
        "Memory in use while the job ran, from its start to its end. Where lines lie on each other, each leaves gaps "
        "in which the others show.",
        _over_time,
        lambda r: len(r["timeline"]) > 1,
        rows=False,
    ),
    Plot(
        "memory",
        "Memory by part",
        "What the peak of the run is made of. The rest is activations and logits, and on a CPU Python and its "
        "libraries too.",
        _memory,
        lambda r: bool(r["memory"]["parts"]),
    ),
    Plot(
        "speed",
        "Speed",
        "Completion tokens per second over the whole run. The line spans the slowest and the fastest tenth of "
        "its moments.",
        _speed,
        lambda r: bool(r["tokens_per_sec"]),
    ),
    Plot(
        "lengths",
        "Completion lengths",
        "Half of a job's completions lie in the box, its middle line is the median, and nine tenths lie "
        "between the ends.",
        _lengths,
        lambda r: bool(r["completions"]["lengths"]),
    ),
    Plot(
        "finish",
        "How completions ended",
        "stop: the model ended by itself. length: it was cut at its limit. error: the row failed.",
        _finish,
        lambda r: bool(r["completions"]["finish_reasons"]),
    ),
)
