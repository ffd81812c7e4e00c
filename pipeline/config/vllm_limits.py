"""Say what vLLM does not do as this program's own engine does it: such rows and jobs are refused."""

from pipeline.common.request import GenerationParams

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
ROWS_ON_CPU, ROWS_ON_GPU = 128, 256


def rows_in_flight(asked: int | None, *, on_cpu: bool) -> int:
    """Say how many rows vLLM runs at once: as asked, else as many as make a step faster."""
    return asked or (ROWS_ON_CPU if on_cpu else ROWS_ON_GPU)


def refusal(params: GenerationParams) -> str | None:
    """Say which of a row's settings vLLM would take as another, and what it would take; None if it takes all."""
    if not (params.greedy or LEAST_TEMPERATURE <= params.temperature <= MOST_TEMPERATURE):
        return (
            f"temperature={params.temperature}: vLLM takes 0 (greedy), or {LEAST_TEMPERATURE} to "
            f"{MOST_TEMPERATURE}"
        )
    if params.label_logprobs:
        return "label_logprobs=true: vLLM's process makes texts, and does not compare choices"
    if params.min_p > 0 and params.top_p < 1 and not params.greedy:
        return (
            f"min_p={params.min_p} and top_p={params.top_p}: vLLM applies them in the other order, which keeps "
            "other tokens; use one of them"
        )
    return None
