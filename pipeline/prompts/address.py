"""Read the address of a dataset: hf://ORG/NAME?split=test&config=main, or a folder with the same behind it."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from pipeline.common.errors import PromptError
from pipeline.common.suggestions import did_you_mean

HUB = "hf://"
SAVED = ("state.json", "dataset_dict.json")  # what datasets writes beside what it saves
DATA = (".parquet", ".arrow", ".jsonl", ".csv", ".tsv")
KEYS = ("split", "config", "revision")


@dataclass(frozen=True, slots=True)
class Address:
    """Say which rows of which dataset are meant."""

    name: str  # ORG/NAME, or a folder
    on_hub: bool
    split: str | None = None
    config: str | None = None
    revision: str | None = None  # of the hub's: a branch, a tag or a commit

    @property
    def shown(self) -> str:
        """Write the address as it is typed."""
        asked = {key: value for key in KEYS if (value := getattr(self, key)) is not None}
        query = urlencode(asked, safe="/[]:%")
        return f"{HUB if self.on_hub else ''}{self.name}{'?' if query else ''}{query}"

    @property
    def advice(self) -> str:
        """Say what to look at where it cannot be read."""
        if self.on_hub:
            return "Check the name, split and config on its page, and that the hub can be reached (HF_HUB_OFFLINE)."
        return "Name a folder that datasets saved, or one of Parquet, JSON Lines or CSV files; ?split=… chooses one."


def dataset_address(text: str) -> Address | None:
    """Read an address; None where the words name a file.

    Raises:
        PromptError: it has another form, or a key that nobody knows.
    """
    name, _, query = text.partition("?")
    on_hub = text.startswith(HUB)
    if not on_hub and (Path(text).is_file() or not _holds_data(name)):
        return None
    name = name.removeprefix(HUB).removeprefix("datasets/") if on_hub else name
    if on_hub and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise PromptError(
            f"prompts={HUB}…: not the address of a dataset",
            f"Write it as {HUB}ORG/NAME?split=test&config=main.",
        )
    asked = dict(parse_qsl(query, keep_blank_values=True))
    if wrong := sorted(asked.keys() - set(KEYS)):
        near = did_you_mean(wrong[0], KEYS)
        raise PromptError(
            f"prompts={text}: no such key: {wrong[0]}", f"{near} The keys are {', '.join(KEYS)}."
        )
    return Address(name, on_hub, **{key: value for key, value in asked.items() if value})


def _cached_commit(address: Address) -> str | None:
    """Read which commit it was when the hub was last asked, for nodes that have no network."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=address.name, repo_type="dataset")
    try:
        return (folder / "refs" / (address.revision or "main")).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def files_of(path: str) -> list[Path]:
    """List the files that prompts are read from: one, all of a folder's, or none that lies here."""
    address = dataset_address(path)
    if address is None:
        return [Path(path)]
    return [] if address.on_hub else sorted(file for file in Path(address.name).rglob("*") if file.is_file())


def absolute(path: str) -> str:
    """Name prompts so that they are found from any folder; an address of the hub is the same everywhere."""
    return path if path.startswith(HUB) else str(Path(path).absolute())


def _holds_data(folder: str) -> bool:
    """Say whether it is a folder that datasets saved, or one of data files, as a repository of the hub is."""
    if not folder or not Path(folder).is_dir():
        return False
    names = {path.name for place in (Path(folder), Path(folder, "data")) for path in place.glob("*")}
    return not names.isdisjoint(SAVED) or any(Path(name).suffix in DATA for name in names)


def pinned(address: Address) -> Address:
    """Ask the hub which commit a dataset's revision is now, so that every later look reads the same rows.

    Where the hub does not answer, it is the commit that was last read here.

    Raises:
        PromptError: the hub does not say.
    """
    if not address.on_hub or re.fullmatch(r"[0-9a-f]{40}", address.revision or ""):
        return address
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(address.name, revision=address.revision, timeout=10).sha
    except Exception as error:  # whatever stands between here and the hub
        if commit := _cached_commit(address):
            return replace(address, revision=commit)
        raise PromptError(
            f"{address.shown}: the hub does not say which commit this is ({str(error).partition(chr(10))[0]})",
            "Check the name and the network; without one, add &revision=COMMIT of a dataset that was read before.",
        ) from error
    return replace(address, revision=commit)
