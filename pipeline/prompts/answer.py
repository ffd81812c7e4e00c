"""Turn generated token ids back into text: decode it, cut it at a stop string, part the thinking from it."""

from collections.abc import Sequence
from typing import Any

THINK, END_THINK = "<think>", "</think>"


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Give the text of generated ids, without special tokens, its spaces as they are."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Keep what comes before the first stop string."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(found)] if found else text


def opens_thinking(tokenizer: Any, prompt_token_ids: Sequence[int]) -> bool:
    """Say whether the template has opened the thinking block itself, as DeepSeek-R1's does."""
    end = tokenizer.decode(list(prompt_token_ids[-8:]), skip_special_tokens=False)
    return str(end).rstrip().endswith(THINK)


def split_thinking(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Part a completion's thinking (None if there is none) from its answer.

    Args:
        opened: the prompt ended in <think> (see `opens_thinking`), and the text begins inside the block.
            It decides only where the completion ended before </think>: then all of it is thinking.
    """
    inside, closed, after = text.partition(END_THINK)
    before, has_open, rest = inside.partition(THINK)
    if not (closed or has_open or opened):
        return None, text
    if not has_open or (opened and before.strip()):  # began inside the block
        before, rest = "", inside
    return rest.strip(), (before + after).lstrip()
