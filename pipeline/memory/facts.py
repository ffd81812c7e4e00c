"""Find a model's architecture: in a config.json that is at hand, else in the facts of conf/model/.

The network is asked only about a model that conf/ does not know.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline.common.errors import ConfigError, LoadError
from pipeline.config.model_files import CONFIG, local_folder, staged_folder
from pipeline.config.schema import ModelConfig
from pipeline.config.stored_format import checkpoint_format, label
from pipeline.memory.architecture import MEASURE, Architecture, differences, in_context
from pipeline.memory.counted import architecture_of
from pipeline.models.adapter_files import AdapterFiles, adapted, find_adapter
from pipeline.models.checkpoint import Checkpoint, fetch_config, find_checkpoint
from pipeline.models.config_checks import check_adapter, check_context

log = logging.getLogger(__name__)


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
    with _as_config_error():
        adapter = find_adapter(model, models_dir)
    known = None
    if model.architecture is not None and model.architecture.get("of") == model.name:
        known = _with_adapter(Architecture.read, in_context(model.architecture, model.context), adapter)
    checkpoint = find_checkpoint(model, models_dir)
    if (folder := local_folder(model.name, models_dir)) is not None:
        with _as_config_error():
            check_adapter(folder, str(folder))
    if checkpoint is None and known is not None:
        return Facts(model.name, known, "conf/model")
    checkpoint = checkpoint or fetch_config(model, models_dir)
    if checkpoint is None:
        raise ConfigError(
            f"model.name={model.name}: conf/model has no facts about it, and no {CONFIG} is in "
            f"{staged_folder(model.name, models_dir)}, in the hub's cache or to be had",
            f"Put the model's {CONFIG} there, or give model.name a local folder",
        )
    found = _read(checkpoint, model.context, adapter)
    path = checkpoint.config_path
    return Facts(model.name, found, str(path), tuple(differences(known, found)) if known else ())


def job_architecture(model: ModelConfig, models_dir: str) -> Architecture | None:
    """Find what a job's memory is predicted from; None where it is not, as the log says."""
    try:
        return find_facts(model, models_dir).architecture
    except ConfigError as error:
        log.info("The job's memory is not predicted: %s", error)
        return None


def _read(checkpoint: Checkpoint, context: int | None, adapter: AdapterFiles | None) -> Architecture:
    path = checkpoint.config_path
    with _as_config_error():
        config = checkpoint.read_config()
        checkpoint.read_generation()
        check_context(config, context, str(path))
    check_plain(config, str(path))
    try:
        return _with_adapter(architecture_of, in_context(config, context), adapter)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.found}", error.fix) from error


def _with_adapter(
    read: Callable[[Mapping[str, Any]], Architecture], config: Mapping[str, Any], adapter: AdapterFiles | None
) -> Architecture:
    """Read a config with what an adapter changes in it."""
    found = read(adapted(config, adapter))
    return found if adapter is None else replace(found, adapter_scalars=adapter.scalars)


def check_plain(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config whose weights are quantized already: nothing here knows what they take.

    Raises:
        ConfigError: they are.
    """
    if (stored := checkpoint_format(config)) is not None:
        raise ConfigError(
            f"{source}: its weights are quantized already, {label(stored)}, and what they take is known once they "
            "are loaded",
            MEASURE,
        )


@contextmanager
def _as_config_error() -> Iterator[None]:
    """Turn what is wrong with a model's files into what is wrong with model.name."""
    try:
        yield
    except LoadError as error:
        raise ConfigError(error.found, error.fix) from error
