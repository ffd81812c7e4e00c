"""Find a model's architecture: in a config.json that is at hand, else in the facts of conf/model/.

The network is asked only about a model that conf/ does not know.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline.common.errors import ConfigError, LoadError
from pipeline.common.gpu import Gpu
from pipeline.config.model_files import CONFIG, local_folder, staged_folder
from pipeline.config.quant import QuantConfig, settle_dtypes
from pipeline.config.schema import ModelConfig
from pipeline.memory.architecture import Architecture, differences, in_context
from pipeline.memory.counted import architecture_of
from pipeline.memory.stored import Stored, plain_config, read_stored
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
    stored: Stored | None = None  # of weights that came quantized: `architecture` is as if they were plain

    def loaded(
        self, quant: QuantConfig, gpus: tuple[Gpu, ...]
    ) -> tuple[Architecture, QuantConfig, str | None]:
        """Say what it is once it is loaded as asked on these GPUs, () is the CPU, and name a format of its own."""
        if self.stored is not None:
            return self.stored.loaded(self.architecture, quant, gpus)
        return self.architecture, settle_dtypes(quant, self.architecture.dtype, gpus), None


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
    found, stored = _read(checkpoint, model, adapter)
    differing = tuple(differences(known, found)) if known else ()
    return Facts(model.name, found, str(checkpoint.config_path), differing, stored)


def job_architecture(
    model: ModelConfig, models_dir: str, quant: QuantConfig, gpus: tuple[Gpu, ...]
) -> Architecture | None:
    """Find what a job's memory is predicted from, on these GPUs; None where it is not, as the log says.

    Args:
        quant: as asked.
    """
    try:
        return find_facts(model, models_dir).loaded(quant, gpus)[0]
    except ConfigError as error:
        log.info("The job's memory is not predicted: %s", error)
        return None


def _read(
    checkpoint: Checkpoint, model: ModelConfig, adapter: AdapterFiles | None
) -> tuple[Architecture, Stored | None]:
    path = checkpoint.config_path
    with _as_config_error():
        config = checkpoint.read_config()
        checkpoint.read_generation()
        check_context(config, model.context, str(path))
        stored = read_stored(checkpoint, config, model)
    try:
        return _with_adapter(
            architecture_of, in_context(plain_config(config), model.context), adapter
        ), stored
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.found}", error.fix) from error


def _with_adapter(
    read: Callable[[Mapping[str, Any]], Architecture], config: Mapping[str, Any], adapter: AdapterFiles | None
) -> Architecture:
    """Read a config with what an adapter changes in it."""
    found = read(adapted(config, adapter))
    return found if adapter is None else replace(found, adapter_scalars=adapter.scalars)


@contextmanager
def _as_config_error() -> Iterator[None]:
    """Turn what is wrong with a model's files into what is wrong with model.name."""
    try:
        yield
    except LoadError as error:
        raise ConfigError(error.found, error.fix) from error
