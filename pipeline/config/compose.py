"""Turn a command line into a Config, with errors that name the nearest word that is right."""

import glob
import itertools
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.common.errors import ConfigError
from pipeline.common.fingerprint import job_fingerprint
from pipeline.common.streams import is_nameless
from pipeline.common.suggestions import did_you_mean
from pipeline.config.overrides import in_hydras_words
from pipeline.config.own_files import find_mistake
from pipeline.config.quant import Dtype, QuantMethod
from pipeline.config.schema import Config, EngineName, register, root
from pipeline.config.sources import GROUPS, place, register_sources
from pipeline.config.stored_format import format_on_disk, label

SYNONYMS = {  # other tools' words, which no spelling finds
    "quantization": "quant",
    "batch_size": "engine.max_rows",
    "max_batch_size": "engine.max_rows",
    "max_num_seqs": "engine.max_rows",
    "max_tokens": "generation.max_new_tokens",
    "max_length": "generation.max_new_tokens",
    "num_return_sequences": "generation.n",
    "tensor_parallel_size": "engine.tensor_parallel",
    "engine.data_parallel": "devices",  # a process each, on shards of the job
    "device": "model.device_map",
    "input": "prompts",
    "input_file": "prompts",
    "system_prompt": "system",
}


def prepare() -> str:
    """Register schema and resolvers with Hydra; return conf/ as an absolute path."""
    register()
    register_sources()
    OmegaConf.register_new_resolver("job_folder", _job_folder, replace=True)
    return str(root() / "conf")


def read_config(overrides: list[str]) -> Config:
    """Read the job that a command line describes.

    Raises:
        ConfigError: a key, group or value that does not exist, has the wrong type or makes no sense.
    """
    return to_config(compose_config(overrides))


def compose_config(overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose the same, still as Hydra's own object.

    Raises:
        ConfigError: as `read_config`.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.removeprefix("~")
        if group in GROUPS and (key != group or value.lstrip().startswith("[")):  # Hydra takes none, and many
            raise ConfigError(f"{override}: choose one {group}", f"There are: {', '.join(options(group))}.")
    conf = prepare()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf, version_base="1.3"):
            return compose("config", overrides=in_hydras_words(overrides), return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: model=true
        raise find_mistake(overrides, GROUPS) or explain(error) from error
    except Exception as error:  # of a file that is no YAML
        if mistake := find_mistake(overrides, GROUPS):
            raise mistake from error
        raise


def to_config(composed: DictConfig) -> Config:
    """Turn the composed config into plain typed objects.

    Raises:
        ConfigError: a value is missing or outside its range.
    """
    for key, known in _added_keys(composed, Config):
        raise ConfigError(f"+{key}: no such key", _meant(key, known))
    try:
        config = OmegaConf.to_object(composed)
    except (OmegaConfBaseException, ValueError) as error:
        raise explain(error) from error
    assert isinstance(config, Config)
    return config


def recorded_config(folder: Path) -> Config:
    """Read the config that the job in a folder ran with, as Hydra noted it.

    Raises:
        ConfigError: it is not there, or not one of this version's.
    """
    path = folder / ".hydra" / "config.yaml"
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file", "Pass the folder of a job that was run.") from error
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        found = f"{path}: not a config of this version ({str(error).splitlines()[0]})"
        raise ConfigError(found, "Run the job again.") from error
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def _added_keys(node: DictConfig, kind: type[Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Find keys that Hydra's `+key=value` added beyond the schema, each with those that there are."""
    known = [f"{prefix}{field.name}" for field in fields(kind)]
    for name in (str(name) for name in node if prefix or name != "hydra"):
        child = node._get_node(name)
        inner = OmegaConf.get_type(child) if isinstance(child, DictConfig) else None
        if f"{prefix}{name}" not in known:
            yield f"{prefix}{name}", known
        elif isinstance(child, DictConfig) and inner is not None and is_dataclass(inner):
            yield from _added_keys(child, inner, f"{prefix}{name}.")


def sweep_cells(overrides: list[str]) -> list[list[str]]:
    """Combine the overrides' comma-separated values in every way, in the order of the command line.

    Raises:
        ConfigError: an override that Hydra cannot read, or a sweep over a range.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise explain(error) from error
    choices: list[list[str]] = []
    for override in parsed:
        if not override.is_sweep_override():
            choices.append([override.input_line or ""])
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(
                f"{override.input_line}: a range", "List the values with commas, as seed=1,2,3."
            )
    return [list(cell) for cell in itertools.product(*choices)]


def job_folder(overrides: list[str]) -> Path:
    """Say where the job of this command line lies.

    Raises:
        ConfigError: as `read_config`.
    """
    return Path(str(compose_config(overrides, with_hydra=True).hydra.run.dir))


def _job_folder(where: str = "", *, _root_: DictConfig) -> str:
    """Name outputs/<prompt set>/<model>-<quant>-<generation>[+vllm]-<fingerprint>[/shard-I-of-N], for Hydra."""
    plain: dict[str, Any] = {
        str(key): OmegaConf.to_container(value, enum_to_str=True) if isinstance(value, DictConfig) else value
        for key, value in _root_.items()
        if key != "hydra"
    }
    choices = _root_.hydra.runtime.choices
    named = any(o.lstrip("+").startswith("model.name=") for o in _root_.hydra.overrides.task)
    model = Path(plain["model"]["name"]).name if named else choices.model
    if adapter := plain["model"]["adapter"]:
        model += f"+{Path(adapter).name}"
    prompts = str(plain["prompts"])
    prompt_set = plain["prompt_set"] or (
        "stdin" if is_nameless(prompts) else re.split(r"[.?]", Path(prompts).name)[0]
    )
    if (shipped := root() / "jobs" / str(plain["examples"])).is_file() and not Path(
        plain["examples"]
    ).exists():
        plain["examples"] = str(shipped)
    engine = plain["engine"]["name"]
    how = choices.generation if engine == EngineName.default.name else f"{choices.generation}+{engine}"
    tail = f"{how}-{job_fingerprint(plain)}"
    folder = Path(prompt_set) / (
        _there(Path(plain["outputs_dir"]) / prompt_set, model, tail)
        or f"{model}-{_weights_format(plain) or choices.quant}-{tail}"
    )
    if plain["shard"]:
        folder /= "shard-{}-of-{}".format(*str(plain["shard"]).partition("/")[::2])
    return str(folder if where == "inside" else Path(plain["outputs_dir"]) / folder)


def _there(folder: Path, model: str, tail: str) -> str | None:
    """Find a job's folder that is there already, whatever format its name says: the fingerprint tells it."""
    try:
        found = sorted(folder.glob(f"{glob.escape(model)}-*-{glob.escape(tail)}"))
    except OSError:  # a disk that does not answer: who makes the folder says so
        return None
    return found[0].name if found else None


def _weights_format(config: dict[str, Any]) -> str | None:
    """Name the format that a checkpoint came in, as a part of a folder's name; None where it is a job's to say."""
    quant = config["quant"]
    if quant["method"] != QuantMethod.none.name or quant["dtype"] != Dtype.auto.name:
        return None
    model = config["model"]
    found = format_on_disk(model["name"], model["revision"], config["models_dir"])
    return found and re.sub(r"\W+", "_", label(found)).strip("_")


def explain(error: Exception) -> ConfigError:
    """Say what an error of Hydra's means, and name the nearest word that is right."""
    text, cause = str(error), str(error.__cause__ or "")
    if missing := re.search(r"Could not find '([\w/]+)/([^'/]*)'", text):
        group, name = missing.groups()
        return ConfigError(f"{group}={name}: no such {group}", _meant(name, options(group) or _listed(text)))
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return ConfigError(f"{unknown[1]}: no such key", _meant_key(unknown[1]))
    if unknown := re.search(r"Key '([^']+)' (?:is )?not in[^\n]*\n\s+full_key: (\S+)", f"{text}\n{cause}"):
        where = re.search(r"In '([^']+)'", text)
        place = f" in {_file(where[1])}" if where else ""
        return ConfigError(f"{unknown[2]}: no such key{place}", _meant_key(unknown[2]))
    if isinstance(error, OverrideParseException):
        found = f"{error.override}: not KEY=VALUE as Hydra reads it"
        return ConfigError(found, "Quote values with special characters: 'KEY=\"…\"'.")
    if wrong := re.search(r"In '([^']+)': \w+ raised while composing config:\n(.+)", text):
        key = re.search(r"full_key: (\S+)", text)
        return ConfigError(f"{_file(wrong[1])}: {f'{key[1]}: ' if key else ''}{wrong[2]}")
    if wrong := re.search(r"Error merging override (.+)", text):
        return ConfigError(f"{wrong[1]}: {cause.splitlines()[0]}")
    return ConfigError(" ".join(line.strip() for line in text.splitlines() if "type=" not in line))


def _file(config: str) -> str:
    """Name the file of GROUP/NAME."""
    return f"{config}.yaml" if config.startswith("jobs/") else f"conf/{config}.yaml"


def options(group: str) -> list[str]:
    """List the names that GROUP= accepts."""
    return sorted(
        {file.stem for folder in (Path(), root()) for file in (folder / place(group)).glob("*.yaml")}
    )


def _listed(text: str) -> list[str]:
    """Read the options that Hydra's own message lists, for a group that is not ours."""
    _, _, after = text.partition("Available options in ")
    return re.findall(r"^\t(\S+)$", after, re.MULTILINE)


def _meant(word: str, known: list[str]) -> str:
    """Ask for the nearest known word, or list a few."""
    there_are = f"There are: {', '.join(known)}." if len(known) < 30 else "See python -m pipeline --cfg job."
    return did_you_mean(word, known) or there_are


def _meant_key(word: str) -> str:
    """Ask for the key that was meant: by another tool's word, without its group, or misspelt."""
    known = [*job_keys(), "hydra/launcher"]
    meant = [key for key in known if key == SYNONYMS.get(word)] or [
        key for key in known if key.endswith(f".{word}")
    ]
    return f"Did you mean {meant[0]}?" if len(meant) == 1 else _meant(word, known)


def job_keys() -> list[str]:
    """List all that may stand before "=" on a job's command line."""
    return list(dict.fromkeys([*GROUPS, *_keys(Config)]))


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """List all dotted keys of a dataclass of dataclasses."""
    keys: list[str] = []
    for field in fields(schema):
        keys.append(prefix + field.name)
        if is_dataclass(field.type):
            keys += _keys(field.type, f"{prefix}{field.name}.")
    return keys
