"""Turn a GGUF file into the folder of safetensors that every other part reads."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.common.errors import LoadError
from pipeline.common.packages import can_import
from pipeline.models.loading_checks import first_line


def convert(gguf: Path, folder: Path, dtype: str) -> bool:
    """Dequantize the weights of `gguf`, and save them with its tokenizer and chat template in `folder`.

    The folder appears whole or not at all, even when the process is killed.

    Returns:
        False if the folder already holds a model: then nothing is done.

    Raises:
        LoadError: the file or the folder cannot be used.
    """
    if (folder / "config.json").is_file():
        return False
    _check(gguf, folder)
    half_made, lock = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "lock"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # a second import waits, and finds the model there
        try:
            return not (folder / "config.json").is_file() and _convert(gguf, folder, half_made, dtype)
        finally:
            lock.unlink(missing_ok=True)


def _convert(gguf: Path, folder: Path, half_made: Path, dtype: str) -> bool:
    shutil.rmtree(half_made, ignore_errors=True)  # of a run that was killed
    half_made.mkdir()
    try:
        _save(gguf, half_made, dtype)
        if folder.is_dir():  # empty, or _check had refused it
            folder.rmdir()
        half_made.rename(folder)
    finally:
        shutil.rmtree(half_made, ignore_errors=True)
    return True


def _check(gguf: Path, folder: Path) -> None:
    if not can_import("gguf"):
        raise LoadError("the gguf package is not installed", "Run: pip install 'llm-job-pipeline[gguf]'")
    if not gguf.is_file():
        raise LoadError(f"{gguf}: no such file", "Give the path of a .gguf file on this machine")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LoadError(f"{gguf}: not a GGUF file (it does not begin with GGUF)", "Download it again")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoadError(
            f"{folder}: there is something else already", "Remove it, or choose another folder with to="
        )


def _save(gguf: Path, folder: Path, dtype: str) -> None:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype), **_dense()
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:
        raise LoadError(
            f"{gguf}: transformers cannot read it: {first_line(error)}",
            "Choose a GGUF of another architecture, or the model's own safetensors",
        ) from error
    # transformers takes a model from a GGUF for a quantized one, and refuses to save it or to
    # quantize it again, though its weights are plain by now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dense() -> dict[str, Any]:
    """Ask for plain weights: newer releases leave them packed when they find a kernel for that."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}
