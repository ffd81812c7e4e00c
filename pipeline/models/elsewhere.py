"""Read all of a model but its weights, which another process loads."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from pipeline.config.quant import QuantConfig
from pipeline.config.schema import ModelConfig
from pipeline.config.stored_format import checkpoint_format
from pipeline.models.adapter_files import AdapterFiles, locate_adapter
from pipeline.models.adapters import AppliedAdapter, tokenizer_files
from pipeline.models.checkpoint import Checkpoint, locate
from pipeline.models.dtypes import settle_here
from pipeline.models.loading import Loaded, quiet_transformers, read_tokenizer
from pipeline.models.own_settings import read_own_settings
from pipeline.prompts.chat import eos_token_ids


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Hold a model's files, and what this process needs of them."""

    loaded: Loaded  # without the model
    checkpoint: Checkpoint
    tokenizer_files: Checkpoint
    adapter: AdapterFiles | None

    @property
    def ends(self) -> frozenset[int]:
        """Give the tokens that end a completion."""
        own = GenerationConfig(eos_token_id=self.checkpoint.read_ends())  # type: ignore[no-untyped-call]
        return eos_token_ids(own, self.loaded.tokenizer)

    def text_config(self) -> dict[str, Any]:
        """Read the part of config.json that is about text."""
        config = self.checkpoint.read_config()
        return {**config, **(config.get("text_config") or {})}


def read_elsewhere(model: ModelConfig, quant: QuantConfig, models_dir: str) -> Elsewhere:
    """Find a model's files, on the hub too, and read its tokenizer.

    Raises:
        LoadError: one of them is missing, or cannot be read.
    """
    quiet_transformers()
    checkpoint = locate(model, models_dir, weights=True)
    adapter = locate_adapter(model, models_dir)
    files = tokenizer_files(adapter, checkpoint)
    loaded = Loaded(
        model=None,
        tokenizer=read_tokenizer(files, model),
        quant=settle_here(quant, checkpoint, model.device_map),
        source=checkpoint.source,
        revision=checkpoint.revision,
        load_sec=0.0,
        bare_bytes=0,
        bare_anonymous_bytes=None,
        quantized_share=None,
        own_settings=read_own_settings(checkpoint),
        format=checkpoint_format(checkpoint.read_config()),
        adapter=None if adapter is None else AppliedAdapter(adapter, merged=False),
    )
    return Elsewhere(loaded, checkpoint, files, adapter)
