"""Check the way to one model's files, its tokenizer and its template."""

import os
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
from transformers import GenerationConfig

from pipeline.common.errors import PipelineError
from pipeline.common.request import GenerationParams, PromptRow
from pipeline.config.model_files import local_folder, staged_folder
from pipeline.config.schema import Config, ModelConfig
from pipeline.models.checkpoint import Checkpoint, find_checkpoint, locate
from pipeline.models.hub import NetworkError, bring, page
from pipeline.models.loading import load_tokenizer
from pipeline.prompts.chat import eos_token_ids, missing_end, prepare_chat
from pipeline.views.chat import chat_view
from pipeline.views.machine import Check, State, refused

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
            return [refused("model files", error)]
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
        ends = eos_token_ids(_own_ends(config), tokenizer)
    except PipelineError as error:
        return [refused("tokenizer", error)]
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
    if (token := missing_end(chat, ends)) is not None and token not in config.generation.stop:
        found = f"the template ends a turn with {token}, which does not end a completion of this model"
        made.append(Check("turn's end", State.yellow, found, f"'generation.stop=[\"{token}\"]' does that."))
    if view.writes_date and config.model.template_date is None:
        fix = "A job keeps the day when it began. For the same prompt in every job: model.template_date=2024-07-26."
        made.append(Check("template's date", State.yellow, "the template writes today's date", fix))
    if unread := chat.template.unread(config.model.chat_template_kwargs) if chat.template else "":
        found = f"model.chat_template_kwargs.{unread}: the template does not read it"
        made.append(Check("template's arguments", State.yellow, found, "Correct the name, or leave it out."))
    if view.thinking_switch:
        opened = "opens" if view.opens_thinking else "does not open"
        fix = "generation=reasoning keeps it apart; model.chat_template_kwargs.enable_thinking=false may stop it."
        made.append(Check("thinking", State.green, f"the template knows it; the prompt {opened} it", fix))
    return made


def _own_ends(config: Config) -> GenerationConfig:
    """Read the ids that end a completion by the model's own files; none where they are not here."""
    checkpoint = find_checkpoint(config.model, config.models_dir)
    ends = checkpoint.read_ends() if checkpoint else None
    return GenerationConfig(eos_token_id=ends)  # type: ignore[no-untyped-call]


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
