"""Does a row's text depend on its neighbours' padding? Asked of every model once, when it is loaded."""

import logging
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.forward import FlatForward, Forward, PaddedForward, input_device
from pipeline.engine.kv_cache import Rectangle
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.scheduler import Sequence
from pipeline.errors import LoadError
from pipeline.request import GenerationParams, Request

log = logging.getLogger(__name__)

# The largest logit difference that is rounding, as a share of the logits' standard deviation.
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.25, torch.bfloat16: 0.5}
PROBE_TOKENS = (7, 19)  # of a short row, and of a long one beside it


def choose_forward(model: Any, attention: str = "auto") -> tuple[Forward, dict[str, Any]]:
    """The fastest way through this model that gives a padded row the logits of the row alone.

    Args:
        attention: `auto`, or `plain` to leave the fast path out.

    Returns:
        the way, and for the manifest its name and `max_logit_difference`, as a share of the logits'
        standard deviation.

    Raises:
        LoadError: the model keeps other state than keys and values, or its first passes fail.
    """
    try:
        return _choose(model, attention)
    except LoadError:
        raise
    except Exception as error:
        log.info("The first passes through the model failed", exc_info=True)
        raise LoadError(_message(error, model)) from error


def _message(error: Exception, model: Any) -> str:
    name = type(model).__name__
    if is_out_of_memory(error):
        return (
            f"{name}: not enough memory for a first pass of {sum(PROBE_TOKENS)} tokens beside the weights. "
            "Try a smaller quantization (quant=nf4) or a smaller model, or end what else uses this memory"
        )
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    quantized = getattr(model, "is_quantized", False)
    fix = "Use quant=none or another quantization" if quantized else "Use another version of transformers"
    return f"{name}: its first pass failed: {said}. {fix}, or another model. The log has the traceback"


@torch.inference_mode()
def _choose(model: Any, attention: str) -> tuple[Forward, dict[str, Any]]:
    own_attention = model.config._attn_implementation
    short, long = _probe_rows(int(model.config.get_text_config().vocab_size))
    device = input_device(model)
    expected = [
        model(torch.tensor([ids], device=device), use_cache=False).logits[0, -1].float()
        for ids in (short, (*short, short[0]))
    ]
    # An 8-bit product depends on the rows beside it, padding or not: what a neighbour of equal length does
    # is not held against a path.
    beside = model(torch.tensor([short, long[: len(short)]], device=device), use_cache=False).logits[0, -1]
    noise = ((beside.float() - expected[0]).abs().max() / expected[0].std()).item()
    tolerance = max(TOLERANCE.get(model.dtype, 0.5), 2 * noise)
    names = ["padded"] if attention == "plain" else ["rectangles", "padded"]
    for name in names:
        try:
            forward = (
                FlatForward(model) if name == "rectangles" else PaddedForward(model, equal_lengths=False)
            )
            difference = _difference(forward, short, long, expected)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
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
            f"{type(model).__name__}: this model keeps other state than keys and values (recurrent or convolution "
            "layers), which is not supported. Choose a model whose layers all are attention."
        )
    log.warning("This model computes other text in a padded row: only prompts of equal length share a batch.")
    return PaddedForward(model, equal_lengths=True), {"path": "equal lengths", "max_logit_difference": None}


def _runs_alone(model: Any, ids: tuple[int, ...]) -> bool:
    """Whether at least a row of its own finds a way through the model."""
    row = Sequence(Request("", ids, GenerationParams()), 0)
    try:
        _check_layers(PaddedForward(model, equal_lengths=True).prefill([row], None, 1 << 30)[0])
    except (NotImplementedError, TypeError, ValueError, AttributeError, LookupError) as error:
        log.info("Alone: not for this model (%s)", error)
        return False
    return True


def _check_layers(rectangle: Rectangle) -> None:
    """Raises NotImplementedError unless every layer has written keys and values."""
    if len(rectangle.keys) != len(rectangle.windows):
        raise NotImplementedError("layers that keep other state than keys and values")


def _difference(
    forward: Forward, short: tuple[int, ...], long: tuple[int, ...], expected: list[Tensor]
) -> float:
    """Prefill a short row beside a long one, then feed one token to both."""
    rows = [Sequence(Request(str(i), ids, GenerationParams()), 0) for i, ids in enumerate((long, short))]
    rectangle, logits = forward.prefill(rows, None, 1 << 30)
    _check_layers(rectangle)
    differences = [(logits[1].float() - expected[0]).abs().max() / expected[0].std()]
    for row in rows:
        row.token_ids.append(short[0])
    logits = forward.decode([rectangle])
    differences.append((logits[1].float() - expected[1]).abs().max() / expected[1].std())
    return max(d.item() for d in differences)


def _probe_rows(vocab_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a short row and of a long one, spread over the vocabulary."""
    short, long = PROBE_TOKENS
    ids = tuple(17 + i * 7919 % (vocab_size - 17) for i in range(short + long))
    return ids[:short], ids[short:]
