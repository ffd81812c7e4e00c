"""A GGUF file becomes a folder that loads like any other model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.commands.door import main
from pipeline.config.quant import QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.models.loading import load_model

HIDDEN, HEADS, KV_HEADS, MLP = 64, 4, 2, 128


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory, tiny_model, tiny_folder) -> Path:
    """The tiny Llama and its tokenizer as a GGUF file: linear layers in Q8_0, the rest in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_model("llama"), AutoTokenizer.from_pretrained(tiny_folder))
    return path


def write_gguf(path: Path, model: Any, tokenizer: Any, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(model.config.vocab_size)
    add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = stored_as_llama_cpp_does(name, tensor).numpy()
        target = names.get_name(name, (".weight",))
        if "proj" in name:
            packed = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def stored_as_llama_cpp_does(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """llama.cpp keeps the rows of a query or key head in the order of its own rotary embedding."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(tensor.shape).contiguous()


def test_weights_are_the_dequantized_ones_and_text_is_that_of_the_model(
    tiny_gguf, tiny_model, tmp_path, capsys
):
    folder = tmp_path / "models" / "tiny"
    assert main(["import-gguf", str(tiny_gguf), f"to={folder}", "dtype=float32"]) == 0
    assert "imported from tiny.gguf as float32" in capsys.readouterr().out
    made = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    original = tiny_model("llama")
    for name, tensor in original.state_dict().items():
        exact = tensor.numpy()
        if "proj" in name:
            packed = gguf.quantize(exact, gguf.GGMLQuantizationType.Q8_0)
            exact = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(made.state_dict()[name].numpy(), exact), name


def test_the_folder_loads_and_quantizes_like_any_other(tiny_gguf, tmp_path):
    assert main(["import-gguf", str(tiny_gguf), f"to={tmp_path / 'tiny'}"]) == 0
    loaded = load_model(ModelConfig(str(tmp_path / "tiny")), QuantConfig(QuantMethod.nf4), "none")
    assert loaded.model is not None
    assert loaded.model.get_input_embeddings().weight.dtype == torch.bfloat16
    text = "한국어 <|im_start|>Tell<|im_end|>"
    ids = loaded.tokenizer(text).input_ids
    assert loaded.tokenizer.decode(ids) == text
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    chat = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"


def test_the_real_models_tokenizer_survived(smollm2):
    model, tokenizer = smollm2
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    text = "데이터 과학자에게 농담을 해 줘. Café, 学生 🙂\n\tdef f():  return 1"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template


def test_a_second_run_changes_nothing(tiny_gguf, tmp_path, capsys):
    assert main(["import-gguf", str(tiny_gguf), f"to={tmp_path / 'tiny'}"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    assert main(["import-gguf", str(tiny_gguf), f"to={tmp_path / 'tiny'}"]) == 0
    assert "there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()} == before


def test_two_imports_at_once_make_one_folder(tiny_gguf, tmp_path):
    folder = tmp_path / "tiny"
    command = [sys.executable, "-m", "pipeline", "import-gguf", str(tiny_gguf), f"to={folder}"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("there already" in out for out, _ in said) == [False, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
    assert (folder / "model.safetensors").is_file()


def test_a_run_that_is_killed_leaves_no_folder_and_the_next_one_cleans_up(tiny_gguf, tmp_path):
    folder, half_made = tmp_path / "models" / "tiny", tmp_path / "models" / ".tiny.part"
    command = [sys.executable, "-m", "pipeline", "import-gguf", str(tiny_gguf), f"to={folder}"]
    process = subprocess.Popen(command)
    while not half_made.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert half_made.exists()
    assert not folder.exists()
    assert main(command[3:]) == 0
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]


class TestWhatAUserReads:
    def refused(self, capsys, *arguments: str | Path) -> str:
        assert main(["import-gguf", *map(str, arguments)]) == 3
        return capsys.readouterr().err

    def test_no_such_file(self, tmp_path, capsys):
        assert "no such file" in self.refused(capsys, tmp_path / "none.gguf", f"to={tmp_path / 'out'}")

    def test_not_a_gguf_file(self, tmp_path, capsys):
        file = tmp_path / "weights.gguf"
        file.write_bytes(b"PK\3\4 something else")
        assert f"{file}: not a GGUF file" in self.refused(capsys, file, f"to={tmp_path / 'out'}")
        assert not (tmp_path / "out").exists()

    def test_a_truncated_file(self, tiny_gguf, tmp_path, capsys):
        file = tmp_path / "cut.gguf"
        file.write_bytes(tiny_gguf.read_bytes()[:5000])
        assert f"{file}: transformers cannot read it" in self.refused(capsys, file, f"to={tmp_path / 'out'}")
        assert list(tmp_path.iterdir()) == [file]

    def test_an_architecture_that_transformers_cannot_import(self, tiny_model, tiny_folder, tmp_path, capsys):
        file = tmp_path / "odd.gguf"
        write_gguf(file, tiny_model("llama"), AutoTokenizer.from_pretrained(tiny_folder), "nonesuch")
        message = self.refused(capsys, file, f"to={tmp_path / 'out'}")
        assert "nonesuch" in message
        assert "another architecture" in message

    def test_a_folder_that_holds_something_else(self, tiny_gguf, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        assert "something else already" in self.refused(capsys, tiny_gguf, f"to={tmp_path}")
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_without_the_gguf_package(self, tiny_gguf, tmp_path):
        """A path entry that hides the package, as if it were not installed."""
        script = f"""if True:
            import importlib.util, sys
            find = importlib.util.find_spec
            importlib.util.find_spec = lambda name, *rest: None if name == "gguf" else find(name, *rest)
            from pipeline.commands.door import main
            sys.exit(main(["import-gguf", {str(tiny_gguf)!r}, {f"to={tmp_path / 'out'}"!r}]))
        """
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (3, "")
        assert "Run: pip install 'llm-job-pipeline[gguf]'" in done.stderr

    def test_help_and_a_wrong_option_answer_at_once(self):
        before = os.times()
        for arguments, status in ((["--help"], 0), (["file.gguf"], 2)):
            command = [sys.executable, "-m", "pipeline", "import-gguf", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
            assert done.returncode == status
        assert os.times().children_user - before.children_user < 4  # torch alone takes longer, twice
