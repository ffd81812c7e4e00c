"""What the transformers peers share: the model, and the ids at which a text ends."""

import argparse
from dataclasses import dataclass
from typing import Any

from common import Done, Row, cut


@dataclass
class Loaded:
    model: Any
    tokenizer: Any
    eos: set[int]


def load(args: argparse.Namespace, rows: list[Row]) -> Loaded:
    """The model on the CPU, greedy; without an end of sequence where the rows ignore it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else ends[0]
    config.do_sample = False
    config.temperature = config.top_p = config.top_k = None
    if rows[0]["ignore_eos"]:
        config.eos_token_id = model.config.eos_token_id = None
    return Loaded(model, tokenizer, set(ends))


def done(loaded: Loaded, row: Row, token_ids: list[int]) -> Done:
    """One finished row from all that the model made for it."""
    token_ids = cut(token_ids, row, loaded.eos)
    return row, loaded.tokenizer.decode(token_ids, skip_special_tokens=True), len(token_ids)
