"""Time decode steps of a random model of a Llama's shape in several precisions, beside what the machine allows.

    python benchmarks/step.py --rows 1 4 32 128
    python benchmarks/step.py --shape 8b --quant nf4 --rows 1             # 20 GiB while it is made
    python benchmarks/step.py --older amx avx10 avx512                    # as a CPU without AVX-512 would
    GOMP_SPINCOUNT=0 python benchmarks/step.py --cpu-time                 # where others use the cores, too

In brackets: what reading the weights takes at that speed, and the products at that of torch in float32.
"""

import argparse
from typing import Any

from products import arguments, fastest, prepare, quantized

PROMPT = 48  # tokens of each row
SHAPES = {  # hidden, inner, layers, heads, vocabulary, whether the head is the embedding; 8 key heads
    "1b": (2048, 8192, 16, 32, 128256, True),  # Llama 3.2's
    "8b": (4096, 14336, 32, 32, 128256, False),  # Llama 3.1's
}
STEPS = 10  # of which the fastest counts; the contenders take turns


def main() -> None:
    parser = arguments(__doc__, [1, 4, 32, 128])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--vocabulary", type=int, help="likewise")
    parser.add_argument("--quant", nargs="+", default=["bf16", "int8", "nf4", "fp32"])
    args = parser.parse_args()
    clock, bandwidth, peak = prepare(args)
    import torch

    models = {name: make(args, name) for name in args.quant}
    print(f"{'rows':>9}" + "".join(f"{name:>52}" for name in models))
    with torch.inference_mode():
        for rows in args.rows:
            steps = [step_of(model, rows) for model in models.values()]
            print(f"{rows:9}", end="")
            for model, sec in zip(models.values(), fastest(steps, clock, STEPS), strict=True):
                read, flops = weights_of(model)
                least = read / bandwidth / 1e6, flops * rows / peak / 1e6
                print(f"{sec * 1e3:9.1f} ms {rows / sec:7.1f} tokens/s", end="")
                print(f" (read {least[0]:.1f}, in float32 {least[1]:.1f})".ljust(32), end="")
            print()


def make(args: argparse.Namespace, quant: str) -> Any:
    """Make a random model, packed as a job would."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    from pipeline.engine.cpu import load_kernels
    from pipeline.engine.cpu.packing import pack_weights

    if load_kernels() is None:
        raise SystemExit("this needs numba, and a torch that is linked with libgomp")
    dtype = torch.float32 if quant == "fp32" else torch.bfloat16
    hidden, inner, layers, heads, vocabulary, tied = SHAPES[args.shape]
    config = LlamaConfig(
        vocab_size=args.vocabulary or vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=args.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=hidden // heads,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype) / 50
    for weight in model.parameters():  # drawing each number of 8 billion takes minutes
        if weight.dim() == 1:
            weight.data.fill_(1)
            continue
        for part in weight.data.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])
    linears = [
        (m, n, c) for m in model.model.modules() for n, c in m.named_children() if hasattr(c, "in_features")
    ]
    for parent, name, linear in linears:
        setattr(parent, name, quantized(linear, quant))
    pack_weights(model)
    return model


def step_of(model: Any, rows: int) -> Any:
    """Prefill rows, and return a decode step, which writes to the same place each time."""
    from pipeline.common.request import GenerationParams, Request
    from pipeline.engine.rectangles.forward import FlatForward
    from pipeline.engine.scheduler import Sample

    forward = FlatForward(model)
    requests = [Request(str(row), tuple(range(row, row + PROMPT)), GenerationParams()) for row in range(rows)]
    samples = [Sample(request, 0) for request in requests]
    rectangle, _ = forward.prefill(samples, None, rows * PROMPT)
    for sample in samples:
        sample.token_ids.append(1)
    return lambda: forward.decode([rectangle])


def weights_of(model: Any) -> tuple[int, int]:
    """Count the bytes of linear layers' weights that a step reads, and the operations of a row's products."""
    layers = [m for m in model.modules() if hasattr(m, "in_features")]
    flops = sum(2 * m.in_features * m.out_features for m in layers)
    packed = {id(m.packed): m.packed.weight.numbers.nbytes for m in layers if hasattr(m, "packed")}
    return sum(packed.values()) + sum(m.weight.nbytes for m in layers if not hasattr(m, "packed")), flops


if __name__ == "__main__":
    main()
