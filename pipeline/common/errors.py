"""Name the errors that a user can meet: what was found, where, and what to do next.

PipelineError
├── ConfigError      a misspelt key, group or value, or one that makes no sense
└── JobError         the job as a whole cannot go on
    ├── PromptError  a prompt file, or one of its rows (then the row fails, and not the job)
    ├── LoadError    a model or tokenizer that cannot be loaded
    └── OutputError  a job folder that cannot be written, or is held by another process
"""

from pipeline.common.exit_status import ExitStatus


class PipelineError(Exception):
    """An error that is told to the user without a traceback.

    Args:
        found: what is wrong and where, as "FILE:LINE: not JSON".
        fix: what to do next, as "Copy the file again".
    """

    exit_status = ExitStatus.FAILED

    def __init__(self, found: str, fix: str = "") -> None:
        super().__init__(found, fix)
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        return " ".join(_sentence(part) for part in (self.found, self.fix) if part)


class ConfigError(PipelineError):
    """The configuration is wrong: nothing was started."""

    exit_status = ExitStatus.WRONG_CONFIG


class JobError(PipelineError):
    """The job as a whole failed; what it had written stays valid."""


class PromptError(JobError):
    """A prompt file cannot be read, or one of its rows cannot be run."""


class LoadError(JobError):
    """The model or its tokenizer cannot be loaded."""


class OutputError(JobError):
    """The job folder cannot be used."""


def _sentence(text: str) -> str:
    """End it with a full stop, unless it ends by itself."""
    text = text.strip()
    return text if text[-1] in ".!?…" else f"{text}."
