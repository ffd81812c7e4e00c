"""Show Hydra a user's own configs: conf/GROUP/ and jobs/ where they stand, and nothing else that lies there."""

import builtins
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

from pipeline.config.schema import root

GROUPS = ("model", "quant", "generation", "engine", "submit", "jobs")
OWN = (*GROUPS, "hydra")


class OwnSource(FileConfigSource):
    """Read GROUP/NAME from conf/ of a folder, and jobs/NAME from the folder itself.

    Hydra would take any folder there for a group, and `prompts=…` for a choice of it, where there is a prompts/.
    """

    @staticmethod
    def scheme() -> str:
        """Name what comes before :// in the search path."""
        return "own"

    def is_group(self, config_path: str) -> bool:
        """Say whether there is a folder for this group."""
        return not config_path or (_is_own(config_path) and super().is_group(place(config_path)))

    def is_config(self, config_path: str) -> bool:
        """Say whether there is such a file in a group."""
        return _is_own(config_path) and "/" in config_path and super().is_config(place(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file."""
        return super().load_config(place(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        """List the files of a group."""
        return sorted(path.stem for path in (Path(self.path) / place(config_path)).glob("*.yaml"))


class OwnFirst(SearchPathPlugin):
    """Search where the user stands before what comes with the pipeline."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put the user's folder first, and the jobs/ of the pipeline last."""
        search_path.prepend("where you stand", "own://.")
        search_path.append("pipeline", f"own://{root()}")


def register_sources() -> None:
    """Tell Hydra of both; in this process only, so that no other program of Hydra's sees them."""
    for plugin in (OwnSource, OwnFirst):
        Plugins.instance().register(plugin)


def _is_own(config_path: str) -> bool:
    return config_path.partition("/")[0] in OWN


def place(config_path: str) -> str:
    """Say where a group or a file of it lies in a folder."""
    return config_path if config_path.partition("/")[0] == "jobs" else f"conf/{config_path}"
