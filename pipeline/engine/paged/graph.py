"""Record a decode step as one graph, which is launched at once and not kernel by kernel."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # control [B, 2] → logits [B, V], tokens [B]
Memory = tuple[int, int]  # what torch.cuda.graph_pool_handle gives


class StepGraph:
    """Record once what a step launches, and replay it on the same buffers, whatever they hold by then.

    Args:
        step: reads and writes tensors that stay where they are, and does not look at their values.
        control: [B, 2] int32, of rows that may be run for nothing.
        columns: the most that a row may have.
        memory: what all graphs share: only one runs at a time.

    Raises:
        RuntimeError: something in the step waits for the device, which cannot be recorded.
    """

    def __init__(self, step: Step, control: Tensor, columns: int, memory: Memory) -> None:
        self.rows, self.columns = len(control), columns
        self._control = control
        self._graph = torch.cuda.CUDAGraph()
        stream = _side_stream(control.device)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # left again even where the record's own end fails
                step(control)  # kernels are compiled and libraries set up outside of the record
                with torch.cuda.graph(self._graph, pool=memory, stream=stream):  # type: ignore[arg-type]
                    self._output = step(control)
        finally:
            torch.cuda.current_stream().wait_stream(stream)

    def replay(self, control: Tensor) -> tuple[Tensor, Tensor]:
        """Run the step for these rows, [B, 2] int32. The outputs are overwritten by the next replay."""
        self._control.copy_(control)
        self._graph.replay()
        return self._output


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that graphs are recorded on: cuBLAS keeps 8 to 32 MiB for each that it has met."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
