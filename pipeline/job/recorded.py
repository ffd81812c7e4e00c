"""Read the config that a job ran with, as it was settled then."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.common.errors import ConfigError, PromptError
from pipeline.config.compose import recorded_config
from pipeline.config.schema import Config
from pipeline.job.manifest import with_day
from pipeline.job.paths import JobPaths
from pipeline.models.own_settings import settle_generation
from pipeline.prompts.reader import open_prompts


def job_config(folder: Path) -> Config:
    """Read the config that a job ran with; that of its first shard, where it has shards.

    Raises:
        ConfigError: it is not there, or not one of this version's.
    """
    whole = JobPaths(folder)
    ran = next((f for f in (folder, *whole.shards) if JobPaths(f).hydra.is_dir()), folder)
    return settle_generation(with_day(recorded_config(ran), JobPaths(ran), goes_on=True))


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
