"""Lay out the summary table: its columns, and each record as a line of shown text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.terminal import how_many
from pipeline.common.units import megabytes
from pipeline.report.seeds import Repeated, repeated
from pipeline.report.summary import Record, best_values, cells


@dataclass(frozen=True, slots=True)
class Column:
    """Describe one column: what it is called, what it means, how its numbers are written."""

    name: str
    title: str
    help: str
    show: Callable[[Any], str] = str
    text: bool = False
    first: bool = False  # of the figures that people come for


@dataclass(slots=True)
class TableCell:
    """Hold what is shown, and in small type below it an interval or a prediction."""

    shown: str
    small: str = ""
    best: bool = False
    text: bool = False


@dataclass(slots=True)
class Line:
    """Hold one job's cells. A failed one has a reason instead of numbers."""

    label: str
    about: str  # in small type below the label: what no column of the page says
    baseline: bool
    failed: bool
    reason: str | None
    cells: list[TableCell]
    sort: dict[str, Any] = field(default_factory=dict)


def _count(x: float) -> str:
    return f"{x:,.0f}"


def _tenths(x: float) -> str:
    return f"{x:,.1f}"


def _share(x: float) -> str:
    return f"{100 * x:.1f} %"


COLUMNS = (  # in the page, those that people come for stand first, and the others apart
    Column("label", "Job", "What tells this job from the others", text=True, first=True),
    Column("model", "Model", "model=", text=True),
    Column("quant", "Quantization", "quant=", text=True),
    Column("engine", "Engine", "engine=", text=True),
    Column("state", "State", "done, stopped or failed", text=True),
    Column(
        "peak_bytes", "Peak", "Most memory held during the run: GPU memory, else the resident set", megabytes,
        first=True,
    ),
    Column(
        "tokens_per_sec", "Tokens/s",
        "Completion tokens per second of the run, without loading; of one shard, where there are several", _tenths,
        first=True,
    ),
    Column("agreement", "Agreement", "Positions with the baseline's token (or word)", _share, first=True),
    Column("reference", "Reference", "Completions that contain the reference answer", _share, first=True),
    Column(
        "kl", "KL divergence", "From the baseline, in nats per token of its completions", lambda x: f"{x:.4g}",
        first=True,
    ),
    Column(
        "in_shape", "In shape", "Completions that are whole by their JSON schema, regex, choice or grammar", _share,
        first=True,
    ),
    Column(
        "joules_per_1000_tokens", "J / 1,000 tokens",
        "Joules of the whole GPUs or CPU packages for 1,000 completion tokens, without loading", _tenths, first=True,
    ),
    Column("rows", "Rows", "Rows written, of how many", _count),
    Column("errors", "Errors", "Rows that failed", _count),
    Column("completion_tokens", "Tokens", "Tokens in all completions", _count),
    Column("fleet_tokens_per_sec", "Fleet tokens/s", "Completion tokens per second of all shards at once", _tenths),
    Column("load_sec", "Load", "Seconds to load the model", lambda x: f"{x:.1f} s"),
    Column("footprint_bytes", "Footprint", "get_memory_footprint(): weights and buffers as stored", megabytes),
    Column("exact_match", "Same text", "Completions equal to the baseline's, to the letter", _share),
    Column("divergence", "Diverges at", "Median position of the first difference", lambda x: f"{x:g}"),
    Column("top1", "Same top token", "How often the most probable token is the baseline's", _share),
    Column("perplexity", "Perplexity", "Of the baseline's completions", lambda x: f"{x:.3f}"),
)  # fmt: skip
NAMED = ("model", "quant", "engine")  # which a label may say already
ALWAYS = {"label", "state", "rows", "errors", "completion_tokens", "tokens_per_sec", "load_sec", "peak_bytes"}
PREDICTED = {"footprint_bytes": "predicted_footprint_bytes", "peak_bytes": "predicted_peak_bytes"}


def columns(records: Sequence[Record]) -> list[Column]:
    """Choose the columns that say something of these jobs; model and quantization where no label does."""
    table = [{**cells(record), **record} for record in records]

    def wanted(column: Column) -> bool:
        if column.name == "engine" and all(record["engine"] == "default" for record in records):
            return False
        if column.name in NAMED:
            return any(record[column.name] not in record["label"].split(" · ") for record in records)
        return column.name in ALWAYS or any(line.get(column.name) is not None for line in table)

    return [column for column in COLUMNS if wanted(column)]


def lines(records: Sequence[Record], shown: Sequence[Column] | None = None) -> list[Line]:
    """Make the records' lines, in their order; a job without any row is a line with its reason.

    Below them stands a line for all jobs that differ in their seed alone.

    Args:
        shown: the columns, with the label's as the first; None is all that say something.
    """
    best = best_values(records)
    shown = columns(records) if shown is None else shown
    return [_line(record, shown, best) for record in records] + [
        _line_of_seeds(group, shown) for group in repeated(records)
    ]


def _line_of_seeds(group: Repeated, shown: Sequence[Column]) -> Line:
    """Lay out mean and standard deviation of the jobs that differ in their seed alone."""
    made = []
    for column in shown[1:]:
        mean, deviation = group.figures.get(column.name, (None, 0.0))
        text = str(group.records[0][column.name]) if column.text else "–"
        made.append(
            TableCell(text, text=column.text)
            if mean is None
            else TableCell(column.show(mean), f"± {column.show(deviation)}")
        )
    sort = {name: mean for name, (mean, _) in group.figures.items()} | {"label": group.label}
    return Line(group.label, "mean ± standard deviation", False, False, None, made, sort)


def _line(record: Record, shown: Sequence[Column], best: dict[str, float]) -> Line:
    values = {**cells(record), **{c.name: record[c.name] for c in shown if c.text}}
    failed = record["state"] == "failed"
    made = [_cell(column, values, record, best) for column in shown[1:] if column.text or not failed]
    reason = record["reason"] if failed else None
    baseline = record["baseline"] == record["label"]
    return Line(record["label"], _about(record), baseline, failed, reason, made, values)


def _about(record: Record) -> str:
    """Say in a few words of a job what its label leaves out: model, quantization, state, rows."""
    rows, named = record["rows"], record["label"].split(" · ")
    words = [record[name] for name in NAMED if record[name] not in (*named, "default")]
    if record["state"] != "done":
        words.append(record["state"])
    if record["state"] != "failed":
        total = how_many(rows["total"], "row")
        words.append(total if rows["done"] == rows["total"] else f"{rows['done']:,} of {total}")
    if rows["errors"]:
        words.append(how_many(rows["errors"], "error"))
    return " · ".join(words)


def _cell(column: Column, values: dict[str, Any], record: Record, best: dict[str, float]) -> TableCell:
    value = values[column.name]
    if column.text:
        return TableCell(str(value), text=True)
    if value is None:
        return TableCell("–")
    is_best = value == best.get(column.name) and record["state"] != "stopped"
    cell = TableCell(column.show(value), best=is_best)
    if column.name == "rows" and record["rows"]["total"] != value:
        cell.shown += f" of {record['rows']['total']:,}"
    predicted = values.get(PREDICTED.get(column.name, ""))
    interval = _interval(column.name, record)
    if predicted is not None:
        cell.small = f"predicted {column.show(predicted)}"
    elif interval and None not in (interval["low"], interval["high"]):
        low, high = column.show(interval["low"]), column.show(interval["high"])
        cell.small = f"{low.removesuffix(' %')}–{high}"
    return cell


def _interval(name: str, record: Record) -> dict[str, Any] | None:
    sources = {
        "exact_match": "quality",
        "agreement": "quality",
        "kl": "scores",
        "top1": "scores",
        "perplexity": "scores",
    }
    found: dict[str, Any] | None = (record[sources[name]] or {}).get(name) if name in sources else None
    if name == "reference" and record["reference"]:
        found = record["reference"]["contains"]
    if name == "in_shape":
        found = record["in_shape"]
    return found


def notes(records: Sequence[Record]) -> str:
    """Say what the quality columns mean here."""
    parts = []
    units = {record["quality"]["unit"] for record in records if record["quality"]}
    if units:
        parts.append(f"Agreement and divergence count {' or '.join(sorted(units))}.")
    bases = sorted({record["baseline"] for record in records if record["baseline"]})
    if bases:
        parts.append(f"Baseline: {', '.join(bases)}.")
    of = sorted({record["memory"]["peak_of"] for record in records if record["memory"]["peak_bytes"]})
    if of:
        parts.append(f"Peak: {' or '.join(of)}.")
    counters = sorted({record["energy"]["source"] for record in records if record["energy"]["source"]})
    if counters:
        parts.append(f"Energy: by {' or '.join(counters)}.")
    if not any(record["scores"] for record in records):
        parts.append(
            "KL divergence and perplexity: run python -m pipeline score FOLDER baseline=FOLDER first."
        )
    return " ".join(parts)
