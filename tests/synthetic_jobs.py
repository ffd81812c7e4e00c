"""Job folders with invented answers, as the runner writes them, of any size."""

import json
import random
from pathlib import Path

import yaml

QUANTS = ("fp32", "bf16", "int8", "nf4", "fp4", "fp16", "none", "nf4_single", "fp4_double")
METHODS = {"int8": "int8", "nf4": "nf4", "fp4": "fp4", "nf4_single": "nf4", "fp4_double": "fp4"}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "prompt",
    "and",
    "writes",
    "what",
    "comes",
    "next",
    "one",
    "token",
    "after",
    "another",
    "until",
    "it",
    "stops",
]
HOSTILE = {
    "script": "<script>window.hacked = 1</script>",
    "handler": '<img src=x onerror="window.hacked = 2"> "onmouseover="window.hacked=3',
    "link": '<a href="javascript:window.hacked=4">click</a> [md](javascript:alert(1))',
    "end": "</script><script>window.hacked = 5</script><!-- <![CDATA[ ]]> {{ 7 * 7 }} {% raw %}",
    "bidi": "safe \u202etxet nekorb\u202c \u2066isolate",
    "control": "bell \x07 null \x00 escape \x1b[31m red \u2028 line",
}


def answer_row(index, completion, *, row_id=None, prompt=None, error=None, reference=None, ids=None):
    """A line of outputs.jsonl."""
    row = {
        "id": row_id or f"row-{index}",
        "index": index,
        "prompt": prompt or f"Question {index}?",
        "sample": 0,
        "completion": None if error else completion,
        "finish_reason": None if error else ("stop" if index % 3 else "length"),
        "usage": None if error else {"prompt_tokens": 9, "completion_tokens": len(completion.split())},
        "error": error,
        "metadata": {} if reference is None else {"reference": reference},
        "key": f"{index:016x}",
    }
    return row if ids is None else {**row, "token_ids": ids}


def write_job(
    folder: Path, quant: str, rows, *, prompt_set="invented", model="tiny", seed=None, **stats
) -> Path:
    """One finished job; its figures are invented, the smaller the more bits are saved."""
    job = folder / prompt_set / f"{model}-{quant}-greedy-{1000 * (seed or 0) + len(quant):08x}"
    (job / ".hydra").mkdir(parents=True)
    config = {
        "model": {"name": f"ORG/{model}", "revision": None},
        "quant": {
            "method": METHODS.get(quant, "none"),
            "dtype": DTYPES.get(quant, "auto"),
            "double_quant": quant in ("nf4", "fp4_double"),
        },
        "generation": {"max_new_tokens": 64, "temperature": 0.0} | ({} if seed is None else {"seed": seed}),
        "prompts": "invented.jsonl",
        "prompt_set": None,
    }
    overrides = [f"model={model}", f"quant={quant}", "prompts=invented.jsonl"]
    choices = {"model": model, "quant": quant, "generation": "greedy"}
    hydra = {"hydra": {"overrides": {"task": overrides}, "runtime": {"choices": choices}}}
    (job / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (job / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    count = 0
    with (job / "outputs.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    (job / "stats.json").write_text(json.dumps({**job_stats(quant, count), **stats}))
    manifest = {"when": "2026-01-01T00:00:00+00:00", "command": ["python", "-m", "pipeline", *overrides]}
    device = {"gpus": [], "cpu": "x86_64", "threads": 2}
    (job / "manifest.json").write_text(
        json.dumps({**manifest, "versions": {"torch": "2.13.0"}, "device": device})
    )
    return job


def job_stats(quant: str, rows: int) -> dict:
    scale = {"fp32": 4, "int8": 1}.get(quant, 0.6 if "4" in quant else 2)
    size, speed = int(scale * 135e6), 30 + 8 * QUANTS.index(quant)
    parts = {
        "embedding": {"float32": size // 4},
        "mlp": {"float32": size // 2},
        "attention": {"float32": size // 4},
    }
    peak = {"host_bytes": size + int(6e8), "host_exact": True, "devices": []}
    return {
        "load_sec": 1.0 + scale / 3,
        "run_sec": rows * 20 / speed,
        "completion_tokens": rows * 20,
        "tokens_per_sec": speed,
        "timeline": [[t / 2, size + int(4e8) + 4_000_000 * t, t * speed // 2 + t % 3] for t in range(40)],
        "memory": {
            "footprint_bytes": size,
            "weight_bytes": parts,
            "quantization_state_bytes": int(2e6),
            "load_peak": peak,
            "run_peak": peak,
            "predicted": {"footprint_bytes": size, "run_peak_bytes": size + int(5.7e8)},
        },
        "engine": {"peak_kv_cache_bytes": int(3e7)},
        "rows": {"total": rows, "done": rows, "errors": 0, "done_before": 0},
    }


def scores(kl: float) -> dict:
    def around(value):
        return {"value": value, "low": value * 0.9, "high": value * 1.1}

    return {"baseline": "x", "tokens": 100, "nll": around(1.0), "perplexity": around(2.7 + kl), "kl": around(kl),
            "top1": {"value": 1 - kl, "low": 0.99 - kl, "high": 1.0}}  # fmt: skip


def many_rows(count: int, quant: str, words: int = 60):
    """Answers of which some differ from job to job."""
    for index in range(count):
        same = random.Random(index)
        said = same.choices(WORDS, k=same.randrange(5, 2 * words))
        own = random.Random(f"{index} {quant}")
        if quant != "fp32" and own.random() < 0.6:
            cut = own.randrange(len(said))
            said = said[:cut] + own.choices(WORDS, k=own.randrange(1, words))
        error = "out of memory: shorten the prompt" if index % 997 == 5 else None
        yield answer_row(index, " ".join(said), error=error)


def write_jobs(folder: Path, jobs: int, rows: int) -> Path:
    """A sweep of invented jobs, one of them failed."""
    for number, quant in enumerate(QUANTS[:jobs]):
        job = write_job(folder, quant, many_rows(rows, quant))
        (job / "scores.json").write_text(json.dumps(scores(0.01 * number)))
    return folder


def write_failed(
    folder: Path, quant: str = "int8", model: str = "broken", prompt_set: str = "invented"
) -> Path:
    """A job whose model could not be loaded: a log and a config, and nothing else."""
    job = write_job(folder, quant, [], model=model, prompt_set=prompt_set)
    for name in ("outputs.jsonl", "stats.json", "manifest.json"):
        (job / name).unlink()
    line = "2026-01-01 00:00:00,000 ERROR __main__: ORG/broken: <b>not found</b>. Download it first."
    (job / "pipeline.log").write_text(line + "\n")
    return job


def hostile_rows(quant: str):
    """Answers, ids and prompts that try to run in the page."""
    for index, (name, text) in enumerate(HOSTILE.items()):
        yield answer_row(index, f"{text} {quant}", row_id=f"{name}<b>", prompt=f"Echo {text}")
