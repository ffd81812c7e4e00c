"""Find where to keep what can be made anew."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Find the user's folder for it, which need not be there."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llm-job-pipeline"
