"""transformers' continuous batching: what `generate_batch` does, with a limit for each request.

The default takes 60 % of the free memory for its cache and fails on some machines; this asks for the
requests in flight that --batch-size says.
"""

import argparse
from collections.abc import Iterator

import hf
from common import Done, Row, run


def generate(args: argparse.Namespace, loaded: hf.Loaded, rows: list[Row]) -> Iterator[Done]:
    from transformers import ContinuousBatchingConfig

    page = 32
    longest = max(len(row["prompt_token_ids"]) + row["max_new_tokens"] for row in rows)
    config = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=args.batch_size * (longest // page + 2),
        max_batch_tokens=512,
        max_requests_per_batch=args.batch_size,
        use_async_batching=False,
    )
    by_id = {row["id"]: row for row in rows}
    with loaded.model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        eos = -1 if rows[0]["ignore_eos"] else None
        for row in rows:
            manager.add_request(
                row["prompt_token_ids"], row["id"], max_new_tokens=row["max_new_tokens"], eos_token_id=eos
            )
        while by_id:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError(f"generate_batch stopped with {len(by_id)} requests left")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(f"{result.request_id}: {result.error}")
                yield hf.done(loaded, by_id.pop(result.request_id), result.generated_tokens)


if __name__ == "__main__":
    run("transformers", hf.load, generate)
