"""What the engine's tests share: requests, the text of each alone by `model.generate`, an engine run."""

import functools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pipeline.common.request import Completion, GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.model_facts import rope_switch
from pipeline.engine.rectangles.forward import Forward

EOS = frozenset({2, *range(40, 46)})  # enough of a tiny model's 300 tokens that some rows meet one
# With a prefix of 12: below, at and above phi3's switch at 64 and gemma's window of 16.
OWN_TOKENS = (1, 3, 3, 20, 40, 47, 50, 51, 52, 53, 60, 90, 5, 33)
NEW_TOKENS = (80, 7, 45, 34, 33, 12, 12, 1, 40, 3, 50, 25, 2, 64)


def mixed_requests(params: dict[str, Any] | None = None, prefix_tokens: int = 12) -> list[Request]:
    """Prompts of 13 to 102 tokens that share a prefix, with 1 to 80 new tokens; two are asked twice."""
    draw = random.Random(7)
    prefix = [draw.randrange(60, 300) for _ in range(prefix_tokens)]
    made = [
        Request(
            f"r{i}",
            (*prefix, *(draw.randrange(60, 300) for _ in range(own))),
            GenerationParams(max_new_tokens=new, **(params or {})),
        )
        for i, (own, new) in enumerate(zip(OWN_TOKENS, NEW_TOKENS, strict=True))
    ]
    again = [Request(f"{made[i].id}-again", made[i].prompt_token_ids, made[i].params) for i in (2, 11)]
    return made + again


def shuffled(requests: Sequence[Request], seed: int) -> list[Request]:
    return random.Random(seed).sample(list(requests), len(requests))


def alone(model: Any, request: Request, eos: Iterable[int] = EOS) -> tuple[int, ...]:
    """The tokens that `model.generate` makes greedily of this prompt alone, without the eos."""
    return _alone(model, request.prompt_token_ids, request.params.max_new_tokens, tuple(sorted(eos)))


@functools.cache
@torch.inference_mode()
def _alone(model: Any, prompt: tuple[int, ...], new_tokens: int, eos: tuple[int, ...]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    ends = list(eos) or [model.config.vocab_size]  # a token that never comes
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=ends,
        pad_token_id=0,
        # Past longrope's switch, transformers before 5.20 drops the cache and feeds the last token alone.
        **({} if rope_switch(model.config) is None else {"use_cache": False}),
    )[0, ids.shape[1] :].tolist()
    return tuple(made[:-1] if made[-1] in ends else made)


def run(forward: Forward, requests: Iterable[Request], **settings: Any) -> dict[tuple[str, int], Completion]:
    """All completions by request and sample, and a check that none comes twice."""
    return run_engine(Engine(forward, EOS, **settings), requests)


def run_engine(engine: Engine, requests: Iterable[Request]) -> dict[tuple[str, int], Completion]:
    done = list(engine.generate(requests))
    by_key = {(c.request_id, c.sample): c for c in done}
    assert len(by_key) == len(done), "a completion came twice"
    return by_key


def tokens(completions: dict[tuple[str, int], Completion]) -> dict[tuple[str, int], tuple[int, ...]]:
    assert not [c.error for c in completions.values() if c.error]
    return {key: c.token_ids for key, c in completions.items()}
