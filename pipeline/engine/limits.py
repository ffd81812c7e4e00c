"""What suits a kind of device: numbers that the engine and the memory plan share. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How many rows a batch has, and how rectangles are cut and grow."""

    max_rows: int  # more make no step faster on any device measured so far
    chunk: int  # columns that a rectangle has allocated ahead
    rectangle_overhead: int  # columns attended in the time of one more rectangle's kernel launches


CPU = Limits(max_rows=128, chunk=32, rectangle_overhead=512)
GPU = Limits(max_rows=512, chunk=256, rectangle_overhead=16_384)


def limits(device_type: str) -> Limits:
    """Those of `cpu`, or of any accelerator."""
    return CPU if device_type == "cpu" else GPU
