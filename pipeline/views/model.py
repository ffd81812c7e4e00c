"""Check one model: the way to its files, its tokenizer and template, room for weights and outputs."""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.common.errors import ConfigError, LoadError, PipelineError
from pipeline.common.request import GenerationParams, PromptRow
from pipeline.common.units import GB, gigabytes, megabytes
from pipeline.config.quant import SMALLEST, QuantConfig
from pipeline.config.schema import Config, ModelConfig
from pipeline.memory.devices import find_device
from pipeline.models.checkpoint import Checkpoint, find_checkpoint, local_folder, locate, staged_folder
from pipeline.models.hub import NetworkError, bring, page
from pipeline.models.loading import load_tokenizer
from pipeline.models.loading_checks import check_format
from pipeline.models.stored_format import label
from pipeline.prompts.chat import eos_token_ids, prepare_chat
from pipeline.views.architecture import ArchitectureView, architecture_view
from pipeline.views.chat import chat_view
from pipeline.views.machine import Check, State

OUTPUTS_BYTES = GB  # about a million completions
TIMEOUT_SEC = 10


def check_login() -> list[Check]:
    """Say whether there is a hub token; only that, never the token."""
    if get_token() is None:
        return [Check("hub login", State.green, "no token; public models need none")]
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token file"
    return [Check("hub login", State.green, f"a token is set ({where})")]


def check_access(model: ModelConfig, models_dir: str) -> list[Check]:
    """Say where the files are; on the hub, whether they may be had and which revision is in the cache."""
    if (folder := local_folder(model.name, models_dir)) is not None:
        try:
            locate(model, models_dir, weights=True)
        except PipelineError as error:
            return [_from_error("model files", error)]
        return [Check("model files", State.green, f"{folder}: config and weights are there; no hub needed")]
    checkpoint = find_checkpoint(model, models_dir)
    weights = _has_weights(checkpoint)
    offline = constants.HF_HUB_OFFLINE
    state = f"revision {str(checkpoint.revision)[:12]}" if checkpoint else "nothing"
    cached = Check("hub cache", State.green, f"{state}, {'with' if weights else 'without'} weights")
    if weights and offline:
        return [cached]
    return [cached, _ask_hub(model, weights, staged_folder(model.name, models_dir))]


def check_tokenizer(config: Config) -> list[Check]:
    """Look for BOS once, an end and a pad, a template, its thinking switch and its date."""
    try:
        tokenizer = load_tokenizer(config.model, config.models_dir)
        chat = prepare_chat(tokenizer, config)
        row = PromptRow(0, "probe", "a probe", "Hello", None, None, GenerationParams(), {})
        view = chat_view(row, chat)
    except PipelineError as error:
        return [_from_error("tokenizer", error)]
    made = [_check_bos(view.leading_bos_count), *_check_ends(tokenizer)]
    if not view.has_template:
        fix = (
            "Prompts are sent as they are. For a chat, take the instruct variant or model.chat_template=FILE."
        )
        return [*made, Check("chat template", State.yellow, "none: a base model", fix)]
    role = (
        "a system role" if view.has_system_role else "no system role (system text goes into the user's turn)"
    )
    made.append(Check("chat template", State.green, role))
    if view.writes_date and "date_string" not in config.model.chat_template_kwargs:
        fix = "For the same prompt every day: +model.chat_template_kwargs.date_string='26 Jul 2024'."
        made.append(Check("template's date", State.yellow, "the template can write today's date", fix))
    if view.thinking_switch:
        opened = "opens" if view.opens_thinking else "does not open"
        fix = "generation=reasoning keeps it apart; +model.chat_template_kwargs.enable_thinking=false may stop it."
        made.append(Check("thinking", State.green, f"the template knows it; the prompt {opened} it", fix))
    return made


def check_room(config: Config) -> list[Check]:
    """Look for memory for the weights, disk for weights that are still to come, and for outputs."""
    if (checkpoint := find_checkpoint(config.model, config.models_dir)) is not None:
        try:
            stored = check_format(checkpoint, config.model, config.quant)
        except LoadError as error:
            return [_from_error("quantization", error), _check_outputs(config)]
        if stored is not None:
            return [*_check_stored(label(stored)), _check_outputs(config)]
    try:
        view = architecture_view(config.model, config.quant, config.models_dir)
    except PipelineError as error:
        return [_from_error("model config", error), _check_outputs(config)]
    made = [_check_memory(view, config.quant)]
    local = checkpoint is not None and checkpoint.revision is None
    if not (local or _has_weights(checkpoint)):
        made.append(_check_download(config, view.parameters))
    return [*made, _check_outputs(config)]


def _has_weights(checkpoint: Checkpoint | None) -> bool:
    return checkpoint is not None and checkpoint.has_weights


def _ask_hub(model: ModelConfig, weights: bool, staged: Path) -> Check:
    name = model.name
    try:
        info = HfApi().model_info(name, revision=model.revision, timeout=TIMEOUT_SEC)
    except GatedRepoError:
        fix = f"Accept the terms at {page(name)}, then `hf auth login`."
        return Check("hub access", State.red, f"{name} is gated, and this account has no access", fix)
    except RevisionNotFoundError:
        return Check(
            "hub access", State.red, f"no revision {model.revision!r}", f"See {page(name)}/tree/main."
        )
    except RepositoryNotFoundError:
        return Check(
            "hub access", State.red, f"no model {name}, or a private one", "Correct model.name, or log in."
        )
    except HFValidationError:
        return Check(
            "hub access", State.red, f"{name}: no such folder, and no hub name", "Set model.name to ORG/NAME."
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            return _unreachable("the hub fails", weights, name, staged)
        fix = "Log in again with `hf auth login`, or correct HF_TOKEN."
        return Check(
            "hub access", State.red, f"the hub refused the access token ({error.response.status_code})", fix
        )
    except (OfflineModeIsEnabled, NetworkError, OSError) as error:
        offline = isinstance(error, OfflineModeIsEnabled)
        return _unreachable(
            "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached", weights, name, staged
        )
    if info.gated and not _may_download(model):
        fix = f"Accept the terms at {page(name)}, then `hf auth login`."
        return Check(
            "hub access", State.red, f"{name} is gated ({info.gated}), and this account has no access", fix
        )
    words = "gated, and this account has access" if info.gated else "open"
    return Check("hub access", State.green, f"{name} is {words}; main is {str(info.sha)[:12]}")


def _unreachable(why: str, weights: bool, name: str, staged: Path) -> Check:
    if weights:
        return Check("hub access", State.green, f"{why}; the cache has all that is needed")
    fix = f"Where there is a network, {bring(name, staged)}."
    return Check("hub access", State.red, f"{why}, and the weights are not on this machine", fix)


def _may_download(model: ModelConfig) -> bool:
    try:
        HfApi().auth_check(model.name)
    except (GatedRepoError, RepositoryNotFoundError):
        return False
    except (HfHubHTTPError, NetworkError, OSError):
        return True  # not an answer; the download itself will tell
    return True


def _check_bos(count: int) -> Check:
    if count > 1:
        fix = "The chat template and the tokenizer both write BOS: remove it from model.chat_template."
        return Check("BOS", State.red, f"{count} at the start of a prompt", fix)
    return Check("BOS", State.green, "once" if count else "none, as this model's template has it")


def _check_ends(tokenizer: Any) -> list[Check]:
    ends = sorted(eos_token_ids(None, tokenizer))
    made = [Check("end of sequence", State.green, f"{tokenizer.eos_token} {ends[0]}")] if ends else []
    if not ends:
        fix = "Completions end only at max_new_tokens or at generation.stop."
        made.append(Check("end of sequence", State.yellow, "the tokenizer has none", fix))
    if tokenizer.pad_token_id is None:
        made.append(Check("pad", State.green, "none; the end's id fills in, and the mask hides it"))
    else:
        made.append(Check("pad", State.green, f"{tokenizer.pad_token} {tokenizer.pad_token_id}"))
    return made


def _check_memory(view: ArchitectureView, quant: QuantConfig) -> Check:
    need = view.bytes + (view.quant_state_bytes or 0)
    words = f"{megabytes(need)} of weights"
    try:
        device = find_device(None)
    except ConfigError as error:
        fix = "python -m pipeline plan memory=24GB says whether it fits in so much."
        return Check("memory", State.yellow, f"{words}. {error.found}", fix)
    gpus, free = device.gpus, device.free_bytes
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


def _check_stored(stored: str) -> list[Check]:
    """Say what is known of a checkpoint that is quantized already."""
    fix = "Run a few rows with limit=4 and read stats.json."
    return [
        Check("quantization", State.green, stored),
        Check("memory", State.yellow, f"{stored}: what its weights take is known once they are loaded", fix),
    ]


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


def _from_error(name: str, error: PipelineError) -> Check:
    return Check(name, State.red, error.found, error.fix)
