"""Find a model's architecture: in a config.json that is at hand, else in the facts of conf/model/.

The network is asked only about a model that conf/ does not know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.common.errors import ConfigError, LoadError
from pipeline.config.schema import ModelConfig
from pipeline.memory.architecture import MEASURE, Architecture, differences, in_context
from pipeline.models.checkpoint import CONFIG, Checkpoint, find_checkpoint, local_folder, staged_folder
from pipeline.models.config_checks import check_adapter
from pipeline.models.stored_format import checkpoint_format, label


@dataclass(frozen=True, slots=True)
class Facts:
    """Hold an architecture and where it is from.

    `differences` says where a config.json and conf/ disagree: the config.json wins.
    """

    name: str
    architecture: Architecture
    source: str
    differences: tuple[str, ...] = ()


def find_facts(model: ModelConfig, models_dir: str) -> Facts:
    """Find the architecture, and where it comes from.

    Raises:
        ConfigError: no config.json is at hand, and conf/ has no facts about this model; or they are wrong.
    """
    known = None
    if model.architecture is not None and model.architecture.get("of") == model.name:
        known = Architecture.read(in_context(model.architecture, model.context))
    checkpoint = find_checkpoint(model, models_dir)
    if (folder := local_folder(model.name, models_dir)) is not None:
        with _as_config_error():
            check_adapter(folder, str(folder))
    if checkpoint is None and known is not None:
        return Facts(model.name, known, "conf/model")
    checkpoint = checkpoint or _fetch_config(model, models_dir)
    if checkpoint is None:
        raise ConfigError(
            f"model.name={model.name}: conf/model has no facts about it, and no {CONFIG} is in "
            f"{staged_folder(model.name, models_dir)}, in the hub's cache or to be had",
            f"Put the model's {CONFIG} there, or give model.name a local folder",
        )
    found = _read(checkpoint, model.context)
    path = checkpoint.folder / CONFIG
    return Facts(model.name, found, str(path), tuple(differences(known, found)) if known else ())


def _read(checkpoint: Checkpoint, context: int | None) -> Architecture:
    path = checkpoint.folder / CONFIG
    with _as_config_error():
        config = checkpoint.read_config()
        checkpoint.read_generation()
    try:
        found = Architecture.read(in_context(config, context))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.found}", error.fix) from error
    if (stored := checkpoint_format(config)) is not None:
        raise ConfigError(
            f"{path}: its weights are quantized already, {label(stored)}, and the memory plan does not know what "
            "they take",
            MEASURE,
        )
    return found


@contextmanager
def _as_config_error() -> Iterator[None]:
    """Turn what is wrong with a model's files into what is wrong with model.name."""
    try:
        yield
    except LoadError as error:
        raise ConfigError(error.found, error.fix) from error


def _fetch_config(model: ModelConfig, models_dir: str) -> Checkpoint | None:
    """Ask the hub for it, unless the model is a folder, or the hub cannot be reached within seconds."""
    if local_folder(model.name, models_dir) is not None:
        return None
    from pipeline.models import hub

    folder = hub.fetch_file(model, CONFIG)
    return None if folder is None else Checkpoint(model.name, folder, hub.commit_of(folder))
