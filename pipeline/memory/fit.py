"""Does a job fit in a device's memory, with how many rows, and what would fit? From predicted bytes alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, cycle, islice

from pipeline.common.gpu import Gpu, have_bf16
from pipeline.config.schema import QuantConfig
from pipeline.engine.limits import expected_limits
from pipeline.memory import peaks as peaks
from pipeline.memory import plan as memory
from pipeline.memory.architecture import Architecture
from pipeline.memory.devices import Device
from pipeline.memory.facts import Facts
from pipeline.memory.plan import Quant
from pipeline.prompts.lengths import PromptLengths

FITS, OFFLOAD, TOO_LARGE = "fits", "fits with offload", "does not fit"
SHOWN_ROWS = (1, 8, 32, 128)
MOST_ROWS = 4096  # in flight; no device is faster with more


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine's config says of memory."""

    memory_fraction: float
    prefill_tokens: int
    max_rows: int | None
    max_tokens_in_flight: int | None
    pack_weights: bool = True


def planned(quant: QuantConfig, gpus: Iterable[Gpu], name: str | None = None) -> Quant:
    """A quantization as the plan knows it, on these GPUs or the CPU; by default named as its method."""
    method, dtypes = quant.method.value, (quant.dtype.value, quant.compute_dtype.value)
    return Quant(name or method, method, dtypes[0], quant.double_quant, dtypes[1], have_bf16(gpus))


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt file on one model and one device."""

    model: str
    facts: Facts
    lengths: PromptLengths
    device: Device
    settings: Settings


@dataclass(frozen=True, slots=True)
class Need:
    """What the job takes with this many rows in flight, the longest ones."""

    rows: int
    peak: peaks.RunPeak
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    model: str
    quant: str
    total_bytes: int  # with one row
    rows: int


@dataclass(frozen=True, slots=True)
class Verdict:
    status: str
    rows: int  # in flight at once; more than the file has, if there is room
    all_rows: bool  # the whole prompt file
    budget_bytes: int  # the device's free memory times engine.memory_fraction


@dataclass(frozen=True, slots=True)
class Prompts:
    """A summary of the prompt file. Tokens."""

    counted_by: str
    rows: int
    bad_rows: int
    too_long_rows: int
    completions: int
    longest_prompt_tokens: int
    mean_prompt_tokens: float
    longest_total_tokens: int  # prompt and completion


@dataclass(frozen=True, slots=True)
class Reason:
    """A line of why a quantized model takes more than parameters × bits ÷ 8."""

    what: str
    parameters: int
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is predicted for one model and quantization. JSON has the same fields."""

    model: str
    name: str
    quant: str
    facts_source: str
    facts_differences: tuple[str, ...]
    parameters: int
    parts: tuple[memory.Part, ...]
    footprint_bytes: int
    quant_state_bytes: int
    repacked_state_bytes: int  # 4-bit, once used on a CPU with AVX512-BF16
    simple_bytes: int  # parameters × bits ÷ 8, which is what people work out by hand
    reasons: tuple[Reason, ...]
    kv_bytes_per_token: dict[str, int]  # "full", "window 512"
    prompts: Prompts
    needs: tuple[Need, ...]
    load_peak: peaks.LoadPeak
    device: Device
    verdict: Verdict
    best: Choice | None  # among what fits, the nearest to the checkpoint's own answers


def make_plan(job: Job, quant: Quant, best: Choice | None) -> Plan:
    """The figures for one quantization."""
    arch = job.facts.architecture
    return Plan(
        model=job.model,
        name=job.facts.name,
        quant=quant.name,
        facts_source=job.facts.source,
        facts_differences=job.facts.differences,
        parameters=memory.parameters(arch),
        parts=memory.parts(arch, quant),
        footprint_bytes=memory.footprint_bytes(arch, quant),
        quant_state_bytes=memory.quant_state_bytes(arch, quant),
        repacked_state_bytes=memory.quant_state_bytes(arch, quant, repacked=True),
        simple_bytes=memory.parameters(arch) * _bits(arch, quant) // 8,
        reasons=tuple(_reasons(arch, quant)),
        kv_bytes_per_token={
            "full" if window is None else f"window {window}": size
            for window, size in memory.kv_bytes_per_token(arch, quant).items()
        },
        prompts=_summary(job.lengths),
        needs=tuple(need(job, quant, rows) for rows in SHOWN_ROWS),
        load_peak=peaks.load_peak(arch, quant, gpus=job.device.gpus, packed=job.settings.pack_weights),
        device=job.device,
        verdict=_verdict(job, quant),
        best=best,
    )


def need(job: Job, quant: Quant, rows: int) -> Need:
    """The job's peak with its `rows` longest rows in flight; a shorter prompt file is repeated."""
    samples = list(islice(cycle(job.lengths.samples), rows))
    arch, settings = job.facts.architecture, job.settings
    prompt = max((tokens for tokens, _ in samples), default=0)
    lengths = Counter(sum(sample) for sample in samples)
    ways = expected_limits(len(job.device.gpus))
    groups = ((count, tokens) for tokens, count in lengths.items())
    kv_cache = memory.kv_cache_bytes(arch, quant, groups, limits=ways)
    if ways.cuts_windows:
        kv_cache += _prefill_extra(arch, quant, prompt, len(samples), settings.prefill_tokens)
    peak = peaks.run_peak(
        arch,
        quant,
        kv_cache=kv_cache,
        rows=rows,
        prefill_tokens=min(settings.prefill_tokens, sum(tokens for tokens, _ in samples)),
        columns=prompt,
        sampled=job.lengths.sampled,
        gpus=job.device.gpus,
        packed=settings.pack_weights,
    )
    return Need(rows, peak, peak.total)


def _prefill_extra(arch: Architecture, quant: Quant, prompt: int, rows: int, prefill_tokens: int) -> int:
    """What sliding layers hold beyond their window while a group of the longest prompts is prefilled."""
    group = [(min(rows, max(1, prefill_tokens // max(prompt, 1))), prompt)]
    whole = memory.kv_cache_bytes(arch, quant, group, prefilling=True)
    return whole - memory.kv_cache_bytes(arch, quant, group)


def rows_that_fit(job: Job, quant: Quant, budget_bytes: int) -> int:
    """The most rows whose peak stays within the budget, the longest first; 0 if not even one does."""
    settings = job.settings
    low, high = 0, min(settings.max_rows or MOST_ROWS, MOST_ROWS)
    if settings.max_tokens_in_flight is not None:
        tokens = accumulate(sum(sample) for sample in islice(cycle(job.lengths.samples), high))
        high = max(1, sum(1 for total in tokens if total <= settings.max_tokens_in_flight))
    while low < high:  # a row more never takes less
        middle = (low + high + 1) // 2
        if need(job, quant, middle).total_bytes <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _verdict(job: Job, quant: Quant) -> Verdict:
    budget = int(job.device.free_bytes * job.settings.memory_fraction)
    rows = rows_that_fit(job, quant, budget)
    packed = job.settings.pack_weights
    loads = peaks.load_peak(job.facts.architecture, quant, gpus=job.device.gpus, packed=packed).needed
    if rows > 0 and loads <= job.device.free_bytes:
        return Verdict(FITS, rows, rows >= len(job.lengths.samples), budget)
    status = OFFLOAD if _fits_with_offload(job, quant, budget) else TOO_LARGE
    return Verdict(status, 1 if status == OFFLOAD else 0, False, budget)


def _fits_with_offload(job: Job, quant: Quant, budget: int) -> bool:
    """One module at a time on the device, the rest behind it; bitsandbytes' weights cannot be moved so."""
    if quant.method != "none":
        return False
    arch = job.facts.architecture
    sizes: dict[str, int] = {}
    for weight in memory.weights(arch):
        module = ".".join(weight.name.split(".")[:2])  # a layer, or what stands alone
        sizes[module] = sizes.get(module, 0) + memory.stored(weight, arch, quant)[1]
    total = need(job, quant, 1).total_bytes
    beside = total - memory.footprint_bytes(arch, quant)
    return beside + max(sizes.values()) <= budget and total <= budget + job.device.offload_bytes


def best_choice(job: Job, quants: list[Quant], others: Callable[[], list[Job]]) -> Choice | None:
    """The first of `quants` that fits; else the same on the other models, the largest first.

    Args:
        quants: what comes nearest to the checkpoint's own answers, first.
        others: asked for only when nothing fits on the job's own model.
    """
    for candidate in _candidates(job, others):
        for quant in quants:
            verdict = _verdict(candidate, quant)
            if verdict.status == FITS:
                total = need(candidate, quant, 1).total_bytes
                return Choice(candidate.model, quant.name, total, verdict.rows)
    return None


def _candidates(job: Job, others: Callable[[], list[Job]]) -> Iterator[Job]:
    yield job
    size = memory.parameters(job.facts.architecture)
    smaller = [other for other in others() if memory.parameters(other.facts.architecture) < size]
    yield from sorted(smaller, key=lambda other: -memory.parameters(other.facts.architecture))


def _bits(arch: Architecture, quant: Quant) -> int:
    by_method = {"int8": 8, "nf4": 4, "fp4": 4}
    return by_method.get(quant.method) or 8 * memory.ELEMENT_BYTES[memory.plain_dtype(arch, quant)]


def _reasons(arch: Architecture, quant: Quant) -> Iterator[Reason]:
    """What is quantized, what is not, and what is kept beside it."""
    if quant.method == "none":
        return
    labels = {"embedding": "embedding and output head", "head": "embedding and output head", "norm": "norms"}
    sums: dict[tuple[str, str], list[int]] = {}
    for part in memory.parts(arch, quant):
        quantized = part.dtype == quant.method
        label = "linear layers" if quantized else labels.get(part.part, "biases and buffers")
        entry = sums.setdefault((label, part.dtype), [0, 0])
        entry[0] += part.parameters if part.part != "buffers" else 0
        entry[1] += part.bytes
    for (label, dtype), (count, size) in sums.items():
        yield Reason(label, count, dtype, size)


def _summary(lengths: PromptLengths) -> Prompts:
    prompts = [prompt for prompt, _ in lengths.samples]
    return Prompts(
        counted_by=lengths.counted_by,
        rows=lengths.rows,
        bad_rows=lengths.bad_rows,
        too_long_rows=lengths.too_long_rows,
        completions=len(prompts),
        longest_prompt_tokens=max(prompts, default=0),
        mean_prompt_tokens=sum(prompts) / max(len(prompts), 1),
        longest_total_tokens=max((sum(sample) for sample in lengths.samples), default=0),
    )
