"""What is decided by device, on machines that are not here."""

import pytest
import torch
from machines import APPLE, H100, MAX_1550, MI300, MIG_SLICE, RTX_3060, T4, UNREADABLE

from pipeline.accelerators import chosen
from pipeline.gpu import Gpu, have_bf16

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
