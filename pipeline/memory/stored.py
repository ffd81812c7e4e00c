"""Predict what a checkpoint takes that came quantized: by its config, and by the headers of its files."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.common.gpu import Gpu
from pipeline.config.quant import QuantConfig, settle_dtypes
from pipeline.config.schema import ModelConfig
from pipeline.config.stored_format import (
    SKIPPED,
    as_quant,
    can_dequantize,
    checkpoint_format,
    dequantizes,
    label,
    label_bits,
)
from pipeline.memory.architecture import Architecture, Counted, Weight
from pipeline.memory.plan import parameters, weights
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.tensor_headers import StoredTensor, read_headers

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SCALE_BYTES, _GROUP = 2, 128  # of most formats: a scale for so many weights
# Formats of which a loaded model was held against its file, byte for byte.
EXACT = ("torchao", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Stored:
    """Hold what is known of weights that came quantized."""

    config: Mapping[str, Any]
    headers: tuple[StoredTensor, ...] | None  # None: not at hand

    @property
    def format(self) -> str:
        """Name the format."""
        return str(checkpoint_format(self.config))

    @property
    def file_bytes(self) -> int | None:
        """Add up the tensors of its files."""
        return None if self.headers is None else sum(tensor.bytes for tensor in self.headers)

    def refusal(self, quant: QuantConfig) -> str | None:
        """Say why it cannot be loaded as asked; None if it can, as far as its config tells."""
        name = label(self.format)
        if quant.quantized:
            return f"its weights are quantized already, {name}"
        if self._as_plain(quant, ()) and not can_dequantize(self.format):
            return f"its weights are quantized, {name}, and there is no way from there to plain ones"
        return None

    def _as_plain(self, quant: QuantConfig, gpus: tuple[Gpu, ...]) -> bool:
        return dequantizes(self.config, quant, gpus)

    def loaded(
        self, plain: Architecture, quant: QuantConfig, gpus: tuple[Gpu, ...]
    ) -> tuple[Architecture, QuantConfig, str]:
        """Say what it is once it is loaded as asked on these GPUs, () is the CPU, and name that.

        Args:
            plain: the same model as if its weights were plain.
        """
        name, found = label(self.format), replace(plain, file_bytes=self.file_bytes)
        if self._as_plain(quant, gpus):
            return found, settle_dtypes(quant, plain.dtype, gpus), f"{name}, dequantized"
        stored = as_quant(self.config, quant)
        settled = settle_dtypes(stored, plain.dtype, gpus)
        if stored.quantized:
            return _with_plain_experts(found), settled, name
        return _kept(found, self), settled, name


def read_stored(checkpoint: Checkpoint, config: Mapping[str, Any], model: ModelConfig) -> Stored | None:
    """Read what is known of weights that came quantized; None for plain ones."""
    if checkpoint_format(config) is None:
        return None
    return Stored(config, read_headers(checkpoint, model))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the same model with plain weights, and which of them bitsandbytes would leave out more than usual."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    settings = config.get("quantization_config")
    skipped = settings.get(SKIPPED) if isinstance(settings, Mapping) else None
    return {**plain, SKIPPED: list(skipped)} if skipped else plain


def _with_plain_experts(arch: Architecture) -> Architecture:
    """Leave experts as they are: what bitsandbytes has quantized before are linear layers alone."""
    if arch.counted is None:
        return arch
    held = tuple(replace(w, quantizable=w.quantizable and not w.experts) for w in arch.counted.weights)
    return replace(arch, counted=replace(arch.counted, weights=held))


def _kept(plain: Architecture, stored: Stored) -> Architecture:
    """Replace the weights of an architecture by the tensors of the files, which are held as they lie there."""
    count, buffers = parameters(plain), [w for w in weights(plain) if w.part == "buffers"]
    name = stored.format
    if stored.headers is None:
        bits = _bits(stored.config, name)
        note: str | None = (
            f"its weights, by {bits:g} bits and a scale for each {_GROUP}: the headers of its files are not at hand"
        )
        held: Iterable[Weight] = (_estimated(w, name, bits) for w in weights(plain) if w.part != "buffers")
    else:
        names = {tensor.name for tensor in stored.headers}
        buffers = [w for w in buffers if w.name not in names]
        note = None if name in EXACT else f"its weights, taken to be held as they lie in the files ({name})"
        if name == "compressed-tensors":  # unpacked as it is loaded; what its layers round with stays
            held = [w for w in weights(plain) if w.part != "buffers"]
            held += [_as_stored(t) for t in stored.headers if not _is_weight(t.name)]
        else:
            held = map(_as_stored, stored.headers)
    notes = [text for text in (plain.counted and plain.counted.note, note) if text]
    refused = plain.counted.refused if plain.counted else None
    return replace(plain, counted=Counted((*held, *buffers), "; ".join(notes) or None, refused, count))


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".bias", ".weight_packed", ".weight_shape"))


def _as_stored(tensor: StoredTensor) -> Weight:
    """Describe a tensor that is held as it lies in the file; weights and biases in plain numbers are as the model."""
    plain = tensor.name.endswith((".weight", ".bias")) and tensor.dtype in _FLOATS
    count = math.prod(tensor.shape)
    element = tensor.bytes // count if count else 0
    dtype = _FLOATS.get(tensor.dtype, tensor.dtype.lower())
    return Weight(
        tensor.name, _part(tensor.name), tensor.shape, dtype=None if plain else dtype, element_bytes=element
    )


def _estimated(weight: Weight, name: str, bits: float) -> Weight:
    """Estimate a linear layer's weight by the bits of its format."""
    if not weight.quantizable:
        return weight
    size = math.ceil(weight.count * bits / 8) + _SCALE_BYTES * math.ceil(weight.count / _GROUP)
    return Weight(weight.name, weight.part, (size,), dtype=name, element_bytes=1)


def _bits(config: Mapping[str, Any], name: str) -> float:
    """Read the bits of a weight, where the settings name them."""
    settings: Any = config.get("quantization_config")
    found = settings.get("bits", settings.get("w_bit")) if isinstance(settings, Mapping) else None
    return found if isinstance(found, int) and 0 < found <= 16 else label_bits(name)


def _part(name: str) -> str:
    """Say what a tensor of a file is for, by its name."""
    for part, marks in _MARKS.items():
        if any(mark in name for mark in marks):
            return part
    return "other"


_MARKS = {
    "norm": ("norm", ".ln_"),
    "embedding": ("embed", ".wte", ".wpe"),
    "head": ("lm_head", "output_layer", "embed_out"),
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "expert", "ffn", "feed_forward"),
}
