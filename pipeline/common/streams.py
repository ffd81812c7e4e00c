"""Tell prompts that can be read only once from files: standard input, named pipes, a shell's <(…)."""

from pathlib import Path

NAMELESS = ("/dev/fd/", "/dev/stdin", "/proc/")  # what they mean is another process's business


def is_nameless(prompts: str) -> bool:
    """Say whether the words `prompts=` mean something else in each process."""
    return prompts == "-" or prompts.startswith(NAMELESS)


def is_stream(prompts: str) -> bool:
    """Say whether prompts are to be kept before they are read: they come once, or only here."""
    if is_nameless(prompts):
        return True
    try:
        path = Path(prompts)
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False
