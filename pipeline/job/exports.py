"""Write a job's answers in the shapes that other tools read; outputs.jsonl stays as it is."""

import csv
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.common.errors import ConfigError, OutputError
from pipeline.job.card import dataset_card
from pipeline.job.paths import JobPaths
from pipeline.job.rows import encode_row, parse_row
from pipeline.job.stored import read_manifest

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would compute
NO_CHANCE = -9999.0  # OpenAI's word for the logprob of a token that cannot come
BATCH_ROWS = 1024
PART = Path("data", "train-00000-of-00001.parquet")
DATASET = {Path("data"), PART, Path("README.md")}  # all that is in a dataset's folder
Flat = dict[str, Any]


@dataclass
class Answers:
    """Hold where the lines of a job and its shards lie, by the order of the prompt file, and their columns."""

    folder: Path
    files: list[Path]
    places: list[tuple[int, int, int, int]]  # index, sample, file, offset
    kinds: dict[str, set[type]] = field(default_factory=dict)  # of each column of `flat`
    roles: dict[str, None] = field(default_factory=dict)  # the keys that messages have
    calls: bool = False  # a message has more than texts

    @classmethod
    def find(cls, folder: Path, damaged: Callable[[str], object]) -> "Answers":
        """Read every line once.

        Args:
            damaged: is told of each line that is left out.

        Raises:
            OutputError: there is none.
        """
        paths = JobPaths(folder)
        shards = [] if paths.rows.exists() else paths.shards
        found = cls(folder, [JobPaths(part).rows for part in shards or [folder]], [])
        for number, path in enumerate(found.files):
            for offset, row in _lines(path, damaged):
                found.places.append((row["index"], row["sample"], number, offset))
                found.note(row)
        if not found.places:
            raise OutputError(
                f"{paths.rows}: holds no answers", "Name a job's folder, and run the job first."
            )
        found.places.sort()
        return found

    def note(self, row: dict[str, Any]) -> None:
        """Note which columns a row has, and of which kinds."""
        for name, value in flat(row).items():
            self.kinds.setdefault(name, set()).add(type(value))
        for message in row.get("messages") or []:
            self.roles |= dict.fromkeys(message)
            self.calls |= any(isinstance(said, list | dict) for said in message.values())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read the lines in order."""
        with ExitStack() as stack:
            used = sorted({number for _, _, number, _ in self.places})
            files = {number: stack.enter_context(self.files[number].open("rb")) for number in used}
            for _, _, number, offset in self.places:
                files[number].seek(offset)
                row = parse_row(files[number].readline())
                if row is None:
                    raise OutputError(
                        f"{self.files[number]}: was changed while it was read", "Export it again."
                    )
                yield row


def _lines(path: Path, damaged: Callable[[str], object]) -> Iterator[tuple[int, dict[str, Any]]]:
    offset = 0
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            row = parse_row(line)
            if row is None:
                damaged(f"{path}:{number}")
            else:
                yield offset, row
            offset += len(line)


def flat(row: dict[str, Any]) -> Flat:
    """Lay a row out in columns: its own, then its metadata's under their names, or metadata_NAME where one is taken."""
    usage = row.get("usage") or {}
    own: Flat = {
        name: row.get(name) for name in ("id", "index", "sample", "prompt", "messages", "completion")
    }
    own |= {name: row.get(name) for name in ("finish_reason", "error")}
    own |= {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    own |= {
        name: row[name] for name in ("thinking", "token_ids", "logprobs", "label_logprobs") if name in row
    }
    more = row.get("metadata") or {}
    return own | {f"metadata_{name}" if name in own else name: value for name, value in more.items()}


def to_jsonl(answers: Answers, path: Path) -> None:
    """Write the columns as JSON Lines."""
    with path.open("wb") as file:
        for row in answers.rows():
            file.write(encode_row(flat(row)))


def to_csv(answers: Answers, path: Path) -> None:
    """Write the columns as CSV; what is no text and no number, as JSON.

    A text that a spreadsheet would take for a formula gets a quote before it: answers are not to be trusted.
    """
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        out = csv.writer(file)  # its own line end: with another it leaves a lone \r unquoted
        out.writerow([_cell(name) for name in answers.kinds])
        for row in answers.rows():
            columns = flat(row)
            out.writerow([_cell(columns.get(name)) for name in answers.kinds])


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    text = _text(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def _text(value: Any) -> str:
    """Give a text without halves of characters, which no file of another format can hold."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def to_parquet(answers: Answers, path: Path) -> None:
    """Write the columns as Parquet; one of mixed or nested values holds JSON as text.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(
            "to=: is written by pyarrow, which is not installed", "Run: pip install 'llm-job-pipeline[data]'"
        ) from error
    types = {name: _type(pa, name, kinds, answers) for name, kinds in answers.kinds.items()}
    schema = pa.schema(list(types.items()))
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        batch: list[Flat] = []
        for row in answers.rows():
            columns = flat(row)
            batch.append({name: _value(columns.get(name), types[name], pa) for name in types})
            if len(batch) == BATCH_ROWS:
                file.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        file.write_table(pa.Table.from_pylist(batch, schema))


def _type(pa: Any, name: str, kinds: set[type], answers: Answers) -> Any:
    if name == "messages" and answers.roles and not answers.calls:
        return pa.list_(pa.struct([(key, pa.string()) for key in answers.roles]))
    if name == "token_ids":
        return pa.list_(pa.int64())
    match sorted(kind.__name__ for kind in kinds - {type(None)}):
        case ["bool"]:
            return pa.bool_()
        case ["int"] if name in ("index", "sample", "prompt_tokens", "completion_tokens"):
            return pa.int64()
        case ["int"] | ["float"] | ["float", "int"]:
            return pa.float64() if float in kinds else pa.int64()
        case _:
            return pa.string()


def _value(value: Any, kind: Any, pa: Any) -> Any:
    if value is None or not pa.types.is_string(kind):
        return value
    return _text(value)


def to_datasets(answers: Answers, folder: Path) -> None:
    """Write a folder that `datasets.load_dataset` reads and the hub takes: Parquet, and a card."""
    (folder / PART).parent.mkdir(parents=True)
    to_parquet(answers, folder / PART)
    (folder / "README.md").write_text(dataset_card(answers.folder, len(answers.places)), encoding="utf-8")


def to_openai(answers: Answers, path: Path) -> None:
    """Write a line a row as OpenAI's batch output has it: the samples are choices, an error is one."""
    manifest = read_manifest(JobPaths(answers.folder))
    model = str(manifest.get("model") or answers.folder.name)
    created = int(time.time())
    with path.open("wb") as file:
        for _, samples in groupby(answers.rows(), key=lambda row: row["index"]):
            file.write(encode_row(_batch_line(list(samples), model, created)))


def _batch_line(samples: list[dict[str, Any]], model: str, created: int) -> dict[str, Any]:
    first = samples[0]
    good = [row for row in samples if row["error"] is None]
    failed = next((row["error"] for row in samples if row["error"] is not None), None)
    body = {"id": f"chatcmpl-{first['key']}", "object": "chat.completion", "created": created, "model": model,
            "choices": [_choice(row) for row in good], "usage": _usage(good)}  # fmt: skip
    return {
        "id": f"batch_req_{first['key']}",
        "custom_id": first["id"],
        "response": {"status_code": 200, "request_id": first["key"], "body": body} if good else None,
        "error": None if failed is None else {"code": "row_failed", "message": failed},
    }


def _choice(row: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": row["completion"], "refusal": None}
    if row.get("thinking") is not None:
        message["reasoning_content"] = row["thinking"]
    labels = {"label_logprobs": row["label_logprobs"]} if "label_logprobs" in row else {}
    logprobs = row.get("logprobs")
    return {
        "index": row["sample"],
        "message": message,
        "finish_reason": row["finish_reason"],
        "logprobs": None if logprobs is None else {"content": list(map(_logprob, logprobs)), "refusal": None},
        **labels,
    }


def _logprob(item: dict[str, Any]) -> dict[str, Any]:
    """Say a token as OpenAI does; its bytes are not known where it is part of a character."""
    own = {"token": item["token"], "logprob": NO_CHANCE if item["logprob"] is None else item["logprob"]}
    return (
        own | {"bytes": None} | ({"top_logprobs": list(map(_logprob, item["top"]))} if "top" in item else {})
    )


def _usage(good: list[dict[str, Any]]) -> dict[str, int]:
    """Count the prompt once, and the tokens of all samples."""
    asked = good[0]["usage"]["prompt_tokens"] if good else 0
    made = sum(row["usage"]["completion_tokens"] for row in good)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


FORMATS: dict[
    str, tuple[str, Callable[[Answers, Path], None]]
] = {  # the name of what is written, and its writer
    "openai": ("openai.jsonl", to_openai),
    "parquet": ("outputs.parquet", to_parquet),
    "csv": ("outputs.csv", to_csv),
    "jsonl": ("outputs.jsonl", to_jsonl),
    "datasets": ("dataset", to_datasets),
}
