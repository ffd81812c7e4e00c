"""The schema of every config file: typed dataclasses, whose defaults are the only ones there are.

conf/ states choices on top of them. Hydra checks keys and types against these classes, so that a
misspelt key is an error that names it.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from pipeline.request import GenerationParams


class Dtype(Enum):
    """The dtype of weights that are not quantized."""

    auto = "auto"  # the checkpoint's own
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class QuantMethod(Enum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"
    fp4 = "fp4"


class OnError(Enum):
    """What a bad prompt row does."""

    record = "record"  # becomes an error row; the job goes on
    fail = "fail"  # stops the job before the model loads


class Resume(Enum):
    auto = "auto"  # go on where the folder's rows stop
    never = "never"  # start anew in a folder beside the old one


class Attention(Enum):
    auto = "auto"  # rectangles where the model allows it, else plain
    plain = "plain"  # the model's own attention, one rectangle at a time


@dataclass
class ModelConfig:
    name: str = MISSING  # ORG/NAME on the hub, or a local folder
    revision: str | None = None  # branch, tag or commit; null is the hub's main
    trust_remote_code: bool = False  # run Python code that comes with the model
    safetensors_only: bool = True  # refuse pickle weights, which can run code
    device_map: Any = "auto"  # auto, a device ("cpu", "cuda:1"), or a map of modules to devices
    max_memory: dict[str, str] | None = None  # device to limit, as {"0": 20GiB, cpu: 60GiB}
    offload_dir: str | None = None  # where weights go that fit neither the GPU nor the CPU
    attn_implementation: str | None = None  # null is the model's own choice
    chat_template: str | None = None  # a Jinja template, or the path of one; null is the tokenizer's
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # as {enable_thinking: false}
    architecture: dict[str, Any] | None = None  # facts for a memory plan without the model's files


@dataclass
class QuantConfig:
    method: QuantMethod = QuantMethod.none
    dtype: Dtype = Dtype.auto  # of the weights that are not quantized
    double_quant: bool = False  # 4-bit: quantize the scales too
    compute_dtype: Dtype = Dtype.bfloat16  # 4-bit: the dtype of the products


@dataclass
class GenerationConfig(GenerationParams):
    thinking: bool = False  # keep <think>…</think> apart from the completion


@dataclass
class EngineConfig:
    max_rows: int | None = None  # rows in flight; null is as many as memory holds
    max_tokens_in_flight: int | None = None  # prompt and completion tokens of those rows; null likewise
    memory_fraction: float = 0.85  # how much of the free memory may be used
    prefill_tokens: int = 2048  # prompt tokens in one forward pass
    shared_prefix: bool = True  # prefill what all prompts share once
    attention: Attention = Attention.auto
    pack_weights: bool = True  # CPU, bf16: reorder the weights once and not at each call
    compile: bool = False  # torch.compile; pays for itself only on long jobs


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    prompts: str = MISSING  # a path, a name in jobs/, or - for standard input; .jsonl or .jsonl.gz
    prompt_field: str = "prompt"  # the field of a row that holds its prompt
    system: str | None = None  # a system prompt for every row that has none
    limit: int | None = None  # only the first rows
    shard: str | None = None  # "0/4": every fourth row, from the first
    on_error: OnError = OnError.record
    resume: Resume = Resume.auto
    retry_errors: bool = False  # redo the rows that ended in an error
    stream: bool = False  # show the first row's text as it is made
    token_ids: bool = False  # write each completion's token ids too
    report: bool = False  # at the end of a sweep, write the report of its jobs
    models_dir: str = "models"  # searched first, for a folder with the model's own name
    outputs_dir: str = "outputs"
    prompt_set: str | None = None  # the job folder's parent; null is the prompt file's own name


def root() -> Path:
    """The folder that holds conf/ and jobs/: inside the package when installed, else beside it."""
    package = Path(__file__).resolve().parent
    return package if (package / "conf").is_dir() else package.parent


def register() -> None:
    """Tell Hydra the schema; conf/ names its parts."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="quant", name="schema", node=QuantConfig)
    store.store(group="generation", name="schema", node=GenerationConfig)
    store.store(group="engine", name="schema", node=EngineConfig)
