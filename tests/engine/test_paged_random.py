"""Random jobs in pages: the text of rectangles one row at a time, and every page and slot with one owner."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from engine_runs import EOS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.common.request import Completion, GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.limits import PAGE
from pipeline.engine.paged.batch import PagedBatch
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.forward import FlatForward


def text(token_ids: Sequence[int]) -> str:
    return "".join(chr(33 + token % 90) for token in token_ids)


class Scarce(PagedForward):
    """The real forward; memory runs out at some calls, before or after the work."""

    calls = 0
    full: frozenset[int] = frozenset()
    late = False

    def prefill(self, *arguments: Any) -> Any:
        return self._guarded(super().prefill, arguments)

    def decode(self, *arguments: Any) -> Any:
        return self._guarded(super().decode, arguments)

    def grow(self, *arguments: Any) -> Any:
        return self._guarded(super().grow, arguments)

    def assign(self, *arguments: Any) -> Any:
        return self._guarded(super().assign, arguments)

    def _guarded(self, work: Callable[..., Any], arguments: Any) -> Any:
        self.calls += 1
        made = work(*arguments) if self.late or self.calls not in self.full else None
        if self.calls in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made


@pytest.fixture(scope="module")
def ways(tiny_model: Callable[[str], Any]) -> dict[str, tuple[FlatForward, Scarce]]:
    models = {name: tiny_model(name) for name in ARCHITECTURES}
    return {n: (FlatForward(copy.deepcopy(m)), Scarce(copy.deepcopy(m))) for n, m in models.items()}


EDGES = st.sampled_from((1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, 100))
PARAMS = st.builds(
    GenerationParams,
    max_new_tokens=st.one_of(EDGES, st.integers(1, 40)),
    temperature=st.sampled_from((0.0, 0.0, 1.0)),
    top_k=st.sampled_from((0, 5)),
    top_p=st.sampled_from((1.0, 0.8)),
    repetition_penalty=st.sampled_from((1.0, 1.0, 1.3)),
    stop=st.sampled_from(([], [], ["ab", "A"])),
    n=st.integers(1, 3),
    logprobs=st.sampled_from((None, None, 0, 2)),
    ignore_eos=st.booleans(),
)
PROMPTS = st.builds(
    lambda shared, own, seed: (
        tuple(60 + i * 7 % 230 for i in range(shared)) + tuple(60 + i * seed % 230 for i in range(own))
    ),
    st.sampled_from((0, 20, PAGE, 70)),
    EDGES,
    st.integers(1, 5),
)
LIMITS = st.fixed_dictionaries(
    {
        "max_rows": st.integers(1, 9),
        "max_tokens": st.sampled_from((1, 100, 1 << 20)),
        "prefill_tokens": st.sampled_from((1, PAGE, 50, 2048)),
        "window": st.sampled_from((1, 3, 50)),
    }
)


# Without shrinking, which takes minutes: the requests of a failure are few.
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(
    name=st.sampled_from(sorted(ARCHITECTURES)),
    asked=st.lists(st.tuples(PROMPTS, PARAMS), min_size=1, max_size=8),
    limits=LIMITS,
    abandoned=st.integers(0, 9),
    full=st.frozensets(st.integers(1, 25), max_size=4),
    late=st.booleans(),
)
def test_random_jobs_in_pages(ways, name, asked, limits, abandoned, full, late):
    flat, forward = ways[name]
    requests = [Request(f"r{i}", prompt, params) for i, (prompt, params) in enumerate(asked)]
    expected = {(c.request_id, c.sample): c for c in Engine(flat, EOS, text, max_rows=1).generate(requests)}
    forward.full = frozenset()
    for _, _ in zip(range(abandoned), Engine(forward, EOS, text, **limits).steps(requests), strict=False):
        pass  # another run, given up
    forward.calls, forward.full, forward.late = 0, full, late
    engine = Engine(forward, EOS, text, **limits)
    done: list[Completion] = []
    for finished in engine.steps(iter(requests)):
        done += finished
        assert isinstance(engine._batch, PagedBatch)
        check_owners(engine._batch, forward)
    assert Counter((c.request_id, c.sample) for c in done) == Counter(list(expected))
    for made in done:
        wanted = expected[made.request_id, made.sample]
        if made.error is None or not full:
            assert (made.token_ids, made.finish_reason) == (wanted.token_ids, wanted.finish_reason)
            told = [[p.token_id for p in c.logprobs or ()] for c in (made, wanted)]
            assert told[0] == told[1]
    assert engine.live == []
    assert engine.stats.peak_rows <= limits["max_rows"]


def check_owners(batch: PagedBatch, forward: PagedForward) -> None:
    pages = forward.pages
    if pages.count:  # else all is given back
        shared = [page for prefix in batch._prefixes.stored for page in prefix]
        holders = Counter([0, *shared, *(page for row in batch._rows for page in row.pages)])
        assert pages._holders == [holders[page] for page in range(pages.count + 1)]
        assert sorted(pages._free) == [page for page in range(pages.count + 1) if not holders[page]]
        slots = [row.slot for row in batch._rows] + batch._slots
        assert sorted(slots) == list(range(len(slots))), "a slot is lost or held twice"
    for row in batch._rows:
        assert forward._table[row.slot, : len(row.pages)].tolist() == row.pages
