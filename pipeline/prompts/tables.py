"""Read tables as lines of JSON: Parquet, Arrow, and datasets of Hugging Face. Their libraries are imported here."""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.common.errors import PromptError
from pipeline.common.units import MIB
from pipeline.prompts.address import SAVED, Address, dataset_address
from pipeline.prompts.settings import BadLine, show
from pipeline.prompts.torn import Torn

BATCH_ROWS = 1024
EXTRA = "Run: pip install 'llm-job-pipeline[data]'"


def read_table(path: str, limit_bytes: int) -> Iterator[tuple[int, bytes | BadLine]]:
    """Read the rows, each with its number from 1. A null is a field that the row does not have.

    Args:
        limit_bytes: of a row; a larger one is a BadLine.

    Raises:
        PromptError: it is no such table, or two columns have one name.
        Torn: it is damaged.
    """
    number = 0
    for batch in _read(path):
        for row in _rows(batch, limit_bytes):
            number += 1
            yield number, row


def count_table(path: str, columns: Iterable[str]) -> int | None:
    """Count the rows without making them; None where it is damaged, or holds one of these columns.

    Raises:
        PromptError: as `read_table`.
    """
    rows = 0
    try:
        for batch in _read(path):
            if not set(columns).isdisjoint(batch.schema.names):
                return None
            rows += batch.num_rows
    except Torn:
        return None
    return rows


def _read(path: str) -> Iterator[Any]:
    """Read batches of whole rows, each checked; what is raised see `read_table`."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise PromptError(f"{path}: is read by pyarrow, which is not installed", EXTRA) from error
    address = dataset_address(path)
    with _torn(path, pa):
        for batch in _dataset(address) if address else _file(path, pa):
            batch.validate()
            if twice := next((n for n in batch.schema.names if batch.schema.names.count(n) > 1), None):
                raise PromptError(f"{path}: two columns are called {show(twice)}", "Give each its own name.")
            yield batch


@contextmanager
def _torn(path: str, pa: Any) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError) as error:  # ValueError: a column's name that is no UTF-8
        raise Torn(Path(path).suffix[1:] or "dataset", error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise Torn(Path(path).suffix[1:] or "dataset", error) from error  # pyarrow's own, of damaged data


def _file(path: str, pa: Any) -> Iterator[Any]:
    if path.lower().endswith(".parquet"):
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=MIB) as file:
            yield from file.iter_batches(BATCH_ROWS)
        return
    with pa.memory_map(path) as source:
        for batch in _batches(source, pa):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


def _batches(source: Any, pa: Any) -> Iterator[Any]:
    """Read a file's batches, or a stream's, as datasets saves them."""
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for i in range(file.num_record_batches):
        yield file.get_batch(i)


def _rows(batch: Any, limit_bytes: int) -> Iterator[bytes | BadLine]:
    """Read a batch; one that is damaged or large is taken apart, so that its good rows are read."""
    rows: list[dict[str, Any]] | None = None
    try:
        batch.validate(full=True)  # Arrow trusts its offsets, and would read where they lead
        if batch.nbytes <= limit_bytes:
            rows = batch.to_pylist()
        bad = BadLine(f"the row is {batch.nbytes} bytes long; the limit is {limit_bytes}", "Shorten it.")
    except (ValueError, OverflowError) as error:  # text that is no UTF-8, a date out of Python's range
        bad = BadLine(f"cannot be read ({error})", "Correct it, and save text as UTF-8.")
    if rows is not None:
        yield from map(_line, rows)
    elif batch.num_rows == 1:
        yield bad
    else:
        for i in range(batch.num_rows):
            yield from _rows(batch.slice(i, 1), limit_bytes)


def _line(row: dict[str, Any]) -> bytes | BadLine:
    fields = {name: value for name, value in row.items() if not _is_null(value)}
    try:
        return json.dumps(fields, default=_plain).encode()
    except TypeError as error:
        return BadLine(str(error), "Leave the column out, or write it as text.")


def _is_null(value: Any) -> bool:
    """Say whether a cell says nothing: pandas has NaN where a number is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> str:
    """Write dates, times and decimals as text; raise a TypeError for what is none."""
    if isinstance(value, bytes):
        raise TypeError(f"a cell holds {len(value)} bytes, and no text")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _dataset(address: Address) -> Iterator[Any]:
    """Read a saved dataset, a folder of data files, or a dataset of the hub, from its cache once it is there."""
    try:
        import datasets
        from datasets.utils.logging import set_verbosity_error
    except ImportError as error:
        raise PromptError(f"{address.shown}: is read by datasets, which is not installed", EXTRA) from error
    set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        found = _load(datasets, address)
    except Exception as error:  # datasets raises whatever the reader of a file does
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PromptError(f"{address.shown}: cannot be read as a dataset ({text})", address.advice) from error
    if isinstance(found, dict):
        found = _only(found, address)
    for table in _reported(found.with_format("arrow").iter(BATCH_ROWS)):
        yield from table.to_batches()


def _reported(tables: Iterable[Any]) -> Iterator[Any]:
    """Read on, and call whatever is wrong with the data by one name."""
    try:
        yield from tables
    except (PromptError, OSError):
        raise
    except Exception as error:  # as above
        raise Torn("dataset", error) from error


def _load(datasets: Any, address: Address) -> Any:
    folder = Path(address.name)
    if not address.on_hub and any((folder / name).exists() for name in SAVED):
        found = datasets.load_from_disk(str(folder))
        return found[address.split] if address.split and isinstance(found, dict) else found
    return datasets.load_dataset(
        address.name,
        address.config,
        split=address.split,
        revision=address.revision,
        streaming=not address.on_hub,  # what lies here is read where it lies, without a copy
    )


def _only(splits: dict[str, Any], address: Address) -> Any:
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise PromptError(
        f"{address.shown}: has several splits: {', '.join(splits)}",
        f"Choose one, as ?split={next(iter(splits))}.",
    )
