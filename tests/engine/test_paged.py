"""Pages: who holds them, what a step tells the device, and that it can be recorded as a graph."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from engine_runs import EOS, alone, mixed_requests, run, run_engine, shuffled, tokens
from fake_gpus import fake_gpus, fake_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.common.request import GenerationParams, Request
from pipeline.engine import sampling
from pipeline.engine.engine import Engine
from pipeline.engine.limits import PAGE
from pipeline.engine.paged import batch as batch_module
from pipeline.engine.paged import forward as forward_module
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.paged.pages import Pages, pages_for, places
from pipeline.engine.paged.passes import Segment
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.engine.scheduler import Sample


def test_a_page_is_free_when_its_last_holder_lets_it_go():
    pages = Pages(4)
    first = pages.take(3)
    assert pages.free == 1
    assert len({*first, *pages.take(1)}) == 4
    assert 0 not in first, "that is the scratch page"
    shared = pages.share(first[:2])
    pages.release(first)
    assert pages.free == 1
    pages.release(shared)
    assert pages.free == 3


def test_what_is_written_stays_when_pages_are_added():
    pages = Pages(2)
    key = torch.arange(8.0).view(1, 2, 4)
    keys, values = pages.layer(0, key, 2 * key)
    page = pages.take(1)[0]
    keys[page, 5], values[page, 5] = key[0], 2 * key[0]
    pages.grow(3)
    assert (pages.count, pages.free, pages.keys[0].shape) == (5, 4, (6, PAGE, 2, 4))
    assert torch.equal(pages.keys[0][page, 5], key[0])
    assert torch.equal(pages.values[0][page, 5], 2 * key[0])
    assert page not in pages.take(4)


def test_columns_lie_in_their_rows_pages():
    assert [pages_for(columns) for columns in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
    assert places([7, 3], PAGE - 1, PAGE + 2).tolist() == [8 * PAGE - 1, 3 * PAGE, 3 * PAGE + 1]


class RecordedGraph:
    """A StepGraph for a CPU: the operators of one step, called again on the same tensors, wherever they lie.

    As in a graph of a GPU, what Python did between them is not done again.
    """

    recorded = 0

    def __init__(self, step: Callable[[Tensor], Any], control: Tensor, columns: int, memory: Any) -> None:
        RecordedGraph.recorded += 1
        self.rows, self.columns, self._control = len(control), columns, control
        step(control)
        tape: list[tuple[Any, Any, Any, Any]] = []

        class Tape(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                assert func is not torch.ops.aten._local_scalar_dense.default, "it waits for the device"
                made = func(*args, **(kwargs or {}))
                tape.append((func, args, kwargs or {}, made))
                return made

        with Tape():
            self._output = step(control)
        self._tape = tape

    def replay(self, control: Tensor) -> Any:
        self._control.copy_(control)
        for func, args, kwargs, made in self._tape:
            if any(made is argument for argument in args):  # written in place
                func(*args, **kwargs)
            elif isinstance(made, Tensor) and not _is_view(made, args):
                made.copy_(func(*args, **kwargs))
        return self._output


def _is_view(made: Tensor, args: Any) -> bool:
    stores = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
    return made.untyped_storage().data_ptr() in stores


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_a_step_can_be_recorded_and_replayed(tiny_model, monkeypatch, name):
    monkeypatch.setattr(forward_module, "StepGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "recorded", 0)
    forward = PagedForward(copy.deepcopy(tiny_model(name)))
    monkeypatch.setattr(forward, "_captures", True)
    requests = mixed_requests()
    engine = Engine(forward, EOS, max_rows=7)
    done = tokens(run_engine(engine, shuffled(requests, 3)))
    assert done == {(r.id, 0): alone(tiny_model(name), r) for r in requests}
    assert 2 <= RecordedGraph.recorded < 12 < engine.stats.steps


def test_a_step_that_cannot_be_recorded_is_launched_kernel_by_kernel(tiny_model, monkeypatch, caplog):
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(forward_module, "StepGraph", refuse)
    forward = PagedForward(copy.deepcopy(tiny_model("llama")))
    monkeypatch.setattr(forward, "_captures", True)
    requests = mixed_requests()[:4]
    assert tokens(run(forward, requests)) == {(r.id, 0): alone(tiny_model("llama"), r) for r in requests}
    assert caplog.text.count("cannot be recorded") == 1


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_decode_step_is_one_upload_and_one_download(name):
    requests = [Request(f"{n}", tuple(range(n)), GenerationParams(max_new_tokens=50)) for n in (5, 9, 40)]
    with fake_gpus() as traffic:
        engine = Engine(PagedForward(fake_model(name, {"": 0})), frozenset(), share_prefix=False)
        steps = engine.steps(requests)
        while engine.stats.steps < 2:
            next(steps)
        for _ in range(3):
            traffic.count.clear()
            next(steps)
            assert dict(traffic.count) == {"up": 1, "down": 1}


def test_a_step_with_filtered_draws_waits_for_nothing_else():
    params = GenerationParams(
        max_new_tokens=50, temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=2
    )
    requests = [Request(f"{n}", tuple(range(n)), params) for n in (5, 9, 40)]
    requests.append(
        Request("top_k", (1, 2, 3), GenerationParams(max_new_tokens=50, temperature=1.0, top_k=7))
    )
    requests.append(Request("plain", (1, 2, 4), GenerationParams(max_new_tokens=50, temperature=1.0)))
    with fake_gpus() as traffic:
        engine = Engine(PagedForward(fake_model("llama", {"": 0})), frozenset(), share_prefix=False)
        steps = engine.steps(requests)
        while engine.stats.steps < 2:
            next(steps)
        traffic.count.clear()
        next(steps)
        assert traffic.count["down"] == 1 + 3, "the tokens; and the three parts of a report"


@pytest.mark.parametrize("top_p", [0.5, 0.95])
def test_a_filter_that_reaches_beyond_the_head_is_the_one_of_rectangles(tiny_model, monkeypatch, top_p):
    monkeypatch.setattr(sampling, "HEAD", 4)
    again: list[int] = []

    def choose(*args: Any, **settings: Any) -> Tensor:
        tokens = sampling.choose(*args, **settings)
        again.append(int((tokens == sampling.AGAIN).sum()))
        return tokens

    monkeypatch.setattr(batch_module, "choose", choose)
    params = GenerationParams(max_new_tokens=12, temperature=1.0, top_p=top_p, n=3, logprobs=2)
    requests = [Request(r.id, r.prompt_token_ids, params) for r in mixed_requests()[:6]]
    peaked = GenerationParams(max_new_tokens=12, temperature=0.01, top_p=top_p)
    requests += [Request(f"{r.id} peaked", r.prompt_token_ids, peaked) for r in mixed_requests()[:4]]
    expected = run(FlatForward(copy.deepcopy(tiny_model("llama"))), requests)
    done = run(PagedForward(copy.deepcopy(tiny_model("llama"))), requests)
    assert 0 < sum(again) <= 2 * len(done), "once at most, and in the step that was launched meanwhile"
    assert tokens(done) == tokens(expected)
    for key, completion in done.items():
        ids = [[p.token_id for p in c.logprobs or ()] for c in (completion, expected[key])]
        assert ids[0] == ids[1], key


def test_a_prefill_goes_up_once_whatever_the_number_of_layers():
    with fake_gpus() as traffic:
        forward = PagedForward(fake_model("gemma3_text", {"": 0}))
        forward.open(4, 2)
        pages = [forward.pages.take(2) for _ in range(2)]
        traffic.count.clear()
        forward.prefill([Segment(range(9), pages[0], 0, 9), Segment(range(40), pages[1], 32, 40)], [0, 1])
        assert dict(traffic.count) == {"up": 2}, "tokens with their places, and which logits are wanted"


def test_layers_on_two_gpus_are_not_for_pages():
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    with fake_gpus(), pytest.raises(NotImplementedError, match="several devices"):
        PagedForward(fake_model("llama", places))


class ScarcePages(PagedForward):
    """The real forward pass; memory runs out at these launches, counted from 1, before or after the work."""

    def __init__(self, model: Any, numbers: set[int], late: bool = False) -> None:
        super().__init__(copy.deepcopy(model))
        self._numbers, self._late, self.launches, self.failures = numbers, late, 0, 0

    def prefill(self, *arguments: Any) -> Tensor:
        return self._guarded(lambda: super(ScarcePages, self).prefill(*arguments))

    def decode(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._guarded(lambda: super(ScarcePages, self).decode(*arguments))

    def _guarded(self, work: Callable[[], Any]) -> Any:
        self.launches += 1
        full = self.launches in self._numbers
        result = work() if self._late or not full else None
        if full:
            self.failures += 1
            raise RuntimeError("CUDA error: out of memory")
        return result


@pytest.mark.parametrize("late", [False, True], ids=["before the work", "after it"])
def test_no_token_is_lost_when_memory_runs_out(each_tiny_model, late):
    # The first launch is the prefix, and so are the 4th and 25th, after others have run out of memory.
    scarce = ScarcePages(each_tiny_model, {1, 3, 4, 24, 25}, late)
    requests = mixed_requests(prefix_tokens=40)
    engine = Engine(scarce, EOS, prefill_tokens=100)
    done = tokens(run_engine(engine, requests))
    assert scarce.failures == 5
    assert done == {(r.id, 0): alone(each_tiny_model, r) for r in requests}
    assert engine.live == []


def test_a_row_that_never_fits_is_given_up(tiny_model):
    scarce = ScarcePages(tiny_model("llama"), set(range(1, 10_000)))
    done = run(scarce, mixed_requests()[:5])
    assert len(done) == 5
    assert all("out of memory even alone" in str(c.error) for c in done.values())


def test_sampled_text_and_logprobs_are_unchanged_by_running_out_of_memory(tiny_model):
    params = GenerationParams(max_new_tokens=20, temperature=1.0, n=3, logprobs=2, repetition_penalty=1.2)
    requests = [Request(r.id, r.prompt_token_ids, params) for r in mixed_requests()]
    calm = run(PagedForward(copy.deepcopy(tiny_model("llama"))), requests)
    done = run(ScarcePages(tiny_model("llama"), {2, 7, 30}, late=True), requests)
    assert tokens(done) == tokens(calm)
    for key, completion in done.items():
        ids = [[p.token_id for p in c.logprobs or ()] for c in (completion, calm[key])]
        assert ids[0] == ids[1], key
        assert ids[0][: len(completion.token_ids)] == list(completion.token_ids), key


def test_a_row_longer_than_all_others_before_it_gets_its_pages(tiny_model):
    requests = [Request("short", tuple(range(60, 70)), GenerationParams(max_new_tokens=3))]
    requests.append(Request("long", tuple(range(60, 280)), GenerationParams(max_new_tokens=100)))
    forward = PagedForward(copy.deepcopy(tiny_model("llama")))
    done = tokens(run(forward, requests, max_tokens=64, window=1))
    assert done == {(r.id, 0): alone(tiny_model("llama"), r) for r in requests}


def test_no_row_is_lost_when_there_is_no_memory_for_more_pages(tiny_model):
    class Full(PagedForward):
        asked = 0

        def grow(self, pages: int) -> None:
            self.asked += 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    requests = [Request("short", tuple(range(60, 70)), GenerationParams(max_new_tokens=9))]
    requests.append(Request("long", tuple(range(60, 280)), GenerationParams(max_new_tokens=100)))
    forward = Full(copy.deepcopy(tiny_model("llama")))
    done = tokens(run(forward, requests, window=1))
    assert forward.asked == 1
    assert done == {(r.id, 0): alone(tiny_model("llama"), r) for r in requests}


def test_copies_share_whole_pages_and_retire_in_any_order(tiny_model):
    prompt = mixed_requests(prefix_tokens=40)[4].prompt_token_ids
    params = GenerationParams(max_new_tokens=70, n=6, temperature=1.0)  # some meet an end early
    forward = PagedForward(copy.deepcopy(tiny_model("llama")))
    together = tokens(run(forward, [Request("s", prompt, params)], max_rows=6))
    apart = tokens(run(forward, [Request("s", prompt, params)], max_rows=1))
    assert together == apart
    assert len({len(ids) for ids in together.values()}) > 1


def test_pages_are_all_free_at_the_end_of_a_run(tiny_model):
    forward = PagedForward(copy.deepcopy(tiny_model("llama")))
    engine = Engine(forward, EOS, max_rows=5)
    free = []
    for _ in engine.steps(mixed_requests(prefix_tokens=40)):
        free.append((forward.pages.count - forward.pages.free, len(engine.live)))
    assert max(held for held, _ in free) > 5
    assert free[-1] == (0, 0), "what nobody waits for is freed, the prefix too"


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_probe_takes_pages_where_asked_and_says_so(tiny_model, name):
    from pipeline.engine.probe import choose_forward

    forward, found = choose_forward(copy.deepcopy(tiny_model(name)), "pages")
    assert isinstance(forward, PagedForward)
    assert found["path"] == "pages"
    assert found["max_logit_difference"] < 0.001


def test_what_a_sample_counts_for_is_its_pages_at_its_longest(tiny_model):
    engine = Engine(PagedForward(copy.deepcopy(tiny_model("llama"))), EOS)
    for prompt, new, pages in ((1, 1, 1), (PAGE, 1, 1), (PAGE, 2, 2), (10, 2 * PAGE, 3)):
        sample = Sample(Request("", (1,) * prompt, GenerationParams(max_new_tokens=new)), 0)
        assert engine._batch.tokens_of(sample) == pages * PAGE
