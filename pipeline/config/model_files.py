"""Find where a model's files lie on this machine, without reading them."""

from pathlib import Path

CONFIG = "config.json"
ADAPTER = "adapter_config.json"


def local_folder(name: str, models_dir: str, mark: str = CONFIG) -> Path | None:
    """Find the folder of this name, else the one in models_dir with its last part; None is the hub's.

    Args:
        mark: the file that a folder in models_dir has to hold.
    """
    folder = Path(name).expanduser()
    staged = staged_folder(name, models_dir)
    return folder if folder.is_dir() else staged if (staged / mark).is_file() else None


def staged_folder(name: str, models_dir: str) -> Path:
    """Say where in models_dir a model of this name belongs."""
    return Path(models_dir).expanduser() / Path(name).name


def find_file(name: str, revision: str | None, models_dir: str, file: str = CONFIG) -> Path | None:
    """Find one of a model's files in its local folder, else in the hub's cache; None where neither has it."""
    if (folder := local_folder(name, models_dir, ADAPTER if file == ADAPTER else CONFIG)) is not None:
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache  # takes long, and a local folder does not need it
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None
