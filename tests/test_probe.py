"""Every model runs on the fastest path that gives a padded row its own text, and no faster."""

import copy
from typing import Any

import pytest
import torch
import transformers
from engine_runs import EOS, alone, mixed_requests, run, shuffled, tokens

from pipeline.engine.forward import FlatForward, PaddedForward
from pipeline.engine.probe import choose_forward
from pipeline.errors import LoadError

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
    "GPTJConfig": ("padded", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
}  # fmt: skip


def build(name: str) -> Any:
    config = getattr(transformers, name)(**{**SMALL, "intermediate_size": 128, **OTHERS[name][1]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_every_promised_architecture_takes_the_fast_path(each_tiny_model):
    forward, report = choose_forward(copy.deepcopy(each_tiny_model))
    assert isinstance(forward, FlatForward)
    assert report["path"] == "rectangles"
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
    [("MambaConfig", {"state_size": 8}), ("RecurrentGemmaConfig", {"num_hidden_layers": 3})],
)
def test_a_model_with_state_besides_keys_and_values_is_refused_at_once(name, changes):
    config = getattr(transformers, name)(**{**SMALL, "intermediate_size": 128, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(LoadError, match="not supported"):
        choose_forward(model)


class Maskless(transformers.LlamaForCausalLM):
    """A model as careless remote code writes them: it drops the attention mask."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        kwargs.pop("batch", None)  # nor does it know of rectangles
        cache = kwargs.get("past_key_values")
        columns = ids.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        return super().forward(*args, attention_mask=torch.ones(ids.shape[0], columns), **kwargs)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_ignores_the_mask_runs_in_batches_of_equal_length(tiny_model, caplog):
    model = Maskless(tiny_model("llama").config).eval()
    model.load_state_dict(tiny_model("llama").state_dict())
    forward, report = choose_forward(model)
    assert report == {"path": "equal lengths", "max_logit_difference": None}
    assert forward.equal_lengths
    assert "only prompts of equal length share a batch" in caplog.text
    requests = mixed_requests()
    done = tokens(run(forward, shuffled(requests, 2), max_rows=8))
    assert done == {(r.id, 0): alone(tiny_model("llama"), r, EOS) for r in requests}
