"""Gather the tokens that models are scored on: a job's completions, or a text file in windows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.common.errors import JobError
from pipeline.common.fingerprint import row_key
from pipeline.common.request import PromptRow
from pipeline.config.schema import Config
from pipeline.job.paths import JobPaths
from pipeline.job.rows import read_rows
from pipeline.models.scoring import TextRow
from pipeline.prompts.chat import prepare_chat, render
from pipeline.prompts.reader import open_prompts


def completion_rows(folder: Path, config: Config, tokenizer: Any, limit: int | None) -> list[TextRow]:
    """Put a job's completions after their prompts, which are read and rendered again.

    Raises:
        JobError: no completion is left to score.
        PromptError: the prompt file cannot be read.
    """
    asked = _prompts(folder, config)
    chat = prepare_chat(tokenizer, config)
    rows: list[TextRow] = []
    parts = JobPaths(folder).shards or [folder]
    answered = [row for part in parts for row in read_rows(JobPaths(part).rows)]
    for row in sorted(answered, key=lambda row: (row["index"], row.get("sample", 0))):
        prompt = asked.get(row["key"])
        if row["error"] or prompt is None or ("thinking" in row and "token_ids" not in row):
            continue
        made = row.get("token_ids") or tokenizer.encode(row["completion"], add_special_tokens=False)
        before = render(prompt, chat)
        if made and before:
            rows.append(TextRow((*before, *made), len(before)))
    if not rows:
        raise JobError(
            f"{folder}: no completion can be scored: none was written, the prompt file changed since, or the "
            "thinking text was parted without token_ids=true",
            "Run the job again.",
        )
    return rows[:limit]


def _prompts(folder: Path, config: Config) -> dict[str, PromptRow]:
    """Read the good rows of the job's prompt file, by their key."""
    kept = [path for part in (folder, *JobPaths(folder).shards) if (path := JobPaths(part).prompts).exists()]
    rows = open_prompts(replace(config, shard=None), str(kept[0]) if kept else None)
    return {row_key(row): row for row in rows if isinstance(row, PromptRow)}


def text_rows(path: Path, tokenizer: Any, window: int) -> list[TextRow]:
    """Cut a text in windows that do not overlap; every token but a window's first is scored.

    Raises:
        JobError: the file cannot be read, or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise JobError(f"text={path}: cannot be read ({error})", "Pass a UTF-8 text file.") from error
    token_ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    windows = [token_ids[i : i + window] for i in range(0, len(token_ids), window)]
    rows = [TextRow(tuple(ids), 1) for ids in windows if len(ids) > 1]
    if not rows:
        raise JobError(f"text={path}: holds fewer than two tokens", "Pass a longer text.")
    return rows
