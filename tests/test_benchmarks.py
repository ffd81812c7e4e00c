"""The harness that measures our job beside its peers: what it starts dies with it, and its table is not lost."""

import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.engine.cpu import load_kernels

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SPAWN = """
import os, signal, sys
from pathlib import Path
from measure import spawn
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would ignore
spawn(["sleep", "60"], dict(os.environ), Path(sys.argv[1]), 50)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_peer_dies_with_the_harness(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SPAWN, str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=BENCHMARKS, stderr=subprocess.DEVNULL) as harness:
        children: list[psutil.Process] = []
        while not any(child.name() == "sleep" for child in children):
            children = psutil.Process(harness.pid).children()
            time.sleep(0.02)
        os.kill(harness.pid, number)
    gone, alive = psutil.wait_procs(children, 10)
    assert gone
    assert not alive


def test_without_matplotlib_the_table_is_there(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import json, report; from pathlib import Path; from measure import Run\n"
        "made = report.summarize([Run(1.0, 2.0, 3.0, 4, 5, {}, 'x')], None)\n"
        "results = {'machine': 'm', 'dtype': 'bf16', 'model': 'm', 'workloads': {'W': {'description': 'd', "
        "'contenders': {'ours': made}, 'left_out': {}}}}\n"
        "report.write(Path(sys.argv[1]), results); report.plot(Path(sys.argv[1]), results)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=BENCHMARKS
    )
    assert done.returncode == 0, done.stderr
    assert "no plot: matplotlib is not installed" in done.stdout
    assert "| ours |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["machine"] == "m"


def test_a_busy_machine_is_named_while_it_is_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        code = "from measure import wait_until_idle; print(wait_until_idle(1, busy_percent=0.1))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS)
        busy.kill()
    assert "waiting up to 1 s for a quiet machine: " in done.stdout
    assert "(process " in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_step_in_each_precision_is_timed_beside_the_others() -> None:
    kernels = load_kernels()
    if kernels is None or kernels.products is None:
        pytest.skip("the kernels multiply on none but an x86 CPU with AVX2")
    command = [sys.executable, "step.py", "--rows", "3", "--layers", "1", "--vocabulary", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    *_, header, row = done.stdout.splitlines()
    assert header.split() == ["rows", "bf16", "int8", "nf4", "fp32"]
    assert row.split()[0] == "3"
    assert row.count("tokens/s") == 4


def test_a_peer_that_is_not_there_or_fails_is_named_with_what_to_type_or_its_own_log(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prompts, envs = tmp_path / "mine.jsonl", tmp_path / "envs"
    prompts.write_text('{"prompt": "hello"}\n')
    models, python = envs / "llama_cpp" / "models", envs / "llama_cpp" / "bin" / "python"
    models.mkdir(parents=True)
    (models / f"{tiny_folder.name}-q8_0.gguf").touch()
    python.parent.mkdir()
    python.symlink_to(sys.executable)  # and no server beside it
    command = [sys.executable, "run.py", "--model", str(tiny_folder), "--prompts", str(prompts)]
    command += ["--envs", str(envs), "--out", str(tmp_path), "--no-reference", "--avx2"]
    command += ["--idle", "0", "--runs", "1", "--peers", "llama.cpp-q8_0", "llama.cpp-q4_k_m"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    install = f"benchmarks/setup_peers.sh {envs} {tiny_folder} llama_cpp"
    log = tmp_path / "mine" / "llama.cpp-q8_0-0.log"
    assert f"| llama.cpp-q8_0 | failed: ended with status 1; see {log} |" in done.stdout
    assert "llama-server" in log.read_text()
    assert f"| llama.cpp-q4_k_m | not installed: `{install}` |" in done.stdout
    assert "), held to AVX2; bf16; " in done.stdout


def test_who_is_held_to_avx2_is_told_so_in_the_words_of_each_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    contenders = importlib.import_module("contenders")
    env = contenders.environment(None, avx2=True)
    assert env["ATEN_CPU_CAPABILITY"] == "avx2"
    features = env["NUMBA_CPU_FEATURES"].split(",")
    assert not [name for name in features if name.startswith(("+avx512", "+amx", "+avx10"))]
    [q8] = [peer for peer in contenders.PEERS if peer.name == "llama.cpp-q8_0"]
    setting = contenders.Setting(Path("m"), "bf16", Path("envs"), "python", [], avx2=True)
    command = contenders.peer_command(q8, setting, Path("rows"), Path("out"))
    assert "--avx2" in command
    assert command[-1] == "envs/llama_cpp/models/m-q8_0.gguf"


ASK = """
#include <cpuid.h>
void ask(unsigned leaf, unsigned *found) { __cpuid_count(leaf, 0, found[0], found[1], found[2], found[3]); }
"""
ASKED = """
import ctypes, json, sys
def ask(library, leaf):
    found = (ctypes.c_uint * 4)()
    ctypes.CDLL(library).ask(leaf, found)
    return list(found)
ctypes.CDLL(sys.argv[3])
print(json.dumps([[ask(library, leaf) for leaf in (1, 7)] for library in sys.argv[1:3]]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="no other CPU has AVX2")
def test_a_library_that_asks_the_cpu_itself_is_answered_as_by_one_with_avx2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    package, held = tmp_path / "package", tmp_path / "held"
    package.mkdir()
    source, library = tmp_path / "ask.c", package / "libask.so.1"
    source.write_text(ASK)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    importlib.import_module("hold_to_avx2").hold([package], held)
    copy, answer = held / "package" / "libask.so.1", held / "answer.so"
    command = [sys.executable, "-c", ASKED, *map(str, (library, copy, answer))]
    (old, new), (held_old, held_new) = json.loads(subprocess.check_output(command))
    assert held_old[2:] == old[2:]  # AVX, FMA, F16C and what came before
    avx2_and_bmi = 1 << 3 | 1 << 5 | 1 << 8
    assert held_new == [0, new[1] & avx2_and_bmi, 0, 0]


def test_openvino_is_not_held_to_avx2_without_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    contenders = importlib.import_module("contenders")
    [openvino] = [peer for peer in contenders.PEERS if peer.name == "openvino"]
    for name in ("bin/python", "models/m-fp32"):
        (tmp_path / "openvino" / name).mkdir(parents=True)
    plain, avx2 = (
        contenders.Setting(Path("m"), "bf16", tmp_path, "python", [], avx2) for avx2 in (False, True)
    )
    assert contenders.missing(openvino, plain) is None
    assert contenders.missing(openvino, avx2) == f"benchmarks/setup_peers.sh {tmp_path} m openvino"
    (tmp_path / "openvino" / "avx2").mkdir()
    (tmp_path / "openvino" / "avx2" / "answer.so").touch()
    assert contenders.missing(openvino, avx2) is None


def test_our_job_takes_part_in_other_precisions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    contenders = importlib.import_module("contenders")
    setting = contenders.Setting(Path("m"), "bf16", Path("envs"), "python", [], avx2=False)
    quants = {
        name: next(word for word in command if word.startswith("quant="))
        for name in ("ours", "ours int8", "ours nf4", "ours by vllm")
        for command in [contenders.job_command(setting, Path("rows"), [], Path("out"), name)]
    }
    assert list(quants.values()) == ["quant=bf16", "quant=int8", "quant=nf4", "quant=bf16"]
