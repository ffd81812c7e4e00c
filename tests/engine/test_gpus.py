"""On GPUs, as far as a machine without one can tell: nothing mixes two of them, and little goes up or down."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from engine_runs import EOS, mixed_requests, run, run_engine
from fake_gpus import fake_gpus, fake_model
from transformers import masking_utils

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.limits import CPU, GPU, Limits
from pipeline.engine.rectangles import batch as batch_module
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.engine.rectangles.rectangle import Rectangle, regroup
from pipeline.engine.sampling import next_tokens
from pipeline.engine.scheduler import Sample

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

LAYERS = {"llama": 2, "gemma3_text": 6}
HALF = [torch.bfloat16, torch.float32]
ONE: dict[str, int] = {"": 0}


def split(name: str, gpus: int, head: int | None = None) -> dict[str, int]:
    """The layers in turn on these GPUs; the embedding with the first, norm and head with the last, or apart."""
    count = LAYERS[name]
    places = {f"model.layers.{i}": i * gpus // count for i in range(count)}
    last = gpus - 1 if head is None else head
    return {"model.embed_tokens": 0, "model.rotary_emb": 0, **places, "model.norm": last, "lm_head": last}


def samples(*lengths: int) -> list[Sample]:
    return [Sample(Request(f"{n}", tuple(range(n)), GenerationParams()), 0) for n in lengths]


def decode(forward: Any, rectangles: list[Rectangle]) -> list[int]:
    """One step as the engine makes it."""
    rows = [s for r in rectangles for s in r.rows]
    tokens = next_tokens(forward.decode(rectangles), rows)
    for sample, token in zip(rows, tokens, strict=True):
        sample.token_ids.append(token)
    for rectangle in rectangles:
        rectangle.head += 1
    return tokens


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_decode_step_is_one_upload_and_one_download(name, dtype):
    with fake_gpus() as traffic:
        forward = FlatForward(fake_model(name, ONE, dtype))
        rectangles = [forward.prefill(samples(*lengths), None, 1 << 20)[0] for lengths in ((5, 7), (30,))]
        for _ in range(2):  # the first makes each rectangle's bias
            traffic.count.clear()
            for rectangle in rectangles:
                for sample in rectangle.rows:
                    sample.token_ids = sample.token_ids or [3]
            assert decode(forward, rectangles) == [0, 0, 0]
        assert dict(traffic.count) == {"up": 1, "down": 1}


def test_transformers_does_not_look_for_packed_sequences(each_tiny_model, monkeypatch):
    """It would wait for the device in every pass; not where tensors are fake, so this pass is a real one."""
    look = mock.Mock(return_value=None)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    run(FlatForward(copy.deepcopy(each_tiny_model)), mixed_requests()[:3])
    assert not look.called
    each_tiny_model(torch.tensor([[5, 6, 7]]), use_cache=False)
    assert look.called, "where it does, it is by this function"


@pytest.mark.parametrize("name", LAYERS)
def test_a_prefill_goes_up_once_whatever_the_number_of_layers(name):
    with fake_gpus() as traffic:
        forward = FlatForward(fake_model(name, ONE))
        shared, _ = forward.prefill(samples(4), None, 1 << 20)
        traffic.count.clear()
        forward.prefill(samples(9, 7), shared, 1 << 20)
        # Tokens and positions, places in the rectangle, the rows' last tokens.
        assert dict(traffic.count) == {"up": 3, "masks": len(set(forward._windows))}


@pytest.mark.parametrize(
    ("name", "gpus", "head"),
    [("llama", 2, None), ("gemma3_text", 3, None), ("llama", 2, 2)],
    ids=["on two GPUs", "on three, with windows", "the head on a third"],
)
def test_a_model_split_over_gpus_mixes_none_of_them(name, gpus, head, monkeypatch):
    """Prefix, parts of a prefill, copies of a row, regrouping, retiring: the fake tensors raise where two meet."""
    requests = mixed_requests()[:9]
    for request, top_p in zip(requests[:2], (1.0, 0.9), strict=True):
        drawn = GenerationParams(max_new_tokens=9, n=2, temperature=1.0, top_p=top_p)
        requests.append(Request(f"{request.id}-drawn", request.prompt_token_ids, drawn))
    regrouped = mock.Mock(wraps=regroup)
    monkeypatch.setattr(batch_module, "regroup", regrouped)
    with fake_gpus() as traffic:
        forward = FlatForward(fake_model(name, split(name, gpus, head)))
        forward.limits = Limits(max_rows=128, chunk=8, rectangle_overhead=60, cuts_windows=True)
        engine = Engine(forward, EOS, max_rows=7, prefill_tokens=64)
        done = []
        for finished in engine.steps(requests):
            done += finished
            for rectangle in engine._batch._rectangles:
                on = [t.device.index for t in rectangle.keys]
                assert on == [i * gpus // LAYERS[name] for i in range(LAYERS[name])]
    assert traffic.count["across"] > 0
    assert regrouped.call_count > 3
    assert {c.request_id for c in done} == {r.id for r in requests}
    wanted = {r.id: r.params.max_new_tokens for r in requests}
    assert all(c.error is None and len(c.token_ids) == wanted[c.request_id] for c in done)
    assert engine.stats.prefill_tokens < sum(len(r.prompt_token_ids) for r in requests), "a prefix is shared"


def test_what_accelerate_brings_across_is_what_the_layers_get():
    """A model whose embedding is on the second GPU takes its tokens there."""
    places = {**split("llama", 2), "model.embed_tokens": 1}
    with fake_gpus():
        done = run_engine(Engine(FlatForward(fake_model("llama", places)), EOS), mixed_requests()[:3])
    assert not [c.error for c in done.values() if c.error]


def test_a_gpu_has_limits_of_its_own(tiny_model):
    with fake_gpus():
        forward = FlatForward(fake_model("llama", ONE))
        rectangle, _ = forward.prefill(samples(5), None, 1 << 20)
        assert (forward.limits, rectangle.width) == (GPU, 5 + GPU.chunk)
    assert FlatForward(copy.deepcopy(tiny_model("llama"))).limits == CPU
