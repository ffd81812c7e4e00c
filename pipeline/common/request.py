"""Define the plain data that passes between the folders: what is asked for, and what comes back."""

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")  # of GenerationParams: one of them at most


@dataclass
class GenerationParams:
    """How one request is to be continued. The schema of `generation=`, and of a row's own overrides.

    Raises:
        ValueError: a value is outside its range; the message names the key.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # 1 keeps every token
    top_k: int = 0  # 0 keeps every token
    min_p: float = 0.0  # 0 keeps every token
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    n: int = 1  # completions for each prompt
    seed: int = 0
    logprobs: int | None = None  # how many alternatives to report for each token
    ignore_eos: bool = False  # always make max_new_tokens tokens, for benchmarks
    json_schema: Any = (
        None  # the schema itself, or the path of its file until prompts/constraint.py has read it
    )
    regex: str | None = None  # of the whole completion
    choice: Any = None  # a list of texts: the completion is one of them
    grammar: str | None = None  # in Lark's notation, or the path of its file, as with json_schema
    label_logprobs: bool = False  # make no text: say how probable each choice is, and take the most probable

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("max_new_tokens", 1 <= self.max_new_tokens < 2**31, "at least 1 and below 2**31"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 (greedy) and 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or more, and below 2**31"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            ("stop", all(self.stop), "a list of non-empty strings"),
            ("n", 1 <= self.n <= 1024, "between 1 and 1024"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit whole number"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 100, "null, or between 0 and 100"),
            ("json_schema", isinstance(self.json_schema, dict | str | None), "a schema, or the path of one"),
            (
                "choice",
                self.choice is None or _is_texts(self.choice),
                'a list of different texts, in YAML as ["yes", "no"]',
            ),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {rule}")
        asked = [*self.constraints, *(["ignore_eos"] if self.ignore_eos else [])]
        if self.constraints and len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)}: one of them, not both")
        if self.label_logprobs:
            self._check_labels()

    def _check_labels(self) -> None:
        """See that nothing is asked of a text that is not made."""
        if self.choice is None:
            raise ValueError("label_logprobs=True: needs choice, the texts to compare")
        for name in ("n", "temperature", "repetition_penalty", "stop", "logprobs"):
            neutral = [] if name == "stop" else getattr(GenerationParams, name)
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be {neutral!r} beside label_logprobs, as nothing is sampled"
                )

    @property
    def constraints(self) -> list[str]:
        """List which of CONSTRAINTS are asked for."""
        return [name for name in CONSTRAINTS if getattr(self, name) is not None]

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def copies_logits(self) -> bool:
        """Say whether a token is chosen, or reported, from copies of the logits: not just the most probable one."""
        reported = self.logprobs is not None
        return not self.greedy or self.repetition_penalty != 1 or reported or bool(self.constraints)


def _is_texts(value: Any) -> bool:
    """Say whether it is a list of different texts; a bare yes or no is true or false in YAML."""
    texts = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
    return texts and 0 < len(set(value)) == len(value)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, ready for the engine. Immutable."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: GenerationParams
    stop_token_ids: frozenset[int] = frozenset()  # of stop strings that are special tokens
    constraint: str | None = None  # the grammar of its completions, as llguidance reads it
    forced: tuple[tuple[int, ...], ...] = ()  # what its samples are given in the place of chosen tokens

    @property
    def samples(self) -> int:
        """Count the completions that the engine makes of it."""
        return len(self.forced) or self.params.n


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural, before temperature and filters) at one generated token."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob) of the most probable, best first


@dataclass(frozen=True, slots=True)
class Label:
    """Say how probable a choice is."""

    choice: str
    logprob: float  # natural, the sum of its tokens'
    tokens: int  # of that sum
    probability: float  # among the choices


@dataclass(frozen=True, slots=True)
class Completion:
    """Hold what the engine made of one sample of a request."""

    request_id: str
    sample: int  # 0 … n-1
    token_ids: tuple[int, ...]  # without the end-of-sequence token
    finish_reason: FinishReason | None  # None with an error
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    complete: bool | None = None  # it is whole by its constraint; None without one
    labels: tuple[Label, ...] | None = None  # of all choices, where they were compared


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One good line of a prompt file: either `prompt` (text as it is, put in a user turn) or `messages`."""

    index: int  # counts rows, bad ones too, from 0
    id: str
    source: str  # "file:line", for errors
    prompt: str | None
    messages: list[dict[str, Any]] | None
    system: str | None
    params: GenerationParams  # the job's, with this row's overrides
    metadata: dict[str, object]  # the line's other fields
    template_kwargs: dict[str, object] = field(default_factory=dict)  # laid over the job's
    continue_final_message: bool | None = None  # None is as the job says
    constraint: str | None = None  # what its parameters say of it, as a grammar


@dataclass(frozen=True, slots=True)
class BadRow:
    """One line of a prompt file that cannot be run, and why."""

    index: int
    id: str
    source: str
    error: str
