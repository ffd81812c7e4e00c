"""transformers `generate`: fixed left-padded batches, sorted by prompt length.

A batch goes on to the longest max_new_tokens of its rows, and each row is cut to its own: that is what
people do, as `generate` takes one limit a call. The tokens cut off are not counted.
"""

import argparse
from collections.abc import Iterator

import hf
from common import Done, Row, batches, run


def generate(args: argparse.Namespace, loaded: hf.Loaded, rows: list[Row]) -> Iterator[Done]:
    import torch

    for batch in batches(sorted(rows, key=lambda row: len(row["prompt_token_ids"])), args.batch_size):
        ids = [row["prompt_token_ids"] for row in batch]
        inputs = loaded.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        limit = max(row["max_new_tokens"] for row in batch)
        with torch.inference_mode():
            tokens = loaded.model.generate(**inputs, max_new_tokens=limit)
        for row, made in zip(batch, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            yield hf.done(loaded, row, made)


if __name__ == "__main__":
    run("transformers", hf.load, generate)
