"""Make a job's engine: the fastest exact way through its model, as many rows and tokens as the memory holds."""

import logging
from dataclasses import dataclass
from typing import Any

from pipeline.common import terminal
from pipeline.config.schema import Config
from pipeline.engine.engine import Engine
from pipeline.engine.probe import AnyForward, choose_forward
from pipeline.job.load import Ready
from pipeline.memory.capacity import Capacity, capacity, context_tokens
from pipeline.memory.facts import job_architecture
from pipeline.prompts.chat import eos_token_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Way:
    """Hold the way through a model, and what the manifest says of it."""

    forward: AnyForward
    report: dict[str, Any]


def choose_way(ready: Ready, config: Config) -> Way:
    """Choose the fastest exact way through the model, and say so where it is not the fastest of all."""
    longest = context_tokens(ready.model.config, config.model.context)
    forward, report = choose_forward(ready.model, config.engine.attention.value, longest)
    if report["why"]:
        terminal.say(f"Attention: {report['path']}, and no faster: {report['why']}.", style="yellow")
    return Way(forward, report)


def make_engine(ready: Ready, forward: AnyForward, config: Config) -> tuple[Engine, Capacity]:
    """Make the engine, and say what it has room for."""
    settings = config.engine
    room = capacity(
        ready.model,
        ready.quant,
        arch=job_architecture(config.model, config.models_dir, config.quant, ready.gpus),
        limits=forward.limits,
        fraction=settings.memory_fraction,
        prefill_tokens=settings.prefill_tokens,
        sampled=not config.generation.greedy or bool(config.generation.constraints),
        max_rows=settings.max_rows,
        max_tokens=settings.max_tokens_in_flight,
        context=config.model.context,
    )
    log.info("At most %d rows and %d tokens in flight", room.max_rows, room.max_tokens)
    engine = Engine(
        forward,
        eos_token_ids(ready.model.generation_config, ready.loaded.tokenizer),
        ready.decode,
        ready.loaded.tokenizer,
        max_rows=room.max_rows,
        max_tokens=room.max_tokens,
        prefill_tokens=settings.prefill_tokens,
        share_prefix=settings.shared_prefix,
    )
    return engine, room
