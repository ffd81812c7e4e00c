"""Find the ids that rows of a job have in its prompts."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.common.errors import ConfigError, PromptError
from pipeline.config.compose import recorded_config
from pipeline.config.schema import Config
from pipeline.prompts.reader import open_prompts


def row_ids(folder: Path, prompts: str, rows: Iterable[int]) -> dict[int, str]:
    """Find the ids that some rows have in a job's prompts, read as the job read them; "" where they cannot be."""
    ids = dict.fromkeys(rows, "")
    config = Config()
    with suppress(ConfigError):  # where none was noted, the columns are called as ever
        config = recorded_config(folder)
    with suppress(PromptError):
        for row in open_prompts(replace(config, shard=None, limit=max(ids) + 1), prompts):
            if row.index in ids:
                ids[row.index] = row.id
    return ids
