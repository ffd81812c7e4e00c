"""Turn generated token ids back into text: decode it, cut it at a stop string, part the thinking from it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.common.errors import PromptError


@dataclass(frozen=True, slots=True)
class Tags:
    """Say what a model puts around its thinking, as text or as special tokens."""

    open: str
    close: str
    heading: str = ""  # of the answer, where it has one: left out

    @property
    def texts(self) -> tuple[str, ...]:
        """List what may be tokens of their own."""
        whole = (self.open, self.close, self.heading)
        return (*filter(None, whole), *dict.fromkeys(re.findall(r"<\|\w+\|>", "".join(whole))))


THINK = Tags("<think>", "</think>")  # DeepSeek-R1, Qwen, SmolLM3 and most others
FORMATS = (
    THINK,
    Tags("[THINK]", "[/THINK]"),  # Magistral
    Tags("<thought>", "</thought>"),
    Tags("◁think▷", "◁/think▷"),  # Kimi
    Tags("<seed:think>", "</seed:think>"),  # Seed-OSS
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    Tags(
        "<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant<|channel|>final<|message|>"
    ),  # gpt-oss
)


def find_tags(tokenizer: Any, template: str, own: Sequence[str] | None = None) -> Tags:
    """Choose how thinking is marked: by the job, by the template's own text, or by the tokenizer's tokens."""
    if own is not None:
        return Tags(*own)
    written = [tags for tags in FORMATS if tags.open in template or tags.close in template]
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return next(iter([*written, *(tags for tags in FORMATS if tags.open in added)]), THINK)


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Give the text of generated ids, without special tokens, its spaces as they are."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def decode_with(tokenizer: Any, token_ids: Sequence[int], tags: Tags) -> str:
    """Decode, but keep the special tokens that mark thinking."""
    kept = {token_id: text for text in tags.texts if (token_id := dropped_id(tokenizer, text)) is not None}
    text, run = "", list[int]()
    for token_id in token_ids:
        if token_id not in kept:
            run.append(token_id)
            continue
        text += (decode(tokenizer, run) if run else "") + kept[token_id]
        run = []
    return text + (decode(tokenizer, run) if run or not text else "")


def dropped_id(tokenizer: Any, text: str) -> int | None:
    """Return the id of a text that is one special token, which decoding drops; else None."""
    token_id = tokenizer.convert_tokens_to_ids(text)
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != text:
        return None
    return int(token_id) if decode(tokenizer, [token_id]) == "" else None


def stop_token_ids(tokenizer: Any, stop: Sequence[str]) -> frozenset[int]:
    """Find the stop strings that are special tokens: no text shows them, so that they are matched by id.

    Raises:
        PromptError: a stop string has a special token and more, which can be matched neither way.
    """
    ids = set()
    for text in stop:
        if (whole := dropped_id(tokenizer, text)) is not None:
            ids.add(whole)
            continue
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            token = tokenizer.convert_ids_to_tokens(token_id)
            if token in text and dropped_id(tokenizer, token) is not None:
                raise PromptError(
                    found=f"generation.stop: {text!r} holds the special token {token!r} and more",
                    fix="Stop at the special token alone, or at the text without it.",
                )
    return frozenset(ids)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Keep what comes before the first stop string."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(found)] if found else text


def opens_thinking(tokenizer: Any, prompt_token_ids: Sequence[int], tags: Tags = THINK) -> bool:
    """Say whether the template has opened the thinking block itself, as DeepSeek-R1's does."""
    end = tokenizer.decode(list(prompt_token_ids[-32:]), skip_special_tokens=False)
    return str(end).rstrip().endswith(tags.open)


def split_thinking(text: str, *, opened: bool = False, tags: Tags = THINK) -> tuple[str | None, str]:
    """Part a completion's thinking (None if there is none) from its answer.

    Args:
        opened: the prompt ended in the opening tag (see `opens_thinking`), and the text begins inside the
            block. It decides only where the completion ended before the closing tag: then all is thinking.
    """
    inside, closed, after = text.partition(tags.close)
    before, has_open, rest = inside.partition(tags.open)
    if not (closed or has_open or opened):
        return None, _without_heading(text, tags)
    if not has_open or (opened and before.strip()):  # began inside the block
        before, rest = "", inside
    return rest.strip(), _without_heading((before + after).lstrip(), tags)


def _without_heading(answer: str, tags: Tags) -> str:
    """Leave out the answer's heading, of which the prompt may have written the beginning."""
    for start in range(len(tags.heading)):
        if answer.startswith(tags.heading[start:]):
            return answer[len(tags.heading) - start :]
    return answer
