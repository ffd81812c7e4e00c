"""Apply the settings that a model's generation_config.json suggests, or say which of them are not applied."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.common.errors import LoadError
from pipeline.common.request import GenerationParams
from pipeline.config.schema import LEFT_TO_THE_MODEL, Config, GenerationConfig
from pipeline.models.checkpoint import GENERATION, Checkpoint, locate

# What `generate` takes where a model that samples leaves it open.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}
# What else decides a text, with the values that change nothing. All other keys of the file say how the
# text is made and not which, or where it ends, which is the job's to say.
SAMPLING_ONLY = {"typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}
UNKNOWN = {
    "num_beams": (1,), "num_return_sequences": (1,), "penalty_alpha": (0,), "dola_layers": (), "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,), "min_new_tokens": (0,), "max_time": (), "stop_strings": ([],), "token_healing": (False,),
    "bad_words_ids": ([],), "force_words_ids": ([],), "constraints": ([],), "sequence_bias": ({}, []),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "diversity_penalty": (0,), "watermarking_config": (),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """Hold what a model suggests: of the engine's own parameters, and of what the engine does not do."""

    file: Path
    params: dict[str, Any]
    unknown: dict[str, Any]

    def applied(self, generation: GenerationConfig) -> dict[str, Any]:
        """Return those that a job runs with."""
        return {name: value for name, value in self.params.items() if getattr(generation, name) == value}

    def not_applied(self, generation: GenerationConfig) -> dict[str, Any]:
        """Return those that a job runs without."""
        others = {name: value for name, value in self.params.items() if getattr(generation, name) != value}
        return others | self.unknown

    def left_out(self, generation: GenerationConfig) -> str | None:
        """Say what a job runs without; None where that is nothing."""
        others = self.not_applied(generation)
        if not others:
            return None
        line = f"The model suggests {in_words(others)}: not applied"
        return line if self.unknown else f"{line}; generation=model applies what it suggests"

    def settle(self, config: Config) -> Config:
        """Put them where a job leaves its settings to the model.

        Raises:
            LoadError: it leaves all to the model, which suggests what the engine does not do.
        """
        left = config.generation.left_to_the_model
        if self.unknown and set(left) == set(LEFT_TO_THE_MODEL):
            raise LoadError(
                f"{self.file}: suggests {in_words(self.unknown)}, which this engine does not do",
                "Use generation=greedy, or generation=sample with settings of your own",
            )
        own = {name: value for name, value in self.params.items() if name in left}
        return replace(config, generation=replace(config.generation, **own)) if own else config


def read_own_settings(checkpoint: Checkpoint) -> OwnSettings:
    """Read what a model suggests, as `generate` would take it.

    Raises:
        LoadError: a value is outside its range, or of a wrong kind.
    """
    settings = {key: value for key, value in checkpoint.read_generation().items() if value is not None}
    sampled = bool(settings.get("do_sample"))
    named = {"repetition_penalty": settings.get("repetition_penalty", 1.0)}
    named |= {name: settings.get(name, value) for name, value in SAMPLING.items()} if sampled else {}
    try:
        GenerationParams(**named)
    except (TypeError, ValueError) as error:
        raise LoadError(f"{checkpoint.folder / GENERATION}: {error}", checkpoint.again) from error
    neutral = vars(GenerationParams())
    unknown = UNKNOWN | (SAMPLING_ONLY if sampled else {})
    return OwnSettings(
        checkpoint.folder / GENERATION,
        {name: value for name, value in named.items() if value != neutral[name]},
        {key: settings[key] for key, nothing in unknown.items() if settings.get(key) not in (None, *nothing)},
    )


def settle_generation(config: Config, checkpoint: Checkpoint | None = None) -> Config:
    """Put the model's own settings where a job leaves them to it (generation=model).

    Args:
        checkpoint: the model, where it was found before.

    Raises:
        LoadError: the model cannot be found, or suggests what the engine does not do.
    """
    if not config.generation.left_to_the_model:
        return config
    return read_own_settings(checkpoint or locate(config.model, config.models_dir, weights=False)).settle(
        config
    )


def in_words(settings: Mapping[str, Any]) -> str:
    """Write settings as they are typed: repetition_penalty=1.1, temperature=0.7."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())
