"""Check the machine: versions, devices, bitsandbytes' real ability, Slurm. Plain data, no network."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from importlib import import_module, metadata
from typing import Any

import psutil
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pipeline.common.errors import PipelineError
from pipeline.common.gpu import Gpu
from pipeline.common.processors import OthersWork, crowded, usable_cores
from pipeline.common.units import GB, gigabytes
from pipeline.engine.accelerators import KINDS, describe, free_bytes, visible_devices
from pipeline.engine.cpu import load_kernels
from pipeline.memory.devices import visible_gpus
from pipeline.memory.gpu_tools import hides_all


class State(Enum):
    """Say how a finding is to be taken."""

    green = "ok"
    yellow = "look"  # works, but not as well as it could
    red = "broken"  # a job would fail


@dataclass(frozen=True, slots=True)
class Check:
    """Hold what was looked at, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    next_step: str = ""


# What each needs to be, and what happens otherwise.
NEEDS = (
    ("torch", ">=2.8", "older ones lack what transformers calls"),
    ("transformers", ">=5.10.1", "older ones have another attention interface and load weights in another way"),
    ("accelerate", ">=1.10", "device maps need it"),
    ("bitsandbytes", ">=0.50", "below, no kernels for CPUs, and batches of 2–64 rows up to 4 times slower on GPUs"),
    ("huggingface_hub", ">=1.0", "transformers 5 needs it"),
    ("safetensors", ">=0.6", "transformers 5 needs it"),
    ("hydra-core", ">=1.3.2,<1.4", "other versions compose configs differently"),
    ("omegaconf", ">=2.3,<2.4", "hydra-core 1.3 needs it"),
)  # fmt: skip
SAMPLE_SEC = 0.5  # for the load
TOLERANCE = 0.05  # of a 4-bit product against the product of its dequantized weights, relative, in bfloat16
INT8_TOLERANCE = 0.1  # its weights and inputs are rounded, too
QUANTIZATION_TOLERANCE = 0.2  # of nf4 weights against the real ones: about 0.1 for normal weights


def check_versions() -> list[Check]:
    """Check Python, each library that decides whether a job runs, and combinations known to be bad."""
    python = ".".join(map(str, sys.version_info[:3]))
    made = [
        Check("python", State.green, python)
        if sys.version_info >= (3, 11)
        else Check("python", State.red, python, "Install Python 3.11 or later.")
    ]
    made += [check_version(name, needs, why, installed(name)) for name, needs, why in NEEDS]
    return made


def check_version(name: str, needs: str, why: str, version: str | None) -> Check:
    """Hold one library against what it needs to be."""
    install = f"pip install '{name}{needs}'"
    if version is None:
        return Check(name, State.red, "not installed", f"{install}.")
    if Version(version).base_version not in SpecifierSet(needs):
        return Check(name, State.red, f"{version}, needs {needs}: {why}", f"{install}.")
    return Check(name, State.green, version)


def installed(name: str) -> str | None:
    """Return the version that is installed; None for none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_devices() -> list[Check]:
    """Show the host and every GPU with their free memory, and a GPU that this torch cannot use."""
    memory = psutil.virtual_memory()
    words = f"{psutil.cpu_count()} cores, {gigabytes(memory.available)} of {gigabytes(memory.total)} free"
    capability = torch.backends.cpu.get_cpu_capability()
    made = [Check("cpu", State.green, f"{words}, {capability}")]
    if memory.available < GB:
        made[0] = Check(
            "cpu", State.yellow, words, "Free some memory: even the smallest model wants about 1 GB."
        )
    found = visible_devices()
    read = {gpu.uuid: gpu.free_bytes for gpu in visible_gpus() if gpu.uuid}
    for device in found:
        gpu = describe(device)
        # A product will run on it anyway (check_bitsandbytes), so that asking may open it.
        free = read.get(gpu.uuid or "") or free_bytes(device)
        made.append(check_gpu(str(device), replace(gpu, free_bytes=free), torch.cuda.get_arch_list()))
    return made if found else [*made, _no_gpu()]


def check_load() -> list[Check]:
    """Say that other programs use the processors, where jobs run on them."""
    if torch.cuda.device_count():
        return []
    others = OthersWork()
    time.sleep(SAMPLE_SEC)
    busy = others.busy_cores()
    if words := crowded(busy, torch.get_num_threads()):
        fix = "A job will be slower than on a quiet machine; docs/performance.md says by how much."
        return [Check("other programs", State.yellow, words, fix)]
    return [Check("other programs", State.green, f"{busy:.1f} of {len(usable_cores())} cores busy")]


def devices() -> list[torch.device]:
    """List the CPU, and every GPU that bitsandbytes is made for."""
    return [torch.device("cpu"), *(device for device in visible_devices() if device.type in KINDS)]


def check_kernels() -> list[Check]:
    """Look for the kernels, and compile those for models in bf16, where jobs run on the CPU."""
    if torch.cuda.device_count():
        return []
    kernels = load_kernels()
    if kernels is None:
        found = "none: models in bf16 run slower than they could"
        return [Check("cpu kernels", State.yellow, found, "pip install 'llm-job-pipeline[cpu]'.")]
    kernels.compile_for(torch.bfloat16)
    multiplies = f"products of {kernels.MULTIPLIES}"
    found = multiplies if kernels.products else "but no products of our own: this CPU has no AVX2"
    return [Check("cpu kernels", State.green, f"compiled; {found}")]


def check_bitsandbytes(device: torch.device) -> list[Check]:
    """Quantize a matrix on this device, multiply, and compare with the plain product."""
    made: list[Check] = []
    for method, try_it, tolerance in (
        ("nf4", _nf4_error, TOLERANCE),
        ("int8", _int8_error, INT8_TOLERANCE),
    ):
        name = f"bitsandbytes {method} on {device}"
        try:
            error = try_it(device)
        except Exception as failure:  # noqa: BLE001  whatever a native library raises is the finding
            line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
            made.append(
                Check(name, State.red, f"fails: {line}", "Use quant=none, or pip install -U bitsandbytes.")
            )
            continue
        words = f"a product is off by {error:.1%}"
        if error <= tolerance:
            made.append(Check(name, State.green, words))
        else:
            made.append(
                Check(name, State.red, f"{words}, above {tolerance:.0%}", "pip install -U bitsandbytes.")
            )
    return made


def check_slurm() -> list[Check]:
    """Say whether jobs can be submitted from here."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return [Check("slurm", State.green, f"inside job {job}")]
    if shutil.which("sbatch") is None:
        return [Check("slurm", State.green, "not on this machine; jobs run here")]
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        fix = "sinfo says why. Jobs can run on this machine meanwhile."
        return [Check("slurm", State.yellow, "sbatch is here, but the cluster gives no answer", fix)]
    made = [Check("slurm", State.green, f"partitions: {', '.join(done.stdout.split())}")]
    if shutil.which("sacct") is None:
        made.append(
            Check(
                "slurm sacct",
                State.yellow,
                "missing",
                "Without accounting, a killed job looks as if it ran for ever.",
            )
        )
    if installed("submitit") is None:
        made.append(
            Check(
                "submitit", State.yellow, "not installed", "To submit: pip install 'llm-job-pipeline[slurm]'."
            )
        )
    return made


def check_gpu(name: str, gpu: Gpu, architectures: list[str]) -> Check:
    """Describe a GPU in words, and say whether this torch and what others left of it will do.

    Args:
        name: as torch calls it.
        architectures: what torch is built for, as sm_90.
    """
    words = ", ".join(_describe(gpu))
    if gpu.capability is not None:
        kind = "sm_{}{}".format(*gpu.capability)
        # A build runs on later minor versions of the architectures that it has.
        built = [arch for arch in architectures if arch.startswith("sm_")]
        if not any(arch[:-1] == kind[:-1] and arch <= kind for arch in built):
            fix = f"Install a torch that is built for {kind}; this one has {', '.join(built)}."
            return Check(name, State.red, words, fix)
    if gpu.free_bytes is not None and gpu.total_bytes and gpu.free_bytes < gpu.total_bytes / 2:
        return Check(name, State.yellow, words, "Others use this GPU too: its driver's tool says who.")
    return Check(name, State.green, words)


def _describe(gpu: Gpu) -> Iterator[str]:
    yield gpu.name
    if gpu.mig:
        yield "a MIG slice"
    if gpu.capability:
        yield "compute capability {}.{}".format(*gpu.capability)
    total = "an unknown size" if gpu.total_bytes is None else gigabytes(gpu.total_bytes)
    yield f"{'an unknown part' if gpu.free_bytes is None else gigabytes(gpu.free_bytes)} of {total} free"
    yield "bfloat16" if gpu.bf16 else "no bfloat16 of its own: auto is float16"


def _no_gpu() -> Check:
    if shutil.which("nvidia-smi") is None or hides_all("cuda", os.environ):
        return Check("gpu", State.green, "none; jobs run on the CPU")
    build = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        fix = "Install torch with CUDA: pytorch.org/get-started says which."
        return Check("gpu", State.yellow, f"there is a driver, but {build} is built for CPUs", fix)
    return Check(
        "gpu", State.yellow, f"there is a driver, but {build} sees no GPU", "Look at nvidia-smi's answer."
    )


@torch.inference_mode()
def _nf4_error(device: torch.device) -> float:
    """Measure the relative error of the 4-bit product; or of the quantization itself if that is beyond bounds."""
    bf16 = device.type not in KINDS or describe(device).bf16
    dtype = torch.bfloat16 if bf16 else torch.float16
    weight, x = _weight(), _input().to(device, dtype)
    nn, bnb = _bitsandbytes()
    layer = nn.Linear4bit(512, 256, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer.to(device)
    packed, scales = bnb.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
    plain = bnb.dequantize_4bit(packed, scales)
    lost = _relative(plain, weight.to(device))
    return lost if lost > QUANTIZATION_TOLERANCE else _relative(layer(x), x.float() @ plain.float().T)


@torch.inference_mode()
def _int8_error(device: torch.device) -> float:
    weight, x = _weight(), _input().to(device, torch.float16)
    nn, _ = _bitsandbytes()
    layer = nn.Linear8bitLt(512, 256, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    layer.to(device)
    return _relative(layer(x), x.float() @ weight.to(device).T)


def _bitsandbytes() -> tuple[Any, Any]:
    """Return its layers and its functions, imported only here, so that a broken installation is a finding."""
    return import_module("bitsandbytes.nn"), import_module("bitsandbytes.functional")


def _weight() -> torch.Tensor:
    """Make [256, 512] float32, always the same."""
    return torch.randn(256, 512, generator=torch.Generator().manual_seed(0))


def _input() -> torch.Tensor:
    """Make [4, 512] float32."""
    return torch.randn(4, 512, generator=torch.Generator().manual_seed(1))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def refused(name: str, error: PipelineError) -> Check:
    """Make an error a red check."""
    return Check(name, State.red, error.found, error.fix)
