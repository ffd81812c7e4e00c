"""Every architecture of transformers is exact on the path that it says, or refused before its weights are read.

Tiny random models, in float32; what `generate` makes of each prompt alone, without a cache, is the right text.
"""

import inspect
import random
from functools import cache
from typing import Any

import pytest
import torch
from engine_runs import EOS, run
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.common.errors import LoadError
from pipeline.common.request import GenerationParams, Request
from pipeline.engine.cpu.packing import pack_weights
from pipeline.engine.model_facts import find_cache_name, model_code
from pipeline.engine.probe import choose_forward
from pipeline.models.layer_checks import check_layers

# Those that this transformers does not have are left out.
RECTANGLES = """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2 deepseek_v3
    dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma3_text gemma3n_text gemma4_text glm glm4
    gemma4_unified_text minimax_m3_vl_text apertus1p5_text exaone sarvam_mla sarvam_moe
    glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lfm2 llama
    longcat_flash mellum minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder moshi nanochat olmo
    olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open
    starcoder2 youtu
    emu3 fuyu gemma3 gemma4 gemma4_unified moss_transcribe_diarize phi4_multimodal"""
PADDED = """
    bloom diffllama doge falcon flint gemma2 gpt_neo gpt_neox_japanese gpt_oss granite_swa granitemoe_swa
    hrm_text mimo_v2_flash mpt nemotron stablelm vaultgemma xglm
    got_ocr2"""
EQUAL = "llama4_text git llama4"
# Attention of their own up to transformers 5.23, and then the common one.
REWRITTEN = "codegen gptj"
OWN_CACHE = {
    "recurrent or hybrid": """
        bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_loop_text inkling_text jamba lara_mini lfm3 mamba
        mamba2 minimax nemotron_h
        olmo_hybrid qwen3_5_text qwen3_next zamba zamba2 zaya""",
    "a pass comes to some of its layers more than once": "dory",
    "sparse attention": "axk2 deepseek_v32 deepseek_v4 glm_moe_dsa hy_v4",
}
# Neither refused by their config nor made small here: the probe decides when one is loaded.
UNTRIED = """
    bailing_hybrid dots3_note dots3_note_text gemma3n inkling2_text kimi_linear qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen4_exp qwen4_exp_text rwkv xlstm"""
REFUSED = """
    blt musicgen reformer trocr whisper xmod
    bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text
    electra ernie marian mbart megatron-bert mvp openai-gpt pegasus plbart prophetnet recurrent_gemma rembert roberta
    roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet
    cpmant gemma4_unified_assistant mllama musicgen_melody"""
CACHELESS = "gemma4_assistant gemma4_unified_assistant openai-gpt reformer xlm xlnet"
PATHS = {kind: path for path, kinds in (("rectangles", RECTANGLES), ("padded", PADDED), ("equal lengths", EQUAL))
         for kind in kinds.split() if kind in CONFIG_MAPPING}  # fmt: skip
PATHS |= {
    kind: "rectangles" if "ALL_ATTENTION_FUNCTIONS" in str(model_code(CONFIG_MAPPING[kind]())) else "padded"
    for kind in REWRITTEN.split()
}

# What a config is given of this, it has a key for.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 300),
    "max_position_embeddings": 512, "n_positions": 512,
    "max_seq_len": 512, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim"), 128),
    **dict.fromkeys(("head_dim", "sliding_window", "window_size", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "rotary_dim": 8, "num_kv_shared_layers": 0, "qk_head_dim": 32,
    "hidden_size_per_layer_input": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16), "use_mamba_kernels": False,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4), "mamba_expand": 2,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_d_ssm": 128, "attn_layer_indices": [1],
}  # fmt: skip
TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size"), 32), "image_size": 28, "patch_size": 14,
    **dict.fromkeys(("num_hidden_layers", "depth"), 1), **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
}  # fmt: skip
ALL_HEADS = {"num_key_value_heads": 4}  # keys and values made from a latent vector
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED = ALL_HEADS | {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("olmo_hybrid", "qwen3_next", "qwen3_5_text"), HYBRID),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa"), INDEXED),
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2, "state_size": 16},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"],
              "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu"), ALL_HEADS),
    **dict.fromkeys(("deepseek_v2", "longcat_flash"), ALL_HEADS | {"head_dim": 16}),
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    # The last layer has no positions, and scales its queries by how far from the beginning they are.
    "llama4_text": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "floor_scale": 8, "attn_scale": 2.0,
                    "attention_chunk_size": 16},
}  # fmt: skip
OWN_TOKENS = (1, 3, 20, 40, 60, 90, 5)  # with the shared 12: below and beyond every window
NEW_TOKENS = (40, 7, 25, 20, 12, 24, 30)


def small(keys: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    windowless = ("sliding_window",) if keys.get("sliding_window") is None else ()
    return {key: value for key, value in sizes.items() if key in keys and key not in windowless}


def config_of(kind: str) -> Any:
    made = CONFIG_MAPPING[kind]
    keys = made().to_dict()
    # The parts of a model that also takes images or sound, which run on text.
    parts = {name: keys[name] for name in ("text_config", "vision_config", "audio_config") if keys.get(name)}
    inner = {
        name: small(part, SMALL if name == "text_config" else TOWER)
        | {"model_type": part["model_type"]}
        | OWN.get(part["model_type"], {})
        for name, part in parts.items()
    }
    return made(**small(keys, SMALL) | OWN.get(kind, {}) | inner)


def build(kind: str) -> Any:
    """Make a random model in which no weight is left at what it is set to at first, as a bias at 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.numel() > 1 and weight.std() == 0:
                    weight += 0.1 * torch.randn_like(weight)
    return model


@cache
def requests() -> list[Request]:
    draw = random.Random(7)
    prefix = [draw.randrange(60, 300) for _ in range(12)]
    return [
        Request(
            f"r{i}",
            (*prefix, *(draw.randrange(60, 300) for _ in range(own))),
            GenerationParams(max_new_tokens=new),
        )
        for i, (own, new) in enumerate(zip(OWN_TOKENS, NEW_TOKENS, strict=True))
    ]


@torch.inference_mode()
def alone(model: Any, request: Request, use_cache: bool = False) -> tuple[int, ...]:
    """Make the greedy text; with no cache where its layers obey keys that some architectures ignore."""
    ids = torch.tensor([request.prompt_token_ids])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=use_cache, pad_token_id=0,
        max_new_tokens=request.params.max_new_tokens, eos_token_id=sorted(EOS),
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    return tuple(made[:-1] if made[-1] in EOS else made)


@cache
def expected(kind: str) -> dict[tuple[str, int], tuple[int, ...]]:
    model = build(kind)
    return {(request.id, 0): alone(model, request) for request in requests()}


def check(kind: str, attention: str, path: str) -> None:
    """Hold the engine to `generate`: in long passes with what all share, and in short ones, when rows are few."""
    model = build(kind)
    check_layers(model.config, "tiny")
    forward, report = choose_forward(model, attention)
    assert report["path"] == path
    for settings in (
        {"max_rows": 4, "max_tokens": 10**6},
        {"max_rows": 3, "max_tokens": 600, "prefill_tokens": 24},
    ):
        found = {key: made.token_ids for key, made in run(forward, requests(), **settings).items()}
        assert found == expected(kind)


@pytest.mark.parametrize("kind", sorted(PATHS))
@pytest.mark.filterwarnings("ignore")  # of what architectures say of their own configs
def test_every_architecture_is_exact_on_the_path_that_it_says(kind):
    check(kind, "rectangles", PATHS[kind])


@pytest.mark.parametrize("kind", sorted(kind for kind, path in PATHS.items() if path == "rectangles"))
@pytest.mark.filterwarnings("ignore")
def test_every_architecture_in_rectangles_is_exact_in_pages_too(kind):
    check(kind, "pages", "pages")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", sorted({*PATHS, *" ".join(OWN_CACHE.values()).split()} & {*CONFIG_MAPPING}))
@pytest.mark.filterwarnings("ignore")
def test_packed_weights_say_in_every_architecture_what_its_own_layers_say(kind, dtype, monkeypatch):
    """Some read a weight's dtype, or multiply by it themselves; some have one weight in several layers."""
    monkeypatch.setitem(SMALL, "vocab_size", 320)  # a head in whole blocks
    model, ids = build(kind).to(dtype), torch.tensor([[5, 60, 70, 80, 90, 100, 110]])
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        assert pack_weights(model) > 0
        found = model(input_ids=ids, use_cache=False).logits.float()
    assert (found - expected).norm() < (1e-4 if dtype == torch.float32 else 0.05) * expected.norm()


def of_equal_lengths() -> list[Request]:
    """Ask for texts of other lengths after prompts of which several have one length; the last twice, by chance."""
    draw = random.Random(3)
    sizes = [(9, 7), (14, 22), (9, 30), (30, 5), (14, 3), (9, 16), (30, 11)]
    made = [
        Request(
            f"r{i}",
            tuple(draw.randrange(60, 300) for _ in range(length)),
            GenerationParams(max_new_tokens=new),
        )
        for i, (length, new) in enumerate(sizes)
    ]
    chance = GenerationParams(max_new_tokens=9, temperature=1.0, n=2, seed=5)
    return [*made, Request("chance", made[0].prompt_token_ids, chance)]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (reason, kind)
        for reason, kinds in OWN_CACHE.items()
        for kind in kinds.split()
        if kind in CONFIG_MAPPING
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_recurrent_hybrid_and_sparse_models_are_exact_in_rows_of_equal_length(reason, kind):
    model = build(kind)
    check_layers(model.config, "tiny")
    forward, report = choose_forward(model)
    assert report["path"] == "equal lengths"
    assert report["why"].startswith(reason)
    asked = of_equal_lengths()
    together, few = run(forward, asked, max_rows=16), run(forward, asked, max_rows=3)
    for request in asked[:-1]:
        assert together[request.id, 0].token_ids == alone(model, request, use_cache=True), request.id
    assert {key: made.token_ids for key, made in few.items()} == {k: m.token_ids for k, m in together.items()}
    assert together["chance", 0].token_ids != together["chance", 1].token_ids


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_runs_its_layers_again_is_not_taken_for_one_with_one_key_for_each_layer_and_token():
    report = choose_forward(build("hrm_text"))[1]
    assert report["path"] == "padded"
    assert report["why"].startswith("a pass comes to some of its layers more than once")


@pytest.mark.parametrize("kind", sorted(REFUSED.split()))
def test_what_the_engine_cannot_run_is_refused_by_its_config_alone(kind):
    with pytest.raises(LoadError) as refused:
        check_layers(CONFIG_MAPPING[kind](), "tiny")
    assert refused.value.fix


REASONS = {
    "recurrent, and keeps its state in its layers": "recurrent_gemma",
    "an encoder, which sees the tokens to come": "bert roberta electra xlm-roberta roformer",
    "an encoder with a decoder": "bart marian pegasus prophetnet blenderbot",
    "keeps no keys and values of earlier tokens": "openai-gpt xlm xlnet",
    "some of its layers attend to an image": "mllama",
    "it puts 32 tokens of its own before each prompt": "cpmant",
}


@pytest.mark.parametrize(("reason", "kinds"), REASONS.items())
def test_each_is_refused_for_what_it_is(reason, kinds):
    for kind in kinds.split():
        with pytest.raises(LoadError) as refused:
            check_layers(CONFIG_MAPPING[kind](), "tiny")
        assert refused.value.found.startswith(f"tiny: {reason}"), kind


def there() -> set[str]:
    """Name the architectures of this transformers."""
    return {kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING}


@pytest.mark.filterwarnings("ignore")  # of what architectures say as they are imported
def test_every_architecture_takes_its_cache_by_a_name_that_is_known():
    made = {kind: MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]] for kind in there()}
    unnamed = {kind: inspect.signature(it.forward) for kind, it in made.items() if not find_cache_name(it)}
    assert unnamed.keys() - set(CACHELESS.split()) == set(), unnamed


def test_most_architectures_of_transformers_are_here():
    here = {*PATHS, *REFUSED.split(), *UNTRIED.split(), *" ".join(OWN_CACHE.values()).split()}
    assert len(PATHS) >= 60
    assert len(here & there()) > 0.85 * len(there()), sorted(there() - here)
