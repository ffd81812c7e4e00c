"""Run requests through vLLM's process, behind the same interface as our own engine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.common.request import Completion, Request, TokenLogprob
from pipeline.engine.constraint import Constraints
from pipeline.engine.scheduler import Sample
from pipeline.engine.stats import EngineStats
from pipeline.engine.vllm.params import sampling_params
from pipeline.engine.vllm.process import VllmProcess


@dataclass
class VllmStats(EngineStats):
    """Hold the counts of one run as vLLM's process tells them; what it does not tell is null."""

    reserved_kv_cache_bytes: int = 0
    making_tokens: int = 0  # of the rows in flight

    def read(self, progress: dict[str, Any]) -> None:
        """Take in what the process says of itself."""
        self.steps, self.rows, self.peak_rows = (progress[name] for name in ("steps", "rows", "peak_rows"))
        self.prefill_tokens, self.making_tokens = progress["prefill_tokens"], progress["making_tokens"]
        self.peak_kv_cache_bytes = round(progress["peak_usage"] * self.reserved_kv_cache_bytes)

    def summary(self) -> dict[str, Any]:
        """Return what stats.json says of the batch."""
        unknown = ("prefill_padding_fraction", "prefill_sec", "decode_sec", "out_of_memory")
        return {
            "name": "vllm",
            **super().summary(),
            **dict.fromkeys(unknown),
            "reserved_kv_cache_bytes": self.reserved_kv_cache_bytes,
        }


class VllmEngine:
    """Run requests through vLLM.

    Args:
        process: with its engine loaded.
        eos_token_ids: tokens that end a completion.
        tokenizer: needed only for requests with a constraint.
        max_rows: rows in flight; as many wait in the process, so that none is missing when one ends.
        reserved_bytes: for keys and values.
    """

    def __init__(
        self,
        process: VllmProcess,
        eos_token_ids: frozenset[int],
        tokenizer: Any,
        *,
        max_rows: int,
        reserved_bytes: int,
    ) -> None:
        self.stats = VllmStats(reserved_kv_cache_bytes=reserved_bytes)
        self._process = process
        self._eos_token_ids = eos_token_ids
        self._constraints = Constraints(tokenizer, eos_token_ids)
        self._window = 2 * max_rows
        self._flying: dict[str, tuple[Request, int]] = {}

    @property
    def live(self) -> list[Sample]:
        """List the rows whose tokens are here as they are made: vLLM hands over whole completions."""
        return []

    @property
    def tokens(self) -> int:
        """Count the tokens made so far, those of rows in flight as the process last told."""
        return self.stats.completion_tokens + self.stats.making_tokens

    def steps(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """Yield what has finished each time the process says something: twice a second at least, often an empty list.

        Raises:
            JobError: the process has died, or cannot go on.
        """
        waiting = ((request, sample) for request in requests for sample in range(request.params.n))
        while self._send_ahead(waiting):
            message = self._process.receive()
            if "id" in message:
                yield [self._completion(*self._flying.pop(message["id"]), message)]
            else:
                self.stats.read(message["progress"])
                yield []

    def _send_ahead(self, waiting: Iterator[tuple[Request, int]]) -> bool:
        """Fill the window; say whether anything is in it."""
        while len(self._flying) < self._window:
            if (found := next(waiting, None)) is None:
                break
            request, sample = found
            name = f"{sample}/{request.id}"
            self._flying[name] = found
            params = sampling_params(request, sample, self._eos_token_ids)
            self._process.send(
                {"id": name, "prompt_token_ids": list(request.prompt_token_ids), "params": params}
            )
        return bool(self._flying)

    def _completion(self, request: Request, sample: int, answer: dict[str, Any]) -> Completion:
        if "error" in answer:
            return Completion(request.id, sample, (), None, error=f"vLLM refuses this row: {answer['error']}")
        reason, ids = answer["finish_reason"], answer["token_ids"]
        self.stats.making_tokens = max(0, self.stats.making_tokens - len(ids))
        if reason not in ("stop", "length"):
            return Completion(request.id, sample, (), None, error=f"vLLM gave this row up: {reason}")
        logprobs = _logprobs(ids, answer["logprobs"], request.params.logprobs or 0)
        if reason == "stop" and not isinstance(answer["stop_reason"], str):
            ids = ids[:-1]  # the token that ends it
        self.stats.completion_tokens += len(ids)
        return Completion(
            request.id, sample, tuple(ids), reason, logprobs, complete=self._is_whole(request, ids)
        )

    def _is_whole(self, request: Request, token_ids: list[int]) -> bool | None:
        """Say whether the text is whole by its constraint; None without one."""
        if request.constraint is None:
            return None
        followed = self._constraints.begin(request.constraint)
        for token in token_ids:
            followed.advance(token)
        return followed.complete


def _logprobs(
    token_ids: list[int], places: list[list[tuple[int, float]]] | None, count: int
) -> tuple[TokenLogprob, ...] | None:
    """Read the logprobs: at each place vLLM gives those of the likeliest tokens, and of the one it took."""
    if places is None:
        return None
    found = []
    for token, place in zip(token_ids, places, strict=True):
        by_token = {int(token_id): logprob for token_id, logprob in place}
        likeliest = sorted(by_token.items(), key=lambda item: -item[1])[:count]
        found.append(TokenLogprob(token, by_token[token], tuple(likeliest)))
    return tuple(found)
