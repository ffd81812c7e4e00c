"""Compute confidence intervals, 95 % by default, in plain numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z = 1.959964  # the normal distribution's 97.5 % point


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its interval; the ends are None where one row is all there is."""

    value: float
    low: float | None
    high: float | None

    def exp(self) -> "Interval":
        """Return the interval of e to the power of it, as perplexity is of a mean negative log-likelihood."""
        return Interval(*(None if x is None else _exp(x) for x in (self.value, self.low, self.high)))  # type: ignore[arg-type]


def proportion(hits: int, of: int) -> Interval | None:
    """Estimate a rate; None of none. Wilson's score interval (1927), which stays inside 0 and 1."""
    if of == 0:
        return None
    rate, spread = hits / of, Z * Z / of
    middle = (rate + spread / 2) / (1 + spread)
    half = Z * math.sqrt(rate * (1 - rate) / of + spread / of / 4) / (1 + spread)
    return Interval(rate, min(rate, max(0.0, middle - half)), max(rate, min(1.0, middle + half)))


def mean_over_rows(rows: Iterable[tuple[float, int]]) -> Interval | None:
    """Estimate a mean per token, from each row's sum and its number of tokens; None of no tokens.

    Tokens of one completion depend on each other, so rows are the sample: the variance of a ratio
    estimator (Cochran 1977, 2.39), which is wider than one that takes tokens for independent.
    """
    sums, counts = [], []
    for total, count in rows:
        if count:
            sums.append(total)
            counts.append(count)
    tokens, clusters = sum(counts), len(counts)
    if tokens == 0:
        return None
    mean = math.fsum(sums) / tokens
    if clusters == 1:
        return Interval(mean, None, None)
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    half = Z * math.sqrt(clusters / (clusters - 1) * squares) / tokens
    return Interval(mean, mean - half, mean + half)


def share_over_rows(rows: Iterable[tuple[float, int]]) -> Interval | None:
    """Estimate the same of a share, whose interval ends at 0 and 1."""
    found = mean_over_rows(rows)
    if found is None or found.low is None or found.high is None:
        return found
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high))


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # beyond it no float is left
