"""Find ordinary mistakes in the YAML files that a command line chooses: asked only when composing them failed."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.common.errors import ConfigError
from pipeline.config.schema import root
from pipeline.config.sources import place

HEADER = "# @package _global_"
BLANKS = "Indent with blanks, put one after each colon and close each quote and bracket."


def find_mistake(overrides: Iterable[str], groups: Iterable[str]) -> ConfigError | None:
    """Say what is wrong with the first chosen file that cannot be composed; None where all of them look right."""
    for group, path in _chosen(overrides, list(groups)):
        if mistake := _mistake(group, path, list(groups)):
            return mistake
    return None


def _chosen(overrides: Iterable[str], groups: list[str]) -> Iterator[tuple[str, Path]]:
    """Find the files that GROUP=NAME may mean, where Hydra looks for them."""
    for override in overrides:
        group, _, name = override.lstrip("+").partition("=")
        if group in groups:
            for folder in (Path(), root()):
                if (path := folder / place(group) / f"{name}.yaml").is_file():
                    yield group, path


def _mistake(group: str, path: Path, groups: list[str]) -> ConfigError | None:
    try:
        text = path.read_text(encoding="utf-8")
        value = OmegaConf.load(path) if text.strip() else None
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        return ConfigError(f"{where}: {error.problem}", "Keep one." if "duplicate" in str(error) else BLANKS)
    except UnicodeDecodeError:
        return ConfigError(f"{path}: not UTF-8 text", "Save it as UTF-8.")
    except (OSError, ValueError, TypeError, RecursionError, OmegaConfBaseException) as error:
        return ConfigError(f"{path}: {str(error).splitlines()[0]}", BLANKS)
    if value is not None and not isinstance(value, DictConfig):
        return ConfigError(
            f"{path}: a list or a word, and no lines of KEY: VALUE", "Write one such line a setting."
        )
    if group != "jobs":
        return None
    if not text.lstrip("\ufeff").startswith(HEADER):
        return ConfigError(f"{path}: does not begin with {HEADER}", "Make that its first line.")
    defaults = value.get("defaults") if value is not None else None
    for entry in defaults if isinstance(defaults, ListConfig) else ():
        name = str(next(iter(entry)) if isinstance(entry, DictConfig) else entry).lstrip("/")
        if name in groups:
            found = f"{path}: defaults: {name}: was chosen before"
            return ConfigError(found, f"Write it as `- override /{name}: NAME`.")
        if name != "_self_" and not name.startswith("override "):
            return ConfigError(f"{path}: defaults: {name}: no such group", f"There are: {', '.join(groups)}.")
    return None
