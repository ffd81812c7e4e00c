"""Run the model on one device with its keys and values in pages: prefill some columns, decode a step."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.attention import ATTENTION
from pipeline.engine.fused_model import FusedModel, can_fuse
from pipeline.engine.limits import PAGES
from pipeline.engine.model_facts import input_device, layer_windows, rope_switch
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.paged.gpu import HOPPER, choose_kernels
from pipeline.engine.paged.graph import StepGraph
from pipeline.engine.paged.longrope import LongRope, check_rotary
from pipeline.engine.paged.pages import Pages, pages_for
from pipeline.engine.paged.passes import PagedDecode, PagedPrefill, PassModel, Segment
from pipeline.engine.sampling import argmax
from pipeline.engine.upload import upload

log = logging.getLogger(__name__)

GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LEAST_COLUMNS = 512  # of a graph: fewer make no step faster


class PagedForward:
    """Feed one flat row of tokens for all rows of a pass; replay a decode step from a graph, where it can be.

    Raises:
        NotImplementedError: the model lies on several devices, or has layers or rotary frequencies of
            another kind.
    """

    limits = PAGES

    def __init__(self, model: Any) -> None:
        self.config = model.config.get_text_config()
        self.device = _only_device(model)
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(self.device)  # where Triton launches, and graphs are recorded
        check_rotary(self.config)
        kernels, flash = choose_kernels(self.device)
        self._facts = PassModel(self.device, layer_windows(self.config), kernels, flash)
        self._model = model
        self._fused = FusedModel(model, kernels) if kernels and can_fuse(model, "cuda") else None
        self._rope = LongRope(model)
        self._captures = self.device.type == "cuda" and torch.cuda.is_available() and can_capture(model)
        self._graphs: tuple[list[StepGraph], list[StepGraph]] = [], []  # of short rows, and of long ones
        self.open(0, 0)
        model.set_attn_implementation(ATTENTION)

    def open(self, pages: int, slots: int, row_pages: int = 1) -> None:
        """Begin with so many pages and slots, and nothing in them; what was there is gone.

        Args:
            row_pages: of the longest row that is known. A longer one costs recording the graphs anew.
        """
        self.close()
        self.pages = Pages(pages)
        self._slots = slots
        # The last slot is that of rows which only fill a graph up: they write to SCRATCH.
        self.tokens = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)  # each slot's newest
        self._table = torch.zeros(slots + 1, row_pages, dtype=torch.int32, device=self.device)

    def close(self) -> None:
        """Give pages and graphs back."""
        self._forget_graphs()
        self.pages = Pages(0)

    def grow(self, pages: int) -> None:
        """Add pages. Their addresses change, so graphs are recorded anew."""
        self._forget_graphs()
        self.pages.grow(pages)

    def _forget_graphs(self) -> None:
        if (
            any(self._graphs) and torch.cuda.is_available()
        ):  # their memory can be unmapped while the newest runs
            torch.cuda.synchronize(self.device)
        for graphs in self._graphs:
            graphs.clear()
        self._memory = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else (0, 0)

    def assign(self, slots: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Tell the device which pages each of these slots has now."""
        widest = max(map(len, pages))
        if widest > self._table.shape[1]:
            self._forget_graphs()
            wider = self._table.new_zeros(len(self._table), widest + widest // 2)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
        width = self._table.shape[1]
        rows = [[slot, *own, *[0] * (width - len(own))] for slot, own in zip(slots, pages, strict=True)]
        made = upload(rows, self.device, torch.int32)
        self._table[made[:, 0].long()] = made[:, 1:]

    def trial(self, rows: Sequence[Sequence[int]], next_token: int) -> tuple[Tensor, Tensor]:
        """Return logits [R, V] after these rows' tokens, and after one more token of each; for the probe.

        Raises:
            NotImplementedError: a layer hands over no keys and values.
        """
        needed = [pages_for(len(ids) + 1) for ids in rows]
        self.open(sum(needed), len(rows))
        pages = [self.pages.take(count) for count in needed]
        self.assign(range(len(rows)), pages)
        segments = [Segment(ids, own, 0, len(ids)) for ids, own in zip(rows, pages, strict=True)]
        switch = rope_switch(self.config)
        beyond = switch is not None and min(map(len, rows)) > switch
        before = self.prefill(segments, range(len(rows)), beyond)
        if (held := len(self.pages.keys)) != (named := len(self._facts.windows)):
            raise NotImplementedError(
                f"{held} layers hand over keys and values, and its config names {named}"
            )
        self.tokens[: len(rows)] = next_token
        after, _ = self.decode([(slot, len(ids)) for slot, ids in enumerate(rows)], beyond)
        self.close()
        return before, after

    def prefill(self, segments: Sequence[Segment], keep: Sequence[int], long: bool = False) -> Tensor:
        """Compute some rows' columns: logits [K, V] after the last of each segment in `keep`.

        Args:
            long: under longrope, whether these rows are beyond its switch.
        """
        batch = PagedPrefill(segments, self.pages, self._facts)
        kept = batch.last_tokens[upload(keep or [0], self.device)]
        return self._run(batch.ids, batch.positions, kept, batch, long)

    def decode(self, rows: Sequence[tuple[int, int]], long: bool = False) -> tuple[Tensor, Tensor]:
        """Feed each row its slot's newest token, and make the most probable one after it the newest.

        Args:
            rows: of each its slot, and how many columns it holds.
            long: as for `prefill`.

        Returns:
            logits [B, V] and tokens [B] int64; overwritten by the next step.
        """
        count, columns = len(rows), 1 + max(held for _, held in rows)
        graph = self._graph(count, columns, long) if self._captures else None
        if graph is None:
            return self._step(upload(rows, self.device, torch.int32), columns, long)
        filled = [*rows, *[(self._slots, 0)] * (graph.rows - count)]
        logits, tokens = graph.replay(upload(filled, self.device, torch.int32))
        return logits[:count], tokens[:count]

    def _graph(self, count: int, columns: int, long: bool) -> StepGraph | None:
        """Find or record a graph of at least so many rows and columns, but not of many more.

        Rows that fill it up cost little, and recording one anew takes as long as a dozen steps.
        """
        rows = next((r for r in GRAPH_ROWS if r >= count), count)
        widest = max(LEAST_COLUMNS, 1 << (columns - 1).bit_length())
        fits = [
            g
            for g in self._graphs[long]
            if count <= g.rows <= 2 * rows and columns <= g.columns <= 4 * widest
        ]
        if fits:
            return min(fits, key=lambda g: (g.rows, g.columns))
        empty = torch.tensor([(self._slots, 0)] * rows, dtype=torch.int32, device=self.device)
        try:
            graph = StepGraph(lambda control: self._step(control, widest, long), empty, widest, self._memory)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            log.warning("A decode step cannot be recorded, and is launched kernel by kernel: %s", error)
            self._captures = False
            return None
        self._graphs[long].append(graph)
        return graph

    def _step(self, control: Tensor, columns: int, long: bool) -> tuple[Tensor, Tensor]:
        """Run a decode step. control [B, 2] → logits [B, V], tokens [B]."""
        slots, positions = control.long().unbind(1)
        batch = PagedDecode(control, self._table, columns, self.pages, self._facts)
        # A row whose token is NONE has ended, but its next step is launched before the host has read it.
        logits = self._run(self.tokens[slots].clamp(min=0), positions, 0, batch, long)
        tokens = argmax(logits)
        self.tokens[slots] = tokens
        return logits, tokens

    def _run(self, ids: Tensor, positions: Tensor, keep: Tensor | int, batch: Any, long: bool) -> Tensor:
        inputs = {
            "input_ids": ids[None], "position_ids": positions[None], "logits_to_keep": keep, "batch": batch,
        }  # fmt: skip
        if self._fused is not None:
            return self._fused(**inputs)
        with self._rope.chosen(long):
            logits: Tensor = self._model(**inputs, use_cache=False).logits[0]
        return logits


def _only_device(model: Any) -> torch.device:
    """Return the model's device; refuse a model that lies on several."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        raise NotImplementedError("layers on several devices")
    return input_device(model)


def can_capture(model: Any) -> bool:
    """Say whether a step can be recorded: LLM.int8 looks at a product's outliers, and experts may at their routing.

    A record that has to be given up leaves torch's allocator unable to free what it holds, so none is begun in hope.
    """
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        return False
    experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")
    if not experts:
        return not any(getattr(config, name, None) for name in names)
    others = [module for module in experts if not hasattr(module, "grouped_experts")]
    if not others:
        return True
    return (
        not any(hasattr(module, "quantized_experts") for module in others)
        and config._experts_implementation == "grouped_mm"
        and model.dtype == torch.bfloat16
        and torch.version.hip is None
        and torch.cuda.get_device_capability(input_device(model))[0] == HOPPER
    )
