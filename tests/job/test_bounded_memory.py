"""A prompt file of any length takes bounded memory."""

import json

import pytest
from job_helper import arguments, command

from pipeline.config.compose import job_folder
from pipeline.job.ledger import Ledger

GROWTH_BYTES_PER_ROW = 1500  # the allocator's noise over 18,000 rows; a row that is held takes 3,000 and more


def peak_bytes(tiny_folder, tmp_path, count):
    prompts = tmp_path / f"rows-{count}.jsonl"
    with prompts.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"id": f"row {i}", "prompt": f"Say {i}", "note": "x" * 2000}) + "\n")
    job = arguments(tiny_folder, prompts, tmp_path / "outputs", "generation.max_new_tokens=1")
    done = command(job)
    assert done.returncode == 0, done.stderr
    stats = json.loads((job_folder(job) / "stats.json").read_text())
    assert stats["rows"]["done"] == count
    return stats["memory"]["run_peak"]["host_bytes"]


def test_a_job_of_twenty_thousand_rows_takes_hardly_more_memory_than_one_of_five(tiny_folder, tmp_path):
    """Both are longer than the engine's window, so that what it holds is the same."""
    small = peak_bytes(tiny_folder, tmp_path, 5_000)
    large = peak_bytes(tiny_folder, tmp_path, 20_000)
    assert large - small < 15_000 * GROWTH_BYTES_PER_ROW


def test_the_ledger_takes_less_than_sixty_bytes_a_row(tmp_path):
    import tracemalloc

    tracemalloc.start()
    ledger = Ledger()
    for i in range(100_000):
        ledger.add(f"{i:016x}", i, 1)
    assert ledger.find(f"{99_999:016x}") == 99_999
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 60 * 100_000


@pytest.mark.parametrize("missing", ["0123456789abcdef", "ffffffffffffffff", "0000000000000000"])
def test_the_ledger_finds_only_what_was_added(missing):
    ledger = Ledger()
    assert ledger.find(missing) is None
    ledger = Ledger()
    ledger.add("8000000000000000", 0, 1)
    assert ledger.find(missing) is None
    assert not ledger.mark(0, 1, failed=False)
    assert ledger.missing_samples(0, missing) is None
    assert ledger.missing_samples(1, "8000000000000000") is None
