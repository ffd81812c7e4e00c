"""The cells of a sweep for a cluster: what each one is, where its results lie, how far it is, what it needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.common.errors import ConfigError, JobError
from pipeline.common.gpu import Gpu
from pipeline.common.request import GenerationParams
from pipeline.common.terminal import say
from pipeline.config.compose import compose_config, job_folder, sweep_cells, to_config
from pipeline.config.quant import settle_dtypes
from pipeline.config.schema import Config, Resume, SubmitConfig, root
from pipeline.job.counts import Standing, read_events, read_standing
from pipeline.memory.facts import find_facts
from pipeline.memory.peaks import load_peak
from pipeline.memory.plan import kv_bytes_per_token
from pipeline.prompts.count import count_prompts
from pipeline.prompts.reader import find_prompts, parse_shard
from pipeline.slurm import client as cluster

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # Slurm's; without a letter it means M
PYTHON_BYTES = 2**30  # resident before any weight: Python, torch and transformers, rounded up


@dataclass(frozen=True, slots=True)
class Cell:
    """One job of the sweep: a combination of the overrides, and a shard of it."""

    overrides: list[str]  # for `python -m pipeline`
    folder: Path
    config: Config
    total: int  # completions to make
    standing: Standing
    prompts_sha256: str  # of the prompt file as it is now
    task: str | None  # the Slurm task that has it in hand now, as 12_3

    @property
    def same_prompts(self) -> bool:
        """Say whether what is written answers the prompt file as it is now."""
        todo = self.standing.todo
        return todo is not None and todo.prompts_sha256 == self.prompts_sha256

    @property
    def complete(self) -> bool:
        todo = self.standing.todo
        retry = self.config.retry_errors and self.standing.errors > 0
        asked = self.same_prompts and todo is not None and todo.covers(self.config.limit)
        return asked and self.standing.complete and not retry


def find_cells(overrides: list[str]) -> tuple[list[Cell], SubmitConfig]:
    """All cells of a command line, and what each is to get of the cluster.

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
            "submit.…: takes one value and no sweep. Quote a comma: 'submit.partition=\"a,b\"'."
        )
    submit = to_config(compose_config([*sweep_cells(plain)[0], *settings])).submit
    queue = _queue(submit)
    cells: list[Cell] = []
    for base in sweep_cells(plain):
        config = _checked(to_config(compose_config(base)))
        folder = job_folder(base).absolute()
        totals, sha256 = _count(config, _number_of(shards))
        if not all(totals):
            raise ConfigError(
                f"shards={len(totals)}: more than the {sum(map(bool, totals))} rows of {config.prompts}. Use fewer."
            )
        for shard in shards:
            cells.append(_cell(base, config, folder, shard, totals, sha256, queue))
    return cells, submit


def needed_bytes(config: Config, gpus: int) -> int:
    """Predict the least memory that a cell can run in: its weights as it loads them, and one row.

    That is of the GPUs together, or without one of the host.

    Raises:
        ConfigError: the memory plan does not know the model.
    """
    arch = find_facts(config.model, config.models_dir).architecture
    cards = (Gpu("cuda", "a GPU of the cluster"),) * gpus
    quant = settle_dtypes(config.quant, arch.dtype, cards)
    row = sum(kv_bytes_per_token(arch, quant).values()) * config.generation.max_new_tokens
    return load_peak(arch, quant, gpus=cards).needed + row + (0 if gpus else PYTHON_BYTES)


def memory_warning(name: str, need: int, submit: SubmitConfig) -> str | None:
    """What to say before a cell is queued that cannot fit."""
    asked = submit.gpu_memory if submit.gpus else submit.memory
    if asked is None:
        return None
    size = parse_size(asked) * (submit.gpus or 1)
    if need <= size:
        return None
    where = f"{submit.gpus} × submit.gpu_memory={asked}" if submit.gpus else f"submit.memory={asked}"
    return (
        f"{name}: needs at least {need / 2**30:.1f} GiB, and {where} is less. "
        "Ask for more, or choose a smaller quantization (quant=nf4) or model."
    )


def parse_size(text: str) -> int:
    """Bytes of a size as Slurm writes it, 32G; a bare number is MiB."""
    unit = text[-1]
    return int(text[:-1]) * UNITS[unit] if unit in UNITS else int(text) * UNITS["M"]


def _cell(
    base: list[str],
    config: Config,
    folder: Path,
    shard: str | None,
    totals: tuple[int, ...],
    sha256: str,
    queue: dict[str, cluster.QueuedTask],
) -> Cell:
    part, parts = parse_shard(shard) if shard else (0, 1)
    if shard:
        folder = folder / f"shard-{part}-of-{parts}"
    job = read_events(folder).job
    return Cell(
        overrides=[*base, f"shard={shard}"] if shard else base,
        folder=folder,
        config=config,
        total=totals[part],
        standing=read_standing(folder),
        prompts_sha256=sha256,
        task=job if job in queue else None,
    )


def _queue(submit: SubmitConfig) -> dict[str, cluster.QueuedTask]:
    """What is in the queue; a dry run also works where Slurm does not answer."""
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
    """`shards=4` and `shard=0/4,1/4,2/4,3/4` mean the same.

    Raises:
        ConfigError: neither, or both, or shards of different splits.
    """
    if not overrides:
        return [None]
    key, _, value = overrides[0].partition("=")
    if len(overrides) > 1:
        raise ConfigError(f"{' '.join(overrides)}: give shards=N or shard=I/N,… once.")
    if key == "shards":
        if not value.isdecimal() or not 1 <= int(value) < 10**6:
            raise ConfigError(f"shards={value}: must be a whole number of at least 1.")
        return [f"{i}/{value}" for i in range(int(value))]
    if value == "null":
        return [None]
    shards = [part.strip() for part in value.split(",")]
    if len({parse_shard(shard)[1] for shard in shards}) > 1:
        raise ConfigError(f"shard={value}: these are shards of different splits, and cannot be merged.")
    return list(dict.fromkeys(shards))


def _number_of(shards: Iterable[str | None]) -> int:
    return next((parse_shard(shard)[1] for shard in shards if shard), 1)


def _checked(config: Config) -> Config:
    if config.prompts == "-":
        raise ConfigError(
            "prompts=-: a cluster's node cannot read this terminal. Write the prompts to a file."
        )
    if config.resume is Resume.never:
        raise ConfigError(
            "resume=never: a cell that is requeued would begin anew each time. Move the old folder away, "
            "or set another prompt_set=…"
        )
    return config


def _count(config: Config, shards: int) -> tuple[tuple[int, ...], str]:
    generation = config.generation
    return _count_once(
        find_prompts(config.prompts, root() / "jobs"), generation.n, config.prompt_field, config.limit, shards
    )


@cache
def _count_once(
    path: str, n: int, prompt_field: str, limit: int | None, shards: int
) -> tuple[tuple[int, ...], str]:
    counted = count_prompts(
        path, GenerationParams(n=n), prompt_field=prompt_field, limit=limit, shards=shards
    )
    return counted.totals, counted.sha256
