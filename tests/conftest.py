"""Models for all tests: the real one, and tiny ones of every architecture that we promise exactness for."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

if shutil.which("nvidia-smi") is None:  # decided once, where Triton is first imported: by one of those below
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis as hypothesis  # before trio, or its import at the end of a run warns
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.models.loading import quiet_transformers

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ("chromium", "slurm_cluster")
quiet_transformers()

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Tell a joke for a room of Data Scientists.",
    "Why did the cat sit on the mat?",
    "한국어 문장입니다.",
]

# H > H_kv everywhere, so that grouped-query attention is always at work. Weights this wide make
# greedy text varied and keep the largest logit clear of the next.
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "phi3": (
        "Phi3Config",
        {  # as Phi-4-mini's config.json writes it
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,  # from there on, longrope takes its other factors
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.05 * i for i in range(6)],  # one a pair of the 12 rotated dimensions
                "long_factor": [1.5 + 0.5 * i for i in range(6)],
            },
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "num_hidden_layers": 6,  # the sixth attends to everything
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": False,  # tied and random, it says one token for ever
        },
    ),
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Have each test draw the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The folder of the real SmolLM2-135M-Instruct. Never skips: without it the main promise is untested."""
    folder = Path(os.environ.get("PIPELINE_TEST_MODEL") or ROOT / "models" / "SmolLM2-135M-Instruct")
    if not (folder / "config.json").is_file():
        pytest.fail(
            f"{folder}: the real model is not there; run `make test`, which fetches it", pytrace=False
        )
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> tuple[Any, Any]:
    """The real model in float32 and eval mode, and its tokenizer. Shared: do not change it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """`tiny_model("gemma3_text")`: a random model of that architecture, the same at each run. Shared."""
    return functools.cache(build_tiny)


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def each_tiny_model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Any]) -> Any:
    """One after another, a random model of each architecture."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Any]) -> Path:
    """A tiny Llama and a tokenizer with a chat template, as a folder. Shared: to write, take tiny_dir."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_dir(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of tiny_folder for one test to do with as it likes: tmp_path/models/tiny."""
    return shutil.copytree(tiny_folder, tmp_path / "models" / "tiny")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plots out of reports, where a test does not look at them: they take most of the time."""
    monkeypatch.setattr("pipeline.report.write._draw", lambda records, folder: ([], []))


def build_tiny(name: str) -> Any:
    """A random model in float32 and eval mode; its seed is fixed."""
    config_class, changes = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**SMALL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of at most 300 tokens; every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHATML,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
