"""Define the schema of every config file: typed dataclasses, whose defaults are the only ones there are.

conf/ states choices on top of them. Hydra checks keys and types against these classes, so that a
misspelt key is an error that names it.
"""

import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from pipeline.common.request import GenerationParams
from pipeline.config.quant import QuantConfig
from pipeline.config.vllm_limits import refusal, said_otherwise


class OnError(Enum):
    """Say what a bad prompt row does."""

    record = "record"  # becomes an error row; the job goes on
    fail = "fail"  # stops the job before the model loads


class Resume(Enum):
    """Say what a job does with the rows that its folder holds."""

    auto = "auto"  # go on where the folder's rows stop
    never = "never"  # start anew; what was there goes to run-1, run-2 … in the same folder


class MemoryCheck(Enum):
    """Say what happens to a job on the CPU that the machine's memory cannot hold."""

    refuse = "refuse"  # nothing is loaded; the error says what would fit
    warn = "warn"  # say so, and go on


class Attention(Enum):
    """Choose how keys and values are held; where a model does not allow one, the next is taken."""

    auto = "auto"  # pages on one GPU, else rectangles
    pages = "pages"  # static shapes and a graph a step, for a GPU
    rectangles = "rectangles"  # rows of similar length together, for a CPU or several GPUs
    plain = "plain"  # the model's own attention, one rectangle at a time


class EngineName(Enum):
    """Choose who computes."""

    default = "default"  # this program, with transformers' models
    vllm = "vllm"  # vLLM, in a process and an environment of its own


class Tracker(Enum):
    """Choose who else is told how a job goes; each is an extra to install."""

    mlflow = "mlflow"
    wandb = "wandb"
    trackio = "trackio"


@dataclass
class ModelConfig:
    """Name a model, and say how it is loaded."""

    name: str = MISSING  # ORG/NAME on the hub, or a local folder
    revision: str | None = None  # branch, tag or commit; null is the hub's main
    adapter: str | None = None  # a LoRA of peft: ORG/NAME on the hub, or a local folder
    trust_remote_code: bool = False  # run Python code that comes with the model
    safetensors_only: bool = True  # refuse pickle weights, which can run code
    device_map: Any = "auto"  # auto, a device ("cpu", "cuda:1"), or a map of modules to devices
    max_memory: dict[Any, str] | None = field(default_factory=dict)  # of a device, as {0: 20GiB, cpu: 60GiB}
    offload_dir: str | None = None  # where weights go that fit neither the GPU nor the CPU
    attn_implementation: str | None = None  # null is the model's own choice
    chat_template: str | None = None  # a Jinja template, or the path of one; null is the tokenizer's
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # as {enable_thinking: false}
    # The day that a template writes, as 2026-11-27; null is when the job began.
    template_date: str | None = None
    context: int | None = None  # tokens of prompt and completion together; null is the config's own
    # Facts for a memory plan without the model's files.
    architecture: dict[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.adapter is not None and (not self.adapter.strip() or "://" in self.adapter):
            raise ValueError("model.adapter: must be null, ORG/NAME on the hub, or a local folder")
        if self.context is not None and self.context < 1:
            raise ValueError(f"model.context={self.context}: must be null, or at least 1")
        if self.template_date is not None:
            try:
                datetime.fromisoformat(self.template_date)
            except ValueError:
                day = f"model.template_date={self.template_date}"
                raise ValueError(f"{day}: must be a day, as 2026-11-27") from None


LEFT_TO_THE_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # where they are null


@dataclass
class GenerationConfig(GenerationParams):
    """Say how every row is continued that does not say so itself.

    A null is the model's own: the value that its generation_config.json suggests.
    """

    temperature: float | None = GenerationParams.temperature  # type: ignore[assignment]
    top_p: float | None = GenerationParams.top_p  # type: ignore[assignment]
    top_k: int | None = GenerationParams.top_k  # type: ignore[assignment]
    min_p: float | None = GenerationParams.min_p  # type: ignore[assignment]
    repetition_penalty: float | None = GenerationParams.repetition_penalty  # type: ignore[assignment]
    thinking: bool = False  # keep <think>…</think>, or what the model's template has for it, apart
    thinking_tags: list[str] | None = None  # as ["<think>", "</think>"]; null is the template's own

    def __post_init__(self) -> None:
        self.left_to_the_model = [name for name in LEFT_TO_THE_MODEL if getattr(self, name) is None]
        for name in self.left_to_the_model:
            setattr(self, name, getattr(GenerationParams, name))
        super().__post_init__()
        if self.thinking and self.constraints:
            raise ValueError(f"thinking=True: must be false beside {self.constraints[0]}")
        if self.label_logprobs and self.left_to_the_model:
            raise ValueError(
                "label_logprobs=True: must be false beside generation=model, as nothing is sampled"
            )
        tags = self.thinking_tags
        if tags is not None and not (len(tags) == 2 and all(tags)):
            raise ValueError(
                f"thinking_tags={tags!r}: must be null, or two texts: what opens and what closes"
            )

    def params(self) -> GenerationParams:
        """Give what the engine needs to know of it."""
        return GenerationParams(
            **{name: getattr(self, name) for name in GenerationParams.__dataclass_fields__}
        )


@dataclass
class EngineConfig:
    """Say who computes, and how the batch is run.

    Raises:
        ValueError: a value is outside its range; the message names the key.
    """

    name: EngineName = EngineName.default
    max_rows: int | None = None  # rows in flight; null is as many as memory holds
    max_tokens_in_flight: int | None = None  # prompt and completion tokens of those rows; null likewise
    memory_fraction: float = 0.85  # how much of the free memory may be used
    prefill_tokens: int = 2048  # prompt tokens in one forward pass
    shared_prefix: bool = True  # prefill once what prompts begin with alike, group by group
    attention: Attention = Attention.auto
    pack_weights: bool = True  # products by our own kernels; for a CPU's, weights are reordered once
    python: str | None = None  # vllm: of its environment; null is that of make vllm, or this one
    tensor_parallel: int = 1  # vllm: GPUs that share each layer
    pipeline_parallel: int = 1  # vllm: GPUs, or groups of them, that share the layers
    max_model_len: int | None = None  # vllm: tokens of a row; null is the model's, or what the memory holds
    extra: dict[str, Any] = field(default_factory=dict)  # vllm: more arguments, as {enforce_eager: true}

    def __post_init__(self) -> None:
        tokens, length = self.max_tokens_in_flight, self.max_model_len
        for name, ok, rule in (
            ("max_rows", self.max_rows is None or self.max_rows >= 1, "null, or at least 1"),
            ("max_tokens_in_flight", tokens is None or tokens >= 1, "null, or at least 1"),
            ("memory_fraction", 0 < self.memory_fraction <= 1, "above 0 and at most 1"),
            ("prefill_tokens", self.prefill_tokens >= 1, "at least 1"),
            ("tensor_parallel", self.tensor_parallel >= 1, "at least 1"),
            ("pipeline_parallel", self.pipeline_parallel >= 1, "at least 1"),
            ("max_model_len", length is None or length >= 1, "null, or at least 1"),
        ):
            if not ok:
                raise ValueError(f"engine.{name}={getattr(self, name)!r}: must be {rule}")

    @property
    def ranks(self) -> int:
        """Count the GPUs that share one model."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def unread(self) -> list[str]:
        """List the keys that are set, and that this engine has no use for."""
        others = OWN_ALONE if self.name is EngineName.vllm else VLLM_ALONE
        return [f"engine.{name}" for name, unset in others.items() if getattr(self, name) != unset]


# What one engine has and the other has not, with the value that asks for nothing.
OWN_ALONE: dict[str, Any] = {"attention": Attention.auto, "pack_weights": True}
VLLM_ALONE: dict[str, Any] = {
    "python": None, "tensor_parallel": 1, "pipeline_parallel": 1, "max_model_len": None, "extra": {},
}  # fmt: skip


@dataclass
class SubmitConfig:
    """Say how `python -m pipeline submit` asks Slurm for a sweep's cells. Each cell gets all of this."""

    dry_run: bool = False  # print the table and the batch script, and submit nothing
    partition: str | None = None  # null is the cluster's default
    account: str | None = None
    qos: str | None = None
    time_min: int = 240  # of one run; a cell that needs longer comes back by itself
    memory: str | None = None  # of the host, as 32G; null is the partition's default
    cpus: int = 4
    gpus: int = 1
    nodes: int = 1  # vllm: machines that work on one cell together, over Ray; each has all of the above
    gpu_type: str | None = None  # as a100, where the cluster names them
    gpu_memory: str | None = None  # of one GPU, as 80G: only to warn of what cannot fit
    width: int | None = None  # cells at once; null is as many as Slurm gives
    signal_sec: int = 120  # warning before the time limit: long enough to finish a step and write
    options: list[str] = field(default_factory=list)  # more of sbatch's, as ["--constraint=ib"]
    setup: list[str] = field(default_factory=list)  # shell lines before the job, as ["module load cuda"]
    python: str | None = None  # null is the one that submits
    environment: dict[str, str] = field(default_factory=dict)
    offline: bool = True  # get models here and now, so that no compute node needs the hub

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("time_min", self.time_min >= 1, "at least 1 minute"),
            ("cpus", self.cpus >= 1, "at least 1"),
            ("gpus", self.gpus >= 0, "0 or more"),
            ("nodes", self.nodes >= 1, "at least 1"),
            ("width", self.width is None or self.width >= 1, "null, or at least 1"),
            ("signal_sec", 0 <= self.signal_sec < 60 * self.time_min, "less than the time limit's seconds"),
            ("memory", _is_size(self.memory), "null, or a size as 32G"),
            ("gpu_memory", _is_size(self.gpu_memory), "null, or a size as 80G"),
        ):
            if not ok:
                raise ValueError(f"submit.{name}={getattr(self, name)!r}: must be {rule}")

    @property
    def cell_gpus(self) -> int:
        """Count the GPUs of a cell, on all its nodes."""
        return self.nodes * self.gpus


def _is_size(text: str | None) -> bool:
    return text is None or re.fullmatch(r"[1-9][0-9]*[KMGT]?", text) is not None


COLUMNS = ("prompt", "id", "reference", "system", "messages")  # the fields that a file may call otherwise


@dataclass
class Config:
    """Describe a whole job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    prompts: str = MISSING  # a path, a name in jobs/, hf://ORG/NAME?split=test, or - for standard input
    prompt_field: str = "prompt"  # the field of a row that holds its prompt
    # Jinja over a row's columns, or a list of {role, content}; null takes what the row says.
    prompt_template: Any = None
    columns: dict[str, str] = field(default_factory=dict)  # as {prompt: question, id: qid, reference: answer}
    examples: str | None = None  # a file whose first rows are asked and answered before every row
    shots: int = 5  # how many of them
    system: str | None = None  # a system prompt for every row that has none
    continue_final_message: bool = False  # where a row's last message is the assistant's, go on with it
    limit: int | None = None  # only the first rows
    shard: str | None = None  # "0/4": every fourth row, from the first
    devices: str | None = (
        None  # all GPUs, or how many: a process each, on shards of the job; null is one process
    )
    on_error: OnError = OnError.record
    resume: Resume = Resume.auto
    memory_check: MemoryCheck = MemoryCheck.refuse
    retry_errors: bool = False  # redo the rows that ended in an error
    watchdog_sec: float | None = 1800  # without a step for so long, stop with status 4; null never stops
    stream: bool = False  # show the first row's text as it is made
    token_ids: bool = False  # write each completion's token ids too
    report: bool = False  # at the end of a sweep, write the report of its jobs; for a tracker, one of each
    tracker: Tracker | None = None  # a run of it for each job: docs/trackers.md
    models_dir: str = "models"  # searched first, for a folder with the model's own name
    outputs_dir: str = "outputs"
    prompt_set: str | None = None  # the job folder's parent; null is the prompt file's own name

    def __post_init__(self) -> None:
        for name, value, rule in (
            ("prompts", self.prompts, "the path of a prompt file, or a name in jobs/"),
            ("model.name", self.model.name, "a model's name on the hub, or a local folder"),
        ):
            if not value.strip():
                raise ValueError(f"{name}=: is empty; it must be {rule}")
        self._check_shape()
        self._check_devices()
        self._check_engine()
        if "://" in self.model.name:  # which is not shown: it may hold a token
            raise ValueError("model.name: is an address; it must be ORG/NAME on the hub, or a local folder")

    def _check_engine(self) -> None:
        """Refuse what vLLM does not do, before it is loaded."""
        if self.engine.name is not EngineName.vllm:
            return
        model, with_vllm = self.model, "engine=vllm"
        if self.quant.quantized:
            instead = "use quant=none, fp32, fp16 or bf16, or a copy of the model in GPTQ, AWQ or FP8"
            raise ValueError(f"quant.method={self.quant.method.value} {with_vllm}: vLLM does not; {instead}")
        if self.stream:
            raise ValueError(f"stream=true {with_vllm}: vLLM hands over whole completions; leave it out")
        if model.device_map not in ("auto", "cpu"):
            instead = "leave it out; CUDA_VISIBLE_DEVICES chooses GPUs, engine.tensor_parallel shares them"
            raise ValueError(
                f"model.device_map={model.device_map} {with_vllm}: must be auto or cpu; {instead}"
            )
        for name in ("max_memory", "offload_dir", "attn_implementation"):
            if getattr(model, name):
                raise ValueError(f"model.{name} {with_vllm}: vLLM has no such setting; leave it out")
        if wrong := refusal(self.generation):
            raise ValueError(f"generation.{wrong}")
        if wrong := said_otherwise(self.engine.extra):
            raise ValueError(wrong)

    def _check_devices(self) -> None:
        if self.devices is None:
            return
        if not re.fullmatch(r"all|[1-9][0-9]{0,3}", self.devices):
            raise ValueError(f"devices={self.devices}: must be null, all, or how many")
        if self.shard is not None:
            raise ValueError(f"devices={self.devices} shard={self.shard}: both split the job; keep one")

    def _check_shape(self) -> None:
        template = self.prompt_template
        messages = template if isinstance(template, list) else []
        if not (template is None or (isinstance(template, str) and template.strip()) or messages):
            raise ValueError("prompt_template: must be a text, or a list of {role, content}")
        for i, message in enumerate(messages):
            if not (isinstance(message, dict) and message.keys() == {"role", "content"}):
                raise ValueError(f"prompt_template[{i}]: must have a role and a content, and nothing else")
            if not all(isinstance(text, str) for text in message.values()):
                raise ValueError(f"prompt_template[{i}]: role and content must be texts")
        if wrong := sorted(self.columns.keys() - set(COLUMNS)):
            raise ValueError(f"columns.{wrong[0]}: no such field of a row; there are {', '.join(COLUMNS)}")
        if "prompt" in self.columns and self.prompt_field != "prompt":
            raise ValueError("prompt_field, columns.prompt: say the same; keep one")
        if self.shots < 1:
            raise ValueError(f"shots={self.shots}: must be at least 1; examples=null asks without any")


def root() -> Path:
    """Find the folder that holds conf/ and jobs/: inside the package when installed, else beside it."""
    package = Path(__file__).resolve().parents[1]
    # A folder of their own: Hydra takes every folder beside jobs/ for a group, pipeline/prompts/ too.
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parent


@cache  # what Hydra was told it keeps
def register() -> None:
    """Tell Hydra the schema; conf/ names its parts."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="quant", name="schema", node=QuantConfig)
    store.store(group="generation", name="schema", node=GenerationConfig)
    store.store(group="engine", name="schema", node=EngineConfig)
    store.store(group="submit", name="schema", node=SubmitConfig)
