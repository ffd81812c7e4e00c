"""Say what is installed, without importing it."""

import importlib.util
from importlib import metadata


def can_import(module: str) -> bool:
    """Say whether a module is there; a mere folder of that name, where somebody stands, is none."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def is_installed(distribution: str) -> bool:
    """Say whether there is a package of that name, as pip calls it."""
    try:
        return bool(metadata.distribution(distribution))
    except metadata.PackageNotFoundError:
        return False
