"""Name what cannot be read of the files in a job's folder, but for its rows."""

from pathlib import Path

from pipeline.job.paths import JobPaths
from pipeline.job.stored import CONFIG, HYDRA, MANIFEST, SCORES, STATS, read_fitting, read_yaml
from pipeline.job.todo import Todo


def damage(folder: Path) -> list[str]:
    """Name the files, and in those that can be read the entries, that are not as they were written."""
    paths, damaged = JobPaths(folder), list[str]()
    for path, shape in ((paths.stats, STATS), (paths.manifest, MANIFEST), (paths.scores, SCORES)):
        read_fitting(path, shape, damaged)
    read_yaml(paths.config, CONFIG, damaged)
    read_yaml(paths.hydra_config, HYDRA, damaged)
    if paths.todo.exists() and Todo.read(folder) is None:
        damaged.append(str(paths.todo))
    return damaged
