"""Find the command that was typed, run it, and say how it ended. Nobody sees a traceback."""

import logging
import os
import sys
import traceback

from pipeline.commands.arguments import refuse_secrets
from pipeline.commands.table import COMMANDS, module_of
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.signals import Interrupt, Stopped
from pipeline.common.suggestions import did_you_mean
from pipeline.common.terminal import safe_streams, say, to_nowhere
from pipeline.engine.before_torch import set_environment
from pipeline.engine.short_turns import take_short_turns

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> ExitStatus:
    """Run a command line, by default this process's own, and return how it ended."""
    set_environment()
    take_short_turns()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.raiseExceptions = False  # a log on a full disk is no reason to stop, or for a traceback
    interrupt = Interrupt()
    with safe_streams():
        try:
            with interrupt:
                status = _run(sys.argv[1:] if arguments is None else arguments)
                _flush()
            return status
        except (Stopped, KeyboardInterrupt):
            name = interrupt.signal.name if interrupt.signal else "SIGINT"
            say(f"Stopped by {name}. The same command starts again.", "yellow")
            return ExitStatus.RUN_AGAIN
        except Exception as error:
            return _tell(error)


def _run(arguments: list[str]) -> ExitStatus:
    refuse_secrets(arguments)
    command, rest = choose(arguments)
    if {"-h", "--help"} & set(rest):
        from pipeline.commands.help import help_of

        print(help_of(command), end="")
        return ExitStatus.DONE
    status: ExitStatus = module_of(command).main(rest)
    return status


def choose(arguments: list[str]) -> tuple[str, list[str]]:
    """Tell the command from its arguments: an override has "=", or begins with "-", "+" or "~".

    Raises:
        ConfigError: there is no such command.
    """
    first = arguments[0] if arguments else ""
    if not first or "=" in first or first[0] in "-+~":
        return "run", arguments
    if first not in COMMANDS:
        there_are = f"There are: {', '.join(COMMANDS)}. A job's settings are KEY=VALUE: see --help."
        raise ConfigError(f"{first}: no such command", did_you_mean(first, COMMANDS) or there_are)
    return first, arguments[1:]


def _tell(error: Exception) -> ExitStatus:
    """Say in one line what went wrong, and return what it means."""
    status, unexpected = ExitStatus.FAILED, False
    if isinstance(error, PipelineError):
        text, status = str(error), error.exit_status
    elif isinstance(error, BrokenPipeError):  # `| head`: whoever reads has seen enough
        to_nowhere(sys.stdout)
        return status
    elif isinstance(error, OSError):
        if error.filename is None:
            to_nowhere(sys.stdout)
        where = error.filename or "standard output"
        text = f"{where}: {error.strerror or error}. Make room or mend it, and run again."
    else:
        unexpected = True
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        text = f"{type(error).__name__}: {error} ({where}). This is a mistake of ours: please report it."
    say(f"Error: {text}", "red")
    if log.hasHandlers():  # the job's own log; without it, this would only be said twice
        log.error("%s", text, exc_info=error if unexpected else None)
    return status


def _flush() -> None:
    """Write what is left, here, where a full disk can still be told; a reader that left is none's fault."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        to_nowhere(sys.stdout)
    except OSError:
        to_nowhere(sys.stdout)
        raise
