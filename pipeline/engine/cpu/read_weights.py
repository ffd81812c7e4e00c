"""Find the layers whose weights a model's own code multiplies by, so that they stay where it looks for them."""

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator

from torch import nn

UNUSED = ("init", "cuda")  # in names of methods that run before a weight is packed, or not on a CPU


def read_weights(kind: type[nn.Module]) -> frozenset[str]:
    """Name the layers of this class whose weights its methods read, but for their dtype and device.

    Mamba multiplies by dt_proj's weight itself, and LongCat-Flash's router by its classifier's in float32. What is read
    in training alone does not count. Code without a source reads none.
    """
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    return frozenset().union(*(_reads(base.__module__).get(base.__name__, frozenset()) for base in bases))


@functools.cache
def _reads(module: str) -> dict[str, frozenset[str]]:
    """Name what each class of a module reads. Most modules read none, which is seen at a glance."""
    try:
        code = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return {}
    if not re.search(r"self\.\w+\.weight\b", code):
        return {}
    classes = [node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    return {made.name: frozenset(name for part in made.body for name in _read(part)) for made in classes}


def _read(node: ast.AST) -> Iterator[str]:
    """Yield `name` for each self.name.weight."""
    match node:
        case ast.FunctionDef(name=method) if any(word in method for word in UNUSED):
            return
        case ast.Attribute(attr="dtype" | "device", value=ast.Attribute(attr="weight")):
            return
        case ast.If(test=test, orelse=others) if "self.training" in ast.unparse(test):
            for other in others:
                yield from _read(other)
            return
        case ast.Attribute(
            attr="weight", value=ast.Attribute(attr=name, value=ast.Name(id="self")), ctx=ast.Load()
        ):
            yield name
    for part in ast.iter_child_nodes(node):
        yield from _read(part)
