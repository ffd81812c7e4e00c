"""Check the room that one model needs: memory for its weights, disk for them and for outputs."""

import os
import shutil
from pathlib import Path

from huggingface_hub import constants

from pipeline.common.errors import ConfigError, LoadError, PipelineError
from pipeline.common.units import GB, gigabytes, megabytes
from pipeline.config.quant import SMALLEST
from pipeline.config.schema import Config
from pipeline.config.stored_format import label
from pipeline.memory.devices import find_device
from pipeline.memory.facts import find_facts
from pipeline.memory.peaks import held_weight_bytes, load_peak
from pipeline.models.checkpoint import find_checkpoint
from pipeline.models.loading_checks import check_format
from pipeline.views.architecture import ArchitectureView, architecture_view
from pipeline.views.machine import Check, State, refused

OUTPUTS_BYTES = GB  # about a million completions


def check_room(config: Config) -> list[Check]:
    """Look for memory for the weights, disk for weights that are still to come, and for outputs."""
    if (checkpoint := find_checkpoint(config.model, config.models_dir)) is not None:
        try:
            checkpoint.read_config()
        except LoadError as error:
            return [refused("model config", error), _check_outputs(config)]
        try:
            stored = check_format(checkpoint, config.model, config.quant)
        except LoadError as error:
            return [refused("quantization", error), _check_outputs(config)]
        if stored is not None:
            found = Check("quantization", State.green, label(stored))
            return [found, _check_memory(None, config), _check_outputs(config)]
    try:
        view = architecture_view(config.model, config.quant, config.models_dir)
    except PipelineError as error:
        return [refused("model config", error), _check_outputs(config)]
    made = [*_check_quantized(view), _check_memory(view, config)]
    local = checkpoint is not None and checkpoint.revision is None
    if not (local or (checkpoint is not None and checkpoint.has_weights)):
        made.append(_check_download(config, view.parameters))
    return [*made, _check_outputs(config)]


def _check_memory(view: ArchitectureView | None, config: Config) -> Check:
    """Compare what a model takes with what is free; without a view, one that came quantized."""
    quant = config.quant
    need = view.bytes + (view.quant_state_bytes or 0) if view else 0
    try:
        device = find_device(None)
    except ConfigError as error:
        fix = "python -m pipeline plan memory=24GB says whether it fits in so much."
        return Check("memory", State.yellow, f"{megabytes(need)} of weights. {error.found}", fix)
    gpus, free = device.gpus, device.free_bytes
    try:
        arch, settled, _ = find_facts(config.model, config.models_dir).loaded(quant, gpus)
    except ConfigError as error:
        if view is None:
            return refused("memory", error)
        words = f"{megabytes(need)} of weights"
    else:
        loading = load_peak(arch, settled, gpus=gpus, packed=config.engine.pack_weights)
        need = need or held_weight_bytes(arch, settled)
        words = f"{megabytes(need)} of weights, loading them takes {loading.words}"
        need = max(need, loading.needed)
    where = f"{gigabytes(free)} free on {device.name}"
    more = "python -m pipeline plan says what else would fit."
    if need < 0.8 * free:
        return Check("memory", State.green, f"{words}, {where}")
    if need < free:
        return Check("memory", State.yellow, f"{words}, {where}: little is left for prompts", more)
    smaller = "a smaller model" if quant.four_bit else f"quant={SMALLEST}"
    if gpus and need < free + device.offload_bytes and not quant.quantized:
        return Check(
            "memory",
            State.yellow,
            f"{words}, {where}: a part goes to the CPU, slowly",
            f"Try {smaller}. {more}",
        )
    return Check("memory", State.red, f"{words}, {where}: does not fit", f"Try {smaller}. {more}")


def _check_quantized(view: ArchitectureView) -> list[Check]:
    """Say how much the quantization would pass over."""
    found = view.quantized
    if found is None:
        return []
    words = found.words
    if found.share == 0:
        return [
            Check(
                "quantization", State.red, words, "Use quant=none: bitsandbytes takes no layer of this model."
            )
        ]
    fix = "quant=none may be as small, and is nearer to the model's own answers."
    return [Check("quantization", State.yellow, words, fix)] if found.passed_over else []


def _check_download(config: Config, parameters: int) -> Check:
    need = 2 * parameters  # 16-bit checkpoints, as nearly all are
    free = shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free
    words = f"about {gigabytes(need)} to download, {gigabytes(free)} free in {constants.HF_HUB_CACHE}"
    if free < 1.1 * need:
        return Check("disk for weights", State.red, words, "Set HF_HOME to a larger disk, or models_dir=DIR.")
    return Check("disk for weights", State.green, words)


def _check_outputs(config: Config) -> Check:
    folder = _existing(Path(config.outputs_dir))
    free = shutil.disk_usage(folder).free
    words = f"{gigabytes(free)} free in {config.outputs_dir}"
    if not os.access(folder, os.W_OK):
        return Check("disk for outputs", State.red, f"{folder} cannot be written", "Set outputs_dir=DIR.")
    if free < OUTPUTS_BYTES:
        return Check("disk for outputs", State.yellow, words, "Free some space, or set outputs_dir=DIR.")
    return Check("disk for outputs", State.green, words)


def _existing(folder: Path) -> Path:
    """Find the nearest folder above that is there already."""
    return next((parent for parent in (folder, *folder.parents) if parent.is_dir()), Path())
