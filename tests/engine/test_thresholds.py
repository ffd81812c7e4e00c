"""The probe's few tokens cross every length at which a model begins to compute something else."""

import copy
from typing import Any

import conftest
import pytest
import torch
import transformers
from engine_runs import EOS, run, shuffled, tokens

from pipeline.common.errors import LoadError
from pipeline.common.request import GenerationParams, Request
from pipeline.engine import model_facts
from pipeline.engine.paged import forward as paged_forward
from pipeline.engine.probe import choose_forward
from pipeline.engine.rectangles import forward as rectangles_forward
from pipeline.engine.thresholds import LOW, lowered

SMALL = {**conftest.SMALL, "head_dim": 16}


def build(config: str, **changes: Any) -> Any:
    made = getattr(transformers, config)(**{**SMALL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


@torch.inference_mode()
def alone(model: Any, request: Request, use_cache: bool) -> tuple[int, ...]:
    """Make the greedy text by the model itself, which has not run before."""
    ids = torch.tensor([request.prompt_token_ids])
    made = copy.deepcopy(model).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=use_cache, pad_token_id=0,
        max_new_tokens=request.params.max_new_tokens, eos_token_id=sorted(EOS),
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    return tuple(made[:-1] if made[-1] in EOS else made)


def requests(*lengths: int) -> list[Request]:
    params = GenerationParams(max_new_tokens=12)
    return [
        Request(f"r{n}-{i}", tuple(60 + (j * 7 + n + 31 * i) % 230 for j in range(n)), params)
        for n in lengths
        for i in range(2)
    ]


def namespaces(model: Any) -> list[dict[str, Any]]:
    configs = [model.config.to_dict(), *(m.config.to_dict() for m in model.modules() if hasattr(m, "config"))]
    return configs + [
        {k: v for k, v in vars(m).items() if isinstance(v, int | float)} for m in model.modules()
    ]


@pytest.fixture
def misread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine take the windows that a config names, whatever its architecture does with them."""

    def as_named(config: Any) -> tuple[int | None, ...]:
        return (config.sliding_window,) * config.num_hidden_layers

    for module in (model_facts, rectangles_forward, paged_forward):
        monkeypatch.setattr(module, "layer_windows", as_named)


@pytest.mark.parametrize("attention", ["pages", "rectangles"])
@pytest.mark.parametrize("config", ["LlamaConfig", "Olmo2Config", "GraniteConfig"])
def test_a_window_that_the_model_does_not_have_is_noticed(config, attention, misread):
    """However wide it is: far wider than the rows that the probe runs."""
    model = build(config, sliding_window=256)
    forward, report = choose_forward(copy.deepcopy(model), attention)
    assert report["path"] == "padded"
    assert "differ by" in report["why"]
    asked = requests(13, 40, 270)
    assert tokens(run(forward, asked)) == {(r.id, 0): alone(model, r, use_cache=False) for r in asked}


@pytest.mark.parametrize("attention", ["pages", "rectangles"])
def test_a_window_that_is_read_one_token_too_wide_is_noticed(attention, monkeypatch):
    def one_wider(config: Any) -> tuple[int | None, ...]:
        return (config.sliding_window + 1,) * config.num_hidden_layers

    for module in (rectangles_forward, paged_forward):
        monkeypatch.setattr(module, "layer_windows", one_wider)
    assert choose_forward(build("Olmo3Config", sliding_window=256), attention)[1]["path"] == "padded"


def test_a_window_of_code_that_comes_with_a_model_is_tried_not_believed():
    class OwnConfig(transformers.LlamaConfig):
        model_type = "own"

    class OwnForCausalLM(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    model = OwnForCausalLM(OwnConfig(**SMALL, sliding_window=256)).eval()
    assert choose_forward(model)[1]["path"] == "padded"


@pytest.mark.parametrize("floor_scale", [8, 8192])
def test_a_scale_that_grows_with_the_column_is_noticed(floor_scale):
    """Llama 4's layers without positions count columns, so a padded row is another row."""
    model = build(
        "Llama4TextConfig", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], floor_scale=floor_scale,
        attn_scale=0.1 if floor_scale > 8 else 2.0, attention_chunk_size=64, num_local_experts=4,
        num_experts_per_tok=1,
    )  # fmt: skip
    forward, report = choose_forward(copy.deepcopy(model))
    assert report["path"] == "equal lengths"
    asked = requests(5, 20, 70)
    done = tokens(run(forward, shuffled(asked, 3), max_rows=4))
    assert done == {(r.id, 0): alone(model, r, use_cache=True) for r in asked}


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}


@pytest.mark.parametrize("attention", ["pages", "rectangles"])
def test_frequencies_that_grow_with_the_row_are_those_of_the_row_alone(attention):
    model = build("LlamaConfig", max_position_embeddings=32, **DYNAMIC)
    forward, report = choose_forward(copy.deepcopy(model), attention)
    assert report["path"] == "equal lengths"
    asked = requests(10, 28, 40, 60)
    done = tokens(run(forward, shuffled(asked, 1)))
    assert done == {(r.id, 0): alone(model, r, use_cache=True) for r in asked}


def test_a_length_that_no_row_reaches_costs_nothing():
    model = build("LlamaConfig", **DYNAMIC)
    assert choose_forward(copy.deepcopy(model), longest=512)[1]["path"] == "rectangles"
    assert choose_forward(model, longest=513)[1]["path"] == "equal lengths"


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("Gemma3TextConfig", {"sliding_window": 100}),
        ("LlamaConfig", DYNAMIC),
        ("Llama4TextConfig", {"no_rope_layers": [1, 0], "num_local_experts": 4, "num_experts_per_tok": 1}),
    ],
)
def test_what_is_lowered_comes_back(config, changes):
    model = build(config, **changes)
    before = copy.deepcopy(namespaces(model))
    frequencies = {name: t.clone() for name, t in model.named_buffers()}
    with lowered(model) as any_lower:
        assert any_lower
        assert namespaces(model) != before
        assert LOW in {v for names in namespaces(model) for v in names.values() if isinstance(v, int)}
        model(torch.arange(40)[None])
    assert namespaces(model) == before
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, frequencies[name]), name


def test_a_model_without_lengths_is_left_alone():
    with lowered(build("LlamaConfig")) as any_lower:
        assert not any_lower


class Peeking(transformers.LlamaForCausalLM):
    """A model that looks ahead, as an encoder does."""

    def forward(self, input_ids: Any, **kwargs: Any) -> Any:
        made = super().forward(input_ids, **kwargs)
        made.logits = made.logits + made.logits.mean(1, keepdim=True)
        return made


def test_a_model_that_sees_the_tokens_to_come_is_refused():
    with pytest.raises(LoadError, match="no causal language model: what it makes of a token changes with"):
        choose_forward(Peeking(build("LlamaConfig").config).eval())


def test_an_encoder_that_passes_for_a_decoder_is_refused():
    config = transformers.BertConfig(
        **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
    )
    with pytest.raises(LoadError, match="no causal language model"):
        choose_forward(transformers.BertLMHeadModel(config).eval())


@pytest.mark.parametrize("attention", ["pages", "rectangles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_the_model_makes_itself_is_not_dropped(dtype, attention):
    model = build("DogeConfig").to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.normal_()
    _, report = choose_forward(model, attention)
    assert report["path"] == "padded"
    assert report["why"] == "this model makes an attention mask of its own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["pages", "rectangles"])
def test_half_precision_keeps_the_promised_architectures_on_the_fast_path(each_tiny_model, dtype, attention):
    _, report = choose_forward(copy.deepcopy(each_tiny_model).to(dtype), attention)
    assert (report["path"], report["why"]) == (attention, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_real_model_on_the_fast_path(smollm2_dir, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=dtype).eval()
    assert choose_forward(model)[1]["path"] == "rectangles"


@pytest.mark.parametrize("attention", ["pages", "rectangles"])
def test_half_precision_does_not_hide_a_wrong_window(attention, misread):
    model = build("LlamaConfig", sliding_window=256).to(torch.bfloat16)
    assert choose_forward(model, attention)[1]["path"] == "padded"
