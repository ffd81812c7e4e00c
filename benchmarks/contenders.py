"""Who takes part: our own job, and the peers with the environment and the files that each needs."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from products import without

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Contender:
    """One way to push a prompt file through the model.

    `env` is a folder of --envs with a virtual environment. `converted` is the model in the peer's own
    format, below that folder, where "{model}" is the model folder's name and "{dtype}" the dtype. `held`
    is what holds it to AVX2, below that folder, where variables do not.
    """

    name: str
    env: str
    script: str
    options: list[str] = field(default_factory=list)
    converted: str | None = None
    held: str | None = None
    own_threads: bool = False  # binds its threads to the cores itself


OURS = "ours"
QUANTIZED = {"ours int8": "int8", "ours nf4": "nf4"}  # our job in another precision than --dtype's
# Our job around vLLM, with the peer's environment: what it costs beside vLLM alone.
BY_VLLM = {
    "ours by vllm": [],
    "ours by vllm-eager": ["engine.extra={enforce_eager: true}"],
}
PEERS = [
    Contender("generate", "transformers", "generate.py"),
    Contender("pipeline", "transformers", "text_pipeline.py"),
    Contender("generate_batch", "transformers", "generate_batch.py"),
    Contender("vllm", "vllm", "vllm_cpu.py", own_threads=True),
    Contender("vllm-eager", "vllm", "vllm_cpu.py", ["--eager"], own_threads=True),
    Contender(
        "openvino", "openvino", "openvino_cb.py", converted="models/{model}-fp32", held="avx2/answer.so"
    ),
    Contender("llama.cpp", "llama_cpp", "llama_cpp.py", converted="models/{model}-{dtype}.gguf"),
    Contender("llama.cpp-q8_0", "llama_cpp", "llama_cpp.py", converted="models/{model}-q8_0.gguf"),
    Contender("llama.cpp-q4_k_m", "llama_cpp", "llama_cpp.py", converted="models/{model}-q4_k_m.gguf"),
]
REFERENCE = Contender("reference", "transformers", "reference.py")
# How a CPU's newer features begin that one with AVX2 alone has not, and what holds torch's libraries to it.
NEWER_THAN_AVX2 = ("amx", "avx10", "avx512", "avxvnni")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Setting:
    """Where things are, for one run of the benchmark."""

    model: Path
    dtype: str
    envs: Path
    python: str  # runs our own job
    job_args: list[str]
    avx2: bool  # as on a CPU with nothing newer


def _converted(peer: Contender, setting: Setting) -> Path | None:
    if peer.converted is None:
        return None
    name = peer.converted.format(model=setting.model.name, dtype=setting.dtype)
    return setting.envs / peer.env / name


def missing(peer: Contender, setting: Setting) -> str | None:
    """Return the command that installs the peer or converts the model for it; None where all is there."""
    env = setting.envs / peer.env
    held = env / peer.held if setting.avx2 and peer.held else None
    needs = [env / "bin" / "python", _converted(peer, setting), held]
    if all(path is None or path.exists() for path in needs):
        return None
    return f"benchmarks/setup_peers.sh {setting.envs} {setting.model} {peer.env}"


def peer_command(peer: Contender, setting: Setting, tokens: Path, out: Path) -> list[str]:
    command = [str(setting.envs / peer.env / "bin" / "python"), str(HERE / "peers" / peer.script)]
    command += ["--model", str(setting.model), "--prompts", str(tokens), "--out", str(out)]
    command += ["--dtype", setting.dtype, *peer.options, *(["--avx2"] if setting.avx2 else [])]
    converted = _converted(peer, setting)
    return command if converted is None else [*command, "--converted", str(converted)]


def job_command(
    setting: Setting, prompts: Path, generation: list[str], out: Path, name: str = OURS
) -> list[str]:
    """Return the command of our own job, by our own engine or by vLLM, into an empty folder."""
    python = setting.envs / "vllm" / "bin" / "python"
    engine = ["engine=vllm", f"engine.python={python}", *BY_VLLM[name]] if name in BY_VLLM else []
    return [
        setting.python, "-m", "pipeline", "model=smollm2", f"model.name={setting.model}",
        f"quant={QUANTIZED.get(name, setting.dtype)}", f"prompts={prompts}", f"outputs_dir={out}", "resume=never",
        *generation, *engine, *setting.job_args,
    ]  # fmt: skip


def environment(peer: Contender | None, name: str = OURS, avx2: bool = False) -> dict[str, str]:
    """Give every contender all cores and no look at the hub, and hold it to AVX2 where asked."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    if name in BY_VLLM or (peer and peer.own_threads):
        del env["OMP_NUM_THREADS"]
    if avx2:
        env |= {**AVX2, "NUMBA_CPU_FEATURES": without(NEWER_THAN_AVX2)}
    return env
