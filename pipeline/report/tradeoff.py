"""Draw the trade-off plot: memory × speed, with quality as colour and the Pareto front as a line."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from pipeline.common.units import MB
from pipeline.report.summary import Record

OFFSETS = (
    (9, 0),
    (-9, 0),
    (0, 10),
    (0, -10),
    (9, 9),
    (-9, 9),
    (9, -9),
    (-9, -9),
    (0, 22),
    (0, -22),
    (16, 20),
    (16, -20),
)


def draw_tradeoff(axes: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    """Draw a point for each record; each has a speed and a peak."""
    memory = [record["memory"]["peak_bytes"] / MB for record in records]
    speed = [float(record["tokens_per_sec"]) for record in records]
    front = pareto_front(list(zip(memory, speed, strict=True)))
    axes.plot(
        [memory[i] for i in front], [speed[i] for i in front], color=colours["muted"], linewidth=1.3,
        linestyle=(0, (4, 2)), zorder=1,
    )  # fmt: skip
    values, called = qualities(records)
    known = [v for v in values if v is not None]
    low = min(known, default=0.0)
    scale = Normalize(low if low < 1 else 0.0, 1.0)
    drawn = None
    for x, y, value in zip(memory, speed, values, strict=True):
        edge: dict[str, Any] = {"edgecolors": colours["text"], "linewidths": 1.0, "s": 90, "zorder": 3}
        if value is None:
            axes.scatter([x], [y], facecolors="none", **edge)
        else:
            drawn = axes.scatter([x], [y], c=[value], cmap="viridis", norm=scale, **edge)
    if drawn is not None and axes.figure is not None:
        bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02, aspect=28)
        bar.set_label(called, color=colours["muted"])
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelcolor=colours["muted"])
    of = records[0]["memory"]["peak_of"]
    axes.set_xlabel(f"peak memory, MB ({of})")
    axes.set_ylabel("tokens per second")
    axes.margins(0.14)
    axes.set_ylim(0, 1.14 * max(speed))
    _label(axes, list(zip(memory, speed, strict=True)), [record["label"] for record in records], colours)


def qualities(records: Sequence[Record]) -> tuple[list[float | None], str]:
    """Give each job's quality, between 0 and 1, and what it is; None is unknown, and a baseline's is 1.

    One measure for all: scored predictions where every job has them, else the texts' agreement.
    """
    scored = [(record["scores"] or {}).get("top1") for record in records]
    if all(scored):
        return [top1["value"] for top1 in scored if top1], "same top token as the baseline"
    texts = [(record["quality"] or {}).get("agreement") for record in records]
    own = [1.0 if record["baseline"] == record["label"] else None for record in records]
    values = [text["value"] if text else alone for text, alone in zip(texts, own, strict=True)]
    return values, "text agreement with the baseline"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points, by memory, that no other point beats in both memory (less) and speed (more)."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _label(
    axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], colours: dict[str, str]
) -> None:
    """Write each name beside its point, at the first place inside where it covers nothing, else at the last tried."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()
    centres = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in centres]
    for number, (point, name) in enumerate(zip(points, names, strict=True)):
        note: Annotation | None = None
        for dx, dy in OFFSETS:
            if note is not None:
                note.remove()
            note = axes.annotate(
                name, point, (dx, dy), textcoords="offset points", fontsize=9, color=colours["text"], zorder=4,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
            )  # fmt: skip
            box = note.get_window_extent()
            others = taken[:number] + taken[number + 1 :]
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in others):
                break
        taken.append(box)
