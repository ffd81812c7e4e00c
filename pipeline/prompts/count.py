"""Count the rows that a prompt file gives each shard, and hash what it holds; JSON Lines in one pass, unparsed."""

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.common.errors import PromptError
from pipeline.common.request import BadRow, GenerationParams, PromptRow
from pipeline.common.units import MIB
from pipeline.config.schema import Config
from pipeline.prompts.address import dataset_address, files_of
from pipeline.prompts.lines import MAX_LINE_BYTES, SUFFIXES, is_table, suffix_of
from pipeline.prompts.reader import find_prompts, read_prompts
from pipeline.prompts.shape import PLAIN, Shape
from pipeline.prompts.tables import count_table

MAY_SAY_N = ("n", "generation", "body")  # columns whose row may ask for several samples


@dataclass(frozen=True, slots=True)
class PromptCount:
    """Hold how many completions there are to make: a row with n samples counts n times, as in a job's results."""

    totals: tuple[int, ...]  # [shards]
    sha256: str  # of the lines as they are read: compressing a file does not change it


def count_job(config: Config, shards: int) -> PromptCount:
    """Count what `open_prompts` would give a job's shards; jobs that ask for the same read it once.

    Raises:
        ConfigError, PromptError: as `open_prompts`.
    """
    path = find_prompts(config.prompts)
    return count_once(path, config.generation.n, Shape.of(config), config.limit, shards)


@cache
def count_once(path: str, n: int, shape: Shape, limit: int | None, shards: int) -> PromptCount:
    """Count once for all the jobs of a sweep: what follows reads the same rows."""
    return count_prompts(path, GenerationParams(n=n), shape=shape, limit=limit, shards=shards)


def count_prompts(
    path: str, params: GenerationParams, *, shape: Shape = PLAIN, limit: int | None, shards: int
) -> PromptCount:
    """Count what `read_prompts` would give.

    Most lines are only counted (2 million a second), and most rows of tables. Where samples are at play,
    because the job or a line asks for n, the file is parsed (130,000 a second); so is one of another format.

    Raises:
        ConfigError, PromptError: as `read_prompts`.
    """
    rows = read_prompts(path, params, shape=shape, limit=limit)  # raises what is wrong with shape and limit
    parse = params.n != 1 or any(name in MAY_SAY_N for name, _ in shape.columns)
    if is_table(path) or suffix_of(path) in SUFFIXES[1:]:
        sha256 = prompts_sha256(path)
        if sha256 is None:
            raise PromptError(found=f"{path}: cannot be read to its end", fix="Copy it again.")
        if not parse and is_table(path) and (count := count_table(path, MAY_SAY_N)):
            whole = range(count)[:limit]
            return PromptCount(tuple(len(whole[shard::shards]) for shard in range(shards)), sha256)
        return PromptCount(_totals(rows, shards), sha256)
    digest = hashlib.sha256()
    totals = [0] * shards
    index = 0
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
        return PromptCount(_totals(rows, shards), digest.hexdigest())
    return PromptCount(tuple(totals), digest.hexdigest())


def _totals(rows: Iterable[PromptRow | BadRow], shards: int) -> tuple[int, ...]:
    totals = [0] * shards
    for row in rows:
        totals[row.index % shards] += 1 if isinstance(row, BadRow) else row.params.n
    return tuple(totals)


def prompts_sha256(path: str) -> str | None:
    """Hash the lines as they are read, as `count_prompts` does; None if they cannot be read to the end.

    Of a folder, all files count; of a dataset on the hub, its address with the commit.
    """
    address = dataset_address(path)
    digest = hashlib.sha256()
    if address and address.on_hub:
        digest.update(address.shown.encode())
        return digest.hexdigest()
    try:
        for file in files_of(path):
            if address:
                digest.update(f"{file}\0".encode())
            with gzip.open(file) if path.endswith(".gz") else file.open("rb") as stream:
                while block := stream.read(MIB):
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
