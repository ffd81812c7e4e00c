"""Loading and downloading are shown by the bytes: a bar in a terminal, a line now and then elsewhere."""

import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
import transformers
from conftest import SMALL, tiny_tokenizer
from job_helper import ROOT, arguments, environment, write_rows

from pipeline.common import bars
from pipeline.config.quant import QUANTS
from pipeline.config.schema import ModelConfig
from pipeline.models import load_progress
from pipeline.models.load_progress import tensor_sizes
from pipeline.models.loading import load_model


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the bar is told, in bytes."""
    told: list[float] = []
    update = bars.BytesBar.update

    def keep(self: Any, done_bytes: float, total_bytes: float | None = None) -> None:
        told.append(done_bytes)
        update(self, done_bytes, total_bytes)

    monkeypatch.setattr(bars.BytesBar, "update", keep)
    return told


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_bar_ends_at_the_bytes_of_the_weights(quant, tiny_dir, shown):
    load_model(ModelConfig(str(tiny_dir)), QUANTS[quant], "none")
    size = (tiny_dir / "model.safetensors").stat().st_size
    assert len(shown) > 10
    assert shown == sorted(shown)
    assert shown[-1] == pytest.approx(size, rel=0.001)


def test_weights_made_of_several_tensors_count_too(shown, tmp_path):
    """A mixture's experts: the file has a tensor for each, the model one for all."""
    config = transformers.MixtralConfig(**{**SMALL, "num_local_experts": 4})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_model(ModelConfig(str(tmp_path)), QUANTS["none"], "none")
    assert shown[-1] == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.001)


def test_where_no_terminal_watches_a_line_is_written_now_and_then(tiny_dir, monkeypatch, capsys):
    load_model(ModelConfig(str(tiny_dir)), QUANTS["none"], "none")
    assert "Loading weights" not in capsys.readouterr().err
    monkeypatch.setattr(bars, "LINE_SEC", 0.0)
    load_model(ModelConfig(str(tiny_dir)), QUANTS["none"], "none")
    assert "Loading weights: 0.0 GB of 0.0 GB" in capsys.readouterr().err


def test_a_person_sees_a_bar(tiny_dir, tmp_path):
    """The real command, with a terminal of its own for standard error."""
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    main, other = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments(tiny_dir, prompts, tmp_path / "out")],
        stdout=subprocess.DEVNULL, stderr=other, cwd=ROOT, env={**environment(), "TERM": "xterm"},
    )  # fmt: skip
    os.close(other)
    said = b""
    while True:
        try:
            said += os.read(main, 1 << 16)
        except OSError:
            break
    assert done.wait(60) == 0
    assert b"Loading weights" in said


def test_the_sizes_of_all_tensors_are_those_of_the_files(tiny_dir):
    file = tiny_dir / "model.safetensors"
    sizes = tensor_sizes([file])
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert sizes.keys() == header.keys() - {"__metadata__"}
    assert sum(sizes.values()) == pytest.approx(len(content), rel=0.001)


def test_a_release_that_lets_nobody_look_loads_all_the_same(tiny_dir, shown, monkeypatch):
    monkeypatch.delattr(load_progress.transformers_logging, "set_tqdm_hook")
    assert load_model(ModelConfig(str(tiny_dir)), QUANTS["none"], "none").model is not None
    assert shown == []
