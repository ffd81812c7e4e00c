"""Run small jobs of every kind twice, on the CPU and on the GPU, and compare their rows: the same text in float32.

    python benchmarks/gpu_features.py --out DIR                # on a GPU
    python benchmarks/gpu_features.py --device cpu --out DIR   # a rehearsal

Needs no network: models are small and random. Each job is a process of its own, --workers of them at once.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "ages"],
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
WORDS = ("tell", "a", "joke", "about", "rivers", "and", "old", "newspapers", "that", "nobody", "reads")


@dataclass(frozen=True)
class Case:
    """One job's own part of the command."""

    model: str = "llama"
    own: tuple[str, ...] = ()
    exact: bool = True  # float32, whose text is the same on both
    prompts: str = "plain"
    killed: bool = False  # when it has written its first rows, and then begun again
    status: int = 0


DRAWN = ("generation.temperature=0.9",)
CASES = {
    "greedy": Case(),
    "sampled": Case(own=(*DRAWN, "generation.top_p=0.9", "generation.n=2", "generation.logprobs=2")),
    "penalty": Case(own=(*DRAWN, "generation.repetition_penalty=1.3", "generation.top_k=20")),
    "stop": Case(own=('generation.stop=["e","a"]',)),
    "schema": Case(own=("generation.json_schema={schema}", "generation.max_new_tokens=80")),
    "schema, sampled": Case(own=(*DRAWN, "generation.json_schema={schema}", "generation.n=2")),
    "regex": Case(own=('generation.regex="[a-z]{{3,9}} [0-9]+"',)),
    "labels": Case(own=('generation.choice=["yes","no","none of them"]', "generation.label_logprobs=true")),
    "shots": Case(own=("examples={plain}", "shots=3")),
    "prefixes": Case(prompts="prefixes"),
    "tools": Case(prompts="tools", status=1),  # the template takes none
    "killed": Case(prompts="many", killed=True, own=("generation.max_new_tokens=100",)),
    "devices": Case(own=("devices=all",), prompts="many"),
    "adapter": Case(own=("model.adapter={adapter}",)),
    "adapter, nf4": Case(own=("model.adapter={adapter}", "quant=nf4"), exact=False),
    "bf16": Case(own=("quant=bf16",), exact=False),
    "fp16": Case(own=("quant=fp16",), exact=False),
    "int8": Case(own=("quant=int8",), exact=False),
    "int8, plain": Case(own=("quant=int8", "engine.attention=plain"), exact=False),
    "nf4": Case(own=("quant=nf4",), exact=False),
    "fp4": Case(own=("quant=fp4",), exact=False),
    "nf4 checkpoint": Case("nf4", own=("quant=none",), exact=False),
    "int8 checkpoint": Case("int8", own=("quant=none",), exact=False),
    "fp8 checkpoint": Case("fp8", own=("quant=none",), exact=False),
    "fp8 to bf16": Case("fp8", own=("quant=bf16",), exact=False),
    "mamba2": Case("mamba2"),
    "falcon_h1": Case("falcon_h1"),
    "qwen3_moe": Case("qwen3_moe"),
    "mixtral": Case("mixtral"),
    "mixtral, nf4": Case("mixtral", own=("quant=nf4",), exact=False),
    "gemma3_text": Case("gemma3_text"),
    "deepseek_v3": Case("deepseek_v3"),
    "qwen3, rectangles": Case("qwen3", own=("engine.attention=rectangles",)),
}  # fmt: skip


def configs() -> dict[str, Any]:
    """Small shapes whose layers fill whole blocks of every quantization."""
    base = {
        "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 4096,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    experts = {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    }
    states = {
        "state_size": 16,
        "mamba_d_state": 16,
        "mamba_d_ssm": 512,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "num_heads": 8,
    }
    kinds: dict[str, dict[str, Any]] = {
        "llama": {}, "qwen3": {}, "gemma3_text": {"sliding_window": 64, "tie_word_embeddings": False},
        "qwen3_moe": experts, "mixtral": experts,
        "mamba2": {**states, "n_groups": 1, "expand": 2}, "falcon_h1": states,
        "deepseek_v3": {
            **experts, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
            "v_head_dim": 32, "num_key_value_heads": 4, "head_dim": 16,
        },
    }  # fmt: skip
    make = transformers.AutoConfig.for_model
    return {kind: make(kind, **{**base, **more}) for kind, more in kinds.items()}


def make_models(work: Path, tokenizer: Path, device: str, wanted: set[str]) -> dict[str, str]:
    """Write the models that are wanted, and the one that some are made of; say what became of those that fail."""
    said: dict[str, str] = {}

    def save(name: str, made: Callable[[], Any]) -> None:
        folder = work / name
        if name not in wanted:
            return
        try:
            made().save_pretrained(folder)
        except Exception as error:  # noqa: BLE001  a model that cannot be made is a finding
            said[name] = f"{type(error).__name__}: {error}"[:300]
            return
        for file in tokenizer.iterdir():
            if "token" in file.name or file.name.startswith("chat_template"):
                shutil.copy(file, folder)

    for kind, config in configs().items():
        torch.manual_seed(0)
        save(
            kind,
            lambda config=config: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
        )
    ways = {
        "nf4": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        "int8": transformers.BitsAndBytesConfig(load_in_8bit=True),
        "fp8": transformers.FineGrainedFP8Config(),
    }  # fmt: skip
    for name, way in ways.items():
        save(
            name,
            lambda way=way: transformers.AutoModelForCausalLM.from_pretrained(
                work / "llama", quantization_config=way, device_map=device, dtype=torch.bfloat16
            ),
        )

    def adapted() -> Any:
        import peft

        model = transformers.AutoModelForCausalLM.from_pretrained(work / "llama")
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
        )
        return wrapped

    save("adapter", adapted)
    return said


def make_prompts(work: Path) -> None:
    draw = random.Random(3)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def user() -> dict[str, str]:
        return {"role": "user", "content": text(3, 20)}

    systems = [text(60, 90) for _ in range(4)]
    files: dict[str, list[dict[str, Any]]] = {
        "plain": [{"id": f"p{i}", "prompt": text(3, 60), "reference": text(1, 5)} for i in range(12)],
        "many": [{"id": f"p{i}", "prompt": text(3, 60)} for i in range(160)],
        "prefixes": [
            {"id": f"p{i}", "messages": [{"role": "system", "content": systems[i % 4]}, user()]} for i in range(24)
        ],
        "tools": [{"id": f"p{i}", "tools": [TOOL], "messages": [user()]} for i in range(6)],
    }  # fmt: skip
    for name, rows in files.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (work / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")


def run_case(work: Path, name: str, case: Case, device: str, label: str) -> dict[str, Any]:
    """Run one job. Returns its rows' texts, or what it said."""
    out = work / "out" / name.replace(", ", "-").replace(" ", "-") / label
    places = {p.stem: str(p) for p in work.glob("*.json*")} | {"adapter": str(work / "adapter")}
    command = [
        sys.executable, "-m", "pipeline", "model=llama", f"model.name={work / case.model}", "quant=fp32",
        f"prompts={work / f'{case.prompts}.jsonl'}", f"outputs_dir={out}", "generation.max_new_tokens=24",
        f"model.device_map={device}", *(part.format(**places) for part in case.own),
    ]  # fmt: skip
    if "devices=all" in command:
        whose = f"model.device_map={device}"
        command.remove("devices=all" if device == "cpu" else whose)
        command += ["devices=2"] if device == "cpu" else []
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    started = time.perf_counter()
    if case.killed:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while job.poll() is None and not any(f.stat().st_size for f in out.rglob("outputs.jsonl")):
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        job.wait()
    made = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    whole = [f.parent for f in out.rglob("outputs.jsonl") if not f.parent.name.startswith("shard-")]
    rows = [
        json.loads(line) for folder in whole for line in (folder / "outputs.jsonl").read_text().splitlines()
    ]
    found: dict[str, Any] = {
        "exit_status": made.returncode,
        "sec": time.perf_counter() - started,
        "rows": len(rows),
    }
    if made.returncode:
        found["says"] = (made.stdout + made.stderr)[-700:]
    stats = next(out.rglob("stats.json"), None)
    memory = stats and json.loads(stats.read_text())["memory"]
    found["run_peak_mb"] = memory and [
        (memory[k]["run_peak_bytes"] or 0) / 1e6 for k in ("predicted", "measured")
    ]
    manifest = next(out.rglob("manifest.json"), None)
    found["attention"] = manifest and json.loads(manifest.read_text()).get("attention")
    found["texts"] = {
        f"{row['id']}/{row.get('sample', 0)}": row.get("error") or row.get("label_logprobs") or row["completion"]
        for row in rows
    }  # fmt: skip
    return found


def alike(a: Any, b: Any) -> bool:
    """Compare texts; and log-probabilities of choices to what float32 gives."""
    if isinstance(a, list) and isinstance(b, list):
        return all(
            x["choice"] == y["choice"] and abs(x["logprob"] - y["logprob"]) < 2e-3
            for x, y in zip(a, b, strict=True)
        )
    return bool(a == b)


def compare(case: Case, cpu: dict[str, Any], gpu: dict[str, Any]) -> dict[str, Any]:
    """Say how many rows are the same, and what was said where one failed."""
    theirs, ours = cpu.pop("texts"), gpu.pop("texts")
    same = sum(alike(theirs.get(key), text) for key, text in ours.items())
    whole = gpu["exit_status"] == case.status and set(ours) == set(theirs) and gpu["rows"] == len(ours)
    found = {
        "ok": whole and (same == len(ours) or not case.exact),
        "same": f"{same}/{len(theirs)}",
        "gpu": gpu,
        "cpu": cpu,
    }
    different = next((key for key, text in ours.items() if not alike(theirs.get(key), text)), None)
    if case.exact and different:
        found["differs"] = {
            "row": different,
            "cpu": str(theirs.get(different))[:200],
            "gpu": str(ours[different])[:200],
        }
    return found


def main() -> int:
    """Run all cases on both. Returns 1 if rows differ that must not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    work = Path("/dev/shm" if arguments.device != "cpu" else arguments.out).resolve() / "gpu_features"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started = time.perf_counter()
    make_prompts(work)
    wanted = {CASES[name].model for name in arguments.cases} | {"llama", "adapter"}
    failed = make_models(work, arguments.tokenizer, arguments.device, wanted)
    print(f"models: {time.perf_counter() - started:.1f} s {failed}", flush=True)
    results: dict[str, Any] = {"not made": failed}
    with ThreadPoolExecutor(arguments.workers) as pool:
        jobs = {
            (name, label): pool.submit(run_case, work, name, CASES[name], device, label)
            for name in arguments.cases
            for label, device in (("gpu", arguments.device), ("cpu", "cpu"))
        }
        for name in arguments.cases:
            try:
                results[name] = compare(
                    CASES[name], *(jobs[name, label].result() for label in ("cpu", "gpu"))
                )
            except Exception as error:  # noqa: BLE001  a job that hangs is a finding
                results[name] = {"ok": False, "says": f"{type(error).__name__}: {error}"[:300]}
            found = results[name]
            print(
                f"{'ok  ' if found['ok'] else 'NOT '} {name:20} {found.get('same')} {json.dumps(found)[:900]}",
                flush=True,
            )
            (arguments.out / "gpu_features.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(
        f"{time.perf_counter() - started:.1f} s; not ok: {[n for n, f in results.items() if f.get('ok') is False]}"
    )
    shutil.rmtree(work, ignore_errors=True)
    return int(any(found.get("ok") is False for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
