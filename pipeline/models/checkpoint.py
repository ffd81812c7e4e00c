"""Find a model's files: in a local folder, in a folder of models_dir, or in the hub's cache.

All that can be wrong with the files is found here, before any weight is read.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.common.errors import LoadError
from pipeline.common.suggestions import nearest
from pipeline.config.model_files import CONFIG, find_file, local_folder, staged_folder
from pipeline.config.schema import ModelConfig
from pipeline.models.config_checks import check_adapter, check_config, check_ends, read_object, weight_files

log = logging.getLogger(__name__)

GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files, on this machine."""

    source: str  # where they come from: a folder, or a name on the hub
    folder: Path  # holds config.json
    revision: str | None  # the hub's commit; None for a folder

    @property
    def config_path(self) -> Path:
        """Name its config.json."""
        return self.folder / CONFIG

    @property
    def again(self) -> str:
        """Say how to get files anew that are broken."""
        if self.revision is None:
            return "Copy or download the folder again"
        return f"Run `hf download {self.source} --revision {self.revision} --force-download`"

    @property
    def has_weights(self) -> bool:
        """Say whether there are safetensors, or an index of them; `locate` looks into them."""
        return any((self.folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))

    def read_config(self) -> dict[str, Any]:
        """Read the model's config.json as it is.

        Raises:
            LoadError: it is not a JSON object, or what it says can be no model's.
        """
        path = self.config_path
        config = read_object(path, self.again)
        check_config(config, path, self.again)
        return config

    def read_generation(self) -> dict[str, Any]:
        """Read the settings that the model itself suggests to generate with; {} where it has none.

        Raises:
            LoadError: the file is not a JSON object, or names end tokens that are none.
        """
        path = self.folder / GENERATION
        if not path.is_file():
            return {}
        settings = read_object(path, self.again)
        check_ends(settings, path, self.again)
        return settings

    def read_ends(self) -> int | list[int] | None:
        """Read the ids that end a completion by the model's own files, as transformers does when it loads it.

        Raises:
            LoadError: as `read_config` and `read_generation`.
        """
        own = self.read_config()
        sources = self.read_generation(), own, own.get("text_config") or {}
        return next((source["eos_token_id"] for source in sources if "eos_token_id" in source), None)


def find_checkpoint(model: ModelConfig, models_dir: str, file: str = CONFIG) -> Checkpoint | None:
    """Find a model on this machine that has this file; None where the hub has to be asked."""
    path = find_file(model.name, model.revision, models_dir, file)
    if path is None:
        return None
    if (folder := local_folder(model.name, models_dir)) is not None:
        return Checkpoint(str(folder), folder, None)
    return _from_hub(model, path.parent)


def fetch_config(model: ModelConfig, models_dir: str) -> Checkpoint | None:
    """Find the model's config.json, on the hub too; None where there is none, or no answer within seconds."""
    found = find_checkpoint(model, models_dir)
    if found is not None or local_folder(model.name, models_dir) is not None:
        return found
    from pipeline.models import hub

    folder = hub.fetch_file(model, CONFIG)
    return None if folder is None else _from_hub(model, folder)


def _from_hub(model: ModelConfig, folder: Path) -> Checkpoint:
    """Name the commit of a folder in the hub's cache, which is called after it."""
    return Checkpoint(model.name, folder, folder.name)


def locate(model: ModelConfig, models_dir: str, *, weights: bool) -> Checkpoint:
    """Find a model's files, downloading what the hub's cache lacks; with `weights`, those too.

    Raises:
        LoadError: there is no such model, or no way to it, or a file is missing or broken.
    """
    if (folder := local_folder(model.name, models_dir)) is not None:
        if model.revision is not None:
            log.warning("%s is a local folder: revision=%s is not looked at", folder, model.revision)
        checkpoint = Checkpoint(str(folder), folder, None)
    else:
        from pipeline.models import hub

        near = did_you_mean_model(model.name, models_dir)
        folder = hub.download(model, staged_folder(model.name, models_dir), near, weights=weights)
        checkpoint = _from_hub(model, folder)
    check_adapter(checkpoint.folder, checkpoint.source)
    if not checkpoint.config_path.is_file():
        raise LoadError(
            f"{checkpoint.source}: no {CONFIG}, so this is not a model of transformers",
            f"Set model.name to the folder that holds {CONFIG} and the weights"
            + did_you_mean_model(model.name, models_dir),
        )
    checkpoint.read_config()  # transformers would say no more than that something in it is wrong
    checkpoint.read_generation()  # and nothing at all of this one
    if weights:
        _check_weights(checkpoint, model.safetensors_only)
    return checkpoint


def did_you_mean_model(name: str, models_dir: str) -> str:
    """Name the folder of models_dir whose name is most like this one, to end a sentence with."""
    folders = [config.parent.name for config in Path(models_dir).expanduser().glob(f"*/{CONFIG}")]
    near = nearest(Path(name).name, folders)
    return f"; did you mean model.name={Path(models_dir) / near}?" if near else ""


def _check_weights(checkpoint: Checkpoint, safetensors_only: bool) -> None:
    """Open every file of weights as far as its header, which also tells its length."""
    folder = checkpoint.folder
    shards = weight_paths(checkpoint)
    if not shards:
        if not any(folder.glob("*.bin")):
            kind = "safetensors weights" if safetensors_only else "weights"
            raise LoadError(
                f"{checkpoint.source}: no {kind} there", checkpoint.again + _pickle_hint(checkpoint)
            )
        if safetensors_only:
            raise LoadError(
                f"{folder}: only pickle weights, which can run code when they are opened",
                "If you trust them, set model.safetensors_only=false",
            )
    for shard in shards:
        check_shard(shard, checkpoint)


def weight_paths(checkpoint: Checkpoint) -> list[Path]:
    """List its files of safetensors; [] where it has none, or pickles.

    Raises:
        LoadError: the index of them is damaged.
    """
    single, index = checkpoint.folder / WEIGHTS, checkpoint.folder / WEIGHTS_INDEX
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [checkpoint.folder / name for name in weight_files(index, checkpoint.again)]


def check_shard(shard: Path, checkpoint: Checkpoint) -> None:
    """Open a file of safetensors as far as its header.

    Raises:
        LoadError: it is missing, or damaged.
    """
    if not shard.is_file():
        raise LoadError(f"{shard}: this part of the weights is missing", checkpoint.again)
    with shard.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise LoadError(
                f"{shard}: a git-lfs pointer and not the weights", f"Run `git lfs pull` in {shard.parent}"
            )
    try:
        with safe_open(shard, framework="np"):
            pass
    except SafetensorError as error:
        raise LoadError(f"{shard}: corrupt or cut short ({error})", checkpoint.again) from error


def _pickle_hint(checkpoint: Checkpoint) -> str:
    if checkpoint.revision is None:
        return ""
    return ", or, if it has only pickle weights, set model.safetensors_only=false"
