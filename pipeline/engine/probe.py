"""Try the ways through a model, once when it is loaded, until a row's text depends on no padding beside it.

Each way is tried while the model crosses the lengths that it names (thresholds.py), and is measured by the
rounding of the model's own passes.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.common.errors import LoadError
from pipeline.common.request import GenerationParams, Request
from pipeline.engine.model_facts import input_device, needs_own_cache
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.forward import FlatForward, Forward, PaddedForward
from pipeline.engine.rectangles.own_cache import CacheForward
from pipeline.engine.rectangles.rectangle import Rectangle
from pipeline.engine.scheduler import Sample
from pipeline.engine.thresholds import forget_lengths, lowered

log = logging.getLogger(__name__)

# Logit differences, as a share of the logits' standard deviation: the least that is always taken for rounding…
ROUNDING = {torch.float32: 0.02, torch.float16: 0.04, torch.bfloat16: 0.1}
# … and the most, where the model has only one attention, so that its own rounding cannot be measured.
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.25, torch.bfloat16: 0.5}
AnyForward = Forward | PagedForward
EQUAL_LENGTHS = "equal lengths"
REPEATED = "a pass comes to some of its layers more than once, each time with other keys and values"
PROBE_TOKENS = (7, 19)  # of a short row, and of a long one beside it


def choose_forward(
    model: Any, attention: str = "auto", longest: int | None = None
) -> tuple[AnyForward, dict[str, Any]]:
    """Choose the fastest way through a model that gives a padded row the logits of the row alone.

    Args:
        attention: `auto`: pages on a GPU, else rectangles; or the first way to try: `pages`, `rectangles`, `plain`.
        longest: no row will have more tokens; None: they may have any number.

    Returns:
        the way, and for the manifest its name, `max_logit_difference`, as a share of the logits' standard
        deviation, and `why` no faster way was taken, None for the first.

    Raises:
        LoadError: the model sees the tokens to come, or keeps other state than keys and values, its first
            passes fail, or its logits are not finite.
    """
    try:
        return _choose(model, attention, longest)
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
    said = _first_line(error)
    fix = "Use another version of transformers"
    if fixed:
        fix = "Use quant=bf16, if there is memory for plain weights, another version of transformers"
    elif getattr(model, "is_quantized", False):
        fix = "Use quant=none or another quantization"
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
def _choose(model: Any, attention: str, longest: int | None) -> tuple[AnyForward, dict[str, Any]]:
    """Compare each way's logits with those of two rows alone; the first that is near enough wins."""
    own_attention = model.config._attn_implementation
    device = input_device(model)
    if attention == "auto":
        attention = "pages" if device.type == "cuda" else "rectangles"
    ways: dict[str, Callable[[Any], AnyForward]] = {
        "pages": PagedForward,
        "rectangles": FlatForward,
        "padded": PaddedForward,
        EQUAL_LENGTHS: CacheForward,
    }
    own_cache = needs_own_cache(model.config)
    names = [] if own_cache else list(ways)[{"pages": 0, "rectangles": 1, "plain": 2}[attention] : -1]
    short, long = _probe_rows(int(model.config.get_text_config().vocab_size))
    with _counted(model) as calls:
        expected = _alone(model, short)
    reasons: list[str] = []
    if max(calls.values(), default=0) > len(expected):
        # The faster ones keep one key for each layer and token.
        names, reasons = [name for name in names if name == "padded"], [REPEATED]
    tolerance = _check_own_passes(model, short, long, expected)
    difference: float | None
    with lowered(model, longest) as any_lower:
        if any_lower:
            expected = _alone(model, short)
        for name in names:
            difference, reason = _try(ways[name], model, (short, long), [rows[-1] for rows in expected])
            if difference <= tolerance:
                break
            log.warning("Attention %s: not used: %s", name, reason)
            reasons.append(reason)
            model.set_attn_implementation(own_attention)
        else:
            name, difference = EQUAL_LENGTHS, None
            _check_own_cache(model, short, long, tolerance)
            log.warning("Rows of this model have no padding: only prompts of equal length share a batch.")
    why = own_cache or (reasons[0] if reasons else None)
    # Made anew, to read the model's true lengths.
    return ways[name](model), {"path": name, "max_logit_difference": difference, "why": why}


def _alone(model: Any, ids: tuple[int, ...]) -> list[Tensor]:
    """Return the model's own logits, [T, V] float32 of a row alone, without and with one more token."""
    made: list[Tensor] = []
    for tokens in (ids, (*ids, ids[0])):
        forget_lengths(model)
        row = torch.tensor([tokens], device=input_device(model))
        made.append(model(row, use_cache=False).logits[0].float())
    return made


@contextmanager
def _counted(model: Any) -> Iterator[Counter[nn.Module]]:
    """Count how often passes come to each part that knows its layer's number."""
    calls: Counter[nn.Module] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: calls.update([module]))
        for module in model.modules()
        if hasattr(module, "layer_idx")
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _check_own_passes(
    model: Any, short: tuple[int, ...], long: tuple[int, ...], expected: list[Tensor]
) -> float:
    """Return how far logits may differ by rounding, from how far those of the model's own passes do.

    Raises:
        LoadError: they are not finite, or those of a token depend on the tokens after it.
    """
    if not all(logits.isfinite().all() for logits in expected):
        raise _not_finite(model)
    before, after = expected
    # An 8-bit product depends on the rows beside it, padding or not: what a neighbour of equal length does
    # is not held against a path.
    both = torch.tensor([short, long[: len(short)]], device=input_device(model))
    noise = _distance(model(both, use_cache=False).logits[0].float(), before)
    if _distance(after[:-1], before) > max(TOLERANCE.get(model.dtype, 0.5), 2 * noise):
        raise LoadError(
            found=f"{type(model).__name__}: it is no causal language model: what it makes of a token changes with "
            "the tokens after it",
            fix="Choose a causal language model",
        )
    if model.dtype != torch.float32:
        noise = max(noise, _attention_noise(model, short, after))
    # Three times: the padded row has other neighbours than this one, and more kinds of kernels.
    return max(ROUNDING.get(model.dtype, 0.1), 3 * noise)


def _attention_noise(model: Any, short: tuple[int, ...], expected: Tensor) -> float:
    """Measure how far the model's logits differ between its own two attentions, which differ by rounding alone."""
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa" if own == "eager" else "eager")
        row = torch.tensor([(*short, short[0])], device=input_device(model))
        return _distance(model(row, use_cache=False).logits[0].float(), expected)
    except Exception as error:  # a model may have one, and says so in words of its own
        if is_out_of_memory(error):
            raise
        log.info("The model's other attention cannot be had (%s)", error)
        return TOLERANCE.get(model.dtype, 0.5) / 2
    finally:
        model.set_attn_implementation(own)


def _distance(logits: Tensor, wanted: Tensor) -> float:
    """Measure the largest difference, as a share of the standard deviation. Both [T, V]; NaN if one is."""
    return ((logits - wanted).abs().amax(-1) / wanted.std(-1)).max().item()


def _try(
    way: Callable[[Any], AnyForward],
    model: Any,
    rows: tuple[tuple[int, ...], tuple[int, ...]],
    expected: list[Tensor],
) -> tuple[float, str]:
    """Return how far a way's logits are from those expected, infinite where it fails, and say so."""
    try:
        difference = _difference(way(model), *rows, expected)
    except Exception as error:  # Triton's own are of no common kind
        if is_out_of_memory(error):
            raise
        log.info("It fails", exc_info=True)
        return float("inf"), _first_line(error)
    return (
        difference,
        f"the logits of a row beside a longer one differ by {difference:.3g} standard deviations",
    )


def _check_own_cache(model: Any, short: tuple[int, ...], long: tuple[int, ...], tolerance: float) -> None:
    """Refuse a model through whose own cache a row has other logits beside another one of its length than alone.

    Raises:
        LoadError: so it is, or rows of its cache cannot be selected.
    """
    name = type(model).__name__
    another = "Choose another model, or another version of transformers"
    try:
        alone, beside = _through_own_cache(model, short), _through_own_cache(model, long[: len(short)], short)
    except (NotImplementedError, TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        log.info("Its own cache: not for this model", exc_info=True)
        raise LoadError(
            found=f"{name}: it keeps what it knows of earlier tokens in a way of its own, which is not supported: "
            f"{_first_line(error)}",
            fix=another,
        ) from error
    difference = _distance(beside, alone)
    if not difference <= max(tolerance, TOLERANCE.get(model.dtype, 0.5)):
        raise LoadError(
            found=f"{name}: a row's logits change with the rows beside it, even of its length, by {difference:.3g} "
            "standard deviations",
            fix=another,
        )


def _through_own_cache(model: Any, *rows: tuple[int, ...]) -> Tensor:
    """Return the last row's logits [3, V] after its tokens, one more, and another, fed when those before it ended."""
    forward, samples = CacheForward(model), _probe_samples(*rows)
    group, logits = forward.prefill(samples.copy(), None, 1 << 30)
    made = [logits[-1]]
    for token in samples[-1].request.prompt_token_ids[:2]:
        for sample in samples:
            sample.token_ids.append(token)
        made.append(forward.decode([group])[-1])
        group.head += 1
        for _ in group.rows[1:]:
            group.retire(0)
    return torch.stack(made).float()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _check_layers(rectangle: Rectangle) -> None:
    """Refuse a model of which a layer has written no keys and values."""
    if (held := len(rectangle.keys)) != (named := len(rectangle.windows)):
        raise NotImplementedError(f"{held} layers hand over keys and values, and its config names {named}")


def _difference(
    forward: AnyForward, short: tuple[int, ...], long: tuple[int, ...], expected: list[Tensor]
) -> float:
    """Prefill a short row beside a long one, feed one token to both, and compare the short row's logits."""
    made = (
        forward.trial((long, short), short[0])
        if isinstance(forward, PagedForward)
        else _trial(forward, long, short)
    )
    return _distance(torch.stack([logits[1].float() for logits in made]), torch.stack(expected))


def _trial(forward: Forward, long: tuple[int, ...], short: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return logits [2, V] after both rows, and after one more token of each."""
    rows = _probe_samples(long, short)
    rectangle, before = forward.prefill(rows, None, 1 << 30)
    _check_layers(rectangle)
    for row in rows:
        row.token_ids.append(short[0])
    return before, forward.decode([rectangle])


def _probe_samples(*rows: tuple[int, ...]) -> list[Sample]:
    return [Sample(Request(str(i), ids, GenerationParams()), 0) for i, ids in enumerate(rows)]


def _probe_rows(vocab_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Make token ids of a short row and of a long one, spread over the vocabulary."""
    short, long = PROBE_TOKENS
    ids = tuple(17 + i * 7919 % (vocab_size - 17) for i in range(short + long))
    return ids[:short], ids[short:]
