"""Count a model's tensors in a process of its own: `python -m pipeline.memory.counting < config.json`.

It needs torch, builds the model on the meta device and answers in JSON, which counted.py reads. What a config.json
says may be hostile: no code that comes with a model is run, nothing is fetched, and memory and time are bounded.
"""

import copy
import inspect
import json
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, DynamicCache

from pipeline.common.errors import LoadError, PipelineError
from pipeline.config.quant import QUANTS
from pipeline.config.stored_format import SKIPPED
from pipeline.engine.attention import ATTENTION
from pipeline.engine.model_facts import cache_name, layer_windows, needs_own_cache
from pipeline.engine.rectangles.own_cache import cache_tensors, new_cache
from pipeline.memory.counted import LIMIT_SEC
from pipeline.memory.measured import kind_of
from pipeline.models.layer_checks import check_layers
from pipeline.models.loading import quiet_transformers
from pipeline.models.loading_checks import first_line
from pipeline.models.meta import build_on_meta, quantized_shapes

# Two of the plain dtypes: what is in another one in both, is so whatever the model is loaded in.
_BF16, _FP16 = "bfloat16", "float16"
_INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")
LIMIT_BYTES = 4 << 30  # ten times what the largest model takes, and some for libraries
_TOKENS = 2  # in the pass that makes keys and values
_FEW = (4, 8)  # in those that tell what grows with the tokens from what does not
_PIECES = (32, 64, 128, 256, 512)  # columns that a scan may pad a row to
# Of what a row of so many takes in a pass: a shorter one that takes as much is padded, by what its config says, or not.
_MUCH, _ALIKE = 0.3, 0.85


def count(values: Mapping[str, Any]) -> dict[str, Any]:
    """Count what a config's model holds, for `counted.py` to make an `Architecture` of.

    Raises:
        PipelineError: transformers knows no such model, or can make none of this config.
    """
    config = _config(values)
    own = config.dtype or torch.float32
    network = build_on_meta(config, QUANTS["bf16"]).eval()
    text = config.get_text_config(decoder=True)
    weights = list(_weights(network, quantized_shapes(config, values.get(SKIPPED))))
    return {
        **_sizes(network, text),
        "dtype": str(own).removeprefix("torch."),
        "weights": weights,
        **_layer_keys(network, text),  # last: a pass may change buffers
        "refused": _refused(config),
    }


def _config(values: Mapping[str, Any]) -> Any:
    """Read a config as transformers does, but for keys that choose code to run."""
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        own = "needs Python code that comes with the model, and a plan runs none"
        new = "this transformers does not know it"
        raise LoadError(
            f"model_type {kind!r}: {own if 'auto_map' in values else new}",
            "Choose another model, or upgrade transformers (pip install -U transformers)",
        )
    kept = {
        key: value
        for key, value in values.items()
        if key not in ("auto_map", SKIPPED) and "implementation" not in key
    }
    try:
        return CONFIG_MAPPING[str(kind)].from_dict(json.loads(json.dumps(kept), object_hook=_special_float))
    except Exception as error:
        raise LoadError(
            f"transformers cannot read it: {first_line(error)}", "Copy or download it again"
        ) from error


def _special_float(found: dict[str, Any]) -> Any:
    """Read infinity as transformers writes it into a config.json."""
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def _refused(config: Any) -> str | None:
    """Say why a job would be refused by the layers; None if it would not."""
    try:
        check_layers(config, "")
    except LoadError as error:
        return error.found.removeprefix(": ")
    return None


def _sizes(network: Any, text: Any) -> dict[str, Any]:
    """Read the sizes that estimates of activations and logits take."""
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    heads = _whole(text, "num_attention_heads") or 1
    hidden = _whole(text, "hidden_size") or embedding.weight.shape[-1]
    chosen = _whole(text, "num_experts_per_tok") or 1
    inner = [_whole(text, key) for key in _INNER] + [chosen * _whole(text, "moe_intermediate_size")]
    return {
        "model_type": text.model_type,
        "vocab_size": (embedding if head is None else head).weight.shape[0],
        "hidden_size": hidden,
        "intermediate_size": max(inner) or 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(text, "num_key_value_heads") or heads,
        "head_dim": _whole(text, "head_dim") or max(1, hidden // heads),
        "max_position_embeddings": _whole(text, "max_position_embeddings") or 1 << 30,
        "tie_word_embeddings": head is not None and head.weight is embedding.weight,
    }


def _whole(text: Any, key: str) -> int:
    """Read a size; of one for each layer, the largest; 0 where there is none for all of them."""
    try:
        value = getattr(text, key, None)
    except (AttributeError, RuntimeError):  # it differs by layer, and each has a config of its own
        return 0
    if isinstance(value, list | tuple):
        value = max((each for each in value if isinstance(each, int)), default=0)
    return value if isinstance(value, int) and value > 0 else 0


def _weights(network: Any, quantized: dict[str, list[int]]) -> Iterator[dict[str, Any]]:
    """List every parameter and buffer once: the fields of `architecture.Weight`."""
    wide = {dtype: _kept_wide(network, dtype) for dtype in (_BF16, _FP16)}
    head = network.get_output_embeddings()
    seen = set[int]()
    for path, module in network.named_modules():
        part = kind_of(path, module, head)
        held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for own, tensor in held:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = f"{path}.{own}" if path else own
            is_buffer = not isinstance(tensor, torch.nn.Parameter)
            dtype = str(tensor.dtype).removeprefix("torch.")
            loaded = own not in module._non_persistent_buffers_set
            yield {
                "name": name,
                "part": "buffers" if is_buffer else part,
                "shape": quantized.get(name, list(tensor.shape)),
                "quantizable": name in quantized,
                "dtype": None if dtype == _BF16 else dtype,
                "element_bytes": tensor.element_size(),
                "wide_in": [kind for kind, names in wide.items() if loaded and names and names.search(name)],
            }


def _kept_wide(network: Any, dtype: str) -> re.Pattern[str] | None:
    """Match what transformers keeps in float32 when it loads such a model in this dtype, as it does itself."""
    plan = network._get_dtype_plan(getattr(torch, dtype))
    return re.compile("|".join(name.replace("*", ".*") for name in plan)) if plan else None


def _layer_keys(network: Any, text: Any) -> dict[str, Any]:
    """Count the scalars of one token's keys and values in each layer, by a pass that makes them without memory.

    In the ways that a job takes: by the engine's own attention, which drops what has left a window, else by the
    model's, which keeps all. Where both fail, they are those of the config's sizes, and the note says why.
    """
    if hasattr(network, "set_experts_implementation"):
        network.set_experts_implementation("batched_mm")  # others ask how many tokens each expert has
    fx_settings.meta_nonzero_assume_all_nonzero = True
    why, own_cache = "", needs_own_cache(network.config) is not None
    plain = {"layer_states": [], "layer_state_bytes": [], "own_cache": own_cache, "note": None}
    plain |= {"pass_columns": 0, "pass_bytes": [0, 0]}
    for way in (_in_own_cache,) if own_cache else (_attended, _cached):
        try:
            found = way(network, text)
        except Exception as error:  # noqa: BLE001  any code of transformers runs in it
            why = first_line(error)
        else:
            with suppress(Exception):  # as above; then activations are estimated as every other model's
                plain |= _pass_bytes(network, text) if own_cache else {}
            return {**plain, **found}
    heads = _whole(text, "num_key_value_heads") or _whole(text, "num_attention_heads")
    size = _whole(text, "head_dim") or _whole(text, "hidden_size") // max(heads, 1)
    layers = _whole(text, "num_hidden_layers")
    note = f"keys and values are estimated from the config's sizes: {why}"
    if own_cache:
        note += "; the states of its recurrent layers, constant for each row, are not counted"
    return {**plain, "layer_keys": [2 * heads * size] * layers, "windows": [None] * layers, "note": note}


def _in_own_cache(network: Any, text: Any) -> dict[str, Any]:
    """Count what the model puts into the cache that it makes for itself: what grows with the tokens, and what does not.

    What is not in the model's dtype has one of its own, whatever the model is loaded in.
    """
    few, more = (_held(network, tokens) for tokens in _FEW)
    grown = _FEW[1] - _FEW[0]
    keys = [(after[0] - before[0]) // grown for before, after in zip(few, more, strict=True)]
    layers = max(_whole(text, "num_hidden_layers"), len(keys))
    missing = [0] * (layers - len(keys))
    return {
        "layer_keys": keys + missing,
        "layer_states": [held[0] - _FEW[0] * each for held, each in zip(few, keys, strict=True)] + missing,
        "layer_state_bytes": [held[1] for held in few] + missing,
        "windows": [None] * layers,
    }


def _pass_bytes(network: Any, text: Any) -> dict[str, Any]:
    """Count what a row's pass holds at once: by column, or by as many as a scan pads a shorter row to.

    Without the packages that have kernels for it, transformers scans in pieces of 64 to 256 columns, and holds
    matrices of a piece by a piece for each head, however short the row is.
    """
    shortest = _most_held(network, _TOKENS)
    columns = max(_whole(text, "mamba_chunk_size"), _whole(text, "chunk_size"))
    if columns not in _PIECES or shortest < _MUCH * _most_held(network, columns):
        padded = takewhile(lambda each: shortest >= _ALIKE * _most_held(network, each), _PIECES)
        columns = max(padded, default=1)
    seen = max(columns, _PIECES[0])
    half, wide = (_most_held(network.to(dtype), seen) for dtype in (torch.bfloat16, torch.float32))
    pieces = seen // columns
    return {"pass_columns": columns, "pass_bytes": [half // pieces, wide // pieces]}


def _most_held(network: Any, columns: int) -> int:
    """Count the bytes that a pass over one row makes and holds at once, beside what stays in its cache.

    Not in a mixture's experts, which go another way here than in a job.
    """
    name, cache = cache_name(network), new_cache(network)
    given: dict[str, Any] = {} if cache is None else {name: cache}
    if "logits_to_keep" in inspect.signature(network.forward).parameters:
        given["logits_to_keep"] = 1
    live = _Live(network)
    experts = [module for module in network.modules() if hasattr(module, "is_transposed")]
    hooks = [module.register_forward_pre_hook(live.pause) for module in experts]
    hooks += [module.register_forward_hook(live.go_on) for module in experts]
    try:
        output = _pass(network, columns, live, use_cache=True, **given)
    finally:
        for hook in hooks:
            hook.remove()
    kept = sum(tensor.nbytes for tensor in cache_tensors(output.get(name, cache)))
    return max(0, live.most - kept)


def _held(network: Any, tokens: int) -> list[tuple[int, int]]:
    """Count what a cache holds of a row of so many tokens, by layer: scalars as the model's, and bytes of others."""
    name = cache_name(network)
    cache = new_cache(network)
    output = _pass(network, tokens, use_cache=True, **({} if cache is None else {name: cache}))
    cache = output.get(name, cache)
    held = []
    for layer in getattr(cache, "layers", [cache]):
        tensors = list(cache_tensors(layer))
        own = sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.bfloat16)
        held.append((own, sum(tensor.nbytes for tensor in tensors if tensor.dtype != torch.bfloat16)))
    return held


def _attended(network: Any, text: Any) -> dict[str, Any]:
    """Count what the engine's attention is given, in each layer."""
    windows = layer_windows(text)
    shapes = _Shapes(windows)
    before = text._attn_implementation
    network.set_attn_implementation(ATTENTION)
    try:
        _pass(network, batch=shapes, use_cache=False)
    finally:
        network.set_attn_implementation(before)
    keys = [shapes.scalars[layer] for layer in range(len(windows))]
    return {"layer_keys": keys, "windows": list(windows)}


def _cached(network: Any, text: Any) -> dict[str, Any]:
    """Count what the model puts into a cache of transformers."""
    cache: Any = DynamicCache(config=copy.deepcopy(text))
    _pass(network, use_cache=True, **{cache_name(network): cache})
    found = [_scalars(layer) for layer in cache.layers]
    found += [0] * (_whole(text, "num_hidden_layers") - len(found))
    return {"layer_keys": found, "windows": [None] * len(found)}


def _pass(network: Any, tokens: int = _TOKENS, mode: "_Unasked | None" = None, **given: Any) -> Any:
    """Run a pass over a few tokens that have no values."""
    if "position_ids" in inspect.signature(network.forward).parameters:
        given["position_ids"] = torch.arange(tokens, device="meta")[None]
    with torch.no_grad(), torch.device("meta"), mode or _Unasked():  # type: ignore[no-untyped-call]
        return network(input_ids=torch.ones(1, tokens, dtype=torch.int64), **given)


@dataclass(slots=True)
class _Shapes:
    """Stand in for the engine's pass, and note how large a token's keys and values are."""

    windows: tuple[int | None, ...]
    scalars: dict[int, int] = field(default_factory=dict)  # by layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend to nothing. query [N, H, D], key and value [N, H_kv, D] → [N, H, D of the values].

        Raises:
            NotImplementedError: the pass has come to the layer before.
        """
        if layer in self.scalars:
            raise NotImplementedError("a layer keeps keys and values more than once")
        self.scalars[layer] = (key.numel() + value.numel()) // len(key)
        return query.new_empty(*query.shape[:2], value.shape[-1])


class _Unasked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answer True where code asks for the value of a tensor that has none, as of a mask whether all of it is set."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return True
        return func(*args, **(kwargs or {}))


class _Live(_Unasked):
    """Count what is alive at once of the tensors that a pass makes, weights left out."""

    def __init__(self, network: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._counts = True
        weights = (*network.parameters(), *network.buffers())
        self._held = {tensor.untyped_storage()._cdata for tensor in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(made) if self._counts else ():
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._held:
                self._held.add(storage._cdata)
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return made

    def pause(self, *_: Any) -> None:
        self._counts = False

    def go_on(self, *_: Any) -> None:
        self._counts = True

    def _drop(self, storage: int, size: int) -> None:
        self._held.discard(storage)
        self._now -= size


def _scalars(layer: Any) -> int:
    """Count what a layer of the cache holds for one token."""
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    return sum(tensor.numel() // _TOKENS for tensor in held if isinstance(tensor, Tensor))


def main() -> None:
    """Read a config and write what its model holds, or what is wrong with it."""
    _bound()
    quiet_transformers()
    try:
        answer = count(json.load(sys.stdin))
    except PipelineError as error:
        answer = {"error": [error.found, error.fix]}
    json.dump(answer, sys.stdout)


def _bound() -> None:
    """Let no config take the machine's memory or time. Data, as libraries map far more addresses than they use."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SEC, LIMIT_SEC))


if __name__ == "__main__":
    main()
