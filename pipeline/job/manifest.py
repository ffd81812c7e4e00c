"""Write down what a job runs on: versions, device, revision, prompt file, commit, command, time."""

import datetime
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.common.errors import JobError
from pipeline.common.gpu import Gpu
from pipeline.common.hidden import hide_environment
from pipeline.config.schema import Config
from pipeline.job.folder import JobFolder
from pipeline.job.paths import JobPaths, read_json
from pipeline.job.ready import Ready
from pipeline.job.stored import read_manifest
from pipeline.models.quantized_experts import has_quantized_experts
from pipeline.prompts.template import examine, find_template

PACKAGES = (
    "transformers", "torch", "bitsandbytes", "accelerate", "huggingface_hub", "tokenizers", "safetensors",
    "hydra-core", "omegaconf",
)  # fmt: skip


def model_facts(ready: Ready, config: Config) -> dict[str, Any]:
    """Say which model this is, and what it computes in: rows of another are other rows."""
    asked, own = config.model.context, ready.loaded.own_settings
    return {
        "engine": ready.engine,
        "model": ready.loaded.source,
        "revision": ready.loaded.revision,
        "model_digest": "+".join(_digests(ready)),
        "adapter": adapter_facts(ready),
        "dtypes": ready.dtypes,
        "quantization": ready.quantization,
        "quantized_experts": ready.loaded.model is not None and has_quantized_experts(ready.loaded.model),
        "context": {
            "tokens": ready.context(asked),
            "source": "config.json" if asked is None else "model.context",
        },
        "suggested_generation": {
            "applied": own.applied(config.generation),
            "not_applied": own.not_applied(config.generation),
        },
    }


def adapter_facts(ready: Ready) -> dict[str, Any] | None:
    """Say which adapter the model was loaded with, and how; None without one."""
    if (applied := ready.loaded.adapter) is None:
        return None
    files = applied.files.files
    return {
        "source": files.source,
        "revision": files.revision,
        "base": applied.files.base,
        "merged": applied.merged,
    }


def _digests(ready: Ready) -> Iterator[str]:
    yield model_digest(Path(ready.loaded.source), ready.loaded.revision)
    if (applied := ready.loaded.adapter) is not None:
        yield model_digest(applied.files.files.folder, applied.files.files.revision)


def check_same_model(results: JobFolder, facts: dict[str, Any]) -> None:
    """Refuse to mix rows of two models in one file, or those of a model in two dtypes.

    Raises:
        JobError: the manifest of the rows that are there says another.
    """
    before = read_manifest(results)
    if before.get("model_digest", facts["model_digest"]) != facts["model_digest"]:
        raise JobError(
            found=f"{results.folder}: its rows are of {before.get('model')}, revision {before.get('revision')}, "
            f"as it was on {before.get('when')}; the model's files have changed since",
            fix="Pin that revision with model.revision=… to go on, or pass resume=never to make all rows anew.",
        )
    if (made_in := before.get("dtypes", facts["dtypes"])) != facts["dtypes"]:
        raise JobError(
            found=f"{results.folder}: its rows were computed in {made_in}, and this device computes in "
            f"{facts['dtypes']}",
            fix="Go on with a device like the first, or pass resume=never to make all rows anew.",
        )
    check_same_experts(results.folder, facts["quantized_experts"])


def check_same_experts(folder: Path, quantized: bool) -> None:
    """Refuse a model that holds its experts otherwise than the one that made a job's rows.

    Raises:
        JobError: the manifest of the rows that are there says so.
    """
    before = read_manifest(JobPaths(folder))
    if before and before.get("quantized_experts", False) != quantized:  # an older version had none
        then, now = ("stayed plain", "quantized") if quantized else ("were quantized", "plain")
        raise JobError(
            found=f"{folder}: its rows were made while the experts of this mixture {then}, and they are "
            f"{now} now",
            fix="Run the job with resume=never, which makes all rows anew.",
        )


def with_day(config: Config, results: JobPaths, *, goes_on: bool) -> Config:
    """Put the day into a job's config: the one that it names, else that when the job began.

    Args:
        goes_on: the folder has rows of an earlier run, whose manifest has its day.
    """
    if config.model.template_date is not None:
        return config
    if goes_on:
        noted = (read_json(results.manifest) or {}).get("template_date")
        with suppress(TypeError, ValueError):  # damaged, or of a version that noted none
            return replace(config, model=replace(config.model, template_date=noted))
    return replace(config, model=replace(config.model, template_date=datetime.date.today().isoformat()))


def day_facts(ready: Ready, config: Config) -> dict[str, Any]:
    """Say which day the job has for today, and whether its prompts say it."""
    model = config.model
    day = datetime.datetime.fromisoformat(str(model.template_date))
    template = find_template(ready.tokenizer, model.chat_template, model.chat_template_kwargs, day)
    written = template is not None and examine(template).writes_date
    return {"template_date": model.template_date, "prompts_have_date": written}


def manifest(prompts: str, prompts_sha256: str | None, gpus: Iterable[Gpu], **facts: Any) -> dict[str, Any]:
    """Give plain data for manifest.json.

    Args:
        prompts_sha256: of the prompt file as the job read it.
        gpus: those that the model lies on.
        facts: what there is to say of the model.
    """
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "pipeline", *map(hide_environment, sys.argv[1:])],
        **facts,
        "prompts": prompts,
        "prompts_sha256": prompts_sha256,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": _device(gpus),
    }


def model_digest(folder: Path, revision: str | None) -> str:
    """Tell whether a model is still the same: by the hub's commit, or its small files and weights' sizes."""
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
    """Ask for the commit of the folder that the pipeline runs from, if it is a checkout."""
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
