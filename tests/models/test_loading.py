"""Loading: what is found where, and what a user reads when it cannot be."""

import gc
import hashlib
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from job_helper import arguments, write_rows
from machines import H100, T4
from safetensors.torch import load_file, save_file

from pipeline.commands.door import main
from pipeline.common.errors import ConfigError, LoadError
from pipeline.config.base_model import with_base
from pipeline.config.model_files import local_folder
from pipeline.config.quant import Dtype, QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.models.checkpoint import fetch_config
from pipeline.models.dtypes import _say_once, computed_in
from pipeline.models.loading import load_model, load_tokenizer, release

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)
PLAIN = QuantConfig()
ALL_QUANTS = [
    PLAIN,
    QuantConfig(dtype=Dtype.float32),
    QuantConfig(dtype=Dtype.float16),
    QuantConfig(dtype=Dtype.bfloat16),
    QuantConfig(QuantMethod.int8),
    QuantConfig(QuantMethod.nf4, double_quant=True),
    QuantConfig(QuantMethod.nf4),
    QuantConfig(QuantMethod.fp4, double_quant=True),
    QuantConfig(QuantMethod.fp4),
]


def refused(folder: Path | str, quant: QuantConfig = PLAIN, models_dir: str = "none", **settings) -> str:
    """The message of the LoadError that loading ends in."""
    with pytest.raises(LoadError) as caught:
        load_model(ModelConfig(str(folder), **settings), quant, models_dir)
    return str(caught.value)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def in_shards(folder: Path, model) -> list[Path]:
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    return sorted(folder.glob("model-*.safetensors"))


def grow_embedding(file: Path, rows: int) -> None:
    """Rewrite weights so that the embedding has `rows` rows: a hole in the file, which takes no disk."""
    weights = load_file(file)
    del weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    end = len(data) + rows * 64 * 2
    header["model.embed_tokens.weight"] = {
        "dtype": "BF16",
        "shape": [rows, 64],
        "data_offsets": [len(data), end],
    }
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    file.write_bytes(len(packed).to_bytes(8, "little") + packed + data)
    os.truncate(file, 8 + len(packed) + end)


class TestWhereAModelIsFound:
    def test_a_local_folder_comes_first(self, tiny_dir):
        assert local_folder(str(tiny_dir), "none") == tiny_dir

    def test_then_the_folder_in_models_dir_with_the_models_own_name(self, tiny_dir):
        assert local_folder("org/tiny", str(tiny_dir.parent)) == tiny_dir

    def test_a_folder_in_models_dir_without_a_model_is_passed_over(self, tiny_dir):
        (tiny_dir / "config.json").unlink()
        assert local_folder("org/tiny", str(tiny_dir.parent)) is None

    def test_then_the_hub(self, tmp_path):
        assert local_folder("org/name", str(tmp_path)) is None


class TestLoad:
    def test_gives_model_and_tokenizer_of_a_folder(self, tiny_dir):
        loaded = load_model(ModelConfig("org/tiny"), PLAIN, str(tiny_dir.parent))
        assert loaded.model is not None
        assert (loaded.source, loaded.revision) == (str(tiny_dir), None)
        assert loaded.model.device.type == "cuda" if torch.cuda.is_available() else "cpu"
        assert not loaded.model.training
        assert loaded.tokenizer.decode(loaded.tokenizer("한국어").input_ids) == "한국어"
        assert 0 < loaded.load_sec < 60

    def test_the_tokenizer_alone_needs_no_weights(self, tiny_dir):
        (tiny_dir / "model.safetensors").unlink()
        assert load_tokenizer(ModelConfig(str(tiny_dir)), "none").eos_token == "<|im_end|>"

    @pytest.mark.parametrize(
        "quant", ALL_QUANTS, ids=lambda q: f"{q.method.name}-{q.dtype.name}-{q.double_quant}"
    )
    def test_every_quantization_runs_on_this_machine(self, tiny_folder, quant):
        model = load_model(ModelConfig(str(tiny_folder)), quant, "none").model
        assert model is not None
        logits = model(input_ids=torch.tensor([[3, 4, 5]], device=model.device)).logits
        assert logits.isfinite().all()
        dtype = torch.float32 if quant.dtype is Dtype.auto else getattr(torch, quant.dtype.value)
        assert model.get_input_embeddings().weight.dtype == dtype
        stored = {QuantMethod.none: dtype, QuantMethod.int8: torch.int8}.get(quant.method, torch.uint8)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == stored

    def test_four_bit_settings_reach_the_weights(self, tiny_folder):
        quant = QuantConfig(QuantMethod.fp4, double_quant=True, compute_dtype=Dtype.float16)
        layer = load_model(ModelConfig(str(tiny_folder)), quant, "none").model.model.layers[0].mlp.up_proj
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("fp4", True, torch.float16)

    @pytest.mark.parametrize(
        ("gpus", "expected"), [((T4,), torch.float16), ((H100,), torch.bfloat16), ((), torch.bfloat16)]
    )
    def test_auto_is_float16_on_a_card_without_bfloat16(self, tiny_dir, monkeypatch, capsys, gpus, expected):
        config = tiny_dir / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
        monkeypatch.setattr("pipeline.models.dtypes.usable_gpus", lambda device_map: gpus)
        _say_once.cache_clear()
        for _ in range(2):
            loaded = load_model(
                ModelConfig(str(tiny_dir), device_map="cpu"), QuantConfig(QuantMethod.nf4), "none"
            )
        layer = loaded.model.model.layers[0].mlp.up_proj
        assert loaded.model.dtype == layer.compute_dtype == layer.weight.quant_state.dtype == expected
        name = str(expected).removeprefix("torch.")
        assert computed_in(loaded.model, loaded.quant) == {"plain": name, "products_4bit": name}
        said = capsys.readouterr().err
        assert said.count("Tesla T4 has no bfloat16 of its own") == (expected == torch.float16)

    def test_the_attention_asked_for_is_used(self, tiny_folder):
        config = ModelConfig(str(tiny_folder), attn_implementation="eager")
        assert load_model(config, PLAIN, "none").model.config._attn_implementation == "eager"

    def test_what_fits_nowhere_else_goes_to_offload_dir(self, tiny_folder, tiny_model, tmp_path):
        config = ModelConfig(str(tiny_folder), max_memory={"cpu": "250KB"}, offload_dir=str(tmp_path / "off"))
        model = load_model(config, PLAIN, "none").model
        assert "disk" in model.hf_device_map.values()
        ids = torch.tensor([[3, 4, 5]])
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits)

    def test_pickle_weights_load_when_allowed(self, tiny_dir, tiny_model):
        (tiny_dir / "model.safetensors").unlink()
        torch.save(tiny_model("llama").state_dict(), tiny_dir / "pytorch_model.bin")
        config = ModelConfig(str(tiny_dir), safetensors_only=False)
        assert load_model(config, PLAIN, "none").model is not None

    def test_release_frees_the_model(self, tiny_folder):
        loaded = load_model(ModelConfig(str(tiny_folder)), PLAIN, "none")
        model = weakref.ref(loaded.model)
        release(loaded)
        gc.collect()
        assert model() is None


def test_nothing_is_written_to_the_terminal(tiny_folder):
    """Loading and running, quantized too, with warnings logged to a file: both streams stay empty."""
    script = f"""if True:
        import logging, torch
        logging.basicConfig(filename={os.devnull!r})
        from pipeline.config.quant import *
        from pipeline.config.schema import *
        from pipeline.models.loading import load_model
        int8 = QuantConfig(QuantMethod.int8, Dtype.bfloat16)
        for quant in (QuantConfig(), QuantConfig(QuantMethod.nf4), int8):
            loaded = load_model(ModelConfig({str(tiny_folder)!r}), quant, "none")
            loaded.model(input_ids=torch.tensor([[3, 4, 5]], device=loaded.model.device))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


class TestWhatAUserReads:
    def test_a_folder_without_config(self, tiny_dir):
        (tiny_dir / "config.json").unlink()
        assert "no config.json" in refused(tiny_dir)

    def test_a_broken_config(self, tiny_dir):
        (tiny_dir / "config.json").write_text("{")
        assert f"{tiny_dir / 'config.json'}: not JSON" in refused(tiny_dir)

    @pytest.mark.parametrize("keep", [0, 100, -100])
    def test_a_truncated_file_is_named(self, tiny_dir, keep):
        file = tiny_dir / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        message = refused(tiny_dir)
        assert f"{file}: corrupt or cut short" in message
        assert "again" in message

    def test_a_truncated_shard_is_named(self, tiny_dir, tiny_model):
        shard = in_shards(tiny_dir, tiny_model("llama"))[1]
        shard.write_bytes(shard.read_bytes()[:-1])
        assert f"{shard}: corrupt or cut short" in refused(tiny_dir)

    def test_a_missing_shard_is_named(self, tiny_dir, tiny_model):
        shard = in_shards(tiny_dir, tiny_model("llama"))[1]
        shard.unlink()
        assert f"{shard}: this part of the weights is missing" in refused(tiny_dir)

    def test_a_broken_index_is_named(self, tiny_dir, tiny_model):
        in_shards(tiny_dir, tiny_model("llama"))
        index = tiny_dir / "model.safetensors.index.json"
        index.write_text("[]")
        assert f"{index}: not an index of weights" in refused(tiny_dir)

    def test_a_git_lfs_pointer(self, tiny_dir):
        (tiny_dir / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )
        assert "git lfs pull" in refused(tiny_dir)

    def test_no_weights(self, tiny_dir):
        (tiny_dir / "model.safetensors").unlink()
        assert "no safetensors weights there" in refused(tiny_dir)

    def test_only_pickle_weights(self, tiny_dir):
        (tiny_dir / "model.safetensors").rename(tiny_dir / "pytorch_model.bin")
        assert "model.safetensors_only=false" in refused(tiny_dir)

    def test_weights_that_lack_a_tensor_are_never_filled_with_random_numbers(self, tiny_dir):
        weights = load_file(tiny_dir / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tiny_dir / "model.safetensors", metadata={"format": "pt"})
        assert "lack 1 of the model's weights, as model.layers.1.mlp.up_proj.weight" in refused(tiny_dir)

    def test_weights_of_another_shape(self, tiny_dir):
        edit_config(tiny_dir, intermediate_size=96)
        assert "another shape than its config.json says" in refused(tiny_dir)

    def test_no_tokenizer(self, tiny_dir):
        (tiny_dir / "tokenizer.json").unlink()
        assert "tokenizer.json" in refused(tiny_dir)

    def test_an_unknown_architecture(self, tiny_dir):
        edit_config(tiny_dir, model_type="nonesuch")
        message = refused(tiny_dir)
        assert "'nonesuch'" in message
        assert "pip install -U transformers" in message

    def test_not_a_causal_language_model(self, tiny_dir):
        edit_config(tiny_dir, model_type="t5")
        assert "t5 is not a causal language model" in refused(tiny_dir)

    def test_code_that_comes_with_the_model_is_not_run_unasked(self, tiny_dir, tmp_path):
        edit_config(
            tiny_dir, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
        )
        (tiny_dir / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert "model.trust_remote_code=true" in refused(tiny_dir)
        assert not (tmp_path / "ran").exists()

    def test_more_than_the_memory_allowed(self, tiny_dir):
        message = refused(tiny_dir, max_memory={"cpu": "250KB"})
        assert "does not fit" in message
        assert "quant=nf4" in message
        assert "model.offload_dir" in message

    def test_quantized_more_than_the_memory_allowed(self, tiny_dir, tmp_path):
        settings = {"max_memory": {"cpu": "100KB"}, "offload_dir": str(tmp_path)}
        assert "cannot spill" in refused(tiny_dir, QuantConfig(QuantMethod.nf4), **settings)

    def test_more_than_the_machine_has(self, tiny_dir):
        """A limit on the address space makes the allocation fail as on a machine that is too small."""
        edit_config(tiny_dir, vocab_size=2**29, tie_word_embeddings=True)
        grow_embedding(tiny_dir / "model.safetensors", rows=2**29)
        script = f"""if True:
            import resource
            from pipeline.config.quant import *
            from pipeline.config.schema import *
            from pipeline.models.loading import load_model
            resource.setrlimit(resource.RLIMIT_AS, (100 * 2**30, 100 * 2**30))
            load_model(ModelConfig({str(tiny_dir)!r}), QuantConfig(dtype=Dtype.float32), "none")
        """
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "LoadError: " in done.stderr
        assert "not enough memory" in done.stderr

    @pytest.mark.parametrize("device_map", ["cuda:99", {"": 99}])
    def test_a_gpu_that_is_not_there(self, tiny_dir, device_map):
        message = refused(tiny_dir, device_map=device_map)
        assert "cuda:99" in message
        assert "device_map=auto" in message

    def test_an_attention_that_is_not_there(self, tiny_dir):
        assert "model.attn_implementation" in refused(tiny_dir, attn_implementation="nonesuch")

    def test_a_path_that_is_not_there_names_the_nearest_model(self, tiny_dir):
        message = refused("/nowhere/tinny", models_dir=str(tiny_dir.parent))
        assert "/nowhere/tinny: no such folder" in message
        assert f"did you mean model.name={tiny_dir}?" in message

    def test_a_revision_of_a_folder_is_logged_as_not_looked_at(self, tiny_dir, caplog):
        with caplog.at_level(logging.WARNING):
            load_tokenizer(ModelConfig(str(tiny_dir), revision="v1"), "none")
        assert "revision=v1 is not looked at" in caplog.text


class Hub(http.server.ThreadingHTTPServer):
    """The parts of the hub's HTTP interface that a download uses, serving one folder as org/tiny."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.gated_files = False
        self.refusal: tuple[int, str] | None = None
        self.tokens: set[str | None] = set()


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if self.server.refusal:
            self.answer(self.server.refusal[0], error=self.server.refusal[1])
        elif path.startswith("/api/models/org/tiny/tree/"):
            self.answer(200, json.dumps([self.entry(file) for file in self.server.folder.iterdir()]).encode())
        elif path.removeprefix("/api/models/org/tiny") in ("", *(f"/revision/{r}" for r in REVISIONS)):
            self.answer(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/models/org/tiny/revision/"):
            self.answer(404, error="RevisionNotFound")
        elif path.startswith("/org/tiny/resolve/") and self.server.gated_files:
            self.answer(403, error="GatedRepo")
        elif path.startswith("/org/tiny/resolve/"):
            self.answer(200, (self.server.folder / path.rpartition("/")[2]).read_bytes())
        else:
            self.answer(404, error="RepoNotFound")

    do_HEAD = do_GET

    def entry(self, file: Path) -> dict[str, object]:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def answer(self, status: int, body: bytes = b"", error: str = "") -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, an empty cache and a token: what HF_ENDPOINT, HF_HOME and HF_TOKEN set."""
    with Hub(tiny_dir) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()


@pytest.mark.usefixtures("hub")
class TestFromTheHub:
    @pytest.mark.parametrize("revision", [None, "v1", COMMIT])
    def test_downloads_and_records_the_commit(self, hub, tmp_path, revision):
        shutil.copy(hub.folder / "model.safetensors", hub.folder / "consolidated.safetensors")
        loaded = load_model(ModelConfig("org/tiny", revision=revision), PLAIN, "none")
        assert (loaded.source, loaded.revision) == ("org/tiny", COMMIT)
        snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / COMMIT
        assert (snapshot / "model.safetensors").is_file()
        assert not (snapshot / "consolidated.safetensors").exists()

    def test_a_jobs_folder_says_the_format_before_anything_else_is_downloaded(self, hub, tmp_path):
        config = hub.folder / "config.json"
        settings = {"quantization_config": {"quant_method": "fp8"}}
        config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
        prompts = write_rows(tmp_path / "p.jsonl", ["no row"])
        assert main(arguments("org/tiny", prompts, tmp_path / "out", "quant=none")) == 1
        (folder,) = (tmp_path / "out" / "p").iterdir()
        assert folder.name.startswith("tiny-fp8_checkpoint-greedy-")
        (snapshot,) = (tmp_path / "cache").glob("models--org--tiny/snapshots/*")
        assert {path.name for path in snapshot.iterdir()} <= {"config.json", "generation_config.json"}

    def test_a_download_is_shown_by_its_bytes(self, hub, monkeypatch):
        told: list[float] = []
        monkeypatch.setattr(
            "pipeline.models.hub.BytesBar.update", lambda bar, done, total=None: told.append(done)
        )
        load_tokenizer(ModelConfig("org/tiny"), "none")
        assert told == sorted(told)
        assert told[-1] == sum(path.stat().st_size for path in hub.folder.glob("*.j*"))

    def test_the_token_is_used_and_never_logged(self, hub, caplog, capfd):
        with caplog.at_level(logging.DEBUG):
            load_tokenizer(ModelConfig("org/tiny"), "none")
        assert hub.tokens == {"Bearer hf_secret"}
        assert "hf_secret" not in caplog.text + "".join(capfd.readouterr())

    def test_without_a_network_the_cache_serves(self, monkeypatch):
        load_model(ModelConfig("org/tiny"), PLAIN, "none")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert load_model(ModelConfig("org/tiny"), PLAIN, "none").revision == COMMIT

    def test_a_file_that_was_cut_short_in_the_cache(self, tmp_path):
        load_model(ModelConfig("org/tiny"), PLAIN, "none")
        (cached,) = (tmp_path / "cache").glob("models--org--tiny/snapshots/*/model.safetensors")
        cached.write_bytes(cached.read_bytes()[:-1])
        message = refused("org/tiny")
        assert f"{cached}: corrupt" in message
        assert f"hf download org/tiny --revision {COMMIT} --force-download" in message

    def test_gated_without_access(self, hub):
        hub.gated_files = True
        message = refused("org/tiny")
        assert "https://huggingface.co/org/tiny" in message
        assert "hf auth login" in message
        assert "gated" in message

    def test_an_unknown_name(self, hub):
        message = refused("org/tinyy", models_dir=str(hub.folder.parent))
        assert "no such model on the hub" in message
        assert f"model.name={hub.folder}?" in message

    def test_an_unknown_revision(self):
        message = refused("org/tiny", revision="v9")
        assert "no revision 'v9'" in message
        assert "https://huggingface.co/org/tiny/tree/main" in message

    def test_a_refused_token(self, hub):
        hub.refusal = (401, "")
        assert "refused the access token (401)" in refused("org/tiny")

    def test_only_pickle_weights(self, hub):
        (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
        assert "model.safetensors_only=false" in refused("org/tiny")

    def test_offline(self, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "the hub cannot be reached" in refused("org/tiny")

    def test_no_network(self, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        message = refused("org/tiny")
        assert "the hub cannot be reached" in message
        assert "hf download org/tiny --local-dir none/tiny" in message

    def test_what_is_good_to_have_is_asked_for_once(self, monkeypatch):
        waits: list[float] = []
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}"
        )
        assert fetch_config(ModelConfig("org/tiny"), "none") is None
        with pytest.raises(ConfigError, match="nor on the hub"):
            with_base(["model.adapter=org/adapter"])
        assert waits == []

    def test_a_hub_that_is_down(self, hub):
        hub.refusal = (500, "")
        assert "the hub cannot be reached" in refused("org/tiny")
