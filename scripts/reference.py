"""Write docs/reference.md from the schema, the commands' help and the exit statuses: python scripts/reference.py."""

import ast
import contextlib
import io
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from inspect import cleandoc, getsource
from pathlib import Path
from typing import Any

from pipeline.commands.door import main as door
from pipeline.commands.table import COMMANDS
from pipeline.common.exit_status import ExitStatus
from pipeline.common.request import GenerationParams
from pipeline.config.schema import Config

PAGE = Path(__file__).resolve().parent.parent / "docs/reference.md"
HEAD = """\
<!-- Written by scripts/reference.py. -->
# Reference

Every key of a job, with its default, as `KEY=VALUE` on the command line or in a YAML file; every command; every
exit status. What files a job writes and their fields: [output-format.md](output-format.md). What a prompt file may
say: [prompt-format.md](prompt-format.md). From Python: [api.md](api.md).
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *_keys(), *_commands(), *_statuses()])


def _keys() -> Iterator[str]:
    groups = {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
    yield from _table("The job", Config, "", leave_out=groups)
    for name, kind in groups.items():
        yield from _table(f"{name}=", kind, f"{name}.")


def _table(title: str, schema: Any, prefix: str, leave_out: Any = ()) -> Iterator[str]:
    remarks = comments(schema) | (comments(GenerationParams) if issubclass(schema, GenerationParams) else {})
    yield f"## {title}\n\n{cleandoc(schema.__doc__ or '').partition('Raises:')[0].strip()}\n"
    yield "| key | default | |\n|---|---|---|"
    for field in fields(schema):
        if field.name not in leave_out:
            remark = "; ".join(filter(None, (remarks.get(field.name, ""), _choices(field.type))))
            yield f"| `{prefix}{field.name}` | {_default(field)} | {remark.replace('<', '&lt;')} |"
    yield ""


def _default(field: Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value == "???" or value is MISSING:
        return "must be set"
    if isinstance(value, Enum):
        value = value.value
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


def _choices(kind: Any) -> str:
    """List the values of an enum, with what its comments say of them."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        return ""
    remarks = comments(kind)
    return "; ".join(
        f"`{member.value}`{': ' + remarks[member.name] if member.name in remarks else ''}" for member in kind
    )


def comments(schema: type) -> dict[str, str]:
    """Read the comment of each field: that behind it, or else the line above it."""
    source = getsource(schema)
    said = {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, str] = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            behind = [
                said[line][0] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in said
            ]
            above, alone = said.get(node.lineno - 1, ("", False))
            found[ast.unparse(target)] = " ".join(
                t for t in behind if "noqa" not in t and "type: " not in t
            ) or (above if alone else "")
    return {name: text for name, text in found.items() if text}


def _commands() -> Iterator[str]:
    yield "## Commands\n\n`lmjob` is short for `python -m pipeline`.\n"
    for command in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            door([command, "--help"])
        yield f"### {command}\n\n```text\n{said.getvalue().rstrip()}\n```\n"


def _statuses() -> Iterator[str]:
    yield "## Exit statuses\n\n| | |\n|---|---|"
    yield from (f"| {int(status)} | {status.meaning} |" for status in ExitStatus)
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
