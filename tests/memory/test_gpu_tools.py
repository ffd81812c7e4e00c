"""The drivers' tools and the environment: which GPUs a job would get, and how much of them can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from machines import GB, H100, MI300, MIG_SLICE, T4, UNREADABLE

from pipeline.common.errors import ConfigError, LoadError
from pipeline.common.gpu import Gpu
from pipeline.config.compose import read_config
from pipeline.memory import gpu_tools
from pipeline.memory.check import check_memory
from pipeline.memory.devices import gpu_device
from pipeline.memory.gpu_tools import (
    backends,
    find_gpus,
    hides_all,
    masked,
    parse_amd_smi,
    parse_nvidia,
    parse_rocm_smi,
    parse_xpu_smi,
    visible,
)

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
A, B, C = (f"GPU-{name}-c329-dfb7-0db4-e005efb6a4c7" for name in ("1f22a253", "1f22b0b9", "5c89852c"))
LIST = f"""\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: {A})
GPU 1: Tesla T4 (UUID: {B})
GPU 2: NVIDIA GeForce RTX 3060 (UUID: {C})
"""
QUERY = f"{A}, 81559, 81079, 9.0\n{B}, 15360, 15101, 7.5\n{C}, 12288, 11909, 8.6\n"
SLICES = [f"MIG-{name}-42e4-5de3-91c7-45d71c87eb3f" for name in ("c6d4f1ef", "cba663e8", "7ab0c6cf")]
MIG_LIST = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})
  MIG 3g.20gb     Device  0: (UUID: {SLICES[0]})
  MIG 1g.5gb      Device  1: (UUID: {SLICES[1]})
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})
  MIG 1c.3g.20gb  Device  0: (UUID: {SLICES[2]})
GPU 2: Tesla T4 (UUID: {C})
"""
MIG_QUERY = f"{A}, [N/A], [N/A], 8.0\n{B}, 40960, [Insufficient Permissions], 8.0\n{C}, 15360, 15101, 7.5\n"


def cards() -> list[list[Gpu]]:
    return parse_nvidia(LIST, QUERY)


def shown(names: str | None, found: list[list[Gpu]] | None = None) -> list[str | None]:
    return [gpu.uuid for gpu in visible(found or cards(), names)]


def test_nvidia_cards_have_memory_and_capability() -> None:
    (h100,), (t4,), (rtx,) = cards()
    assert h100 == Gpu("cuda", "NVIDIA H100 80GB HBM3", 81559 * MIB, 81079 * MIB, (9, 0), A)
    assert (t4.bf16, rtx.bf16) == (False, True)


def test_a_driver_that_knows_no_capability_still_has_names() -> None:
    """The query fails as a whole for a field that an old driver does not know."""
    assert parse_nvidia(LIST, "")[1] == [Gpu("cuda", "Tesla T4", uuid=B)]


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (None, [A, B, C]),
        ("2,0", [C, A]),
        ("0,7,1", [A]),  # 7 is none: the list ends
        ("0,-1,1", [A]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        ("1,1", []),
        (f"{B},0", [B, A]),
        ("GPU-5c", [C]),
        ("GPU-1f22", []),  # two begin so
        ("GPU-1f22a,GPU-ffff,2", [A]),
        (" 1 , 2 ", [B, C]),
    ],
)
def test_cudas_rule_of_visible_devices(names: str | None, ids: list[str]) -> None:
    assert shown(names) == ids


def test_slices_take_their_cards_place_and_have_their_profiles_size() -> None:
    (first, second), (third,), (t4,) = parse_nvidia(MIG_LIST, MIG_QUERY)
    assert first == Gpu("cuda", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20 * GB, None, (8, 0), SLICES[0])
    assert (second.total_bytes, third.total_bytes, third.free_bytes) == (5 * GB, 20 * GB, None)
    assert [gpu.mig for gpu in (first, second, third, t4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (None, [SLICES[0]]),
        ("1", [SLICES[2]]),
        (SLICES[1], [SLICES[1]]),
        ("MIG-cba", [SLICES[1]]),
        ("MIG-c", []),  # two begin so
        (f"{SLICES[1]},{SLICES[2]}", [SLICES[1]]),  # CUDA shows a process one slice
        ("2", [C]),
        ("2,0", [C]),
    ],
)
def test_a_process_gets_one_slice(names: str | None, ids: list[str]) -> None:
    assert shown(names, parse_nvidia(MIG_LIST, MIG_QUERY)) == ids


def test_the_older_ids_of_slices_are_read_too() -> None:
    uuid = f"MIG-{A}/7/0"
    found = parse_nvidia(
        f"GPU 0: A100-SXM4-40GB (UUID: {A})\n  MIG 1g.5gb Device 0: (UUID: {uuid})\n", MIG_QUERY
    )
    assert shown(uuid, found) == [uuid]


ROCM = {
    f"card{i}": {
        "Unique ID": f"0x{i}ad1b2f5ed6b1a1f",
        "VRAM Total Memory (B)": "206141652992",
        "VRAM Total Used Memory (B)": "311222272",
        "Card Series": "AMD Instinct MI300X",
        "GFX Version": "gfx942",
    }
    for i in (0, 10, 2)
}


def test_rocm_smi() -> None:
    text = "WARNING: AMD GPU device(s) is/are in a low-power state.\n" + json.dumps(
        {**ROCM, "system": {"Driver version": "6.10.5"}}
    )
    found = parse_rocm_smi(text)
    assert [gpu.uuid for gpu in found] == [f"GPU-{i}ad1b2f5ed6b1a1f" for i in (0, 2, 10)]
    assert (found[0].name, found[0].total_bytes, found[0].free_bytes) == (
        MI300.name,
        MI300.total_bytes,
        MI300.free_bytes,
    )
    older = {"card0": {"Card series": "Instinct MI100", "VRAM Total Memory (B)": "N/A"}}
    assert parse_rocm_smi(json.dumps(older)) == [Gpu("rocm", "Instinct MI100")]


@pytest.mark.parametrize("wrap", [lambda entries: entries, lambda entries: {"gpu_data": entries}])
def test_amd_smi_in_both_of_its_forms(wrap) -> None:
    metric = [
        {"gpu": 1, "mem_usage": {"total_vram": {"value": 196592, "unit": "MB"}, "used_vram": "N/A"}},
        {
            "gpu": 0,
            "mem_usage": {
                "total_vram": {"value": 196592, "unit": "MB"},
                "used_vram": {"value": 284, "unit": "MB"},
            },
        },
    ]
    static = [{"gpu": i, "asic": {"market_name": "AMD Instinct MI300X"}} for i in (0, 1)]
    first, second = parse_amd_smi(json.dumps(wrap(metric)), json.dumps(wrap(static)))
    assert first == Gpu("rocm", "AMD Instinct MI300X", 196592 * MIB, (196592 - 284) * MIB)
    assert second == Gpu("rocm", "AMD Instinct MI300X", 196592 * MIB, None)


def test_xpu_smi_and_its_mask() -> None:
    text = json.dumps(
        {
            "device_id": 0,
            "device_name": "Intel(R) Data Center GPU Max 1550",
            "memory_physical_size_byte": "68719476736",
            "memory_free_size_byte": "68650000384",
        }
    )
    gpu = parse_xpu_smi(text)
    assert gpu == Gpu("xpu", "Intel(R) Data Center GPU Max 1550", 68719476736, 68650000384)
    other = Gpu("xpu", "another")
    assert masked([gpu, other], "1,0") == (other, gpu)
    assert masked([gpu, other], None) == (gpu, other)
    assert masked([gpu, other], "0.1") == (Gpu("xpu", gpu.name),)  # a tile: how much it has is not said


@pytest.mark.parametrize("text", ["", "No devices were found", "{", "[]", "null", '{"card0": 3}'])
def test_what_no_tool_writes_is_no_traceback(text: str) -> None:
    assert parse_nvidia(text, text) == []
    assert parse_amd_smi(text, text) == []
    assert parse_rocm_smi(text) == []
    assert parse_xpu_smi(text) is None


@pytest.mark.parametrize(
    ("version", "platform", "machine", "kinds"),
    [
        ("2.13.0+cpu", "linux", "x86_64", ()),
        ("2.11.0+cu130", "linux", "x86_64", ("cuda",)),
        ("2.9.1+rocm6.4", "linux", "x86_64", ("rocm",)),
        ("2.9.1+xpu", "linux", "x86_64", ("xpu",)),
        ("2.11.0", "linux", "x86_64", ("cuda", "rocm", "xpu")),
        ("2.11.0", "darwin", "arm64", ("mps",)),
        ("2.2.0", "darwin", "x86_64", ()),
    ],
)
def test_torchs_version_says_which_gpus_it_may_use(version, platform, machine, kinds) -> None:
    assert backends(version, platform, machine) == kinds


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a tool that prints these texts, by a word of its command, on the only path there is."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name: str, **answers: str) -> None:
        cases = "".join(f"*{word}*) printf '%s' '{text}';;" for word, text in answers.items())
        (tmp_path / name).write_text(f'#!/bin/sh\ncase "$*" in {cases} *) exit 9;; esac\n')
        (tmp_path / name).chmod(0o755)

    return make


def test_the_tools_are_asked_and_the_environment_is_followed(tool) -> None:
    tool("nvidia-smi", **{"-L": LIST, "query": QUERY})
    assert find_gpus(["cuda"], {"CUDA_VISIBLE_DEVICES": "1"}) == (cards()[1][0],)
    assert find_gpus(["rocm"], {}) == ()
    tool("rocm-smi", json=json.dumps(ROCM))
    both = {"ROCR_VISIBLE_DEVICES": "2,0", "HIP_VISIBLE_DEVICES": "1"}
    assert [gpu.uuid for gpu in find_gpus(["rocm"], both)] == ["GPU-0ad1b2f5ed6b1a1f"]


def test_a_gpu_that_no_tool_tells_of_is_there_without_numbers(tool, tmp_path, monkeypatch) -> None:
    device_file = tmp_path / "nvidiactl"
    monkeypatch.setattr(gpu_tools, "FILES", {"cuda": (str(device_file),)})
    assert find_gpus(["cuda"], {}) == ()
    device_file.touch()
    assert find_gpus(["cuda"], {}) == (UNREADABLE,)
    assert find_gpus(["cuda"], {"CUDA_VISIBLE_DEVICES": "-1"}) == ()
    tool("nvidia-smi")  # fails, as it does where it cannot talk to the driver
    assert find_gpus(["cuda"], {"CUDA_VISIBLE_DEVICES": "0"}) == (UNREADABLE,)


def test_an_environment_that_hides_every_gpu() -> None:
    assert hides_all("rocm", {"HIP_VISIBLE_DEVICES": "-1"})
    assert hides_all("cuda", {"CUDA_VISIBLE_DEVICES": ""})
    assert not hides_all("cuda", {"CUDA_VISIBLE_DEVICES": "MIG-c6d4"})
    assert not hides_all("cuda", {"HIP_VISIBLE_DEVICES": "-1"})


def test_a_plan_adds_up_what_is_free_and_says_where_that_is_not_known() -> None:
    device = gpu_device((H100, T4), 0)
    assert (device.free_bytes, device.name) == (99_500_000_000, "NVIDIA H100 80GB HBM3 + Tesla T4")
    slice_ = gpu_device((MIG_SLICE,), 0)
    assert (slice_.free_bytes, "as if all of it were free" in slice_.name) == (10 * GB, True)
    with pytest.raises(ConfigError, match=r"an NVIDIA GPU cannot be read here.*memory=24GB"):
        gpu_device((UNREADABLE,), 0)


@pytest.mark.parametrize("gpus", [(UNREADABLE,), (MIG_SLICE,), (MI300,)])
def test_a_job_with_a_gpu_is_never_refused_for_the_hosts_memory(tiny_dir, monkeypatch, gpus) -> None:
    monkeypatch.setattr("pipeline.memory.check.host_free_bytes", lambda: 1000)
    job = [f'model.name="{tiny_dir}"', "prompts=jokes.jsonl"]
    monkeypatch.setattr("pipeline.memory.check.visible_gpus", lambda: gpus)
    check_memory(read_config(job))
    with pytest.raises(LoadError, match=r"0\.0 MB of this machine's memory are free"):
        check_memory(read_config([*job, "model.device_map=cpu"]))
    monkeypatch.setattr("pipeline.memory.check.visible_gpus", tuple)
    with pytest.raises(LoadError, match="are free"):
        check_memory(read_config(job))


def test_looking_for_gpus_loads_no_torch() -> None:
    code = "import sys, pipeline.memory.devices as d; d.visible_gpus(); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
