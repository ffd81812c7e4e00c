"""Check that vLLM is there where a job asks for it."""

from pipeline.common.errors import ConfigError
from pipeline.config.schema import Config, EngineName
from pipeline.engine.vllm.python import find_python, vllm_version
from pipeline.views.machine import Check, State, refused


def check_vllm(config: Config) -> list[Check]:
    """Find the environment of engine=vllm; nothing for another engine."""
    if config.engine.name is not EngineName.vllm:
        return []
    try:
        python = find_python(config.engine.python)
        return [Check("vLLM", State.green, f"{vllm_version(python)}, by {python}")]
    except ConfigError as error:
        return [refused("vLLM", error)]
