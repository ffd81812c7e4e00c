"""Shards into one file: all rows, once, in order, or nothing at all."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from job_helper import note_todo

from pipeline.common.errors import OutputError
from pipeline.job.merge import merge
from pipeline.job.shards import combine
from pipeline.prompts.count import prompts_sha256
from pipeline.report.jobs import read_job


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"id": "r{i}", "prompt": "Say {i}"}}\n' for i in range(7)))
    return path


def row(index: int, sample: int = 0) -> dict[str, Any]:
    return {
        "id": f"r{index}",
        "index": index,
        "sample": sample,
        "completion": f"c{index}.{sample}",
        "error": None,
        "key": f"{index:016x}",
    }


def write_shard(
    job: Path,
    part: int,
    parts: int,
    rows: list[dict[str, Any]],
    prompts: Path,
    *,
    samples: list[int] | None = None,
    **more: Any,
) -> Path:
    """A shard, with its rows in the order given, of those that `samples` says it has: else of these alone."""
    folder = job / f"shard-{part}-of-{parts}"
    folder.mkdir(parents=True)
    (folder / "outputs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    manifest = {"model": "m", "revision": None, "prompts": str(prompts), **more}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sha256 = more.get("prompts_sha256", prompts_sha256(str(prompts)))
    samples = samples or list(Counter(r["index"] for r in rows).values())
    note_todo(folder, samples, len(rows), prompts=prompts, sha256=sha256, limit=more.get("limit"))
    stats = {
        "rows": {"total": len(rows), "done": len(rows), "errors": 0, "done_before": 0},
        "completion_tokens": 10 * len(rows),
        "run_sec": 2.0 + part,
        "load_sec": 1.0,
        "tokens_per_sec": 10 * len(rows) / (2.0 + part),
        "memory": {"footprint_bytes": 50, "run_peak": {"host_bytes": 100 + part, "devices": []}},
    }
    (folder / "stats.json").write_text(json.dumps(stats))
    return folder


def two_shards(job: Path, prompts: Path) -> list[Path]:
    return [
        write_shard(job, 0, 2, [row(4), row(0), row(6), row(2)], prompts),
        write_shard(job, 1, 2, [row(5), row(1), row(3)], prompts),
    ]


def merged(job: Path) -> list[tuple[int, int]]:
    lines = (job / "outputs.jsonl").read_text().splitlines()
    return [(line["index"], line["sample"]) for line in map(json.loads, lines)]


def test_rows_come_in_input_order_and_merging_again_changes_nothing(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    two_shards(job, prompts)
    assert merge(job) == 7
    assert merged(job) == [(i, 0) for i in range(7)]
    before = (job / "outputs.jsonl").read_bytes()
    assert merge(job) == 7
    assert (job / "outputs.jsonl").read_bytes() == before
    assert not list(job.glob("*.new"))


def test_samples_of_a_row_stay_together_in_their_order(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    write_shard(job, 0, 2, [row(2), row(0, 1), row(0, 0)], prompts)
    write_shard(job, 1, 2, [row(1, 2), row(1, 0), row(1, 1)], prompts)
    merge(job)
    assert merged(job) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_a_gap_is_refused_with_the_ids_of_the_rows(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    write_shard(job, 0, 2, [row(0), row(6)], prompts, samples=[1] * 4)
    write_shard(job, 1, 2, [row(1), row(3), row(5)], prompts)
    with pytest.raises(
        OutputError, match=r"shard-0-of-2: 2 of 4 rows done; rows 2 \(r2\), 4 \(r4\) are missing"
    ):
        merge(job)
    assert not (job / "outputs.jsonl").exists()


def test_a_row_that_is_there_twice_is_refused_with_its_id(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    write_shard(job, 0, 2, [row(0), row(2), row(2)], prompts)
    write_shard(job, 1, 2, [row(1)], prompts)
    with pytest.raises(OutputError, match=r"rows 2 \(r2\) are there twice"):
        merge(job)


def test_a_row_of_another_shard_is_refused(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    write_shard(job, 0, 2, [row(0), row(1)], prompts)
    write_shard(job, 1, 2, [row(1)], prompts)
    with pytest.raises(OutputError, match=r"shard-0-of-2: rows 1 \(r1\) belong to another shard"):
        merge(job)


def test_a_missing_shard_is_named(tmp_path: Path, prompts: Path) -> None:
    write_shard(tmp_path / "job", 1, 3, [row(1)], prompts)
    with pytest.raises(OutputError, match="shards 0, 2 are missing"):
        merge(tmp_path / "job")


def test_a_shard_that_is_not_complete_is_refused_with_what_is_missing(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    write_shard(job, 0, 2, [row(4), row(0), row(6), row(2)], prompts)
    write_shard(job, 1, 2, [row(3), row(1)], prompts, samples=[1] * 3)
    with pytest.raises(OutputError, match=r"shard-1-of-2: 2 of 3 rows done; rows 5 \(r5\) are missing"):
        merge(job)


def test_a_missing_sample_is_refused(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    write_shard(job, 0, 2, [row(0, 0), row(0, 2)], prompts, samples=[3])
    write_shard(job, 1, 2, [row(1)], prompts)
    with pytest.raises(OutputError, match="shard-0-of-2: 2 of 3 rows done; samples of some are missing"):
        merge(job)


def test_a_prompt_file_that_changed_since_is_refused_and_one_that_is_gone_is_not(
    tmp_path: Path, prompts: Path
) -> None:
    job = tmp_path / "job"
    two_shards(job, prompts)
    with prompts.open("a") as file:
        file.write('{"id": "r7", "prompt": "Say 7"}\n')
    with pytest.raises(OutputError, match=r"p\.jsonl: has changed since the shards read it"):
        merge(job)
    prompts.unlink()
    assert merge(job) == 7


@pytest.mark.parametrize("key", ["model", "revision", "quantized_experts", "prompts_sha256", "limit"])
def test_shards_that_differ_in_what_decides_the_text_are_refused(
    tmp_path: Path, prompts: Path, key: str
) -> None:
    job = tmp_path / "job"
    write_shard(job, 0, 2, [row(0)], prompts)
    write_shard(job, 1, 2, [row(1)], prompts, **{key: 9 if key == "limit" else "other"})
    with pytest.raises(OutputError, match=f"its {key} is (other|9)") as caught:
        merge(job)
    made_anew = key in ("model", "revision", "quantized_experts")  # there is no row to do where all are done
    assert ("resume=never" in caught.value.fix) == made_anew


def test_results_of_a_run_without_shards_are_never_written_over(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    two_shards(job, prompts)
    (job / "outputs.jsonl").write_text("mine\n")
    with pytest.raises(OutputError, match="without shards"):
        merge(job)
    assert (job / "outputs.jsonl").read_text() == "mine\n"


def test_a_damaged_line_is_named(tmp_path: Path, prompts: Path) -> None:
    first, _ = two_shards(tmp_path / "job", prompts)
    lines = (first / "outputs.jsonl").read_text().splitlines(keepends=True)
    (first / "outputs.jsonl").write_text("".join([lines[0], "{\n", *lines[2:]]))
    with pytest.raises(OutputError, match=r"shard-0-of-2/outputs.jsonl:2: a damaged line"):
        merge(tmp_path / "job")


def test_stats_sum_counts_keep_the_largest_peak_and_both_times(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    two_shards(job, prompts)
    merge(job)
    stats = json.loads((job / "stats.json").read_text())
    assert stats["rows"] == {"total": 7, "done": 7, "errors": 0, "done_before": 0}
    assert (stats["completion_tokens"], stats["run_sec"], stats["run_sec_max"]) == (70, 5.0, 3.0)
    assert (stats["tokens_per_sec"], stats["fleet_tokens_per_sec"]) == (14.0, 30.0)
    assert stats["memory"]["run_peak"]["host_bytes"] == 101
    assert stats["memory"]["footprint_bytes"] == 50


def test_a_job_has_the_same_stats_before_it_is_merged_and_after(tmp_path: Path, prompts: Path) -> None:
    job = tmp_path / "job"
    two_shards(job, prompts)
    before = read_job(job).stats
    merge(job)
    after = read_job(job).stats
    assert before == after
    assert (after["tokens_per_sec"], after["fleet_tokens_per_sec"]) == (14.0, 30.0)


def test_lists_of_different_lengths_keep_the_weights_of_their_own_shards() -> None:
    def shard(tokens: int, *means: float) -> dict[str, Any]:
        return {"completion_tokens": tokens, "devices_mean": list(means)}

    assert combine([shard(30, 4.0), shard(10, 8.0, 2.0)])["devices_mean"] == [5.0, 2.0]
    assert combine([shard(0, 4.0), shard(5, 8.0, 2.0), shard(15, 8.0, 6.0)])["devices_mean"][1] == 5.0


def test_means_are_weighted_by_tokens_and_peaks_of_counts_are_maxima() -> None:
    def shard(tokens: int, mean: float, peak: int) -> dict[str, Any]:
        engine = {"mean_rows_in_flight": mean, "peak_rows_in_flight": peak, "decode_steps": 2}
        return {"completion_tokens": tokens, "run_sec": 1.0, "engine": engine}

    engine = combine([shard(30, 4.0, 8), shard(10, 8.0, 9)])["engine"]
    assert engine == {"mean_rows_in_flight": 5.0, "peak_rows_in_flight": 9, "decode_steps": 4}


def test_the_command_says_what_it_wrote_and_fails_with_status_3(tmp_path: Path, prompts: Path) -> None:
    two_shards(tmp_path / "job", prompts)
    command = [sys.executable, "-m", "pipeline", "merge", str(tmp_path / "job")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "7 lines" in done.stderr
    command[-1] = str(tmp_path)
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 3
    assert "holds no shards" in " ".join(failed.stderr.split())
    assert "Traceback" not in " ".join(failed.stderr.split())
