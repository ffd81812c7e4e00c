"""The heavy half of a job: load the model, run what is missing, measure. Imported only when there is work."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.errors import JobError, PromptError
from pipeline.common.fingerprint import row_key
from pipeline.common.request import BadRow, Completion, PromptRow, Request
from pipeline.common.signals import Interrupt
from pipeline.config.schema import Config
from pipeline.engine.accelerators import model_gpus
from pipeline.engine.cpu.packing import pack_weights
from pipeline.engine.engine import Engine
from pipeline.engine.host_memory import GLIBC_BYTES, release_files, return_large_blocks, trim
from pipeline.engine.limits import Limits
from pipeline.engine.probe import AnyForward, choose_forward
from pipeline.job.energy import EnergyMeter, energy_stats
from pipeline.job.folder import MANIFEST, STATS, JobFolder, read_json
from pipeline.job.ledger import Ledger
from pipeline.job.manifest import gpu_uuids, manifest, model_digest
from pipeline.job.missing import rows_of
from pipeline.job.progress import JobProgress
from pipeline.job.rows import completion_row, error_row, part_thinking
from pipeline.job.stats import compare_memory, job_stats, measure_weights, show_stats
from pipeline.job.timeline import Timeline
from pipeline.job.watchdog import Watchdog
from pipeline.memory.architecture import known_architecture
from pipeline.memory.capacity import Capacity, capacity, context_tokens
from pipeline.memory.compare import Setup
from pipeline.memory.measured import PeakSampler
from pipeline.models.loading import Loaded, computed_in, load_model, release
from pipeline.models.stored_format import label
from pipeline.prompts.chat import Chat, decode, eos_token_ids, prepare_chat, render

log = logging.getLogger(__name__)


@dataclass
class Pending:
    """A row in the engine."""

    row: PromptRow
    number: int  # of the job's rows, from 0
    prompt_token_ids: tuple[int, ...]
    samples: int  # still to come from the engine
    missing: list[int]  # the samples that are not written by an earlier run


def generate(
    config: Config,
    prompts: str,
    prompts_sha256: str | None,
    results: JobFolder,
    ledger: Ledger,
    interrupt: Interrupt,
) -> None:
    """Make what the ledger says is missing; returns early, between two steps, after a signal.

    Raises:
        Stopped: a signal came before there was anything to finish.
        PipelineError: the job as a whole cannot go on; what was written stays.
    """
    done_before = ledger.done
    terminal.say(f"Loading {config.model.name}")
    timeline = Timeline()
    return_large_blocks()
    with PeakSampler() as load:
        loaded = load_model(config.model, config.quant, config.models_dir)
        weights = measure_weights(loaded.model)
        packed = _settle(loaded, config)
    try:
        digest = model_digest(Path(loaded.source), loaded.revision)
        dtypes = computed_in(loaded.model, loaded.quant)
        if done_before:
            _check_same_model(results, digest, dtypes)
        forward, probe = choose_forward(loaded.model, config.engine.attention.value)
        setup = _setup(config, loaded, packed, forward.limits)
        facts = {"model_digest": digest, "dtypes": dtypes, "attention": probe}
        facts["quantization"] = label(loaded.format) if loaded.format else loaded.quant.method.value
        written = manifest(prompts, prompts_sha256, loaded.source, loaded.revision, setup.gpus, **facts)
        results.write_json(MANIFEST, written)
        work = _Work(config, prompts, results, ledger, loaded, interrupt, timeline, forward.limits)
        interrupt.hold()
        with PeakSampler() as run, EnergyMeter(gpu_uuids(loaded.model)) as energy:
            started = time.perf_counter()
            engine = work.run(forward)
            results.sync()
            run_sec = time.perf_counter() - started
        stats = job_stats(engine.stats, weights, load.peaks(), run.peaks(), loaded.load_sec, run_sec)
        stats["memory"] |= compare_memory(stats["memory"], setup, engine.stats, loaded.bare_bytes)
        counts = {"done": ledger.done, "errors": ledger.errors, "done_before": done_before}
        stats["rows"] = {"total": ledger.total, **counts}
        stats["energy"] = energy_stats(energy.joules, energy.source, engine.stats.completion_tokens)
        stats["timeline"] = timeline.points
        results.write_json(STATS, stats)
        show_stats(stats, results.path)
    finally:
        release(loaded)


def _settle(loaded: Loaded, config: Config) -> bool:
    """Pack the weights, and give back what loading leaves; whether layers were packed."""
    model: Any = loaded.model
    packed = pack_weights(model) if config.engine.pack_weights else 0
    log.info("%d linear layers packed", packed)
    release_files(model)
    trim()
    if loaded.quant.bits != 8:
        return_large_blocks(GLIBC_BYTES)
    return packed > 0


def _setup(config: Config, loaded: Loaded, packed: bool, limits: Limits) -> Setup:
    """What decides the job's memory, beside its prompts."""
    model: Any = loaded.model
    gpus = model_gpus(model)
    return Setup(
        None if loaded.format else known_architecture(model.config.to_dict()),
        loaded.quant,
        gpus,
        packed=packed,
        prefill_tokens=config.engine.prefill_tokens,
        sampled=not config.generation.greedy,
        limits=limits,
    )


def _check_same_model(results: JobFolder, digest: str, dtypes: dict[str, str | None]) -> None:
    """Rows of two models must not mix in one file, nor those of a model in two dtypes."""
    before = read_json(results.path / MANIFEST) or {}
    if before.get("model_digest", digest) != digest:
        raise JobError(
            f"{results.path}: its rows are of {before.get('model')}, revision {before.get('revision')}, as it was "
            f"on {before.get('when')}; the model's files have changed since. Pin that revision with "
            "model.revision=… to go on, or pass resume=never to make all rows anew."
        )
    if (made_in := before.get("dtypes", dtypes)) != dtypes:
        raise JobError(
            f"{results.path}: its rows were computed in {made_in}, and this device computes in {dtypes}. Go on "
            "with a device like the first, or pass resume=never to make all rows anew."
        )


class _Work:
    """Rows into the engine, completions out of it."""

    def __init__(
        self,
        config: Config,
        prompts: str,
        results: JobFolder,
        ledger: Ledger,
        loaded: Loaded,
        interrupt: Interrupt,
        timeline: Timeline,
        limits: Limits,
    ) -> None:
        assert loaded.model is not None
        self._config = config
        self._prompts = prompts
        self._results = results
        self._ledger = ledger
        self._interrupt = interrupt
        self._timeline = timeline
        self._watchdog = Watchdog(config.watchdog_sec, results.sync)
        self._tokenizer = loaded.tokenizer
        self._decode = partial(decode, loaded.tokenizer)
        self._context = context_tokens(loaded.model.config)
        self._eos_token_ids = eos_token_ids(loaded.model.generation_config, loaded.tokenizer)
        settings = config.engine
        self._capacity = capacity(
            loaded.model,
            loaded.quant,
            limits=limits,
            fraction=settings.memory_fraction,
            prefill_tokens=settings.prefill_tokens,
            sampled=not config.generation.greedy,
            max_rows=settings.max_rows,
            max_tokens=settings.max_tokens_in_flight,
        )
        self._pending: dict[str, Pending] = {}

    def run(self, forward: AnyForward) -> Engine:
        """Run all missing rows, or those that are done before a signal comes."""
        settings, model = self._config.engine, self._config.model
        rows, tokens = self._capacity.max_rows, self._capacity.max_tokens
        log.info("At most %d rows and %d tokens in flight", rows, tokens)
        engine = Engine(
            forward,
            self._eos_token_ids,
            self._decode,
            max_rows=rows,
            max_tokens=tokens,
            prefill_tokens=settings.prefill_tokens,
            share_prefix=settings.shared_prefix,
        )
        chat = prepare_chat(
            self._tokenizer,
            system=self._config.system,
            template=model.chat_template,
            template_kwargs=model.chat_template_kwargs,
        )
        with JobProgress(self._ledger.total, self._ledger.done) as progress, self._watchdog:
            for finished in engine.steps(self._requests(chat)):
                for completion in finished:
                    self._write(completion)
                self._results.sync_if_due()
                self._watchdog.beat(f"step {engine.stats.steps}, with {self._ledger.done} rows done")
                self._show(progress, engine)
                if self._interrupt.signal:
                    break
        return engine

    def _requests(self, chat: Chat) -> Iterator[Request]:
        """Render the rows that are missing; a row that cannot be run is written at once."""
        for number, row in enumerate(rows_of(self._config, self._prompts)):
            if number == self._ledger.rows:
                return  # the file has grown since the survey: what is new is for the next run
            missing = self._ledger.missing_samples(number, row_key(row))
            if missing is None:
                raise PromptError(
                    f"{row.source}: the prompt file changed while the job was reading it. "
                    "Run the same command again."
                )
            self._watchdog.beat(f"row {row.index} was read")
            if self._interrupt.signal:
                return
            if not missing:
                continue
            try:
                if isinstance(row, BadRow):
                    raise PromptError(row.error)
                request = _request(row, render(row, chat), self._context, self._capacity)
            except PromptError as error:
                for sample in missing:
                    self._results.append(error_row(row, str(error), sample))
                    self._ledger.mark(number, sample, failed=True)
                continue
            self._pending[row.id] = Pending(row, number, request.prompt_token_ids, row.params.n, missing)
            yield request

    def _write(self, completion: Completion) -> None:
        pending = self._pending[completion.request_id]
        pending.samples -= 1
        if pending.samples == 0:
            del self._pending[completion.request_id]
        if completion.sample not in pending.missing:
            return  # an earlier run wrote it; the engine makes all samples of a row
        written = completion_row(pending.row, pending.prompt_token_ids, completion, self._decode)
        if self._config.generation.thinking:
            part_thinking(written, self._tokenizer, pending.prompt_token_ids)
        if self._config.token_ids:
            written["token_ids"] = list(completion.token_ids)
        self._results.append(written)
        self._ledger.mark(pending.number, completion.sample, failed=completion.error is not None)

    def _show(self, progress: JobProgress, engine: Engine) -> None:
        live: list[Any] = engine.live
        tokens = sum(len(s.token_ids) for s in live) + engine.stats.completion_tokens
        self._timeline.sample(tokens)
        progress.update(self._ledger.done, tokens)
        if self._config.stream and live:
            first = min(live, key=lambda s: (self._pending[s.request.id].row.index, s.sample))
            progress.stream(first.request.id, self._decode(first.token_ids))


def _request(row: PromptRow, prompt_token_ids: list[int], context: int, capacity: Capacity) -> Request:
    """The engine's request; its completion ends where the context does.

    Raises:
        PromptError: the prompt fills the context, or can never fit in memory.
    """
    room = context - len(prompt_token_ids)
    if room < 1:
        raise PromptError(
            f"{row.source}: the prompt has {len(prompt_token_ids)} tokens and the model's context {context}. "
            "Shorten the prompt, or choose a model with a longer context."
        )
    if refusal := capacity.refusal(len(prompt_token_ids)):
        raise PromptError(f"{row.source}: {refusal}")
    params = replace(row.params, max_new_tokens=min(row.params.max_new_tokens, room))
    return Request(row.id, tuple(prompt_token_ids), params)
