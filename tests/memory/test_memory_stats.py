"""Memory is measured, not guessed: known answers, and what the operating system says."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.common.host import resident_bytes
from pipeline.config.quant import Dtype, QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.engine.accelerators import used_indices
from pipeline.memory import measured as memory_stats
from pipeline.memory.measured import (
    PeakSampler,
    devices,
    footprint_bytes,
    peak_resident_bytes,
    quantization_state_bytes,
    weight_bytes,
)
from pipeline.models.loading import load_model

MB = 1_000_000
LINEAR_WEIGHTS = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)  # SmolLM2's quantized layers
LINEAR_LAYERS = 30 * 7


@functools.cache
def load(folder: Path, method: QuantMethod, dtype: Dtype = Dtype.auto, double_quant: bool = False) -> Any:
    quant = QuantConfig(method, dtype, double_quant)
    return load_model(ModelConfig(str(folder), device_map="cpu"), quant, "none").model


@pytest.mark.parametrize(
    ("quant", "megabytes"),
    [
        ((QuantMethod.nf4, Dtype.auto, True), 109.777792),
        ((QuantMethod.nf4,), 109.777792),
        ((QuantMethod.int8,), 162.861952),
        ((QuantMethod.none, Dtype.bfloat16), 269.030272),
        ((QuantMethod.none, Dtype.float32), 538.060288),
    ],
    ids=["nf4", "nf4_single", "int8", "bf16", "fp32"],
)
def test_the_footprint_of_smollm2_is_the_known_one_and_the_sum_of_its_parts(smollm2_dir, quant, megabytes):
    model = load(smollm2_dir, *quant)
    assert footprint_bytes(model) == megabytes * MB
    assert sum(sum(kinds.values()) for kinds in weight_bytes(model).values()) == megabytes * MB


def test_weights_are_told_apart_by_kind_and_dtype(smollm2_dir):
    parts = weight_bytes(load(smollm2_dir, QuantMethod.nf4, Dtype.auto, True))
    assert parts == {
        "embedding": {"bfloat16": 49152 * 576 * 2},  # the head is tied to it, and counts here
        "attention": {"uint8": 30 * (2 * 576 * 576 + 2 * 192 * 576) // 2},
        "mlp": {"uint8": 30 * 3 * 1536 * 576 // 2},
        "norm": {"bfloat16": 61 * 576 * 2},
        "buffers": {"float32": parts["buffers"]["float32"]},  # the rotary frequencies; how many copies varies
    }


def test_every_weight_of_every_architecture_has_a_kind(each_tiny_model):
    parts = weight_bytes(each_tiny_model)
    assert set(parts) >= {"embedding", "attention", "mlp", "norm", "head"}
    assert "other" not in parts
    assert sum(sum(kinds.values()) for kinds in parts.values()) == footprint_bytes(each_tiny_model)


class TestQuantizationState:
    def test_single_is_a_float32_for_64_weights(self, smollm2_dir):
        model = load(smollm2_dir, QuantMethod.nf4)
        scales = LINEAR_WEIGHTS // 64 * 4
        tables = 16 * 4 * LINEAR_LAYERS  # at most; layers may share them
        assert scales < quantization_state_bytes(model) <= scales + tables

    def test_double_is_a_byte_for_64_weights_and_a_float32_for_256_of_those(self, smollm2_dir):
        model = load(smollm2_dir, QuantMethod.nf4, Dtype.auto, True)
        scales = LINEAR_WEIGHTS // 64 + 4 * 30 * (
            2 * 21 + 2 * 7 + 3 * 54
        )  # 324, 108 or 864 by 64·256, rounded up
        tables = (16 * 4 + 256 * 4 + 4) * LINEAR_LAYERS
        assert scales < quantization_state_bytes(model) <= scales + tables

    def test_int8_is_a_float32_a_row_before_and_after_the_first_pass(self, smollm2_dir):
        model = load(smollm2_dir, QuantMethod.int8)
        rows = 30 * (2 * 576 + 2 * 192 + 2 * 1536 + 576)
        assert quantization_state_bytes(model) == rows * 4
        model(input_ids=torch.tensor([[1, 2, 3]]))
        assert quantization_state_bytes(model) == rows * 4

    def test_a_plain_model_has_none(self, tiny_model):
        assert quantization_state_bytes(tiny_model("llama")) == 0


class TestHost:
    def test_resident_set_is_what_the_kernel_says(self):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        assert resident_bytes() == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.05)

    def test_the_peak_is_at_least_what_is_resident(self):
        peak = peak_resident_bytes()
        assert peak is None or peak >= resident_bytes() * 0.95

    def test_phases_have_peaks_of_their_own(self):
        """A block that is freed within the first phase is in its peak, and not in the second's."""
        peaks = run("""
            with PeakSampler() as first:
                block = torch.ones(50_000_000)
                del block
            with PeakSampler() as second:
                block = torch.ones(12_500_000)
                del block
            print(json.dumps([before, first.peaks().host_bytes, second.peaks().host_bytes]))
        """)
        before, first, second = peaks
        assert 195 * MB < first - before < 260 * MB
        assert 45 * MB < second - before < 110 * MB

    def test_where_the_kernel_keeps_no_peak_it_is_sampled(self):
        before, peak, exact = run("""
            memory_stats.reset_peaks = lambda: False
            with PeakSampler(sample_sec=0.005) as sampler:
                block = torch.ones(50_000_000)
                time.sleep(0.1)
                del block
            print(json.dumps([before, sampler.peaks().host_bytes, sampler.peaks().host_exact]))
        """)
        assert not exact
        assert 195 * MB < peak - before < 260 * MB

    def test_a_phase_that_fails_is_still_measured(self):
        with pytest.raises(ZeroDivisionError), PeakSampler() as sampler:
            _ = 1 // 0
        assert sampler.peaks().host_bytes >= 1
        assert sampler.peaks() is sampler.peaks()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_are_no_device_numbers():
    assert devices() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_seen_but_not_in_use_are_left_alone(monkeypatch):
    """torch's real functions: asking such a GPU for anything would raise here, and open it elsewhere."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with PeakSampler() as sampler:
        pass
    assert sampler.peaks().devices == devices() == []


class Counters:
    """Stands in for torch.cuda on a machine with three GPUs, one of them in use."""

    def is_initialized(self):
        return True

    def device_count(self):
        return 3

    def max_memory_allocated(self, index):
        return [0, 5_000_000, 0][index]


def test_of_three_gpus_only_the_one_in_use_is_asked():
    assert list(used_indices(Counters())) == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_peak_is_of_its_phase():
    with PeakSampler() as first:
        torch.ones(50_000_000, device="cuda")
    with PeakSampler() as second:
        torch.ones(10, device="cuda")
    assert first.peaks().devices[0].peak_allocated_bytes >= 200 * MB
    assert second.peaks().devices[0].peak_allocated_bytes < 200 * MB
    for device in devices():
        assert 0 <= device.allocated_bytes <= device.reserved_bytes <= device.total_bytes


def run(script: str) -> Any:
    """Run in a process of its own, whose memory no other test has grown; `before` is its resident set."""
    head = """if True:
            import json, time, torch
            from pipeline.memory import measured as memory_stats
            from pipeline.common.host import resident_bytes
            from pipeline.memory.measured import PeakSampler
            torch.ones(1)
            before = resident_bytes()
    """
    done = subprocess.run([sys.executable, "-c", head + script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_kinds_are_the_ones_that_are_named(each_tiny_model):
    assert set(weight_bytes(each_tiny_model)) <= set(memory_stats.KINDS)
