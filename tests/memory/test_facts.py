"""An architecture is read in one way, whoever asks."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from pipeline.commands.door import main
from pipeline.common.errors import ConfigError
from pipeline.config.compose import read_config
from pipeline.memory.architecture import Architecture, known_architecture
from pipeline.memory.capacity import kv_architecture
from pipeline.memory.facts import find_facts
from pipeline.slurm.memory import needed_bytes
from pipeline.views.architecture import architecture_view

TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 64,
}
VISION = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


@pytest.fixture
def with_images() -> transformers.Gemma3Config:
    """Gemma 3 from 4B on: text behind a vision tower, whose weights are loaded with it."""
    return transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, dtype="bfloat16")


def test_a_model_of_more_than_text_is_predicted_with_its_vision_tower(
    with_images: transformers.Gemma3Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan, a sweep's cells and the tree agree with the model, whose tower is loaded with it."""
    with_images.save_pretrained(tmp_path)
    config = read_config([f"model.name={tmp_path}"])
    facts = find_facts(config.model, config.models_dir)
    assert main(["plan", f"model.name={tmp_path}", "memory=24GB", "json=-"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    real = transformers.AutoModelForCausalLM.from_config(with_images, dtype=torch.bfloat16)
    assert real.model.vision_tower is not None
    view = architecture_view(config.model, config.quant, config.models_dir)
    assert real.get_memory_footprint() == plan["footprint_bytes"] == view.predicted_bytes == view.bytes
    assert view.windows == list(facts.architecture.windows) == 2 * [*(64,) * 5, None]
    assert needed_bytes(config, gpus=1) > real.get_memory_footprint()
    longer = read_config([f"model.name={tmp_path}", "model.context=4096"]).model
    assert find_facts(longer, config.models_dir).architecture.max_position_embeddings == 4096


def test_keys_and_values_are_those_of_the_text_part(with_images: transformers.Gemma3Config) -> None:
    arch = kv_architecture(with_images.get_text_config().to_dict())
    assert arch is not None
    assert (arch.model_type, arch.num_key_value_heads, arch.head_dim) == ("gemma3_text", 2, 16)
    assert arch.windows == 2 * (*(64,) * 5, None)


def test_a_config_is_read_alike_from_its_file_and_from_transformers(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(**TEXT, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    saved = Architecture.read(json.loads((tmp_path / "config.json").read_text()))
    assert saved == known_architecture(config.to_dict()) == kv_architecture(config.to_dict())
    assert saved.dtype == "bfloat16"


@pytest.mark.parametrize("wrong", [{"rope_scaling": "linear"}, {"sliding_window": "wide"}, {"dtype": "int3"}])
def test_a_config_that_makes_no_sense_is_an_error_and_no_traceback(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Architecture.read({"model_type": "gemma3_text", **TEXT, **wrong})
