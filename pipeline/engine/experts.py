"""Send tokens through the experts of a mixture."""

from collections.abc import Callable

import torch
from torch import Tensor


def send_through(
    hidden: Tensor, chosen: Tensor, weights: Tensor, count: int, one: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Send tokens through the experts that they chose, one expert after the other.

    An id beyond the experts, as some routers give to skip, adds nothing.

    Args:
        hidden: [T, D].
        chosen, weights: [T, K], the experts' ids, and what each one's output counts.
        count: of the experts.
        one: sends rows through one expert. [N, D] → [N, D].

    Returns:
        [T, D].
    """
    rows, ids, order = gather(hidden, chosen)
    results = torch.zeros_like(rows)
    begin = 0
    for expert, met in enumerate(torch.bincount(ids, minlength=count)[:count].tolist()):
        if met:
            results[begin : begin + met] = one(expert, rows[begin : begin + met])
        begin += met
    return weigh(results, weights, order, hidden)


def gather(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each expert of each token a row, sorted by expert, as transformers' grouped products are.

    Returns:
        the rows [T · K, D], their experts' ids [T · K], and the places [T · K] that they had.
    """
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    return hidden[order // chosen.shape[1]], ids, order


def weigh(results: Tensor, weights: Tensor, order: Tensor, hidden: Tensor) -> Tensor:
    """Put what the experts made of `gather`'s rows back, and add up each token's by weight. → as `hidden`, [T, D]."""
    weighted = results * weights.reshape(-1)[order, None]
    back = torch.empty_like(weighted)
    back[order] = weighted
    each = len(order) // max(1, len(hidden))
    return back.view(len(hidden), each, back.shape[-1]).sum(dim=1).to(hidden.dtype)
