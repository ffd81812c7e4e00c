"""Make a job's engine: as many rows and tokens in flight as the memory holds."""

import logging

from pipeline.config.schema import Config
from pipeline.engine.engine import Engine
from pipeline.engine.probe import AnyForward
from pipeline.job.load import Ready
from pipeline.memory.capacity import Capacity, capacity
from pipeline.prompts.chat import eos_token_ids

log = logging.getLogger(__name__)


def make_engine(ready: Ready, forward: AnyForward, config: Config) -> tuple[Engine, Capacity]:
    """Make the engine, and say what it has room for."""
    settings = config.engine
    room = capacity(
        ready.model,
        ready.quant,
        limits=forward.limits,
        fraction=settings.memory_fraction,
        prefill_tokens=settings.prefill_tokens,
        sampled=not config.generation.greedy,
        max_rows=settings.max_rows,
        max_tokens=settings.max_tokens_in_flight,
        context=config.model.context,
    )
    log.info("At most %d rows and %d tokens in flight", room.max_rows, room.max_tokens)
    engine = Engine(
        forward,
        eos_token_ids(ready.model.generation_config, ready.loaded.tokenizer),
        ready.decode,
        max_rows=room.max_rows,
        max_tokens=room.max_tokens,
        prefill_tokens=settings.prefill_tokens,
        share_prefix=settings.shared_prefix,
    )
    return engine, room
