"""Will it fit? `python -m pipeline.commands.plan model=llama quant=nf4 prompts=jokes.jsonl memory=24GB`

No weights, no GPU, no network and no torch: answers from the facts in conf/model/, or from a config.json
that is at hand. model=, quant= take `all` or a comma list; memory=24GB plans for another GPU than this
machine's; json=FILE writes the figures.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path

from pipeline.common.errors import ConfigError, PipelineError, PromptError
from pipeline.config.compose import options, read_config
from pipeline.config.schema import Config
from pipeline.memory.devices import Device, find_device, given_device
from pipeline.memory.facts import Facts, find_facts, model_folder
from pipeline.memory.fit import Job, Plan, Settings, best_choice, make_plan, planned
from pipeline.memory.plan import Quant
from pipeline.prompts.lengths import (
    PromptLengths,
    assumed_lengths,
    by_characters,
    by_tokenizer,
    prompt_lengths,
)
from pipeline.prompts.reader import open_prompts

QUANTS = ("none", "fp32", "fp16", "bf16", "int8", "nf4_single", "nf4", "fp4", "fp4_double")
# For the best choice: what comes nearest to the checkpoint's own answers, first.
BY_QUALITY = ("none", "int8", "nf4_single", "nf4")


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line, taken apart."""

    models: list[str | None]  # None is the config's own choice
    quants: list[str | None]
    memory: str | None
    json_file: str | None
    overrides: list[str]  # for Hydra


def parse(arguments: list[str]) -> Arguments:
    """Take out what is this command's own; the rest is Hydra's.

    Raises:
        ConfigError: json= or memory= without a value.
    """
    own: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("model", "quant", "memory", "json"):
            if not value:
                raise ConfigError(f"{argument}: needs a value, as {key}={_EXAMPLES[key]}.")
            own[key] = value
        elif argument not in ("-m", "--multirun"):
            overrides.append(argument)
    models = _choices("model", own.get("model"), options("model"))
    quants = _choices("quant", own.get("quant"), [q for q in QUANTS if q in options("quant")])
    return Arguments(models, quants, own.get("memory"), own.get("json"), overrides)


_EXAMPLES = {"model": "llama", "quant": "nf4", "memory": "24GB", "json": "plan.json"}


def _choices(group: str, value: str | None, known: list[str]) -> list[str | None]:
    if value is None:
        return [None]
    if value == "all":
        return [*known, *(name for name in options(group) if name not in known)]
    return list(value.split(","))


def plans(arguments: Arguments) -> list[Plan]:
    """One for each model and quantization.

    Raises:
        ConfigError: the config is wrong, or a model is neither known nor at hand.
        PromptError: the prompt file cannot be read.
    """
    by_quality = [name for name in BY_QUALITY if name in options("quant")]
    quant_names = list(dict.fromkeys([*arguments.quants, *by_quality]))
    # A composition costs 0.1 s, and a model does not depend on the quantization: one of each at a time.
    pairs = zip_longest(arguments.models, quant_names)
    configs = [_config(arguments, model, quant) for model, quant in pairs]
    models = dict(zip(arguments.models, configs, strict=False))
    device = _device(arguments, next(iter(models.values())))
    quants = {name: _quant(c, name, device) for name, c in zip(quant_names, configs, strict=False)}
    jobs = [_job(config, name, device, arguments) for name, config in models.items()]

    @cache
    def others() -> list[Job]:
        known = {job.model: job for job in jobs}
        return [
            known.get(name) or _job(_config(arguments, name, None), name, device, arguments)
            for name in options("model")
        ]

    return [
        make_plan(job, quants[quant], choice)
        for job in jobs
        for choice in [best_choice(job, [quants[name] for name in by_quality], others)]
        for quant in arguments.quants
    ]


def _config(arguments: Arguments, model: str | None, quant: str | None) -> Config:
    chosen = [f"{group}={name}" for group, name in (("model", model), ("quant", quant)) if name is not None]
    return read_config([*arguments.overrides, *chosen])


def _device(arguments: Arguments, config: Config) -> Device:
    if arguments.memory is not None:
        return given_device(arguments.memory)
    return find_device(config.model.offload_dir)


def _quant(config: Config, name: str | None, device: Device) -> Quant:
    quant = config.quant
    label = name or f"{quant.method.value}" + ("" if quant.dtype.value == "auto" else f" {quant.dtype.value}")
    return planned(quant, device.gpus, label)


def _job(config: Config, name: str | None, device: Device, arguments: Arguments) -> Job:
    facts = find_facts(config.model, config.models_dir)
    settings = Settings(
        memory_fraction=config.engine.memory_fraction,
        prefill_tokens=config.engine.prefill_tokens,
        max_rows=config.engine.max_rows,
        max_tokens_in_flight=config.engine.max_tokens_in_flight,
        pack_weights=config.engine.pack_weights,
    )
    lengths = _lengths(config, facts, given=any(o.startswith("prompts=") for o in arguments.overrides))
    return Job(name or Path(config.model.name).name, facts, lengths, device, settings)


def _lengths(config: Config, facts: Facts, given: bool) -> PromptLengths:
    """The prompt file's; assumed ones where none was named and the default is not there."""
    context = facts.architecture.max_position_embeddings
    generation = config.generation
    try:
        rows = open_prompts(config)
    except PromptError:
        if given:
            raise
        return assumed_lengths(generation.max_new_tokens, context, not generation.greedy)
    folder = model_folder(config.model, config.models_dir, "tokenizer.json")
    if folder is None:
        return prompt_lengths(rows, config.system, by_characters, "characters ÷ 4, an estimate", context)
    count = by_tokenizer(folder, config.model.chat_template, config.model.chat_template_kwargs)
    return prompt_lengths(rows, config.system, count, "the model's tokenizer", context)


def write_json(made: list[Plan], path: str) -> None:
    """The figures that are printed, in bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        text = json.dumps({"plans": [asdict(plan) for plan in made]}, indent=2, ensure_ascii=False)
        Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"json={path}: cannot be written ({error.strerror or error}).") from error


def main(arguments: list[str] | None = None, show: Callable[[list[Plan]], None] | None = None) -> int:
    """Returns the exit status: 0, or an error's."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        print(__doc__)
        return 0
    try:
        parsed = parse(given)
        made = plans(parsed)
        if parsed.json_file is not None:
            write_json(made, parsed.json_file)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    from pipeline.commands.plan_tables import print_plans

    (show or print_plans)(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
