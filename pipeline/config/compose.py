"""From a command line to a Config: Hydra's composition, with errors that name the nearest valid word."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.common.errors import ConfigError
from pipeline.common.fingerprint import job_fingerprint
from pipeline.common.suggestions import did_you_mean, nearest
from pipeline.config.schema import Config, register, root

GROUPS = ("model", "quant", "generation", "engine", "submit", "jobs")


def prepare() -> str:
    """Register schema and resolvers with Hydra; returns conf/ as an absolute path."""
    register()
    OmegaConf.register_new_resolver("config_root", lambda: str(root()), replace=True)
    OmegaConf.register_new_resolver("job_folder", _job_folder, replace=True)
    return str(root() / "conf")


def read_config(overrides: list[str]) -> Config:
    """The job that a command line describes.

    Raises:
        ConfigError: a key, group or value that does not exist, has the wrong type or makes no sense.
    """
    return to_config(compose_config(overrides))


def compose_config(overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    """The same, still as Hydra's own object.

    Raises:
        ConfigError: as `read_config`.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.removeprefix("~")
        if group in GROUPS and (key != group or value.lstrip().startswith("[")):  # Hydra takes none, and many
            raise ConfigError(f"{override}: choose one {group}: {', '.join(options(group))}.")
    conf = prepare()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf, version_base="1.3"):
            return compose("config", overrides=overrides, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: model=true
        raise ConfigError(explain(error)) from error


def to_config(composed: DictConfig) -> Config:
    """The composed config as plain typed objects.

    Raises:
        ConfigError: a value is missing or outside its range.
    """
    for key, known in _added_keys(composed, Config):
        raise ConfigError(f"+{key}: no such key", did_you_mean(key, known))
    try:
        config = OmegaConf.to_object(composed)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, Config)
    return config


def _added_keys(node: DictConfig, kind: type[Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Keys that Hydra's `+key=value` added though the schema has none such, each with those that it has."""
    known = [f"{prefix}{field.name}" for field in fields(kind)]
    for name in (str(name) for name in node if prefix or name != "hydra"):
        child = node._get_node(name)
        inner = OmegaConf.get_type(child) if isinstance(child, DictConfig) else None
        if f"{prefix}{name}" not in known:
            yield f"{prefix}{name}", known
        elif isinstance(child, DictConfig) and inner is not None and is_dataclass(inner):
            yield from _added_keys(child, inner, f"{prefix}{name}.")


def take_own(arguments: list[str], examples: Mapping[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take a command's own KEY=VALUE arguments out; the rest is the job's.

    Args:
        examples: the command's own keys, each with a value to show in an error.

    Returns:
        the values of each key that was given, in order; the overrides for `read_config`.

    Raises:
        ConfigError: one has no value, or is a misspelt one of them.
    """
    own: dict[str, list[str]] = {}
    overrides: list[str] = []
    known = [*GROUPS, *_keys(Config)]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in examples:
            if not value:
                raise ConfigError(f"{argument}: needs a value, as {key}={examples[key]}.")
            own.setdefault(key, []).append(value)
            continue
        near = nearest(key, [*examples, *known])
        if near is not None and near in examples and key not in known:
            raise ConfigError(f"{key}: no such key", f"Did you mean {near}={examples[near]}?")
        overrides.append(argument)
    return own, overrides


def sweep_cells(overrides: list[str]) -> list[list[str]]:
    """Every combination of the overrides' comma-separated values, in the order of the command line.

    Raises:
        ConfigError: an override that Hydra cannot read, or a sweep over a range.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(explain(error)) from error
    choices: list[list[str]] = []
    for override in parsed:
        if not override.is_sweep_override():
            choices.append([override.input_line or ""])
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{override.input_line}: list the values with commas, as seed=1,2,3.")
    return [list(cell) for cell in itertools.product(*choices)]


def job_folder(overrides: list[str]) -> Path:
    """Where the job of this command line lies. Raises ConfigError as `read_config`."""
    return Path(str(compose_config(overrides, with_hydra=True).hydra.run.dir))


def _job_folder(where: str = "", *, _root_: DictConfig) -> str:
    """outputs/<prompt set>/<model>-<quant>-<generation>-<fingerprint>[/shard-I-of-N]; a Hydra resolver."""
    plain: dict[str, Any] = {
        str(key): OmegaConf.to_container(value, enum_to_str=True) if isinstance(value, DictConfig) else value
        for key, value in _root_.items()
        if key != "hydra"
    }
    choices = _root_.hydra.runtime.choices
    named = any(o.lstrip("+").startswith("model.name=") for o in _root_.hydra.overrides.task)
    model = Path(plain["model"]["name"]).name if named else choices.model
    prompts = str(plain["prompts"])
    prompt_set = plain["prompt_set"] or ("stdin" if prompts == "-" else Path(prompts).name.split(".")[0])
    folder = Path(prompt_set) / f"{model}-{choices.quant}-{choices.generation}-{job_fingerprint(plain)}"
    if plain["shard"]:
        folder /= "shard-{}-of-{}".format(*str(plain["shard"]).partition("/")[::2])
    return str(folder if where == "inside" else Path(plain["outputs_dir"]) / folder)


def explain(error: Exception) -> str:
    """Say what an error of Hydra's means, with the nearest valid word where one is near."""
    text, cause = str(error), str(error.__cause__ or "")
    if missing := re.search(r"Could not find '([\w/]+)/([^'/]*)'", text):
        group, name = missing.groups()
        return f"{group}={name}: no such {group}.{_nearest(name, options(group) or _listed(text))}"
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return (
            f"{unknown[1]}: no such key.{_nearest(unknown[1], [*GROUPS, *_keys(Config), 'hydra/launcher'])}"
        )
    if unknown := re.search(r"Key '([^']+)' (?:is )?not in[^\n]*\n\s+full_key: (\S+)", f"{text}\n{cause}"):
        where = re.search(r"In '([^']+)'", text)
        place = f" in conf/{where[1]}.yaml" if where else ""
        return f"{unknown[2]}: no such key{place}.{_nearest(unknown[2], _keys(Config))}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not KEY=VALUE as Hydra reads it. Quote values with special characters: 'KEY=\"…\"'."
    if wrong := re.search(r"Error merging override (.+)", text):
        return f"{wrong[1]}: {cause.splitlines()[0]}."
    return " ".join(line.strip() for line in text.splitlines() if "type=" not in line)


def options(group: str) -> list[str]:
    """The names that GROUP= accepts."""
    folders = [root() / "conf" / group] if group != "jobs" else [root() / "jobs", Path("jobs")]
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def _listed(text: str) -> list[str]:
    """The options that Hydra's own message lists, for a group that is not ours."""
    _, _, after = text.partition("Available options in ")
    return re.findall(r"^\t(\S+)$", after, re.MULTILINE)


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    if near := nearest(word, known):
        return f" Did you mean {near}?"
    return f" There are: {', '.join(known)}." if len(known) < 30 else " See python -m pipeline --cfg job."


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass of dataclasses."""
    keys: list[str] = []
    for field in fields(schema):
        keys.append(prefix + field.name)
        if is_dataclass(field.type):
            keys += _keys(field.type, f"{prefix}{field.name}.")
    return keys
