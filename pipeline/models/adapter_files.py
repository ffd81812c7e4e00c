"""Find an adapter's files, and read from their headers what it adds to a model. Without torch and peft."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipeline.common.errors import LoadError
from pipeline.config.model_files import ADAPTER, find_file, local_folder, staged_folder
from pipeline.config.schema import ModelConfig
from pipeline.models.checkpoint import Checkpoint, check_shard
from pipeline.models.config_checks import check_lora, read_object

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What the modules of the embedding and of the head are called.
_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "tok_embeddings"}
_HEADS = {"lm_head", "embed_out", "output"}


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's files, on this machine."""

    files: Checkpoint
    settings: dict[str, Any]  # adapter_config.json
    shapes: dict[str, tuple[int, ...]]  # of its tensors, by name

    @property
    def base(self) -> str | None:
        """Name the model that it was made for, where it says so."""
        name = self.settings.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def vocab_size(self) -> int | None:
        """Count the rows of the embedding or the head that it brings with it; None where it brings neither."""
        known = _EMBEDDINGS | _HEADS
        rows = [s[0] for name, s in self.shapes.items() if _is_whole(name) and known & set(name.split("."))]
        return max(rows, default=None)

    @property
    def unties(self) -> bool:
        """Say whether it changes the embedding or the head alone, so that they cannot share a weight."""
        targets = self.settings.get("target_modules")
        saved = self.settings.get("modules_to_save")
        named = {name for names in (targets, saved) if isinstance(names, list) for name in names}
        touched = {part for name in self.shapes if ".lora_" in name for part in name.split(".")}
        return bool((named | touched) & (_EMBEDDINGS | _HEADS))

    @property
    def scalars(self) -> int:
        """Count the weights that stay beside a model which is quantized."""
        sizes = (_product(shape) for name, shape in self.shapes.items() if ".lora_" in name)
        return sum(sizes)


def _is_whole(name: str) -> bool:
    return name.endswith(".weight") and ".lora_" not in name


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def find_adapter(model: ModelConfig, models_dir: str) -> AdapterFiles | None:
    """Find a model's adapter on this machine; None where there is none to be, or the hub has to be asked.

    Raises:
        LoadError: it is there, and cannot be used.
    """
    if model.adapter is None:
        return None
    folder = local_folder(model.adapter, models_dir, ADAPTER)
    if folder is not None:
        return _read(Checkpoint(str(folder), folder, None))
    path = find_file(model.adapter, None, models_dir, ADAPTER)
    if path is None or not (path.parent / ADAPTER_WEIGHTS).is_file():
        return None
    return _read(Checkpoint(model.adapter, path.parent, path.parent.name))


def locate_adapter(model: ModelConfig, models_dir: str) -> AdapterFiles | None:
    """Find a model's adapter, downloading what the hub's cache lacks; None for a model without.

    Raises:
        LoadError: there is none of this name, or it cannot be used.
    """
    if model.adapter is None:
        return None
    if local_folder(model.adapter, models_dir, ADAPTER) is None:
        from pipeline.models import hub

        asked = replace(
            model, name=model.adapter, revision=None, trust_remote_code=False, safetensors_only=True
        )
        try:
            folder = hub.download(asked, staged_folder(model.adapter, models_dir), "", weights=True)
        except LoadError as error:
            raise LoadError(error.found, error.fix.replace("model.name", "model.adapter")) from error
        return _read(Checkpoint(model.adapter, folder, folder.name))
    return find_adapter(model, models_dir)


def _read(files: Checkpoint) -> AdapterFiles:
    path, weights = files.folder / ADAPTER, files.folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise LoadError(
            f"{files.source}: no {ADAPTER}, so this is not an adapter of peft",
            f"Set model.adapter to the folder that holds {ADAPTER} and {ADAPTER_WEIGHTS}",
        )
    settings = read_object(path, files.again)
    check_lora(settings, path)
    if not weights.is_file():
        pickle = " (only pickle weights, which can run code when they are opened)"
        raise LoadError(
            f"{files.source}: no {ADAPTER_WEIGHTS}{pickle if any(files.folder.glob('adapter_model.*')) else ''}",
            f"{files.again}, or save it anew with peft's save_pretrained, which writes safetensors",
        )
    check_shard(weights, files)
    with safe_open(weights, framework="np") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return AdapterFiles(files, settings, shapes)


def adapted(config: Mapping[str, Any], adapter: AdapterFiles | None) -> Mapping[str, Any]:
    """Give a config the vocabulary that an adapter brings, and a head of its own where the adapter unties it."""
    if adapter is None:
        return config
    if isinstance(text := config.get("text_config"), Mapping):
        return {**config, "text_config": adapted(text, adapter)}
    changes: dict[str, Any] = {} if adapter.vocab_size is None else {"vocab_size": adapter.vocab_size}
    return {**config, **changes, **({"tie_word_embeddings": False} if adapter.unties else {})}


def made_for_another(adapter: AdapterFiles, model: ModelConfig) -> bool:
    """Say whether the adapter names another model than the one that it is to run with."""
    return adapter.base is not None and Path(adapter.base).name != Path(model.name).name
