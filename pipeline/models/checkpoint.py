"""Where a model's files are: a local folder, a folder in models_dir, or the hub's cache. No torch.

Everything that can be wrong with the files is found here, before any weight is read.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from pipeline.common.errors import LoadError
from pipeline.common.suggestions import nearest
from pipeline.config.schema import ModelConfig

log = logging.getLogger(__name__)

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
# Other copies of the weights, which some repositories keep beside the ones that transformers reads.
OTHER_COPIES = ["*/*.safetensors", "*/*.bin", "consolidated*", "training_args.bin", "*.fp16.*"]
# The base of the hub's network errors: httpx or its successor, whichever this hub client uses.
NetworkError: type[Exception] = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files, on this machine."""

    source: str  # where they come from: a folder, or a name on the hub
    folder: Path  # holds config.json
    revision: str | None  # the hub's commit; None for a folder


def find_model(name: str, models_dir: str) -> str:
    """The folder of this name, else the one in models_dir with its last part, else the name, for the hub."""
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    staged = Path(models_dir).expanduser() / Path(name).name
    return str(staged) if (staged / "config.json").is_file() else name


def locate(model: ModelConfig, models_dir: str, *, weights: bool) -> Checkpoint:
    """Find a model's files, downloading what the hub's cache lacks; with `weights`, those too.

    Raises:
        LoadError: there is no such model, or no way to it, or a file is missing or broken.
    """
    source = find_model(model.name, models_dir)
    if Path(source).is_dir():
        if model.revision is not None:
            log.warning("%s is a local folder: revision=%s is not looked at", source, model.revision)
        checkpoint = Checkpoint(source, Path(source), None)
    else:
        checkpoint = _download(model, models_dir, weights)
    if not (checkpoint.folder / "config.json").is_file():
        raise LoadError(
            f"{checkpoint.source}: no config.json, so this is not a model of transformers. "
            "Set model.name to the folder that holds config.json and the weights"
            + _nearest(model.name, models_dir)
        )
    if weights:
        _check_weights(checkpoint, model.safetensors_only)
    return checkpoint


def read_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The model's config.json as it is.

    Raises:
        LoadError: it is not a JSON object.
    """
    path = checkpoint.folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{path}: not JSON ({error}). {_again(checkpoint)}") from error
    if not isinstance(config, dict):
        raise LoadError(f"{path}: not a JSON object. {_again(checkpoint)}")
    return config


def _download(model: ModelConfig, models_dir: str, weights: bool) -> Checkpoint:
    patterns = SMALL_FILES + (["*.py"] if model.trust_remote_code else [])
    if weights:
        patterns += ["*.safetensors"] if model.safetensors_only else ["*.safetensors", "*.bin"]
        log.info("%s: looking in the hub's cache, and downloading what is missing there", model.name)
    try:
        folder = snapshot_download(
            model.name, revision=model.revision, allow_patterns=patterns, ignore_patterns=OTHER_COPIES
        )
    except (OSError, HFValidationError, NetworkError) as error:
        raise LoadError(_hub_message(error, model, models_dir)) from error
    # The cache names a snapshot's folder after its commit.
    return Checkpoint(model.name, Path(folder), Path(folder).name)


def _hub_message(error: BaseException, model: ModelConfig, models_dir: str) -> str:
    name, page = model.name, f"https://huggingface.co/{model.name}"
    if isinstance(error, HFValidationError):
        return (
            f"{name}: no such folder, and not a name on the hub either (ORG/NAME). "
            "Correct model.name" + _nearest(name, models_dir)
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{name}: gated, and this account has no access to it. Accept the terms at {page}, log in with "
            "`hf auth login` (or set HF_TOKEN), and run the same command again"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name}: no such model on the hub, or a private one. Correct model.name, or log in with "
            "`hf auth login` if it is private" + _nearest(name, models_dir)
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name}: no revision {model.revision!r}. Branches and tags are at {page}/tree/main"
    refused = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if refused in (401, 403):
        return (
            f"{name}: the hub refused the access token ({refused}). Log in again with `hf auth login`, "
            "or correct HF_TOKEN"
        )
    if isinstance(error, LocalEntryNotFoundError | NetworkError | ConnectionError):
        staged = Path(models_dir) / Path(name).name
        return (
            f"{name}: not in {models_dir} or the hub's cache, and the hub cannot be reached. With a network, "
            f"run `hf download {name} --local-dir {staged}` and bring that folder here"
            + _nearest(name, models_dir)
        )
    return f"{name}: could not be downloaded: {error}. Check the disk's free space and HF_HOME's permissions"


def _nearest(name: str, models_dir: str) -> str:
    """The folder of models_dir whose name is most like this one, as the end of a message."""
    folders = [config.parent.name for config in Path(models_dir).expanduser().glob("*/config.json")]
    near = nearest(Path(name).name, folders)
    return f"; did you mean model.name={Path(models_dir) / near}?" if near else ""


def _check_weights(checkpoint: Checkpoint, safetensors_only: bool) -> None:
    """Open every file of weights as far as its header, which also tells its length."""
    folder = checkpoint.folder
    shards = _shards(checkpoint)
    if not shards:
        if not any(folder.glob("*.bin")):
            kind = "safetensors weights" if safetensors_only else "weights"
            raise LoadError(
                f"{checkpoint.source}: no {kind} there. {_again(checkpoint)}{_pickle_hint(checkpoint)}"
            )
        if safetensors_only:
            raise LoadError(
                f"{folder}: only pickle weights, which can run code when they are opened. If you trust them, "
                "set model.safetensors_only=false"
            )
    for shard in shards:
        _check_shard(shard, checkpoint)


def _shards(checkpoint: Checkpoint) -> list[Path]:
    single = checkpoint.folder / "model.safetensors"
    index = checkpoint.folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise LoadError(f"{index}: not an index of weights ({error!r}). {_again(checkpoint)}") from error
    return [checkpoint.folder / name for name in sorted(names)]


def _check_shard(shard: Path, checkpoint: Checkpoint) -> None:
    if not shard.is_file():
        raise LoadError(f"{shard}: this part of the weights is missing. {_again(checkpoint)}")
    with shard.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise LoadError(
                f"{shard}: a git-lfs pointer and not the weights. Run `git lfs pull` in {shard.parent}"
            )
    try:
        with safe_open(shard, framework="np"):
            pass
    except SafetensorError as error:
        raise LoadError(f"{shard}: corrupt or cut short ({error}). {_again(checkpoint)}") from error


def _again(checkpoint: Checkpoint) -> str:
    if checkpoint.revision is None:
        return "Copy or download the folder again"
    return f"Run `hf download {checkpoint.source} --revision {checkpoint.revision} --force-download`"


def _pickle_hint(checkpoint: Checkpoint) -> str:
    return (
        ""
        if checkpoint.revision is None
        else ", or, if it has only pickle weights, set model.safetensors_only=false"
    )
