"""Run batch jobs on Hugging Face language models. In a notebook:

    from pipeline import Engine, load_model, read_prompts
    model = load_model("smollm2")
    requests = read_prompts(["Tell a joke.", "Why is the sky blue?"], model, max_new_tokens=16)
    for completion in Engine(*model.engine_parts).generate(requests):
        print(completion.request_id, model.decode(completion.token_ids))

Importing this loads nothing; each name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.commands.notebook import load_model, read_prompts
    from pipeline.engine.engine import Engine

__all__ = ["Engine", "load_model", "read_prompts"]

_HOMES = {
    "Engine": "pipeline.engine.engine",
    "load_model": "pipeline.commands.notebook",
    "read_prompts": "pipeline.commands.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
