"""Load models and read prompts in a notebook or a script, by their short names."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from pipeline.common.errors import ConfigError
from pipeline.common.request import BadRow, GenerationParams, PromptRow, Request
from pipeline.common.suggestions import did_you_mean
from pipeline.config.compose import options, read_config
from pipeline.config.schema import Config
from pipeline.engine.probe import AnyForward, choose_forward
from pipeline.memory.capacity import context_tokens
from pipeline.models.loading import load_model as load
from pipeline.prompts.answer import decode
from pipeline.prompts.chat import Chat, eos_token_ids, prepare_chat
from pipeline.prompts.reader import find_prompts, listed_prompts, open_prompts
from pipeline.prompts.request import make_request

Prompt = str | dict[str, Any]  # a text, or a row as in a prompt file


@dataclass(frozen=True)
class Model:
    """Hold a loaded model and all that turns prompts into requests and ids back into text.

    Its attention is the engine's from now on: `network.generate` no longer works on it.
    """

    network: Any  # transformers' model
    tokenizer: Any
    forward: AnyForward
    chat: Chat
    config: Config
    eos_token_ids: frozenset[int]

    @property
    def engine_parts(self) -> tuple[AnyForward, frozenset[int], Callable[[Sequence[int]], str], Any]:
        """Give an Engine what it is made of: `Engine(*model.engine_parts)`."""
        return self.forward, self.eos_token_ids, self.decode, self.tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn a completion's ids into text."""
        return decode(self.tokenizer, token_ids)


def load_model(name: str = "smollm2", quant: str = "none", *overrides: str) -> Model:
    """Load a model, ready for the engine.

    Args:
        name: as after model= (smollm2, qwen …), ORG/NAME on the hub, or a local folder.
        quant: as after quant= (none, bf16, int8, nf4 …).
        overrides: more of a job's arguments, as "system=Be brief." or "model.device_map=cpu".

    Raises:
        ConfigError: no such quantization or key.
        LoadError: the model cannot be found, read or fitted in memory.
    """
    chosen = f"model={name}" if name in options("model") else f'model.name="{name}"'
    config = read_config([chosen, f"quant={quant}", *overrides])
    loaded = load(config.model, config.quant, config.models_dir)
    config = loaded.own_settings.settle(config)
    forward, _ = choose_forward(loaded.model, config.engine.attention.value)
    assert loaded.model is not None
    embedding: Any = loaded.model.get_input_embeddings()
    chat = prepare_chat(loaded.tokenizer, config, embedding.weight.shape[0])
    ends = eos_token_ids(loaded.model.generation_config, loaded.tokenizer)
    return Model(loaded.model, loaded.tokenizer, forward, chat, config, ends)


def read_prompts(
    prompts: str | PathLike[str] | Iterable[Prompt], model: Model, **generation: Any
) -> list[Request]:
    """Make requests for the engine, through the model's chat template.

    Args:
        prompts: a prompt file (or its name in jobs/), or a list of texts and rows.
        generation: max_new_tokens, temperature, top_p, top_k, seed, stop … for all of them; a row's own win.

    Raises:
        ConfigError: no such generation key, or a value outside its range.
        PromptError: a row that cannot be run; the message says which.
    """
    params = _params(model.config, generation)
    if isinstance(prompts, str | PathLike):
        rows = open_prompts(model.config, find_prompts(str(prompts)), params)
    else:
        rows = listed_prompts(prompts, params)
    return [_request(row, model) for row in rows]


def _params(config: Config, generation: dict[str, Any]) -> GenerationParams:
    names = GenerationParams.__dataclass_fields__
    if wrong := sorted(generation.keys() - names.keys()):
        fix = did_you_mean(wrong[0], names) or f"There are: {', '.join(names)}."
        raise ConfigError(f"{', '.join(wrong)}: no such key", fix)
    try:
        return replace(config.generation.params(), **generation)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _request(row: PromptRow | BadRow, model: Model) -> Request:
    context = context_tokens(model.network.config, model.config.model.context)
    return make_request(row, model.chat, context)
