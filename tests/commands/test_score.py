"""Scores against known answers: a model against itself, and a plain loop without batches."""

import json
import math

import pytest
import torch
import transformers

from pipeline.commands.score import parse
from pipeline.commands.score_jobs import score_jobs, text_rows
from pipeline.common.errors import ConfigError, JobError
from pipeline.config.quant import Dtype, QuantConfig, QuantMethod
from pipeline.config.schema import Config, GenerationConfig, ModelConfig
from pipeline.job.runner import run_job
from pipeline.models.loading import load_model
from pipeline.models.scoring import Scores, TextRow, pad_right, passes, score

PROMPTS = [
    "Tell a joke.",
    "Why?",
    "한국어 문장입니다.",
    "Why did the cat sit on the mat? Tell me a lot more.",
]
ROWS = [TextRow(tuple(range(3, 3 + n)), first) for n, first in ((40, 5), (7, 1), (23, 22), (40, 39), (12, 3))]


def plain_loop(model, baseline, rows):
    """Mean NLL, KL and top-1 agreement, one row after another, straight from the definitions."""
    nll, kl, top = [], [], []
    for row in rows:
        token_ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            q, p = (m(input_ids=token_ids).logits[0].double().log_softmax(-1) for m in (model, baseline))
        for place in range(row.first, len(row.token_ids)):
            a, b = p[place - 1], q[place - 1]
            nll.append(-float(b[row.token_ids[place]]))
            kl.append(float((a.exp() * (a - b)).sum()))
            top.append(int(a.argmax() == b.argmax()))
    return sum(nll) / len(nll), sum(kl) / len(kl), sum(top) / len(top)


def load(tiny_dir, quant):
    return load_model(ModelConfig(name=str(tiny_dir)), quant, "models").model


@pytest.fixture
def fp32(tiny_dir):
    return load(tiny_dir, QuantConfig(dtype=Dtype.float32))


@pytest.fixture
def nf4(tiny_dir):
    quant = QuantConfig(QuantMethod.nf4, dtype=Dtype.float32, double_quant=True, compute_dtype=Dtype.float32)
    return load(tiny_dir, quant)


def test_a_model_against_itself_has_no_divergence_and_agrees_always(fp32):
    summary = Scores(list(score(fp32, fp32, ROWS))).summary()
    assert (summary["kl"]["value"], summary["kl_quantiles"]["1.0"], summary["top1"]["value"]) == (0, 0, 1)
    assert summary["perplexity"] == summary["baseline_perplexity"]
    assert summary["perplexity_ratio"]["value"] == 1
    assert summary["tokens"] == 35 + 6 + 1 + 1 + 9


def test_two_loads_of_the_same_weights_have_no_divergence(fp32, tiny_dir):
    other = load(tiny_dir, QuantConfig(dtype=Dtype.float32))
    summary = Scores(list(score(other, fp32, ROWS))).summary()
    assert (summary["kl"]["value"], summary["top1"]["value"]) == (0, 1)


def test_nf4_against_fp32_is_what_a_plain_loop_gives(nf4, fp32):
    summary = Scores(list(score(nf4, fp32, ROWS))).summary()
    nll, kl, top = plain_loop(nf4, fp32, ROWS)
    assert kl > 0.001
    assert summary["nll"]["value"] == pytest.approx(nll, rel=1e-4)
    assert summary["perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert summary["kl"]["value"] == pytest.approx(kl, rel=1e-3)
    assert summary["top1"]["value"] == pytest.approx(top)


@pytest.mark.parametrize("architecture", ["gemma3_text", "phi3", "qwen2"])
def test_batches_change_nothing_for_other_architectures(tiny_model, architecture):
    model, other = tiny_model(architecture), tiny_model("llama")
    rows = [row for row in ROWS if len(row.token_ids) < 64]
    summary = Scores(list(score(model, other, rows))).summary()
    nll, kl, top = plain_loop(model, other, rows)
    assert (summary["nll"]["value"], summary["kl"]["value"]) == pytest.approx((nll, kl), rel=1e-4)
    assert summary["top1"]["value"] == pytest.approx(top)


def test_rows_of_a_pass_stay_within_its_tokens_and_none_is_lost():
    found = list(passes(ROWS, 80))
    assert all(len(batch) * len(batch[0].token_ids) <= 80 for batch in found)
    assert sorted(map(repr, ROWS)) == sorted(repr(row) for batch in found for row in batch)
    assert [len(batch) for batch in passes(ROWS, 1)] == [1] * 5


def test_padding_is_on_the_right_and_masked():
    token_ids, mask = pad_right([[5, 6, 7], [8]])
    assert token_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_row_with_nothing_before_its_first_token_is_refused(fp32):
    with pytest.raises(ValueError, match="no token before"):
        list(score(fp32, fp32, [TextRow((1, 2), 0)]))


def test_a_text_is_cut_into_windows_of_which_all_but_the_first_token_is_scored(tiny_dir, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_dir)
    (tmp_path / "text.txt").write_text("Why did the cat sit on the mat?" * 3)
    rows = text_rows(tmp_path / "text.txt", tokenizer, 16)
    assert [i for row in rows for i in row.token_ids] == tokenizer.encode(
        "Why did the cat sit on the mat?" * 3
    )
    assert {len(row.token_ids) for row in rows[:-1]} == {16}
    assert {row.first for row in rows} == {1}
    with pytest.raises(JobError, match="cannot be read"):
        text_rows(tmp_path / "none.txt", tokenizer, 16)


@pytest.fixture
def jobs(tiny_dir, tmp_path):
    """Two jobs as they are run and written: fp32 and nf4, over one prompt file."""
    prompts = tmp_path / "four.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p, "system": "Be brief."}) + "\n" for p in PROMPTS))
    folders = []
    for name, quant in (
        ("fp32", QuantConfig(dtype=Dtype.float32)),
        ("nf4", QuantConfig(QuantMethod.nf4, dtype=Dtype.float32)),
    ):
        config = Config(
            model=ModelConfig(name=str(tiny_dir)),
            quant=quant,
            generation=GenerationConfig(max_new_tokens=12, ignore_eos=True),
            prompts=str(prompts),
            token_ids=True,
        )
        folder = tmp_path / "outputs" / f"tiny-{name}-greedy-0"
        run_job(config, folder)
        write_config(config, folder)
        folders.append(folder)
    return folders


def write_config(config, folder):
    """As Hydra writes it."""
    from omegaconf import OmegaConf

    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def test_jobs_are_scored_on_the_baselines_completions_and_a_text(jobs, tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat.")
    arguments = [str(tmp_path / "outputs"), f"baseline={jobs[0]}", f"text={tmp_path / 'text.txt'}"]
    assert score_jobs(*parse(arguments)) == 0
    own, other = (json.loads((folder / "scores.json").read_text()) for folder in jobs)
    assert (own["kl"]["value"], own["top1"]["value"], own["rows"], own["tokens"]) == (0, 1, 4, 48)
    assert other["kl"]["value"] > 0
    assert other["text"]["tokens"] == own["text"]["tokens"] > 0
    # Greedy text is what the baseline finds most probable: its own perplexity is the lowest.
    assert own["perplexity"]["value"] < other["perplexity"]["value"]


def test_the_prompts_are_rendered_as_the_runner_rendered_them(jobs):
    rows = [json.loads(line) for line in (jobs[0] / "outputs.jsonl").read_text().splitlines()]
    from pipeline.commands.score_jobs import completion_rows, job_config

    config = job_config(jobs[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.name)
    found = completion_rows(jobs[0], config, tokenizer, None)
    assert {(row.first, row.token_ids[row.first :]) for row in found} == {
        (row["usage"]["prompt_tokens"], tuple(row["token_ids"])) for row in rows
    }
    assert len(completion_rows(jobs[0], config, tokenizer, 2)) == 2


def test_a_changed_prompt_file_is_an_error_that_says_so(jobs, tmp_path):
    (tmp_path / "four.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(JobError, match="the prompt file changed"):
        score_jobs(*parse([str(jobs[1]), f"baseline={jobs[0]}"]))


@pytest.mark.parametrize(
    "wrong", [["a"], ["baseline=b"], ["a", "baseline=b", "row=3"], ["a", "baseline=b", "rows=x"]]
)
def test_a_wrong_command_line_is_a_config_error(wrong):
    with pytest.raises(ConfigError):
        parse(wrong)


def test_a_folder_that_was_never_run_is_an_error(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "outputs.jsonl").touch()
    with pytest.raises(ConfigError, match="no such file"):
        score_jobs(*parse([str(tmp_path), f"baseline={tmp_path / 'job'}"]))
