"""What a job ran on: versions, device, revision, prompt file, commit, command, time."""

import datetime
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.common.gpu import Gpu

PACKAGES = (
    "transformers", "torch", "bitsandbytes", "accelerate", "huggingface_hub", "tokenizers", "safetensors",
    "hydra-core", "omegaconf",
)  # fmt: skip


def manifest(
    prompts: str,
    prompts_sha256: str | None,
    source: str,
    revision: str | None,
    gpus: Iterable[Gpu],
    **more: Any,
) -> dict[str, Any]:
    """Plain data for manifest.json.

    Args:
        prompts_sha256: of the prompt file as the job read it.
        source: the model's folder or hub name; revision: its commit, None for a folder.
        gpus: those that the model lies on.
        more: further entries.
    """
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "pipeline", *sys.argv[1:]],
        "model": source,
        "revision": revision,
        "prompts": prompts,
        "prompts_sha256": prompts_sha256,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": _device(gpus),
        **more,
    }


def model_digest(folder: Path, revision: str | None) -> str:
    """What tells whether a model is still the same: the hub's commit, or of a folder its small files'
    content and its weights' sizes.
    """
    if revision is not None:
        return revision
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.glob("*") if p.is_file()):
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def gpu_uuids(model: Any) -> list[str]:
    """Name the cards that hold a model as the driver does; torch's numbers follow CUDA_VISIBLE_DEVICES."""
    cards = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return sorted(f"GPU-{torch.cuda.get_device_properties(card).uuid}" for card in cards)


def _git_commit() -> str | None:
    """The commit of the folder that the pipeline runs from, if it is a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _device(gpus: Iterable[Gpu]) -> dict[str, Any]:
    return {
        "gpus": [
            {
                "name": gpu.name,
                "backend": gpu.backend,
                "total_bytes": gpu.total_bytes,
                "capability": gpu.capability and "{}.{}".format(*gpu.capability),
                "mig": gpu.mig,
            }
            for gpu in gpus
        ],
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cpu": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
