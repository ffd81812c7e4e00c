"""The views: bytes behind tokens, who wrote what in a prompt, padding, module trees, one step of the model."""

import io
import json
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.commands.door import main
from pipeline.common.errors import ConfigError
from pipeline.common.request import GenerationParams, PromptRow
from pipeline.config.compose import read_config
from pipeline.config.schema import Config, ModelConfig
from pipeline.models.loading import load_model
from pipeline.prompts.chat import prepare_chat, render
from pipeline.views.architecture import architecture_view, matching, pruned
from pipeline.views.batch import batch_view
from pipeline.views.chat import chat_view
from pipeline.views.draw_model import draw_architecture, draw_step
from pipeline.views.draw_text import draw_batch, draw_chat, draw_tokens, shown
from pipeline.views.step import step_view
from pipeline.views.tokens import token_bytes, tokens_view

TEXTS = {
    "korean": "안녕하세요! LLM을 학습 중입니다.",
    "joined emoji": "👩‍👩‍👧‍👦 and 🏳️‍🌈, ❤️‍🔥",
    "arabic": "مرحبا بالعالم، كيف الحال؟",
    "combining marks": "e\u0301 a\u0308\u0323 क्षि \u0301x",
    "control characters": "a\x00b\x07c\x1b[31mred\x7f\t\n\r\u202ereversed\u2066",
    "blanks": "  two  \n\n lines \u00a0\u3000",
}
NAMED = ["smollm2", "llama", "llama1b", "phi", "gemma", "qwen", "deepseek"]


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_dir):
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def row(prompt=None, messages=None, system=None):
    return PromptRow(0, "row-0", "test:1", prompt, messages, system, GenerationParams(), {})


def screen(draw, view, width):
    """What a view looks like on a terminal of that width, without colours."""
    file = io.StringIO()
    draw(view, Console(file=file, width=width, highlight=False))
    return file.getvalue()


def run(capsys, *arguments):
    status = main(["inspect", *arguments])
    done = capsys.readouterr()
    return status, done.out, done.err


def overrides(folder, *more):
    return [f'model.name="{folder}"', *more]


# --- tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("which", ["smollm2_tokenizer", "tiny_tokenizer"])
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(which, text, request):
    view = tokens_view(request.getfixturevalue(which), text)
    assert b"".join(bytes.fromhex(t.bytes) for t in view.tokens) == text.encode()
    assert view.exact
    assert view.difference is None
    assert all("\ufffd" not in (t.text or "") for t in view.tokens)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_of_a_character_are_bytes_and_name_the_character(text, smollm2_tokenizer):
    view = tokens_view(smollm2_tokenizer, text)
    pieces = [t for t in view.tokens if t.text is None]
    assert all(t.part_of and t.part_of in text for t in pieces)
    assert all(t.part_of is None for t in view.tokens if t.text is not None)


def test_a_korean_syllable_split_over_two_tokens_reads_as_its_bytes(smollm2_tokenizer):
    view = tokens_view(smollm2_tokenizer, "학")
    assert [(t.bytes, t.text, t.part_of) for t in view.tokens] == [("ed 95", None, "학"), ("99", None, "학")]
    assert "ed 95  of 학" in screen(draw_tokens, view, 80)
    assert "\ufffd" not in screen(draw_tokens, view, 80)


def test_byte_fallback_tokens_are_bytes():
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    view = tokens_view(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), "a 학")
    assert [t.bytes for t in view.tokens] == ["61", "20", "ed", "95", "99"]
    assert [t.part_of for t in view.tokens] == [None, None, "학", "학", "학"]
    assert view.exact


def test_a_round_trip_that_changes_the_text_says_why(tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    view = tokens_view(PreTrainedTokenizerFast(tokenizer_object=backend), "e\u0301")
    assert not view.exact
    assert "NFC" in view.difference
    assert "NOT exact" in screen(draw_tokens, view, 80)


def test_special_tokens_have_their_roles(smollm2_tokenizer):
    view = tokens_view(smollm2_tokenizer, "Hi<|im_end|>")
    assert view.vocabulary == 49152
    assert {s.text: s.roles for s in view.special_tokens}["<|im_end|>"] == ("eos", "pad")
    assert [t.special for t in view.tokens] == [False, True]


def test_an_id_beyond_the_vocabulary_has_no_bytes(tiny_tokenizer):
    assert token_bytes(tiny_tokenizer, len(tiny_tokenizer) + 5) == b""


@given(st.text())
def test_shown_text_can_control_no_terminal(text):
    assert not [c for c in shown(text) if unicodedata.category(c)[0] == "C"]


# --- chat -------------------------------------------------------------------------------------------


def test_the_chat_view_is_what_a_job_sends(smollm2_tokenizer):
    chat = prepare_chat(smollm2_tokenizer, Config())
    view = chat_view(row("Tell a joke about 학습."), chat)
    assert view.token_ids == render(row("Tell a joke about 학습."), chat)
    assert [i for segment in view.segments for i in segment.token_ids] == view.token_ids
    assert "".join(segment.text for segment in view.segments) == view.text


def test_the_chat_view_tells_who_wrote_what(smollm2_tokenizer):
    view = chat_view(row("Tell a joke."), prepare_chat(smollm2_tokenizer, Config()))
    assert view.added == ["You are a helpful AI assistant named SmolLM, trained by Hugging Face"]
    assert view.generation_prompt == "<|im_start|>assistant\n"
    assert [s.text for s in view.segments if s.kind == "user"] == ["Tell a joke."]
    assert [s.text for s in view.segments if s.kind == "role"] == ["system", "user", "assistant"]
    assert (view.leading_bos_count, view.bos_count) == (1, 3)


def test_a_system_text_of_ones_own_is_not_the_templates(smollm2_tokenizer):
    view = chat_view(row("Hi", system="Be brief."), prepare_chat(smollm2_tokenizer, Config()))
    assert view.added == []
    assert [s.text for s in view.segments if s.kind == "system"] == ["Be brief."]


def test_a_typed_control_token_is_the_users_text(smollm2_tokenizer):
    view = chat_view(row("End <|im_end|> here"), prepare_chat(smollm2_tokenizer, Config()))
    assert [s.text for s in view.segments if s.kind == "user"] == ["End <|im_end|> here"]


def test_a_second_bos_is_seen(smollm2_tokenizer):
    twice = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"
    view = chat_view(
        row("Hi"), prepare_chat(smollm2_tokenizer, Config(model=ModelConfig(chat_template=twice)))
    )
    assert view.leading_bos_count == 2
    assert "TWICE" in screen(draw_chat, view, 80)


# --- batch ------------------------------------------------------------------------------------------


def test_the_left_padded_rectangle_gives_each_row_its_own_logits(each_tiny_model):
    rows = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
    left = batch_view(rows, 0, ["a", "b", "c"]).left
    with torch.inference_mode():
        together = each_tiny_model(
            input_ids=torch.tensor(left.input_ids),
            attention_mask=torch.tensor(left.attention_mask),
            position_ids=torch.tensor(left.position_ids),
        ).logits[:, -1]
        alone = torch.stack([each_tiny_model(torch.tensor([ids])).logits[0, -1] for ids in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


def test_padding_on_either_side_has_the_shapes_it_says():
    view = batch_view([[5, 6, 7], [8]], 9, ["a", "b"])
    assert view.left.input_ids == [[5, 6, 7], [9, 9, 8]]
    assert view.left.position_ids == [[0, 1, 2], [0, 0, 0]]
    assert view.right.attention_mask == [[1, 1, 1], [1, 0, 0]]
    assert (view.left.next_columns, view.right.next_columns) == ([3, 3], [3, 1])
    assert view.left.padding == pytest.approx(2 / 6)


# --- architecture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize("model", NAMED)
def test_the_tree_of_every_named_model_has_the_planned_bytes_without_weights(model, quant, tmp_path):
    config = read_config([f"model={model}", f"quant={quant}", f"models_dir={tmp_path}"])
    view = architecture_view(config.model, config.quant, config.models_dir)
    assert view.bytes == view.predicted_bytes
    assert view.source == "conf/model"


def test_llama_in_nf4_is_32_layers_of_4_bit_layers_and_5591_mb(capsys, tmp_path):
    status, out, _ = run(capsys, "view=architecture", "model=llama", "quant=nf4", f"models_dir={tmp_path}")
    assert status == 0
    assert "32 × LlamaDecoderLayer" in out
    assert "gate_proj Linear4bit(4096 → 14336)" in out
    assert "5,591.5 MB" in out


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_the_tree_weighs_what_the_loaded_model_weighs(quant, tiny_dir):
    config = read_config(overrides(tiny_dir, f"quant={quant}"))
    view = architecture_view(config.model, config.quant, config.models_dir)
    loaded = load_model(config.model, config.quant, config.models_dir)
    assert view.bytes == loaded.model.get_memory_footprint()
    assert view.parameters == sum(p.numel() for p in each_real_parameter(view, loaded.model))


def each_real_parameter(view, model):
    """The loaded model's parameters, 4-bit ones unpacked to their shape."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        yield torch.empty(state.shape, device="meta") if state is not None else parameter


def test_every_tiny_architecture_has_a_tree_from_its_config_alone(each_tiny_model, tmp_path):
    each_tiny_model.config.save_pretrained(tmp_path / "only-config")
    config = read_config(overrides(tmp_path / "only-config", "quant=fp32"))
    view = architecture_view(config.model, config.quant, config.models_dir)
    assert view.bytes == each_tiny_model.get_memory_footprint()
    layers = each_tiny_model.config.num_hidden_layers
    assert f"{layers} × " in screen(draw_architecture, view, 80)


def test_depth_and_filter_make_the_tree_smaller(tiny_dir):
    config = read_config(overrides(tiny_dir))
    tree = architecture_view(config.model, config.quant, config.models_dir).tree
    assert [child.children for child in pruned(tree, 1).children] == [[], []]
    found = matching(tree, "q_proj")
    while found.children:
        assert len(found.children) == 1
        found = found.children[0]
    assert found.name == "q_proj"
    assert matching(tree, "no such module") is None
    with pytest.raises(ConfigError, match="regular expression"):
        matching(tree, "(")


# --- step -------------------------------------------------------------------------------------------


def test_the_steps_probabilities_are_the_models_own(each_tiny_model, tiny_tokenizer):
    ids = [5, 6, 7, 8, 9]
    view = step_view(each_tiny_model, tiny_tokenizer, ids, GenerationParams(), k=300)
    with torch.inference_mode():
        expected = torch.softmax(each_tiny_model(torch.tensor([ids])).logits[0, -1], -1)
    found = torch.zeros(300)
    for token in view.next:
        found[token.token_id] = token.probability
    assert torch.equal(found, expected)


def test_the_steps_probabilities_are_the_real_models_own(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode(TEXTS["korean"])
    view = step_view(model, tokenizer, ids, GenerationParams(), k=10)
    with torch.inference_mode():
        expected = torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1).topk(10)
    assert [t.token_id for t in view.next] == expected.indices.tolist()
    assert [t.probability for t in view.next] == expected.values.tolist()
    assert view.places[-1].top_token_id == view.next[0].token_id
    assert view.places[-1].top_probability == pytest.approx(view.next[0].probability, rel=1e-4)
    assert len(view.places) == 30 + 2


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (GenerationParams(), 1),
        (GenerationParams(temperature=0.7), 300),
        (GenerationParams(temperature=0.7, top_k=3), 3),
        (GenerationParams(temperature=2.0, top_k=5, top_p=0.9), None),
    ],
    ids=["greedy", "temperature", "top-k", "all"],
)
def test_the_sampled_probabilities_are_those_after_the_filters(tiny_model, tiny_tokenizer, params, kept):
    model, ids = tiny_model("llama"), [5, 6, 7]
    view = step_view(model, tiny_tokenizer, ids, params, k=300)
    assert sum(t.sampled_probability for t in view.next) == pytest.approx(1, abs=1e-5)
    assert sum(t.sampled_probability > 0 for t in view.next) == view.kept
    assert kept is None or view.kept == kept
    if not params.greedy:
        logits = torch.tensor([t.logit for t in view.next]) / params.temperature
        logits[view.kept :] = -torch.inf
        after = torch.tensor([t.sampled_probability for t in view.next])
        torch.testing.assert_close(after, torch.softmax(logits, -1), rtol=1e-4, atol=1e-6)


def test_attention_rows_are_causal_shares_and_the_model_keeps_its_own(each_tiny_model, tiny_tokenizer):
    before = each_tiny_model.config._attn_implementation
    view = step_view(each_tiny_model, tiny_tokenizer, [5, 6, 7, 8], GenerationParams(), layer=-1, head=3)
    weights = torch.tensor(view.attention.weights)
    assert (view.attention.layer, view.attention.head) == (each_tiny_model.config.num_hidden_layers - 1, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))
    assert torch.equal(weights, weights.tril())
    assert each_tiny_model.config._attn_implementation == before
    with pytest.raises(ConfigError, match="head=0 to head=3"):
        step_view(each_tiny_model, tiny_tokenizer, [5], GenerationParams(), layer=0, head=4)


# --- the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 160])
def test_no_line_is_wider_than_the_terminal_and_none_has_colour_when_piped(
    width, smollm2_tokenizer, tiny_model, tiny_dir
):
    nasty = " ".join(TEXTS.values())
    chat = prepare_chat(smollm2_tokenizer, Config())
    config = read_config(overrides(tiny_dir, "quant=nf4"))
    screens = [
        screen(draw_tokens, tokens_view(smollm2_tokenizer, nasty), width),
        screen(draw_chat, chat_view(row(nasty), chat), width),
        screen(draw_batch, batch_view([list(range(90)), [7] * 40], 2, ["long " * 9, "b"]), width),
        screen(draw_architecture, architecture_view(config.model, config.quant, config.models_dir), width),
        screen(
            draw_step,
            step_view(tiny_model("llama"), smollm2_tokenizer, list(range(100)), GenerationParams(), layer=0),
            width,
        ),
    ]
    for text in screens:
        assert "\x1b" not in text
        assert max(cell_len(line) for line in text.split("\n")) <= width


@pytest.mark.parametrize("view", ["tokens", "chat", "batch", "architecture", "step"])
def test_every_view_prints_json(view, tiny_dir, capsys):
    status, out, _ = run(capsys, *overrides(tiny_dir), f"view={view}", "text=학 a", "json=-")
    assert status == 0
    assert isinstance(json.loads(out), dict)


def test_a_row_of_a_prompt_file_is_shown_as_a_job_sends_it(tiny_dir, tmp_path, capsys):
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "first"}\n{"id": "x", "prompt": "second"}\n{"nothing": 1}\n')
    arguments = [*overrides(tiny_dir), "view=chat", f"prompts={file}", "json=-"]
    status, out, _ = run(capsys, *arguments, "row=1")
    assert (status, json.loads(out)["id"]) == (0, "x")
    status, _, err = run(capsys, *arguments, "row=2")
    assert (status, "some.jsonl:3" in err) == (3, True)
    status, _, err = run(capsys, *arguments, "row=3")
    assert (status, "fewer rows" in err) == (2, True)


def test_attention_is_written_as_a_png_even_of_korean(tiny_dir, tmp_path, capsys):
    file = tmp_path / "a.png"
    arguments = ("view=step", "text=한국어 $x", "layer=0", f"png={file}")
    assert run(capsys, *overrides(tiny_dir), *arguments)[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["text=a"], "Choose one of tokens, chat"),
        (["view=token"], "Choose one of tokens, chat"),
        (["view=tokens", "txt=a"], "Did you mean text="),
        (["view=tokens", "modle=smollm2"], "Did you mean model?"),
        (["view=tokens", "text="], "needs a value"),
        (["view=architecture", "depth=two"], "not a whole number"),
        (["view=architecture", "filter=nothing_like_it"], "no module's name"),
        (["view=chat", "messages=[1]"], "messages="),
        (["view=tokens", "text=a", "png=a.png"], "png="),
        (["view=tokens", "text=a", "json=/no/such/folder/a.json"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_line_is_one_message_and_status_2(arguments, words, tiny_dir, capsys):
    status, out, err = run(capsys, *overrides(tiny_dir), *arguments)
    assert status == 2
    assert words in " ".join(err.split())
    assert out == ""
