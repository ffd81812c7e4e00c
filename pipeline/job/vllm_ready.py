"""Say of a model that vLLM's process has loaded what a job says of one of its own."""

import os
from dataclasses import dataclass
from typing import Any

from pipeline.common.gpu import Gpu
from pipeline.common.host import resident_bytes
from pipeline.common.request import GenerationParams
from pipeline.config.vllm_limits import refusal
from pipeline.engine.vllm.process import VllmProcess
from pipeline.job.ready import Ready
from pipeline.memory.measured import DeviceMemory
from pipeline.models.elsewhere import Elsewhere

DIFFERS = (  # from a job of our own engine; docs/engines.md
    "draws are vLLM's own",
    "memory for keys and values is reserved, and does not grow",
)
RANKS = "the GPUs' processes are Ray's, and are in no figure of memory or energy"
BATCH = "text may depend on the rows beside it"


@dataclass(frozen=True, slots=True)
class VllmReady(Ready):
    """Hold a model that vLLM's process has loaded."""

    files: Elsewhere
    process: VllmProcess
    hello: dict[str, Any]  # where it runs
    arguments: dict[str, Any]  # what it was asked for
    reserved: dict[str, Any]  # what it has

    @property
    def embeddings(self) -> int:
        """Count the tokens that the model has a vector for."""
        return int(self.files.text_config().get("vocab_size") or len(self.tokenizer))

    @property
    def ends(self) -> frozenset[int]:
        """Give the tokens that end a completion."""
        return self.files.ends

    def context(self, asked: int | None) -> int:
        """Count the tokens that a row may have: as asked, else the model's own."""
        return int(asked or self.files.text_config().get("max_position_embeddings") or self.longest_row)

    @property
    def longest_row(self) -> int:
        """Count the tokens of the longest row that vLLM takes: as asked, or as it has memory for."""
        return int(self.reserved["max_model_len"])

    def refusal(self, params: GenerationParams) -> str | None:
        """Say which of a row's settings vLLM would take as another; None if it takes all."""
        return refusal(params)

    @property
    def helper(self) -> int:
        """Name the process that works for this one."""
        return self.process.pid

    @property
    def rows(self) -> int:
        """Count the rows that run at once."""
        return int(self.arguments["max_num_seqs"])

    @property
    def over_ray(self) -> bool:
        """Say whether it is computed in Ray's processes, on other nodes too."""
        return self.arguments.get("distributed_executor_backend") == "ray"

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Name the GPUs that it lies on, as vLLM's process sees them: this one may have a torch without GPUs."""
        return tuple(_gpu(**device) for device in self.reserved["devices"])

    def held_bytes(self) -> int:
        """Measure the memory that vLLM's process holds now: on the GPUs that it tells of, else of the host."""
        return sum(gpu["allocated_bytes"] for gpu in self.process.gpus) or resident_bytes(self.helper)

    def device_memory(self) -> list[DeviceMemory]:
        """Give what vLLM's process last told of its GPUs."""
        return [DeviceMemory(**gpu) for gpu in self.process.gpus]

    @property
    def dtypes(self) -> dict[str, str | None]:
        """Name the dtypes that it computes in."""
        return {"plain": str(self.reserved["dtype"]), "products_4bit": None}

    @property
    def engine(self) -> dict[str, Any]:
        """Say what computes, and what of its promises is other than ours."""
        alike = os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0"
        return {
            "name": "vllm",
            "versions": self.hello["versions"],
            "device": self.hello["device"],
            "python": self.process.python,
            "arguments": self.arguments,
            "max_model_len": self.longest_row,
            "differs": [*DIFFERS, *([] if alike else [BATCH]), *([RANKS] if self.over_ray else [])],
        }

    def release(self) -> None:
        """End the process."""
        self.process.close()


def _gpu(capability: tuple[int, int] | None = None, **told: Any) -> Gpu:
    return Gpu(**told, capability=capability and (capability[0], capability[1]))  # JSON makes it a list
