"""Submit a sweep's missing cells to Slurm as an array, and return at once."""

import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pipeline.common import terminal
from pipeline.common.errors import ConfigError, JobError, LoadError
from pipeline.common.exit_status import ExitStatus
from pipeline.config.schema import SubmitConfig
from pipeline.engine.vllm.python import find_python
from pipeline.job.events import append_event
from pipeline.models.adapter_files import locate_adapter
from pipeline.models.checkpoint import locate
from pipeline.slurm import client as cluster
from pipeline.slurm.cells import Cell, find_cells
from pipeline.slurm.memory import memory_warning, needed_bytes
from pipeline.slurm.script import batch_script, cell_line

SHOWN = 40  # cells in the table; the rest is counted


HELP = """\
  python -m pipeline submit model=phi quant=none,nf4 prompts=big.jsonl shards=8 submit.partition=gpu
  python -m pipeline submit … submit.dry_run=true        the table and the batch script, nothing else
  python -m pipeline status outputs/big watch=true       how far it is
  python -m pipeline merge outputs/big/JOB               shards into one outputs.jsonl
  python -m pipeline submit engine=vllm submit.nodes=2 submit.gpus=4 engine.tensor_parallel=4 \
      engine.pipeline_parallel=2 …                       a model larger than a node, over Ray

One array, a task for each cell that is not complete yet; the same command again submits just what is missing.
Takes what `python -m pipeline -m` takes, and

  shards=8             split the prompt file into 8 cells (or shard=0/8,1/8,… for some of them)
  submit=NAME          conf/submit/NAME.yaml: what a cell gets
  submit.KEY=VALUE     partition, account, qos, time_min, memory, cpus, gpus, nodes, gpu_type, gpu_memory, \
width, signal_sec, options, setup, python, environment, offline, dry_run

More: docs/slurm.md
"""


def main(arguments: list[str]) -> ExitStatus:
    """Plan all cells and submit those that are neither complete nor in the queue.

    Raises:
        PipelineError: nothing was submitted; or, if Slurm refused a later array, the earlier ones were.
    """
    cells, settings = find_cells([argument for argument in arguments if argument not in ("-m", "--multirun")])
    needs = _fetch_and_plan(cells, settings)
    _show(cells, needs)
    for warning in _warnings(cells, needs, settings):
        terminal.say(f"Warning: {warning}", style="yellow")
    missing = [cell for cell in cells if not cell.complete and not cell.task]
    if not missing:
        running = sum(cell.task is not None for cell in cells)
        terminal.say(
            "Nothing to submit: "
            + (f"{terminal.how_many(running, 'cell')} in the queue." if running else "all is done.")
        )
        return ExitStatus.DONE
    home, vllm_python = _submission_folder(missing), _vllm_python(missing, settings)
    if settings.dry_run:
        size = _max_array_size()
        print(_arrays(settings, home, len(missing), size, vllm_python)[0][1], end="")
        arrays = -(-len(missing) // size)
        what = f"{terminal.how_many(len(missing), 'cell')} in {terminal.how_many(arrays, 'array')}"
        terminal.say(f"Dry run: {what}; nothing was submitted or written.")
        return ExitStatus.DONE
    _submit(missing, settings, home, vllm_python)
    return ExitStatus.DONE


def _max_array_size() -> int:
    """Ask this cluster, or take Slurm's default where there is none."""
    try:
        return cluster.max_array_size()
    except JobError:
        return cluster.DEFAULT_ARRAY_SIZE


def _submit(missing: list[Cell], settings: SubmitConfig, home: Path, vllm_python: str | None) -> None:
    # Slurm is asked before anything is written.
    arrays = _arrays(settings, home, len(missing), cluster.max_array_size(), vllm_python)
    home.mkdir(parents=True)
    lines = (cell_line(cell.folder, cell.overrides) for cell in missing)
    (home / "cells.txt").write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))
    for number, (part, text) in enumerate(arrays):
        script = home / f"array-{number}.sbatch"
        script.write_bytes(os.fsencode(text))
        job = cluster.sbatch(script)
        for index, i in enumerate(part):
            cell, log = missing[i], str(home / f"{job}_{index}.log")
            asked = {"total": cell.total, "prompts_sha256": cell.prompts_sha256, "limit": cell.config.limit}
            append_event(cell.folder, "submitted", job=f"{job}_{index}", log=log, **asked)
        terminal.say(f"Submitted job {job}: {terminal.how_many(len(part), 'cell')}.", style="green")
        print(job)
    common = os.path.commonpath([cell.folder for cell in missing])
    watched = Path(common).parent if len(missing) == 1 else Path(common)
    shown = watched.relative_to(Path.cwd()) if watched.is_relative_to(Path.cwd()) else watched
    terminal.say(f"Watch it:  python -m pipeline status {shown} watch=true\nLogs:      {home}")


def _arrays(
    settings: SubmitConfig, home: Path, count: int, size: int, vllm_python: str | None
) -> list[tuple[range, str]]:
    """Part the cells into arrays, each with its script, where Slurm allows no larger. They share the width."""
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    width = settings.width and max(1, settings.width // len(parts))
    script = partial(batch_script, settings, home, Path.cwd(), width=width, vllm_python=vllm_python)
    return [(part, script(offset=part.start, count=len(part))) for part in parts]


def _vllm_python(cells: list[Cell], settings: SubmitConfig) -> str | None:
    """Find the Python that is to start Ray; None where each cell has a node.

    Raises:
        ConfigError: there is none, or cells have different ones.
    """
    if settings.nodes == 1:
        return None
    pythons = sorted({find_python(cell.config.engine.python) for cell in cells})
    if len(pythons) > 1:
        raise ConfigError(
            found=f"engine.python={','.join(pythons)}: Ray is started with one of them",
            fix="Submit them one by one.",
        )
    return pythons[0]


def _submission_folder(missing: list[Cell]) -> Path:
    """Name a folder for the scripts and logs of one submission: outputs/.slurm/<time>-<process>."""
    outputs = Path(missing[0].config.outputs_dir).absolute()
    return outputs / ".slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _fetch_and_plan(cells: list[Cell], settings: SubmitConfig) -> dict[str, int | None]:
    """Get every model once, if the cells are to run offline, and plan each pair of model and quantization.

    Raises:
        LoadError: a model cannot be had.
    """
    needs: dict[str, int | None] = {}
    fetched: set[str] = set()
    for cell in cells:
        name, config = _kind(cell), cell.config
        if cell.complete or name in needs:
            continue
        model = f"{config.model.name} {config.model.revision} {config.model.adapter}"
        if settings.offline and not settings.dry_run and model not in fetched:
            fetched.add(model)
            locate(config.model, config.models_dir, weights=True)
            locate_adapter(config.model, config.models_dir)
        try:
            needs[name] = needed_bytes(config, settings.cell_gpus)
        except (ConfigError, LoadError) as error:  # an architecture that the plan does not know
            terminal.say(f"No memory plan: {error}", style="yellow")
            needs[name] = None
    return needs


def _kind(cell: Cell) -> str:
    """Name what decides a cell's memory: cells of one kind need the same."""
    return f"{cell.config.model.name} {cell.config.model.adapter} {sorted(asdict(cell.config.quant).items(), key=str)}"


def _warnings(cells: list[Cell], needs: dict[str, int | None], settings: SubmitConfig) -> list[str]:
    first = {_kind(cell): cell.config for cell in reversed(cells)}
    found = []
    for kind, need in needs.items():
        quant = first[kind].quant
        name = f"{first[kind].model.name}, quantization {quant.method.value}, dtype {quant.dtype.value}"
        found.append(memory_warning(name, need, settings) if need else None)
    return [warning for warning in found if warning]


def _show(cells: list[Cell], needs: dict[str, int | None]) -> None:
    common = [o for o in cells[0].overrides if all(o in cell.overrides for cell in cells)]
    rows = []
    for cell in cells[:SHOWN]:
        need = needs.get(_kind(cell))
        own = [override for override in cell.overrides if override not in common]
        rows.append((
            " ".join(own) or cell.folder.name,
            f"{cell.counts.done}/{cell.total}",
            _state(cell),
            f"{need / 2**30:.1f} GiB" if need else "-",
        ))  # fmt: skip
    if len(cells) > SHOWN:
        rows.append((f"… and {len(cells) - SHOWN} more", "", "", ""))
    title = terminal.how_many(len(cells), "cell") + (f" of {' '.join(common)}" if common else "")
    terminal.table(title, ("cell", "rows", "state", "needs at least"), rows)


def _state(cell: Cell) -> str:
    if cell.task:
        return f"in the queue ({cell.task})"
    if cell.complete:
        return f"complete, {cell.counts.errors} failed rows" if cell.counts.errors else "complete"
    if not cell.counts.done:
        return "to do"
    changed = cell.counts.todo is not None and not cell.same_prompts
    return "to go on: the prompt file changed" if changed else "to go on"
