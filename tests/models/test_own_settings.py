"""What a model's generation_config.json suggests: applied by generation=model, else said; never mixed in one folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from job_helper import arguments, outputs, run_job, texts, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.commands.door import main
from pipeline.common.errors import ConfigError, LoadError
from pipeline.config.compose import job_folder, read_config, recorded_config
from pipeline.job.paths import read_json
from pipeline.models.at_hand import expect_generation
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.own_settings import read_own_settings, settle_generation

PROMPTS = [
    {"id": str(i), "prompt": text} for i, text in enumerate(("a b", "cat mat", "why", "the joke of a cat"))
]
MODEL = "generation=model"


def suggest(folder: Path, **settings: Any) -> None:
    path = folder / "generation_config.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **settings}))


def own(folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    suggest(folder, **settings)
    read = read_own_settings(Checkpoint(str(folder), folder, None))
    return read.params, read.unknown


def job(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    prompts = write_rows(tmp_path / "p.jsonl", PROMPTS)
    return arguments(folder, prompts, tmp_path / "out", "system=null", *more)


def generated(folder: Path, **settings: Any) -> dict[tuple[str, int], str]:
    """What `generate` itself makes of each prompt alone, with the folder's own settings."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = {}
    for row in PROMPTS:
        chat = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        new = model.generate(ids, max_new_tokens=8, **settings)[0, ids.shape[1] :]
        made[row["id"], 0] = tokenizer.decode(new, skip_special_tokens=True)
    return made


def test_with_a_models_own_penalty_the_text_is_that_of_generate(tiny_dir, tmp_path):
    suggest(tiny_dir, repetition_penalty=1.1)
    assert run_job(job(tiny_dir, tmp_path, MODEL)) == 0
    assert texts(job(tiny_dir, tmp_path, MODEL)) == generated(tiny_dir)
    suggest(tiny_dir, repetition_penalty=5.0)  # so that it shows
    again = job(tiny_dir, tmp_path, MODEL)
    assert run_job(again) == 0
    assert texts(again) == generated(tiny_dir) != generated(tiny_dir, repetition_penalty=1.0)


def test_the_real_models_text_with_its_own_penalty_is_that_of_generate(smollm2_dir, tmp_path):
    folder = tmp_path / "smollm2"
    folder.mkdir()
    for file in smollm2_dir.iterdir():
        if file.name != "generation_config.json":
            (folder / file.name).symlink_to(file)
    ends = json.loads((smollm2_dir / "generation_config.json").read_text())["eos_token_id"]
    suggest(folder, repetition_penalty=1.1, eos_token_id=ends)
    line = job(folder, tmp_path, MODEL)
    assert run_job(line) == 0
    import torch

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in outputs(line):
        chat = [{"role": "user", "content": PROMPTS[int(row["id"])]["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        new = model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(new, skip_special_tokens=True)


def test_greedy_stays_plain_and_says_once_what_it_did_not_apply(tiny_dir, tmp_path, capsys):
    suggest(tiny_dir, do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.1)
    line = job(tiny_dir, tmp_path)
    assert run_job(line) == 0
    said = capsys.readouterr().err
    assert said.count("not applied") == 1
    settings = "repetition_penalty=1.1, temperature=0.7, top_k=20"
    assert f"The model suggests {settings}: not applied; generation=model applies" in said
    assert texts(line) == generated(tiny_dir, do_sample=False, repetition_penalty=1.0)
    facts = read_json(job_folder(line) / "manifest.json")["suggested_generation"]
    assert facts == {
        "applied": {},
        "not_applied": {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20},
    }


def test_a_model_that_suggests_nothing_is_no_news(tiny_dir, tmp_path, capsys):
    suggest(tiny_dir, repetition_penalty=1.0, no_repeat_ngram_size=0, num_beams=1, max_length=20, top_k=50)
    assert run_job(job(tiny_dir, tmp_path)) == 0
    assert "The model suggests" not in capsys.readouterr().err


def test_the_manifest_says_what_was_applied(tiny_dir, tmp_path):
    suggest(tiny_dir, do_sample=True, top_p=0.8, repetition_penalty=1.1)
    line = job(tiny_dir, tmp_path, MODEL, "generation.top_p=0.5")
    assert run_job(line) == 0
    facts = read_json(job_folder(line) / "manifest.json")["suggested_generation"]
    assert facts["applied"] == {"repetition_penalty": 1.1, "temperature": 1.0, "top_k": 50}
    assert facts["not_applied"] == {"top_p": 0.8}


def test_each_setting_is_read_as_generate_reads_it(tiny_dir):
    assert own(tiny_dir) == ({}, {})
    assert own(tiny_dir, temperature=0.7, top_k=5) == ({}, {})  # without do_sample, generate is greedy
    assert own(tiny_dir, do_sample=True) == ({"temperature": 0.7, "top_k": 5}, {})
    assert own(tiny_dir, top_k=None, temperature=None, min_p=0.1) == (
        {"temperature": 1.0, "top_k": 50, "min_p": 0.1},
        {},
    )
    assert own(tiny_dir, chat_format="chatml", use_cache=True, pad_token_id=0, max_new_tokens=9)[1] == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("penalty_alpha", 0.6),
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [5]),
        ("typical_p", 0.9),
    ],
)
def test_what_the_engine_does_not_do_is_refused_by_name(name, value, tiny_dir, tmp_path, capsys):
    suggest(tiny_dir, **{name: value}, do_sample=name == "typical_p")
    with pytest.raises(LoadError, match=f"suggests {name}=.*, which this engine does not do"):
        run_job(job(tiny_dir, tmp_path, MODEL))
    assert outputs_of(tmp_path) == []
    assert run_job(job(tiny_dir, tmp_path)) == 0
    assert f"{name}={value}: not applied" in capsys.readouterr().err


def outputs_of(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "out").rglob("outputs.jsonl"))


@pytest.mark.parametrize(
    "wrong", [{"repetition_penalty": -1}, {"temperature": "hot"}, {"top_k": [1]}, {"top_p": 7}]
)
def test_a_value_that_makes_no_sense_is_refused_with_its_file(wrong, tiny_dir, tmp_path):
    suggest(tiny_dir, do_sample=True, **wrong)
    with pytest.raises(LoadError, match=r"generation_config\.json") as caught:
        run_job(job(tiny_dir, tmp_path, MODEL))
    assert caught.value.fix


def test_a_rows_own_settings_win_and_a_key_of_the_command_line_does(tiny_dir, tmp_path):
    suggest(tiny_dir, do_sample=True, temperature=0.7, repetition_penalty=1.1)
    settled = settle_generation(read_config(job(tiny_dir, tmp_path, MODEL, "generation.temperature=0")))
    assert (settled.generation.temperature, settled.generation.repetition_penalty) == (0.0, 1.1)
    rows = [{"id": "own", "prompt": "a", "generation": {"temperature": 0, "repetition_penalty": 1.0}}]
    prompts = write_rows(tmp_path / "q.jsonl", rows)
    by_row = arguments(tiny_dir, prompts, tmp_path / "out", "system=null", MODEL)
    plain = arguments(tiny_dir, prompts, tmp_path / "out", "system=null")
    assert (run_job(by_row), run_job(plain)) == (0, 0)
    assert texts(by_row) == texts(plain)


def test_rows_of_two_suggestions_are_never_mixed(tiny_dir, tmp_path):
    suggest(tiny_dir, repetition_penalty=3.0)
    line = job(tiny_dir, tmp_path, MODEL)
    assert run_job([*line, "limit=2"]) == 0
    first = {row["key"] for row in outputs(line)}
    suggest(tiny_dir, repetition_penalty=1.5)
    assert run_job(line) == 0
    assert len(outputs(line)) == len(PROMPTS)
    assert not first & {row["key"] for row in outputs(line)}
    assert texts(line) == generated(tiny_dir)


def test_a_folder_of_its_own_and_plain_ones_stay_where_they_are(tiny_dir, tmp_path):
    line = job(tiny_dir, tmp_path)
    assert job_folder(line) != job_folder([*line, MODEL])
    assert "-model-" in job_folder([*line, MODEL]).name
    assert (
        job_folder([*line, "model.context=null"])
        == job_folder(line)
        != job_folder([*line, "model.context=99"])
    )


def test_a_recorded_config_is_settled_like_the_job(tiny_dir, tmp_path):
    suggest(tiny_dir, repetition_penalty=1.1)
    line = [f"model.name={tiny_dir}", f"prompts={write_rows(tmp_path / 'p.jsonl', PROMPTS)}", MODEL]
    line += [f"outputs_dir={tmp_path / 'out'}", "generation.max_new_tokens=2", "quant=fp32"]
    assert main(line) == 0
    config = recorded_config(job_folder(line))
    assert config.generation.left_to_the_model
    assert settle_generation(config).generation.repetition_penalty == 1.1


def test_a_plan_expects_draws_where_the_settings_are_not_at_hand(tiny_dir):
    far = read_config(["model.name=org/nowhere", MODEL])
    assert not expect_generation(far).generation.greedy
    suggest(tiny_dir, repetition_penalty=1.1)
    near = expect_generation(read_config([f"model.name={tiny_dir}", MODEL]))
    assert (near.generation.greedy, near.generation.repetition_penalty) == (True, 1.1)


class TestContext:
    def rows(self, folder: Path, tmp_path: Path, *more: str) -> list[dict[str, Any]]:
        prompts = write_rows(tmp_path / "p.jsonl", [{"id": "long", "prompt": "a b c " * 300}])
        line = arguments(folder, prompts, tmp_path / "out", "system=null", *more)
        run_job(line)
        self.manifest = read_json(job_folder(line) / "manifest.json")
        return outputs(line)

    def test_is_the_configs_own_unless_it_is_raised(self, tiny_dir, tmp_path):
        [row] = self.rows(tiny_dir, tmp_path)
        assert "model.context" in row["error"]
        assert self.manifest["context"] == {"tokens": 512, "source": "config.json"}
        [row] = self.rows(tiny_dir, tmp_path, "model.context=4096")
        assert (row["error"], self.manifest["context"]) == (None, {"tokens": 4096, "source": "model.context"})

    def test_a_shorter_one_cuts_rows(self, tiny_dir, tmp_path):
        prompts = write_rows(tmp_path / "p.jsonl", [{"id": "a", "prompt": "a"}])
        line = arguments(tiny_dir, prompts, tmp_path / "out", "system=null", "generation.ignore_eos=true")
        run_job(line)
        [row] = outputs(line)
        used = row["usage"]["prompt_tokens"] if "usage" in row else row["prompt_tokens"]
        run_job([*line, f"model.context={used + 3}"])
        [short] = outputs([*line, f"model.context={used + 3}"])
        made = short["usage"]["completion_tokens"] if "usage" in short else short["completion_tokens"]
        assert made == 3

    @pytest.mark.parametrize("rope", ["linear", "yarn"])
    def test_beyond_the_configs_own_text_is_that_of_generate(self, rope, tiny_dir, tmp_path):
        path = tiny_dir / "config.json"
        config = json.loads(path.read_text())
        scaling = {"rope_type": rope, "factor": 8.0, "rope_theta": 10000.0}
        scaling |= {"original_max_position_embeddings": 512} if rope == "yarn" else {}
        path.write_text(json.dumps({**config, "rope_parameters": scaling}))
        [row] = self.rows(tiny_dir, tmp_path, "model.context=4096")
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(tiny_dir),
            AutoTokenizer.from_pretrained(tiny_dir),
        )
        chat = [{"role": "user", "content": "a b c " * 300}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        assert ids.shape[1] > 512
        made = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(made, skip_special_tokens=True)

    def test_positions_that_do_not_reach_are_refused(self, tiny_dir, tmp_path):
        path = tiny_dir / "config.json"
        config = json.loads(path.read_text())
        path.write_text(
            json.dumps(
                {**config, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
            )
        )
        with pytest.raises(
            LoadError, match=r"model\.context=4096 is beyond its own 512, and its rotary positions"
        ):
            self.rows(tiny_dir, tmp_path, "model.context=4096")
        table = {
            "model_type": "gpt2",
            "n_layer": 1,
            "n_embd": 8,
            "n_head": 2,
            "vocab_size": 300,
            "n_positions": 64,
        }
        path.write_text(json.dumps(table))
        with pytest.raises(
            LoadError, match=r"model\.context=65 is beyond its own 64, and its positions are a table"
        ):
            self.rows(tiny_dir, tmp_path, "model.context=65")

    def test_the_plan_refuses_what_the_job_does(self, tiny_dir, capsys):
        path = tiny_dir / "config.json"
        config = json.loads(path.read_text())
        line = ["plan", f"model.name={tiny_dir}", "memory=24GB", "model.context=4096"]
        said = "model.context=4096 is beyond its own 512, and its rotary positions"
        for rope in (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
                }
            },
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ):
            path.write_text(json.dumps({**config, **rope}))
            assert main(line) == 2
            assert said in " ".join(capsys.readouterr().err.split())
            assert main(line[:-1]) == 0
        path.write_text(
            json.dumps(
                {**config, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
            )
        )
        assert main(line) == 0

    def test_none_at_all_is_refused(self):
        with pytest.raises(ConfigError, match=r"model\.context=0: must be null, or at least 1"):
            read_config(["model.context=0"])

    def test_the_plan_takes_it(self, tiny_dir, tmp_path, capsys):
        prompts = write_rows(tmp_path / "p.jsonl", [{"id": "long", "prompt": "a b c " * 300}])
        line = ["plan", f"model.name={tiny_dir}", f"prompts={prompts}", "memory=24GB", "json=-"]
        assert main(line) == 0
        assert json.loads(capsys.readouterr().out)["plans"][0]["prompts"]["too_long_rows"] == 1
        assert main([*line, "model.context=4096"]) == 0
        assert json.loads(capsys.readouterr().out)["plans"][0]["prompts"]["too_long_rows"] == 0
