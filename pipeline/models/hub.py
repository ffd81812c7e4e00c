"""Get a model's files from the hub or its cache, and say what stands in the way."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import (
    get_hf_file_metadata,
    get_safetensors_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars, tqdm

from pipeline.common.bars import BytesBar
from pipeline.common.errors import LoadError
from pipeline.config.schema import ModelConfig

log = logging.getLogger(__name__)

PATIENCE_SEC = 3  # for a file that is good to have
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
# Other copies of the weights, which some repositories keep beside the ones that transformers reads.
OTHER_COPIES = ["*/*.safetensors", "*/*.bin", "consolidated*", "training_args.bin", "*.fp16.*"]
# The base of the hub's network errors: httpx or its successor, whichever this hub client uses.
NetworkError: type[Exception] = HfHubHTTPError.__mro__[1]


def page(name: str) -> str:
    """Return the address of a model's page."""
    return f"https://huggingface.co/{name}"


def fetch_file(model: ModelConfig, file: str) -> Path | None:
    """Get one small file, and return its folder; None where the hub has none, or gives no answer in time."""
    try:
        # Asked first: a hub that gives no answer hf_hub_download asks six times, in half a minute, and says each.
        get_hf_file_metadata(hf_hub_url(model.name, file, revision=model.revision), timeout=PATIENCE_SEC)
        path = hf_hub_download(model.name, file, revision=model.revision, etag_timeout=PATIENCE_SEC)
        return Path(path).parent
    except (OSError, HFValidationError, NetworkError):
        return None


def fetch_headers(name: str, revision: str | None) -> list[tuple[str, str, Any, Any]] | None:
    """Get name, dtype, shape and place of each tensor in a model's safetensors, and no weights.

    Returns:
        None where the hub has none, or gives no answer.
    """
    disable_progress_bars()
    try:
        found = get_safetensors_metadata(name, revision=revision)
    except (OSError, HFValidationError, NetworkError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    return [
        (tensor_name, tensor.dtype, tensor.shape, tensor.data_offsets)
        for file in found.files_metadata.values()
        for tensor_name, tensor in file.tensors.items()
    ]


def download(model: ModelConfig, staged: Path, near: str, *, weights: bool) -> Path:
    """Get all files of a model that the cache lacks, with or without the weights.

    Args:
        staged: where the files can be put by hand.
        near: a folder whose name is like the model's, to end a sentence with; or "".

    Raises:
        LoadError: the hub has no such model, or does not give it, or cannot be reached.
    """
    patterns = SMALL_FILES + (["*.py"] if model.trust_remote_code else [])
    if weights:
        patterns += ["*.safetensors"] if model.safetensors_only else ["*.safetensors", "*.bin"]
        log.info("%s: looking in the hub's cache, and downloading what is missing there", model.name)
    try:
        with BytesBar(f"Downloading {model.name}") as bar:
            folder = snapshot_download(
                model.name,
                revision=model.revision,
                allow_patterns=patterns,
                ignore_patterns=OTHER_COPIES,
                tqdm_class=_reporter(bar),
            )
    except (OSError, HFValidationError, NetworkError) as error:
        raise LoadError(*_explain(error, model, staged, near)) from error
    return Path(folder)


def _reporter(bar: BytesBar) -> type[tqdm]:
    """Make the class of bars that the hub's client reports to."""

    class Reporter(tqdm):
        """Hand on what is downloaded; draw nothing."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._of_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.n = options.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._of_bytes:  # and not of files
                bar.update(self.n, self.total)

    return Reporter


def _explain(error: BaseException, model: ModelConfig, staged: Path, near: str) -> tuple[str, str]:
    """Say what was found, and what to do."""
    name = model.name
    if isinstance(error, HFValidationError):
        found = f"{name}: no such folder, and not a name on the hub either (ORG/NAME)"
        return found, f"Correct model.name{near}"
    if isinstance(error, GatedRepoError):
        fix = f"Accept the terms at {page(name)}, log in with `hf auth login` (or set HF_TOKEN)"
        return (
            f"{name}: gated, and this account has no access to it",
            f"{fix}, and run the same command again",
        )
    if isinstance(error, RepositoryNotFoundError):
        fix = "Correct model.name, or log in with `hf auth login` if it is private"
        return f"{name}: no such model on the hub, or a private one", fix + near
    if isinstance(error, RevisionNotFoundError):
        fix = f"Choose a branch or tag of {page(name)}/tree/main"
        return f"{name}: no revision {model.revision!r}", fix
    refused = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if refused in (401, 403):
        fix = "Log in again with `hf auth login`, or correct HF_TOKEN"
        return f"{name}: the hub refused the access token ({refused})", fix
    if isinstance(error, LocalEntryNotFoundError | NetworkError | ConnectionError):
        found = f"{name}: not in {staged.parent} or the hub's cache, and the hub cannot be reached"
        return found, f"With a network, {bring(name, staged)}{near}"
    return (
        f"{name}: could not be downloaded: {error}",
        "Check the disk's free space and HF_HOME's permissions",
    )


def bring(name: str, staged: Path) -> str:
    """Say how a model comes to a machine without a network."""
    return f"run `hf download {name} --local-dir {staged}` and bring that folder here"
