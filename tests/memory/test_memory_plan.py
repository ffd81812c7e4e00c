"""Predicted bytes against those of real models: transformers and bitsandbytes on the CPU."""

import gc
import json
import os
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import yaml
from machines import H100, MI300, T4
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedModel

from pipeline.common.errors import ConfigError
from pipeline.common.request import GenerationParams, Request
from pipeline.config.quant import QUANTS, Dtype, QuantConfig, QuantMethod
from pipeline.config.schema import root
from pipeline.engine.model_facts import cache_name
from pipeline.engine.rectangles.rectangle import allocate, regroup, write
from pipeline.engine.scheduler import Sample
from pipeline.memory.architecture import Architecture, differences
from pipeline.memory.peaks import activation_bytes, load_peak, run_peak
from pipeline.memory.plan import (
    checkpoint_bytes,
    footprint_bytes,
    kv_bytes_per_token,
    kv_cache_bytes,
    parameters,
    parts,
    quant_state_bytes,
)

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"model_type": "llama", "head_dim": 32, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 32},
    "phi3": {
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": _LONGROPE,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {"head_dim": 32, "sliding_window": 32},
    "qwen2": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3},
    "qwen3": {"head_dim": 32},
}


def tiny(family: str) -> dict[str, object]:
    return {"model_type": family, "dtype": "bfloat16"} | SMALL | FAMILIES[family]


def facts(model: str) -> Architecture:
    text = (root() / "conf" / "model" / f"{model}.yaml").read_text()
    return Architecture.read(yaml.safe_load(text)["architecture"])


def load(folder: Path, quant: QuantConfig) -> PreTrainedModel:
    config = None
    if quant.method is QuantMethod.int8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif quant.method is not QuantMethod.none:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.method.value,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=quant.dtype.value, quantization_config=config, device_map="cpu"
    )


def real_state_bytes(model: PreTrainedModel) -> int:
    """Every tensor that bitsandbytes keeps beside the model's weights."""

    def tensors() -> Iterator[torch.Tensor | None]:
        for weight in model.parameters():
            yield getattr(weight, "SCB", None)
            state = getattr(weight, "quant_state", None)
            for part in (state, getattr(state, "state2", None)):
                for name in ("absmax", "code", "offset"):
                    yield getattr(part, name, None)

    return sum(t.nbytes for t in tensors() if t is not None)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = Path(os.environ.get("PIPELINE_TEST_MODEL", root() / "models/SmolLM2-135M-Instruct"))
    if not folder.is_dir():
        pytest.fail(f"{folder}: no such folder. Set PIPELINE_TEST_MODEL to the model's folder.")
    return folder


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as a folder with random weights in bfloat16."""
    folders: dict[str, Path] = {}
    for family in FAMILIES:
        config = AutoConfig.for_model(**tiny(family))
        folders[family] = tmp_path_factory.mktemp("tiny") / family
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folders[family])
    return folders


@pytest.mark.parametrize("name", QUANTS)
def test_smollm2_takes_the_predicted_bytes_in_every_quantization(smollm2: Path, name: str) -> None:
    quant, arch = QUANTS[name], facts("smollm2")
    model = load(smollm2, quant)
    assert footprint_bytes(arch, quant) == model.get_memory_footprint()
    assert quant_state_bytes(arch, quant) == real_state_bytes(model)


def test_the_facts_in_conf_are_those_of_the_models_own_config(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert differences(facts("smollm2"), Architecture.read(config)) == []


def test_known_footprints_of_smollm2() -> None:
    arch = facts("smollm2")
    known = {"none": 269_030_272, "fp32": 538_060_288, "nf4": 109_777_792}
    assert {name: footprint_bytes(arch, QUANTS[name]) for name in known} == known


def test_llama_8b_in_4_bits_takes_5591_mb_and_not_4015() -> None:
    arch, quant = facts("llama"), QUANTS["nf4"]
    size = dict.fromkeys(("linear", "embedding and head", "norm", "buffers"), 0)
    for part in parts(arch, quant):
        kind = "linear" if part.dtype == "nf4" else part.part
        size["embedding and head" if kind in ("embedding", "head") else kind] += part.bytes
    assert parameters(arch) == 8_030_261_248
    assert round(size["linear"] / 1e6, 1) == 3489.7
    assert round(size["embedding and head"] / 1e6, 1) == 2101.3
    assert round(size["norm"] / 1e6, 1) == 0.5
    assert footprint_bytes(arch, quant) == 5_591_540_224


@pytest.mark.parametrize("name", ["fp32", "int8", "nf4", "nf4_single"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_takes_the_predicted_bytes(tiny_folders: dict[str, Path], family: str, name: str) -> None:
    quant = QUANTS[name]
    arch = Architecture.read(json.loads((tiny_folders[family] / "config.json").read_text()))
    model = load(tiny_folders[family], quant)
    assert footprint_bytes(arch, quant) == model.get_memory_footprint()
    assert quant_state_bytes(arch, quant) == real_state_bytes(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_and_a_saved_config_give_the_same_architecture(
    tiny_folders: dict[str, Path], family: str
) -> None:
    saved = json.loads((tiny_folders[family] / "config.json").read_text())
    assert differences(Architecture.read(tiny(family)), Architecture.read(saved)) == []


@pytest.mark.parametrize("model", ["llama", "llama1b", "phi", "gemma", "qwen", "deepseek", "smollm2"])
def test_each_named_model_has_the_shape_that_transformers_builds(model: str) -> None:
    text = (root() / "conf" / "model" / f"{model}.yaml").read_text()
    config = AutoConfig.for_model(**yaml.safe_load(text)["architecture"])
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert footprint_bytes(facts(model), QUANTS["bf16"]) == real.get_memory_footprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_kv_bytes_per_token_are_those_of_transformers(
    tiny_folders: dict[str, Path], family: str
) -> None:
    arch = Architecture.read(json.loads((tiny_folders[family] / "config.json").read_text()))
    model = load(tiny_folders[family], QUANTS["none"])
    assert parameters(arch) == model.num_parameters()
    assert footprint_bytes(arch, QUANTS["none"]) == model.get_memory_footprint()
    cache = DynamicCache()  # without a config: it holds every token of sliding layers too
    with torch.inference_mode():
        model(torch.ones(3, 40, dtype=torch.int64), **{cache_name(model): cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sum(kv_bytes_per_token(arch, QUANTS["none"]).values()) * 3 * 40 == held


def test_sliding_layers_hold_their_window_and_full_layers_every_token() -> None:
    gemma, quant = facts("gemma"), QUANTS["bf16"]
    per_token = kv_bytes_per_token(gemma, quant)
    assert per_token == {512: 15 * 2 * 256 * 2, None: 3 * 2 * 256 * 2}
    held = kv_cache_bytes(gemma, quant, [(2, 1000)])
    assert held == 2 * (per_token[512] * (511 + 32) + per_token[None] * (1000 + 32))
    assert kv_cache_bytes(gemma, quant, [(2, 1000)], prefilling=True) == 2 * 1032 * sum(per_token.values())


def test_float32_doubles_the_kv_cache_and_quantized_weights_do_not_shrink_it() -> None:
    arch = facts("llama")
    half, full, nf4 = (sum(kv_bytes_per_token(arch, QUANTS[n]).values()) for n in ("none", "fp32", "nf4"))
    assert (half, full, nf4) == (131_072, 262_144, 131_072)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
def test_the_kv_cache_takes_the_bytes_that_the_engine_allocates(family: str) -> None:
    arch, quant = Architecture.read(tiny(family)), QUANTS["bf16"]
    rows = [Sample(Request(str(i), (1,) * 50, GenerationParams()), 0) for i in range(3)]
    rectangle = allocate(rows, [50, 50, 50], arch.windows)
    keys = torch.ones(150, arch.num_key_value_heads, arch.head_dim, dtype=torch.bfloat16)
    row, column = torch.arange(3).repeat_interleave(50), torch.arange(50).repeat(3)
    for layer in range(arch.num_hidden_layers):
        write(rectangle, layer, keys, keys, row, column)
    assert kv_cache_bytes(arch, quant, [(3, 50)], prefilling=True) == rectangle.nbytes
    regrouped = regroup([rectangle], [rows[:2], rows[2:]])
    assert kv_cache_bytes(arch, quant, [(2, 50), (1, 50)]) == sum(r.nbytes for r in regrouped)


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._tensors: Counter[int] = Counter()  # of each storage
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._tensors[storage.data_ptr()] += 1
                self._bytes[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(tensor, self._drop, storage.data_ptr())
        self.peak = max(self.peak, sum(self._bytes.values()))
        return result

    def _drop(self, storage: int) -> None:
        self._tensors[storage] -= 1
        if self._tensors[storage] == 0:
            del self._bytes[storage]


@pytest.mark.parametrize("name", ["none", "fp32"])
def test_prefill_activations_are_those_of_a_real_pass(smollm2: Path, name: str) -> None:
    model = load(smollm2, QUANTS[name])
    with torch.inference_mode(), LiveBytes() as live:
        model.model(torch.ones(8, 64, dtype=torch.int64), use_cache=False)
    assert activation_bytes(facts("smollm2"), QUANTS[name], 512, 64) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("name", ["none", "fp32"])
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (4, 512), (2, 1024)])
def test_a_gpus_activations_are_those_of_a_pass_that_repeats_no_key(
    name: str, rows: int, columns: int, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensors on a CPU, whose attention is one operator here, too."""
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    model = load(smollm2, QUANTS[name])
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[0, :5] = 0  # else there would be no mask at all
    with torch.inference_mode(), LiveBytes() as live:
        model.model(torch.ones_like(mask), attention_mask=mask, use_cache=False)
    predicted = activation_bytes(facts("smollm2"), QUANTS[name], rows * columns, columns, (H100,))
    assert predicted == pytest.approx(live.peak, rel=0.05)


def test_what_a_run_takes_beside_weights_and_keys_follows_the_card() -> None:
    arch, quant = facts("llama"), QUANTS["nf4"]
    sizes = {"kv_cache": 0, "rows": 64, "prefill_tokens": 2048, "columns": 16384, "copies_logits": True}
    cpu, t4, h100, mi300, two = (
        run_peak(arch, quant, gpus=gpus, **sizes) for gpus in ((), (T4,), (H100,), (MI300,), (H100, H100))
    )
    dequantized = 2 * 14336 * 4096
    assert (mi300.scratch, t4.scratch, h100.scratch) == (
        dequantized,
        dequantized + 2 * 8_519_680,  # a stream for passes, and one for what is recorded
        dequantized + 2 * 33_554_432,
    )
    assert h100.activations < cpu.activations  # keys are not repeated
    assert (two.activations, two.scratch) == (2 * h100.activations, 2 * (dequantized + 33_554_432))
    int8 = [run_peak(arch, QUANTS["int8"], gpus=gpus, **sizes) for gpus in ((T4,), (H100,))]
    assert [peak.scratch for peak in int8] == [2 * 8_519_680, dequantized + 2 * 33_554_432]
    assert int8[1].activations == h100.activations < int8[0].activations  # the T4 has bitsandbytes' products
    assert two.logits == h100.logits == 64 * 128_256 * (2 + 17)
    assert (t4.context, two.context) == (600 * 2**20, 1200 * 2**20)


def test_each_kind_of_window_has_a_mask_of_its_own_on_a_gpu() -> None:
    arch, quant = facts("gemma"), QUANTS["none"]
    plain = replace(arch, windows=(None,) * len(arch.windows))
    more = activation_bytes(arch, quant, 2048, 4096, (H100,)) - activation_bytes(
        plain, quant, 2048, 4096, (H100,)
    )
    assert more == 2048 * 4096


def test_a_peak_is_the_sum_of_its_parts() -> None:
    arch, quant = facts("llama"), QUANTS["nf4"]
    peak = run_peak(
        arch,
        quant,
        kv_cache=10**9,
        rows=8,
        prefill_tokens=2048,
        columns=512,
        copies_logits=True,
        gpus=(H100,),
    )
    assert peak.total == sum(asdict(peak).values())
    assert {name for name, part in asdict(peak).items() if part <= 0} == {"packed"}  # only on a CPU
    assert (peak.footprint, peak.kv_cache) == (footprint_bytes(arch, quant), 10**9)


def test_weights_that_stay_as_they_are_on_a_host_are_only_mapped() -> None:
    arch = facts("smollm2")
    as_is, converted = (load_peak(arch, QUANTS[name], gpus=()) for name in ("none", "fp32"))
    packed = load_peak(arch, QUANTS["none"], gpus=(), packed=True)
    assert {each.mapped for each in (as_is, converted, packed)} == {269_030_016}
    assert as_is.needed == 0
    assert converted.needed > 538_060_288
    assert packed.needed > 269_030_272  # and the head, which is the embedding, a second time


def test_of_a_file_that_is_mostly_embedding_the_embedding_stays_mapped() -> None:
    """It is the larger part of Gemma-3-270M, and is not copied out of the file."""
    arch, quant = facts("gemma"), QUANTS["nf4"]
    wide = replace(arch, vocab_size=4 * arch.vocab_size)
    embedding = 2 * wide.vocab_size * wide.hidden_size
    assert 2 * embedding > checkpoint_bytes(wide)
    stored = footprint_bytes(wide, quant) + quant_state_bytes(wide, quant)
    assert load_peak(wide, quant, gpus=()).needed < stored - embedding + 40 * 2**20
    assert load_peak(arch, quant, gpus=()).mapped == checkpoint_bytes(arch)


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("none", 0),
        ("fp32", 0),  # converted on the host
        ("nf4_single", 2 * 14336 * 4096),
        ("nf4", 2 * 14336 * 4096 + 2 * 4 * 14336 * 4096 // 64),
        ("int8", 4 * 14336 * 4096),
    ],
)
def test_a_gpu_holds_only_what_is_quantized_twice(name: str, beside: int) -> None:
    arch, quant = facts("llama"), QUANTS[name]
    stored = footprint_bytes(arch, quant) + quant_state_bytes(arch, quant)
    one, two = (load_peak(arch, quant, gpus=gpus) for gpus in ((H100,), (H100, H100)))
    assert (one.held, one.mapped) == (stored + beside, 0)
    assert two.held == stored + 2 * beside
    assert one.needed - one.held == one.context == two.context // 2 == 600 * 2**20


@pytest.mark.parametrize("name", ["fp32", "nf4", "int8"])
def test_only_one_matrix_at_a_time_is_held_twice_while_loading(
    name: str, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loading on a CPU, in float32, so that no weight is a view of the checkpoint's file.

    A CPU's quantization takes a few copies of the matrix more than a GPU's kernel: 6 % at most, where the
    embedding held twice would be 20 % to 66 %.
    """
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the profiler sees this thread alone
    quant = replace(QUANTS[name], dtype=Dtype.float32)
    gc.collect()  # models of tests before would be freed in between, and their bytes taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        load(smollm2, quant)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    mapped_file = (smollm2 / "model.safetensors").stat().st_size
    predicted = load_peak(facts("smollm2"), quant, gpus=(H100,)).held
    assert max(live) - mapped_file == pytest.approx(predicted, rel=0.06)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "'mamba'.*formulas for gemma3_text, llama"),
        (tiny("llama") | {"hidden_size": None}, "hidden_size=None"),
    ],
)
def test_what_is_not_known_is_an_error_that_says_so(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.read(config)
