"""Make prompts of a file's columns as a job says: by other names, through a template, with examples before."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.request import PromptRow
from pipeline.common.signals import RENDER_SEC, TookTooLong, time_limit
from pipeline.config.schema import Config
from pipeline.prompts.sandbox import RENDER_ERRORS, sandbox
from pipeline.prompts.settings import BadLine, show

Turns = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Shape:
    """Hold what a job says of it, plainly: jobs that say the same read the same rows."""

    prompt_field: str = "prompt"
    template: str | tuple[tuple[str, str], ...] | None = None  # of the prompt, or of each (role, content)
    columns: tuple[tuple[str, str], ...] = ()  # (what it is, what the file calls it)
    examples: str | None = None  # a file
    shots: int = 5

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read it in a job's config."""
        template = config.prompt_template
        if isinstance(template, list):
            template = tuple((message["role"], message["content"]) for message in template)
        columns = tuple(config.columns.items())
        return cls(config.prompt_field, template, columns, config.examples, config.shots)


PLAIN = Shape()


class Shaper:
    """Shape one row after another.

    Raises:
        ConfigError: a template is not Jinja.
    """

    def __init__(self, shape: Shape, turns: Turns | None = None) -> None:
        self._columns = shape.columns
        self.prompt_field = shape.prompt_field
        self._turns = turns or []
        template = shape.template
        self._text = _compile(template, "") if isinstance(template, str) else None
        self._messages = (
            [(role, _compile(content, f"[{i}]")) for i, (role, content) in enumerate(template)]
            if isinstance(template, tuple)
            else []
        )

    def named(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Give a row's columns under the names that a row's fields have.

        Raises:
            BadLine: one that the job names is not there.
        """
        fields = dict(columns)
        for name, column in self._columns:
            if column not in columns:
                raise BadLine(
                    f"no column {show(column)}; this row has {show(sorted(columns))}",
                    f"Correct columns.{name}.",
                )
            if name in columns and name != column:
                raise BadLine(
                    f"has both {show(name)} and {show(column)}", f"Rename one, or leave columns.{name} out."
                )
            fields[name] = fields.pop(column)
        return fields

    def asked(self, fields: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
        """Let the template, where there is one, say what is asked.

        Raises:
            BadLine: it fails.
        """
        if self._text is None and not self._messages:
            return fields
        rest = {name: value for name, value in fields.items() if name not in ("messages", self.prompt_field)}
        if self._text is not None:
            return {self.prompt_field: _render(self._text, columns), **rest}
        messages = [{"role": role, "content": _render(text, columns)} for role, text in self._messages]
        return {"messages": messages, **rest}

    def row(self, row: PromptRow) -> PromptRow:
        """Put the examples before the row's own turns; a system text stays first."""
        if not self._turns:
            return row
        own = row.messages or [{"role": "user", "content": row.prompt or ""}]
        first = 1 if own[0]["role"] == "system" else 0
        return replace(row, prompt=None, messages=[*own[:first], *self._turns, *own[first:]])


def _compile(source: str, where: str) -> Any:
    import jinja2

    try:
        return sandbox(strict=True).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"prompt_template{where}: not valid Jinja: {error.message} (line {error.lineno})",
            "Write columns as {{ name }}; {% raw %}…{% endraw %} keeps braces.",
        ) from error


def _render(template: Any, fields: Mapping[str, Any]) -> str:
    import jinja2

    try:
        with time_limit(RENDER_SEC):
            return str(template.render(fields))
    except TookTooLong:
        raise BadLine(f"prompt_template is not done after {RENDER_SEC:g} s", "Make it simpler.") from None
    except jinja2.UndefinedError as error:
        raise BadLine(
            f"prompt_template: {error.message}; this row has {show(sorted(fields))}",
            "Correct the name, or write {{ name | default('') }}.",
        ) from None
    except (*RENDER_ERRORS, MemoryError) as error:
        raise BadLine(
            f"prompt_template fails: {str(error)[:200]}", "Change the row, or the template."
        ) from None


def turns_of(row: PromptRow) -> Turns:
    """Make an example's turns: its prompt and its reference, or a conversation that the assistant ends.

    Raises:
        PromptError: it has no answer, or more than turns.
    """
    if row.system is not None or (row.messages and row.messages[0]["role"] == "system"):
        raise PromptError(f"{row.source}: an example has a system text", "Say it once, with system=….")
    if row.messages and row.messages[-1]["role"] == "assistant":
        return row.messages
    reference = row.metadata.get("reference")
    answer = reference[0] if isinstance(reference, list) and reference else reference
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise PromptError(
            f"{row.source}: an example has no 'reference'",
            "Name the column of the answers: columns.reference=NAME.",
        )
    asked = row.messages or [{"role": "user", "content": row.prompt or ""}]
    return [*asked, {"role": "assistant", "content": str(answer)}]
