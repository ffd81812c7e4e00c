"""The next token of every row, each row with its own parameters; vectorised over rows."""

import hashlib
from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from pipeline.engine.cpu.fused_model import load_kernels
from pipeline.engine.scheduler import Sequence
from pipeline.request import TokenLogprob

HEAD = 1024  # the most probable tokens, sorted first: nearly always all that the filters keep


def next_tokens(logits: Tensor, sequences: Ordered[Sequence]) -> list[int]:
    """Choose a token for each row, and record its logprobs in the sequence where they were asked for.

    Args:
        logits: [B, V], any float dtype.
        sequences: B rows, in the same order.
    """
    params = [s.request.params for s in sequences]
    scores = _penalise(logits, [r for r, p in enumerate(params) if p.repetition_penalty != 1], sequences)
    tokens = argmax(scores)
    if sampled := [r for r, p in enumerate(params) if not p.greedy]:
        tokens[sampled] = _sample(scores[sampled].float(), [sequences[r] for r in sampled])
    chosen: list[int] = tokens.tolist()
    if reported := [r for r, p in enumerate(params) if p.logprobs is not None]:
        _record_logprobs(logits[reported], [chosen[r] for r in reported], [sequences[r] for r in reported])
    return chosen


def argmax(scores: Tensor, block: int = 128) -> Tensor:
    """`scores.argmax(-1)`, the first of equals; [B, V] → [B] int64.

    First the block with the largest score, then its place there: on a CPU in bf16, 9 times faster. A kernel
    does both at once where there is one.
    """
    rows, vocabulary = scores.shape
    plain = scores.dtype == torch.bfloat16 and scores.device.type == "cpu" and scores.is_contiguous()
    if plain and (kernels := load_kernels()):
        places: Tensor = kernels.argmax(scores)
        return places
    if vocabulary % block:
        return scores.argmax(-1)
    blocks = scores.reshape(rows, vocabulary // block, block)
    best = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(rows, device=scores.device), best].argmax(-1)
    return best * block + inside


def uniform(seed: int, request_id: str, sample: int, step: int) -> float:
    """A number in [0, 1) that depends on its arguments alone.

    A counter-based generator: the step is the counter, the rest the key, BLAKE2b the bijection's stand-in.
    So a row's draws do not depend on its neighbours, the batch size, the order, the shard or a restart.
    """
    key = hashlib.blake2b(f"{seed}/{sample}/{step}/{request_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(key, "big") >> 11) * 2.0**-53


def _penalise(logits: Tensor, rows: list[int], sequences: Ordered[Sequence]) -> Tensor:
    """Repetition penalty on tokens of prompt and completion (Keskar et al. 2019, CTRL)."""
    if not rows:
        return logits
    scores = logits.float()  # as a copy, so that logprobs are those of the model
    scores = scores.clone() if scores is logits else scores
    for row in rows:
        seen = torch.tensor(sorted(set(sequences[row].all_token_ids)), device=logits.device)
        score = scores[row, seen]
        penalty = sequences[row].request.params.repetition_penalty
        scores[row, seen] = torch.where(score < 0, score * penalty, score / penalty)
    return scores


def _sample(logits: Tensor, sequences: Ordered[Sequence]) -> Tensor:
    """Draw a token for each row by inverting its cumulative distribution.

    Args:
        logits: [B, V] float32.

    Returns:
        tokens: [B] int64.
    """
    params = [s.request.params for s in sequences]
    # Falling from 0, so that a temperature near 0 gives -inf below the best token, and not inf / inf.
    coldest = torch.finfo(torch.float32).tiny
    temperatures = _column([max(p.temperature, coldest) for p in params], logits)
    logits = (logits - logits.amax(-1, True)) / temperatures
    draws = _column([uniform(p.seed, s.request.id, s.sample, len(s.token_ids)) for p, s in
                     zip(params, sequences, strict=True)], logits)  # fmt: skip
    tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    filtered = [p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params]
    if plain := [r for r, f in enumerate(filtered) if not f]:
        tokens[plain] = _invert(torch.softmax(logits[plain], -1), draws[plain])
    if rest := [r for r, f in enumerate(filtered) if f]:
        probabilities, ids = filtered_probabilities(
            logits[rest],
            _column([params[r].top_k for r in rest], logits),
            _column([params[r].top_p for r in rest], logits),
            _column([params[r].min_p for r in rest], logits),
        )
        tokens[rest] = ids.gather(1, _invert(probabilities, draws[rest])[:, None])[:, 0]
    return tokens


def filtered_probabilities(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """What top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) leave.

    Only the HEAD most probable tokens are sorted, unless a row's filters reach further.

    Args:
        logits: [B, V] float32, already divided by the temperature.
        top_k, top_p, min_p: [B, 1] float32; 0, 1 and 0 keep everything.

    Returns:
        probabilities: [B, K], falling; 0 where filtered out; not normalised.
        ids: [B, K] int64, the tokens they belong to.
    """
    vocabulary = logits.shape[-1]
    size = min(vocabulary, max(HEAD, int(top_k.max())))
    while True:
        values, ids = logits.topk(size)
        rank = torch.arange(size, device=logits.device)
        values = values.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
        total = torch.where(top_k > 0, values.logsumexp(-1, True), logits.logsumexp(-1, True))
        p = torch.exp(values - total)
        below = p.cumsum(-1) - p  # the mass of the more probable tokens
        reaches = (top_k == 0) & (below[:, -1:] + p[:, -1:] < top_p) & (p[:, -1:] >= min_p * p[:, :1])
        if size == vocabulary or not bool(reaches.any()):
            break
        size = vocabulary
    keep = (below < top_p) & (p >= min_p * p[:, :1])
    keep[:, 0] = True
    return p * keep, ids


def _invert(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The index at which the cumulative sum of each row passes draw × total. [B, K], [B, 1] → [B]."""
    cumulative = probabilities.cumsum(-1)
    index = (cumulative <= draws * cumulative[:, -1:]).sum(-1)
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)  # rounding must not reach a token of probability 0


def _column(values: list[float] | list[int], like: Tensor) -> Tensor:
    """[B, 1] float32."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _record_logprobs(logits: Tensor, chosen: list[int], sequences: Ordered[Sequence]) -> None:
    """Append the chosen token's logprob and the most probable alternatives to each sequence."""
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0].tolist()
    counts = [s.request.params.logprobs or 0 for s in sequences]
    values, ids = (t.tolist() for t in logprobs.topk(min(max(counts), logits.shape[-1])))
    for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        top = tuple(zip(ids[row][:count], values[row][:count], strict=True))
        sequence.logprobs.append(TokenLogprob(chosen[row], own[row], top))
