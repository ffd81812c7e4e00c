"""Make the environment that templates run in where transformers is not at hand: they read, and change nothing."""

from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What a template's code can raise; jinja2 lets Python's own errors through.
_PYTHON_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
RENDER_ERRORS = (jinja2.TemplateError, *_PYTHON_ERRORS)


def sandbox(*, strict: bool = False) -> ImmutableSandboxedEnvironment:
    """Make the environment that transformers makes for chat templates.

    Args:
        strict: a name that is not there, or a null that would be written, is an error and no empty text.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    if strict:
        environment.undefined = jinja2.StrictUndefined
        environment.finalize = _written
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _written(value: Any) -> Any:
    if value is None:
        raise jinja2.TemplateError("it writes a null; {{ name or '' }} writes nothing")
    return value
