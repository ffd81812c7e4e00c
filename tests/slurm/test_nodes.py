"""One job on two nodes of a real Slurm: Ray between them, the real vLLM over it."""

import contextlib
import json
import subprocess
from pathlib import Path

import psutil
import pytest
import transformers
from conftest import SMALL as SIZES
from conftest import tiny_tokenizer
from slurm_cluster import SMALL, Place, until, write_prompts

from pipeline.engine.vllm.python import find_python
from pipeline.job.paths import JobPaths
from pipeline.job.stored import read_manifest

# vLLM for a CPU refuses Ray, which places processes by GPUs. This calls its cores so, and changes nothing else.
PLATFORM = {
    "ray_on_cpu.py": """
def plugin():
    return "ray_on_cpu_platform.RayOnCpu"
""",
    "ray_on_cpu_platform.py": """
from vllm.platforms.cpu import CpuPlatform

class RayOnCpu(CpuPlatform):
    ray_device_key = "GPU"
""",
    "ray_on_cpu-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: ray-on-cpu\nVersion: 0\n",
    "ray_on_cpu-0.dist-info/entry_points.txt": "[vllm.platform_plugins]\nray_on_cpu = ray_on_cpu:plugin\n",
}


@pytest.fixture
def vllm_over_ray(tmp_path: Path) -> Path:
    """A Python that has what vLLM's environment has, and the above."""

    def run(*command: str | Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    asks = ("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    theirs, own = find_python(None), tmp_path / "vllm"
    run(theirs, "-m", "venv", "--without-pip", own)
    python = own / "bin" / "python"
    packages = Path(run(python, *asks))
    (packages / "vllm.pth").write_text(run(theirs, *asks))
    for name, text in PLATFORM.items():
        (packages / name).parent.mkdir(exist_ok=True)
        (packages / name).write_text(text)
    return python


def started_from(folder: Path) -> list[tuple[str, str]]:
    """The processes of a job's Ray: the name of each, and the node that it runs on."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("vllm_python", "").startswith(str(folder)):
                found.append((process.name(), environment.get("SLURMD_NODENAME", "")))
    return found


def test_two_nodes_work_on_one_job_over_ray_and_all_of_it_ends_with_the_job(
    place: Place, vllm_over_ray: Path
) -> None:
    model = place.folder / "models" / "wide"
    config = transformers.LlamaConfig(**SIZES, head_dim=32)  # the least that vLLM has a kernel for on a CPU
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    write_prompts(place.folder / "both.jsonl", 5)
    with (place.folder / "both.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "x " * 100}) + "\n")  # the model has room for it
    job = (
        f"model.name={model}", "prompts=both.jsonl", "quant=fp32", "generation.max_new_tokens=8",
        "engine=vllm", f"engine.python={vllm_over_ray}", "engine.extra={enforce_eager:true}",
        "engine.max_rows=2", "engine.max_model_len=128", "engine.tensor_parallel=2",
        *SMALL, "submit.gpus=1", "submit.nodes=2",
    )  # fmt: skip

    first = place.submit(*job)
    (log,) = (path / f"{first}_0.log" for path in place.folder.glob("outputs/.slurm/*"))
    until(lambda: log.is_file() and "Ray is up on 2 nodes" in log.read_text(), "Ray")
    nodes = sorted(node for name, node in started_from(place.folder) if name == "raylet")
    assert nodes == ["n1", "n2"]
    place.run("scancel", f"{first}_0")
    place.wait_until_idle()
    until(lambda: not started_from(place.folder), "all of a cancelled job to end")

    place.submit(*job)
    place.wait_until_idle()
    (folder,) = place.folders("both")
    assert place.state(folder) == "complete, 1 failed rows"
    rows = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(6))
    (refused,) = (row for row in rows if row["error"] is not None)
    assert "the engine has room for rows of 128. Shorten the prompt, or make room" in refused["error"]
    assert "model.context" not in refused["error"]
    assert all(row["usage"]["completion_tokens"] for row in rows if row is not refused)
    engine = read_manifest(JobPaths(folder))["engine"]
    assert engine["arguments"]["distributed_executor_backend"] == "ray"
    assert any("Ray" in difference for difference in engine["differs"])
    said = (folder / "engine.log").read_text()
    assert "TP1" in said
    assert started_from(place.folder) == []
    assert not list(Path("/tmp").glob("ray-*"))
