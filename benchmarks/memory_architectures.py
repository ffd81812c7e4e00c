"""Hold what is counted from a config against the loaded model, for tiny random models of every architecture."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pipeline.config.quant import QUANTS
from pipeline.memory.counted import read_answer
from pipeline.memory.counting import count
from pipeline.memory.measured import quantization_state_bytes
from pipeline.memory.plan import footprint_bytes, quant_state_bytes
from pipeline.models.formats import quantization

TESTS = Path(__file__).resolve().parent.parent / "tests"
CHECKED = ("none", "fp32", "int8", "nf4")


def table() -> str:
    """Markdown: architectures whose cells are the same share a line."""
    sys.path[:0] = [str(TESTS), str(TESTS / "engine")]
    from test_every_architecture import PATHS, build  # type: ignore[import-not-found]

    lines: dict[tuple[str, ...], list[str]] = {}
    for kind in sorted(PATHS):
        with tempfile.TemporaryDirectory() as folder:
            build(kind).to(torch.bfloat16).save_pretrained(folder)
            lines.setdefault(tuple(compared(folder)), []).append(kind)
    head = [" | ".join(("architectures", *CHECKED, "keys and values")), "---|" * 6]
    body = [f"{len(kinds)}: {', '.join(kinds)} | {' | '.join(cells)}" for cells, kinds in lines.items()]
    return "\n".join(f"| {line} |" for line in (head[0], *body)).replace(" |\n", f" |\n|{head[1]}\n", 1)


def compared(folder: str) -> list[str]:
    """For each quantization whether footprint and quantization state are exact; and the keys and values."""
    arch = read_answer(json.loads(json.dumps(count(json.loads((Path(folder) / "config.json").read_text())))))
    cells = []
    for name in CHECKED:
        model = load(folder, name)
        off = [
            predicted - measured
            for predicted, measured in (
                (footprint_bytes(arch, QUANTS[name]), model.get_memory_footprint()),
                (quant_state_bytes(arch, QUANTS[name]), quantization_state_bytes(model)),
            )
        ]
        cells.append("exact" if not any(off) else f"off by {off[0]:+,} + {off[1]:+,} bytes")
    estimated = arch.counted is not None and arch.counted.note is not None
    return [*cells, "estimated" if estimated else "by the engine's own pass"]


def load(folder: str, name: str) -> Any:
    quant = QUANTS[name]
    dtype = "auto" if quant.dtype.value == "auto" else getattr(torch, quant.dtype.value)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization(quant), device_map="cpu"
    )
