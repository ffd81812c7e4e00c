"""Let two models read the same tokens: how much less likely one finds them, and how far its predictions differ.

Teacher-forced, many rows in one pass: padded on the right, where causal attention never looks, with an
explicit mask. Both models are in memory, and the logits of one pass, whatever the number of rows.
What is measured is what llama.cpp's perplexity tool does with --kl-divergence; the intervals are wider,
because tokens of one row are not independent (see `mean_over_rows`).
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.common.intervals import Interval, mean_over_rows, proportion, share_over_rows

LOGITS_BYTES = 128 << 20  # of one pass, float32; each model's, and about as much again for the sums


@dataclass(frozen=True, slots=True)
class TextRow:
    """Hold tokens to read, of which those from `first` on are scored; at least one comes before."""

    token_ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class RowScore:
    """Hold one row's sums over its scored tokens, in nats."""

    tokens: int
    nll: float  # negative log-likelihood under the model
    baseline_nll: float
    same_top: int  # tokens where both find the same token most probable
    kl: "array[float]"  # of each token: KL(baseline ‖ model) over the whole vocabulary


@dataclass
class Scores:
    """Hold the scores of all rows."""

    rows: list[RowScore] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return plain data: means per token with 95 % intervals; the divergence's distribution; counts."""
        nll = mean_over_rows((row.nll, row.tokens) for row in self.rows)
        own = mean_over_rows((row.baseline_nll, row.tokens) for row in self.rows)
        ratio = mean_over_rows((row.nll - row.baseline_nll, row.tokens) for row in self.rows)
        tokens = sum(row.tokens for row in self.rows)
        if nll is None or own is None or ratio is None:
            return {"rows": 0, "tokens": 0}
        divergences = torch.tensor([kl for row in self.rows for kl in row.kl], dtype=torch.float64)
        return {
            "rows": len(self.rows),
            "tokens": tokens,
            "nll": asdict(nll),
            "perplexity": asdict(nll.exp()),
            "baseline_nll": asdict(own),
            "baseline_perplexity": asdict(own.exp()),
            "perplexity_ratio": asdict(ratio.exp()),
            "kl": _plain(mean_over_rows((sum(row.kl), row.tokens) for row in self.rows)),
            "kl_quantiles": {str(q): float(_quantile(divergences, q)) for q in (0.5, 0.9, 0.99, 1.0)},
            "top1": _plain(_top1(self.rows)),
        }


def score(model: Any, baseline: Any, rows: Iterable[TextRow]) -> Iterator[RowScore]:
    """Score each row, longest row first.

    Args:
        model, baseline: causal language models with one vocabulary, in eval mode; may be the same.

    Raises:
        ValueError: the vocabularies differ, or a row has nothing before its first scored token.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if vocabulary != baseline.get_output_embeddings().weight.shape[0]:
        raise ValueError("the two models have different vocabularies")
    for batch in passes(rows, max(1, LOGITS_BYTES // (4 * vocabulary))):
        token_ids, mask = pad_right([row.token_ids for row in batch])
        yield from _score_pass(model, baseline, batch, token_ids, mask)


def passes(rows: Iterable[TextRow], max_tokens: int) -> Iterator[list[TextRow]]:
    """Group rows of near-equal length, each at most `max_tokens` with its padding, or one row."""
    batch: list[TextRow] = []
    for row in sorted(rows, key=lambda row: len(row.token_ids), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Left-align token rows in one rectangle.

    Returns:
        token_ids: [B, T] int64, T = longest row; zeros fill the right.
        mask: [B, T] int64, 1 on tokens, 0 on padding.
    """
    width = max(map(len, rows))
    token_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(token_ids)
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return token_ids, mask


@torch.inference_mode()
def _score_pass(
    model: Any, baseline: Any, batch: Sequence[TextRow], token_ids: Tensor, mask: Tensor
) -> Iterator[RowScore]:
    """Score one pass. token_ids, mask: [B, T]. N is the number of scored tokens of all rows."""
    places = torch.arange(token_ids.shape[1])
    first = torch.tensor([row.first for row in batch])[:, None]
    if int(first.min()) < 1:
        raise ValueError("a row has no token before its first scored one")
    rows, columns = torch.nonzero((mask == 1) & (places >= first), as_tuple=True)  # [N]
    q = _logprobs(model, token_ids, mask, rows, columns - 1)  # [N, V]
    p = q if model is baseline else _logprobs(baseline, token_ids, mask, rows, columns - 1).to(q.device)
    wanted = token_ids[rows, columns].to(q.device)[:, None]
    nll, own = -q.gather(1, wanted)[:, 0], -p.gather(1, wanted)[:, 0]
    same = (q.argmax(-1) == p.argmax(-1)).tolist()
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    counts = torch.bincount(rows, minlength=len(batch)).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    for count, end in zip(counts, ends, strict=True):
        part = slice(end - count, end)
        yield RowScore(
            tokens=count,
            nll=float(nll[part].double().sum()),
            baseline_nll=float(own[part].double().sum()),
            same_top=sum(same[part]),
            kl=array("d", kl[part].double().clamp(min=0).tolist()),  # below 0 is rounding
        )


def _logprobs(model: Any, token_ids: Tensor, mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute what the model predicts after these places: [N, V] float32, natural logarithms."""
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=token_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    wanted = logits[rows.to(logits.device), columns.to(logits.device)]
    return torch.log_softmax(wanted.float(), -1)


def _top1(rows: Sequence[RowScore]) -> Interval | None:
    """Average by rows as the others; where all agree or none, that says nothing of the doubt: then Wilson's."""
    hits, tokens = sum(row.same_top for row in rows), sum(row.tokens for row in rows)
    if hits in (0, tokens):
        return proportion(hits, tokens)
    return share_over_rows((row.same_top, row.tokens) for row in rows)


def _quantile(values: Tensor, q: float) -> Tensor:
    """Find it by rank, because torch.quantile takes no more than 16 million values."""
    return values.sort().values[min(len(values) - 1, int(q * len(values)))]


def _plain(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else asdict(interval)
