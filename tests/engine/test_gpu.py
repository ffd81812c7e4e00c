"""What is decided by device, on machines that are not here."""

from pathlib import Path

import pytest
import torch
import yaml
from engine.test_every_architecture import build
from machines import APPLE, H100, MAX_1550, MI300, MIG_SLICE, RTX_3060, T4, UNREADABLE

from pipeline.common.gpu import Gpu, have_bf16
from pipeline.config.quant import Dtype, QuantConfig, QuantMethod, settle_dtypes
from pipeline.config.schema import root
from pipeline.engine.accelerators import chosen
from pipeline.engine.paged.forward import can_capture
from pipeline.engine.paged.replaced import NEAR, _apart
from pipeline.job.manifest import manifest
from pipeline.memory.architecture import Architecture
from pipeline.memory.plan import footprint_bytes, parts, plain_dtype
from pipeline.models.dtypes import settle

TWO = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize("gpu", [RTX_3060, H100, MIG_SLICE, MI300, MAX_1550, APPLE, UNREADABLE])
def test_these_multiply_in_bfloat16(gpu: Gpu) -> None:
    assert gpu.bf16


def test_one_card_without_bfloat16_decides_for_all() -> None:
    assert not T4.bf16
    assert have_bf16([])
    assert have_bf16([H100, RTX_3060])
    assert not have_bf16([H100, T4])


def test_a_slice_is_known_by_its_id() -> None:
    assert [gpu.mig for gpu in (MIG_SLICE, H100, MI300)] == [True, False, False]


@pytest.mark.parametrize(
    ("device_map", "indices"),
    [
        ("auto", [0, 1]),
        ("cuda", [0]),
        ("cuda:1", [1]),
        (1, [1]),
        ("cpu", []),
        ({"": "cpu"}, []),
        ({"model.embed_tokens": 0, "lm_head": "cuda:1"}, [0, 1]),
        ({"model": 1, "lm_head": "cpu"}, [1]),
    ],
)
def test_a_device_map_chooses_among_the_visible_gpus(device_map: object, indices: list[int]) -> None:
    assert [device.index for device in chosen(device_map, TWO)] == indices


def test_apples_gpu_is_chosen_by_its_name() -> None:
    mps = torch.device("mps")
    assert chosen("auto", [mps]) == chosen("mps", [mps]) == [mps]
    assert chosen("cpu", [mps]) == []


@pytest.mark.parametrize(
    ("asked", "own", "gpus", "dtype", "compute"),
    [
        (("auto", "auto"), "bfloat16", (T4,), "float16", "float16"),
        (("auto", "auto"), "bfloat16", (H100, T4), "float16", "float16"),
        (("auto", "auto"), "float32", (T4,), "auto", "float16"),
        (("auto", "auto"), None, (T4,), "auto", "float16"),
        (("bfloat16", "bfloat16"), "bfloat16", (T4,), "bfloat16", "bfloat16"),  # as asked
        (("float32", "float32"), "bfloat16", (T4,), "float32", "float32"),
        (("auto", "auto"), "bfloat16", (RTX_3060,), "auto", "bfloat16"),
        (("auto", "auto"), "bfloat16", (MI300,), "auto", "bfloat16"),
        (("auto", "auto"), "bfloat16", (), "auto", "bfloat16"),
    ],
)
def test_what_auto_comes_to(
    asked: tuple[str, str], own: str | None, gpus: tuple[Gpu, ...], dtype: str, compute: str
) -> None:
    quant = QuantConfig(QuantMethod.nf4, dtype=Dtype(asked[0]), compute_dtype=Dtype(asked[1]))
    settled = settle(quant, own, gpus)
    assert (settled.dtype.value, settled.compute_dtype.value) == (dtype, compute)


def test_a_plan_counts_float16_where_there_is_no_bfloat16() -> None:
    arch = Architecture.read(yaml.safe_load((root() / "conf/model/llama.yaml").read_text())["architecture"])
    old, new = (
        settle_dtypes(QuantConfig(QuantMethod.nf4), arch.dtype, gpus) for gpus in ((T4,), (RTX_3060,))
    )
    assert (plain_dtype(arch, old), plain_dtype(arch, new)) == ("float16", "bfloat16")
    assert footprint_bytes(arch, old) == footprint_bytes(arch, new)
    assert {part.dtype for part in parts(arch, old)} == {"float16", "nf4", "float32"}


def test_the_manifest_names_the_gpus_that_were_used(tmp_path: Path) -> None:
    device = manifest("none.jsonl", None, [T4, MIG_SLICE], model="org/model")["device"]
    assert device["gpus"][0] == {
        "name": "Tesla T4", "backend": "cuda", "total_bytes": 15_843_721_216, "capability": "7.5", "mig": False,
    }  # fmt: skip
    assert device["gpus"][1]["mig"]


@pytest.mark.parametrize(("kind", "dtype", "capability", "recorded"), [
    ("llama", torch.float32, 7, True),
    ("qwen3_moe", torch.bfloat16, 9, True),
    ("qwen3_moe", torch.bfloat16, 8, False),
    ("qwen3_moe", torch.bfloat16, 12, False),
    ("qwen3_moe", torch.float16, 9, False),
    ("jetmoe", torch.bfloat16, 9, False),
])  # fmt: skip
def test_a_step_is_recorded_where_no_router_waits(monkeypatch, kind, dtype, capability, recorded):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    model = build(kind).to(dtype)
    assert can_capture(model) == recorded
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            module.quantized_experts = {}
    if kind == "qwen3_moe":
        assert not can_capture(model), "their routing is asked for"
        for module in model.modules():
            if hasattr(module, "is_transposed"):
                module.grouped_experts = module.forward
        assert can_capture(model)


def test_what_a_large_output_rounds_by_proves_nothing_wrong_and_hides_nothing():
    wanted = torch.randn(5, 4096)
    wanted[:, 3] = 4000.0  # as a bias of Qwen 2's keys
    made = wanted.bfloat16().float()
    made[:, 3] += 16  # a rounding further
    assert _apart(made, wanted) < NEAR
    made[2, 7] += 1
    assert _apart(made, wanted) > NEAR
