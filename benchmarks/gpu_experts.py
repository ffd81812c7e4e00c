"""What a mixture's decode steps take on a GPU: experts in bf16, nf4 and int8, by our kernels and dequantized.

    python benchmarks/gpu_experts.py --out DIR            # Qwen3-30B-A3B's layers, 12 of its 48
    python benchmarks/gpu_experts.py --tiny --out DIR     # a rehearsal on a CPU

Weights are random, made on the card; routers choose as they like, so that most experts are met by many rows.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_check import Check, job, off, prepare_jobs, requests, speed

from pipeline.config.quant import QUANTS
from pipeline.engine.paged.replaced import replace_products
from pipeline.engine.probe import choose_forward
from pipeline.models.formats import quantization
from pipeline.models.quantized_experts import held_experts, prepare_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--quants", nargs="*", default=["nf4", "int8", "none"])
    parser.add_argument("--dequantized", action="store_true", help="also without our kernels")
    parser.add_argument(
        "--jobs", nargs="*", default=[], help="quantizations of whole jobs, predicted beside measured"
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="of the jobs"
    )
    check = Check(parser.parse_args())
    check.arguments.stages = []
    check.arguments.budget = 1e9
    check.arguments.out.mkdir(parents=True, exist_ok=True)
    for quant in check.arguments.quants:
        for own in (True, False) if check.arguments.dequantized and quant != "none" else (True,):
            check.stage(
                f"{quant}{'' if own else ' dequantized'}", lambda q=quant, o=own: measure(check, q, o)
            )
    if check.arguments.jobs:
        check.stage("jobs", lambda: run_jobs(check))


def run_jobs(check: Check) -> dict[str, Any]:
    """Run whole jobs, each in a process of its own."""
    work = Path("/dev/shm" if check.cuda else check.arguments.out) / "gpu_experts"
    folder, prompts = prepare_jobs(check, make(check, "none"), work)
    check.free()
    found = {}
    for quant in check.arguments.jobs:
        found[quant] = job(folder, prompts, work / quant, quant)
        check.say(f"job {quant}: {found[quant]}")
    shutil.rmtree(work)
    return found


@torch.inference_mode()
def measure(check: Check, quant: str, own: bool) -> dict[str, Any]:
    """Decode with so many rows; with our kernels, compare a layer's experts with their dequantized matrices."""
    model = make(check, quant)
    found: dict[str, Any] = {"model_mb": model.get_memory_footprint() / 1e6}
    experts = [module for module in model.modules() if held_experts(module)]
    if own and experts:
        rows = torch.randn(64, model.config.hidden_size, device=check.device, dtype=torch.bfloat16)
        chosen = torch.rand(64, model.config.num_experts, device=check.device).topk(8).indices
        weights = torch.rand(64, 8, device=check.device, dtype=torch.bfloat16)
        expected = experts[0](rows, chosen, weights)
        found["dequantized_us"] = 1e3 * check.median_ms(lambda: experts[0](rows, chosen, weights), 5)
        found["replaced"] = replace_products(model)
        found["off"] = off(experts[0](rows, chosen, weights), expected)
        found["own_us"] = 1e3 * check.median_ms(lambda: experts[0](rows, chosen, weights), 5)
        if check.cuda:
            found["own_in_a_graph_us"] = check.replay_us(lambda: experts[0](rows, chosen, weights))
    forward, report = choose_forward(model)
    found["path"] = report["path"]
    for count in check.arguments.rows:
        for new in (4, 48 if own else 8):  # the first compiles
            wanted = requests(count, check.prompt_tokens, new, model.config.vocab_size)
            speed(check, found, f"{quant} {count} rows", forward, wanted, count)
    found["recorded"] = getattr(forward, "_captures", None)
    return found


def make(check: Check, quant: str) -> Any:
    """Make a random model, and quantize its experts one by one, as loading does."""
    large = check.cuda
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048 if large else 64, moe_intermediate_size=768 if large else 64,
        num_experts=128 if large else 8, num_experts_per_tok=8, num_attention_heads=32 if large else 2,
        num_key_value_heads=4 if large else 2, head_dim=128 if large else 32, vocab_size=151936 if large else 49152,
        num_hidden_layers=check.arguments.layers if large else 2, max_position_embeddings=40960,
        decoder_sparse_step=1, norm_topk_prob=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = check.random_model(config, torch.bfloat16)
    for module in [] if quant == "none" else model.modules():
        prepare_experts(module, quantization(QUANTS[quant]))
        for name, held in held_experts(module).items():
            setattr(module, name, held.pack(getattr(module, name).data))
    check.free()
    return model


if __name__ == "__main__":
    main()
