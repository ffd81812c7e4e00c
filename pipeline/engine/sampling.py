"""Choose the next token of every row, each row with its own parameters; vectorised over rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.common.request import TokenLogprob
from pipeline.engine.cpu import load_kernels
from pipeline.engine.masks import Forbidden
from pipeline.engine.scheduler import Sample
from pipeline.engine.upload import upload

# Said with the tokens, so that nobody waits for it:
NONE = -1  # the token of a row whose logits are not finite
AGAIN = -2  # of a row whose filters reach beyond the HEAD: it is to be chosen again, from all
HEAD = 1024  # the most probable tokens, sorted first: nearly always all that the filters keep


@dataclass(frozen=True, slots=True)
class Report:
    """Hold the log-probabilities that some rows of a batch asked for, still on the device."""

    rows: list[int]  # K of the batch's rows
    own: Tensor  # [K] float32, of the chosen token
    values: Tensor  # [K, most asked for] float32, falling
    ids: Tensor  # [K, most asked for] int64, the tokens they belong to


def next_tokens(logits: Tensor, samples: Sequence[Sample], forbidden: Forbidden | None = None) -> list[int]:
    """Choose a token for each row, and record its logprobs in the sample where they were asked for.

    Args:
        logits: [B, V], any float dtype.
        samples: B rows, in the same order.
        forbidden: what rows with a constraint may not take.
    """
    seen = seen_tokens(samples, logits) if penalises(samples) else None
    tokens = choose(logits, samples, [len(s.token_ids) for s in samples], seen, forbidden)
    chosen: list[int] = tokens.tolist()
    if reported := report(logits, tokens, samples):
        record(reported, chosen, samples)
    return chosen


def choose(
    logits: Tensor,
    samples: Sequence[Sample],
    steps: Sequence[int],
    seen: Tensor | None = None,
    forbidden: Forbidden | None = None,
    *,
    waits: bool = True,
) -> Tensor:
    """Choose the next token of each row, on the logits' device; NONE where they are not finite. [B, V] → [B] int64.

    Args:
        steps: how many tokens each row has made before.
        seen: [B, V] bool, the tokens of prompt and completion, where `penalises` says so.
        forbidden: what rows with a constraint may not take.
        waits: for the device, to see whether the HEAD is enough. Else AGAIN stands where it was not.
    """
    params = [s.request.params for s in samples]
    reported = any(p.logprobs is not None for p in params)  # of the logits as they are
    scores = logits if forbidden is None else forbidden.apply(logits, keep=reported)
    if seen is not None:
        scores = _penalise(scores, [p.repetition_penalty for p in params], seen)
    sampled = [r for r, p in enumerate(params) if not p.greedy]
    if len(sampled) == len(params):
        return _draw(scores.float(), samples, steps, waits)
    tokens = argmax(scores)
    if sampled:
        index = upload(sampled, logits.device)
        drawn = [samples[r] for r in sampled]
        tokens[index] = _draw(scores[index].float(), drawn, [steps[r] for r in sampled], waits)
    return _give_forced(tokens, samples, steps)


def _give_forced(tokens: Tensor, samples: Sequence[Sample], steps: Sequence[int]) -> Tensor:
    """Put the tokens that some rows are given in the place of chosen ones; NONE stays. [B] int64 → [B] int64."""
    given = {row: s.forced[steps[row]] for row, s in enumerate(samples) if s.forced}
    if given:
        rows, ids = upload([list(given), list(given.values())], tokens.device)
        tokens[rows] = torch.where(tokens[rows] == NONE, NONE, ids)
    return tokens


def argmax(scores: Tensor, block: int = 128) -> Tensor:
    """Compute `scores.argmax(-1)`, the first of equals, or NONE where it is not finite. [B, V] → [B] int64.

    First the block with the largest score, then its place there: on a CPU in bf16, 9 times faster. A kernel
    does both at once where there is one.
    """
    rows, vocabulary = scores.shape
    plain = scores.dtype == torch.bfloat16 and scores.device.type == "cpu" and scores.is_contiguous()
    if plain and (kernels := load_kernels()):
        places: Tensor = kernels.argmax(scores)
        return _finite(places, scores.gather(1, places[:, None])[:, 0])
    if vocabulary % block:
        return _finite(scores.argmax(-1), scores.amax(-1))
    blocks = scores.reshape(rows, vocabulary // block, block)
    highest = blocks.amax(-1)
    best = highest.argmax(-1)
    inside = blocks[torch.arange(rows, device=scores.device), best].argmax(-1)
    return _finite(best * block + inside, highest.amax(-1))


def _finite(tokens: Tensor, highest: Tensor) -> Tensor:
    """Take tokens whose highest score is a finite number. Both [B]; a NaN is the highest of all."""
    return tokens.masked_fill(highest.isfinite().logical_not(), NONE)


def uniform(seed: int, request_id: str, sample: int, step: int) -> float:
    """Draw a number in [0, 1) that depends on its arguments alone.

    It is a counter-based generator: the step is the counter, the rest the key, BLAKE2b the bijection's stand-in.
    A row's draws do not depend on its neighbours, the batch size, the order, the shard or a restart.
    """
    key = hashlib.blake2b(f"{seed}/{sample}/{step}/{request_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(key, "big") >> 11) * 2.0**-53


def penalises(samples: Sequence[Sample]) -> bool:
    """Say whether a row has a repetition penalty."""
    return any(s.request.params.repetition_penalty != 1 for s in samples)


def seen_tokens(samples: Sequence[Sample], like: Tensor) -> Tensor:
    """Mark the tokens that each row has, prompt and completion. [B, V] bool, like `like`, on its device."""
    longest = max(s.length for s in samples)
    ids = [(*s.all_token_ids, *[s.request.prompt_token_ids[0]] * (longest - s.length)) for s in samples]
    seen = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    return seen.scatter_(1, upload(ids, like.device), True)


def _penalise(logits: Tensor, penalties: list[float], seen: Tensor) -> Tensor:
    """Penalise tokens of prompt and completion (Keskar et al. 2019, CTRL). → float32, a copy."""
    scores, penalty = logits.float(), _column(penalties, logits)
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _draw(logits: Tensor, samples: Sequence[Sample], steps: Sequence[int], waits: bool) -> Tensor:
    """Draw a token for each row by inverting its cumulative distribution.

    Args:
        logits: [B, V] float32.
        waits: as for `choose`.

    Returns:
        tokens: [B] int64.
    """
    params = [s.request.params for s in samples]
    # Falling from 0, so that a temperature near 0 gives -inf below the best token, and not inf / inf.
    coldest = torch.finfo(torch.float32).tiny
    columns = [
        (
            max(p.temperature, coldest),
            uniform(p.seed, s.request.id, s.index, step),
            p.top_k,
            p.top_p,
            p.min_p,
        )
        for p, s, step in zip(params, samples, steps, strict=True)
    ]
    temperatures, draws, *filters = upload(columns, logits.device, torch.float32).T[:, :, None]
    highest = logits.amax(-1, True)
    logits = (logits - highest) / temperatures
    rest = [r for r, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    filtered = [samples[r] for r in rest]
    if len(rest) == len(params):
        return _finite(_draw_filtered(logits, draws, filters, filtered, waits), highest[:, 0])
    tokens = _invert(torch.softmax(logits, -1), draws)
    if rest:
        i = upload(rest, logits.device)
        tokens[i] = _draw_filtered(logits[i], draws[i], [f[i] for f in filters], filtered, waits)
    return _finite(tokens, highest[:, 0])


def _draw_filtered(
    logits: Tensor, draws: Tensor, filters: list[Tensor], samples: Sequence[Sample], waits: bool
) -> Tensor:
    if waits:
        probabilities, ids = filtered_probabilities(logits, *filters)
        return ids.gather(1, _invert(probabilities, draws)[:, None])[:, 0]
    widest = max(s.request.params.top_k for s in samples)
    size = logits.shape[-1] if any(s.reaches for s in samples) else max(HEAD, widest)
    probabilities, ids, reaches = _filter_head(logits, size, *filters)
    tokens = ids.gather(1, _invert(probabilities, draws)[:, None])[:, 0]
    return tokens.masked_fill(reaches, AGAIN)


def filtered_probabilities(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Filter by top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024).

    Only the HEAD most probable tokens are sorted, unless a row's filters reach further.

    Args:
        logits: [B, V] float32, already divided by the temperature.
        top_k, top_p, min_p: [B, 1] float32; 0, 1 and 0 keep everything.

    Returns:
        probabilities: [B, K], falling; 0 where filtered out; not normalised.
        ids: [B, K] int64, the tokens they belong to.
    """
    probabilities, ids, reaches = _filter_head(logits, max(HEAD, int(top_k.max())), top_k, top_p, min_p)
    if bool(reaches.any()):
        probabilities, ids, _ = _filter_head(logits, logits.shape[-1], top_k, top_p, min_p)
    return probabilities, ids


def _filter_head(
    logits: Tensor, size: int, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Filter the `size` most probable tokens, K in all; say, [B] bool, whose filters reach further."""
    size = min(logits.shape[-1], size)
    values, ids = logits.topk(size)
    rank = torch.arange(size, device=logits.device)
    values = values.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
    total = torch.where(top_k > 0, values.logsumexp(-1, True), logits.logsumexp(-1, True))
    p = torch.exp(values - total)
    below = p.cumsum(-1) - p  # the mass of the more probable tokens
    reaches = (top_k == 0) & (below[:, -1:] + p[:, -1:] < top_p) & (p[:, -1:] >= min_p * p[:, :1])
    keep = (below < top_p) & (p >= min_p * p[:, :1])
    keep[:, 0] = True
    return p * keep, ids, reaches[:, 0] & (size < logits.shape[-1])


def _invert(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Find the index at which each row's cumulative sum passes draw × total. [B, K], [B, 1] → [B]."""
    cumulative = probabilities.cumsum(-1)
    index = (cumulative <= draws * cumulative[:, -1:]).sum(-1)
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)  # rounding must not reach a token of probability 0


def _column(values: list[float] | list[int], like: Tensor) -> Tensor:
    """Bring one number a row to a device. → [B, 1] float32."""
    return upload(values, like.device, torch.float32)[:, None]


def report(logits: Tensor, tokens: Tensor, samples: Sequence[Sample]) -> Report | None:
    """Report the chosen token's logprob and the likeliest tokens of the rows that ask; None if none does.

    Args:
        logits: [B, V]; tokens: [B] int64, the chosen ones.
    """
    rows = [r for r, s in enumerate(samples) if s.request.params.logprobs is not None]
    if not rows:
        return None
    index = upload(rows, logits.device)
    logprobs = torch.log_softmax(logits[index].float(), -1)
    most = max(samples[r].request.params.logprobs or 0 for r in rows)
    values, ids = logprobs.topk(min(most, logits.shape[-1]))
    return Report(rows, logprobs.gather(1, tokens[index].clamp(min=0)[:, None])[:, 0], values, ids)


def record(reported: Report, chosen: Sequence[int], samples: Sequence[Sample | None]) -> None:
    """Append a report to the samples: the batch's chosen tokens and samples, in its order.

    Nothing where a token is to be chosen again, or where there is no sample any more.
    """
    lists = (t.tolist() for t in (reported.own, reported.values, reported.ids))
    for row, own, values, ids in zip(reported.rows, *lists, strict=True):
        sample = samples[row]
        if sample is None or chosen[row] == AGAIN:
            continue
        count = sample.request.params.logprobs
        top = tuple(zip(ids[:count], values[:count], strict=True))
        sample.logprobs.append(TokenLogprob(chosen[row], own, top))
