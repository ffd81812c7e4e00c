"""The table of quantizations, and what is decided by it."""

from dataclasses import replace

import pytest

from pipeline.common.gpu import Gpu
from pipeline.config.compose import options, read_config
from pipeline.config.quant import (
    ELEMENT_BYTES,
    QUANTS,
    STORED_BITS,
    SUGGESTED,
    Dtype,
    QuantConfig,
    QuantMethod,
    precision,
    quant_name,
    read_quant,
    settle_dtypes,
)

T4 = Gpu("cuda", "Tesla T4", capability=(7, 5))


@pytest.mark.parametrize("name", QUANTS)
def test_conf_and_the_table_say_the_same_of_each_quantization(name: str) -> None:
    assert read_config([f"quant={name}"]).quant == QUANTS[name]


def test_conf_and_the_table_name_the_same_quantizations() -> None:
    assert sorted(QUANTS) == options("quant")
    assert len(set(QUANTS.values())) == len(QUANTS)


@pytest.mark.parametrize("name", QUANTS)
def test_a_quantization_is_called_by_its_name_and_read_back_from_what_a_job_wrote(name: str) -> None:
    quant = QUANTS[name]
    written = {
        "method": quant.method.name,
        "dtype": quant.dtype.name,
        "double_quant": quant.double_quant,
        "compute_dtype": quant.compute_dtype.name,
    }
    assert quant_name(quant) == name
    assert read_quant(written, "a name of long ago") == read_quant(None, name) == quant


def test_settings_without_a_name_are_named_one_by_one() -> None:
    quant = replace(QUANTS["nf4"], dtype=Dtype.float16, compute_dtype=Dtype.float32)
    assert quant_name(quant) == "method=nf4 dtype=float16 double_quant=true compute_dtype=float32"


def test_fewer_bits_are_less_precise_and_equal_bits_are_in_the_order_of_the_table() -> None:
    names = ["fp32", "none", "fp16", "bf16", "int8", "nf4_single", "nf4", "fp4", "fp4_double"]
    ranks = [precision(QUANTS[name]) for name in names]
    assert ranks == sorted(set(ranks), reverse=True)
    assert precision(replace(QUANTS["nf4"], dtype=Dtype.float16)) < precision(QUANTS["fp4_double"])


def test_what_is_suggested_takes_less_and_less() -> None:
    bits = [16 if quant.bits is None else quant.bits for quant in SUGGESTED.values()]
    assert bits == sorted(bits, reverse=True)


def test_every_stored_dtype_has_its_bits() -> None:
    assert set(STORED_BITS) == {d.value for d in Dtype} - {"auto"} | {m.value for m in QuantMethod} - {"none"}
    assert ELEMENT_BYTES == {"float32": 4, "float16": 2, "bfloat16": 2}


@pytest.mark.parametrize(("name", "five"), [("int8", 5), ("nf4", 3), ("fp4_double", 3)])
def test_quantized_weights_are_packed_to_whole_bytes(name: str, five: int) -> None:
    assert QUANTS[name].stored_bytes(5) == five


def test_a_dtype_that_the_table_does_not_know_stays_as_the_checkpoint_has_it() -> None:
    assert settle_dtypes(QuantConfig(), "float8_e4m3fn", (T4,)).dtype is Dtype.auto
