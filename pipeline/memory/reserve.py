"""Decide how much memory vLLM reserves for keys and values on a CPU: what the rows need, as far as it is free."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.common.request import BadRow, PromptRow
from pipeline.config.quant import QuantConfig
from pipeline.config.schema import EngineConfig
from pipeline.memory.architecture import Architecture
from pipeline.memory.peaks import work_bytes
from pipeline.memory.plan import footprint_bytes, kv_bytes_per_token
from pipeline.prompts.lengths import messages_of

TEMPLATE_TOKENS = 64  # that a chat template writes around a message, at most
BYTES_PER_TOKEN = 3  # of UTF-8, in the middle; 1 at least
BLOCK_TOKENS = 128  # a row's last block on a CPU, at most


@dataclass(frozen=True, slots=True)
class RowTokens:
    """Hold how many tokens rows may have, prompt and completion."""

    longest: int  # a bound
    together: int  # an estimate, of as many rows as run at once


def row_tokens(
    rows: Iterable[PromptRow | BadRow], system: str | None, context: int | None, most_rows: int
) -> RowTokens:
    """Look at a job's rows: the longest of them, and the longest that run at once."""
    longest, together = 1, list[int]()  # a heap
    for row in rows:
        if isinstance(row, PromptRow):
            size, new = _prompt_bytes(row, system), row.params.max_new_tokens
            longest = max(longest, size + new)
            expected = min(size // BYTES_PER_TOKEN + new, context or longest) + BLOCK_TOKENS
            for _ in range(row.params.n):
                heapq.heappush(together, expected)
                if len(together) > most_rows:
                    heapq.heappop(together)
    return RowTokens(min(longest, context or longest), sum(together))


def _prompt_bytes(row: PromptRow, system: str | None) -> int:
    """Count the bytes of a prompt, with about those of its template."""
    texts = [message["content"] for message in messages_of(row, system)]
    return sum(len(text.encode("utf-8", "replace")) + TEMPLATE_TOKENS for text in texts)


def reserve_bytes(
    arch: Architecture,
    quant: QuantConfig,
    tokens: RowTokens,
    rows: int,
    settings: EngineConfig,
    free_bytes: int,
) -> int:
    """Return the bytes to reserve: for what is asked for, else for the rows, within the free memory."""
    per_token = sum(kv_bytes_per_token(arch, quant).values())
    wanted = settings.max_tokens_in_flight or max(tokens.longest + BLOCK_TOKENS, tokens.together)
    work = work_bytes(arch, quant, (), settings.prefill_tokens, rows, True)
    budget = int(free_bytes * settings.memory_fraction) - footprint_bytes(arch, quant) - work
    return per_token * max(BLOCK_TOKENS, min(wanted, budget // max(per_token, 1)))
