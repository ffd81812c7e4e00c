"""Make a job's engine: the fastest exact way through its model, as many rows and tokens as the memory holds."""

import logging
from dataclasses import dataclass
from typing import Any

from pipeline.common import terminal
from pipeline.config.schema import Config
from pipeline.engine.engine import Engine
from pipeline.engine.probe import AnyForward, choose_forward
from pipeline.engine.vllm.engine import VllmEngine
from pipeline.job.ready import Ready
from pipeline.job.vllm_ready import VllmReady
from pipeline.memory.capacity import Capacity, capacity
from pipeline.memory.facts import job_architecture

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Way:
    """Hold the way through a model, and what the manifest says of it."""

    forward: AnyForward | None  # None: vLLM has its own
    report: dict[str, Any]


def choose_way(ready: Ready, config: Config) -> Way:
    """Choose the fastest exact way through the model, and say so where it is not the fastest of all."""
    if isinstance(ready, VllmReady):
        return Way(None, {"path": "vllm", "max_logit_difference": None, "why": None})
    longest = ready.context(config.model.context)
    forward, report = choose_forward(ready.model, config.engine.attention.value, longest)
    if report["why"]:
        terminal.say(f"Attention: {report['path']}, and no faster: {report['why']}.", style="yellow")
    return Way(forward, report)


def make_engine(
    ready: Ready, forward: AnyForward | None, config: Config
) -> tuple[Engine | VllmEngine, Capacity]:
    """Make the engine, and say what it has room for."""
    settings = config.engine
    if isinstance(ready, VllmReady):
        engine = VllmEngine(
            ready.process,
            ready.ends,
            ready.tokenizer,
            max_rows=ready.rows,
            reserved_bytes=ready.reserved["kv_cache_bytes"],
        )
        return engine, Capacity(ready.rows, ready.longest_row, None, ready.quant, (), settings.prefill_tokens)
    assert forward is not None
    room = capacity(
        ready.model,
        ready.quant,
        arch=job_architecture(config.model, config.models_dir, config.quant, ready.gpus),
        limits=forward.limits,
        fraction=settings.memory_fraction,
        prefill_tokens=settings.prefill_tokens,
        copies_logits=config.generation.copies_logits,
        max_rows=settings.max_rows,
        max_tokens=settings.max_tokens_in_flight,
        context=config.model.context,
    )
    log.info("At most %d rows and %d tokens in flight", room.max_rows, room.max_tokens)
    own = Engine(
        forward,
        ready.ends,
        ready.decode,
        ready.tokenizer,
        max_rows=room.max_rows,
        max_tokens=room.max_tokens,
        prefill_tokens=settings.prefill_tokens,
        share_prefix=settings.shared_prefix,
        row_columns=room.architecture.pass_columns or 1 if room.architecture else 1,
    )
    return own, room
