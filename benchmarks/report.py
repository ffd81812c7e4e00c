"""The benchmark's results as JSON, as a markdown table and as a plot."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from measure import Run, agreement

GIB = 2**30
HEAD = (
    "| | tokens/s | best | total s | best | load s | peak GiB | tokens | same text | runs | version |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def summarize(runs: list[Run], reference: dict[str, str] | None) -> dict[str, Any]:
    """Medians of a contender's runs, and its best; plain values for results.json."""
    rates, totals = [run.tokens_per_sec for run in runs], [run.total_sec for run in runs]
    return {
        "tokens_per_sec": median(rates),
        "best_tokens_per_sec": max(rates),
        "total_sec": median(totals),
        "best_total_sec": min(totals),
        "load_sec": median(run.load_sec for run in runs),
        "generate_sec": median(run.generate_sec for run in runs),
        "peak_rss_bytes": median(run.peak_rss_bytes for run in runs),
        "completion_tokens": median(run.completion_tokens for run in runs),
        "same_text": median(agreement(run.texts, reference) for run in runs) if reference else None,
        "version": runs[0].version,
        "runs": [{key: value for key, value in asdict(run).items() if key != "texts"} for run in runs],
    }


def write(folder: Path, results: dict[str, Any]) -> None:
    """results.json and table.md; written after each round, so that a stopped benchmark keeps its rounds."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    parts = [f"{results['machine']}; {results['dtype']}; model {results['model']}.\n"]
    for name, workload in results["workloads"].items():
        parts.append(f"\n## {name}\n\n{workload['description']}\n\n{HEAD}")
        done = workload["contenders"]
        for peer in sorted(done, key=lambda peer: -done[peer]["tokens_per_sec"]):
            parts.append(_line(peer, done[peer]))
        for peer, why in workload["left_out"].items():
            parts.append(f"| {peer} | {why} |||||||||\n")
    return "".join(parts) + NOTES


NOTES = """
tokens/s: tokens of all completions over the time from loaded to the last row; medians of the runs, and the
best. total: from the command to the last line of output. peak: resident set of the largest process. same
text: share of rows equal to float32 `generate`, one row at a time. The end-of-sequence token is not counted.
"""


def _line(name: str, s: dict[str, Any]) -> str:
    same = "" if s["same_text"] is None else f"{s['same_text']:.0%}"
    return (
        f"| {name} | {s['tokens_per_sec']:.0f} | {s['best_tokens_per_sec']:.0f} | {s['total_sec']:.1f} "
        f"| {s['best_total_sec']:.1f} | {s['load_sec']:.1f} | {s['peak_rss_bytes'] / GIB:.2f} "
        f"| {s['completion_tokens']:,.0f} | {same} | {len(s['runs'])} | {s['version']} |\n"
    )


def plot(folder: Path, results: dict[str, Any]) -> None:
    """plot.png: tokens per second, and total time split in loading, generation and the rest."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", flush=True)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    workloads = {k: v for k, v in results["workloads"].items() if v["contenders"]}
    if not workloads:
        return
    height = sum(1.2 + 0.32 * len(v["contenders"]) for v in workloads.values())
    figure, axes = plt.subplots(len(workloads), 2, figsize=(11, height), squeeze=False, layout="constrained")
    for (name, workload), (left, right) in zip(workloads.items(), axes, strict=True):
        done = workload["contenders"]
        peers = sorted(done, key=lambda peer: done[peer]["tokens_per_sec"])
        colors = ["tab:orange" if peer.startswith("ours") else "tab:blue" for peer in peers]
        bars = left.barh(peers, [done[peer]["tokens_per_sec"] for peer in peers], color=colors)
        left.bar_label(bars, fmt="%.0f", padding=3)
        left.set(title=f"{name}: tokens per second", xlabel="higher is better")
        left.margins(x=0.12)
        start = [0.0] * len(peers)
        for label, color in (("load", "tab:gray"), ("generate", "tab:blue"), ("rest", "lightgray")):
            widths = [_part(done[peer], label) for peer in peers]
            bars = right.barh(peers, widths, left=start, color=color, label=label)
            start = [a + b for a, b in zip(start, widths, strict=True)]
        right.bar_label(bars, [f"{total:.0f}" for total in start], padding=3)
        right.set(title=f"{name}: command to last line, seconds", xlabel="lower is better")
        right.margins(x=0.12)
    figure.legend(
        *axes[0][1].get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize="small"
    )
    figure.savefig(folder / "plot.png", dpi=130)
    plt.close(figure)


def _part(s: dict[str, Any], label: str) -> float:
    known = {"load": s["load_sec"], "generate": s["generate_sec"]}
    return known[label] if label in known else max(s["total_sec"] - sum(known.values()), 0.0)
