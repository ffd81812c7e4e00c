"""Name the base model of a command line that names an adapter alone."""

import json
import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from pipeline.common.errors import ConfigError
from pipeline.config.model_files import ADAPTER, find_file

PATIENCE_SEC = 3
_PLAIN = re.compile(r"[\w./:~@+-]+")  # what Hydra takes without quotes


def with_base(overrides: list[str]) -> list[str]:
    """Add the model that adapter_config.json names, where a model is chosen by nothing but model.adapter=.

    Raises:
        ConfigError: there is no such file to be had, or it names none.
    """
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    adapter = given.get("model.adapter", "").strip("\"'")
    # Of a sweep that Hydra itself takes apart, no one base can be named.
    if adapter in ("", "null") or "," in adapter or given.keys() & {"model", "model.name"}:
        return overrides
    base, revision = _base_of(adapter, given.get("models_dir", "models"))
    found = [
        f"model.name={base if _PLAIN.fullmatch(base) else QuotedString(base, Quote.double).with_quotes()}"
    ]
    if revision and "model.revision" not in given and not Path(base).expanduser().is_dir():
        found.append(f"model.revision={revision}")
    return [*overrides, *found]


def _base_of(adapter: str, models_dir: str) -> tuple[str, str | None]:
    """Read which model an adapter was made for, and of which revision; the hub is asked where need be."""
    fix = "Name the model too, with model=NAME or model.name=ORG/NAME"
    path = find_file(adapter, None, models_dir, ADAPTER) or _fetch(adapter)
    if path is None:
        raise ConfigError(
            f"model.adapter={adapter}: no {ADAPTER} there, nor on the hub", f"Correct it. {fix}"
        )
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{path}: not a JSON object", "Copy or download the adapter again") from error
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(f"{path}: does not say which model the adapter is for", fix)
    return base, revision if isinstance(revision, str) else None


def _fetch(adapter: str) -> Path | None:
    """Get the file from the hub; None where there is none, or no answer within seconds."""
    if Path(adapter).expanduser().is_dir():
        return None
    # They take long, and a local folder does not need them.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    network_error: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        get_hf_file_metadata(hf_hub_url(adapter, ADAPTER), timeout=PATIENCE_SEC)  # as models/hub.py does
        return Path(hf_hub_download(adapter, ADAPTER, etag_timeout=PATIENCE_SEC))
    except (OSError, ValueError, network_error):
        return None
