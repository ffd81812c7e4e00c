"""One job, from a prompt file to a folder of results. What is heavy is imported when there is work."""

import gc
import logging
import os
from pathlib import Path

from pipeline.common import terminal
from pipeline.common.errors import JobError, PipelineError
from pipeline.common.signals import Interrupt, Stopped
from pipeline.config.schema import Config, Resume
from pipeline.job.folder import MANIFEST, JobFolder, read_json
from pipeline.job.ledger import Ledger
from pipeline.job.missing import finished_before, locate_prompts, survey
from pipeline.job.todo import PromptState, Todo
from pipeline.memory.check import check_memory
from pipeline.prompts.count import prompts_sha256

log = logging.getLogger(__name__)

# Compiled products that a CPU keeps, half a megabyte each: one for every shape that it met. By default 1,024,
# which is more than the weights of a small model take, and no faster.
PRODUCTS = "64"

ALL_DONE, SOME_FAILED, RESUME_ME = 0, 1, 75  # exit status; 75 is sysexits' EX_TEMPFAIL


class Job:
    """One run of a job: what its folder holds already is not made again."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.folder = folder

    def run(self) -> int:
        """Do what is missing.

        Returns:
            The exit status: 0 all rows done, 1 some rows failed, 75 stopped before the end.

        Raises:
            PipelineError: the job as a whole cannot go on; what was written stays.
        """
        with Interrupt() as interrupt:
            try:
                with JobFolder(self.folder) as results:
                    return self._run(results, interrupt)
            except Stopped:
                return self._stopped(interrupt, "while nothing was being written")
            except (PipelineError, KeyboardInterrupt):
                raise
            except Exception as error:
                log.exception("Unexpected")
                raise JobError(
                    f"{type(error).__name__}: {error}. What was written stays valid, and the same command goes "
                    f"on from there; {self.folder / 'pipeline.log'} has the traceback."
                ) from error

    def _run(self, results: JobFolder, interrupt: Interrupt) -> int:
        if self.config.resume is Resume.never:
            results.set_aside()
        prompts = locate_prompts(self.config, results)
        state = PromptState.look(prompts)  # before it is read: what changes later is for the next run
        finished = finished_before(self.config, state, results)
        if finished is not None:
            return self._nothing_to_do(finished)
        sha256 = prompts_sha256(prompts)
        ledger = survey(self.config, prompts, results)
        todo = Todo.note(results, state, sha256, self.config.limit, ledger)
        if not ledger.missing:
            _renew_manifest(results, todo)
            return self._nothing_to_do(todo)
        check_memory(self.config)
        for cache in (
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
            "LRU_CACHE_CAPACITY",
        ):  # oneDNN's, and torch's before it
            os.environ.setdefault(cache, PRODUCTS)
        gc.disable()  # a quarter of the time that the next line takes
        from pipeline.job.generate import generate  # torch and transformers

        gc.freeze()  # nothing of this is ever garbage: later collections need not look at it
        gc.enable()
        generate(self.config, prompts, sha256, results, ledger, interrupt)
        if ledger.missing:
            return self._stopped(interrupt, _progress(ledger))
        Todo.note(results, state, sha256, self.config.limit, ledger)
        if state != PromptState.look(prompts):
            terminal.say(
                f"{prompts}: has changed since it was read. The same command does what is new.",
                style="yellow",
            )
        return SOME_FAILED if ledger.errors else ALL_DONE

    def _nothing_to_do(self, todo: Todo) -> int:
        total, errors = todo.total, todo.errors
        failed = f", {errors} of them with errors (retry_errors=true does those again)" if errors else ""
        terminal.say(f"Nothing to do: all {total} rows are in {self.folder}{failed}")
        return SOME_FAILED if errors else ALL_DONE

    def _stopped(self, interrupt: Interrupt, where: str) -> int:
        again = "The same command goes on from here."
        if self.config.resume is Resume.never:
            again = "The same command without resume=never goes on from here."
        name = interrupt.signal.name if interrupt.signal else "request"
        terminal.say(f"Stopped by {name} {where}. {again}", style="yellow")
        return RESUME_ME


def _renew_manifest(results: JobFolder, todo: Todo) -> None:
    """Let manifest.json name the prompt file that the rows answer now; nothing else of it has changed."""
    manifest = read_json(results.path / MANIFEST)
    if manifest is not None and manifest.get("prompts_sha256") != todo.prompts_sha256:
        results.write_json(MANIFEST, {**manifest, "prompts_sha256": todo.prompts_sha256})


def _progress(ledger: Ledger) -> str:
    return f"with {ledger.done} of {ledger.total} rows done"
