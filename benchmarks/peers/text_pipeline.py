"""transformers `pipeline("text-generation")` with a batch size, over the whole list of chats.

It takes one max_new_tokens for all rows: the largest; each row is cut to its own.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import hf
from common import Done, Row, run


def load(args: argparse.Namespace, rows: list[Row]) -> tuple[hf.Loaded, Any]:
    from transformers import pipeline

    loaded = hf.load(args, rows)
    loaded.tokenizer.pad_token_id = loaded.model.generation_config.pad_token_id
    return loaded, pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer)


def generate(args: argparse.Namespace, both: tuple[hf.Loaded, Any], rows: list[Row]) -> Iterator[Done]:
    loaded, pipe = both
    chats = [row["messages"] for row in rows]
    limit = max(row["max_new_tokens"] for row in rows)
    answers = pipe(chats, batch_size=args.batch_size, max_new_tokens=limit, return_tensors=True)
    for row, answer in zip(rows, answers, strict=True):
        prompt, tokens = row["prompt_token_ids"], answer[0]["generated_token_ids"]
        start = next(i for i in range(len(tokens)) if tokens[i : i + len(prompt)] == prompt)  # after padding
        yield hf.done(loaded, row, tokens[start + len(prompt) :])


if __name__ == "__main__":
    run("transformers", load, generate)
