"""Our job and its peers on the same prompts, one after the other, again and again.

    python benchmarks/run.py --model DIR --workload W V --runs 3 --peers all
    python benchmarks/run.py --model DIR --prompts my.jsonl --peers vllm openvino
    python benchmarks/run.py --model DIR --workload W V --avx2 --peers ours "ours int8" llama.cpp-q8_0

Each run is a process of its own; the contenders alternate (A B C A B C …), so that a machine that
becomes slower does so for all of them. Results: table.md, results.json and plot.png in --out.
"""

import argparse
import hashlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from contenders import (
    BY_VLLM,
    HERE,
    OURS,
    PEERS,
    QUANTIZED,
    REFERENCE,
    Contender,
    Setting,
    environment,
    job_command,
    missing,
    peer_command,
)
from measure import Run, measure_job, measure_peer, read_jsonl, spawn, wait_until_idle
from workloads import V_NEW_TOKENS, WORKLOADS, make_rows, write_jsonl

CACHE = HERE / ".cache"


@dataclass(frozen=True)
class Task:
    """A prompt file, and how everybody is to continue it."""

    name: str
    prompts: Path  # as our own job reads it
    generation: list[str]  # arguments of our own job
    tokens: Path  # as the peers read it
    description: str


def arguments() -> argparse.Namespace:
    names = [OURS, *QUANTIZED, *BY_VLLM, *(peer.name for peer in PEERS)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a local model folder")
    parser.add_argument("--workload", nargs="*", choices=sorted(WORKLOADS), default=[])
    parser.add_argument("--rows", type=int, default=128, help="prompts of W and V, at the same mix")
    parser.add_argument("--prompts", type=Path, help="any prompt file, instead of a workload")
    parser.add_argument("--max-new-tokens", type=int, default=V_NEW_TOKENS, help="for --prompts")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["all"], choices=["all", *names])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--avx2", action="store_true", help="hold the contenders to AVX2 (not vllm)")
    parser.add_argument("--envs", type=Path, default=HERE / ".envs", help="the peers' environments")
    parser.add_argument("--python", default=sys.executable, help="runs our own job")
    parser.add_argument("--job-args", nargs="*", default=[], help="further arguments of our own job")
    parser.add_argument("--no-reference", action="store_true", help="do not compare the texts")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run")
    parser.add_argument("--idle", type=float, default=300, help="longest wait for a quiet machine, seconds")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<time>")
    args = parser.parse_args()
    if not args.workload and not args.prompts:
        parser.error("nothing to run: give --workload W V, or --prompts FILE")
    if "all" in args.peers:
        args.peers = names
    return args


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended too
    folder = (args.out or HERE / "results" / time.strftime("%Y%m%d-%H%M%S")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Contenders run in the repository's root. Not resolved, as an environment's python is a link.
    python = str(Path(args.python).absolute()) if "/" in args.python else args.python
    setting = Setting(
        args.model.resolve(), args.dtype, args.envs.absolute(), python, args.job_args, args.avx2
    )
    results: dict[str, Any] = {
        "machine": machine(args.avx2), "dtype": args.dtype, "model": setting.model.name, "workloads": {},
        "command": " ".join(sys.argv),
    }  # fmt: skip
    for task in tasks(args, setting):
        workload = {"description": task.description, "contenders": {}, "left_out": {}}
        results["workloads"][task.name] = workload
        reference = None if args.no_reference else reference_texts(task.tokens, setting, args.timeout)
        for contender, runs in rounds(args, setting, task, folder / task.name, workload["left_out"]):
            workload["contenders"][contender] = report.summarize(runs, reference)
            report.write(folder, results)
    report.write(folder, results)
    print((folder / "table.md").read_text(encoding="utf-8"))
    report.plot(folder, results)
    print(folder)


def tasks(args: argparse.Namespace, setting: Setting) -> list[Task]:
    """The workloads and the prompt file that were asked for, written and tokenized."""
    found = []
    for name in args.workload:
        path = CACHE / f"{name}-{args.rows}.jsonl"
        write_jsonl(path, make_rows(name, args.rows))
        limit, ignore_eos = V_NEW_TOKENS, name == "W"
        found.append(Task(name, path, WORKLOADS[name], *tokenize(path, setting, limit, ignore_eos)))
    if args.prompts:
        path, limit = args.prompts.resolve(), args.max_new_tokens
        generation = ["generation=greedy", f"generation.max_new_tokens={limit}"]
        found.append(Task(path.stem, path, generation, *tokenize(path, setting, limit, False)))
    return found


def tokenize(prompts: Path, setting: Setting, limit: int, ignore_eos: bool) -> tuple[Path, str]:
    """The peers' row file and its token counts, made in another process to keep this one small."""
    tokens = CACHE / f"{prompts.stem}.tokens.jsonl"
    code = (
        "import sys; from pathlib import Path; import workloads as w; "
        "prompts, model, limit, ignore, out = sys.argv[1:]; "
        "rows = w.tokenize(Path(prompts), model, int(limit), ignore == 'True'); "
        "w.write_jsonl(Path(out), rows); print(w.describe(rows))"
    )
    command = [sys.executable, "-c", code, *map(str, (prompts, setting.model, limit, ignore_eos, tokens))]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return tokens, done.stdout.strip()


def rounds(
    args: argparse.Namespace, setting: Setting, task: Task, folder: Path, left_out: dict[str, str]
) -> Iterator[tuple[str, list[Run]]]:
    """Run every contender once a round; yields (name, its runs so far) after each run."""
    folder.mkdir(exist_ok=True)
    peers = {peer.name: peer for peer in PEERS}
    runs: dict[str, list[Run]] = {name: [] for name in args.peers}
    for name in args.peers:
        peer = peers.get("vllm" if name in BY_VLLM else name)
        if peer and (command := missing(peer, setting)):
            left_out[name] = f"not installed: `{command}`"
    for i in range(args.runs):
        for name in [name for name in args.peers if name not in left_out]:
            if not wait_until_idle(args.idle):
                print(f"{name}: the machine is busy; its figures will be too low", flush=True)
            try:
                run = one_run(name, peers.get(name), setting, task, folder / f"{name}-{i}", args.timeout)
            except RuntimeError as error:
                left_out[name] = f"failed: {error}"
                print(f"{task.name} {name}: {error}", flush=True)
                continue
            runs[name].append(run)
            print(
                f"{task.name} {i} {name}: {run.tokens_per_sec:.0f} tokens/s, {run.total_sec:.1f} s in all, "
                f"{run.load_sec:.1f} s loading",
                flush=True,
            )
            yield name, runs[name]


def one_run(
    name: str, peer: Contender | None, setting: Setting, task: Task, out: Path, timeout_sec: float
) -> Run:
    """One process: a peer's, or our own job's where there is no peer."""
    log, env = Path(f"{out}.log"), environment(peer, name, setting.avx2)  # a name may have a dot of its own
    if peer is None:
        command = job_command(setting, task.prompts, task.generation, out, name)
        return measure_job(command, env, out, log, timeout_sec)
    out = Path(f"{out}.jsonl")
    return measure_peer(peer_command(peer, setting, task.tokens, out), env, out, log, timeout_sec)


def reference_texts(tokens: Path, setting: Setting, timeout_sec: float) -> dict[str, str] | None:
    """The float32 texts, made once for these rows and this model, and kept."""
    if command := missing(REFERENCE, setting):
        print(f"texts are not compared, as transformers is not installed: {command}", flush=True)
        return None
    key = hashlib.sha256(f"{setting.model}\n".encode() + tokens.read_bytes()).hexdigest()[:16]
    path, part = CACHE / f"reference-{key}.jsonl", CACHE / f"reference-{key}.part.jsonl"
    if not path.exists():
        print(f"making the reference texts {path}: several minutes, once", flush=True)
        command = peer_command(REFERENCE, setting, tokens, part)
        spawn(command, environment(REFERENCE), part.with_suffix(".log"), 10 * timeout_sec)
        part.rename(path)
    return {str(row["id"]): row["text"] for row in read_jsonl(path)}


def machine(avx2: bool) -> str:
    """Name processor and cores, and what they are held to."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    marks = [mark for mark in ("avx512f", "avx512_bf16", "amx_bf16") if mark in flags]
    held = ", held to AVX2" if avx2 else ""
    return f"{len(names) or '?'} x {names[0] if names else platform.machine()} ({', '.join(marks)}){held}"


if __name__ == "__main__":
    main()
