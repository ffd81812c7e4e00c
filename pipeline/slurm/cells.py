"""Find the cells of a sweep for a cluster: what each one is, where its results lie, how far it is."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import ConfigError, JobError
from pipeline.common.streams import is_stream
from pipeline.common.terminal import how_many, say
from pipeline.config.compose import compose_config, job_folder, sweep_cells, to_config
from pipeline.config.schema import Config, EngineConfig, EngineName, Resume, SubmitConfig
from pipeline.job.counts import Counts, read_counts
from pipeline.job.events import read_events
from pipeline.job.paths import JobPaths
from pipeline.models.checkpoint import fetch_config
from pipeline.prompts.count import PromptCount, count_job
from pipeline.prompts.reader import parse_shard
from pipeline.slurm import client as cluster


@dataclass(frozen=True, slots=True)
class Cell:
    """Hold one job of the sweep: a combination of the overrides, and a shard of it."""

    overrides: list[str]  # for `python -m pipeline`
    folder: Path
    config: Config
    total: int  # completions to make
    counts: Counts
    prompts_sha256: str  # of the prompt file as it is now
    task: str | None  # the Slurm task that has it in hand now, as 12_3

    @property
    def same_prompts(self) -> bool:
        """Say whether what is written answers the prompt file as it is now."""
        todo = self.counts.todo
        return todo is not None and todo.prompts_sha256 == self.prompts_sha256

    @property
    def complete(self) -> bool:
        """Say whether there is nothing that a submission would do."""
        todo = self.counts.todo
        retry = self.config.retry_errors and self.counts.errors > 0
        asked = self.same_prompts and todo is not None and todo.covers(self.config.limit)
        return asked and self.counts.complete and not retry


def find_cells(overrides: list[str]) -> tuple[list[Cell], SubmitConfig]:
    """Find all cells of a command line, and what each is to get of the cluster.

    Raises:
        ConfigError: a key or value is wrong, or makes no sense on a cluster.
        PromptError: a prompt file cannot be read.
        JobError: Slurm is there and does not answer.
    """
    settings = [o for o in overrides if _key(o).startswith("submit")]
    shards = _shards([o for o in overrides if _key(o) in ("shard", "shards")])
    plain = [o for o in overrides if o not in settings and _key(o) not in ("shard", "shards")]
    if any(len(sweep_cells([setting])) > 1 for setting in settings):
        raise ConfigError(
            found="submit.…: takes one value and no sweep",
            fix="Quote a comma: 'submit.partition=\"a,b\"'.",
        )
    submit = to_config(compose_config([*sweep_cells(plain)[0], *settings])).submit
    queue = _queue(submit)
    cells: list[Cell] = []
    for base in sweep_cells(plain):
        config = _checked(to_config(compose_config(base)), submit)
        fetch_config(config.model, config.models_dir)  # the folder's name says the format that it names
        folder = job_folder(base).absolute()
        counted = count_job(config, _number_of(shards))
        for shard in shards:
            cells.append(cell := _cell(base, config, folder, shard, counted, queue))
            if (
                not cell.total and not JobPaths(cell.folder).is_job
            ):  # one that ran before may have no rows left
                raise ConfigError(
                    found=f"shards={len(counted.totals)}: more than the "
                    f"{how_many(sum(map(bool, counted.totals)), 'row')} of {config.prompts}",
                    fix="Use fewer.",
                )
    return cells, submit


def _cell(
    base: list[str],
    config: Config,
    folder: Path,
    shard: str | None,
    counted: PromptCount,
    queue: dict[str, cluster.QueuedTask],
) -> Cell:
    part, parts = parse_shard(shard) if shard else (0, 1)
    if shard:
        folder = JobPaths(folder).shard(part, parts)
    task = read_events(folder).task
    return Cell(
        overrides=[*base, f"shard={shard}"] if shard else base,
        folder=folder,
        config=config,
        total=counted.totals[part],
        counts=read_counts(folder),
        prompts_sha256=counted.sha256,
        task=task if task in queue else None,
    )


def _queue(submit: SubmitConfig) -> dict[str, cluster.QueuedTask]:
    """Ask what is in the queue; a dry run also works where Slurm does not answer."""
    try:
        return cluster.queued()
    except JobError as error:
        if not submit.dry_run:
            raise
        say(f"Warning: cells in the queue are not seen: {error}", style="yellow")
        return {}


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _shards(overrides: list[str]) -> list[str | None]:
    """Read `shards=4` or `shard=0/4,1/4,2/4,3/4`, which mean the same.

    Raises:
        ConfigError: neither, or both, or shards of different splits.
    """
    if not overrides:
        return [None]
    key, _, value = overrides[0].partition("=")
    if len(overrides) > 1:
        raise ConfigError(
            found=f"{' '.join(overrides)}: says twice how to split", fix="Give shards=N or shard=I/N,… once."
        )
    if key == "shards":
        if not value.isdecimal() or not 1 <= int(value) < 10**6:
            raise ConfigError(
                found=f"shards={value}: must be a whole number of at least 1",
                fix="Leave it out for one cell without shards.",
            )
        return [f"{i}/{value}" for i in range(int(value))]
    if value == "null":
        return [None]
    shards = [part.strip() for part in value.split(",")]
    if len({parse_shard(shard)[1] for shard in shards}) > 1:
        raise ConfigError(
            found=f"shard={value}: these are shards of different splits, and cannot be merged",
            fix="Give all of them the same number after the slash.",
        )
    return list(dict.fromkeys(shards))


def _number_of(shards: Iterable[str | None]) -> int:
    return next((parse_shard(shard)[1] for shard in shards if shard), 1)


def _checked(config: Config, submit: SubmitConfig) -> Config:
    if is_stream(config.prompts):
        raise ConfigError(
            found=f"prompts={config.prompts}: a cluster's node cannot read what comes here and only once",
            fix="Write the prompts to a file.",
        )
    if config.devices is not None:
        raise ConfigError(
            found=f"devices={config.devices}: a cell of a cluster is one process",
            fix="Use shards=N, with submit.gpus=1.",
        )
    if config.resume is Resume.never:
        raise ConfigError(
            found="resume=never: a cell that is requeued would begin anew each time",
            fix="Move the old folder away, or set another prompt_set=…",
        )
    if submit.nodes > 1:
        _check_nodes(config.engine, submit)
    return config


def _check_nodes(engine: EngineConfig, submit: SubmitConfig) -> None:
    if engine.name is not EngineName.vllm:
        raise ConfigError(
            found=f"submit.nodes={submit.nodes} engine={engine.name.value}: one job over several nodes needs "
            "engine=vllm",
            fix="Add engine=vllm, or use shards=N, each with a node of its own.",
        )
    if engine.ranks != submit.cell_gpus:
        raise ConfigError(
            found=f"submit.nodes={submit.nodes} submit.gpus={submit.gpus}: {submit.cell_gpus} GPUs, and "
            f"engine.tensor_parallel={engine.tensor_parallel} "
            f"engine.pipeline_parallel={engine.pipeline_parallel} share a model among {engine.ranks}",
            fix=f"Make them equal, as engine.tensor_parallel={submit.gpus or 1} "
            f"engine.pipeline_parallel={submit.nodes} with submit.gpus={submit.gpus or 1}.",
        )
