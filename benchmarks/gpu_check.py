"""What a GPU makes of this project: one script, one card, under 8 minutes; a short table last. A draft.

    python gpu_check.py --out FOLDER           # with a GPU, from the repository's root
    python gpu_check.py --tiny --out FOLDER    # rehearsal on a CPU, tiny shapes

Stages, the most telling first; each is caught, timed and skipped when --budget seconds are spent:

    env      versions, copy bandwidth, matrix rate, time of an empty launch
    first    the very first line of a job: are peaks reset before CUDA is there?
    exact    fp32 greedy beside `model.generate`, tiny models of real architectures; paths and logit differences
    speed    Llama-3.1-8B's shape, random bf16: our engine, `generate` in batches, `generate_batch`
    profile  one decode step: kernels, launches, syncs, how busy the GPU is
    graph    the proposed design: static shapes, one CUDA graph a step; four attentions
    oom      a hard cap on memory: does the engine back off, and is the text the same?
    jobs     real jobs from a folder, bf16, nf4 and int8: stats.json's predicted beside measured
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor
from torch.nn import functional as F

BEGUN = time.perf_counter()
RESULTS: dict[str, Any] = {}
LINES: list[str] = []


def say(text: str) -> None:
    line = f"[{time.perf_counter() - BEGUN:6.1f}s] {text}"
    LINES.append(line)
    print(line, flush=True)


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def free() -> None:
    import gc

    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def median_ms(call: Any, repeats: int) -> float:
    """Wall time of a call that ends with the device idle."""
    times = []
    for _ in range(repeats):
        sync()
        started = time.perf_counter()
        call()
        sync()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


# ---------------------------------------------------------------- models


def llama_config(size: str) -> Any:
    from transformers import LlamaConfig

    shapes = {  # hidden, inner, layers, heads, key heads, vocabulary
        "tiny": (64, 192, 2, 4, 2, 512),
        "small": (128, 320, 3, 8, 2, 1024),
        "1b": (2048, 8192, 16, 32, 8, 128256),
        "8b": (4096, 14336, 32, 32, 8, 128256),
    }
    hidden, inner, layers, heads, kv, vocabulary = shapes[size]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=hidden // heads, vocab_size=vocabulary, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip


def random_model(config: Any, dtype: torch.dtype) -> Any:
    """On the device, without a pass over the host's memory. Speed and memory do not depend on values."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval()
    model.generation_config.pad_token_id = 0
    return model


def tiny_models() -> dict[str, Any]:
    """Configs of the architectures that conf/model/ names, and of a sliding window."""
    from transformers import AutoConfig

    base = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {
        "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 16},
        "phi3": {"num_key_value_heads": 4, "original_max_position_embeddings": 512},
        "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 16}, "olmo2": {}, "granite": {},
    }  # fmt: skip
    return {kind: AutoConfig.for_model(kind, **{**base, **more}) for kind, more in kinds.items()}


# ---------------------------------------------------------------- our engine


def requests(count: int, lengths: tuple[int, int], new: Any, vocabulary: int, seed: int = 1) -> list[Any]:
    from pipeline.request import GenerationParams, Request

    draw = random.Random(seed)
    made = []
    for i in range(count):
        ids = tuple(draw.randrange(10, vocabulary) for _ in range(draw.randint(*lengths)))
        params = GenerationParams(max_new_tokens=new(draw) if callable(new) else new, ignore_eos=True)
        made.append(Request(f"r{i}", ids, params))
    return made


@torch.inference_mode()
def run_engine(
    forward: Any, wanted: list[Any], rows: int, eos: frozenset[int] = frozenset(), **more: Any
) -> Any:
    from pipeline.engine.engine import Engine

    engine = Engine(forward, eos, max_rows=rows, **more)
    sync()
    started = time.perf_counter()
    done = {c.request_id: c for c in engine.generate(wanted)}
    sync()
    return engine, done, time.perf_counter() - started


# ---------------------------------------------------------------- stages


def stage_env() -> dict[str, Any]:
    import transformers

    found: dict[str, Any] = {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
        "alloc_conf": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }  # fmt: skip
    for name in ("bitsandbytes", "accelerate", "flash_attn", "kernels", "numba", "hydra"):
        try:
            found[name] = getattr(__import__(name), "__version__", "there")
        except Exception as error:  # noqa: BLE001
            found[name] = f"no ({type(error).__name__})"
    if CUDA:
        found["gpu"] = torch.cuda.get_device_name(0)
        found["capability"] = torch.cuda.get_device_capability(0)
        free_bytes, total = torch.cuda.mem_get_info(0)
        found["total_GB"], found["context_MB"] = total / 1e9, (total - free_bytes) / 1e6
    big = torch.empty(1 << (31 if CUDA else 24), dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(big)
    ms = median_ms(lambda: other.copy_(big), 10)
    found["copy_GB_per_s"] = 2 * big.numel() / ms / 1e6
    del big, other
    n = 8192 if CUDA else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    found["bf16_TFLOPs"] = 2 * n**3 / median_ms(lambda: a @ b, 10) / 1e9
    x = torch.zeros(64, device=DEVICE)

    def launches() -> None:
        for _ in range(2000):
            x.add_(1)

    found["launch_us"] = median_ms(launches, 3) / 2
    found["h2d_list_us"] = 1e3 * median_ms(lambda: torch.tensor([[1] * 64], device=DEVICE), 50)
    del a, b
    free()
    return found


def stage_first() -> dict[str, Any]:
    """In a process of its own: what `generate()` does before anything has touched CUDA."""
    code = (
        "from pipeline.memory_stats import PeakSampler\n"
        "with PeakSampler() as s:\n    pass\nprint('fine', len(s.peaks().devices))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    return {"rc": made.returncode, "says": (made.stdout + made.stderr).strip().splitlines()[-1:]}


@torch.inference_mode()
def stage_exact() -> dict[str, Any]:
    from pipeline.engine.probe import choose_forward

    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {}
    for kind, config in tiny_models().items():
        try:
            model = random_model(config, torch.float32)
            count, most = (8, 40) if CUDA else (3, 6)
            wanted = requests(count, (5, 70), lambda d: d.randint(1, most), config.vocab_size)
            alone = {}
            for request in wanted:
                ids = torch.tensor([request.prompt_token_ids], device=DEVICE)
                made = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                    max_new_tokens=request.params.max_new_tokens, eos_token_id=config.vocab_size,
                )  # fmt: skip
                alone[request.id] = tuple(made[0, ids.shape[1] :].tolist())
            own = model.config._attn_implementation
            forward, probe = choose_forward(model)
            _, done, _ = run_engine(forward, wanted, 8)
            same = sum(done[r.id].token_ids == alone[r.id] for r in wanted)
            model.set_attn_implementation(own)
            entry = {"same": f"{same}/{len(wanted)}", "fp32": probe}
            for dtype in (torch.bfloat16, torch.float16) if CUDA else (torch.float16,):
                lower = model.to(dtype)
                entry[str(dtype)[6:]] = choose_forward(lower)[1]
                lower.set_attn_implementation(own)
            found[kind] = entry
        except Exception as error:  # noqa: BLE001
            found[kind] = traceback.format_exc()[-600:]
        say(f"exact {kind}: {json.dumps(found[kind], default=str)[:260]}")
        free()
    return found


def stage_speed(model: Any, rows_list: list[int], new: int, lengths: tuple[int, int]) -> dict[str, Any]:
    from pipeline.engine.probe import choose_forward

    vocabulary = model.config.vocab_size
    own = model.config._attn_implementation
    forward, probe = choose_forward(model)
    found: dict[str, Any] = {"probe": probe}
    run_engine(forward, requests(rows_list[0], lengths, 4, vocabulary), rows_list[0])  # warm up
    peers = not ARGS.ours
    for rows in rows_list:
        wanted = requests(rows, lengths, new, vocabulary)
        engine, done, seconds = run_engine(forward, wanted, rows, prefill_tokens=2048)
        assert not [c.error for c in done.values() if c.error]
        s = engine.stats
        found[f"ours {rows}"] = {
            "tokens_per_s": s.completion_tokens / seconds, "prefill_sec": s.prefill_sec,
            "prefill_tok_per_s": s.prefill_tokens / s.prefill_sec, "step_ms": 1e3 * s.decode_sec / s.steps,
            "steps": s.steps, "rectangles": len(s.peak_rectangles), "columns_ratio": s.summary()["columns_attended_over_needed"],
        }  # fmt: skip
        say(f"speed ours {rows} rows: {json.dumps(found[f'ours {rows}'])}")
    # Rows that end at different times, twice as many as fit: what regrouping and admission cost.
    rows = rows_list[-1]
    wanted = requests(2 * rows, lengths, lambda d: d.randint(max(1, new // 8), 2 * new), vocabulary)
    engine, _, seconds = run_engine(forward, wanted, rows)
    s = engine.stats
    found[f"ours mixed {rows}"] = {
        "tokens_per_s": s.completion_tokens / seconds, "prefill_sec": s.prefill_sec, "decode_sec": s.decode_sec,
        "step_ms": 1e3 * s.decode_sec / s.steps, "mean_rows": s.rows / s.steps, "peak_rectangles": len(s.peak_rectangles),
    }  # fmt: skip
    say(f"speed ours mixed: {json.dumps(found[f'ours mixed {rows}'])}")
    del engine
    free()
    model.set_attn_implementation(own)
    for rows in rows_list if peers else []:
        wanted = requests(rows, lengths, new, vocabulary)
        longest = max(len(r.prompt_token_ids) for r in wanted)
        ids = torch.zeros(rows, longest, dtype=torch.int64, device=DEVICE)
        mask = torch.zeros_like(ids)
        for i, request in enumerate(wanted):
            n = len(request.prompt_token_ids)
            ids[i, longest - n :] = torch.tensor(request.prompt_token_ids)
            mask[i, longest - n :] = 1
        sync()
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=vocabulary,
            pad_token_id=0,
        )
        sync()
        seconds = time.perf_counter() - started
        found[f"generate {rows}"] = {
            "tokens_per_s": rows * new / seconds,
            "ms_per_token": 1e3 * seconds / new,
        }
        say(f"speed generate {rows} rows: {json.dumps(found[f'generate {rows}'])}")
        free()
    for rows in rows_list if peers else []:
        for graph, ahead in ((False, False), (True, False), (True, True)) if CUDA else ((False, False),):
            if time.perf_counter() - BEGUN > BUDGET:
                break
            name = f"generate_batch {rows}{' graph' if graph else ''}{' async' if ahead else ''}"
            try:
                found[name] = generate_batch(
                    model, requests(rows, lengths, new, vocabulary), rows, new, graph, ahead
                )
            except Exception as error:  # noqa: BLE001
                found[name] = f"{type(error).__name__}: {error}"[:300]
            say(f"speed {name}: {found[name]}")
            model.set_attn_implementation(own)
            free()
    return found


def generate_batch(
    model: Any, wanted: list[Any], rows: int, new: int, graph: bool, ahead: bool
) -> dict[str, Any]:
    """transformers' continuous batching, told how much cache it needs: its own default takes 90 % of the card."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    names = {f.name for f in __import__("dataclasses").fields(ContinuousBatchingConfig)}
    page = 32
    longest = max(len(r.prompt_token_ids) for r in wanted) + new
    settings = {
        ("page_size" if "page_size" in names else "block_size"): page, "num_blocks": rows * (longest // page + 2),
        "max_batch_tokens": 2048 if CUDA else 512, "max_requests_per_batch": rows, "use_cuda_graph": graph,
        "use_async_batching": ahead,
    }  # fmt: skip
    config = ContinuousBatchingConfig(**{k: v for k, v in settings.items() if k in names})
    generation = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    inputs = [list(r.prompt_token_ids) for r in wanted]
    sync()
    started = time.perf_counter()
    made = model.generate_batch(
        inputs, generation_config=generation, continuous_batching_config=config, progress_bar=False
    )
    sync()
    seconds = time.perf_counter() - started
    tokens = sum(len(r.generated_tokens) for r in made.values())
    errors = [r.error for r in made.values() if r.error]
    return {"tokens_per_s": tokens / seconds, "tokens": tokens, "sec": seconds, "errors": errors[:1]}


@torch.inference_mode()
def stage_profile(model: Any, rows: int, lengths: tuple[int, int]) -> dict[str, Any]:
    """Decode steps of our engine with everything prefilled: what is launched, what waits."""
    from torch.profiler import ProfilerActivity, profile

    from pipeline.engine.engine import Engine
    from pipeline.engine.probe import choose_forward

    own = model.config._attn_implementation
    forward, _ = choose_forward(model)
    engine = Engine(forward, frozenset(), max_rows=rows)
    steps = engine.steps(requests(rows, lengths, 80, model.config.vocab_size))
    while engine.stats.steps < 6:
        next(steps)
    for _ in range(12):
        next(steps)
    found: dict[str, Any] = {"rows": rows}

    def twenty() -> None:
        for _ in range(20):
            next(steps)

    found["step_ms"] = median_ms(twenty, 1) / 20
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
    count = 2
    with profile(activities=activities) as made:
        for _ in range(count):
            next(steps)
        sync()
    kernels, runtime = Counter(), Counter()
    busy = 0.0
    top: Counter[str] = Counter()
    for event in made.events():
        if str(event.device_type).endswith("CUDA"):
            kernels["memcpy" if event.name.startswith("Mem") else "kernel"] += 1
            busy += event.time_range.elapsed_us()
            top[event.name[:60]] += int(event.time_range.elapsed_us())
        elif event.name.startswith("cuda"):
            runtime[event.name] += 1
        elif not CUDA:
            kernels["aten"] += event.name.startswith("aten::")
    found["per_step"] = {k: v / count for k, v in kernels.items()}
    found["runtime_per_step"] = {k: v / count for k, v in runtime.most_common(12)}
    found["gpu_busy_ms"] = busy / count / 1e3
    found["gpu_busy_share"] = found["gpu_busy_ms"] / found["step_ms"]
    found["top_us_per_step"] = {k: v / count for k, v in top.most_common(14)}
    if CUDA:  # where the host waits for the device: by torch's own warning
        import warnings

        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(steps)
        torch.cuda.set_sync_debug_mode("default")
        where = Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
        )
        found["sync_warnings"] = dict(where.most_common(12))
        made.export_chrome_trace(str(OUT / "step.json")) if ARGS.trace else None
    steps.close()
    model.set_attn_implementation(own)
    return found


class StaticRectangle:
    """The design under test: rows and width fixed, everything that changes in device tensors, so that a step is
    one CUDA graph. Attention by products (ours today), by SDPA with a mask, by SDPA with query heads folded into
    the query's length, which reads grouped keys once, or by torch's own FlashAttention 2 over left-aligned slots
    with each row's length on the device (`seqused_k`): no mask, no padding, no rectangles to regroup."""

    def __init__(self, model: Any, rows: int, width: int, held: Tensor, how: str) -> None:
        config = model.config
        self.model, self.rows, self.width, self.how = model, rows, width, how
        self.head = torch.tensor([int(held.max())], device=DEVICE)  # the column that is written next
        self.starts = (held.max() - held).to(DEVICE)
        self.tokens = torch.zeros(1, rows, dtype=torch.int64, device=DEVICE)
        shape = (rows, config.num_key_value_heads, width, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.randn(shape, device=DEVICE, dtype=model.dtype) for _ in layers]
        self.values = [torch.randn(shape, device=DEVICE, dtype=model.dtype) for _ in layers]
        self.columns = torch.arange(width, device=DEVICE)
        if how == "flash":  # [R, W, H_kv, D], each row from its slot's beginning
            self.keys, self.values = ([self.left(t, held) for t in ts] for ts in (self.keys, self.values))
            self.places = torch.arange(rows, device=DEVICE)
            self.ends = torch.arange(rows + 1, device=DEVICE, dtype=torch.int32)
        self.no_mask = torch.zeros(1, 1, 1, 1, device=DEVICE)
        self.logits = torch.zeros(rows, config.vocab_size, device=DEVICE, dtype=model.dtype)

    def left(self, stored: Tensor, held: Tensor) -> Tensor:
        moved = torch.zeros_like(stored.transpose(1, 2).contiguous())
        for row, count in enumerate(held.tolist()):
            first = int(held.max()) - count
            moved[row, :count] = stored[row, :, first : first + count].transpose(0, 1)
        return moved

    def flash(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys[self.places, self.lengths] = key
        values[self.places, self.lengths] = value
        if not CUDA:
            mask = (self.columns <= self.lengths[:, None])[:, None, None]
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
            return F.scaled_dot_product_attention(
                query[:, :, None], k, v, attn_mask=mask, scale=scaling, enable_gqa=True
            )[:, :, 0]
        made = torch.ops.aten._flash_attention_forward(
            query.contiguous(), keys.flatten(0, 1), values.flatten(0, 1), self.ends, self.ends * self.width, 1, self.width,
            0.0, False, False, scale=scaling, seqused_k=(self.lengths + 1).int(),
        )  # fmt: skip
        return made[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [R, H, D], key and value [R, H_kv, D] → [R, H, D]."""
        if self.how == "flash":
            return self.flash(layer, query, key, value, scaling)
        rows, heads, size = query.shape
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.head, key[:, :, None])
        values.index_copy_(2, self.head, value[:, :, None])
        groups = heads // keys.shape[1]
        folded = query.view(rows, keys.shape[1], groups, size)
        if self.how == "products":
            scores = torch.matmul(folded * scaling, keys.transpose(2, 3)).float() + self.bias
            return torch.matmul(scores.softmax(-1).to(query.dtype), values).reshape(rows, heads, size)
        if self.how == "folded":
            out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=self.mask, scale=scaling)
            return out.reshape(rows, heads, size)
        out = F.scaled_dot_product_attention(
            query[:, :, None], keys, values, attn_mask=self.mask, scale=scaling, enable_gqa=True
        )
        return out[:, :, 0]

    def step(self) -> None:
        self.lengths = self.head - self.starts
        seen = (self.columns >= self.starts[:, None]) & (self.columns <= self.head)
        self.mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=DEVICE).masked_fill_(
            ~seen, -torch.inf
        )
        self.mask = self.mask[:, None, None]
        self.bias = self.mask.float() if self.how == "products" else None
        positions = (self.head - self.starts)[None]
        made = self.model(
            input_ids=self.tokens,
            position_ids=positions,
            attention_mask=self.no_mask,
            use_cache=False,
            batch=self,
        )  # a mask of four dimensions: transformers asks no further, which would wait for the device
        logits = made.logits[0]
        self.logits.copy_(logits)
        self.tokens.copy_(logits.argmax(-1)[None])
        self.head.add_(1)


def kernels_of(call: Any) -> dict[str, Any]:
    """What one call runs on the device: name to (times, microseconds), the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as made:
        call()
        sync()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in made.events():
        if str(event.device_type).endswith("CUDA"):
            times[event.name[:70]] += event.time_range.elapsed_us()
            counts[event.name[:70]] += 1
    return {
        "count": sum(counts.values()),
        "ms": sum(times.values()) / 1e3,
        "top": {k: (counts[k], round(v)) for k, v in times.most_common(24)},
    }


@torch.inference_mode()
def stage_sampled() -> dict[str, Any]:
    """Sampled text by pages and by rectangles, filters, penalties, samples and logprobs; tiny, in float32."""
    from pipeline.engine.probe import choose_forward
    from pipeline.request import GenerationParams, Request

    model = random_model(tiny_models()["llama"], torch.float32)
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
        params = GenerationParams(
            max_new_tokens=24, temperature=0.9, seed=3, ignore_eos=True, **filters[i % 6]
        )
        wanted.append(Request(request.id, request.prompt_token_ids, params))
    texts = {}
    for way in ("pages", "rectangles"):
        own = model.config._attn_implementation
        forward, _ = choose_forward(model, way)
        from pipeline.engine.engine import Engine

        done = list(Engine(forward, frozenset(), max_rows=16).generate(wanted))
        texts[way] = {(c.request_id, c.sample): c.token_ids for c in done}
        model.set_attn_implementation(own)
    same = sum(texts["pages"][k] == v for k, v in texts["rectangles"].items())
    return {"same": f"{same}/{len(texts['rectangles'])}"}


@torch.inference_mode()
def stage_kernels() -> dict[str, Any]:
    """Each Triton kernel against torch in float32, on random data; microseconds of a call in a row of calls."""
    if not CUDA:
        return {"skipped": "needs a GPU"}
    from pipeline.engine.paged import kernels as k

    found: dict[str, Any] = {}

    def off(made: Tensor, wanted: Tensor) -> float:
        return ((made.float() - wanted.float()).norm() / wanted.float().norm()).item()

    def us(call: Any) -> float:
        def many() -> None:
            for _ in range(20):
                call()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        return 1e3 * median_ms(graph.replay, 5) / 20

    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype)[6:]
        x, w = (torch.randn(64, 4096, device=DEVICE), torch.randn(4096, device=DEVICE))
        x, w, a = x.to(dtype), w.to(dtype), torch.randn(64, 4096, device=DEVICE).to(dtype)
        wide = x.float()
        found[f"norm {name}"] = (
            off(k.rms_norm(x, w, 1e-5), wide * torch.rsqrt(wide.pow(2).mean(-1, True) + 1e-5) * w.float()),
            us(lambda: k.rms_norm(x, w, 1e-5)),
        )  # noqa: B023
        y = x.clone()
        k.add_rms_norm(y, a, w, 1e-5)
        found[f"add norm {name}"] = (off(y, x + a), us(lambda: k.add_rms_norm(y, a, w, 1e-5)))  # noqa: B023
        g, u = (torch.randn(64, 14336, device=DEVICE).to(dtype) for _ in range(2))
        found[f"silu {name}"] = (
            off(k.silu_multiply(g, u), F.silu(g.float()) * u.float()),
            us(lambda: k.silu_multiply(g, u)),
        )  # noqa: B023
        for heads, kv, size, window in (
            (32, 8, 128, None),
            (9, 3, 64, None),
            (32, 8, 128, 200),
            (6, 6, 96, None),
        ):
            rows, table_width = 64, 32
            lengths = [(37 * i) % 600 for i in range(rows)]
            table = torch.randperm(rows * table_width, device=DEVICE).view(rows, table_width).int()
            keys, values = (
                torch.randn(rows * table_width, 32, kv, size, device=DEVICE).to(dtype) for _ in range(2)
            )
            control = torch.tensor([[i, n] for i, n in enumerate(lengths)], device=DEVICE, dtype=torch.int32)
            q, nk, nv = (torch.randn(rows, h, size, device=DEVICE).to(dtype) for h in (heads, kv, kv))
            angle = torch.rand(rows, size // 2, device=DEVICE).repeat(1, 2) * 6
            turn = angle.cos().to(dtype), angle.sin().to(dtype)
            call = lambda: k.attend(q, nk, nv, turn, keys, values, control, table, 1024, window, size**-0.5)  # noqa: B023, E731
            made, outs = call(), []
            rq = k.rotate(q, turn)
            for i, n in enumerate(lengths):
                low = 0 if window is None else max(0, n + 1 - window)
                kk, vv = (
                    t[table[i].long()].flatten(0, 1)[low : n + 1].transpose(0, 1)[None].float()
                    for t in (keys, values)
                )
                outs.append(
                    F.scaled_dot_product_attention(rq[i][None, :, None].float(), kk, vv, enable_gqa=True)[
                        0, :, 0
                    ]
                )
            found[f"attend {heads}/{kv}x{size} window {window} {name}"] = (
                off(made, torch.stack(outs)),
                us(call),
            )
    return found


@torch.inference_mode()
def stage_varlen() -> dict[str, Any]:
    """Prefill over slots: variable-length FlashAttention whose keys lie in slots, against SDPA."""
    heads, kv, size, rows, width = (32, 8, 128, 8, 1024) if CUDA else (4, 2, 16, 2, 64)
    held, new = [width // 2 - 3 * i for i in range(rows)], [width // 4 + i for i in range(rows)]
    q = torch.randn(sum(new), heads, size, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(rows, width, kv, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ends = torch.tensor([0, *[sum(new[: i + 1]) for i in range(rows)]], device=DEVICE, dtype=torch.int32)
    starts = torch.arange(rows + 1, device=DEVICE, dtype=torch.int32) * width
    used = torch.tensor(held, device=DEVICE, dtype=torch.int32)
    outs = []
    for i in range(rows):
        mine = q[int(ends[i]) : int(ends[i + 1])].transpose(0, 1)[None]
        own_k, own_v = (t[i, : held[i]].transpose(0, 1)[None] for t in (k, v))
        at = torch.arange(held[i] - new[i], held[i], device=DEVICE)[:, None]
        seen = torch.arange(held[i], device=DEVICE)[None] <= at
        outs.append(
            F.scaled_dot_product_attention(mine, own_k, own_v, attn_mask=seen, enable_gqa=True)[0].transpose(
                0, 1
            )
        )
    expected = torch.cat(outs)
    found: dict[str, Any] = {}
    if not CUDA:
        return found

    def flash(left: int | None = None) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            q, k.flatten(0, 1), v.flatten(0, 1), ends, starts, max(new), max(held), 0.0, True, False,
            scale=size**-0.5, seqused_k=used, window_size_left=left, window_size_right=None if left is None else 0,
        )[0]  # fmt: skip

    for name, left in (("causal", None), ("window", 64)):
        try:
            made = flash(left)
            found[name] = {
                "off": ((made.float() - expected.float()).norm() / expected.float().norm()).item(),
                "ms": median_ms(lambda left=left: flash(left), 10),
            }
        except Exception as error:  # noqa: BLE001
            found[name] = f"{type(error).__name__}: {error}"[:300]
    try:
        import inspect

        from torch.nn.attention import varlen

        found["varlen"] = str(inspect.signature(varlen.varlen_attn))
    except Exception as error:  # noqa: BLE001
        found["varlen"] = str(error)[:200]
    found["schema"] = str(torch.ops.aten._flash_attention_forward.default._schema)
    for columns in (512, 4096, 32768):  # a decode step's attention, few rows and long ones: no splitting here
        for count in (1, 8, 64):
            if columns * count > 1 << 21:
                continue
            ks, vs = (
                torch.randn(count * columns, kv, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
            )
            qs = torch.randn(count, heads, size, device=DEVICE, dtype=torch.bfloat16)
            e = torch.arange(count + 1, device=DEVICE, dtype=torch.int32)
            u = torch.full((count,), columns, device=DEVICE, dtype=torch.int32)
            call = lambda: torch.ops.aten._flash_attention_forward(
                qs, ks, vs, e, e * columns, 1, columns, 0.0, False, False, scale=0.1, seqused_k=u
            )  # noqa: B023, E731
            f = lambda: F.scaled_dot_product_attention(
                qs[:, :, None],
                ks.view(count, columns, kv, size).transpose(1, 2),
                vs.view(count, columns, kv, size).transpose(1, 2),
                enable_gqa=True,
            )  # noqa: B023, E731
            found[f"decode {count}x{columns}"] = {
                "flash_ms": median_ms(call, 10),
                "sdpa_ms": median_ms(f, 10),
            }
    return found


@torch.inference_mode()
def stage_graph(model: Any, rows_list: list[int], lengths: tuple[int, int]) -> dict[str, Any]:
    from pipeline.engine.batch import ATTENTION

    own = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    found: dict[str, Any] = {}
    steps = 24 if CUDA else 3
    base: Tensor | None = None
    for rows in rows_list:
        draw = random.Random(3)
        held = torch.tensor([draw.randint(*lengths) + 32 for _ in range(rows)])
        width = -(-(int(held.max()) + 4 * steps) // 64) * 64
        for how in ("flash", "gqa", "products"):
            name = f"{how} {rows}"
            try:
                torch.manual_seed(4)  # the same keys and values for all
                box = StaticRectangle(model, rows, width, held, how)
                box.step()
                box.head.sub_(1)
                box.tokens.zero_()
                box.step()  # again, from the same state
                first = box.logits.float()
                base = first if base is None or base.shape != first.shape else base
                off = ((first - base).norm() / base.norm()).item()
                if not CUDA:
                    found[name] = {"eager_ms": median_ms(box.step, steps), "off": off}
                    say(f"graph {name}: {found[name]}")
                    continue
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        box.step()
                torch.cuda.current_stream().wait_stream(stream)
                eager = median_ms(box.step, 8)
                graph = torch.cuda.CUDAGraph()
                started = time.perf_counter()
                with torch.cuda.graph(graph):
                    box.step()
                capture = time.perf_counter() - started
                box.head.fill_(int(held.max()))
                box.tokens.zero_()
                graph.replay()
                again = ((box.logits.float() - first).norm() / first.norm()).item()
                replay = median_ms(graph.replay, steps)
                found[name] = {"eager_ms": eager, "graph_ms": replay, "capture_sec": capture, "width": width, "off": off, "again": again,
                               "tokens_per_s": 1e3 * rows / replay}  # fmt: skip
                if how == "flash":
                    found[name]["kernels"] = kernels_of(graph.replay)
                del graph
            except Exception as error:  # noqa: BLE001
                found[name] = f"{type(error).__name__}: {error}"[:300]
            say(f"graph {name}: {found[name]}")
            box = None
            free()
    model.set_attn_implementation(own)
    return found


@torch.inference_mode()
def stage_oom() -> dict[str, Any]:
    """The same requests with and without a hard cap. fp32 and tiny vocabulary, so that the text must be the same."""
    from pipeline.engine.probe import choose_forward

    if not CUDA:
        return {"skipped": "needs a GPU"}
    config = llama_config("small")
    config.num_hidden_layers, config.num_key_value_heads, config.max_position_embeddings = 16, 8, 8192
    model = random_model(config, torch.float32)
    forward, _ = choose_forward(model)
    wanted = requests(192, (200, 900), lambda d: d.randint(20, 120), config.vocab_size)
    free()
    torch.cuda.reset_peak_memory_stats()
    _, expected, _ = run_engine(forward, wanted, 128)
    peak = torch.cuda.max_memory_allocated()
    free()
    held = torch.cuda.memory_allocated()
    total = torch.cuda.mem_get_info(0)[1]
    found: dict[str, Any] = {"uncapped_peak_MB": peak / 1e6, "model_MB": held / 1e6}
    cap = held + (peak - held) // 3
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        torch.cuda.reset_peak_memory_stats()
        engine, done, seconds = run_engine(forward, wanted, 128)
        same = sum(done[r.id].token_ids == expected[r.id].token_ids for r in wanted)
        found |= {
            "cap_MB": cap / 1e6, "ooms": engine.stats.out_of_memory, "same": f"{same}/{len(wanted)}", "sec": seconds,
            "errors": sum(c.error is not None for c in done.values()), "peak_MB": torch.cuda.max_memory_allocated() / 1e6,
        }  # fmt: skip
        del engine
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    free()
    found["left_MB"] = torch.cuda.memory_allocated() / 1e6
    return found


def stage_jobs(folder: Path, quants: list[str], rows: int) -> dict[str, Any]:
    """Whole jobs, each in a process of its own, as a user runs them."""
    prompts = folder.parent / "prompts.jsonl"
    draw = random.Random(5)
    words = (
        "tell me a joke about rivers and trains in the style of an old newspaper with many long words".split()
    )
    with prompts.open("w") as lines:
        for i in range(rows):
            text = " ".join(draw.choices(words, k=draw.randint(20, 300)))
            print(json.dumps({"id": f"p{i}", "prompt": text}), file=lines)
    found: dict[str, Any] = {}
    for quant in quants:
        if time.perf_counter() - BEGUN > BUDGET:
            found[quant] = "no time left"
            continue
        out = folder.parent / f"job-{quant}"
        command = [
            sys.executable, "-m", "pipeline", "model=llama", f"model.name={folder}", f"quant={quant}", f"prompts={prompts}",
            f"outputs_dir={out}", "generation.max_new_tokens=48", "generation.ignore_eos=true", "memory_check=warn",
        ]  # fmt: skip
        made = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        stats = next(out.rglob("stats.json"), None)
        if made.returncode or stats is None:
            found[quant] = {"rc": made.returncode, "says": (made.stdout + made.stderr)[-700:]}
        else:
            s = json.loads(stats.read_text())
            m = s["memory"]
            found[quant] = {
                "load_sec": s["load_sec"], "tokens_per_s": s["tokens_per_sec"], "decode_steps": s["engine"]["decode_steps"],
                "step_ms": 1e3 * s["engine"]["decode_sec"] / max(1, s["engine"]["decode_steps"]), "rows": s["rows"],
                "predicted_MB": {k: v and v / 1e6 for k, v in m["predicted"].items()},
                "measured_MB": {k: v and v / 1e6 for k, v in m["measured"].items()}, "error_percent": m["error_percent"],
                "devices": m["run_peak"]["devices"],
            }  # fmt: skip
        say(f"jobs {quant}: {json.dumps(found[quant])[:900]}")
    return found


def save_folder(model: Any, folder: Path) -> None:
    """The model beside a real tokenizer, so that `python -m pipeline` can load it."""
    import shutil

    started = time.perf_counter()
    model.save_pretrained(folder, max_shard_size="4GB")
    for file in Path(ARGS.tokenizer).iterdir():
        if "token" in file.name or file.name.startswith(("vocab", "merges", "special", "chat_template")):
            shutil.copy(file, folder)
    say(
        f"saved {folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s"
    )


def stage(name: str, call: Any) -> None:
    if ARGS.stages and name not in ARGS.stages:
        return
    if time.perf_counter() - BEGUN > BUDGET:
        RESULTS[name] = "no time left"
        say(f"{name}: no time left")
        return
    started = time.perf_counter()
    try:
        RESULTS[name] = call()
    except Exception:  # noqa: BLE001
        RESULTS[name] = traceback.format_exc()[-1500:]
        free()
    say(
        f"== {name} took {time.perf_counter() - started:.1f} s: {json.dumps(RESULTS[name], default=str)[:1500]}"
    )
    (OUT / "gpu_check.json").write_text(json.dumps(RESULTS, indent=1, default=str))
    (OUT / "gpu_check.log").write_text("\n".join(LINES))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check")))
    parser.add_argument("--budget", type=float, default=400, help="no stage begins after so many seconds")
    parser.add_argument("--stages", nargs="*", default=[])
    parser.add_argument(
        "--tokenizer", default="models/SmolLM2-135M-Instruct", help="a folder with a tokenizer to borrow"
    )
    parser.add_argument("--work", type=Path, default=None, help="room for the checkpoint; default /dev/shm")
    parser.add_argument("--ours", action="store_true", help="leave the peers out of the speed stage")
    parser.add_argument("--trace", action="store_true")
    ARGS = parser.parse_args()
    OUT, BUDGET = ARGS.out, ARGS.budget
    OUT.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, os.getcwd())
    CUDA = torch.cuda.is_available() and not ARGS.tiny
    DEVICE = torch.device("cuda:0" if CUDA else "cpu")
    big = CUDA
    rows_list = [32, 64, 128] if big else [4, 8]
    lengths = (64, 512) if big else (5, 40)
    new = 64 if big else 6
    work = ARGS.work or Path("/dev/shm" if big else OUT) / "gpu_check"
    folder = work / "llama"
    folder.mkdir(parents=True, exist_ok=True)

    stage("env", stage_env)
    stage("kernels", stage_kernels)
    if CUDA and isinstance(RESULTS.get("kernels"), str):  # go on without them
        import pipeline.engine.paged.forward as paged_forward

        paged_forward._gpu_kernels = lambda device: (None, True)
    stage("exact", stage_exact)
    stage("sampled", stage_sampled)
    needed = {"speed", "profile", "graph", "jobs"}
    model = None
    if not ARGS.stages or needed & set(ARGS.stages):
        config = llama_config("8b" if big else "tiny")
        if not big:
            config.vocab_size = 49152  # the borrowed tokenizer's
        model = random_model(config, torch.bfloat16)
        say(f"model: {model.get_memory_footprint() / 1e6:,.1f} MB")
    stage("profile", lambda: stage_profile(model, 64 if big else 4, lengths))
    stage("speed", lambda: stage_speed(model, [64, 128] if big else rows_list, new, lengths))
    stage("oom", stage_oom)
    if model is not None and (not ARGS.stages or "jobs" in ARGS.stages):
        save_folder(model, folder)
    model = None
    free()
    stage("jobs", lambda: stage_jobs(folder, ["nf4"], 128 if big else 6))
    stage("jobs2", lambda: stage_jobs(folder, ["bf16", "int8"], 128 if big else 6))
    if big:
        import shutil

        shutil.rmtree(work, ignore_errors=True)
    say("done")
    print(json.dumps(RESULTS, default=str)[-9000:])
