"""Tell prompts that can be read only once from files: standard input, named pipes, a shell's <(…)."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from pipeline.common.errors import PromptError

NAMELESS = ("/dev/fd/", "/dev/stdin", "/proc/")  # what they mean is another process's business


def is_nameless(prompts: str) -> bool:
    """Say whether the words `prompts=` mean something else in each process."""
    return prompts == "-" or prompts.startswith(NAMELESS)


def is_stream(prompts: str) -> bool:
    """Say whether prompts are to be kept before they are read: they come once, or only here."""
    if is_nameless(prompts):
        return True
    try:
        path = Path(prompts)
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


@contextmanager
def opened(stream: str) -> Iterator[IO[bytes]]:
    """Open what comes only once.

    Raises:
        PromptError: it cannot be read.
    """
    try:
        with nullcontext(sys.stdin.buffer) if stream == "-" else Path(stream).open("rb") as file:
            yield file
    except OSError as error:
        raise PromptError(
            found=f"{stream}: cannot be read ({error.strerror or error})", fix="Write the prompts to a file."
        ) from error


@contextmanager
def kept(prompts: str) -> Iterator[str]:
    """Keep a stream in a file, so that it can be read several times while a `with` lasts; a file needs none.

    Raises:
        PromptError: the stream cannot be read.
    """
    if not is_stream(prompts):
        yield prompts
        return
    with tempfile.NamedTemporaryFile(prefix="prompts-", suffix=".jsonl") as file:
        with opened(prompts) as stream:
            shutil.copyfileobj(stream, file)
        file.flush()
        yield file.name
