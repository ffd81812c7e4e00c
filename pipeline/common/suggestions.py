"""Find the word that was meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Find the known word that is nearest to a misspelt one; None where none is near.

    Args:
        cutoff: how much of the two must be the same, from 0 to 1.
    """
    return next(iter(get_close_matches(word[:100], list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Ask for the nearest known word, as "Did you mean quant?"; empty where none is near."""
    near = nearest(word, known)
    return f"Did you mean {near}?" if near else ""
