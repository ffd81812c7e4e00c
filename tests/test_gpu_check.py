"""The script that measures a GPU the day one is at hand runs here, every stage that needs none."""

import json
import subprocess
import sys

from conftest import ROOT


def test_it_is_rehearsed_on_a_cpu(smollm2_dir, tmp_path):
    command = [
        sys.executable,
        "benchmarks/gpu_check.py",
        "--tiny",
        "--out",
        tmp_path,
        "--tokenizer",
        smollm2_dir,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(found["exact"]) == 9
    assert {entry["same"] for entry in found["exact"].values()} == {"3/3"}
    assert {entry["float32"]["path"] for entry in found["exact"].values()} == {"pages"}
    assert found["sampled"]["same"] == "24/24"
    assert found["speed"].keys() >= {"pages 8", "rectangles 4", "generate 8", "generate_batch 8"}
    for job in found["jobs"].values():
        assert job["error_percent"]["footprint"] == job["error_percent"]["kv_cache"] == 0


def test_small_jobs_of_every_kind_are_rehearsed_on_a_cpu(smollm2_dir, tmp_path):
    command = [
        sys.executable, "benchmarks/gpu_features.py", "--device", "cpu", "--out", tmp_path, "--workers", "2",
        "--tokenizer", smollm2_dir, "--cases", "labels",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_features.json").read_text())
    assert found["labels"]["same"] == "12/12"
