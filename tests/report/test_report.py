"""The report: what it reads from job folders, computes, and writes. Its page in a browser has its own tests."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from synthetic_jobs import (
    HOSTILE,
    QUANTS,
    answer_row,
    hostile_rows,
    job_stats,
    many_rows,
    scores,
    write_failed,
    write_job,
    write_jobs,
)

from pipeline.commands.report import parse
from pipeline.common.errors import ConfigError, OutputError
from pipeline.common.intervals import mean_over_rows, proportion, share_over_rows
from pipeline.report.jobs import find_jobs
from pipeline.report.plots import NARROW_INCHES, PLOTS, WIDE_INCHES, draw, speed_spread
from pipeline.report.prompts import Answer, align
from pipeline.report.quality import baselines, compare, reference_marks
from pipeline.report.summary import summarize
from pipeline.report.table import columns, lines
from pipeline.report.tradeoff import pareto_front
from pipeline.report.write import write_report


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three jobs of 30 rows and one that failed, with the report of them."""
    folder = write_jobs(tmp_path_factory.mktemp("outputs"), jobs=3, rows=30)
    write_failed(folder)
    return folder, write_report([folder]).parent


def records_of(folder, baseline=None):
    jobs = find_jobs([folder])
    return summarize(jobs, align(jobs), baseline)


def answer(text, ids=None, error=None):
    return Answer(text, error, "stop", 1, len(text.split()), ids, None)


# ---- intervals


def test_a_proportions_interval_is_wilsons():
    found = proportion(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize("hits", [0, 10])
def test_an_interval_of_a_rate_stays_between_0_and_1(hits):
    found = proportion(hits, 10)
    assert 0 <= found.low < found.high <= 1
    assert found.low <= found.value <= found.high


def test_a_mean_weighs_tokens_and_its_interval_counts_rows():
    found = mean_over_rows([(2.0, 2), (6.0, 2), (4.0, 4)])
    # mean 12/8; squares (2-3)² + (6-3)² + (4-6)² = 14; half = 1.96 · sqrt(3/2 · 14) / 8
    assert found.value == 1.5
    assert found.high - found.value == pytest.approx(1.959964 * 21**0.5 / 8)


def test_a_shares_interval_ends_at_0_and_1():
    rows = [(9.0, 10), (10.0, 10), (10.0, 10)]
    assert mean_over_rows(rows).high > 1
    assert share_over_rows(rows).high == 1
    assert share_over_rows(rows).low == mean_over_rows(rows).low
    assert share_over_rows([(1.0, 1)]).low is None


def test_one_row_has_no_interval_and_none_has_no_mean():
    assert mean_over_rows([(3.0, 2)]).low is None
    assert mean_over_rows([]) is None
    assert proportion(0, 0) is None


# ---- quality


def test_token_ids_are_compared_where_both_jobs_wrote_them():
    found = compare(answer("x", [1, 2, 3, 4]), answer("y", [1, 2, 9, 4, 5]))
    assert (found.unit, found.exact, found.divergence, found.same, found.length) == ("tokens", False, 2, 3, 5)


def test_words_are_compared_where_token_ids_lack():
    found = compare(answer("a b c", [1]), answer("a b d"))
    assert (found.unit, found.divergence, found.agreement) == ("words", 2, pytest.approx(2 / 3))


def test_a_text_that_goes_on_longer_diverges_where_the_other_ends():
    assert compare(answer("a b"), answer("a b c")).divergence == 2


def test_equal_texts_agree_and_do_not_diverge():
    found = compare(answer(""), answer(""))
    assert (found.exact, found.divergence, found.agreement) == (True, None, 1.0)


def test_an_error_is_not_compared():
    assert compare(answer("", error="failed"), answer("a")) is None


@pytest.mark.parametrize(
    ("completion", "reference", "exact", "contains", "numeric"),
    [
        ("Paris.", "paris", True, True, None),
        ("It is Paris, of course", "Paris", False, True, None),
        ("It is 14", 4, False, False, False),
        ("7 + 5 = 12.", 12, False, True, True),
        ("about 1,200 kg", "1200", False, False, True),
        ("파리는 수도입니다", "파리", False, True, None),
        ("seven", ["7", "seven"], True, True, False),
        ("So it is 1,018.", "5 + 1013 = 1018\n#### 1,018", False, True, True),
        ("−3", -3, False, False, True),
        ("", "x", False, False, None),
    ],
)
def test_reference_answers_are_matched(completion, reference, exact, contains, numeric):
    assert reference_marks(completion, reference) == {
        "exact": exact,
        "contains": contains,
        "numeric": numeric,
    }


def test_the_most_precise_job_of_the_same_model_is_the_baseline(tmp_path):
    for model, quant in (
        ("a", "nf4"),
        ("a", "bf16"),
        ("a", "int8"),
        ("b", "fp32"),
        ("b", "nf4"),
        ("c", "nf4"),
    ):
        write_job(tmp_path, quant, [answer_row(0, "x")], model=model)
    jobs = find_jobs([tmp_path])
    found = {(job.model, job.quant): number for job, number in zip(jobs, baselines(jobs), strict=True)}
    assert {k: v if v is None else jobs[v].quant for k, v in found.items()} == {
        ("a", "nf4"): "bf16",
        ("a", "bf16"): "bf16",
        ("a", "int8"): "bf16",
        ("b", "fp32"): "fp32",
        ("b", "nf4"): "fp32",
        ("c", "nf4"): None,
    }


def test_a_chosen_baseline_is_taken_for_all(tmp_path):
    chosen = write_job(tmp_path, "nf4", [answer_row(0, "a b")])
    write_job(tmp_path, "fp32", [answer_row(0, "a c")], model="other")
    jobs = find_jobs([tmp_path])
    assert [jobs[i].quant for i in baselines(jobs, chosen)] == ["nf4", "nf4"]
    with pytest.raises(OutputError, match="not among the jobs"):
        baselines(jobs, tmp_path)


def test_rows_are_the_same_only_with_the_same_id_and_text(tmp_path):
    write_job(tmp_path, "fp32", [answer_row(0, "x", prompt="old"), answer_row(1, "y")])
    write_job(tmp_path, "nf4", [answer_row(0, "x", prompt="new"), answer_row(1, "y")])
    record = next(r for r in records_of(tmp_path) if r["quant"] == "nf4")
    assert record["quality"]["rows"] == 1


def test_quality_counts_what_a_plain_loop_counts(sweep):
    folder, _ = sweep
    record = next(r for r in records_of(folder) if r["label"] == "tiny · int8")
    pairs = [
        (a["completion"], b["completion"])
        for a, b in zip(many_rows(30, "int8"), many_rows(30, "fp32"), strict=True)
        if not a["error"]
    ]
    assert record["quality"]["rows"] == len(pairs) == 29
    assert record["quality"]["exact_match"]["value"] == sum(a == b for a, b in pairs) / 29


# ---- folders


def test_jobs_are_found_below_a_folder_and_a_report_is_none(sweep):
    folder, report = sweep
    assert report == folder / "invented" / "report"
    assert [job.label for job in find_jobs([folder, folder / "invented"])] == [
        "broken · int8",
        "tiny · fp32",
        "tiny · bf16",
        "tiny · int8",
    ]


def test_shards_are_one_job(tmp_path):
    whole = write_job(tmp_path, "nf4", [])
    for shard in range(2):
        part = write_job(tmp_path / "parts", "nf4", [answer_row(shard, "x")], prompt_set=f"{shard}")
        part.rename(whole / f"shard-{shard}-of-2")
    (whole / "outputs.jsonl").unlink()
    (record,) = records_of(tmp_path / "invented")
    assert record["rows"]["done"] == 2
    one = job_stats("nf4", 1)["tokens_per_sec"]
    assert (record["tokens_per_sec"], record["fleet_tokens_per_sec"]) == (pytest.approx(one), 2 * one)
    assert record["load_sec"] == job_stats("nf4", 1)["load_sec"]


def test_merged_shards_are_read_from_the_merged_file_with_a_shards_config(tmp_path):
    whole = write_job(tmp_path, "nf4", [answer_row(i, "x") for i in range(2)])
    part = write_job(tmp_path / "parts", "nf4", [answer_row(0, "x")], prompt_set="0")
    part.rename(whole / "shard-0-of-2")
    (whole / ".hydra").rename(tmp_path / "gone")
    (record,) = records_of(tmp_path / "invented")
    assert (record["rows"]["done"], record["quant"]) == (2, "nf4")
    assert record["setup"]["config"]["quant"]["method"] == "nf4"


@pytest.mark.parametrize("make", [False, True], ids=["no folder", "no job"])
def test_a_folder_without_jobs_is_an_error_that_says_what_to_do(tmp_path, make):
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    with pytest.raises(OutputError, match=r"nothing: (no such folder|holds no job).*[Pp]ass"):
        find_jobs([folder])


def test_a_failed_job_is_a_result_with_its_reason(sweep):
    folder, report = sweep
    record = records_of(folder)[0]
    assert (record["state"], record["reason"]) == (
        "failed",
        "ORG/broken: <b>not found</b>. Download it first.",
    )
    assert "ORG/broken: &lt;b&gt;not found" in (report / "report.html").read_text()
    assert r"ORG/broken: \<b\>not found" in (report / "report.md").read_text()


def test_an_unfinished_job_is_stopped_and_its_rows_count(tmp_path):
    job = write_job(tmp_path, "nf4", [answer_row(0, "x")])
    (job / "stats.json").write_text("{torn")
    (record,) = records_of(tmp_path)
    assert (record["state"], record["rows"]["done"], record["tokens_per_sec"]) == ("stopped", 1, None)
    assert write_report([job], out=tmp_path / "report").is_file()


# ---- the table and the plots


def test_the_best_values_are_marked_and_missing_ones_are_dashes(sweep):
    folder, _ = sweep
    records = records_of(folder)
    names = [column.name for column in columns(records)]
    table = lines(records)
    speed = names.index("tokens_per_sec") - 1
    assert [line.cells[speed].best for line in table[1:]] == [False, False, True]
    baseline = table[1]
    assert baseline.baseline
    assert baseline.cells[names.index("exact_match") - 1].shown == "–"


def test_what_a_label_leaves_out_stands_below_it(sweep, tmp_path):
    folder, _ = sweep
    assert [line.about for line in lines(records_of(folder))] == [
        "failed", "30 rows · 1 error", "30 rows · 1 error", "30 rows · 1 error"
    ]  # fmt: skip
    for quant in ("fp32", "nf4"):
        job = write_job(tmp_path, quant, [answer_row(0, "x")])
    (job / "stats.json").unlink()
    assert [line.about for line in lines(records_of(tmp_path))] == ["tiny · 1 row", "tiny · stopped · 1 row"]


def test_predictions_stand_beside_what_was_measured(sweep):
    folder, _ = sweep
    records = records_of(folder)
    cell = lines(records)[1].cells[[c.name for c in columns(records)].index("peak_bytes") - 1]
    assert (cell.shown, cell.small) == ("1,140.0 MB", "predicted 1,110.0 MB")


def test_the_pareto_front_is_what_nobody_beats():
    points = [(4.0, 1.0), (1.0, 2.0), (2.0, 5.0), (3.0, 4.0), (1.0, 3.0), (5.0, 6.0)]
    assert pareto_front(points) == [4, 2, 5]


def test_the_spread_of_a_speed_comes_from_its_moments():
    assert speed_spread([[t, 0, t * t] for t in range(12)]) == (3.0, 19.0)
    assert speed_spread([[0, 0, 0], [1, 0, 5]]) is None


def test_every_plot_is_written_light_and_dark(sweep):
    _, report = sweep
    names = {path.name for path in (report / "plots").iterdir()}
    assert names == {p.name + ending for p in PLOTS for ending in (".png", ".svg", "-dark.svg")}


def test_a_plot_without_figures_is_left_out_and_named(tmp_path):
    job = write_job(tmp_path, "nf4", [answer_row(0, "x")], timeline=[])
    page = write_report([job])
    assert "Memory over time: no job has the figures for it." in page.read_text()
    assert not (page.parent / "plots" / "over_time.png").exists()


@pytest.mark.parametrize("inches", [WIDE_INCHES, NARROW_INCHES])
def test_jobs_whose_memory_is_the_same_are_all_seen_over_time(tmp_path, inches):
    for quant in QUANTS[:6]:
        write_job(tmp_path, quant, [answer_row(0, "x")], timeline=[[t, 4e8 + 1e7 * t, t] for t in range(40)])
    plot = next(plot for plot in PLOTS if plot.name == "over_time")
    figure = draw(plot, records_of(tmp_path), "light", inches)
    axes = figure.axes[0]
    axes.get_legend().remove()
    figure.canvas.draw()
    pixels = np.unique(np.asarray(figure.canvas.buffer_rgba())[:, :, :3].reshape(-1, 3), axis=0).astype(int)
    for line in axes.get_lines():
        colour = 255 * np.array(matplotlib.colors.to_rgb(line.get_color()))
        assert np.abs(pixels - colour).max(axis=1).min() < 30  # an edge is mixed with what it borders on


# ---- the files


def test_report_json_holds_every_figure_and_the_command(sweep):
    _, report = sweep
    jobs = json.loads((report / "report.json").read_text())["jobs"]
    assert len(jobs) == 4
    assert jobs[1]["setup"]["command"][:3] == ["python", "-m", "pipeline"]
    assert jobs[2]["scores"]["kl"]["value"] == scores(0.01)["kl"]["value"]


def test_report_md_has_one_table_line_for_each_job(sweep):
    _, report = sweep
    table = [line for line in (report / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


@pytest.mark.usefixtures("no_plots")
def test_the_page_says_what_the_model_suggests_and_the_job_left_out(tmp_path):
    job = write_job(tmp_path, "fp32", hostile_rows("fp32"))
    noted = json.loads((job / "manifest.json").read_text())
    suggested = {"applied": {}, "not_applied": {"repetition_penalty": 1.1, "top_p": 0.8}}
    (job / "manifest.json").write_text(json.dumps({**noted, "suggested_generation": suggested}))
    page = write_report([tmp_path]).read_text()
    assert "suggested generation, not applied" in page
    assert "repetition_penalty=1.1, top_p=0.8" in page
    assert "suggested generation, applied" not in page


def test_nothing_that_a_model_wrote_is_markup_in_the_page(tmp_path):
    write_job(tmp_path, "fp32", hostile_rows("fp32"), prompt_set="<script>set")
    write_job(tmp_path, "nf4", hostile_rows("nf4"), prompt_set="<script>set")
    page = write_report([tmp_path]).read_text()
    assert not any(text in page for text in HOSTILE.values())
    assert "<script>set" not in page
    assert "window.hacked" not in page


def test_the_page_allows_its_own_script_and_style_and_nothing_else(sweep):
    _, report = sweep
    page = (report / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert not re.search(r'(src|href)="(https?:|//)', page)


# ---- the command line


def test_the_command_line_is_taken_apart(tmp_path):
    assert parse(["a", "out=b", "baseline=c"]) == ([Path("a")], {"out": Path("b"), "baseline": Path("c")})
    for wrong in (["basline=x", "a"], ["out=b"]):
        with pytest.raises(ConfigError):
            parse(wrong)


def test_the_command_writes_a_report_and_loads_no_torch(sweep, tmp_path):
    folder, _ = sweep
    code = (
        "import sys; from pipeline.commands.door import main; status = main(); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(folder), f"out={tmp_path / 'own'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "own").iterdir()} == {
        "report.html",
        "report.md",
        "report.json",
        "plots",
    }


@pytest.mark.usefixtures("no_plots")
def test_the_share_of_answers_in_shape_is_a_column_where_a_job_had_constraints(tmp_path):
    rows = [{**answer_row(i, '{"a": 1}'), "complete": i > 0} for i in range(4)]
    rows.append(answer_row(4, "free"))
    held = write_job(tmp_path, "nf4", rows)
    write_job(tmp_path, "fp32", [answer_row(i, "free") for i in range(5)])
    records = records_of(tmp_path)
    assert {r["quant"]: r["in_shape"] and r["in_shape"]["value"] for r in records} == {
        "nf4": 0.75,
        "fp32": None,
    }
    assert "In shape" in [column.title for column in columns(records)]
    assert "75.0 %" in write_report([held]).with_suffix(".md").read_text(encoding="utf-8")
    assert "In shape" not in [c.title for c in columns([r for r in records if r["quant"] == "fp32"])]


def seeds(folder, quant="fp32", found=(8, 6, 7)):
    """Jobs that differ in their seed alone, and how many of ten references each finds."""
    for seed, right in enumerate(found, 1):
        rows = [answer_row(i, f"it is {i if i < right else 'no'}", reference=f"is {i}") for i in range(10)]
        write_job(folder, quant, rows, seed=seed, tokens_per_sec=100.0 + 10 * seed)


def test_jobs_that_differ_in_their_seed_alone_have_a_line_with_mean_and_standard_deviation(tmp_path):
    seeds(tmp_path)
    seeds(tmp_path, "nf4", found=(5,))
    out = write_report([tmp_path]).parent
    (group,) = json.loads((out / "report.json").read_text())["seeds"]
    assert group["label"] == "fp32 · 3 seeds"
    assert group["jobs"] == ["fp32 · seed 1", "fp32 · seed 2", "fp32 · seed 3"]
    assert group["figures"]["reference"] == {"mean": pytest.approx(0.7), "deviation": pytest.approx(0.1)}
    assert group["figures"]["tokens_per_sec"] == {"mean": 120.0, "deviation": 10.0}
    (line,) = [line for line in (out / "report.md").read_text("utf-8").splitlines() if "3 seeds" in line]
    assert "| 70.0 % (± 10.0 %) |" in line
    assert "| 120.0 (± 10.0) |" in line
    assert "<small>± 10.0 %</small>" in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize("other", ["another machine", "in two sessions"])
def test_speeds_of_other_machines_or_of_part_of_the_rows_have_no_mean_over_seeds(tmp_path, no_plots, other):
    seeds(tmp_path, found=(8, 6))
    (last,) = tmp_path.rglob("tiny-fp32-greedy-000007d4")
    name, part, change = (
        ("manifest.json", "device", {"threads": 64})
        if other == "another machine"
        else ("stats.json", "rows", {"done_before": 4})
    )
    found = json.loads((last / name).read_text())
    found[part] |= change
    (last / name).write_text(json.dumps(found))
    (group,) = json.loads((write_report([tmp_path]).parent / "report.json").read_text())["seeds"]
    assert group["figures"].keys() == {"footprint_bytes", "reference"}


def test_a_job_that_lies_in_two_folders_is_no_second_seed_and_fewer_rows_are_no_repetition(
    tmp_path, no_plots
):
    here, there = tmp_path / "here", tmp_path / "there"
    seeds(here, found=(8, 6))
    seeds(there, found=(8,))
    write_job(there, "fp32", [answer_row(0, "x")], seed=7)
    write_job(there, "nf4", [answer_row(0, "x")], seed=1)
    seeds(here, "nf4", found=(5,))
    out = write_report([here, there]).parent
    (group,) = json.loads((out / "report.json").read_text())["seeds"]
    assert len(group["jobs"]) == 2


def test_jobs_that_differ_in_more_than_their_seed_are_not_put_together(tmp_path):
    seeds(tmp_path, "fp32", found=(8,))
    seeds(tmp_path, "nf4", found=(8,))
    longer = write_job(tmp_path, "fp32", [answer_row(0, "x")], seed=2)
    config = longer / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("max_new_tokens: 64", "max_new_tokens: 65"))
    other = write_job(tmp_path, "fp32", [answer_row(0, "x")], seed=3) / ".hydra" / "config.yaml"
    other.write_text(other.read_text() + "engine: {name: vllm}\n")
    assert json.loads((write_report([tmp_path]).parent / "report.json").read_text())["seeds"] == []
