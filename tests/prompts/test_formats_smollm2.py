"""The same 200 rows in every format through the real model give the same outputs.jsonl, row for row."""

import json

import pytest
from job_helper import outputs
from test_formats import write

from pipeline.commands.door import main

NAMES = ("p.jsonl", "p.csv", "p.parquet")


@pytest.fixture(scope="module")
def rows():
    """Short questions, twenty of them ten times, so that the model has little to do."""
    return [
        {"id": f"q{i}", "prompt": f'Say "{i % 20}",\nor {chr(0xAC00 + i % 20)}', "topic": f"t{i}"}
        for i in range(200)
    ]


def test_the_same_200_rows_in_every_format_are_the_same_outputs(smollm2_dir, tmp_path, rows):
    written = []
    for name in NAMES:
        path = write(tmp_path / "files", name, rows)
        line = [f"model.name={smollm2_dir}", f"prompts={path}", f"outputs_dir={tmp_path / name}", "quant=bf16",
                "generation.max_new_tokens=2"]  # fmt: skip
        assert main(line) == 0
        written.append(sorted(json.dumps(row) for row in outputs(line)))
    assert len(written[0]) == 200
    assert all(lines == written[0] for lines in written)
