"""Show a text as its tokenizer sees it: ids, the bytes behind each token, and whether it comes back unchanged."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback, as Llama 2 and Gemma have
_BYTE_OF_CHARACTER = {c: byte for byte, c in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
_ROLES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True, slots=True)
class Token:
    """Hold one token of a text."""

    index: int
    id: int
    text: str | None  # None where it begins or ends inside a character
    bytes: str  # in hexadecimal, as "ed 95"
    special: bool  # a special or added token, and not text
    part_of: str | None  # the characters that it makes together with its neighbours


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """Hold a token that is no text."""

    id: int
    text: str
    roles: tuple[str, ...]  # of bos, eos, pad and unk


@dataclass(frozen=True, slots=True)
class TokensView:
    """Hold a text as tokens.

    `added_before` and `added_after` are what the tokenizer puts around a text unless told not to.
    """

    text: str
    vocabulary: int  # with special and added tokens
    special_tokens: list[SpecialToken]
    added_before: list[int]
    added_after: list[int]
    token_ids: list[int]
    tokens: list[Token]
    round_trip: str
    exact: bool
    difference: str | None  # where the round trip differs first, and why if that is known


def tokens_view(tokenizer: Any, text: str) -> TokensView:
    """Split a text in its own tokens, without those that the tokenizer adds around it."""
    token_ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    before, after = _added(tokenizer, text, token_ids)
    round_trip = str(
        tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    return TokensView(
        text=text,
        vocabulary=len(tokenizer),
        special_tokens=special_tokens(tokenizer),
        added_before=before,
        added_after=after,
        token_ids=token_ids,
        tokens=split_tokens(tokenizer, token_ids),
        round_trip=round_trip,
        exact=round_trip == text,
        difference=_difference(text, round_trip),
    )


def split_tokens(tokenizer: Any, token_ids: Sequence[int]) -> list[Token]:
    """Show every token with its bytes; those that split a character also with what they make together."""
    raws = [token_bytes(tokenizer, token_id) for token_id in token_ids]
    added = tokenizer.added_tokens_decoder
    groups = _whole_characters(raws, [token_id in added for token_id in token_ids])
    return [
        Token(i, token_id, _text(raw), raw.hex(" "), token_id in added, groups.get(i))
        for i, (token_id, raw) in enumerate(zip(token_ids, raws, strict=True))
    ]


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes that a token stands for in the middle of a text.

    A byte-level vocabulary (GPT-2's and its heirs) writes each byte as a printable character; SentencePiece
    writes a blank as ▁ and a lone byte as <0xED>.
    """
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # an id beyond the tokenizer, which a padded embedding has
        return b""
    if token_id in tokenizer.added_tokens_decoder:
        return str(piece).encode()
    if is_byte_level(tokenizer):
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes.fromhex(match[1])
    return str(piece).replace("▁", " ").encode()


def is_byte_level(tokenizer: Any) -> bool:
    """Say whether its vocabulary is made of bytes, as GPT-2's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


def special_tokens(tokenizer: Any) -> list[SpecialToken]:
    """List special and added tokens, by id."""
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    found = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    found |= {i: tokenizer.convert_ids_to_tokens(i) for i in roles.values() if i is not None}
    return [
        SpecialToken(token_id, text, tuple(role for role in _ROLES if roles[role] == token_id))
        for token_id, text in sorted(found.items())
    ]


def _added(tokenizer: Any, text: str, token_ids: list[int]) -> tuple[list[int], list[int]]:
    whole = list(tokenizer.encode(text, verbose=False))
    size = len(token_ids)
    for start in range(len(whole) - size + 1):
        if whole[start : start + size] == token_ids:
            return whole[:start], whole[start + size :]
    return [], []


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _whole_characters(raws: list[bytes], special: list[bool]) -> dict[int, str]:
    """Find each run of tokens that only together are whole characters: its text, by token index."""
    found: dict[int, str] = {}
    run: list[int] = []
    for i, raw in enumerate(raws):
        run = [] if special[i] else [*run, i]
        text = _text(b"".join(raws[j] for j in run))
        if text is not None:
            found |= dict.fromkeys(run, text) if len(run) > 1 else {}
            run = []
        elif len(run) > 8 or _text(raw) is not None:  # no character has so many bytes: not UTF-8 at all
            run = []
    return found


def _difference(text: str, round_trip: str) -> str | None:
    if text == round_trip:
        return None
    for form in ("NFC", "NFKC", "NFD", "NFKD"):
        if unicodedata.normalize(form, text) == round_trip:
            return f"the tokenizer normalises text to Unicode's {form}"
    if text.strip() == round_trip.strip():
        return "blanks at the ends differ"
    at = next((i for i, (a, b) in enumerate(zip(text, round_trip, strict=False)) if a != b), None)
    if at is None:
        at = min(len(text), len(round_trip))
    return f"from character {at}: {text[at : at + 12]!r} becomes {round_trip[at : at + 12]!r}"
