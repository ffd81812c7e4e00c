"""Does a row's text depend on its neighbours' padding? Asked of every model once, when it is loaded."""

import logging
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.forward import FlatForward, Forward, PaddedForward, input_device
from pipeline.engine.kv_cache import Rectangle
from pipeline.engine.scheduler import Sequence
from pipeline.errors import LoadError
from pipeline.request import GenerationParams, Request

log = logging.getLogger(__name__)

# The largest logit difference that is rounding, as a share of the logits' standard deviation.
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.25, torch.bfloat16: 0.5}


@torch.inference_mode()
def choose_forward(model: Any, attention: str = "auto") -> tuple[Forward, dict[str, Any]]:
    """The fastest way through this model that gives a padded row the logits of the row alone.

    Args:
        attention: `auto`, or `plain` to leave the fast path out.

    Returns:
        the way, and for the manifest its name and `max_logit_difference`, as a share of the logits'
        standard deviation.

    Raises:
        LoadError: the model keeps other state than keys and values.
    """
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
        except (NotImplementedError, TypeError, ValueError, AttributeError, LookupError) as error:
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
    """Token ids spread over the vocabulary: 7 of them, and 19."""
    ids = tuple(17 + i * 7919 % (vocab_size - 17) for i in range(26))
    return ids[:7], ids[7:]
