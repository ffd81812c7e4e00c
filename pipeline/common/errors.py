"""The errors a user can meet; each message says what was wrong, where, and what to do next.

PipelineError
├── ConfigError      exit status 2: a misspelt key, group or value, or one that makes no sense
└── JobError         exit status 3: the job as a whole cannot go on
    ├── PromptError  a prompt file, or one of its rows (then the row fails, and not the job)
    ├── LoadError    a model or tokenizer that cannot be loaded
    └── OutputError  a job folder that cannot be written, or is held by another process
"""


class PipelineError(Exception):
    """Base of every error that is reported to the user without a traceback."""

    exit_status = 3


class ConfigError(PipelineError):
    """The configuration is wrong: nothing was started."""

    exit_status = 2


class JobError(PipelineError):
    """The job as a whole failed; what it had written stays valid."""


class PromptError(JobError):
    """A prompt file cannot be read, or one of its rows cannot be run."""


class LoadError(JobError):
    """The model or its tokenizer cannot be loaded."""


class OutputError(JobError):
    """The job folder cannot be used."""
