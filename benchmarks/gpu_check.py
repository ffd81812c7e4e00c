"""What a GPU makes of this project: one script, one card, under 8 minutes; a short table last, JSON beside it.

    python benchmarks/gpu_check.py --out DIR            # on a GPU
    python benchmarks/gpu_check.py --tiny --out DIR     # the same on a CPU, with tiny shapes: a rehearsal

Needs no network: weights are random and made here, since speed and memory do not depend on values. Each
stage is caught and timed, and none begins after --budget seconds:

    env      versions, bandwidth, matrix rate, a launch
    first    the first lines of a job, in a process of its own
    tune     other shapes of the kernels that --tune names
    kernels  each kernel beside torch in float32: its error, its time
    exact    greedy text in float32 beside `generate`, tiny models of nine architectures
    sampled  sampled text by pages and by rectangles
    profile  one decode step: kernels, launches, waits, how busy the GPU is
    speed    Llama-3.1-8B's shape in bf16: pages, rectangles, `generate` in a batch, `generate_batch`
    recorded texts of recorded steps beside those of steps launched one by one, four layers in 4 and 8 bits
    oom      a hard cap on memory: the same text, in smaller batches
    jobs     whole jobs in nf4, bf16 and int8: predicted beside measured
"""

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.engine.before_torch import set_environment

set_environment()  # as a job's process does, before torch is there

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from pipeline.common.request import Completion, GenerationParams, Request
from pipeline.config.quant import QUANTS
from pipeline.config.schema import ModelConfig
from pipeline.engine.engine import Engine
from pipeline.engine.paged.replaced import replace_products
from pipeline.engine.probe import choose_forward
from pipeline.models.loading import load_model

SHAPES = {  # hidden, inner, layers, heads, key heads, vocabulary
    "tiny": (64, 192, 2, 4, 2, 49152),  # the vocabulary of the borrowed tokenizer
    "small": (128, 320, 16, 8, 8, 1024),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
TUNED_ROWS = (1, 5, 16, 32, 64, 128)
PRODUCT_SHAPES = {  # by bits: outputs, inputs, rows, warps, stages, programs
    8: [
        (128, 64, 128, 8, 3, 264), (128, 64, 128, 4, 3, 264), (128, 64, 128, 4, 4, 264), (128, 64, 128, 4, 4, 396),
        (128, 64, 128, 8, 4, 132), (128, 64, 64, 4, 4, 264), (128, 128, 128, 8, 3, 132), (128, 128, 128, 8, 3, 264),
        (128, 128, 128, 4, 3, 264), (128, 128, 64, 4, 3, 264), (64, 128, 128, 4, 4, 396), (64, 128, 128, 4, 4, 264),
        (64, 64, 128, 4, 4, 528), (64, 128, 128, 4, 3, 264), (256, 64, 128, 8, 4, 132), (256, 128, 128, 8, 2, 132),
    ],
    4: [
        (128, 64, 128, 4, 3, 264), (128, 64, 128, 4, 2, 264), (128, 64, 128, 4, 4, 264), (128, 64, 128, 4, 3, 132),
        (128, 64, 128, 4, 3, 396), (128, 64, 64, 4, 3, 264), (128, 64, 64, 4, 3, 396), (128, 64, 128, 8, 3, 264),
        (128, 64, 128, 8, 3, 132), (64, 64, 128, 4, 3, 396), (64, 64, 128, 4, 3, 528), (64, 64, 64, 4, 3, 528),
        (64, 64, 128, 4, 3, 264), (256, 64, 128, 8, 3, 132), (256, 64, 128, 8, 2, 264),
    ],
}  # fmt: skip
PREDICTED_MB = {  # what docs/gpu.md holds a card to: weights, quantization state
    "nf4": (5591.5, 111.0),
    "int8": (9081.2, 5.5),
    "bf16": (16060.5, 0.0),
}


class Check:
    """One run of the script: what it was asked, what it has found, and how it says so."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.cuda = torch.cuda.is_available() and not arguments.tiny
        self.device = torch.device("cuda:0" if self.cuda else "cpu")
        self.rows = (64, 128) if self.cuda else (4, 8)
        self.new_tokens = 64 if self.cuda else 6
        self.prompt_tokens = (64, 512) if self.cuda else (5, 40)
        self.results: dict[str, Any] = {}
        self._begun = time.perf_counter()
        self._lines: list[str] = []
        self._model: Any = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def say(self, text: str) -> None:
        self._lines.append(f"[{self.seconds:6.1f} s] {text}")
        print(self._lines[-1], flush=True)

    def stage(self, name: str, call: Callable[[], Any]) -> None:
        """Run a stage, whatever becomes of it, and write what is known so far."""
        if self.arguments.stages and name not in self.arguments.stages:
            return
        started = self.seconds
        if started > self.arguments.budget:
            self.results[name] = "no time left"
        else:
            try:
                self.results[name] = call()
            except Exception:  # noqa: BLE001  a stage that fails is a finding
                self.results[name] = traceback.format_exc()[-1500:]
        self.free()
        found = json.dumps(self.results[name], default=str)
        self.say(f"== {name}, {self.seconds - started:.1f} s: {found[:400]}")
        out = self.arguments.out
        (out / "gpu_check.json").write_text(json.dumps(self.results, indent=1, default=str), encoding="utf-8")
        (out / "gpu_check.log").write_text("\n".join(self._lines), encoding="utf-8")

    def model(self) -> Any:
        """The large model, made at its first use."""
        if self._model is None:
            self._model = self.random_model(llama("8b" if self.cuda else "tiny"), torch.bfloat16)
            self.say(f"model: {self._model.get_memory_footprint() / 1e6:,.1f} MB")
        return self._model

    def drop_model(self) -> None:
        self._model = None
        self.free()

    def random_model(self, config: Any, dtype: torch.dtype) -> Any:
        """Weights made on the device, without a way through the host's memory."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.generation_config.pad_token_id = 0
        return model.eval()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def median_ms(self, call: Callable[[], Any], repeats: int) -> float:
        """Wall time of a call that ends with the device idle."""
        times: list[float] = []
        for _ in range(repeats):
            self.sync()
            started = time.perf_counter()
            call()
            self.sync()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)

    def replay_us(self, call: Callable[[], Any], times: int = 20) -> float:
        """Time of one of many calls in a graph: of the kernels alone."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return 1e3 * self.median_ms(graph.replay, 5) / times


# ---------------------------------------------------------------- models and requests


def llama(shape: str) -> Any:
    hidden, inner, layers, heads, key_heads, vocabulary = SHAPES[shape]
    return transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=hidden // heads, vocab_size=vocabulary,
        max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip


def tiny_configs() -> dict[str, Any]:
    """The architectures of conf/model/, a sliding window, longrope around its switch, and two more."""
    base = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    longrope = {
        "type": "longrope",
        "short_factor": [1 + 0.05 * i for i in range(8)],
        "long_factor": [1.5 + 0.5 * i for i in range(8)],
    }
    kinds: dict[str, dict[str, Any]] = {
        "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 16}, "olmo2": {}, "granite": {},
        "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
        "phi3": {"num_key_value_heads": 4},
        "phi3 longrope": {"rope_scaling": longrope, "original_max_position_embeddings": 64},
    }  # fmt: skip
    make = transformers.AutoConfig.for_model
    return {kind: make(kind.split()[0], **{**base, **more}) for kind, more in kinds.items()}


def requests(count: int, lengths: tuple[int, int], new: Any, vocabulary: int) -> list[Request]:
    """Random prompts; `new` tokens of completion, or what it makes of a random generator."""
    draw = random.Random(1)
    made: list[Request] = []
    for i in range(count):
        ids = tuple(draw.randrange(10, vocabulary) for _ in range(draw.randint(*lengths)))
        params = GenerationParams(max_new_tokens=new(draw) if callable(new) else new, ignore_eos=True)
        made.append(Request(f"r{i}", ids, params))
    return made


def run(
    check: Check, forward: Any, wanted: list[Request], rows: int
) -> tuple[Engine, dict[Any, Completion], float]:
    """An engine's run: the engine, completions by request and sample, seconds."""
    engine = Engine(forward, frozenset(), max_rows=rows)
    check.sync()
    started = time.perf_counter()
    done = {(c.request_id, c.sample): c for c in engine.generate(wanted)}
    check.sync()
    return engine, done, time.perf_counter() - started


# ---------------------------------------------------------------- stages


def stage_env(check: Check) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }  # fmt: skip
    for name in ("bitsandbytes", "accelerate", "triton", "flash_attn", "kernels"):
        try:
            found[name] = __import__(name).__version__
        except Exception as error:  # noqa: BLE001  missing or broken
            found[name] = f"no ({type(error).__name__})"
    if check.cuda:
        found["gpu"] = torch.cuda.get_device_name(0)
        found["capability"] = torch.cuda.get_device_capability(0)
        free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        found["total_gb"], found["context_mb"] = total_bytes / 1e9, (total_bytes - free_bytes) / 1e6
    source = torch.empty(1 << (31 if check.cuda else 24), dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    found["copy_gb_per_sec"] = 2 * source.nbytes / check.median_ms(lambda: target.copy_(source), 10) / 1e6
    size = 8192 if check.cuda else 256
    a, b = (torch.randn(size, size, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    found["bf16_tflops"] = 2 * size**3 / check.median_ms(lambda: a @ b, 10) / 1e9
    x = torch.zeros(64, device=check.device)
    found["launch_us"] = check.median_ms(lambda: [x.add_(1) for _ in range(2000)], 3) / 2
    return found


def begin_first() -> Any:
    """What a job does before anything has touched CUDA; it runs beside the next stage."""
    code = "from pipeline.memory.measured import PeakSampler as P\nwith P() as s: pass\nprint(len(s.peaks().devices))"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip


def stage_first(process: Any) -> dict[str, Any]:
    said = process.communicate(timeout=120)[0].strip().splitlines()
    return {"exit_status": process.returncode, "says": said[-1:]}


def stage_kernels(check: Check) -> dict[str, Any]:
    """[relative error, µs] of each kernel, and of attention with other numbers of columns, warps and stages."""
    if not check.cuda:
        return {"skipped": "needs a GPU"}
    from pipeline.engine.paged import triton_kernels as kernels

    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        x, a, w = (
            torch.randn(*shape, device=check.device).to(dtype) for shape in ((64, 4096), (64, 4096), (4096,))
        )
        wide = x.float()
        norm = wide * torch.rsqrt(wide.pow(2).mean(-1, True) + 1e-5) * w.float()
        y = x.clone()
        kernels.add_rms_norm(y, a, w, 1e-5)
        gate, up = (torch.randn(64, 14336, device=check.device).to(dtype) for _ in range(2))
        for kernel, made, wanted, call in (
            ("norm", kernels.rms_norm(x, w, 1e-5), norm, lambda x=x, w=w: kernels.rms_norm(x, w, 1e-5)),
            ("add norm", y, x + a, lambda y=y, a=a, w=w: kernels.add_rms_norm(y, a, w, 1e-5)),
            ("silu", kernels.silu_multiply(gate, up), F.silu(gate.float()) * up.float(),
             lambda gate=gate, up=up: kernels.silu_multiply(gate, up)),
        ):  # fmt: skip
            found[f"{kernel} {name}"] = [off(made, wanted), check.replay_us(call)]
        for heads, key_heads, size, window in ((32, 8, 128, None), (9, 3, 64, None), (32, 8, 128, 200)):
            call, wanted = attention(check, dtype, heads, key_heads, size, window)
            label = f"attend {heads}/{key_heads}x{size}{f' window {window}' if window else ''} {name}"
            found[label] = [off(call(), wanted), check.replay_us(call, 5)]
    for rows, outputs, inputs in ((64, 4096, 4096), (128, 1024, 4096), (17, 4096, 14336)):
        found[f"nf4 {outputs}x{inputs} {rows} rows"] = four_bits(check, rows, outputs, inputs)
        found[f"int8 {outputs}x{inputs} {rows} rows"] = eight_bits(check, rows, outputs, inputs)
    for rows in (128, 64, 16, 4, 1):
        found[f"nf4 14336x4096 {rows} rows"] = four_bits(check, rows, 14336, 4096)
    for rows in (128, 64, 16, 1):
        found[f"int8 14336x4096 {rows} rows"] = eight_bits(check, rows, 14336, 4096)
    return found


def four_bits(check: Check, rows: int, outputs: int, inputs: int) -> list[float]:
    """[relative error, µs, bitsandbytes' µs] of a product by weights in nf4, a fresh one at each call."""
    import bitsandbytes
    from bitsandbytes import functional

    from pipeline.engine.paged import triton_four_bits as kernels

    made = [
        functional.quantize_4bit(
            torch.randn(outputs, inputs, device=check.device, dtype=torch.bfloat16), blocksize=64,
            quant_type="nf4", compress_statistics=True,
        )
        for _ in range(4)  # so that a replay does not find its weights in the cache
    ]  # fmt: skip
    weights = [kernels.FourBitWeight(packed, state, outputs) for packed, state in made]
    input = torch.randn(rows, inputs, device=check.device, dtype=torch.bfloat16)
    wanted = [input.float() @ functional.dequantize_4bit(*each).float().T for each in made[:3]]
    error = joined_off(kernels, input, weights, wanted)

    def own() -> None:
        for weight in weights:
            kernels.products(input, [weight])

    def theirs() -> None:
        for packed, state in made:
            bitsandbytes.matmul_4bit(input, packed.t(), state)

    return [error, check.replay_us(own, 5) / 4, check.replay_us(theirs, 5) / 4]


def joined_off(kernels: Any, input: Tensor, weights: list[Any], wanted: list[Tensor]) -> float:
    """The largest error of a product by one weight, by two and by three at once, each twice."""
    made = [kernels.products(input, weights[:count]) for count in (1, 2, 3) for _ in range(2)]
    return max(off(*both) for outputs in made for both in zip(outputs, wanted, strict=False))


def eight_bits(check: Check, rows: int, outputs: int, inputs: int) -> list[float]:
    """[relative error, µs, cuBLAS' µs in bf16] of a product by weights in int8, fresh ones at each call."""
    from pipeline.engine.paged import triton_eight_bits as kernels

    codes = torch.randint(-127, 128, (4, outputs, inputs), device=check.device, dtype=torch.int8)
    scales = torch.rand(outputs, device=check.device) + 0.1
    halves = [each.to(torch.bfloat16) for each in codes]
    input = torch.randn(rows, inputs, device=check.device, dtype=torch.bfloat16)
    weights = [kernels.EightBitWeight(each, scales, None) for each in codes]
    wanted = [input.float() @ each.float().T * scales for each in codes[:3]]
    return [
        joined_off(kernels, input, weights, wanted),
        check.replay_us(lambda: [kernels.products(input, [each]) for each in weights], 5) / 4,
        check.replay_us(lambda: [F.linear(input, each) for each in halves], 5) / 4,
    ]


def attention(
    check: Check, dtype: torch.dtype, heads: int, key_heads: int, size: int, window: int | None
) -> tuple[Callable[[], Tensor], Tensor]:
    """A call of the decode attention for 64 rows of up to 600 columns, and what it is to give, in float32."""
    from pipeline.engine.limits import PAGE
    from pipeline.engine.paged import triton_kernels as kernels

    rows, pages, on = 64, 32, check.device
    held = [(37 * i) % 600 for i in range(rows)]
    table = torch.randperm(rows * pages, device=on).view(rows, pages).int()
    keys, values = (torch.randn(rows * pages, PAGE, key_heads, size, device=on).to(dtype) for _ in range(2))
    control = torch.tensor(list(enumerate(held)), device=on, dtype=torch.int32)
    query, key, value = (
        torch.randn(rows, h, size, device=on).to(dtype) for h in (heads, key_heads, key_heads)
    )
    angles = torch.rand(rows, size // 2, device=on).repeat(1, 2) * 6
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)

    def call() -> Tensor:
        return kernels.attend(
            query, key, value, rotation, keys, values, control, table, pages * PAGE, window, size**-0.5
        )

    call()  # writes the new columns
    turned, outs = kernels.rotate(query, rotation), []
    for row, count in enumerate(held):
        first = 0 if window is None else max(0, count + 1 - window)
        own = [
            t[table[row].long()].flatten(0, 1)[first : count + 1].transpose(0, 1)[None]
            for t in (keys, values)
        ]
        wide = (turned[row][None, :, None].float(), *(t.float() for t in own))
        outs.append(F.scaled_dot_product_attention(*wide, enable_gqa=True)[0, :, 0])
    return call, torch.stack(outs)


def stage_tune(check: Check) -> dict[str, Any]:
    """Try other shapes of the kernels that are named; the best stay for the stages to come."""
    if not check.cuda:
        return {"skipped": "needs a GPU"}
    ways = {"attention": tune_attention, "products": tune_products}
    return {name: ways[name](check) for name in check.arguments.tune}


def tune_attention(check: Check) -> dict[str, float]:
    """µs of decode attention by columns of a split, columns of a product, warps and stages; the best stays."""
    from pipeline.engine.paged import triton_kernels as kernels

    times: dict[tuple[int, tuple[int, int, int]], float] = {}
    call, _ = attention(check, torch.bfloat16, 32, 8, 128, None)
    for split in (256, 512):
        for config in ((16, 1, 3), (16, 1, 4), (16, 2, 4), (32, 1, 3), (32, 4, 3)):
            kernels.SPLIT, kernels.HALF = split, config
            try:
                times[split, config] = check.replay_us(call)
            except Exception as error:  # noqa: BLE001  a configuration that does not fit
                check.say(f"{split} {config}: {type(error).__name__}")
    kernels.SPLIT, kernels.HALF = min(times, key=lambda key: times[key])
    wide: dict[tuple[int, int, int], float] = {}
    call, _ = attention(check, torch.float32, 32, 8, 128, None)
    for config in ((32, 4, 1), (16, 4, 1)):
        kernels.FLOAT32 = config
        wide[config] = check.replay_us(call, 3)
    kernels.FLOAT32 = min(wide, key=lambda key: wide[key])
    return {str(key): us for key, us in [*times.items(), *wide.items()]}


def tune_products(check: Check) -> dict[str, list[float]]:
    """µs of a layer's products in 8 and 4 bits, by shape, for each of TUNED_ROWS; the best over all stays."""
    modules = {bits: product_module(bits) for bits in PRODUCT_SHAPES}
    tasks = [(bits, numbers) for bits, shapes in PRODUCT_SHAPES.items() for numbers in shapes]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        failed = list(pool.map(compile_shape, tasks))
    check.say(f"compiled; failed: {[each for each in failed if each]}")
    found: dict[str, list[float]] = {}
    products = layer_products(check, 16)
    found["bf16"] = [rows_us(check, products, rows) for rows in TUNED_ROWS]
    for bits, module in modules.items():
        products, times = layer_products(check, bits), dict[tuple[int, ...], list[float]]()
        for numbers in (each for each, error in zip(tasks, failed, strict=True) if not error):
            if numbers[0] == bits:
                module.SHAPE = module.Shape(*numbers[1])
                times[numbers[1]] = [rows_us(check, products, rows) for rows in TUNED_ROWS]
        least = [min(each) for each in zip(*times.values(), strict=True)]

        def loss(numbers: tuple[int, ...], times: Any = times, least: list[float] = least) -> float:
            return sum(us / best for us, best in zip(times[numbers], least, strict=True))

        ranked = sorted(times, key=loss)
        module.SHAPE = module.Shape(*ranked[0])
        found |= {f"{bits} bits {numbers}": times[numbers] for numbers in ranked}
    for key, us in found.items():
        check.say(f"{key}: {[round(each) for each in us]}")
    return found


def product_module(bits: int) -> Any:
    from pipeline.engine.paged import triton_eight_bits, triton_four_bits

    return {8: triton_eight_bits, 4: triton_four_bits}[bits]


def compile_shape(task: tuple[int, tuple[int, ...]]) -> str:
    """Fill Triton's cache with a shape's kernels, of every height, in a process of its own; say what failed."""
    bits, numbers = task
    module = product_module(bits)
    module.SHAPE = module.Shape(*numbers)
    weights = [product_weight(bits, 256, 512, torch.device("cuda:0")) for _ in range(3)]
    try:
        for rows in TUNED_ROWS:
            states = torch.zeros(rows, 512, device="cuda:0", dtype=torch.bfloat16)
            module.products(states, weights)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  a shape that does not fit
        return f"{task}: {type(error).__name__}: {error}"[:200]
    return ""


def product_weight(bits: int, outputs: int, inputs: int, device: torch.device) -> Any:
    """A random weight as the kernels for so many bits take it; 16 are torch's."""
    half = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    if bits == 16:
        return half
    module = product_module(bits)
    if bits == 8:
        codes = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
        return module.EightBitWeight(codes, torch.rand(outputs, device=device), None)
    from bitsandbytes import functional

    made = functional.quantize_4bit(half, blocksize=64, quant_type="nf4", compress_statistics=True)
    return module.FourBitWeight(*made, outputs)


def rows_us(check: Check, products: Callable[[int], Any], rows: int) -> float:
    return check.replay_us(lambda: products(rows), 3)


def layer_products(check: Check, bits: int) -> Callable[[int], Any]:
    """The products of a layer of Llama-3.1-8B in four launches, by random weights, as a function of the rows."""
    launches = (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336))
    calls: list[Callable[[int], Any]] = []
    inputs = {k: torch.randn(128, k, device=check.device, dtype=torch.bfloat16) for k in (4096, 14336)}
    for sizes, k in launches:
        x, weights = inputs[k], [product_weight(bits, size, k, check.device) for size in sizes]
        if bits == 16:
            calls.append(lambda rows, x=x, weights=weights: [F.linear(x[:rows], each) for each in weights])
        else:
            products = product_module(bits).products
            calls.append(lambda rows, x=x, w=weights, products=products: products(x[:rows], w))
    return lambda rows: [call(rows) for call in calls]


def off(made: Tensor, wanted: Tensor) -> float:
    return ((made.float() - wanted.float()).norm() / wanted.float().norm()).item()


@torch.inference_mode()
def stage_exact(check: Check) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {}
    count, most = (6, 40) if check.cuda else (3, 6)
    for kind in check.arguments.architectures or tiny_configs():
        config = tiny_configs()[kind]
        model = check.random_model(config, torch.float32)
        wanted = requests(count, (5, 70), lambda d: d.randint(1, most), config.vocab_size)
        alone = {}
        for request in wanted:
            ids = torch.tensor([request.prompt_token_ids], device=check.device)
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=request.params.max_new_tokens, eos_token_id=config.vocab_size,
                # Past longrope's switch, transformers before 5.20 drops the cache and feeds the last token alone.
                use_cache="longrope" not in kind,
            )  # fmt: skip
            alone[request.id, 0] = tuple(made[0, ids.shape[1] :].tolist())
        own = model.config._attn_implementation
        forward, probe = choose_forward(model, "pages")
        _, done, _ = run(check, forward, wanted, 8)
        same = sum(done[key].token_ids == ids for key, ids in alone.items())
        model.set_attn_implementation(own)
        found[kind] = {"same": f"{same}/{len(wanted)}", "float32": probe}
        for dtype in (torch.bfloat16, torch.float16) if check.cuda else ():
            found[kind][str(dtype)[6:]] = choose_forward(model.to(dtype))[1]
            model.set_attn_implementation(own)
        check.say(f"exact {kind}: {json.dumps(found[kind])}")
    return found


@torch.inference_mode()
def stage_sampled(check: Check) -> dict[str, Any]:
    model = check.random_model(tiny_configs()["llama"], torch.float32)
    filters = (
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"logprobs": 3, "n": 3},
    )
    wanted = []
    for i, request in enumerate(requests(18, (5, 70), 24, 300)):
        drawn: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.9, "seed": 3, **filters[i % 6]}
        wanted.append(
            Request(request.id, request.prompt_token_ids, GenerationParams(**drawn, ignore_eos=True))
        )
    own = model.config._attn_implementation
    texts = {}
    for way in ("pages", "rectangles"):
        forward, _ = choose_forward(model, way)
        _, done, _ = run(check, forward, wanted, 16)
        texts[way] = {key: c.token_ids for key, c in done.items()}
        model.set_attn_implementation(own)
    same = sum(texts["pages"][key] == ids for key, ids in texts["rectangles"].items())
    return {"same": f"{same}/{len(texts['rectangles'])}"}


@torch.inference_mode()
def stage_profile(check: Check) -> dict[str, Any]:
    """Decode steps in the middle of a run."""
    from torch.profiler import ProfilerActivity, profile

    model, rows = check.model(), check.rows[0]
    own = model.config._attn_implementation
    forward, _ = choose_forward(model)
    engine = Engine(forward, frozenset(), max_rows=rows)
    steps = engine.steps(requests(rows, check.prompt_tokens, 80, model.config.vocab_size))
    while engine.stats.steps < 5:
        next(steps)
    count = 2
    found: dict[str, Any] = {
        "rows": rows,
        "step_ms": check.median_ms(lambda: [next(steps) for _ in range(20)], 1) / 20,
    }
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.cuda else [])]) as made:
        for _ in range(count):
            next(steps)
        check.sync()
    kinds, calls, times = Counter[str](), Counter[str](), Counter[str]()
    for event in made.events():
        if str(event.device_type).endswith("CUDA"):
            kinds["copies" if event.name.startswith("Mem") else "kernels"] += 1
            times[event.name[:60]] += int(event.time_range.elapsed_us())
        elif event.name.startswith("cuda"):
            calls[event.name] += 1
    found["per_step"] = {name: times_ / count for name, times_ in kinds.items()}
    found["calls_per_step"] = {name: times_ / count for name, times_ in calls.most_common(8)}
    found["busy_ms"] = sum(times.values()) / count / 1e3
    found["busy_share"] = found["busy_ms"] / found["step_ms"]
    found["longest_us"] = {name: us / count for name, us in times.most_common(12)}
    if check.cuda:
        found["waits"] = waits(lambda: next(steps))
    steps.close()
    if check.cuda:
        params = GenerationParams(max_new_tokens=80, temperature=1.0, top_p=0.9, ignore_eos=True)
        drawn = [
            Request(r.id, r.prompt_token_ids, params)
            for r in requests(8, check.prompt_tokens, 80, model.config.vocab_size)
        ]
        engine = Engine(forward, frozenset(), max_rows=rows)
        steps = engine.steps(drawn)
        while engine.stats.steps < 5:
            next(steps)
        found["waits of draws"] = waits(lambda: next(steps))
        steps.close()
    model.set_attn_implementation(own)
    return found


def waits(call: Callable[[], Any]) -> dict[str, int]:
    """Where the host waits for the device, by torch's own warning."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    places = (
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)
    )
    return dict(Counter(places))


def stage_speed(check: Check) -> dict[str, Any]:
    """Tokens a second of completion from the first prompt to the last token, and a decode step's time."""
    model, found = check.model(), dict[str, Any]()
    own, vocabulary = model.config._attn_implementation, model.config.vocab_size
    for way in ("pages", "rectangles"):
        forward, _ = choose_forward(model, way)
        run(check, forward, requests(8, check.prompt_tokens, 4, vocabulary), 8)  # warm up
        for rows in check.rows if way == "pages" else check.rows[:1]:
            speed(
                check,
                found,
                f"{way} {rows}",
                forward,
                requests(rows, check.prompt_tokens, check.new_tokens, vocabulary),
                rows,
            )
        if way == "pages":
            rows, most = check.rows[1], 2 * check.new_tokens
            mixed = requests(
                2 * rows,
                check.prompt_tokens,
                lambda d, most=most: d.randint(most // 16 + 1, most),
                vocabulary,
            )
            speed(check, found, f"{way} mixed {rows}", forward, mixed, rows)
            params = GenerationParams(
                max_new_tokens=check.new_tokens, ignore_eos=True, temperature=1.0, top_p=0.9
            )
            drawn = [Request(r.id, r.prompt_token_ids, params) for r in mixed[: check.rows[0]]]
            speed(check, found, f"{way} top_p {check.rows[0]}, flat", forward, drawn, check.rows[0])
            # A trained model is sure of most tokens: as random weights are with a larger head.
            model.lm_head.weight.data *= 8
            speed(check, found, f"{way} top_p {check.rows[0]}", forward, drawn, check.rows[0])
            model.lm_head.weight.data /= 8
            for rows in check.rows:
                longer = requests(rows, check.prompt_tokens, 4 * check.new_tokens, vocabulary)
                speed(check, found, f"{way} {rows}, {4 * check.new_tokens} new", forward, longer, rows)
        model.set_attn_implementation(own)
        check.free()
    new = check.new_tokens
    for rows in check.rows:
        wanted = requests(rows, check.prompt_tokens, new, vocabulary)
        for name, call in (
            (f"generate {rows}", lambda wanted=wanted: generate(check, model, wanted, new)),
            (
                f"generate {rows}, {4 * new} new",
                lambda wanted=wanted: generate(check, model, wanted, 4 * new),
            ),
            (f"generate_batch {rows}", lambda wanted=wanted: generate_batch(check, model, wanted)),
        ):
            if check.arguments.peers:
                try:
                    found[name] = call()
                except Exception as error:  # noqa: BLE001  a peer that fails is a finding
                    found[name] = f"{type(error).__name__}: {error}"[:300]
                check.say(f"{name}: {json.dumps(found[name])}")
                model.set_attn_implementation(own)
                check.free()
    if check.cuda:
        rows = check.rows[0]
        forward, _ = choose_forward(check.random_model(llama("1b"), torch.bfloat16))
        run(check, forward, requests(rows, check.prompt_tokens, 4, vocabulary), rows)  # Triton compiles
        wanted = requests(rows, check.prompt_tokens, 2 * check.new_tokens, vocabulary)
        speed(check, found, f"1b pages {rows}", forward, wanted, rows)
    return found


def speed(
    check: Check, found: dict[str, Any], name: str, forward: Any, wanted: list[Request], rows: int
) -> None:
    engine, done, seconds = run(check, forward, wanted, rows)
    assert not [c.error for c in done.values() if c.error]
    stats = engine.stats
    found[name] = {
        "tokens_per_sec": stats.completion_tokens / seconds,
        "step_ms": 1e3 * stats.decode_sec / stats.steps,
        "prefill_tokens_per_sec": stats.prefill_tokens / stats.prefill_sec,
        "mean_rows": stats.rows / stats.steps,
        "kv_cache_mb": stats.peak_kv_cache_bytes / 1e6,
    }
    check.say(f"{name}: {json.dumps(found[name])}")


def generate(check: Check, model: Any, wanted: list[Request], new: int) -> dict[str, float]:
    """`model.generate` on one left-padded batch."""
    longest = max(len(r.prompt_token_ids) for r in wanted)
    ids = torch.tensor([[0] * (longest - len(r.prompt_token_ids)) + [*r.prompt_token_ids] for r in wanted])
    mask = torch.tensor(
        [[0] * (longest - len(r.prompt_token_ids)) + [1] * len(r.prompt_token_ids) for r in wanted]
    )
    ids, mask = ids.to(check.device), mask.to(check.device)
    settings = {"do_sample": False, "eos_token_id": model.config.vocab_size, "pad_token_id": 0}
    check.sync()
    started = time.perf_counter()
    model.generate(ids, attention_mask=mask, max_new_tokens=new, **settings)
    check.sync()
    return {"tokens_per_sec": len(wanted) * new / (time.perf_counter() - started)}


def generate_batch(check: Check, model: Any, wanted: list[Request]) -> dict[str, float]:
    """transformers' continuous batching with CUDA graphs, told how much cache it needs: else it takes 90 %."""
    names = {field.name for field in fields(transformers.ContinuousBatchingConfig)}
    page, rows, new = 32, len(wanted), check.new_tokens
    columns = max(len(r.prompt_token_ids) for r in wanted) + new
    settings = {
        "page_size" if "page_size" in names else "block_size": page, "num_blocks": rows * (columns // page + 2),
        "max_batch_tokens": 2048 if check.cuda else 512, "max_requests_per_batch": rows,
        "use_cuda_graph": check.cuda, "use_async_batching": False,
    }  # fmt: skip
    config = transformers.ContinuousBatchingConfig(**{k: v for k, v in settings.items() if k in names})
    wishes = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    inputs = [list(r.prompt_token_ids) for r in wanted]
    check.sync()
    started = time.perf_counter()
    made = model.generate_batch(
        inputs, generation_config=wishes, continuous_batching_config=config, progress_bar=False
    )
    check.sync()
    seconds = time.perf_counter() - started
    if errors := [r.error for r in made.values() if r.error]:
        raise RuntimeError(errors[0])
    tokens = sum(len(r.generated_tokens) for r in made.values())
    assert tokens == rows * new, f"{tokens} tokens of {rows * new}"
    return {"tokens_per_sec": tokens / seconds}


@torch.inference_mode()
def stage_recorded(check: Check) -> dict[str, Any]:
    """Texts of 128 rows by steps launched one by one, and how many are the same by recorded ones, three times.

    Only a card that is busy shows what runs into each other.
    """
    if not check.cuda:
        return {"skipped": "needs a GPU"}
    check.drop_model()
    work, config = Path("/dev/shm/gpu_check_recorded"), llama("8b")
    config.num_hidden_layers = 4
    folder, _ = prepare_jobs(check, check.random_model(config, torch.bfloat16), work)
    check.free()
    wanted = requests(check.rows[1], check.prompt_tokens, 24, config.vocab_size)
    found: dict[str, Any] = {}
    for quant in ("nf4", "int8", "bf16"):
        model: Any = load_model(ModelConfig(str(folder)), QUANTS[quant], "none").model
        replaced, own = replace_products(model), model.config._attn_implementation
        texts = []
        for records in (False, True, True, True):
            model.set_attn_implementation(own)
            forward: Any = choose_forward(model)[0]
            forward._captures = records and forward._captures
            texts.append({key: c.token_ids for key, c in run(check, forward, wanted, len(wanted))[1].items()})
        same = [sum(texts[0][key] == ids for key, ids in each.items()) for each in texts[1:]]
        found[quant] = {"replaced": replaced, "same": same, "of": len(wanted)}
        check.say(f"recorded {quant}: {found[quant]}")
        del model, forward
        check.free()
    shutil.rmtree(work)
    return found


@torch.inference_mode()
def stage_oom(check: Check) -> dict[str, Any]:
    """The same requests with and without a cap on what torch may take; in float32, so that the text is the same."""
    if not check.cuda:
        return {"skipped": "needs a GPU"}
    model = check.random_model(llama("small"), torch.float32)
    forward, _ = choose_forward(model)
    wanted = requests(128, (200, 900), lambda d: d.randint(20, 120), model.config.vocab_size)
    check.free()
    torch.cuda.reset_peak_memory_stats()
    _, expected, _ = run(check, forward, wanted, 128)
    peak = torch.cuda.max_memory_allocated()
    check.free()
    held = torch.cuda.memory_allocated()
    cap = held + (peak - held) // 3
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info(0)[1])
    try:
        torch.cuda.reset_peak_memory_stats()
        engine, done, seconds = run(check, forward, wanted, 128)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "free_run_mb": (peak - held) / 1e6, "cap_mb": (cap - held) / 1e6, "sec": seconds,
        "peak_mb": (torch.cuda.max_memory_allocated() - held) / 1e6, "out_of_memory": engine.stats.out_of_memory,
        "same": f"{sum(done[k].token_ids == c.token_ids for k, c in expected.items())}/{len(wanted)}",
    }  # fmt: skip


def stage_jobs(check: Check) -> dict[str, Any]:
    """Whole jobs, each in a process of its own, as a user runs them."""
    work = Path("/dev/shm" if check.cuda else check.arguments.out) / "gpu_check"
    folder, prompts = prepare_jobs(check, check.model(), work)
    check.drop_model()
    found: dict[str, Any] = {}
    for i, quant in enumerate(check.arguments.quants):
        if check.seconds > check.arguments.budget:
            found[quant] = "no time left"
            continue
        found[quant] = job(folder, prompts, work / f"{quant}-{i}", quant)
        check.say(f"job {quant}: {json.dumps(found[quant])[:900]}")
    shutil.rmtree(work, ignore_errors=True)
    return found


def prepare_jobs(check: Check, model: Any, work: Path) -> tuple[Path, Path]:
    """Write a model's folder, and prompts of many lengths."""
    folder, prompts = work / "model", work / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="4GB")
    for file in check.arguments.tokenizer.iterdir():
        if "token" in file.name or file.name.startswith("chat_template"):
            shutil.copy(file, folder)
    draw, words = random.Random(5), ("tell", "a", "joke", "about", "rivers", "and", "old", "newspapers")
    with prompts.open("w", encoding="utf-8") as lines:
        for i in range(128 if check.cuda else 6):
            text = " ".join(draw.choices(words, k=draw.randint(20, 300 if check.cuda else 30)))
            print(json.dumps({"id": f"p{i}", "prompt": text}), file=lines)
    return folder, prompts


def job(folder: Path, prompts: Path, out: Path, quant: str) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "pipeline", "model=llama", f"model.name={folder.resolve()}", f"quant={quant}",
        f"prompts={prompts.resolve()}", f"outputs_dir={out.resolve()}", "generation.max_new_tokens=48",
        "generation.ignore_eos=true",
    ]  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    made = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=root)
    path = next(out.rglob("stats.json"), None)
    if made.returncode or path is None:
        rows = [
            json.loads(line) for file in out.rglob("outputs.jsonl") for line in file.open(encoding="utf-8")
        ]
        errors = Counter(str(row["error"])[:200] for row in rows if row.get("error"))
        said = made.stdout + made.stderr
        return {"exit_status": made.returncode, "says": said[:500] + " … " + said[-500:], "errors": errors}
    stats = json.loads(path.read_text(encoding="utf-8"))
    memory = stats["memory"]
    return {
        "load_sec": stats["load_sec"], "tokens_per_sec": stats["tokens_per_sec"], "energy": stats["energy"],
        "step_ms": 1e3 * stats["engine"]["decode_sec"] / max(1, stats["engine"]["decode_steps"]),
        **{f"{side}_mb": {k: v and v / 1e6 for k, v in memory[side].items()} for side in ("predicted", "measured")},
        "error_percent": memory["error_percent"], "devices": memory["run_peak"]["devices"],
    }  # fmt: skip


# ---------------------------------------------------------------- the table


def table(results: dict[str, Any]) -> list[str]:
    """What is worth reading first."""
    lines = [f"{results.get('env', {}).get('gpu', 'CPU')}"]
    exact = results.get("exact")
    if isinstance(exact, dict):
        lines += [f"exact    {kind:16} {e['same']:>6} {e['float32']['path']}" for kind, e in exact.items()]
    speeds = results.get("speed")
    if isinstance(speeds, dict):
        for name, entry in speeds.items():
            figures = entry if isinstance(entry, dict) else {}
            step = f"{figures['step_ms']:8.2f} ms/step" if "step_ms" in figures else ""
            lines.append(
                f"speed    {name:22} {figures.get('tokens_per_sec', float('nan')):9,.0f} tokens/s {step}"
            )
    jobs = results.get("jobs")
    if isinstance(jobs, dict):
        for quant, entry in jobs.items():
            if isinstance(entry, dict) and "measured_mb" in entry:
                measured, wanted = entry["measured_mb"], PREDICTED_MB[quant]
                parts = (
                    f"{part} {entry['error_percent'][part]:+.1f} %"
                    for part in ("kv_cache", "load_peak", "run_peak")
                )
                lines.append(
                    f"job      {quant:5} weights {measured['footprint_bytes']:,.1f} of {wanted[0]:,.1f} MB, state "
                    f"{measured['quantization_state_bytes']:,.1f} of {wanted[1]:,.1f}; {', '.join(parts)}"
                )
            else:
                lines.append(f"job      {quant:5} {str(entry)[:200]}")
    lines += [f"{name:8} {found}" for name, found in results.items() if isinstance(found, str)]
    return lines


def main() -> int:
    """Run the stages. Returns 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=400, help="no stage begins after so many seconds")
    parser.add_argument("--stages", nargs="*", default=[])
    parser.add_argument("--architectures", nargs="*", choices=list(tiny_configs()), help="of the stage exact")
    parser.add_argument(
        "--quants",
        nargs="*",
        choices=list(PREDICTED_MB),
        default=list(PREDICTED_MB),
        help="of jobs; named twice, the second time with Triton's kernels compiled",
    )
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--tune", nargs="*", choices=["attention", "products"], default=[])
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("models/SmolLM2-135M-Instruct"),
        help="a folder to borrow it from",
    )
    check = Check(parser.parse_args())
    check.arguments.out.mkdir(parents=True, exist_ok=True)
    first = begin_first()
    check.stage("env", lambda: stage_env(check))
    check.stage("first", lambda: stage_first(first))
    for name, stage in (
        ("tune", stage_tune), ("kernels", stage_kernels), ("exact", stage_exact), ("sampled", stage_sampled),
        ("recorded", stage_recorded), ("profile", stage_profile), ("speed", stage_speed), ("oom", stage_oom),
        ("jobs", stage_jobs),
    ):  # fmt: skip
        check.stage(name, lambda stage=stage: stage(check))
    first.kill()
    print("\n".join(table(check.results)))
    return int(any(isinstance(found, str) and found != "no time left" for found in check.results.values()))


if __name__ == "__main__":
    sys.exit(main())
