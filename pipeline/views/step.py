"""Take one forward pass of the real model apart: embedding, layers, final norm, head, next token.

The pass is the model's own, `model(ids)`; hooks only look at what flows by.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.common.errors import ConfigError
from pipeline.common.request import GenerationParams
from pipeline.engine.sampling import filtered_probabilities
from pipeline.views.tokens import token_bytes


@dataclass(frozen=True, slots=True)
class Residual:
    """Hold the last position's residual stream at one place on its way up."""

    name: str  # embedding, layer 0 …, final norm
    norm: float  # its Euclidean length
    top_token_id: int  # what the final norm and the head would make of it (the logit lens)
    top_text: str
    top_probability: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """Hold a candidate for the next token."""

    token_id: int
    text: str
    logit: float
    probability: float  # softmax of the logits
    sampled_probability: float  # after temperature, top_k, top_p and min_p; 0 where filtered out


@dataclass(frozen=True, slots=True)
class AttentionHead:
    """Hold one head of one layer: row t is how token t spreads its attention over tokens 0 … t."""

    layer: int
    head: int
    weights: list[list[float]]  # [T, T]


@dataclass(frozen=True, slots=True)
class StepView:
    """Hold one forward pass, from the tokens to the candidates for the next one."""

    token_ids: list[int]
    token_texts: list[str]
    shape: dict[str, int]  # tokens, hidden_size, layers, heads, vocabulary
    places: list[Residual]
    next: list[Candidate]  # the k most probable, best first
    kept: int  # tokens that the filters leave to draw from
    entropy_bits: float  # of the softmax of the logits
    attention: AttentionHead | None


@torch.inference_mode()
def step_view(
    model: Any,
    tokenizer: Any,
    token_ids: Sequence[int],
    params: GenerationParams,
    *,
    k: int = 10,
    layer: int | None = None,
    head: int = 0,
) -> StepView:
    """Run the tokens through the model once.

    Args:
        token_ids: at least one, and no more than the context.
        k: how many candidates.
        layer, head: whose attention; without a layer, none is computed. Negative counts from the end.

    Raises:
        ConfigError: no such layer or head, or a model whose parts are not where transformers puts them.
    """
    layers, norm = _parts(model)
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(token_ids)], device=device)
    with _residuals(model, layers) as seen:
        logits: Tensor = model(ids).logits[0, -1].float()
    heads = int(model.config.get_text_config().num_attention_heads)
    probabilities = torch.softmax(logits, -1)
    candidates, kept = _candidates(logits, params, k, tokenizer)
    return StepView(
        token_ids=list(token_ids),
        token_texts=[_readable(tokenizer, token_id) for token_id in token_ids],
        shape={
            "tokens": len(token_ids),
            "hidden_size": seen[0].shape[-1],
            "layers": len(layers),
            "heads": heads,
            "vocabulary": logits.shape[-1],
        },
        places=_places(model, norm, seen, tokenizer),
        next=candidates,
        kept=kept,
        entropy_bits=float(torch.special.entr(probabilities).sum() / torch.log(torch.tensor(2.0))),
        attention=None if layer is None else attention(model, ids, layer, head),
    )


@torch.inference_mode()
def attention(model: Any, ids: Tensor, layer: int, head: int) -> AttentionHead:
    """Compute one head with transformers' eager attention, the only one that returns its weights. ids: [1, T].

    Raises:
        ConfigError: no such layer or head, or the model returns no weights.
    """
    layers, _ = _parts(model)
    heads = int(model.config.get_text_config().num_attention_heads)
    layer, head = _checked("layer", layer, len(layers)), _checked("head", head, heads)
    found: list[Tensor] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            found.append(output[1][0, head].float().cpu())

    before = model.config._attn_implementation
    hook = _attention_module(layers[layer]).register_forward_hook(look)
    try:
        model.set_attn_implementation("eager")
        model(ids, logits_to_keep=1)
    finally:
        hook.remove()
        model.set_attn_implementation(before)
    if not found:
        raise ConfigError(f"layer={layer}: this model gives no attention weights", "Leave layer= out")
    return AttentionHead(layer, head, found[0].tolist())


def _parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
    """Find the decoder's layers and its final norm."""
    decoder = model.get_decoder()
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise ConfigError(
            f"{type(model).__name__}: the step view needs a decoder with `layers` and a final `norm`, "
            "as Llama, Gemma, Phi and Qwen have",
            "Choose another view=: the others work with this model",
        )
    return layers, norm


def _attention_module(layer: nn.Module) -> nn.Module:
    for name, module in layer.named_children():
        if "attn" in name.lower() or "attention" in name.lower():
            return module
    raise ConfigError(f"{type(layer).__name__}: has no attention", "Choose another layer=")


def _checked(key: str, value: int, count: int) -> int:
    if not -count <= value < count:
        raise ConfigError(f"{key}={value}: the model has {count}", f"Choose {key}=0 to {key}={count - 1}")
    return value % count


@contextmanager
def _residuals(model: Any, layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Collect the last position's residual stream: before the first layer, and after each. Each [hidden]."""
    seen: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden[0, -1].detach())

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[0, -1].detach())

    hooks = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _places(model: Any, norm: nn.Module, seen: list[Tensor], tokenizer: Any) -> list[Residual]:
    """Look through the logit lens (nostalgebraist 2020): the final norm and the head, applied at every place."""
    head = model.get_output_embeddings()
    device = next(norm.parameters()).device
    names = ["embedding", *(f"layer {i}" for i in range(len(seen) - 1)), "final norm"]
    normed = [norm(state.to(device)[None])[0] for state in seen]
    states = [*seen, normed[-1]]
    made: list[Residual] = []
    for name, state, ready in zip(names, states, [*normed, normed[-1]], strict=True):
        probability, token_id = torch.softmax(head(ready[None])[0].float(), -1).max(-1)
        text = _readable(tokenizer, int(token_id))
        made.append(Residual(name, float(state.float().norm()), int(token_id), text, float(probability)))
    return made


def _candidates(
    logits: Tensor, params: GenerationParams, k: int, tokenizer: Any
) -> tuple[list[Candidate], int]:
    """Find the k most probable tokens, and how many the filters keep. logits: [V] float32."""
    probabilities = torch.softmax(logits, -1)
    best = logits.topk(min(k, len(logits))).indices.tolist()
    if params.greedy:
        after, kept = {best[0]: 1.0}, 1
    else:
        values = [
            torch.tensor([[float(v)]], device=logits.device)
            for v in (params.top_k, params.top_p, params.min_p)
        ]
        left, ids = filtered_probabilities(logits[None] / params.temperature, *values)
        if not (params.top_k or params.top_p < 1 or params.min_p):
            left, ids = torch.softmax(logits[None] / params.temperature, -1), torch.arange(len(logits))[None]
        kept = int((left > 0).sum())
        after = dict(zip(ids[0].tolist(), (left / left.sum())[0].tolist(), strict=True))
    made = [
        Candidate(i, _readable(tokenizer, i), float(logits[i]), float(probabilities[i]), after.get(i, 0.0))
        for i in best
    ]
    return made, kept


def _readable(tokenizer: Any, token_id: int) -> str:
    """Return a token's text; bytes that are no whole character as \\xed."""
    return token_bytes(tokenizer, token_id).decode(errors="backslashreplace")
