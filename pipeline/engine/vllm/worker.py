"""Serve vLLM to a process that has it not, in lines of JSON. Runs alone, in any Python where vLLM is.

in:   the arguments of vLLM's engine, once; then a request a line. Input that ends, ends the process.
out:  {"hello": …} and {"ready": …}                           what is here, and what the engine has reserved
      {"id": …, "token_ids": …} or {"id": …, "error": …}      a completion, or why there is none
      {"progress": …}                                         twice a second, and before the last completion
      {"failed": …}                                           at the end: why the engine cannot go on
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

BEAT_SEC = 0.5
Say = Callable[..., None]


def main() -> int:
    """Serve until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a scheduler tells all processes; the one that asks decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is for the log

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        import torch
        import vllm
        from vllm.platforms import current_platform

        versions = {"vllm": vllm.__version__, "torch": torch.__version__}
        say(hello={"device": current_platform.device_type, "versions": versions})
        Server(say, json.loads(sys.stdin.readline())).run()
    except Exception as error:
        traceback.print_exc()
        say(failed=f"{type(error).__name__}: {error}")
        return 1
    return 0


class Server:
    """Hold vLLM's engine, and count what it does.

    Args:
        arguments: "engine" holds those of vLLM's EngineArgs; "adapter" a LoRA's folder, or null.
    """

    def __init__(self, say: Say, arguments: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.llm_engine import LLMEngine

        self._say = say
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments["engine"]))
        self._core = self._engine.engine_core.engine_core  # with VLLM_ENABLE_V1_MULTIPROCESSING=0 it is here
        adapter = arguments["adapter"]
        self._lora = LoRARequest("adapter", 1, adapter) if adapter else None
        self._requests: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._counts = {"steps": 0, "rows": 0, "peak_rows": 0, "prefill_tokens": 0}
        self._peak_usage = 0.0
        self._said = time.monotonic()

    def run(self) -> None:
        """Serve until the input ends."""
        self._say(ready=self._reserved())
        threading.Thread(target=self._read, daemon=True).start()
        while self._take():
            outputs = self._step()
            over = not self._engine.has_unfinished_requests()
            if over or time.monotonic() - self._said > BEAT_SEC:
                self._said = time.monotonic()
                self._say(progress=self._progress(outputs))
            for output in outputs:
                self._say(id=output.request_id, **_completion(output.outputs[0]))

    def _read(self) -> None:
        for line in sys.stdin:
            self._requests.put(line)
        self._requests.put("")

    def _take(self) -> bool:
        """Hand all requests that have come to the engine, or wait for one; say whether the input goes on."""
        while not self._engine.has_unfinished_requests() or not self._requests.empty():
            line = self._requests.get()
            if not line:
                return False
            self._add(json.loads(line))
        return True

    def _add(self, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        settings, prompt = request["params"], request["prompt_token_ids"]
        try:
            if shape := settings.pop("structured_outputs", None):
                settings["structured_outputs"] = StructuredOutputsParams(**shape)
            params = SamplingParams(**settings, output_kind=RequestOutputKind.FINAL_ONLY)
            self._engine.add_request(
                request["id"], {"prompt_token_ids": prompt}, params, lora_request=self._lora
            )
        except (ValueError, VLLMClientError) as error:  # the row fails, and not the job
            self._say(id=request["id"], error=str(error))

    def _step(self) -> list[Any]:
        outputs = [output for output in self._engine.step() if output.finished]
        running = len(self._core.scheduler.running) + len(outputs)  # those of this step, too
        counts = self._counts
        counts["steps"] += 1
        counts["rows"] += running
        counts["peak_rows"] = max(counts["peak_rows"], running)
        for output in outputs:
            counts["prefill_tokens"] += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
        self._peak_usage = max(self._peak_usage, self._core.scheduler.kv_cache_manager.usage)
        return outputs

    def _progress(self, ended: list[Any]) -> dict[str, Any]:
        making = sum(request.num_output_tokens for request in self._core.scheduler.running)
        making += sum(len(output.outputs[0].token_ids) for output in ended)  # which are told next
        return {**self._counts, "making_tokens": making, "peak_usage": self._peak_usage, "gpus": _gpus()}

    def _reserved(self) -> dict[str, Any]:
        config = self._engine.vllm_config
        caches = [tensor.size for tensor in self._core.scheduler.kv_cache_config.kv_cache_tensors]
        return {
            "max_model_len": config.model_config.max_model_len,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "kv_cache_bytes": sum(caches) * config.parallel_config.world_size,
            "weight_bytes": self._weight_bytes(),
            "devices": _devices(config.parallel_config.world_size),
            "gpus": _gpus(),
        }

    def _weight_bytes(self) -> int | None:
        """Sum the model's weights; None on a CPU, which packs them out of sight, and in parts on several GPUs."""
        config = self._engine.vllm_config
        if config.device_config.device_type == "cpu" or config.parallel_config.world_size > 1:
            return None
        [size] = self._engine.apply_model(lambda model: sum(p.nbytes for p in model.parameters()))
        return int(size)


def _devices(count: int) -> list[dict[str, Any]]:
    """Describe the GPUs that the engine computes on, as far as this machine has them: others are on other nodes."""
    import torch
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if kind == "cpu":
        return []
    backend, module = "rocm" if torch.version.hip else kind, getattr(torch, kind)
    return [
        _device(backend, module.get_device_properties(index))
        for index in range(min(count, module.device_count()))
    ]


def _device(backend: str, properties: Any) -> dict[str, Any]:
    found = {"backend": backend, "name": properties.name, "total_bytes": properties.total_memory}
    if backend != "cuda":
        return found
    part = "MIG" if " MIG " in properties.name else "GPU"
    return {
        **found,
        "capability": [properties.major, properties.minor],
        "uuid": f"{part}-{properties.uuid}",
    }


def _gpus() -> list[dict[str, Any]]:
    """Read the GPUs that this process computes on; those of a tensor-parallel group's others it does not see."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    return [
        {
            "index": index,
            "name": torch.cuda.get_device_name(index),
            "total_bytes": total,
            "allocated_bytes": torch.cuda.memory_allocated(index),
            "reserved_bytes": reserved,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(index),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(index),
            "outside_bytes": max(0, total - free - reserved),
        }
    ]


def _completion(made: Any) -> dict[str, Any]:
    logprobs = made.logprobs and [
        [(token_id, found.logprob) for token_id, found in place.items()] for place in made.logprobs
    ]
    return {
        "token_ids": list(made.token_ids),
        "finish_reason": made.finish_reason,
        "stop_reason": made.stop_reason,
        "logprobs": logprobs,
    }


if __name__ == "__main__":
    sys.exit(main())
