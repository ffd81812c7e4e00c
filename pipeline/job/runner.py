"""Run one job, from a prompt file to a folder of results. What is heavy is imported when there is work."""

import gc
import logging
import os
from pathlib import Path

from pipeline.common import terminal
from pipeline.common.errors import JobError, PipelineError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.signals import Interrupt, Stopped
from pipeline.config.schema import Config, EngineName, Resume
from pipeline.job.folder import JobFolder
from pipeline.job.missing import find_missing, finished_before, locate_prompts, write_bad_rows
from pipeline.job.paths import JobPaths, read_json
from pipeline.job.todo import PromptState, Todo, count_submissions
from pipeline.memory.check import check_memory
from pipeline.prompts.count import prompts_sha256

log = logging.getLogger(__name__)

# Compiled products that a CPU keeps, half a megabyte each: one for every shape that it met. By default 1,024,
# which is more than the weights of a small model take, and no faster. oneDNN's, and torch's before it.
PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def run_job(config: Config, folder: Path) -> ExitStatus:
    """Do what is missing: what the folder holds already is not made again.

    Raises:
        PipelineError: the job as a whole cannot go on; what was written stays.
    """
    interrupt = Interrupt()
    try:
        with interrupt, JobFolder(folder) as results:
            return _run(config, results, interrupt)
    except Stopped:
        return _stopped(config, interrupt, "while nothing was being written")
    except PipelineError:
        raise
    except Exception as error:
        log.exception("Unexpected")
        raise JobError(
            found=f"{type(error).__name__}: {error}",
            fix="What was written stays valid, and the same command goes on from there; "
            f"{JobPaths(folder).log} has the traceback.",
        ) from error


def _run(config: Config, results: JobFolder, interrupt: Interrupt) -> ExitStatus:
    if config.resume is Resume.never:
        results.set_aside()
    prompts = locate_prompts(config, results)
    state = PromptState.look(prompts)  # before it is read: what changes later is for the next run
    submissions = count_submissions(results.folder)
    sha256 = prompts_sha256(prompts)
    if (finished := finished_before(config, prompts, sha256, results)) is not None:
        return _nothing_to_do(finished, results)
    ledger = find_missing(config, prompts, results)
    todo = Todo.note(results, state, sha256, config.limit, ledger, submissions)
    if not ledger.missing:
        _renew_manifest(results, todo)
        return _nothing_to_do(todo, results)
    if write_bad_rows(config, prompts, results, ledger):
        Todo.note(results, state, sha256, config.limit, ledger, submissions)
        return ExitStatus.SOME_FAILED
    if unread := config.engine.unread:
        terminal.say(f"engine={config.engine.name.value} does not read {', '.join(unread)}.", style="yellow")
    check_memory(config)
    if config.engine.name is EngineName.default:
        for name, count in PRODUCTS.items():
            os.environ.setdefault(name, count)
    gc.disable()  # a quarter of the time that the next line takes
    from pipeline.job.run import Run  # torch and transformers

    gc.freeze()  # nothing of this is ever garbage: later collections need not look at it
    gc.enable()
    Run(config, prompts, sha256, results, ledger, interrupt).go()
    if ledger.missing:
        return _stopped(config, interrupt, f"with {ledger.shown} done")
    Todo.note(results, state, sha256, config.limit, ledger, submissions)
    if state != PromptState.look(prompts):
        terminal.say(
            f"{prompts}: has changed since it was read. The same command does what is new.", style="yellow"
        )
    return ExitStatus.SOME_FAILED if ledger.errors else ExitStatus.DONE


def _nothing_to_do(todo: Todo, results: JobFolder) -> ExitStatus:
    total, errors = todo.total, todo.errors
    failed = f", {errors} of them with errors (retry_errors=true does those again)" if errors else ""
    rows = "the only row is" if total == 1 else f"all {total:,} rows are"
    terminal.say(f"Nothing to do: {rows} in {results.folder}{failed}")
    return ExitStatus.SOME_FAILED if errors else ExitStatus.DONE


def _stopped(config: Config, interrupt: Interrupt, where: str) -> ExitStatus:
    again = "The same command goes on from here."
    if config.resume is Resume.never:
        again = "The same command without resume=never goes on from here."
    assert interrupt.signal
    terminal.say(f"Stopped by {interrupt.signal.name} {where}. {again}", style="yellow")
    return ExitStatus.RUN_AGAIN


def _renew_manifest(results: JobFolder, todo: Todo) -> None:
    """Let manifest.json name the prompt file that the rows answer now; nothing else of it has changed."""
    manifest = read_json(results.manifest)
    if manifest and manifest.get("prompts_sha256") != todo.prompts_sha256:
        results.write_json(results.manifest, {**manifest, "prompts_sha256": todo.prompts_sha256})
