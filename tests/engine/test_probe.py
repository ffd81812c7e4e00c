"""Every model runs on the fastest path that gives a padded row its own text, and no faster."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from engine_runs import EOS, alone, mixed_requests, run, shuffled, tokens

from pipeline.common.errors import LoadError
from pipeline.engine.model_facts import cache_name, layer_windows
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.probe import choose_forward
from pipeline.engine.rectangles.forward import FlatForward, PaddedForward
from pipeline.memory.architecture import Architecture

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA2 = {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 16, "query_pre_attn_scalar": 16}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Through transformers' interface, with attention like any other.
    "GPT2Config": ("rectangles", {"n_positions": 512}),  # learned positions
    "MistralConfig": ("rectangles", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}),
    # Through the interface, with attention that rectangles do not compute.
    "Gemma2Config": ("padded", {**GEMMA2, "tie_word_embeddings": False}),  # soft caps
    "GptOssConfig": ("padded", {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 16,
                                "num_local_experts": 4, "num_experts_per_tok": 2}),  # attention sinks
    # Past the interface.
    "BloomConfig": ("padded", {"n_layer": 2, "n_head": 4}),  # ALiBi
    "FalconConfig": ("padded", {}),  # rotation
}  # fmt: skip


def build(name: str) -> Any:
    config = getattr(transformers, name)(**{**SMALL, "intermediate_size": 128, **OTHERS[name][1]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_every_promised_architecture_takes_the_fast_path(each_tiny_model):
    forward, report = choose_forward(copy.deepcopy(each_tiny_model))
    assert isinstance(forward, FlatForward)
    assert (report["path"], report["why"]) == ("rectangles", None)
    assert 0 <= report["max_logit_difference"] < 1e-4


def test_the_real_model_takes_the_fast_path(smollm2):
    _, report = choose_forward(copy.deepcopy(smollm2[0]))
    assert report["path"] == "rectangles"
    assert report["max_logit_difference"] < 1e-3


def test_the_fast_path_can_be_left_out(tiny_model):
    model = copy.deepcopy(tiny_model("llama"))
    own = model.config._attn_implementation
    forward, report = choose_forward(model, "plain")
    assert isinstance(forward, PaddedForward)
    assert not forward.equal_lengths
    assert (report["path"], model.config._attn_implementation) == ("padded", own)


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_takes_the_path_that_keeps_its_text(name):
    model = build(name)
    own = model.config._attn_implementation
    changed = copy.deepcopy(model)
    forward, report = choose_forward(changed)
    assert report["path"] == OTHERS[name][0]
    assert report["max_logit_difference"] < 1e-3
    if report["path"] == "padded":
        assert changed.config._attn_implementation == own, "what was tried is undone"
    requests = mixed_requests()[:9]
    done = tokens(run(forward, shuffled(requests, 1), max_rows=4))
    for request in requests:
        assert done[request.id, 0] == alone(model, request), request.id


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "changes"),
    [("RwkvConfig", {"attention_hidden_size": 64}), ("RecurrentGemmaConfig", {"num_hidden_layers": 3})],
)
def test_a_model_whose_rows_are_not_their_own_is_refused(name, changes):
    config = getattr(transformers, name)(**{**SMALL, "intermediate_size": 128, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(LoadError, match=r"logits change with the rows beside it|not supported"):
        choose_forward(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_state_besides_keys_and_values_runs_in_equal_lengths(dtype):
    config = transformers.MambaConfig(**{**SMALL, "intermediate_size": 128, "state_size": 8})
    forward, report = choose_forward(
        transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    )
    assert report["path"] == "equal lengths"
    assert report["why"].startswith("recurrent or hybrid")
    assert forward.equal_lengths


class Maskless(transformers.LlamaForCausalLM):
    """A model as careless remote code writes them: it drops the attention mask."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        kwargs.pop("batch", None)  # nor does it know of rectangles
        cache = kwargs.get(cache_name(self))
        columns = ids.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        return super().forward(*args, attention_mask=torch.ones(ids.shape[0], columns), **kwargs)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_ignores_the_mask_runs_in_batches_of_equal_length(tiny_model, caplog):
    model = Maskless(tiny_model("llama").config).eval()
    model.load_state_dict(tiny_model("llama").state_dict())
    forward, report = choose_forward(model)
    assert report == {
        "path": "equal lengths",
        "max_logit_difference": None,
        "why": "this model does not hand a pass down to its attention",
    }
    assert forward.equal_lengths
    assert "only prompts of equal length share a batch" in caplog.text
    requests = mixed_requests()
    done = tokens(run(forward, shuffled(requests, 2), max_rows=8))
    assert done == {(r.id, 0): alone(tiny_model("llama"), r, EOS) for r in requests}


def test_a_way_that_fails_with_an_error_of_its_own_kind_is_not_taken(tiny_model, monkeypatch):
    class TooLarge(Exception):
        """As Triton's errors, of no common kind."""

    def decode(*arguments: Any) -> Any:
        raise TooLarge("out of resource: shared memory")

    monkeypatch.setattr(PagedForward, "decode", decode)
    assert choose_forward(copy.deepcopy(tiny_model("llama")), "pages")[1]["path"] == "rectangles"


class Failing(transformers.LlamaForCausalLM):
    """A model whose pass ends in an error, from the given number of tokens in a row on."""

    def forward(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if input_ids.shape[-1] >= self.tokens:
            self.fail()
        return super().forward(input_ids, *args, **kwargs)


def failing(like: Any, tokens: int, fail: Callable[[], Any]) -> Any:
    model = Failing(copy.deepcopy(like.config)).eval()
    model.tokens, model.fail = tokens, fail
    return model


def raises(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("tokens", [1, 26], ids=["at once", "on the fast path"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory")],
)
def test_too_little_memory_for_a_first_pass_is_said_with_what_to_do(tiny_model, tokens, error):
    with pytest.raises(LoadError, match=r"not enough memory for a first pass .* Try a smaller quantization"):
        choose_forward(failing(tiny_model("llama"), tokens, raises(error)))


def test_what_a_library_cannot_compute_is_said_in_its_own_first_line(tiny_model, caplog):
    model = failing(tiny_model("llama"), 1, lambda: torch.empty(160).view(64, 2))
    model.is_quantized = True  # as transformers marks what bitsandbytes has quantized
    with caplog.at_level("INFO"), pytest.raises(LoadError) as caught:
        choose_forward(model)
    assert caught.value.found == (
        "Failing: its first pass failed: shape '[64, 2]' is invalid for input of size 160"
    )
    assert caught.value.fix == (
        "Use quant=none or another quantization, or another model. The log has the traceback"
    )
    assert "Traceback" in caplog.text


def test_a_shape_that_the_fast_path_cannot_take_leaves_the_other_path(tiny_model):
    def flat_only() -> None:
        raise RuntimeError("The size of tensor a (26) must match the size of tensor b (19)")

    model = failing(tiny_model("llama"), 26, flat_only)
    model.load_state_dict(tiny_model("llama").state_dict())
    _, report = choose_forward(model)
    assert report["path"] == "padded"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("attention", ["pages", "rectangles", "plain"])
def test_a_model_whose_logits_are_not_finite_is_refused(value, attention, tiny_model):
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(LoadError, match=r"its logits in float32 are not finite numbers"):
        choose_forward(model, attention)


def test_a_model_that_exceeds_float16_is_refused_in_it_and_runs_in_float32(tiny_model):
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    assert choose_forward(copy.deepcopy(model))[1]["path"] == "rectangles"
    with pytest.raises(LoadError, match=r"in float16 are not finite.*quant=fp32"):
        choose_forward(model.half())


NOT_READ: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"sliding_window": 16},
    "Olmo2Config": {"sliding_window": 16},
    "GraniteConfig": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "MistralConfig": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "Phi3Config": {"sliding_window": 16, "layer_types": ["full_attention", "full_attention"]},
    "Qwen2Config": {"sliding_window": 16, "max_window_layers": 0},  # use_sliding_window is not set
}


@pytest.mark.parametrize("name", NOT_READ)
def test_a_key_that_the_architecture_does_not_read_is_not_obeyed(name):
    """The window is that of the model's own masks. transformers' cache is no reference here: it obeys the key,
    keeps 16 tokens for a model that attends to all, and `generate` makes other text with it than without.
    """
    values = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16, **NOT_READ[name]}
    config = getattr(transformers, name)(**values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.use_cache = False
    windows = layer_windows(config)
    assert windows == ((16, 16) if name in ("MistralConfig", "Phi3Config") else (None, None))
    if name.startswith(("Llama", "Mistral", "Phi3", "Qwen2")):
        assert Architecture.read(config.to_dict()).windows == windows
    forward, report = choose_forward(copy.deepcopy(model))
    assert report["path"] == "rectangles"
    requests = mixed_requests()
    done = tokens(run(forward, shuffled(requests, 1), max_rows=4))
    for request in requests:
        assert done[request.id, 0] == alone(model, request), request.id


def test_a_checkpoint_that_came_quantized_is_not_told_to_be_quantized_otherwise(tiny_folder, tmp_path):
    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    own = load(tiny_folder, quantization_config=eight)
    own.save_pretrained(tmp_path)
    for model, advised in ((own, True), (load(tmp_path), False)):
        model.model.norm.weight.data = torch.ones(3)  # no pass gets past it
        with pytest.raises(LoadError, match="its first pass failed") as caught:
            choose_forward(model)
        assert ("quant=none" in str(caught.value)) == advised
