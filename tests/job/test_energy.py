"""Joules are read from counters, as the kernel and the driver keep them, or they are unknown."""

import json
import os
import sys
import tempfile
import time
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
from job_helper import arguments, job_folder, run_job, write_rows

from pipeline.job import energy
from pipeline.job.energy import (
    EnergyMeter,
    Reading,
    energy_stats,
    joules_between,
    merge_energy,
    read_cards,
    read_packages,
)
from pipeline.job.shards import combine
from pipeline.report.write import write_report

RANGE_UJ = 65_532_610_987  # a Zen's: it goes round every 65 kJ
CARD = "GPU-00000000-0000-0000-0000-000000000000"


def write_domain(powercap, path, name, energy_uj, range_uj=RANGE_UJ):
    """A domain as the kernel shows it: those of a package lie in the package's folder and beside it."""
    folder = powercap / path
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    move(folder, energy_uj)
    if folder.parent != powercap:
        (powercap / folder.name).symlink_to(folder)
    return folder


def move(folder, energy_uj):
    """Set a counter in one move: nobody reads half a number."""
    new = folder / "new"
    new.write_text(f"{energy_uj % RANGE_UJ}\n")
    new.rename(folder / "energy_uj")


@pytest.fixture
def package(tmp_path):
    return write_domain(tmp_path, "intel-rapl:0", "package-0", 5_000_000)


def measured(powercap, work, **options):
    with EnergyMeter([], powercap, **options) as meter:
        work()
    return meter.joules


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_packages_add_up_and_their_parts_and_the_whole_machine_do_not_count_again(tmp_path, package):
    other = write_domain(tmp_path, "intel-rapl:1", "package-1", 0)
    core = write_domain(tmp_path, "intel-rapl:0/intel-rapl:0:0", "core", 0)
    dram = write_domain(tmp_path, "intel-rapl:0/intel-rapl:0:1", "dram", 0)
    whole = write_domain(tmp_path, "intel-rapl:2", "psys", 0)
    mmio = write_domain(tmp_path, "intel-rapl-mmio:0", "package-0", 0)  # the same package by another way
    (tmp_path / "intel-rapl").mkdir()  # the control type, which counts nothing

    def work():
        move(package, 9_500_000)
        move(other, 3_000_000)
        for folder in (core, dram, whole, mmio):
            move(folder, 7_000_000)

    assert measured(tmp_path, work) == 7.5


def test_a_counter_that_starts_again_from_0_goes_on(tmp_path, package):
    move(package, RANGE_UJ - 1_000_000)
    assert measured(tmp_path, lambda: move(package, RANGE_UJ + 2_000_000)) == 3.0


def test_a_long_run_is_sampled_before_a_counter_goes_round(tmp_path, package):
    with EnergyMeter([], tmp_path, sample_sec=0.01) as meter:
        move(package, 5_000_000 + 40_000_000_000)
        wait_until(lambda: meter.joules is not None)
        move(package, 5_000_000 + 80_000_000_000)
    assert meter.joules == 80_000.0


def test_after_a_pause_in_which_a_counter_may_have_gone_round_the_joules_are_unknown():
    before, after = [Reading(0, RANGE_UJ)], [Reading(9_000_000, RANGE_UJ)]
    assert joules_between(before, after, elapsed_sec=30) == 9.0
    assert joules_between(before, after, elapsed_sec=40) is None


def test_what_was_unknown_once_stays_so(tmp_path, package, monkeypatch):
    with EnergyMeter([], tmp_path, sample_sec=0.01) as meter:
        move(package, 9_000_000)
        wait_until(lambda: meter.joules == 4.0)
        monkeypatch.setattr(energy, "MOST_WATTS", 10**12)  # so that a moment is a long pause
        wait_until(lambda: meter.joules is None)
        monkeypatch.undo()
        move(package, 10_000_000)
    assert meter.joules is None


def test_a_counter_that_was_away_for_a_while_makes_the_joules_unknown(tmp_path, package):
    with EnergyMeter([], tmp_path, sample_sec=0.01) as meter:
        move(package, 9_000_000)
        wait_until(lambda: meter.joules == 4.0)
        (package / "energy_uj").unlink()
        wait_until(lambda: meter.joules is None)
        move(package, 10_000_000)
    assert meter.joules is None


def test_a_package_that_goes_makes_the_joules_unknown(tmp_path, package):
    other = write_domain(tmp_path, "intel-rapl:1", "package-1", 0)

    def work():
        move(package, 9_000_000)
        other.rename(tmp_path / "offline")

    assert measured(tmp_path, work) is None


@pytest.mark.parametrize("damage", ["missing", "folder", "text"])
def test_one_counter_that_cannot_be_read_makes_the_joules_unknown(tmp_path, package, damage):
    counter = write_domain(tmp_path, "intel-rapl:1", "package-1", 0) / "energy_uj"
    counter.unlink()
    if damage == "folder":
        counter.mkdir()
    elif damage == "text":
        counter.write_text("<not counted>\n")
    assert measured(tmp_path, lambda: move(package, 9_000_000)) is None


def test_a_counter_that_only_root_may_read_is_unknown_to_others():
    with tempfile.TemporaryDirectory() as powercap:
        Path(powercap).chmod(0o755)
        counter = write_domain(Path(powercap), "intel-rapl:0", "package-0", 7) / "energy_uj"
        assert read_as_another(Path(powercap)) == [(7, RANGE_UJ)]
        counter.chmod(0)
        assert read_as_another(Path(powercap)) is None


def read_as_another(powercap):
    """As a user whom a file's mode binds: for root it does not."""
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        return read_packages(powercap)
    finally:
        if root:
            os.seteuid(0)


def test_no_counter_and_one_that_did_not_move_are_unknown_and_not_0(tmp_path, package):
    assert measured(tmp_path / "nothing", lambda: None) is None
    assert measured(tmp_path, lambda: None) is None


# ---- cards


class NvmlError(Exception):
    """Stands for pynvml's."""


class NotSupported(NvmlError):
    """Stands for its kind for a card that lacks something."""


def stand_in(cards):
    """pynvml with a driver: UUID to (counters one after the other, MIG mode); None is not supported."""

    def ask(place):
        def answer(uuid):
            found = cards[uuid][place]
            if found is None:
                raise NotSupported
            return next(found) if place == 0 else (found, found)

        return answer

    def handle(uuid):
        if uuid not in cards:
            raise NvmlError
        return uuid

    return SimpleNamespace(
        NVMLError=NvmlError, NVMLError_NotSupported=NotSupported, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=handle, nvmlDeviceGetMigMode=ask(1), nvmlDeviceGetTotalEnergyConsumption=ask(0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cards", "joules"),
    [
        ({"a": ([1_000, 3_500], 0), "b": ([2**40, 2**40 + 250], None), "c": ([0, 9_000], 0)}, 2.75),
        ({"a": ([1_000, 3_500], 0), "b": (None, 0)}, None),  # older than Volta
        ({"a": ([1_000, 3_500], 0), "b": ([0, 500], 1)}, None),  # split in slices
        ({"a": ([1_000, 3_500], 0)}, None),  # a slice, which has a UUID of its own
        ({"a": ([1_000, 1_000], 0), "b": ([0, 0], 0)}, None),  # shorter than the counter's tick
    ],
    ids=["two of three", "no counter", "split", "slice", "short"],
)
def test_the_joules_of_the_models_cards_add_up_or_are_unknown(monkeypatch, cards, joules):
    counters = {uuid: (found and iter(found), mig) for uuid, (found, mig) in cards.items()}
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(counters))
    with EnergyMeter(["a", "b"]) as meter:
        pass
    assert (meter.joules, meter.source) == (joules, "nvml")


def test_a_card_is_unknown_without_the_package_and_with_it_where_the_driver_does_not_know_the_card(
    monkeypatch,
):
    assert read_cards([CARD]) is None  # with the package where it is installed
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_cards([CARD]) is None


# ---- what is written


def test_joules_are_counted_for_1000_completion_tokens():
    assert energy_stats(50.0, "rapl", 400) == {
        "joules": 50.0,
        "joules_per_1000_tokens": 125.0,
        "source": "rapl",
    }
    assert energy_stats(50.0, "rapl", 0)["joules_per_1000_tokens"] is None
    assert set(energy_stats(None, "rapl", 400).values()) == {None}


@pytest.mark.parametrize(
    ("shards", "merged"),
    [
        ([(30.0, "nvml", 100), (50.0, "nvml", 300)], (80.0, 200.0, "nvml")),
        ([(30.0, "nvml", 100), (50.0, "rapl", 300)], (80.0, 200.0, "nvml + rapl")),
        ([(30.0, "nvml", 100), (None, "rapl", 300)], (None, None, None)),
    ],
    ids=["sum", "two sources", "one unknown"],
)
def test_shards_joules_add_up_or_are_unknown(shards, merged):
    stats = [
        {"completion_tokens": tokens, "energy": energy_stats(joules, source, tokens)}
        for joules, source, tokens in shards
    ]
    assert tuple(combine(stats)["energy"].values()) == merged
    assert (
        merge_energy([*stats, {"completion_tokens": 5}])["joules"] is None
    )  # written before there was energy


@pytest.fixture
def job(tiny_dir, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Tell joke {i}."} for i in range(3)])
    return arguments(tiny_dir, prompts, tmp_path / "outputs", "model.device_map=cpu")


@pytest.mark.usefixtures("no_plots")
def test_a_job_writes_shows_and_reports_its_joules(job, monkeypatch, capsys):
    readings = chain([[Reading(0, RANGE_UJ)]], repeat([Reading(12_000_000, RANGE_UJ)]))
    monkeypatch.setattr(energy, "read_packages", lambda powercap: next(readings))
    assert run_job(job) == 0
    folder = job_folder(job)
    stats = json.loads((folder / "stats.json").read_text())
    each = 12_000 / stats["completion_tokens"]
    assert stats["energy"] == {"joules": 12.0, "joules_per_1000_tokens": each, "source": "rapl"}
    assert f"12.0 J, {each:,.1f} J per 1,000 tokens (rapl)" in capsys.readouterr().err
    page = write_report([folder])
    (record,) = json.loads((page.parent / "report.json").read_text())["jobs"]
    assert record["energy"] == stats["energy"]
    for report in (page, page.parent / "report.md"):
        assert "J / 1,000 tokens" in report.read_text()
        assert f"{each:,.1f}" in report.read_text()
        assert "Energy: by rapl." in report.read_text()


@pytest.mark.usefixtures("no_plots")
def test_a_job_without_a_counter_writes_null_and_shows_nothing(job, capsys):
    assert run_job(job) == 0
    stats = json.loads((job_folder(job) / "stats.json").read_text())
    if energy.read_packages(energy.POWERCAP):
        assert stats["energy"]["joules"] > 0
        return
    assert set(stats["energy"].values()) == {None}
    assert " J" not in capsys.readouterr().err
    page = write_report([job_folder(job)])
    assert "J / 1,000 tokens" not in page.read_text()
