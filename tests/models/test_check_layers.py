"""A model that the engine cannot run is refused by its config.json, before a weight is read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.common.errors import LoadError
from pipeline.config.quant import QuantConfig
from pipeline.config.schema import ModelConfig
from pipeline.models.loading import load_model


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refuse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LoadError:
    """Load it, and see that no weight is read."""
    read = transformers.AutoModelForCausalLM.from_pretrained

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("its weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    try:
        with pytest.raises(LoadError) as caught:
            load_model(ModelConfig(name=str(folder)), QuantConfig(), "models")
    finally:
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    assert caught.value.fix[0].isupper()
    return caught.value


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model_type": None}, r"config.json: no model_type, so that nothing says which architecture"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers=-1: a model's config needs"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0: a model's config needs"),
        ({"layer_types": ["full_attention"]}, r"layer|config.json"),
        ({"model_type": "bert"}, r"an encoder, which sees the tokens to come \(is_decoder is false"),
        ({"model_type": "recurrent_gemma"}, r"recurrent, and keeps its state in its layers"),
        ({"model_type": "bart"}, r"an encoder with a decoder \(is_encoder_decoder"),
        ({"model_type": "openai-gpt"}, r"keeps no keys and values of earlier tokens"),
        ({"num_attention_heads": "four"}, r"config.json: transformers cannot read it: "),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_its_weights_are_read(tiny_dir, keys, reason, monkeypatch):
    change(tiny_dir, **keys)
    assert re.search(reason, refuse(tiny_dir, monkeypatch).found)


def test_a_newer_transformers_whose_models_call_their_cache_otherwise_is_named(tiny_dir, monkeypatch):
    monkeypatch.setattr("pipeline.models.layer_checks.__version__", "9.8.7")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lambda self, input_ids, memory=None: None)
    refused = refuse(tiny_dir, monkeypatch)
    assert "by a name that is known here: transformers 9.8.7 is newer than" in refused.found
    assert refused.fix.startswith("Run pip install 'transformers>=")


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava", "paligemma", "qwen2_5_omni"])
def test_a_model_that_runs_only_with_images_or_sound_is_refused(tiny_dir, kind, monkeypatch):
    change(tiny_dir, model_type=kind)
    refused = refuse(tiny_dir, monkeypatch)
    assert f"{kind} is a model of images, sound or video with text" in refused.found


def test_a_model_of_images_and_text_says_that_it_runs_on_text(tiny_dir, capsys):
    made = transformers.CONFIG_MAPPING["gemma3"]
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = made(text_config={**size, "vocab_size": 400}, vision_config={**size, "image_size": 28})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tiny_dir)
    loaded = load_model(ModelConfig(name=str(tiny_dir)), QuantConfig(), "models")
    assert type(loaded.model).__name__ == "Gemma3ForConditionalGeneration"
    assert "gemma3 takes more than text; here it runs on text alone." in capsys.readouterr().err


def test_fewer_layers_than_the_files_have_are_refused(tiny_dir):
    change(tiny_dir, num_hidden_layers=1)
    with pytest.raises(LoadError, match=r"weights that the model does not use, as model\.layers\.1"):
        load_model(ModelConfig(name=str(tiny_dir)), QuantConfig(), "models")


def test_what_can_run_is_loaded(tiny_dir):
    loaded = load_model(ModelConfig(name=str(tiny_dir)), QuantConfig(), "models")
    assert loaded.model is not None
    assert loaded.model.dtype == torch.float32
