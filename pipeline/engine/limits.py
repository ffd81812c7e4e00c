"""Say what suits a kind of device and its way to hold keys and values, to the engine and to a memory plan."""

from dataclasses import dataclass, replace

PAGE = 32  # columns of a page


@dataclass(frozen=True, slots=True)
class Limits:
    """Limit the rows of a batch, and say how its keys and values grow."""

    max_rows: int  # more make no step faster on any device measured so far
    chunk: int  # columns allocated beyond a row's tokens
    rectangle_overhead: int  # columns attended in the time of one more rectangle's kernel launches
    cuts_windows: bool  # a sliding layer holds no more than its window


CPU = Limits(max_rows=128, chunk=32, rectangle_overhead=512, cuts_windows=True)
GPU = Limits(max_rows=512, chunk=256, rectangle_overhead=16_384, cuts_windows=True)
PAGES = Limits(max_rows=512, chunk=PAGE, rectangle_overhead=0, cuts_windows=False)


def limits(device_type: str) -> Limits:
    """Return the limits of rectangles on `cpu`, or on any accelerator."""
    return CPU if device_type == "cpu" else GPU


def own_cache_limits(device_type: str) -> Limits:
    """Return the limits of rows in the model's own cache, which allocates nothing ahead."""
    return replace(limits(device_type), chunk=0)


def expected_limits(gpus: int, *, own_cache: bool = False) -> Limits:
    """Expect the limits of a job on so many GPUs, before its model is loaded.

    Args:
        own_cache: of a model that runs through the cache that it makes for itself.
    """
    if own_cache:
        return own_cache_limits("gpu" if gpus else "cpu")
    return PAGES if gpus == 1 else limits("cpu" if gpus == 0 else "gpu")
