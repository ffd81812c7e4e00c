"""Tell by short hashes whether two things would give the same text."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.common.request import CONSTRAINTS, BadRow, GenerationParams, PromptRow
from pipeline.common.streams import is_nameless

DEFAULTS = vars(GenerationParams())
ENGINE = ("name", "max_model_len", "extra")  # what of another engine's settings decides the text
LATER = {"adapter", "context", "template_date", "thinking_tags", "label_logprobs", *CONSTRAINTS}


def fingerprint(value: Any, length: int = 8) -> str:
    """Return hexadecimal digits of a plain value's hash; the order of mappings' keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:length]


def job_fingerprint(config: dict[str, Any]) -> str:
    """Hash all that decides a job's text, from the composed config as plain data.

    What only decides how fast it comes is left out: our engine's settings, devices, folders, a shard or a limit.
    So is what `auto` comes to on a device, which a cluster's login node cannot know: manifest.json has that.
    """
    model = dict(config["model"])
    for irrelevant in ("architecture", "device_map", "max_memory", "offload_dir", "safetensors_only"):
        model.pop(irrelevant, None)
    model["chat_template"] = _template(model.get("chat_template"))
    for key in ("name", "adapter"):
        if model.get(key) and (local := Path(model[key])).is_dir():
            model[key] = str(local.resolve())
    generation = dict(config["generation"])
    generation["json_schema"] = _ordered(_template(generation.get("json_schema")))
    generation["grammar"] = _template(generation.get("grammar"))
    for later in (model, generation):  # keys that came later count where they are set, so that folders stay
        for key in LATER & later.keys():
            if later[key] is None or later[key] is False:
                del later[key]
    quant = dict(config["quant"])
    if quant.get("compute_dtype") == "auto":  # what it was before there was an auto, so that folders stay
        quant["compute_dtype"] = "bfloat16"
    prompts = config["prompts"]
    path = str(Path(prompts).resolve()) if Path(prompts).exists() else prompts
    path = "-" if is_nameless(prompts) else path
    parts = [model, quant, generation, config["system"], config["prompt_field"], path]
    if config.get("continue_final_message"):
        parts.append("continue_final_message")
    shape = {key: config[key] for key in ("prompt_template", "columns", "examples") if config.get(key)}
    if "examples" in shape:
        shape |= {"examples": file_digest(shape["examples"]), "shots": config["shots"]}
    if shape:
        parts.append(shape)
    engine = config.get("engine") or {}
    if engine.get("name", "default") != "default":
        parts.append({key: engine[key] for key in ENGINE})
    return fingerprint(parts)


def row_key(row: PromptRow | BadRow) -> str:
    """Hash what decides one row's completions within its job: 16 hexadecimal digits.

    Its place in the file does not count. Parameters count where they differ from the defaults, so that a new
    parameter in a later version leaves old rows as they are.
    """
    if isinstance(row, BadRow):
        return fingerprint([row.id, row.error], 16)
    params = {name: value for name, value in vars(row.params).items() if value != DEFAULTS[name]}
    if "json_schema" in params:
        params["json_schema"] = _ordered(params["json_schema"])
    parts: list[Any] = [row.id, row.prompt, row.messages, row.system, params]
    if row.template_kwargs or row.continue_final_message is not None:
        parts += [row.template_kwargs, row.continue_final_message]
    return fingerprint(parts, 16)


def metadata_key(row: PromptRow | BadRow | dict[str, Any]) -> int:
    """Hash what a row, or a line of outputs.jsonl, carries along: it decides no text, but may be corrected."""
    metadata = row.get("metadata") if isinstance(row, dict) else getattr(row, "metadata", None)
    return int(fingerprint(metadata, 16), 16) if metadata else 0


def file_digest(path: str) -> str:
    """Hash what is in a file; one that cannot be read counts by its name, and its reader says what is wrong."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return path


def _ordered(schema: Any) -> Any:
    """Write a schema as text: the order of its properties is that of the answer."""
    return schema if isinstance(schema, str | None) else json.dumps(schema)


def _template(template: Any) -> Any:
    """Read the file of a template, schema or grammar, which counts by what is in it."""
    try:
        if isinstance(template, str) and template and len(template) < 1024 and Path(template).is_file():
            return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError):  # its reader says what is wrong with it
        pass
    return template
