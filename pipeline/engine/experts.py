"""Send tokens through the experts of a mixture, one expert after the other."""

from collections.abc import Callable

import torch
from torch import Tensor


def send_through(
    hidden: Tensor, chosen: Tensor, weights: Tensor, count: int, one: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Send tokens through the experts that they chose. hidden [T, D], chosen and weights [T, K] → [T, D].

    Sorted by expert, as transformers' grouped products are, so that each expert is met once. An id beyond the
    experts, as some routers give to skip, adds nothing.

    Args:
        count: of the experts.
        one: sends rows through one expert. [N, D] → [N, D].
    """
    tokens, each = chosen.shape
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    rows = hidden[order // each]
    results = torch.zeros_like(rows)
    begin = 0
    for expert, met in enumerate(torch.bincount(ids, minlength=count)[:count].tolist()):
        if met:
            results[begin : begin + met] = one(expert, rows[begin : begin + met])
        begin += met
    weighted = results * weights.reshape(-1)[order, None]
    back = torch.empty_like(weighted)
    back[order] = weighted
    return back.view(tokens, each, back.shape[-1]).sum(dim=1).to(hidden.dtype)
