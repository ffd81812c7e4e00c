"""Read the config that a job ran with, as it was settled then."""

from pathlib import Path

from pipeline.config.compose import recorded_config
from pipeline.config.schema import Config
from pipeline.job.manifest import with_day
from pipeline.job.paths import JobPaths
from pipeline.models.own_settings import settle_generation


def job_config(folder: Path) -> Config:
    """Read the config that a job ran with; that of its first shard, where it has shards.

    Raises:
        ConfigError: it is not there, or not one of this version's.
    """
    whole = JobPaths(folder)
    ran = next((f for f in (folder, *whole.shards) if JobPaths(f).hydra.is_dir()), folder)
    return settle_generation(with_day(recorded_config(ran), JobPaths(ran), goes_on=True))
