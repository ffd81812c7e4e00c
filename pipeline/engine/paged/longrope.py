"""Choose short or long rotary frequencies for all tokens of a pass, without looking at the tokens.

transformers looks for a pass's largest position to choose between the two; the host knows it beforehand,
and a graph must not ask.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.model_facts import rope_switch
from pipeline.engine.thresholds import is_dynamic


class LongRope:
    """Keep both sets of a model's frequencies; a model without longrope has nothing to choose."""

    def __init__(self, model: Any) -> None:
        switch = rope_switch(model.config.get_text_config())
        modules = [] if switch is None else [m for m in model.modules() if hasattr(m, "inv_freq")]
        self._sets = [(module, _frequencies(module, switch or 0)) for module in modules]

    @contextmanager
    def chosen(self, long: bool) -> Iterator[None]:
        """Have the model use one set. Each set stays where it is, as a graph needs it."""
        before = [module.inv_freq for module, _ in self._sets]
        for module, sets in self._sets:
            module.inv_freq = sets[long]
            module.forward = partial(inspect.unwrap(type(module).forward), module)  # without the choice
        try:
            yield
        finally:
            for (module, _), frequencies in zip(self._sets, before, strict=True):
                module.inv_freq = frequencies
                del module.forward


def _frequencies(module: nn.Module, switch: int) -> tuple[Tensor, Tensor]:
    """Read the short and the long set, [D/2] each, as transformers chooses them by the position."""
    made: list[Tensor] = []
    for position in (0, switch):
        places = torch.tensor([[position]], device=module.inv_freq.device)  # type: ignore[arg-type]
        module(torch.zeros(1, 1, 1, device=places.device), places)
        made.append(module.inv_freq.clone())  # type: ignore[operator]
    module(torch.zeros(1, 1, 1, device=places.device), torch.zeros_like(places))  # as it was
    return made[0], made[1]


def check_rotary(config: Any) -> None:
    """Refuse rotary frequencies that depend on the longest row so far."""
    if is_dynamic(config):
        raise NotImplementedError("rotary frequencies that change with the length")
