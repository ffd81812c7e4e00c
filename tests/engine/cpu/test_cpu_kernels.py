"""The CPU's kernels say what torch's own operators say, and a fused layer what the layer says."""

# ruff: noqa: E402  without the kernels, what they are made of cannot be imported either
import copy
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, build_tiny
from torch.nn import functional as F

from pipeline.engine.cpu import load_kernels
from pipeline.engine.masks import Forbidden

kernels = load_kernels()
if kernels is None:
    pytest.skip("the kernels need numba, and a torch that is linked with libgomp", allow_module_level=True)

from cpu_products import PRODUCTS, fed_one_by_one, linear_tiles, sample

from pipeline.engine.cpu.kernels import attention_operators, linear_vectors
from pipeline.engine.cpu.kernels.tiles import has_tiles
from pipeline.engine.cpu.kernels.vectors import HAS_AVX2
from pipeline.engine.cpu.packing import onednn_packs, pack_weights
from pipeline.engine.rectangles import passes
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.engine.rectangles.passes import RectangleDecode
from pipeline.engine.rectangles.rectangle import allocate, write

ULP = 2.0**-7  # the spacing of bf16 just above 1, as a share
# What the kernels' tensors hold, and how near their results are: in float32 sums are rounded on their way, too.
ULPS = {torch.bfloat16: ULP, torch.float32: 2.0**-17}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, ulps: float = 1.0) -> None:
    ulp = ulps * ULPS[found.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=ulp, atol=ulp / 16)


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 60), (9, 576), (300, 64)])
def test_norm_is_the_models_own(rows: int, width: int, dtype: torch.dtype) -> None:
    states, weight = random(rows, width, dtype=dtype), random(width, seed=1, dtype=dtype)
    wide = states.float()
    scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    assert_close(kernels.rms_norm(states, weight, 1e-5), weight * scaled)


@pytest.mark.parametrize("dtype", ULPS)
def test_norm_of_a_sum_is_the_norm_of_the_sum_which_stays(dtype: torch.dtype) -> None:
    states, addition = random(9, 60, dtype=dtype), random(9, 60, seed=1, dtype=dtype)
    weight = random(60, seed=2, dtype=dtype)
    total = states + addition
    assert torch.equal(
        kernels.add_rms_norm(states, addition, weight, 1e-5), kernels.rms_norm(total, weight, 1e-5)
    )
    assert torch.equal(states, total)


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("size", [16, 64, 80])
def test_a_prefill_is_placed_rotated_and_collected_without_its_padding(
    size: int, prefix: int, dtype: torch.dtype
) -> None:
    """Rows of 3 and 20 columns, of which the columns [first, 18) come now; queries are a slice."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    own, first, last = [17 + prefix, prefix], prefix, 18 + prefix
    counts = [last - start for start in own]
    count = sum(counts)
    wide = random(count, 5 * size, dtype=dtype)
    query, key, value = (t.unflatten(1, (-1, size)) for t in wide.split([3 * size, size, size], 1))
    angles = torch.rand(count, size // 2).repeat(1, 2) * 6
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)
    rotated = apply_rotary_pos_emb(
        query[None].transpose(1, 2), key[None].transpose(1, 2), *(t[None] for t in rotation)
    )
    keys, values = (torch.zeros(2, 1, 25, size, dtype=dtype) for _ in range(2))
    starts = np.array([[0, own[0]], [counts[0], own[1]]])
    padded = kernels.place(query, key, value, rotation, starts, (first, last), keys, values)
    for states, expected in ((padded, rotated[0]), (keys[:, :, first:last], rotated[1])):
        found = kernels.collect(states.contiguous(), starts, (first, last), count)
        # torch rounds both products before it adds them
        ulp = ULPS[dtype]
        torch.testing.assert_close(found.float(), expected[0].transpose(0, 1).float(), rtol=ulp, atol=4 * ulp)
    found = kernels.collect(values[:, :, first:last].contiguous(), starts, (first, last), count)
    assert torch.equal(found, value)
    assert not padded[0, :, :17].any(), "padding queries are zeros"
    assert not keys[0, :, : own[0]].any()
    assert not keys[:, :, last:].any(), "nothing else is written"


@pytest.mark.parametrize("table", [random(3, 8), random(3, 16).float(), random(16, 3).T])
def test_a_rotation_that_the_kernel_does_not_know_is_an_error(table: torch.Tensor) -> None:
    store, rows = torch.zeros(3, 1, 4, 16, dtype=torch.bfloat16), np.array([[0, i, 0, 2] for i in range(3)])
    blocks = np.array([[store.data_ptr(), store.data_ptr(), 4]])
    query, key = random(3, 2, 16), random(3, 1, 16)
    with pytest.raises(ValueError, match="rotary embedding"):
        kernels.attend(query, key, key, (table, table), rows, blocks, 1.0)


@pytest.mark.parametrize("dtype", ULPS)
def test_gate_is_torchs_silu_times_up_for_small_and_large_numbers(dtype: torch.dtype) -> None:
    both = random(5, 2 * 100, dtype=dtype) * 30
    both[0, :4] = torch.tensor([0.0, -0.0, 300.0, -300.0])
    gate, up = both.split(100, -1)
    assert_close(kernels.silu_multiply(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("width", [1, 31, 300, 49152])
def test_argmax_is_the_first_of_the_largest(width: int) -> None:
    scores = random(40, width)
    scores[1] = -scores[1].abs() - 1
    scores[2] = -torch.inf
    scores[3] = torch.tensor([-0.0, 0.0])[torch.arange(width) % 2]
    assert kernels.argmax(scores).tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("width", [31, 64, 300, 320, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_forbidden_is_minus_infinity_and_all_else_as_it_was(width: int, dtype: torch.dtype) -> None:
    scores, rows = random(6, width).to(dtype), [4, 0, 1]
    allowed = torch.tensor([[-1] * 5, [0] * 5, [1, -1, 0, 0x5555555555555555, -(2**63)]])
    bits = [
        [allowed[k, i // 64].item() >> i % 64 & 1 if i < 320 else 0 for i in range(width)] for k in range(3)
    ]
    expected = scores.clone()
    expected[rows] = expected[rows].masked_fill(~torch.tensor(bits).bool(), -torch.inf)
    before, forbidden = scores.clone(), Forbidden(rows, allowed)
    assert torch.equal(forbidden.apply(scores, keep=True), expected)
    assert torch.equal(scores, before)
    assert torch.equal(forbidden.apply(scores, keep=False), expected)
    every = Forbidden([0, 1, 2], allowed).apply(scores[[4, 0, 1]], keep=False)
    assert torch.equal(every, expected[rows])


@pytest.mark.parametrize("dtype", ULPS)
def test_a_prefix_is_copied_into_every_row(dtype: torch.dtype) -> None:
    store, prefix = torch.zeros(3, 2, 12, 4, dtype=dtype), random(1, 2, 9, 4, dtype=dtype)
    kernels.copy_prefix(store, prefix, [0, 7, 2], 5)
    for row, start in enumerate([0, 7, 2]):
        assert torch.equal(store[row, :, start : start + 5], prefix[0, :, :5])
        store[row, :, start : start + 5] = 0
    assert not store.any(), "nothing else is written"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("first", [0, 3])
def test_causal_softmax_is_a_masked_softmax(first: int, window: int | None) -> None:
    starts, columns, width = [0, 4, 9], 20, 20 + first
    scores = random(3, 4, columns, width) * 4
    queries, keys = torch.arange(first, first + columns)[:, None], torch.arange(width)
    seen = (keys <= queries) & (keys >= torch.tensor(starts)[:, None, None])
    if window:
        seen &= keys > queries - window
    expected = (scores.float() * 0.3).masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    kernels.causal_softmax(scores, starts, first, window, 0.3)
    assert_close(scores, expected)


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("first", "heads"), [(0, (4, 2)), (35, (3, 3)), (7, (6, 1))])
def test_causal_attention_is_a_masked_attention(
    first: int, heads: tuple[int, int], window: int | None, size: int, dtype: torch.dtype
) -> None:
    """Rows of all columns and of a few, some of them computed before; more queries than a task has."""
    if not kernels.attends_causally(size, dtype):
        pytest.skip("this CPU attends by matrix tiles, or multiplies by none of our kernels")
    columns, starts = 150, [0, 61, first + 149]
    width = first + columns
    query = random(3, heads[0], columns, size, dtype=dtype)
    keys, values = (random(3, heads[1], width + 5, size, seed=seed, dtype=dtype) for seed in (1, 2))
    for states in (keys, values):
        states[:, :, width:] = torch.nan  # not written yet
        states[2, :, : starts[2]] = torch.nan  # padding
    queries, places = torch.arange(first, width)[:, None], torch.arange(width)
    seen = (places <= queries) & (places >= torch.tensor(starts)[:, None, None])
    if window:
        seen &= places > queries - window
    found = kernels.causal_attend(query, keys, values, starts, first, window, 0.2)
    states = (t[:, :, :width].nan_to_num(0).float() for t in (keys, values))
    expected = F.scaled_dot_product_attention(
        query.float(), *states, attn_mask=seen[:, None], scale=0.2, enable_gqa=True
    )
    for row, start in enumerate(starts):
        own = max(0, start - first)
        # with instructions for bf16, weights are rounded to it
        ulp = ULPS[dtype]
        torch.testing.assert_close(
            found[row, :, own:].float(), expected[row, :, own:], rtol=ulp, atol=ulp / 2
        )


@pytest.mark.parametrize("dtype", ULPS)
def test_causal_attention_does_not_depend_on_the_rows_beside(dtype: torch.dtype) -> None:
    if not kernels.attends_causally(64, dtype):
        pytest.skip("this CPU attends by matrix tiles, or multiplies by none of our kernels")
    states = [random(2, 4, 90, 64, seed=seed, dtype=dtype) for seed in range(3)]
    both = kernels.causal_attend(*states, [0, 30], 0, None, 0.2)
    alone = kernels.causal_attend(*(t[1:, :, 30:].contiguous() for t in states), [0], 0, None, 0.2)
    assert torch.equal(both[1:, :, 30:], alone)


def test_a_single_row_may_have_any_stride() -> None:
    store = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)
    rows, blocks = np.array([[0, 0, 0, 2]]), np.array([[store.data_ptr(), store.data_ptr(), 4]])
    key = random(2, 16)[None].as_strided((1, 2, 16), (3, 16, 1))
    kernels.attend(random(1, 4, 16), key, key, None, rows, blocks, 1.0)
    assert torch.equal(store[0, :, 2], key[0])


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("size", [16, 64, 40, 128])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 6), (2, 1), (3, 3)])
def test_attention_over_rectangles_is_torchs_for_short_and_long_rows(
    size: int, window: int | None, kv_heads: int, group: int, dtype: torch.dtype
) -> None:
    """Rows of 1 to 70 columns: below, at and above a block; rectangles with a first column of their own."""
    rectangles = []
    for lengths in ([1, 2], [16, 17, 15], [70, 40, 66]):
        rectangle = allocate([sample(n) for n in lengths], lengths, (window,))
        rows, columns = torch.tensor(
            [(r, c) for r, start in enumerate(rectangle.starts) for c in range(start, rectangle.head)]
        ).T
        seeds = (len(rectangles) + i for i in (0, 7))
        states = (random(len(rows), kv_heads, size, seed=seed, dtype=dtype) for seed in seeds)
        write(rectangle, 0, *states, rows, columns)
        rectangles.append(rectangle)
    rectangles[2].first_columns = {window: 3} if window else {}
    for store in (rectangles[2].keys, rectangles[2].values):
        store[0] = store[0][:, :, 3 if window else 0 :].contiguous()
    count = sum(len(r.rows) for r in rectangles)
    heads = group * kv_heads, kv_heads, kv_heads
    query, key, value = (random(count, h, size, seed=20 + h, dtype=dtype) for h in heads)
    plain = RectangleDecode([_in_float32(r) for r in rectangles])
    expected = plain.attend(0, query.float(), key.float(), value.float(), 0.3)
    found = RectangleDecode(rectangles, kernels).attend(0, query, key, value, 0.3)
    # Weights are rounded to bf16 before they meet the values, as torch's own softmax does in bf16.
    torch.testing.assert_close(found.float(), expected, rtol=ULPS[dtype], atol=ULPS[dtype] / 2)
    for rectangle, wide in zip(rectangles, plain.rectangles, strict=True):
        assert torch.equal(rectangle.keys[0].float(), wide.keys[0]), (
            "the new keys are written, and nothing else"
        )
        assert torch.equal(rectangle.values[0].float(), wide.values[0])


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("size", [16, 64])
def test_attention_rotates_queries_and_new_keys_where_it_is_told_to(size: int, dtype: torch.dtype) -> None:
    stores = [random(3, 2, 40, size, seed=i, dtype=dtype) for i in range(4)]
    stores[2:] = [store.clone() for store in stores[:2]]
    rows = np.array([[0, 2, 0, 38], [0, 0, 30, 33], [0, 1, 5, 9]])
    heads = enumerate((6, 2, 2))
    query, key, value = (random(3, count, size, seed=seed, dtype=dtype) for seed, count in heads)
    angles = torch.rand(3, size // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    halves = [torch.cat((-t[..., size // 2 :], t[..., : size // 2]), -1) for t in (query, key)]
    rotated = [
        (t.float() * cos[:, None].float() + half.float() * sin[:, None].float()).to(dtype)
        for t, half in zip((query, key), halves, strict=True)
    ]
    blocks = [np.array([[k.data_ptr(), v.data_ptr(), 40]]) for k, v in (stores[:2], stores[2:])]
    found = kernels.attend(query, key, value, (cos, sin), rows, blocks[0], 0.2)
    assert_close(found, kernels.attend(*rotated, value, None, rows, blocks[1], 0.2))
    assert_close(stores[0], stores[2])
    assert torch.equal(stores[1], stores[3])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are those of x86")
def test_the_newest_instructions_compile_on_any_x86_cpu(tmp_path: Path) -> None:
    newest = {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": "+avx512bf16,+amx-bf16"}
    env = {**os.environ, **newest, "NUMBA_CACHE_DIR": str(tmp_path)}  # from a cache, there is no text to see
    code = (
        "from pipeline.engine.cpu.kernels import linear_tiles, linear_vectors\n"
        "import torch\n"
        "for products in (linear_tiles, linear_vectors):\n"
        "    print(products.linear.of(torch.bfloat16).inspect_llvm())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for instruction in ("llvm.x86.tdpbf16ps", "vdpbf16ps"):
        assert instruction in done.stdout


def test_this_cpu_multiplies_the_fastest_way_that_it_can() -> None:
    fastest = linear_tiles() if has_tiles() else linear_vectors if HAS_AVX2 else None
    assert kernels.products is fastest


def _in_float32(rectangle: Any) -> Any:
    copy = allocate(list(rectangle.rows), [s.length for s in rectangle.rows], rectangle.windows)
    copy.first_columns = dict(rectangle.first_columns)
    copy.keys, copy.values = ([t.float() for t in store] for store in (rectangle.keys, rectangle.values))
    return copy


def test_spare_rows_come_back_as_zeros() -> None:
    store = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    rows, blocks = np.array([[0, 0, 0, 2]]), np.array([[store.data_ptr(), store.data_ptr(), 4]])
    output = kernels.attend(random(3, 2, 16), random(3, 1, 16), random(3, 1, 16), None, rows, blocks, 1.0)
    assert output[0].abs().sum() > 0
    assert not output[1:].any()


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to multiply."""
    monkeypatch.setattr(kernels, "products", PRODUCTS[request.param]())


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 32, 32), (5, 96, 32), (17, 64, 96), (40, 576, 64), (530, 576, 32)],
)
def test_a_product_is_the_linear_layers_for_any_number_of_rows(
    rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    """Fewer rows than a tile, and than fill the registers; one and a half blocks; more than a chunk."""
    states, weight = random(rows, inputs), random(outputs, inputs, seed=1)
    offsets = random(outputs, seed=2) if bias else None
    found = kernels.linear(states, kernels.pack_blocks(weight), offsets)
    expected = F.linear(states.float(), weight.float(), None if offsets is None else offsets.float())
    torch.testing.assert_close(found.float(), expected, rtol=ULP, atol=inputs**0.5 * ULP / 16)


@pytest.mark.usefixtures("product")
def test_a_row_has_the_same_bits_beside_any_others() -> None:
    states, weight = random(600, 576), kernels.pack_blocks(random(96, 576, seed=1))
    together = kernels.linear(states, weight, None)
    for rows in (slice(0, 1), slice(3, 20), slice(100, 140), slice(430, 600)):
        assert torch.equal(kernels.linear(states[rows], weight, None), together[rows])


@pytest.mark.usefixtures("product")
def test_a_product_takes_any_view_and_no_other_precision() -> None:
    states, weight = random(64, 40).T, kernels.pack_blocks(random(32, 64, seed=1))
    assert torch.equal(
        kernels.linear(states, weight, None), kernels.linear(states.contiguous(), weight, None)
    )
    assert torch.equal(
        kernels.linear(random(40, 96)[:, :64], weight, None),
        kernels.linear(random(40, 96)[:, :64].contiguous(), weight, None),
    )
    with pytest.raises(TypeError, match="float32"):
        kernels.linear(states.float(), weight, None)


@pytest.mark.usefixtures("product")
def test_gates_are_silu_times_up_for_small_and_large_numbers() -> None:
    states, gate, up = random(21, 64), random(48, 64, seed=1) * 8, random(48, 64, seed=2)
    linears = [torch.nn.Linear(64, 48, bias=False).bfloat16() for _ in range(2)]
    for linear, weight in zip(linears, (gate, up), strict=True):
        linear.weight.data = weight
    block = torch.nn.ModuleDict({"gate_proj": linears[0], "up_proj": linears[1]})
    block.get_input_embeddings = lambda: torch.nn.Embedding(1, 1, dtype=torch.bfloat16)
    assert pack_weights(block) == 2
    found = block["gate_proj"].packed.gated(states)
    assert_close(found, F.silu(F.linear(states, gate)) * F.linear(states, up), ulps=3)
    assert torch.equal(block["gate_proj"](states), F.linear(states, gate)), "apart, they are what they were"
    assert torch.equal(block["up_proj"](states), F.linear(states, up))


@pytest.mark.parametrize(
    ("products", "batches"), [(None, True), (None, False), *((name, True) for name in PRODUCTS)]
)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_model_on_the_kernels_gives_the_logits_that_it_gives_without(
    name: str, products: str | None, batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = PRODUCTS[products]() if products else None
    monkeypatch.setattr(kernels, "products", module)
    if products != "linear_vectors":
        monkeypatch.setattr(attention_operators, "causal", None)
    elif "head_dim" in ARCHITECTURES[name][1]:
        monkeypatch.setitem(ARCHITECTURES[name][1], "head_dim", 32)  # which causal_attend takes
    if not batches:  # as without oneDNN's products in bf16
        monkeypatch.setattr(passes, "onednn_has_bf16", lambda: False)
    model = build_tiny(name).to(torch.bfloat16)
    model.resize_token_embeddings(320, mean_resizing=False)  # whole blocks
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        expected = model(ids).logits[0].float()
        packs = module is not None or onednn_packs()
        assert (pack_weights(model) > 0) == packs
        packed = model(ids).logits[0].float()
        if products:
            assert (packed - expected).abs().max() < 0.25 * expected.std()
        else:
            assert torch.equal(packed, expected), "packed by oneDNN or not at all, every bit is the same"
        forward = FlatForward(model)
        kind = name in ("llama", "qwen2", "qwen3")
        assert (forward._fused is not None) == kind
        assert (forward._program is not None) == (kind and module is not None)
        found = fed_one_by_one(forward, ids[0].tolist(), given=30)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(ids).logits[0].float(), packed), "a plain pass stays what it was"
    assert (found - expected[29:]).abs().max() < 0.25 * expected.std()


@torch.inference_mode()
def test_a_packed_model_can_be_copied() -> None:
    model, ids = build_tiny("llama").bfloat16(), torch.arange(3, 12)[None]
    assert (pack_weights(model) > 0) == (kernels.products is not None or onednn_packs())
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, model(ids).logits)
