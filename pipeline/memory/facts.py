"""A model's architecture: from a config.json that is at hand, else from the facts in conf/model/.

The network is asked only about a model that conf/ does not know.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import ConfigError
from pipeline.config.schema import ModelConfig
from pipeline.memory.architecture import Architecture, architecture, differences
from pipeline.models.stored_format import checkpoint_format, label


@dataclass(frozen=True, slots=True)
class Facts:
    """`differences` says where a config.json and conf/ disagree: the config.json wins."""

    name: str
    architecture: Architecture
    source: str
    differences: tuple[str, ...] = ()


def find_facts(model: ModelConfig, models_dir: str) -> Facts:
    """The architecture, and where it comes from.

    Raises:
        ConfigError: no config.json is at hand, and conf/ has no facts about this model; or they are wrong.
    """
    known = None
    if model.architecture is not None and model.architecture.get("of") == model.name:
        known = architecture(model.architecture)
    folder = model_folder(model, models_dir, "config.json", download=known is None)
    if folder is None:
        if known is None:
            raise ConfigError(
                f"model.name={model.name}: conf/model has no facts about it, and no config.json is in "
                f"{models_dir}/{Path(model.name).name}, in the hub's cache or to be had. "
                "Put the model's config.json there, or give model.name a local folder."
            )
        return Facts(model.name, known, "conf/model")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = architecture(config)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not a model's config ({error}). Copy or download it again.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if (stored := checkpoint_format(config)) is not None:
        raise ConfigError(
            f"{path}: its weights are quantized already, {label(stored)}, and the memory plan does not know what "
            "they take. Load the model and read stats.json for its memory."
        )
    return Facts(model.name, found, str(path), tuple(differences(known, found)) if known else ())


def model_folder(model: ModelConfig, models_dir: str, file: str, *, download: bool = False) -> Path | None:
    """The folder with this file of the model: the model's own, in models_dir, or in the hub's cache."""
    for folder in (Path(model.name).expanduser(), Path(models_dir).expanduser() / Path(model.name).name):
        if (folder / file).is_file():
            return folder
    if Path(model.name).is_absolute() or model.name.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model.name, file, revision=model.revision)
    except HFValidationError:
        return None
    if isinstance(cached, str):
        return Path(cached).parent
    return _download(model, file) if download else None


def _download(model: ModelConfig, file: str) -> Path | None:
    """From the hub, unless it cannot be reached within seconds."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "3")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "3")
    from huggingface_hub import hf_hub_download

    from pipeline.models.checkpoint import NetworkError

    try:
        return Path(hf_hub_download(model.name, file, revision=model.revision)).parent
    except (OSError, NetworkError):
        return None
