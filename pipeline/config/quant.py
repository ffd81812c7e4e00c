"""Say what each quantization is, once: to add one, add it to QUANTS and describe it in conf/quant/NAME.yaml."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Self

from pipeline.common.gpu import Gpu, have_bf16


class Dtype(Enum):
    """Name the dtype of weights that are not quantized."""

    auto = "auto"  # the checkpoint's own; float16 for bfloat16 on a GPU that has none
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class QuantMethod(Enum):
    """Say how bitsandbytes holds the linear layers; embedding, output head and norms stay as they are."""

    _value_: str
    bits: int | None  # a weight, without its scales; None as the dtype says

    none = "none", None  # not at all: bitsandbytes is not needed
    int8 = "int8", 8
    nf4 = "nf4", 4
    fp4 = "fp4", 4

    def __new__(cls, value: str, bits: int | None) -> Self:
        """Make a name that knows its bits."""
        member = object.__new__(cls)
        member._value_ = value
        member.bits = bits
        return member


STORED_BITS: dict[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16} | {
    method.value: method.bits for method in QuantMethod if method.bits is not None
}
ELEMENT_BYTES: dict[str, int] = {
    dtype.value: STORED_BITS[dtype.value] // 8 for dtype in Dtype if dtype is not Dtype.auto
}
BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit types
STATE_BLOCK = 256  # scales that share a scale of their own in double quantization


@dataclass(unsafe_hash=True)  # as a key of what the memory plan remembers; Hydra takes no frozen class
class QuantConfig:
    """Hold the settings of `quant=`."""

    method: QuantMethod = QuantMethod.none
    dtype: Dtype = Dtype.auto  # of the weights that are not quantized
    double_quant: bool = False  # 4-bit: quantize the scales too
    compute_dtype: Dtype = Dtype.auto  # 4-bit: of the products; auto is bfloat16, or float16 likewise

    @property
    def quantized(self) -> bool:
        """Say whether anything is, so that bitsandbytes is needed."""
        return self.method is not QuantMethod.none

    @property
    def bits(self) -> int | None:
        """Return the bits of a quantized weight; None where none is quantized."""
        return self.method.bits

    @property
    def four_bit(self) -> bool:
        """Say whether it packs two weights in a byte, so that products need a dtype of their own."""
        return self.method.bits == 4

    def stored_bytes(self, count: int) -> int:
        """Return the bytes of so many quantized weights, without their scales."""
        return -(-count * (self.bits or 0) // 8)

    @property
    def product_dtype(self) -> str:
        """Return the dtype of 4-bit products; `auto` where no device has settled it is bfloat16."""
        compute = self.compute_dtype
        return (Dtype.bfloat16 if compute is Dtype.auto else compute).name


# What `quant=` can name, the nearest to the checkpoint's own answers first.
QUANTS = {
    "none": QuantConfig(),
    "fp32": QuantConfig(dtype=Dtype.float32),
    "fp16": QuantConfig(dtype=Dtype.float16),
    "bf16": QuantConfig(dtype=Dtype.bfloat16),
    "int8": QuantConfig(QuantMethod.int8),
    "nf4_single": QuantConfig(QuantMethod.nf4),
    "nf4": QuantConfig(QuantMethod.nf4, double_quant=True),
    "fp4": QuantConfig(QuantMethod.fp4),
    "fp4_double": QuantConfig(QuantMethod.fp4, double_quant=True),
}
# What to offer where something else does not fit: of the same size, the nearest alone.
SUGGESTED = {name: QUANTS[name] for name in ("none", "bf16", "int8", "nf4_single", "nf4")}
SMALLEST = next(reversed(SUGGESTED))


def quant_name(quant: QuantConfig) -> str:
    """Name it as `quant=` does; what has no name there, by the settings that are not the defaults."""
    for name, named in QUANTS.items():
        if named == quant:
            return name
    plain = QuantConfig()
    settings = {key: value for key, value in vars(quant).items() if value != getattr(plain, key)}
    return " ".join(
        f"{key}={value.value if isinstance(value, Enum) else str(value).lower()}"
        for key, value in settings.items()
    )


def read_quant(settings: Any, name: str) -> QuantConfig:
    """Read the settings that a job wrote down; where it wrote none, those of the name."""
    if not isinstance(settings, Mapping) or not settings:
        return QUANTS.get(name, QuantConfig())
    quant = QuantConfig(double_quant=bool(settings.get("double_quant")))
    quant.method = QuantMethod.__members__.get(str(settings.get("method")), QuantMethod.none)
    for key in ("dtype", "compute_dtype"):
        setattr(quant, key, Dtype.__members__.get(str(settings.get(key)), Dtype.auto))
    return quant


def precision(quant: QuantConfig) -> float:
    """Rank by the bits of a weight, 16 where the checkpoint decides; among equals, by the place in QUANTS."""
    places = list(QUANTS.values())
    place = places.index(quant) if quant in places else len(places)
    return (quant.bits or STORED_BITS.get(quant.dtype.value, 16)) - place / 100


def settle_dtypes(quant: QuantConfig, own: str | None, gpus: Iterable[Gpu]) -> QuantConfig:
    """Decide what `auto` is on these GPUs, or on the CPU where there are none.

    Where one of them would only emulate bfloat16, `auto` is float16 instead.

    Args:
        own: the checkpoint's dtype, as which `auto` stays otherwise; None where its config does not name one.
    """
    bf16 = have_bf16(gpus)
    dtype, compute = quant.dtype, quant.compute_dtype
    if dtype is Dtype.auto and own == Dtype.bfloat16.value and not bf16:
        dtype = Dtype.float16
    if compute is Dtype.auto:
        compute = Dtype.bfloat16 if bf16 else Dtype.float16
    return replace(quant, dtype=dtype, compute_dtype=compute)
