"""One job, from a prompt file to a folder of results."""

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import display
from pipeline.capacity import context_tokens, in_flight
from pipeline.chat import Chat, decode, eos_token_ids, prepare_chat, render
from pipeline.config import Config, OnError, Resume, root
from pipeline.engine.engine import Engine
from pipeline.engine.forward import Forward
from pipeline.engine.probe import choose_forward
from pipeline.errors import PromptError
from pipeline.interrupt import Interrupt
from pipeline.job_stats import job_stats, measure_weights, show_stats
from pipeline.loading import Loaded, load_model, release
from pipeline.manifest import manifest
from pipeline.memory_stats import PeakSampler
from pipeline.progress import JobProgress
from pipeline.prompts import find_prompts, read_prompts
from pipeline.request import BadRow, Completion, GenerationParams, PromptRow, Request
from pipeline.results import MANIFEST, ROWS, STATS, JobFolder
from pipeline.rows import completion_row, error_row, key_of, part_thinking
from pipeline.timeline import Timeline

log = logging.getLogger(__name__)

ALL_DONE, SOME_FAILED, RESUME_ME = 0, 1, 75  # exit status; 75 is sysexits' EX_TEMPFAIL


@dataclass
class Standing:
    """Where a job stands. A row with n samples counts n times."""

    total: int = 0
    done: int = 0
    errors: int = 0
    written_before: set[int] = field(default_factory=set)  # by earlier runs: see _place


@dataclass
class Pending:
    """A row in the engine, and how many of its samples are still to come."""

    row: PromptRow
    prompt_token_ids: tuple[int, ...]
    samples: int


class Job:
    """One run of a job: what its folder holds already is not made again."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.standing = Standing()
        self._prompts = find_prompts(config.prompts, root() / "jobs")
        self._pending: dict[str, Pending] = {}

    def run(self) -> int:
        """Do what is missing.

        Returns:
            The exit status: 0 all rows done, 1 some rows failed, 75 stopped before the end.

        Raises:
            PipelineError: the job as a whole cannot go on; what was written stays.
        """
        with JobFolder(self.folder) as results, Interrupt() as interrupt:
            if self.config.resume is Resume.never:
                results.set_aside()
            self._survey(results)
            if self.standing.done >= self.standing.total:
                display.say(f"Nothing to do: all {self.standing.total} rows are in {self.folder}")
                return SOME_FAILED if self.standing.errors else ALL_DONE
            self._load_and_generate(results, interrupt)
        if self.standing.done < self.standing.total:
            reason = interrupt.signal.name if interrupt.signal else "request"
            display.say(
                f"Stopped by {reason} with {self.standing.done} of {self.standing.total} rows done. "
                "The same command goes on from here.",
                style="yellow",
            )
            return RESUME_ME
        return SOME_FAILED if self.standing.errors else ALL_DONE

    def _rows(self) -> Iterator[PromptRow | BadRow]:
        generation = self.config.generation
        params = GenerationParams(
            **{k: getattr(generation, k) for k in GenerationParams.__dataclass_fields__}
        )
        return read_prompts(
            self._prompts,
            params,
            prompt_field=self.config.prompt_field,
            limit=self.config.limit,
            shard=self.config.shard,
        )

    def _survey(self, results: JobFolder) -> None:
        """Read the prompt file once: how many rows there are, and which of them are written already."""
        if self._prompts == "-":
            self._prompts = str(self.folder / "prompts.jsonl")
            with Path(self._prompts).open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        samples: dict[int, int] = {}
        written = (self.folder / ROWS).exists()
        for row in self._rows():
            if isinstance(row, BadRow) and self.config.on_error is OnError.fail:
                raise PromptError(row.error)
            count = row.params.n if isinstance(row, PromptRow) else 1
            self.standing.total += count
            if written:
                samples[int(key_of(row), 16)] = count
        if not written:
            return
        seen = self.standing.written_before

        def wanted(line: dict[str, Any]) -> bool:
            key, sample = int(line["key"], 16), line.get("sample", 0)
            count = samples.get(key, 0)
            if sample >= count or _place(key, sample) in seen or (line["error"] and self.config.retry_errors):
                return False
            failed = bool(line["error"])
            seen.update(_place(key, i) for i in (range(count) if failed else [sample]))
            self.standing.errors += failed
            return True

        dropped = results.keep(wanted)
        self.standing.done = len(seen)
        if dropped:
            display.say(
                f"{dropped} rows of an earlier run are done again: their prompts changed, their lines were "
                f"damaged, or they had failed. The old lines are in {self.folder / 'replaced.jsonl'}."
            )
        if seen:
            display.say(f"Going on: {len(seen)} of {self.standing.total} rows were done before.")

    def _load_and_generate(self, results: JobFolder, interrupt: Interrupt) -> None:
        config = self.config
        display.say(f"Loading {config.model.name}")
        self._timeline = Timeline()
        with PeakSampler() as load:
            loaded = load_model(config.model, config.quant, config.models_dir)
        try:
            weights = measure_weights(loaded.model)
            forward, probe = choose_forward(loaded.model, config.engine.attention.value)
            versions = manifest(Path(self._prompts), loaded.source, loaded.revision, attention=probe)
            results.write_json(MANIFEST, versions)
            with PeakSampler() as run:
                started = time.perf_counter()
                engine = self._generate(loaded, forward, results, interrupt)
                results.sync()
                run_sec = time.perf_counter() - started
            stats = job_stats(engine.stats, weights, load.peaks(), run.peaks(), loaded.load_sec, run_sec)
            stats["rows"] = {"total": self.standing.total, "done": self.standing.done}
            stats["rows"] |= {
                "errors": self.standing.errors,
                "done_before": len(self.standing.written_before),
            }
            stats["timeline"] = self._timeline.points
            results.write_json(STATS, stats)
            show_stats(stats, self.folder)
        finally:
            release(loaded)

    def _generate(self, loaded: Loaded, forward: Forward, results: JobFolder, interrupt: Interrupt) -> Engine:
        settings, model = self.config.engine, self.config.model
        network, tokenizer = loaded.model, loaded.tokenizer
        assert network is not None
        rows, tokens = in_flight(
            network, settings.memory_fraction, settings.max_rows, settings.max_tokens_in_flight
        )
        log.info("At most %d rows and %d tokens in flight", rows, tokens)
        engine = Engine(
            forward,
            eos_token_ids(network.generation_config, tokenizer),
            partial(decode, tokenizer),
            max_rows=rows,
            max_tokens=tokens,
            prefill_tokens=settings.prefill_tokens,
            share_prefix=settings.shared_prefix,
        )
        chat = prepare_chat(
            tokenizer,
            system=self.config.system,
            template=model.chat_template,
            template_kwargs=model.chat_template_kwargs,
        )
        context = context_tokens(network.config)
        with JobProgress(self.standing.total, self.standing.done) as progress:
            for finished in engine.steps(self._requests(chat, context, results)):
                for completion in finished:
                    self._write(completion, results, tokenizer)
                self._show(progress, engine, tokenizer)
                if interrupt.signal:
                    break
        return engine

    def _requests(self, chat: Chat, context: int, results: JobFolder) -> Iterator[Request]:
        """Render the rows that are missing; a row that cannot be run is written at once."""
        before = self.standing.written_before
        for row in self._rows():
            key = int(key_of(row), 16)
            samples = range(row.params.n if isinstance(row, PromptRow) else 1)
            missing = sum(_place(key, sample) not in before for sample in samples)
            if not missing:
                continue
            try:
                if isinstance(row, BadRow):
                    raise PromptError(row.error)
                request = _request(row, render(row, chat), context)
            except PromptError as error:
                results.append(error_row(row, str(error)))
                self.standing.errors += 1
                self.standing.done += missing
                continue
            self._pending[row.id] = Pending(row, request.prompt_token_ids, len(samples))
            yield request

    def _write(self, completion: Completion, results: JobFolder, tokenizer: Any) -> None:
        pending = self._pending[completion.request_id]
        pending.samples -= 1
        if pending.samples == 0:
            del self._pending[completion.request_id]
        row = pending.row
        if _place(int(key_of(row), 16), completion.sample) in self.standing.written_before:
            return
        written = completion_row(row, pending.prompt_token_ids, completion, partial(decode, tokenizer))
        if self.config.generation.thinking:
            part_thinking(written, tokenizer, pending.prompt_token_ids)
        if self.config.token_ids:
            written["token_ids"] = list(completion.token_ids)
        results.append(written)
        self.standing.done += 1
        self.standing.errors += completion.error is not None

    def _show(self, progress: JobProgress, engine: Engine, tokenizer: Any) -> None:
        live = engine.live
        tokens = sum(len(s.token_ids) for s in live) + engine.stats.completion_tokens
        self._timeline.sample(tokens)
        progress.update(self.standing.done, tokens)
        if self.config.stream and live:
            first = min(live, key=lambda s: (self._pending[s.request.id].row.index, s.sample))
            progress.stream(first.request.id, decode(tokenizer, first.token_ids))


def _request(row: PromptRow, prompt_token_ids: list[int], context: int) -> Request:
    """The engine's request; its completion ends where the context does.

    Raises:
        PromptError: the prompt fills the context.
    """
    room = context - len(prompt_token_ids)
    if room < 1:
        raise PromptError(
            f"{row.source}: the prompt has {len(prompt_token_ids)} tokens and the model's context {context}. "
            "Shorten the prompt, or choose a model with a longer context."
        )
    params = replace(row.params, max_new_tokens=min(row.params.max_new_tokens, room))
    return Request(row.id, tuple(prompt_token_ids), params)


def _place(key: int, sample: int) -> int:
    """One number for a row's sample; n is at most 1,024."""
    return key << 10 | sample
