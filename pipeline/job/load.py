"""Load a job's model, and measure what that takes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.common import terminal
from pipeline.common.gpu import Gpu
from pipeline.config.quant import QuantConfig
from pipeline.config.schema import Config
from pipeline.config.stored_format import label
from pipeline.engine.accelerators import model_gpus
from pipeline.engine.cpu.packing import pack_weights
from pipeline.engine.host_memory import (
    EIGHT_BIT_BYTES,
    GLIBC_BYTES,
    LARGE_BYTES,
    release_files,
    return_large_blocks,
    trim,
)
from pipeline.memory.measured import (
    LOADING_SAMPLE_SEC,
    Peaks,
    PeakSampler,
    footprint_bytes,
    quantization_state_bytes,
    weight_bytes,
)
from pipeline.models.dtypes import computed_in
from pipeline.models.loading import Loaded, load_model, release
from pipeline.prompts.answer import decode

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """Hold a model that is ready to run, and what it took to get there."""

    loaded: Loaded
    packed: bool  # linear layers are held in a better order (engine/cpu/packing.py)
    weights: dict[str, Any]  # what they take, as loaded and before the engine touches them
    peaks: Peaks  # of loading

    @property
    def model(self) -> Any:
        """Give the model, which is there until `release`."""
        assert self.loaded.model is not None
        return self.loaded.model

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Name the GPUs that it lies on; none is a run on the CPU."""
        return model_gpus(self.model)

    @property
    def quant(self) -> QuantConfig:
        """Give its quantization, with the dtypes that this device computes in."""
        return self.loaded.quant

    @property
    def quantization(self) -> str:
        """Name its quantization: the method, or the format that the checkpoint was stored in."""
        stored = self.loaded.format
        return label(stored) if stored else self.loaded.quant.method.value

    @property
    def dtypes(self) -> dict[str, str | None]:
        """Name the dtypes that it computes in."""
        return computed_in(self.model, self.loaded.quant)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Give the text of generated ids."""
        return decode(self.loaded.tokenizer, token_ids)

    def release(self) -> None:
        """Give the model's memory back."""
        release(self.loaded)


def load(config: Config) -> Ready:
    """Load the model, pack its weights, and give back what loading leaves.

    Raises:
        LoadError: it cannot be loaded.
    """
    terminal.say(f"Loading {config.model.name}")
    return_large_blocks(EIGHT_BIT_BYTES if config.quant.bits == 8 else LARGE_BYTES)
    with PeakSampler(LOADING_SAMPLE_SEC, apart=True) as sampler:
        loaded = load_model(config.model, config.quant, config.models_dir)
        weights = _measure(loaded)
        packed = pack_weights(loaded.model) if config.engine.pack_weights else 0
        log.info("%d linear layers packed", packed)
        release_files(loaded.model)  # type: ignore[arg-type]
        trim()
        if loaded.quant.bits != 8 or packed:
            return_large_blocks(GLIBC_BYTES)
    if left_out := loaded.own_settings.left_out(config.generation):
        terminal.say(left_out)
    return Ready(loaded, packed > 0, weights, sampler.peaks())


def _measure(loaded: Loaded) -> dict[str, Any]:
    model: Any = loaded.model
    return {
        "footprint_bytes": footprint_bytes(model),
        "weight_bytes": weight_bytes(model),
        "quantization_state_bytes": quantization_state_bytes(model),
        "parameters": model.num_parameters(),
        "quantized_share": loaded.quantized_share,
    }
