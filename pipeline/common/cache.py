"""Find where to keep what can be made anew."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Find the user's folder for it, which need not be there."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "llm-job-pipeline"
    try:
        return Path.home() / ".cache" / "llm-job-pipeline"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"llm-job-pipeline-{os.getuid()}"
