"""Write report.html: one file that needs no network, whatever the number of rows.

Completions lie in it compressed, a few hundred to a chunk, and are unpacked when they are looked at.
The page obeys nothing that a model wrote: its policy allows one script and one style sheet, by their
hashes, and the script puts all text in as text.
"""

import base64
import gzip
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from pipeline.common import terminal
from pipeline.report.prompts import Answer, Prompt
from pipeline.report.summary import Record
from pipeline.report.table import columns, lines, notes

HERE = Path(__file__).parent
CHUNK_ANSWERS = 1000  # unpacked at once when one of its prompts is looked at
HAS_ERROR, DIFFERS = 1, 2  # flags, as in page.js


def write_page(
    path: Path,
    title: str,
    made: str,
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    plots: Sequence[dict[str, Any]],
    missing_plots: Sequence[str],
) -> None:
    """Write the page.

    Args:
        plots: name, title, caption, and as images the SVGs: light, dark, and narrow ones of both for a phone.
        missing_plots: titles of those that no job had figures for.
    """
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    size = max(1, CHUNK_ANSWERS // len(records))
    stream = (
        templates()
        .get_template("page.html.j2")
        .stream(
            title=title,
            made=made,
            records=records,
            tables=list(_tables(records)),
            rows=lines(records),
            notes=notes(records),
            prompt_count=len(prompts),
            error_count=sum(record["rows"]["errors"] for record in records),
            plots=[
                {**plot, "images": {name: _base64(text.encode()) for name, text in plot["images"].items()}}
                for plot in plots
            ],
            missing_plots=missing_plots,
            setups=[_setup(record) for record in records],
            index=_pack(_index(records, prompts, size)),
            chunks=_chunks(prompts, size),
            style=Markup(style),
            script=Markup(script),
            style_hash=csp_hash(style),
            script_hash=csp_hash(script),
        )
    )
    with path.open("wb") as file:
        stream.dump(file, encoding="utf-8", errors="replace")


def templates() -> jinja2.Environment:
    """Find the pages' templates; whatever they are given is text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = lambda value: terminal.visible(str(value))
    return environment


def _tables(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Lay out two tables, neither wider than a laptop's screen: what people come for, and all else."""
    label, *others = columns(records)
    first = [label, *(column for column in others if column.first)]
    yield {"id": "jobs", "columns": first, "rows": lines(records, first)}
    rest = [label, *(column for column in others if not column.first and not column.text)]
    ran = [line for line in lines(records, rest) if not line.failed]
    yield {"id": "more", "columns": rest, "rows": ran}


def _chunks(prompts: Sequence[Prompt], size: int) -> Iterator[str]:
    for first in range(0, len(prompts), size):
        yield _pack([_prompt(prompt) for prompt in prompts[first : first + size]])


def _prompt(prompt: Prompt) -> dict[str, Any]:
    return {
        "asked": prompt.asked,
        "reference": prompt.reference,
        "answers": [answer and _answer(answer) for answer in prompt.answers],
        "agreement": prompt.agreement,
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.completion,
        "error": answer.error,
        "end": answer.finish_reason,
        "tokens": answer.completion_tokens,
        "thinking": answer.thinking,
    }


def _index(records: Sequence[Record], prompts: Sequence[Prompt], size: int) -> dict[str, Any]:
    """Collect what sorting and filtering need of every prompt."""
    labels = [record["label"] for record in records]
    bases = [labels.index(record["baseline"]) if record["baseline"] else None for record in records]
    return {
        "chunk_rows": size,
        "jobs": [{"label": label, "baseline": base} for label, base in zip(labels, bases, strict=True)],
        "ids": [prompt.id for prompt in prompts],
        "sets": [prompt.prompt_set for prompt in prompts],
        "samples": [prompt.sample for prompt in prompts],
        "disagreement": [_disagreement(prompt) for prompt in prompts],
        "length": [max((a.completion_tokens for a in prompt.answers if a), default=0) for prompt in prompts],
        "flags": [_flags(prompt) for prompt in prompts],
        "errors": [
            (number, job, answer.error)
            for number, prompt in enumerate(prompts)
            for job, answer in enumerate(prompt.answers)
            if answer and answer.error
        ],
    }


def _disagreement(prompt: Prompt) -> float:
    """Measure how much of the answers, on average, is not the baseline's."""
    known = [agreement for agreement in prompt.agreement if agreement is not None]
    return round(1 - sum(known) / len(known), 4) if known else 0.0


def _flags(prompt: Prompt) -> int:
    answers = [answer for answer in prompt.answers if answer]
    failed = any(answer.error for answer in answers)
    differs = len({answer.completion for answer in answers if not answer.error}) > 1
    return HAS_ERROR * failed + DIFFERS * differs


def _setup(record: Record) -> dict[str, Any]:
    setup = record["setup"]
    manifest = setup["manifest"]
    device = manifest.get("device") or {}
    facts = [
        (name, value) for name, value in manifest.items() if not isinstance(value, dict) and value is not None
    ]
    facts += [(name, _plain(value)) for name, value in device.items() if value]
    facts += list((manifest.get("versions") or {}).items())
    facts += [
        (
            f"suggested generation, {name.replace('_', ' ')}",
            ", ".join(f"{k}={v}" for k, v in settings.items()),
        )
        for name, settings in (manifest.get("suggested_generation") or {}).items()
        if settings
    ]
    config = (
        yaml.safe_dump(setup["config"], sort_keys=False, allow_unicode=True) if setup["config"] else "unknown"
    )
    return {
        "label": record["label"],
        "folder": record["folder"],
        "command": shlex.join(setup["command"]),
        "facts": facts,
        "config": config,
    }


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pack(value: Any) -> str:
    """Compress JSON, and write it in letters that mean nothing to HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _base64(gzip.compress(text.encode("utf-8", "replace"), compresslevel=6, mtime=0))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def csp_hash(text: str) -> str:
    """Name a style sheet or script as a page's policy does."""
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"
