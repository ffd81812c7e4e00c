"""Hold a job's model that is ready to run, and say what others need to know of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.common.gpu import Gpu
from pipeline.common.request import GenerationParams
from pipeline.config.quant import QuantConfig
from pipeline.config.schema import EngineName
from pipeline.config.stored_format import label
from pipeline.engine.accelerators import model_gpus
from pipeline.memory.capacity import context_tokens
from pipeline.memory.measured import DeviceMemory, Peaks, devices, held_bytes
from pipeline.models.dtypes import computed_in
from pipeline.models.loading import Loaded, release
from pipeline.prompts.answer import decode
from pipeline.prompts.chat import eos_token_ids


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
    def tokenizer(self) -> Any:
        """Give its tokenizer."""
        return self.loaded.tokenizer

    @property
    def engine(self) -> dict[str, Any]:
        """Say what computes."""
        return {"name": EngineName.default.value}

    @property
    def embeddings(self) -> int:
        """Count the tokens that the model has a vector for."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def ends(self) -> frozenset[int]:
        """Give the tokens that end a completion."""
        return eos_token_ids(self.model.generation_config, self.tokenizer)

    def context(self, asked: int | None) -> int:
        """Count the tokens that a row may have, prompt and completion: as asked, else the model's own."""
        return context_tokens(self.model.config, asked)

    @property
    def longest_row(self) -> int | None:
        """Count the tokens that a row may have where that is less than the context; None where nothing says so."""
        return None

    def refusal(self, params: GenerationParams) -> str | None:
        """Say which of a row's settings are not to be had here; None if all are."""
        return None

    @property
    def helper(self) -> int | None:
        """Name the process that works for this one; None where there is none."""
        return None

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Name the GPUs that it lies on; none is a run on the CPU."""
        return model_gpus(self.model)

    def held_bytes(self) -> int:
        """Measure the memory that it holds now."""
        return held_bytes()

    def device_memory(self) -> list[DeviceMemory]:
        """Measure what each of its GPUs holds now."""
        return devices()

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
