"""Load a model and its tokenizer; every failure is a LoadError that says what to do next."""

import gc
import importlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import logging as transformers_logging

from pipeline.common.errors import LoadError
from pipeline.common.host import anonymous_bytes, resident_bytes
from pipeline.config.quant import Dtype, QuantConfig
from pipeline.config.schema import ModelConfig
from pipeline.models.adapters import AppliedAdapter, apply_adapter, get_adapter, tokenizer_files
from pipeline.models.checkpoint import Checkpoint, locate, weight_paths
from pipeline.models.dtypes import compile_kernels, settle_here
from pipeline.models.formats import (
    ask_for_plain,
    becomes_plain,
    keep_products_everywhere,
    quantization,
    read_as,
    settle_format,
)
from pipeline.models.load_progress import loading_shown, tensor_sizes
from pipeline.models.loading_checks import (
    SMALLER,
    check_architecture,
    check_config,
    check_device,
    check_format,
    check_quantized,
    check_unused,
    explained,
    first_line,
)
from pipeline.models.own_settings import OwnSettings, read_own_settings

log = logging.getLogger(__name__)


@dataclass
class Loaded:
    """Hold a model, ready to run, and what is known of how it came here."""

    model: PreTrainedModel | None  # None once released
    tokenizer: Any
    quant: QuantConfig  # with the dtypes that this device computes in
    source: str  # a folder, or a name on the hub
    revision: str | None  # the hub's commit; None for a folder
    load_sec: float
    bare_bytes: int  # resident set before the first weight: Python, its libraries and the tokenizer
    bare_anonymous_bytes: int | None  # of it, what is no page of a file
    quantized_share: float | None  # of its weights; None where none was to be
    own_settings: OwnSettings  # what the model suggests to generate with
    format: str | None  # that the checkpoint's own weights are quantized in; None: they are plain
    adapter: AppliedAdapter | None


def quiet_transformers() -> None:
    """Send the libraries' warnings to the log, and keep their progress bars off the terminal."""
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    logging.getLogger("huggingface_hub").handlers.clear()  # its own writes to stderr
    # bitsandbytes recommends an optional package, whose kernel it would fetch from the hub, and says
    # at every single 8-bit product that bfloat16 becomes float16.
    for name in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)


def load_tokenizer(model: ModelConfig, models_dir: str) -> Any:
    """Load a model's tokenizer.

    Raises:
        LoadError: it cannot be found or read.
    """
    quiet_transformers()
    checkpoint = locate(model, models_dir, weights=False)
    return read_tokenizer(tokenizer_files(get_adapter(model, models_dir), checkpoint), model)


def load_model(model: ModelConfig, quant: QuantConfig, models_dir: str) -> Loaded:
    """Load a model in eval mode on its device or devices, with its tokenizer.

    Raises:
        LoadError: it cannot be found, read, quantized or fitted in memory.
    """
    start = time.perf_counter()
    quiet_transformers()
    check_device(model.device_map)
    adapter = get_adapter(model, models_dir)
    checkpoint = locate(model, models_dir, weights=True)
    check_architecture(checkpoint, model)
    stored = check_format(checkpoint, model, quant)
    check_config(_read_config(checkpoint, model), checkpoint, model)
    own = read_own_settings(checkpoint)
    tokenizer = read_tokenizer(tokenizer_files(adapter, checkpoint), model)
    asked, as_stored = quant, read_as(checkpoint, quant)
    plain = becomes_plain(checkpoint, asked, model.device_map)
    quant = settle_here(asked if plain else as_stored, checkpoint, model.device_map)
    _import_libraries(checkpoint, model, as_stored)
    bare = resident_bytes(), anonymous_bytes()
    network = _read_weights(checkpoint, model, quant, stored, plain=plain)
    if stored:
        settle_format(network, stored, asked, plain=plain)
    keep_products_everywhere(network)
    share = check_quantized(network, quant, checkpoint) if quant.quantized else None
    applied = apply_adapter(network, adapter, tokenizer) if adapter else None
    load_sec = time.perf_counter() - start
    source, revision = checkpoint.source, checkpoint.revision
    return Loaded(network, tokenizer, quant, source, revision, load_sec, *bare, share, own, stored, applied)


def _read_config(checkpoint: Checkpoint, model: ModelConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        raise LoadError(
            f"{checkpoint.config_path}: transformers cannot read it: {first_line(error)}",
            checkpoint.again,
        ) from error


def release(loaded: Loaded) -> None:
    """Give the model's memory back. The caller must hold no other reference to the model."""
    loaded.model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_tokenizer(checkpoint: Checkpoint, model: ModelConfig) -> Any:
    """Load the tokenizer of these files.

    Raises:
        LoadError: it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        raise LoadError(
            f"{checkpoint.source}: its tokenizer cannot be read: {first_line(error)}",
            "The folder needs tokenizer.json, or the files that this tokenizer is made from",
        ) from error


def _import_libraries(checkpoint: Checkpoint, model: ModelConfig, quant: QuantConfig) -> None:
    """Import what reading the weights would, so that it does not count as theirs."""
    importlib.import_module("accelerate")
    if model.adapter is not None:
        importlib.import_module("peft")
    if quant.quantized:
        importlib.import_module("bitsandbytes")
    compile_kernels(quant, checkpoint, model.device_map)
    if not model.trust_remote_code:
        kind = CONFIG_MAPPING[str(checkpoint.read_config()["model_type"])]
        MODEL_FOR_CAUSAL_LM_MAPPING[kind]


def _read_weights(
    checkpoint: Checkpoint, model: ModelConfig, quant: QuantConfig, stored: str | None, *, plain: bool
) -> PreTrainedModel:
    # A quantization_config that is given, even as None, takes the place of the checkpoint's own.
    quantized: dict[str, Any] = {} if stored else {"quantization_config": quantization(quant)}
    if stored and plain:
        quantized["config"] = _read_config(checkpoint, model)
        ask_for_plain(quantized["config"], stored)
    try:
        with loading_shown(tensor_sizes(weight_paths(checkpoint))):
            pair: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype="auto" if quant.dtype is Dtype.auto else getattr(torch, quant.dtype.value),
                device_map=model.device_map,
                max_memory=_max_memory(model.max_memory),
                offload_folder=model.offload_dir,
                attn_implementation=model.attn_implementation,
                use_safetensors=True if model.safetensors_only else None,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                **quantized,
            )
    except Exception as error:
        raise LoadError(*explained(error, checkpoint, quant, stored)) from error
    network, report = pair
    # transformers fills weights that the files lack with random numbers, and only warns.
    if missing := sorted(report["missing_keys"]):
        raise LoadError(
            f"{checkpoint.source}: its files lack {len(missing)} of the model's weights, as {missing[0]}: "
            "config.json and the weights do not belong together",
            checkpoint.again,
        )
    check_unused(network, sorted(report["unexpected_keys"]), checkpoint)
    if model.offload_dir is None and "disk" in getattr(network, "hf_device_map", {}).values():
        raise LoadError(
            f"{checkpoint.source}: does not fit in the memory of this machine or model.max_memory",
            f"{SMALLER}, or set model.offload_dir=DIR to keep the rest on disk (slow)",
        )
    network.eval()
    assert isinstance(network, PreTrainedModel)
    return network


def _max_memory(limits: dict[Any, str] | None) -> dict[int | str, str] | None:
    """Turn the names of GPUs into numbers, as accelerate knows them; a YAML key is text."""
    if not limits:
        return None
    return {int(device) if str(device).isdigit() else device: limit for device, limit in limits.items()}
