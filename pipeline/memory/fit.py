"""Decide whether a job fits in a device's memory, with how many rows, and what would fit, from predicted bytes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, islice

from pipeline.config.quant import STORED_BITS, QuantConfig
from pipeline.config.stored_format import is_label, label_bits
from pipeline.engine.limits import expected_limits
from pipeline.memory import peaks, plan
from pipeline.memory.architecture import Architecture
from pipeline.memory.devices import Device
from pipeline.memory.facts import Facts
from pipeline.prompts.lengths import PromptLengths

FITS, OFFLOAD, TOO_LARGE = "fits", "fits with offload", "does not fit"
SHOWN_ROWS = (1, 8, 32, 128)
MOST_ROWS = 4096  # in flight; no device is faster with more


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what the engine's config says of memory."""

    memory_fraction: float
    prefill_tokens: int
    max_rows: int | None
    max_tokens_in_flight: int | None
    pack_weights: bool = True


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt file on one model and one device, to be planned."""

    model: str
    facts: Facts
    lengths: PromptLengths
    device: Device
    settings: Settings

    def loaded(self, quant: QuantConfig) -> tuple["Workload", QuantConfig, str | None]:
        """Plan for what it is once loaded as asked on this device; a format that it came in is named."""
        arch, settled, stored = self.facts.loaded(quant, self.device.gpus)
        return replace(self, facts=replace(self.facts, architecture=arch)), settled, stored


@dataclass(frozen=True, slots=True)
class Need:
    """Say what the job takes with this many rows in flight, the longest ones."""

    rows: int
    peak: peaks.RunPeak
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Name what would fit."""

    model: str
    quant: str
    total_bytes: int  # with one row
    rows: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Say whether it fits, and with how much in flight."""

    status: str
    rows: int  # in flight at once; more than the file has, if there is room
    all_rows: bool  # the whole prompt file
    budget_bytes: int  # the device's free memory times engine.memory_fraction


@dataclass(frozen=True, slots=True)
class Prompts:
    """Sum up the prompt file. Tokens."""

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
    """Give one line of why a quantized model takes more than parameters × bits ÷ 8."""

    what: str
    parameters: int
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold all that is predicted for one model and quantization. JSON has the same fields."""

    model: str
    name: str
    quant: str
    facts_source: str
    facts_differences: tuple[str, ...]
    estimated: str | None  # what of the counts is none, and why
    refused: str | None  # why a job would be
    parameters: int
    parts: tuple[plan.Part, ...]
    footprint_bytes: int
    quant_state_bytes: int
    repacked_state_bytes: int  # 4-bit, once used on a CPU with AVX512-BF16
    quantized_share: float | None  # of the parameters; None where nothing is to be
    simple_bytes: int  # parameters × bits ÷ 8, which is what people work out by hand
    reasons: tuple[Reason, ...]
    kv_bytes_per_token: dict[str, int]  # "full", "window 512"
    row_state_bytes: int  # beside them, whatever a row's length
    prompts: Prompts
    needs: tuple[Need, ...]
    load_peak: peaks.LoadPeak
    device: Device
    verdict: Verdict
    best: Choice | None  # among what fits, the nearest to the checkpoint's own answers


def make_plan(workload: Workload, name: str, quant: QuantConfig, best: Choice | None) -> Plan:
    """Predict all figures for one quantization, called by this name."""
    asked = quant
    workload, quant, stored = workload.loaded(asked)
    arch = workload.facts.architecture
    return Plan(
        model=workload.model,
        name=workload.facts.name,
        quant=stored if stored and not asked.quantized else name,
        facts_source=workload.facts.source,
        facts_differences=workload.facts.differences,
        estimated=arch.counted.note if arch.counted else None,
        refused=_refused(workload, asked),
        parameters=plan.parameters(arch),
        parts=plan.parts(arch, quant),
        footprint_bytes=plan.footprint_bytes(arch, quant),
        quant_state_bytes=plan.quant_state_bytes(arch, quant),
        repacked_state_bytes=plan.quant_state_bytes(arch, quant, repacked=True),
        quantized_share=plan.quantized_share(arch) if quant.quantized else None,
        simple_bytes=int(plan.parameters(arch) * _bits(arch, quant, stored) / 8),
        reasons=tuple(_reasons(arch, quant)),
        kv_bytes_per_token={
            "full" if window is None else f"window {window}": size
            for window, size in plan.kv_bytes_per_token(arch, quant).items()
        },
        row_state_bytes=plan.row_state_bytes(arch, quant),
        prompts=_summary(workload.lengths),
        needs=tuple(need(workload, quant, rows) for rows in SHOWN_ROWS),
        load_peak=peaks.load_peak(
            arch, quant, gpus=workload.device.gpus, packed=workload.settings.pack_weights
        ),
        device=workload.device,
        verdict=_verdict(workload, quant),
        best=best,
    )


def _refused(workload: Workload, quant: QuantConfig) -> str | None:
    """Say why a job would be refused as asked, whatever the memory; None if it would not."""
    arch, stored = workload.facts.architecture, workload.facts.stored
    if stored is not None:
        if (refusal := stored.refusal(quant)) is not None:
            return refusal
    elif quant.quantized and plan.quantized_share(arch) == 0:
        return f"quant={quant.method.value} quantizes none of its weights"
    if arch.counted is not None and arch.counted.refused is not None:
        return arch.counted.refused
    return None


def need(workload: Workload, quant: QuantConfig, rows: int) -> Need:
    """Predict the peak with its `rows` longest rows in flight; a shorter prompt file is repeated."""
    samples = list(islice(cycle(workload.lengths.samples), rows))
    arch, settings = workload.facts.architecture, workload.settings
    prompt = max((tokens for tokens, _ in samples), default=0)
    lengths = Counter(sum(sample) for sample in samples)
    ways = expected_limits(len(workload.device.gpus), own_cache=arch.own_cache)
    groups = ((count, tokens) for tokens, count in lengths.items())
    kv_cache = plan.kv_cache_bytes(arch, quant, groups, limits=ways)
    if ways.cuts_windows and not arch.own_cache:
        kv_cache += _prefill_extra(arch, quant, prompt, len(samples), settings.prefill_tokens)
    peak = peaks.run_peak(
        arch,
        quant,
        kv_cache=kv_cache,
        rows=rows,
        prefill_tokens=min(settings.prefill_tokens, sum(tokens for tokens, _ in samples)),
        columns=prompt,
        copies_logits=workload.lengths.copies_logits,
        gpus=workload.device.gpus,
        packed=settings.pack_weights,
    )
    return Need(rows, peak, peak.total)


def _prefill_extra(
    arch: Architecture, quant: QuantConfig, prompt: int, rows: int, prefill_tokens: int
) -> int:
    """Predict what sliding layers hold beyond their window while a group of the longest prompts is prefilled."""
    group = [(min(rows, max(1, prefill_tokens // max(prompt, 1))), prompt)]
    whole = plan.kv_cache_bytes(arch, quant, group, prefilling=True)
    return whole - plan.kv_cache_bytes(arch, quant, group)


def rows_that_fit(workload: Workload, quant: QuantConfig, budget_bytes: int) -> int:
    """Find the most rows whose peak stays within the budget, the longest first; 0 if not even one does."""
    settings = workload.settings
    low, high = 0, min(settings.max_rows or MOST_ROWS, MOST_ROWS)
    if settings.max_tokens_in_flight is not None:
        tokens = accumulate(sum(sample) for sample in islice(cycle(workload.lengths.samples), high))
        high = max(1, sum(1 for total in tokens if total <= settings.max_tokens_in_flight))
    while low < high:  # a row more never takes less
        middle = (low + high + 1) // 2
        if need(workload, quant, middle).total_bytes <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _verdict(workload: Workload, quant: QuantConfig) -> Verdict:
    budget = int(workload.device.free_bytes * workload.settings.memory_fraction)
    rows = rows_that_fit(workload, quant, budget)
    packed = workload.settings.pack_weights
    loads = peaks.load_peak(
        workload.facts.architecture, quant, gpus=workload.device.gpus, packed=packed
    ).needed
    if rows > 0 and loads <= workload.device.free_bytes:
        return Verdict(FITS, rows, rows >= len(workload.lengths.samples), budget)
    status = OFFLOAD if _fits_with_offload(workload, quant, budget) else TOO_LARGE
    return Verdict(status, 1 if status == OFFLOAD else 0, False, budget)


def _fits_with_offload(workload: Workload, quant: QuantConfig, budget: int) -> bool:
    """Try one module at a time on the device, the rest behind it; bitsandbytes' weights cannot be moved so."""
    if quant.quantized:
        return False
    arch = workload.facts.architecture
    sizes: dict[str, int] = {}
    for weight in plan.weights(arch):
        module = ".".join(weight.name.split(".")[:2])  # a layer, or what stands alone
        sizes[module] = sizes.get(module, 0) + plan.stored(weight, arch, quant)[1]
    total = need(workload, quant, 1).total_bytes
    beside = total - plan.footprint_bytes(arch, quant)
    return beside + max(sizes.values()) <= budget and total <= budget + workload.device.offload_bytes


def best_choice(
    workload: Workload, quants: Mapping[str, QuantConfig], others: Callable[[], list[Workload]]
) -> Choice | None:
    """Choose the first of `quants` that fits; else the same on the other models, the largest first.

    Args:
        quants: by name, what comes nearest to the checkpoint's own answers first.
        others: asked for only when nothing fits on the workload's own model.
    """
    for candidate in _candidates(workload, others):
        for name, asked in quants.items():
            if _refused(candidate, asked) is not None:
                continue
            loaded, quant, _ = candidate.loaded(asked)
            verdict = _verdict(loaded, quant)
            if verdict.status == FITS:
                total = need(loaded, quant, 1).total_bytes
                return Choice(candidate.model, name, total, verdict.rows)
    return None


def _candidates(workload: Workload, others: Callable[[], list[Workload]]) -> Iterator[Workload]:
    yield workload
    size = plan.parameters(workload.facts.architecture)
    smaller = [other for other in others() if plan.parameters(other.facts.architecture) < size]
    yield from sorted(smaller, key=lambda other: -plan.parameters(other.facts.architecture))


def _bits(arch: Architecture, quant: QuantConfig, stored: str | None) -> float:
    """Return the bits of a weight, as people take it who work it out by hand."""
    if stored is not None and is_label(stored):
        return label_bits(stored)
    return quant.bits or STORED_BITS[plan.plain_dtype(arch, quant)]


def _reasons(arch: Architecture, quant: QuantConfig) -> Iterator[Reason]:
    """Say what is quantized, what is not, and what is kept beside it."""
    if not quant.quantized:
        return
    rest = "biases and buffers" if arch.counted is None else "other layers, biases and buffers"
    labels = {"embedding": "embedding and output head", "head": "embedding and output head", "norm": "norms"}
    sums: dict[tuple[str, str], list[int]] = {}
    for part in plan.parts(arch, quant):
        quantized = part.dtype == quant.method.value
        label = "linear layers" if quantized else labels.get(part.part, rest)
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
