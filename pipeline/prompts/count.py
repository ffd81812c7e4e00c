"""Count the rows that a prompt file gives each shard, and hash the file: in one pass, without parsing it."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.common.errors import PromptError
from pipeline.common.request import BadRow, GenerationParams
from pipeline.common.units import MIB
from pipeline.prompts.reader import MAX_LINE_BYTES, read_prompts


@dataclass(frozen=True, slots=True)
class PromptCount:
    """Hold how many completions there are to make: a row with n samples counts n times, as in a job's results."""

    totals: tuple[int, ...]  # [shards]
    sha256: str  # of the lines as they are read: compressing a file does not change it


def count_prompts(
    path: str, params: GenerationParams, *, prompt_field: str, limit: int | None, shards: int
) -> PromptCount:
    """Count what `read_prompts` would give.

    Most lines are only counted (2 million a second). Where samples are at play, because the job or a line
    asks for n, the file is parsed (130,000 a second).

    Raises:
        ConfigError, PromptError: as `read_prompts`.
    """
    digest = hashlib.sha256()
    totals = [0] * shards
    index, parse = 0, params.n != 1
    counted = False  # this line
    for piece in _pieces(path):
        digest.update(piece)
        parse = parse or b'"n"' in piece
        if not counted and piece.strip(b" \t\r\n\v\f"):
            counted = True
            if limit is None or index < limit:
                totals[index % shards] += 1
                index += 1
        if piece.endswith(b"\n"):
            counted = False
    if parse or index == 0:
        totals = [0] * shards
        for row in read_prompts(path, params, prompt_field=prompt_field, limit=limit):
            totals[row.index % shards] += 1 if isinstance(row, BadRow) else row.params.n
    return PromptCount(tuple(totals), digest.hexdigest())


@cache
def count_once(path: str, n: int, prompt_field: str, limit: int | None, shards: int) -> PromptCount:
    """Count once for all the jobs of a sweep: what follows reads the same rows."""
    params = GenerationParams(n=n)
    return count_prompts(path, params, prompt_field=prompt_field, limit=limit, shards=shards)


def prompts_sha256(path: str) -> str | None:
    """Hash the lines as they are read, as `count_prompts` does; None if they cannot be read to the end."""
    digest = hashlib.sha256()
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            while block := file.read(MIB):
                digest.update(block)
    except (OSError, EOFError, zlib.error):
        return None
    return digest.hexdigest()


def _pieces(path: str) -> Iterator[bytes]:
    """Read the lines; one that is too long for a row comes in pieces, so that it is never held."""
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            while piece := file.readline(MAX_LINE_BYTES + 1):
                yield piece
    except (OSError, EOFError, zlib.error) as error:
        raise PromptError(
            found=f"{path}: cannot be read to its end ({error})", fix="Copy it again."
        ) from error
