"""Keep completions to their grammar: which tokens may come next, and where the text may end."""

from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any

from pipeline.common.errors import JobError


class Constraint:
    """Follow one completion through its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Say whether the text so far is whole."""
        return not self.error and bool(self._matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """Say whether the text is whole, and nothing can follow it."""
        return not self.error and bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Say why the grammar cannot go on, as where it has grown too large; None if it can."""
        said: str = self._matcher.get_error()
        return said.splitlines()[0] if said else None

    def advance(self, token: int) -> None:
        """Take the next token of the text."""
        self._matcher.consume_token(token)

    def write_allowed(self, address: int, size_bytes: int) -> None:
        """Write a bit for each token of the vocabulary to this address: set where it may come next."""
        if self.error is None:
            self._matcher.unsafe_compute_mask_ptr(address, size_bytes)


class Constraints:
    """Compile grammars for one tokenizer.

    Args:
        tokenizer: of transformers, a fast one.
        eos_token_ids: what may come where a text is whole.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = sorted(eos_token_ids)
        self._compile = lru_cache(256)(self._compile_anew)  # almost all rows have the job's own

    def begin(self, grammar: str) -> Constraint:
        """Begin a completion.

        Raises:
            JobError: the tokenizer is none that llguidance can read.
        """
        return Constraint(self._compile(grammar).deep_copy())

    @cached_property
    def words(self) -> int:
        """Count the 32-bit words of a mask."""
        return -(-int(self._vocabulary.vocab_size) // 32)  # asking takes 4 ms

    def _compile_anew(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        return LLMatcher(self._vocabulary, grammar, log_level=0)

    @cached_property
    def _vocabulary(self) -> Any:
        """Read the tokenizer as llguidance does: it takes a third of a second."""
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, eos_token=self._eos_token_ids or None)
        except Exception as error:
            raise JobError(
                found=f"a completion cannot be constrained with this tokenizer: {error}",
                fix="Leave json_schema, regex, choice and grammar out, or choose another model",
            ) from error
