"""Follow how transformers puts weights in their places: it tells that to a bar of tqdm's kind."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import logging as transformers_logging

from pipeline.common.bars import BytesBar


@contextmanager
def loading_shown(sizes: dict[str, int]) -> Iterator[None]:
    """Show a bar while transformers puts weights in their places.

    Args:
        sizes: bytes of each tensor in the files.
    """
    set_hook: Callable[[Any], Any] | None = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:  # a release that lets nobody look
        yield
        return
    with BytesBar("Loading weights", sum(sizes.values())) as bar:

        def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if args and hasattr(args[0], "__iter__"):
                return _followed(list(args[0]), sizes, bar)
            return factory(*args, **options)

        before = set_hook(hook)
        try:
            yield
        finally:
            set_hook(before)


def _followed(items: list[Any], sizes: dict[str, int], bar: BytesBar) -> Iterator[Any]:
    """Give transformers its weights, and count each when it asks for the next."""
    names = [str(item[0]) if isinstance(item, tuple) and item else "" for item in items]
    known = sum(sizes.get(name, 0) for name in names)
    # Weights that are made of several tensors, as experts are, have other names than these: each is taken
    # for an equal part of what is left.
    others = sum(name not in sizes for name in names)
    each = (sum(sizes.values()) - known) / others if others else 0.0
    done = 0.0
    for name, item in zip(names, items, strict=True):
        yield item
        done += sizes.get(name, each)
        bar.update(done)


def tensor_sizes(files: Iterable[Path]) -> dict[str, int]:
    """Estimate the bytes of each tensor in safetensors files: its share of the file, by its elements."""
    sizes: dict[str, int] = {}
    for file in files:
        with safe_open(file, framework="np") as opened:
            counts = {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        whole, total = file.stat().st_size, sum(counts.values()) or 1
        sizes |= {name: whole * count // total for name, count in counts.items()}
    return sizes
