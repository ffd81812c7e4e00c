"""Encode a rendered text in which typed control tokens are text.

Where a row spells a control token (`<|im_end|>`, `<|eot_id|>`), it could end its turn and speak as the
system. So each such place is hidden behind a mark while the template is rendered, and then encoded by the
bare model of the tokenizer, which knows no added tokens: the model reads the same characters, as ordinary
tokens. Control tokens are the tokenizer's special tokens and the added tokens that its template writes.
(What opens and closes thinking in an assistant's message stays as it is: it is its own, and templates cut
there.) The same holds for prompts without a template.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.common.errors import PromptError
from pipeline.prompts.settings import lone_surrogate

_MARK = "\ufdd0"  # a code point that Unicode sets aside for use inside programs
_HIDDEN = re.compile(f"{_MARK}([0-9]+){_MARK}")


def control_tokens(tokenizer: PreTrainedTokenizerBase, written: str) -> re.Pattern[str]:
    """Match what must not be typed: special tokens, and added tokens that the template has `written`.

    The mark itself too, so that nobody can type what hides. Added tokens of blanks alone (Gemma has
    some) are no control tokens.
    """
    added = tokenizer.added_tokens_decoder.values()
    used = {token.content for token in added if token.special or token.content in written}
    tokens = {token for token in used | set(tokenizer.all_special_tokens) if token.strip()}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, [*longest_first, _MARK])))


def hide(
    message: dict[str, Any], tokens: re.Pattern[str], own: Sequence[str], hidden: list[str]
) -> dict[str, Any]:
    """Put a mark in the place of each control token that a message spells, and the token in `hidden`.

    Args:
        own: what an assistant may write in its messages all the same.
    """
    kept = own if message["role"] == "assistant" else ()
    return {
        key: said if key == "role" else hide_in(said, tokens, hidden, kept) for key, said in message.items()
    }


def hide_in(value: Any, tokens: re.Pattern[str], hidden: list[str], kept: Sequence[str] = ()) -> Any:
    """Do the same in each text of plain data, but for the tokens that are `kept`."""

    def mark(match: re.Match[str]) -> str:
        if match[0] in kept:
            return match[0]
        hidden.append(match[0])
        return f"{_MARK}{len(hidden) - 1}{_MARK}"

    def changed(value: Any) -> Any:
        match value:
            case str():
                return tokens.sub(mark, value)
            case list():
                return [changed(item) for item in value]
            case dict():
                return {changed(key): changed(item) for key, item in value.items()}
        return value

    return changed(value)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, hidden: list[str], source: str) -> list[int]:
    """Encode a rendered text, what is hidden as ordinary tokens."""
    if half := lone_surrogate(text):  # of a template's own, or of the JSON in a call's arguments
        raise PromptError(
            found=f"{source}: its prompt has {half}, half a character (a lone surrogate)",
            fix="Write the whole pair.",
        )
    first, *pieces = _HIDDEN.split(text)
    token_ids = encode_text(tokenizer, first)
    for number, following in zip(pieces[::2], pieces[1::2], strict=True):
        typed = hidden[int(number)]
        bare = _encode_inside(lambda piece: _encode_bare(tokenizer, piece), typed)
        if tokenizer.convert_tokens_to_ids(typed) in bare and typed != _MARK:
            raise PromptError(
                found=f"{source}: holds {typed!r}, which this tokenizer can only read as a control token",
                fix="Write it in another way.",
            )
        token_ids += bare + _encode_inside(lambda piece: encode_text(tokenizer, piece), following)
    return token_ids


def encode_reply(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: re.Pattern[str], source: str
) -> list[int]:
    """Encode a text that follows a prompt, by itself; control tokens that it spells are text."""
    hidden: list[str] = []
    marked = hide_in(text, tokens, hidden)
    return _encode_inside(lambda piece: encode(tokenizer, piece, hidden, source), marked)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # not verbose: a prompt longer than the context is the runner's to report
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _encode_bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text in which no added token is looked for.

    `split_special_tokens` does this for special tokens only; the steps of a fast tokenizer do for all.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    splits = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
    return [token.id for split, _ in splits for token in backend.model.tokenize(split)]


def _encode_inside(encode: Callable[[str], list[int]], piece: str) -> list[int]:
    """Encode a piece from inside a text: some tokenizers put a blank before the first word of a text."""
    if not piece:
        return []
    newline, with_newline = encode("\n"), encode("\n" + piece)
    if with_newline[: len(newline)] == newline:
        return with_newline[len(newline) :]
    return encode(piece)
