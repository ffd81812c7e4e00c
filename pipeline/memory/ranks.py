"""Plan a model for vLLM: what each rank holds of it where GPUs share it, and what is left for keys and values."""

from dataclasses import dataclass, replace
from itertools import accumulate

from pipeline.common.errors import ConfigError
from pipeline.config.quant import QuantConfig
from pipeline.config.schema import EngineConfig, EngineName
from pipeline.config.vllm_limits import rows_in_flight
from pipeline.memory.architecture import Architecture
from pipeline.memory.devices import Device
from pipeline.memory.peaks import CUDA_CONTEXT_BYTES, work_bytes
from pipeline.memory.plan import kv_bytes_per_token, stored, weights
from pipeline.prompts.lengths import PromptLengths

WHOLE = ("norm", "buffers")  # parts that every rank of a tensor-parallel group holds
ENDS = ("embedding", "head")  # parts of the first and the last stage of a pipeline


@dataclass(frozen=True, slots=True)
class RankPlan:
    """Hold what is predicted of the rank that has the most to hold. JSON has the same fields."""

    model: str
    quant: str
    device: str  # each rank's
    tensor_parallel: int
    pipeline_parallel: int
    weight_bytes: int
    work_bytes: int  # of a pass, an estimate
    kv_cache_bytes: int  # what is left within engine.memory_fraction; below 0 where nothing is
    kv_bytes_per_token: int
    tokens: int  # of all rows in flight
    rows: int  # in flight, the longest first
    longest_row_tokens: int
    refused: str | None  # why vLLM would not part it so

    @property
    def fits(self) -> bool:
        """Say whether the longest row can run."""
        return self.refused is None and self.tokens >= self.longest_row_tokens


def plan_ranks(
    model: str,
    arch: Architecture,
    quant: tuple[str, QuantConfig],
    lengths: PromptLengths,
    settings: EngineConfig,
    device: Device,
) -> RankPlan:
    """Plan a model on ranks that have such a device each.

    Args:
        device: of one rank.
    """
    name, config = quant
    tensor, stages = settings.tensor_parallel, settings.pipeline_parallel
    held = rank_bytes(arch, config, tensor, stages)
    context = CUDA_CONTEXT_BYTES if device.gpus else 0
    most_rows = rows_in_flight(settings.max_rows, on_cpu=not device.gpus)
    rows = min(most_rows, len(lengths.samples)) or 1
    work = context + work_bytes(
        arch, config, device.gpus, settings.prefill_tokens, rows, lengths.copies_logits
    )
    left = int(device.free_bytes * settings.memory_fraction) - held - work
    per_token = kv_rank_bytes(arch, config, tensor, stages)
    tokens = max(0, left) // per_token
    sums = accumulate(sum(sample) for sample in lengths.samples[:most_rows])
    return RankPlan(
        model,
        name,
        device.name,
        tensor,
        stages,
        held,
        work,
        left,
        per_token,
        tokens,
        sum(taken <= tokens for taken in sums),
        sum(lengths.samples[0]) if lengths.samples else 1,
        _refusal(arch, tensor, stages),
    )


def shared(settings: EngineConfig, gpus: int | None) -> EngineConfig:
    """Share the model among so many GPUs: those that no pipeline parts, by tensor parallel.

    Raises:
        ConfigError: they cannot be parted so, or by another engine than vLLM.
    """
    if gpus is None:
        return settings
    if settings.name is not EngineName.vllm:
        raise ConfigError(f"gpus={gpus}: is for engine=vllm", "Add engine=vllm, or leave it out.")
    tensor, rest = divmod(gpus, settings.pipeline_parallel)
    if rest or settings.tensor_parallel not in (1, tensor):
        asked = (
            f"engine.tensor_parallel={settings.tensor_parallel} "
            f"engine.pipeline_parallel={settings.pipeline_parallel}"
        )
        raise ConfigError(f"gpus={gpus} {asked}: their product is another number", "Leave gpus= out.")
    return replace(settings, tensor_parallel=tensor)


def rank_bytes(arch: Architecture, quant: QuantConfig, tensor: int, stages: int) -> int:
    """Predict the weights of the fullest rank: layers are parted among stages, and matrices among a stage's ranks."""
    sizes = dict.fromkeys(("layers", *WHOLE, *ENDS), 0)
    for weight in weights(arch):
        part = weight.part if weight.part in sizes else "layers"
        sizes[part] += -(-stored(weight, arch, quant)[1] // (1 if part in WHOLE else tensor))
    share = -(-arch.num_hidden_layers // stages) / arch.num_hidden_layers
    head = sizes["head"] or (sizes["embedding"] if stages > 1 else 0)  # tied: the last stage has it, too
    ends = max(sizes["embedding"], head) if stages > 1 else sizes["embedding"] + head
    return round(share * (sizes["layers"] + sizes["norm"])) + sizes["buffers"] + ends


def kv_rank_bytes(arch: Architecture, quant: QuantConfig, tensor: int, stages: int) -> int:
    """Predict what a token's keys and values take on a rank, which has one head of them at least."""
    whole = sum(kv_bytes_per_token(arch, quant).values())
    heads = arch.num_key_value_heads
    share = -(-heads // tensor) / heads * -(-arch.num_hidden_layers // stages) / arch.num_hidden_layers
    return max(1, round(whole * share))


def _refusal(arch: Architecture, tensor: int, stages: int) -> str | None:
    if arch.num_attention_heads % tensor:
        return f"its {arch.num_attention_heads} attention heads cannot be parted by {tensor}"
    if arch.num_hidden_layers < stages:
        return f"it has {arch.num_hidden_layers} layers, and there are {stages} stages"
    return None
