"""Say to transformers how weights are quantized, and bring those that came so into the state that they run in."""

from typing import Any

from pipeline.common import terminal
from pipeline.config.quant import Dtype, QuantConfig
from pipeline.config.stored_format import AS_READ, as_quant, bitsandbytes_settings, dequantizes
from pipeline.engine.accelerators import usable_gpus
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.quantized_experts import BitsAndBytesExpertsConfig


def quantization(quant: QuantConfig) -> BitsAndBytesExpertsConfig | None:
    """Say it as transformers wants it; None for weights that stay as they are."""
    if not quant.quantized:
        return None
    return BitsAndBytesExpertsConfig(**bitsandbytes_settings(quant))  # type: ignore[no-untyped-call]


def read_as(checkpoint: Checkpoint, quant: QuantConfig) -> QuantConfig:
    """Say what its weights are quantized to, where they are bitsandbytes'; else what was asked."""
    return as_quant(checkpoint.read_config(), quant)


def becomes_plain(checkpoint: Checkpoint, quant: QuantConfig, device_map: Any) -> bool:
    """Say whether its weights are to be dequantized: as asked, or since the devices do not compute in their format."""
    return dequantizes(checkpoint.read_config(), quant, usable_gpus(device_map))


def ask_for_plain(config: Any, stored: str) -> None:
    """Have transformers dequantize the weights as it reads them, where it can."""
    if stored in AS_READ:
        config.quantization_config = {**config.quantization_config, "dequantize": True}


def settle_format(network: Any, stored: str, asked: QuantConfig, *, plain: bool) -> None:
    """Dequantize what transformers has not while it read the files, and say where that was not asked for.

    Args:
        stored: the checkpoint's format.
        plain: whether its weights are to become plain ones.
    """
    if plain and stored not in AS_READ:  # bitsandbytes'
        network.dequantize(network.dtype)
    elif (compressor := getattr(getattr(network, "hf_quantizer", None), "compressor", None)) is not None:
        compressor.decompress_model(network)  # as its first pass would, which comes too late to be measured
    if asked.dtype is Dtype.auto and not getattr(network, "is_quantized", True):
        dtype = str(network.dtype).removeprefix("torch.")
        terminal.say(f"Nothing here computes in {stored}: the checkpoint's weights are in {dtype}.")


def keep_products_everywhere(network: Any) -> None:
    """Keep bitsandbytes from reordering what does not fill its blocks for CPUs with AVX512-BF16: it would fail there.

    Such a layer, as a gate of one output, is multiplied as on every other CPU: by its dequantized weight.
    """
    for module in network.modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            fills = module.out_features % 32 == 0 and module.in_features % state.blocksize == 0
            module.support_avx512bf16_for_cpu &= fills
