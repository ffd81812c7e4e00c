"""The CPU's kernels say what torch's own operators say, and a fused layer what the layer says."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, build_tiny
from torch.nn import functional as F

from pipeline.engine import cpu_kernels as kernels
from pipeline.engine.batch import DecodeBatch
from pipeline.engine.forward import FlatForward
from pipeline.engine.kv_cache import allocate, regroup, write
from pipeline.engine.packing import pack_weights
from pipeline.engine.scheduler import Sequence
from pipeline.request import GenerationParams, Request

ULP = 2.0**-7  # the spacing of bf16 just above 1, as a share


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(found: torch.Tensor, expected: torch.Tensor, ulps: float = 1.0) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=ulps * ULP, atol=ulps * ULP / 16)


def sequence(length: int) -> Sequence:
    return Sequence(Request(f"of {length}", (1,) * length, GenerationParams()), 0)


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 60), (9, 576), (300, 64)])
def test_norm_is_the_models_own(rows: int, width: int) -> None:
    states, weight = random(rows, width), random(width, seed=1)
    wide = states.float()
    scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert_close(kernels.rms_norm(states, weight, 1e-5), weight * scaled)


@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 16), (9, 3, 64), (20, 2, 80)])
def test_rotation_is_the_models_own_also_on_a_slice(rows: int, heads: int, size: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    wide = random(rows, heads * size + 32)
    states = wide[:, : heads * size].unflatten(1, (heads, size))
    angles = torch.rand(rows, size // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    expected, _ = apply_rotary_pos_emb(
        states[None].transpose(1, 2), states[None].transpose(1, 2), cos[None], sin[None]
    )
    beyond = wide[:, heads * size :].clone()
    kernels.rotate(states, cos, sin)
    # torch rounds both products before it adds them
    torch.testing.assert_close(states.float(), expected[0].transpose(0, 1).float(), rtol=ULP, atol=4 * ULP)
    assert torch.equal(wide[:, heads * size :], beyond)


@pytest.mark.parametrize("table", [random(3, 8), random(3, 16).float(), random(16, 3).T])
def test_a_rotation_that_the_kernel_does_not_know_is_an_error(table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="rotary embedding"):
        kernels.rotate(random(3, 2, 16), table, table)


def test_gate_is_torchs_silu_times_up_for_small_and_large_numbers() -> None:
    both = random(5, 2 * 100) * 30
    both[0, :4] = torch.tensor([0.0, -0.0, 300.0, -300.0])
    gate, up = both.split(100, -1)
    assert_close(kernels.silu_multiply(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("first", [0, 3])
def test_causal_softmax_is_a_masked_softmax(first: int, window: int | None) -> None:
    starts, columns, width = [0, 4, 9], 20, 20 + first
    scores = random(3, 4, columns, width) * 4
    queries, keys = torch.arange(first, first + columns)[:, None], torch.arange(width)
    seen = (keys <= queries) & (keys >= torch.tensor(starts)[:, None, None])
    if window:
        seen &= keys > queries - window
    expected = scores.float().masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    kernels.causal_softmax(scores, starts, first, window)
    assert_close(scores, expected)


def test_a_single_row_may_have_any_stride() -> None:
    store = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)
    rows, blocks = np.array([[0, 0, 0, 2]]), np.array([[store.data_ptr(), store.data_ptr(), 4]])
    key = random(2, 16)[None].as_strided((1, 2, 16), (3, 16, 1))
    kernels.attend(random(1, 4, 16), key, key, rows, blocks, 1.0)
    assert torch.equal(store[0, :, 2], key[0])


@pytest.mark.parametrize("size", [16, 64, 40])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_attention_over_rectangles_is_torchs_for_short_and_long_rows(
    size: int, window: int | None, kv_heads: int
) -> None:
    """Rows of 1 to 70 columns: below, at and above a block; rectangles with a first column of their own."""
    rectangles = []
    for lengths in ([1, 2], [16, 17, 15], [70, 40, 66]):
        rectangle = allocate([sequence(n) for n in lengths], lengths, (window,))
        rows, columns = torch.tensor(
            [(r, c) for r, start in enumerate(rectangle.starts) for c in range(start, rectangle.head)]
        ).T
        states = (random(len(rows), kv_heads, size, seed=len(rectangles) + i) for i in (0, 7))
        write(rectangle, 0, *states, rows, columns)
        rectangles.append(rectangle)
    rectangles[2].first_columns = {window: 3} if window else {}
    for store in (rectangles[2].keys, rectangles[2].values):
        store[0] = store[0][:, :, 3 if window else 0 :].contiguous()
    count = sum(len(r.rows) for r in rectangles)
    query, key, value = (random(count, h, size, seed=20 + h) for h in (3 * kv_heads, kv_heads, kv_heads))
    plain = DecodeBatch([_in_float32(r) for r in rectangles])
    expected = plain.attend(0, query.float(), key.float(), value.float(), 0.3)
    found = DecodeBatch(rectangles, kernels).attend(0, query, key, value, 0.3)
    assert_close(found, expected)
    for rectangle, wide in zip(rectangles, plain.rectangles, strict=True):
        assert torch.equal(rectangle.keys[0].float(), wide.keys[0]), (
            "the new keys are written, and nothing else"
        )
        assert torch.equal(rectangle.values[0].float(), wide.values[0])


def _in_float32(rectangle: Any) -> Any:
    copy = allocate(list(rectangle.rows), [s.length for s in rectangle.rows], rectangle.windows)
    copy.first_columns = dict(rectangle.first_columns)
    copy.keys, copy.values = ([t.float() for t in store] for store in (rectangle.keys, rectangle.values))
    return copy


def test_spare_rows_come_back_as_zeros() -> None:
    store = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    rows, blocks = np.array([[0, 0, 0, 2]]), np.array([[store.data_ptr(), store.data_ptr(), 4]])
    output = kernels.attend(random(3, 2, 16), random(3, 1, 16), random(3, 1, 16), rows, blocks, 1.0)
    assert output[0].abs().sum() > 0
    assert not output[1:].any()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_model_on_the_kernels_gives_the_logits_that_it_gives_without(name: str) -> None:
    model = build_tiny(name).to(torch.bfloat16)
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        expected = model(ids).logits[0].float()
        assert pack_weights(model) > 0
        assert torch.equal(model(ids).logits[0].float(), expected), "packed, every bit is the same"
        forward = FlatForward(model)
        fused = ["forward" in vars(layer) for layer in model.model.layers]
        assert all(fused) if name in ("llama", "qwen2", "qwen3") else not any(fused)
        found = fed_one_by_one(forward, ids[0].tolist(), given=30)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(ids).logits[0].float(), expected), "a plain pass stays what it was"
    assert (found - expected[29:]).abs().max() < 0.25 * expected.std()


def fed_one_by_one(forward: FlatForward, ids: list[int], given: int) -> torch.Tensor:
    """Prefill the first tokens in chunks of 16 beside a shorter row, then decode the rest: logits [.., V]."""
    row, other = sequence(0), sequence(4)
    row.token_ids += ids[:given]
    rectangle, logits = forward.prefill([row, other], None, 32)
    found = [logits[0].float()]
    for token in ids[given:]:
        row.token_ids.append(token)
        other.token_ids.append(7)
        if rectangle.full:
            (rectangle,) = regroup([rectangle], [rectangle.rows])
        found.append(forward.decode([rectangle])[0].float())
        rectangle.head += 1
    return torch.stack(found)
