"""On a real Slurm: two virtual nodes on this machine, with accounting and preemption (tests/slurm/)."""

import json
import os
from pathlib import Path

from slurm_cluster import ROOT, SMALL, Place, until, write_prompts

from pipeline.job.holder import Holder
from pipeline.job.paths import JobPaths

TINY = ("model.name=models/tiny", "engine.max_rows=1", "generation.ignore_eos=true")


def texts(folder: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    assert all(row["error"] is None for row in rows)
    return [(row["index"], row["completion"]) for row in rows]


def written(folder: Path) -> int:
    try:
        return (folder / "outputs.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def holder(folder: Path) -> int:
    """The process that runs this job."""
    found = Holder.read(JobPaths(folder).holder)
    assert found
    return found.pid


def test_a_sweep_with_shards_runs_on_two_nodes_and_merges_to_what_one_run_gives(
    place: Place, smollm2_dir: Path
) -> None:
    write_prompts(place.folder / "few.jsonl", 6)
    # One row in flight: below float32, the text of a row may depend on the rows beside it.
    job = (
        f"model.name={smollm2_dir}",
        "prompts=few.jsonl",
        "generation.max_new_tokens=6",
        "engine.max_rows=1",
    )
    first = place.submit(*job, "quant=fp32,nf4", "shards=2", *SMALL)
    assert place.submit(*job, "quant=fp32,nf4", "shards=2", *SMALL) == "", (
        "cells in the queue are not submitted twice"
    )
    place.wait_until_idle()
    folders = place.folders("few")
    assert [place.state(folder) for folder in folders] == ["complete"] * 4
    nodes = place.run("sacct", "-nPX", f"--jobs={first}", "--format=NodeList,State").split()
    assert sorted(nodes) == ["n1|COMPLETED", "n1|COMPLETED", "n2|COMPLETED", "n2|COMPLETED"]
    for merged in {folder.parent for folder in folders}:
        place.python("pipeline", "merge", str(merged))
        single = "quant=nf4" if "nf4" in merged.name else "quant=fp32"
        place.submit(*job, single, "outputs_dir=alone", *SMALL)
        place.wait_until_idle()
        assert texts(merged) == sorted(texts(next(place.folder.glob(f"alone/few/{merged.name}"))))
        assert [index for index, _ in texts(merged)] == list(range(6))


def test_requeued_warned_killed_and_cancelled_cells_end_whole_by_the_same_command(place: Place) -> None:
    # Long enough that no cell ends before its signal comes: a row takes a tenth of a second.
    write_prompts(place.folder / "many.jsonl", 160)
    job = (*TINY, "prompts=many.jsonl", "generation.max_new_tokens=100", "quant=fp32")
    sweep = (*job, "generation.seed=1,2,3,4", *SMALL, "submit.width=3")  # greedy: all say the same
    first = place.submit(*sweep)
    requeued, warned, killed, pending = place.folders("many")
    until(lambda: all(map(written, (requeued, warned, killed))), "rows of all three")
    place.run("scancel", f"{first}_3")
    os.kill(holder(killed), 9)
    place.run("scontrol", "requeue", f"{first}_0")
    place.run("scancel", "--full", "--signal=USR2", f"{first}_1")
    assert all(written(folder) < 160 for folder in (requeued, warned, killed)), "none had ended by itself"

    # The accounting lags behind the queue.
    until(lambda: place.state(pending) == "cancelled before it started", "the accounting to tell")
    until(lambda: "killed by signal 9" in place.state(killed), "the killed cell to be known as such")
    until(
        lambda: "FAILED|0:9" in place.run("sacct", "-nPX", f"--jobs={first}_2", "--format=State,ExitCode"),
        "Slurm too",
    )
    until(lambda: "requeued 1×" in place.state(requeued), "the requeued cell to start again")
    until(lambda: "requeued 1×" in place.state(warned), "the warned cell to start again")
    second = place.submit(*sweep)
    assert place.folders("many") == [killed, pending], "just what is missing is submitted again"
    assert second != first
    place.wait_until_idle()
    undisturbed = sorted(texts(pending))
    assert [index for index, _ in undisturbed] == list(range(160))
    for folder in (requeued, warned, killed, pending):
        assert place.state(folder).startswith("complete")
        assert sorted(texts(folder)) == undisturbed, "every row once, and the same text"
    assert place.submit(*sweep) == ""


def test_more_cells_than_an_array_may_have_become_two_arrays(place: Place) -> None:
    write_prompts(place.folder / "wide.jsonl", 6)
    job = (*TINY, "prompts=wide.jsonl", "generation.max_new_tokens=2", "quant=fp32", "shards=6", *SMALL)
    assert len(place.submit(*job).split()) == 2, "the test cluster's arrays have at most four cells"
    (watched,) = place.folder.glob("outputs/wide/*")
    place.python("pipeline", "status", str(watched), "watch=true")  # ends with status 0 when all is done
    assert [place.state(folder) for folder in place.folders("wide")] == ["complete"] * 6
    place.python("pipeline", "merge", str(watched))
    assert [index for index, _ in texts(watched)] == list(range(6))


def test_a_node_that_goes_down_and_a_preemption_cost_no_row(place: Place) -> None:
    write_prompts(place.folder / "lost.jsonl", 80)
    job = (*TINY, "prompts=lost.jsonl", "generation.max_new_tokens=64", "quant=fp32", *SMALL)
    first = place.submit(*job, "submit.partition=low")
    (folder,) = place.folders("lost")
    until(lambda: written(folder), "a row")
    node = place.run("squeue", "--noheader", "--format=%N", f"--jobs={first}").strip()
    place.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    until(lambda: "node fail 1×" in place.state(folder), "the cell to start again")
    node = place.run("squeue", "--noheader", "--format=%N", f"--jobs={first}").strip()
    place.run(
        "sbatch", "--partition=high", "--exclusive", f"--nodelist={node}", "--wrap=sleep 1", "-o/dev/null"
    )
    until(lambda: "resumed 2×" in place.state(folder), "the preempted cell to start again")
    place.wait_until_idle()
    assert place.state(folder).startswith("complete; resumed 2×")
    assert sorted(index for index, _ in texts(folder)) == list(range(80))


def test_a_cell_that_raises_is_failed_for_slurm_and_its_error_is_shown(place: Place) -> None:
    (place.folder / "bad.jsonl").write_text('{"prompt": "Hi"}\n{"question": "?"}\n')
    job = (*TINY, "prompts=bad.jsonl", "generation.max_new_tokens=4", *SMALL)
    first = place.submit(*job, "on_error=fail")
    place.wait_until_idle()
    (folder,) = place.folders("bad")
    assert place.state(folder).startswith("failed: bad.jsonl:2: no 'prompt' or 'messages'")
    until(
        lambda: (
            place.run("sacct", "-nPX", f"--jobs={first}", "--format=State,ExitCode").strip() == "FAILED|3:0"
        ),
        "Slurm's own state",
    )
    place.submit(*job)
    place.wait_until_idle()
    assert place.state(folder) == "complete, 1 failed rows"


def test_the_hydra_launcher_runs_a_sweep_to_its_end(place: Place) -> None:
    write_prompts(place.folder / "some.jsonl", 4)
    launcher = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2")
    job = (*TINY, "prompts=some.jsonl", "generation.max_new_tokens=4", "quant=fp32")
    place.python("pipeline", "-m", *launcher, *job, "shard=0/2,1/2")
    (parent,) = place.folder.glob("outputs/some/*")
    place.python("pipeline", "merge", str(parent))
    assert [index for index, _ in texts(parent)] == [0, 1, 2, 3]


def test_plain_sbatch_runs_the_shards_of_a_file_and_comes_back_after_a_warning(place: Place) -> None:
    write_prompts(place.folder / "plain.jsonl", 60)
    options = ("--parsable", "--array=0-1", "--cpus-per-task=1", "--mem=2G", "--time=10")
    job = (*TINY, "prompts=plain.jsonl", "generation.max_new_tokens=64", "quant=fp32")
    first = place.run("sbatch", *options, ROOT / "jobs" / "array.sbatch", *job).strip()
    until(lambda: list(place.folder.glob("outputs/plain/*/shard-1-of-2")), "the second shard's folder")
    (shard,) = place.folder.glob("outputs/plain/*/shard-1-of-2")
    until(lambda: written(shard), "rows of the second shard")
    place.run("scancel", "--batch", "--signal=USR1", f"{first}_1")  # as Slurm does before the time limit
    place.wait_until_idle()
    ends = [f"{first}_0|COMPLETED", f"{first}_1|COMPLETED", f"{first}_1|REQUEUED"]
    asked = ("sacct", "-nPXD", f"--jobs={first}", "--format=JobID,State")
    until(lambda: sorted(place.run(*asked).split()) == ends, "the accounting to tell")
    place.python("pipeline", "merge", str(shard.parent))
    assert [index for index, _ in texts(shard.parent)] == list(range(60))
