"""The kernels for GPUs, run by Triton's interpreter on a CPU: each says what torch's operators say.

In float32 and float16: the interpreter does not round to bfloat16 as a GPU does.
"""

import copy
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from engine_runs import alone, mixed_requests, run, tokens
from interpreted import interpreted
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pipeline.engine.fused_model import FusedModel
from pipeline.engine.limits import PAGE
from pipeline.engine.paged import forward as forward_module
from pipeline.engine.paged.forward import PagedForward

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted("triton_kernels")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    half = found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=2e-3 if half else 1e-5, atol=2e-3 if half else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 60), (2, 3, 576)], ids=str)
def test_norms_are_the_models_own(kernels, shape, dtype):
    states, addition = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    norm.weight.data = random(shape[-1], dtype=dtype, seed=2)
    close(kernels.rms_norm(states, norm.weight, 1e-5), norm(states))
    total = states + addition
    close(kernels.add_rms_norm(states, addition, norm.weight, 1e-5), norm(total))
    assert torch.equal(states, total), "the sum stays"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_multiplies(kernels, dtype):
    gate, up = random(3, 700, dtype=dtype), random(3, 1400, dtype=dtype, seed=1)[:, ::2]
    close(kernels.silu_multiply(gate, up), F.silu(gate) * up)


def rotation(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, size // 2, generator=torch.Generator().manual_seed(3)).repeat(1, 2) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 80, 128])
def test_rotation_is_the_models_own(kernels, size, dtype):
    states, turn = random(5, 3, size, dtype=dtype), rotation(5, size, dtype)
    heads = states.transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(heads, heads, *(t[None] for t in turn))
    close(kernels.rotate(states, turn), expected[0].transpose(0, 1))


HELD = [0, 1, PAGE - 1, PAGE, 255, 256, 600]  # around the ends of pages and of splits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "window"),
    [(4, 2, 16, None), (6, 2, 24, 40), (2, 2, 16, 300), (9, 3, 64, 1), (2, 1, 256, None)],
)
def test_a_step_attends_to_what_a_row_holds_and_stores_its_own(
    kernels, heads, key_heads, size, window, rotates, dtype
):
    rows, width = len(HELD), 20
    table = torch.randperm(rows * width, generator=torch.Generator().manual_seed(4)).view(rows, width).int()
    table = torch.cat([torch.zeros(1, width), table]).int()  # slots are not rows
    keys, values = (random(rows * width, PAGE, key_heads, size, dtype=dtype, seed=i) for i in (5, 6))
    unwritten = [int(table[row + 1, held // PAGE]) for row, held in enumerate(HELD)]
    for row, page in enumerate(unwritten):  # what lies beyond a row's columns is never read
        keys[page, HELD[row] % PAGE :] = values[page, HELD[row] % PAGE :] = torch.nan
    control = torch.tensor([[row + 1, held] for row, held in enumerate(HELD)], dtype=torch.int32)
    query, key, value = (
        random(rows, h, size, dtype=dtype, seed=i) for i, h in ((7, heads), (8, key_heads), (9, key_heads))
    )
    turn = rotation(rows, size, dtype) if rotates else None
    made = kernels.attend(
        query, key, value, turn, keys, values, control, table, width * PAGE, window, size**-0.5
    )
    turned = [kernels.rotate(t, turn) if turn else t for t in (query, key)]
    for row, held in enumerate(HELD):
        k, v = (
            t[table[row + 1].long()].flatten(0, 1)[: held + 1].transpose(0, 1)[None] for t in (keys, values)
        )
        assert torch.equal(k[0, :, -1], turned[1][row])
        assert torch.equal(v[0, :, -1], value[row])
        first = 0 if window is None else max(0, held + 1 - window)
        q, k, v = turned[0][row][None, :, None], k[:, :, first:], v[:, :, first:]
        close(made[row], F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0, :, 0])


def test_a_rows_bits_do_not_depend_on_how_far_others_reach(kernels):
    table = torch.arange(40).view(2, 20).int()
    keys, values = (random(40, PAGE, 2, 16, dtype=torch.float16, seed=i) for i in (1, 2))
    query, key, value = (random(2, h, 16, dtype=torch.float16, seed=h) for h in (4, 2, 2))
    control = torch.tensor([[0, 200], [1, 600]], dtype=torch.int32)

    def attend(rows: int, columns: int) -> Tensor:
        inputs = (t[:rows] for t in (query, key, value))
        made: Tensor = kernels.attend(*inputs, None, keys, values, control[:rows], table, columns, None, 0.25)
        return made[0]

    assert torch.equal(attend(1, 256), attend(2, 640))


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pipeline.engine.paged import triton_kernels as kernels

size = int(sys.argv[1])
block, warps, stages = kernels.tiling(torch.bfloat16, size)
fixed = {"ROTATES": True, "MERGES": True, "KV_HEADS": 4, "GROUP": 2, "GROUP_PADDED": 16, "PADDED": size}
fixed |= {"PAGE": 32, "SPLIT": kernels.SPLIT, "BLOCK": block}
kinds = dict.fromkeys(("query", "key", "value", "cos", "sin", "keys", "values"), "*bf16")
kinds |= {"control": "*i32", "table": "*i32", "parts": "*fp32", "sums": "*fp32", "scaling": "fp32"}
kinds |= dict.fromkeys(fixed, "constexpr")
names = kernels._attend_kernel.arg_names
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds.get(name, "")[:1] == "*"}
source = ASTSource(kernels._attend_kernel, {name: kinds.get(name, "i32") for name in names}, fixed, aligned)
made = compile(source, target=GPUTarget("cuda", 86, 32), options={"num_warps": warps, "num_stages": stages})
print(made.metadata.shared)
"""


@pytest.mark.parametrize("size", [256, 512])
def test_large_heads_fit_the_shared_memory_of_small_cards(kernels, size):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, str(size)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert 16 * 1024 < int(made.stdout) <= 99 * 1024, "what a block has with compute capability 8.6"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_the_engine_on_these_kernels_makes_the_text_of_each_prompt_alone(
    kernels, tiny_model, monkeypatch, name
):
    monkeypatch.setattr(forward_module, "choose_kernels", lambda device: (kernels, False))
    forward = PagedForward(copy.deepcopy(tiny_model(name)))
    if name != "gemma3_text":
        fused: Any = FusedModel(forward._model, kernels)
        monkeypatch.setattr(forward, "_fused", fused)
    requests = mixed_requests(prefix_tokens=40)[4:8]
    done = tokens(run(forward, requests, max_rows=4, prefill_tokens=50))
    assert done == {(r.id, 0): alone(tiny_model(name), r) for r in requests}
