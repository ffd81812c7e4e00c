"""Find what a plan can use of a model's files without asking the hub for them."""

from dataclasses import replace
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.models.adapter_files import find_adapter
from pipeline.models.checkpoint import GENERATION, TOKENIZER, find_checkpoint
from pipeline.models.own_settings import settle_generation
from pipeline.prompts.lengths import PromptLengths, expect_lengths


def expected_lengths(config: Config, context: int, *, given: bool) -> PromptLengths:
    """Measure the prompt file with the model's own tokenizer where that is here, as `expect_lengths`.

    Raises:
        LoadError: the adapter cannot be used.
        PromptError: a file that was given cannot be read.
    """
    return expect_lengths(config, _tokenizer_folder(config), context, given=given)


def _tokenizer_folder(config: Config) -> Path | None:
    """Find the folder that has the model's tokenizer.json, or its adapter's; None where it is not on this machine."""
    adapter = find_adapter(config.model, config.models_dir)
    if adapter is not None and (adapter.files.folder / TOKENIZER).is_file():
        return adapter.files.folder
    checkpoint = find_checkpoint(config.model, config.models_dir, TOKENIZER)
    return None if checkpoint is None else checkpoint.folder


def expect_generation(config: Config) -> Config:
    """Put the model's own settings where a job leaves them to it; those that cannot be read may ask for draws.

    Raises:
        LoadError: as `settle_generation`.
    """
    left = config.generation.left_to_the_model
    checkpoint = find_checkpoint(config.model, config.models_dir, GENERATION) if left else None
    if checkpoint is not None:
        return settle_generation(config, checkpoint)
    if "temperature" not in left or find_checkpoint(config.model, config.models_dir) is not None:
        return config
    return replace(config, generation=replace(config.generation, temperature=1.0))
