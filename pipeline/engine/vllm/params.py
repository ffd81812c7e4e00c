"""Say a request's settings in vLLM's words."""

import hashlib
from typing import Any

from pipeline.common.request import Request

SHAPES = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
STRICT = {"x-guidance": {"lenient": False, "coerce_one_of": False}}  # as prompts/constraint.py asks


def sampling_params(request: Request, sample: int, eos_token_ids: frozenset[int]) -> dict[str, Any]:
    """Write what vLLM's SamplingParams takes; each sample is a request of its own."""
    params = request.params
    ends = request.stop_token_ids if params.ignore_eos else request.stop_token_ids | eos_token_ids
    return {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "seed": None if params.greedy else seed(params.seed, request.id, sample),
        "stop": params.stop,
        "detokenize": bool(params.stop),
        # All ends are named, so that none is left to what vLLM finds in the model's files.
        "stop_token_ids": sorted(ends),
        "ignore_eos": True,
        "logprobs": params.logprobs,
        **_structured(request),
    }


def seed(number: int, request_id: str, sample: int) -> int:
    """Derive the seed of one sample: its draws depend on nothing else, so that a restart repeats them."""
    key = hashlib.blake2b(f"{number}/{sample}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "big") >> 1


def _structured(request: Request) -> dict[str, Any]:
    for name in request.params.constraints:
        value = getattr(request.params, name)
        shape = {**value, **STRICT} if name == "json_schema" else value
        return {"structured_outputs": {SHAPES[name]: shape}}
    return {}
