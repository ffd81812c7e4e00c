"""Try the ways through a model, once when it is loaded, until a row's text depends on no padding beside it."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.common.errors import LoadError
from pipeline.common.request import GenerationParams, Request
from pipeline.engine.model_facts import input_device
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.forward import FlatForward, Forward, PaddedForward
from pipeline.engine.rectangles.rectangle import Rectangle
from pipeline.engine.scheduler import Sample

log = logging.getLogger(__name__)

# The largest logit difference that is rounding, as a share of the logits' standard deviation.
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.25, torch.bfloat16: 0.5}
AnyForward = Forward | PagedForward
PROBE_TOKENS = (7, 19)  # of a short row, and of a long one beside it


def choose_forward(model: Any, attention: str = "auto") -> tuple[AnyForward, dict[str, Any]]:
    """Choose the fastest way through a model that gives a padded row the logits of the row alone.

    Args:
        attention: `auto`: pages on a GPU, else rectangles; or the first way to try: `pages`, `rectangles`, `plain`.

    Returns:
        the way, and for the manifest its name and `max_logit_difference`, as a share of the logits'
        standard deviation.

    Raises:
        LoadError: the model keeps other state than keys and values, its first passes fail, or its logits are
            not finite.
    """
    try:
        return _choose(model, attention)
    except LoadError:
        raise
    except Exception as error:
        log.info("The first passes through the model failed", exc_info=True)
        raise _load_error(error, model) from error


def _load_error(error: Exception, model: Any) -> LoadError:
    """Say what a first pass failed of, and what to try instead."""
    name = type(model).__name__
    # A checkpoint that came quantized cannot be quantized otherwise.
    fixed = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)
    if is_out_of_memory(error):
        smaller = "a smaller model" if fixed else "a smaller quantization (quant=nf4) or a smaller model"
        return LoadError(
            found=f"{name}: not enough memory for a first pass of {sum(PROBE_TOKENS)} tokens beside the weights",
            fix=f"Try {smaller}, or end what else uses this memory",
        )
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    quantized = getattr(model, "is_quantized", False) and not fixed
    fix = "Use quant=none or another quantization" if quantized else "Use another version of transformers"
    return LoadError(
        found=f"{name}: its first pass failed: {said}",
        fix=f"{fix}, or another model. The log has the traceback",
    )


def _not_finite(model: Any) -> LoadError:
    """Say that a model's logits are no numbers."""
    dtype = str(model.dtype).removeprefix("torch.")
    return LoadError(
        found=f"{type(model).__name__}: its logits in {dtype} are not finite numbers (NaN or infinite), so it cannot "
        "choose a token: its weights are damaged, or exceed what this dtype can hold",
        fix="Try quant=fp32, or copy or download the model again",
    )


@torch.inference_mode()
def _choose(model: Any, attention: str) -> tuple[AnyForward, dict[str, Any]]:
    """Compare each way's logits with those of two rows alone; the first that is near enough wins."""
    own_attention = model.config._attn_implementation
    short, long = _probe_rows(int(model.config.get_text_config().vocab_size))
    device = input_device(model)
    expected = [
        model(torch.tensor([ids], device=device), use_cache=False).logits[0, -1].float()
        for ids in (short, (*short, short[0]))
    ]
    if not all(logits.isfinite().all() for logits in expected):
        raise _not_finite(model)
    # An 8-bit product depends on the rows beside it, padding or not: what a neighbour of equal length does
    # is not held against a path.
    beside = model(torch.tensor([short, long[: len(short)]], device=device), use_cache=False).logits[0, -1]
    noise = ((beside.float() - expected[0]).abs().max() / expected[0].std()).item()
    # Two times: the padded row has other neighbours than this one, and as much noise of its own.
    tolerance = max(TOLERANCE.get(model.dtype, 0.5), 2 * noise)
    if attention == "auto":
        attention = "pages" if device.type == "cuda" else "rectangles"
    ways: dict[str, Callable[[Any], AnyForward]] = {
        "pages": PagedForward,
        "rectangles": FlatForward,
        "padded": PaddedForward,
    }
    names = list(ways)[{"pages": 0, "rectangles": 1, "plain": 2}[attention] :]
    for name in names:
        try:
            forward = ways[name](model)
            difference = _difference(forward, short, long, expected)
        except Exception as error:  # Triton's own are of no common kind
            if is_out_of_memory(error):
                raise
            log.info("Attention %s: not for this model (%s)", name, error)
            difference = float("inf")
        if difference <= tolerance:
            return forward, {"path": name, "max_logit_difference": difference}
        log.warning("Attention %s: a padded row's logits differ by %.3g; not used", name, difference)
        model.set_attn_implementation(own_attention)
    if not _runs_alone(model, short):
        raise LoadError(
            found=f"{type(model).__name__}: this model keeps other state than keys and values (recurrent or "
            "convolution layers), which is not supported",
            fix="Choose a model whose layers all are attention",
        )
    log.warning("This model computes other text in a padded row: only prompts of equal length share a batch.")
    return PaddedForward(model, equal_lengths=True), {"path": "equal lengths", "max_logit_difference": None}


def _runs_alone(model: Any, ids: tuple[int, ...]) -> bool:
    """Say whether at least a row of its own finds a way through the model."""
    row = Sample(Request("", ids, GenerationParams()), 0)
    try:
        _check_layers(PaddedForward(model, equal_lengths=True).prefill([row], None, 1 << 30)[0])
    except (NotImplementedError, TypeError, ValueError, AttributeError, LookupError) as error:
        log.info("Alone: not for this model (%s)", error)
        return False
    return True


def _check_layers(rectangle: Rectangle) -> None:
    """Refuse a model of which a layer has written no keys and values."""
    if len(rectangle.keys) != len(rectangle.windows):
        raise NotImplementedError("layers that keep other state than keys and values")


def _difference(
    forward: AnyForward, short: tuple[int, ...], long: tuple[int, ...], expected: list[Tensor]
) -> float:
    """Prefill a short row beside a long one, feed one token to both, and compare the short row's logits."""
    made = (
        forward.trial((long, short), short[0])
        if isinstance(forward, PagedForward)
        else _trial(forward, long, short)
    )
    differences = [
        (logits[1].float() - wanted).abs().max() / wanted.std()
        for logits, wanted in zip(made, expected, strict=True)
    ]
    return torch.stack(differences).max().item()  # NaN if one is, which Python's max would pass over


def _trial(forward: Forward, long: tuple[int, ...], short: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return logits [2, V] after both rows, and after one more token of each."""
    rows = [Sample(Request(str(i), ids, GenerationParams()), 0) for i, ids in enumerate((long, short))]
    rectangle, before = forward.prefill(rows, None, 1 << 30)
    _check_layers(rectangle)
    for row in rows:
        row.token_ids.append(short[0])
    return before, forward.decode([rectangle])


def _probe_rows(vocab_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Make token ids of a short row and of a long one, spread over the vocabulary."""
    short, long = PROBE_TOKENS
    ids = tuple(17 + i * 7919 % (vocab_size - 17) for i in range(short + long))
    return ids[:short], ids[short:]
