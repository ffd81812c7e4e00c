"""A decode step as one graph: launched once, and not kernel by kernel."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Body = Callable[[], tuple[Tensor, Tensor]]


class StepGraph:
    """What `body` launches, recorded once and replayed on the same buffers, whatever they hold by then.

    Args:
        body: reads and writes tensors that stay where they are, and does not look at their values.
        pool: the memory that all graphs share: only one runs at a time.

    Raises:
        RuntimeError: something in it waits for the device, which cannot be recorded.
    """

    def __init__(self, body: Body, pool: tuple[int, int]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            body()  # kernels are compiled, and libraries set up, outside of the record
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = body()

    def replay(self) -> tuple[Tensor, Tensor]:
        self._graph.replay()
        return self._output
