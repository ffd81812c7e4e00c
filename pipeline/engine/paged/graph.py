"""A decode step as one graph: launched at once, and not kernel by kernel."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # control [B, 2] → logits [B, V], tokens [B]
Memory = tuple[int, int]  # what torch.cuda.graph_pool_handle gives


class StepGraph:
    """What a step launches, recorded once and replayed on the same buffers, whatever they hold by then.

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
        stream = torch.cuda.Stream(control.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(control)  # kernels are compiled and libraries set up outside of the record
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=memory):  # type: ignore[arg-type]
            self._output = step(control)

    def replay(self, control: Tensor) -> tuple[Tensor, Tensor]:
        """Run the step for these rows, [B, 2] int32. The outputs are overwritten by the next replay."""
        self._control.copy_(control)
        self._graph.replay()
        return self._output
