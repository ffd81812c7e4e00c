"""The texts that others are compared with: transformers `generate` in float32, one row at a time.

Rows that --out already has are kept, so that an interrupted run goes on.
"""

import argparse
import json
from collections.abc import Iterator

import hf
from common import Done, Row, run

Both = tuple[hf.Loaded, dict[str, Row]]  # the model, and the rows known already


def load(args: argparse.Namespace, rows: list[Row]) -> Both:
    args.dtype = "fp32"
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    return hf.load(args, rows), {row["id"]: row for row in map(json.loads, lines)}


def generate(_: argparse.Namespace, both: Both, rows: list[Row]) -> Iterator[Done]:
    import torch

    loaded, known = both
    for row in rows:
        if old := known.get(row["id"]):
            yield row, old["text"], old["completion_tokens"]
            continue
        ids = torch.tensor([row["prompt_token_ids"]])
        with torch.inference_mode():
            tokens = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=row["max_new_tokens"]
            )
        yield hf.done(loaded, row, tokens[0, ids.shape[1] :].tolist())


if __name__ == "__main__":
    run("transformers", load, generate)
