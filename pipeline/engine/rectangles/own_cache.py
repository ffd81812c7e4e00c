"""Run rows of equal length through the cache that a model makes for itself: recurrent, hybrid and sparse models.

Such a cache holds more than keys and values (states, convolutions, what an indexer keeps), and only the model knows
what. It is asked for one thing, to select rows. Each prefill's group stays by itself until its last row ends.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from pipeline.engine.limits import own_cache_limits
from pipeline.engine.model_facts import cache_name, input_device
from pipeline.engine.rectangles.rectangle import Rectangle
from pipeline.engine.scheduler import Sample
from pipeline.engine.thresholds import forget_lengths
from pipeline.engine.upload import upload

CACHE_LAYERS = CacheLayerMixin, LinearAttentionCacheLayerMixin


@dataclass(eq=False)
class CacheGroup(Rectangle):
    """Hold rows of equal length, and the model's own cache of them; None before the first pass of some models."""

    cache: Any = None

    @property
    def columns(self) -> int:
        return len(self.rows) * (self.head + 1)

    @property
    def shape(self) -> tuple[int, int, bool]:
        return len(self.rows), self.head, True

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in cache_tensors(self.cache))

    def retire(self, row: int) -> None:
        """Drop a row: the last one takes its place."""
        index = list(range(len(self.rows)))
        index[row] = index[-1]
        self.rows, self.starts = [self.rows[i] for i in index[:-1]], self.starts[:-1]
        if self.rows:
            self.cache = _select(self.cache, index[:-1])

    def repeat(self, samples: list[list[Sample]]) -> None:
        self.cache = _select(self.cache, [i for i, copies in enumerate(samples) for _ in copies])
        self.rows = [sample for copies in samples for sample in copies]
        self.starts = [0] * len(self.rows)


class CacheForward:
    """Feed one group of rows of equal length a pass, through the model's own cache and without a mask."""

    can_share_prefix = False
    equal_lengths = True

    def __init__(self, model: Any) -> None:
        self.config = model.config.get_text_config(decoder=True)
        self._model = model
        self._device = input_device(model)
        self.limits = own_cache_limits(self._device.type)
        takes = inspect.signature(model.forward).parameters
        self._name = cache_name(model)
        self._takes_position_ids = "position_ids" in takes
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def prefill(
        self, rows: list[Sample], prefix: Rectangle | None, max_tokens: int
    ) -> tuple[Rectangle, Tensor]:
        group = CacheGroup(rows, [0] * len(rows), 0, 0, (), self.limits, cache=new_cache(self._model))
        logits = self._run(group, [list(s.all_token_ids) for s in rows])
        group.head = rows[0].length
        return group, logits

    def decode(self, rectangles: Sequence[Rectangle]) -> Tensor:
        return torch.cat([self._run(group, [s.token_ids[-1:] for s in group.rows]) for group in rectangles])

    def _run(self, group: Any, ids: list[list[int]]) -> Tensor:
        """Run the next columns of one group. ids: [R, T] → logits [R, V]."""
        forget_lengths(self._model)  # rows of another length have run before
        given: dict[str, Any] = dict(self._last_only)
        if group.cache is not None:
            given[self._name] = group.cache
        if self._takes_position_ids:
            positions = torch.arange(group.head, group.head + len(ids[0]), device=self._device)
            given["position_ids"] = positions.expand(len(ids), -1)
        output = self._model(input_ids=upload(ids, self._device), use_cache=True, **given)
        group.cache = output.get(self._name, group.cache)  # some hand nothing back: the one given is filled
        logits: Tensor = output.logits[:, -1]
        return logits


def new_cache(model: Any) -> Any:
    """Make an empty cache; None where the model's first pass makes it."""
    config = model.config.get_text_config(decoder=True)
    return DynamicCache(config=config) if model._supports_default_dynamic_cache() else None


def _select(held: Any, rows: list[int]) -> Any:
    """Select rows of a cache or of a part of one, in this order: by its own verb, and of what that leaves as it is."""
    if isinstance(held, Tensor):
        return held.index_select(0, upload(rows, held.device))
    if isinstance(held, list | tuple):
        return type(held)(_select(part, rows) for part in held)
    if isinstance(held, dict):
        return {key: _select(part, rows) for key, part in held.items()}
    if isinstance(held, Cache):
        held.reorder_cache(torch.tensor(rows))  # type: ignore[arg-type]
    if _is_cache(held):
        for name, part in vars(held).items():
            if name != "layers" and isinstance(part, list | dict):
                setattr(held, name, _select(part, rows))
    return held


def cache_tensors(held: Any) -> Iterator[Tensor]:
    """Find the tensors of a cache, or of a part of one."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for part in held.values():
            yield from cache_tensors(part)
    elif isinstance(held, list | tuple):
        for part in held:
            yield from cache_tensors(part)
    elif _is_cache(held):
        yield from cache_tensors(vars(held))


def _is_cache(held: Any) -> bool:
    """Say whether it is a cache, or one of its layers."""
    return "Cache" in type(held).__name__ or isinstance(held, CACHE_LAYERS)
