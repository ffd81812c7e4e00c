"""Say whether a job fits in memory, before a weight is downloaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path

from pipeline.commands.arguments import take_own, whole_number, write_json
from pipeline.common.exit_status import ExitStatus
from pipeline.common.streams import kept
from pipeline.config.compose import job_keys, options, read_config
from pipeline.config.quant import QUANTS, SUGGESTED, quant_name
from pipeline.config.schema import Config, EngineName
from pipeline.memory.devices import Device, find_device, given_device
from pipeline.memory.facts import find_facts
from pipeline.memory.fit import Plan, Settings, Workload, best_choice, make_plan
from pipeline.memory.ranks import RankPlan, plan_ranks, shared
from pipeline.models.at_hand import expect_generation, expected_lengths

EXAMPLES = {"model": "llama", "model.name": "ORG/NAME", "quant": "nf4", "memory": "24GB", "gpus": "4",
    "json": "plan.json"}  # fmt: skip
HELP = """\
  python -m pipeline plan model=llama quant=nf4 prompts=jokes.jsonl     on this machine
  python -m pipeline plan model=llama quant=all memory=24GB             on a GPU of that size
  python -m pipeline plan model.name=ORG/A,ORG/B,FOLDER memory=24GB     which of these fits
  python -m pipeline plan engine=vllm model=llama gpus=4 memory=24GB    vLLM, on GPUs that share each layer

Needs no weights, no GPU and no network: it answers from the facts in conf/model/, or from a config.json
that is at hand; the hub is asked for that file alone. An architecture without a formula is counted once, in a
process of its own, from its config and without its code.

  model=a,b quant=c,d   every combination; model=all and quant=all take all that there are
  model.name=A,B        likewise, names on the hub and folders
  memory=24GB           plan for a GPU of that size instead of this machine
  gpus=4                with engine=vllm: so many of them; engine.pipeline_parallel=2 makes two groups of them
  json=FILE             write the figures, in bytes; json=- prints them instead of the tables

All other arguments are a job's: prompts=, limit=, generation.max_new_tokens=, engine.max_rows= …
"""


@dataclass(frozen=True, slots=True)
class Arguments:
    """Hold the command line, taken apart."""

    models: list[tuple[str, ...]]  # arguments that choose one; () is the config's own choice
    quants: list[str | None]
    memory: str | None
    gpus: int | None  # of a size each, that share the model
    json_file: str | None
    overrides: list[str]  # for Hydra


def parse(arguments: list[str]) -> Arguments:
    """Take out what is this command's own; the rest is Hydra's.

    Raises:
        ConfigError: a key of ours without a value.
    """
    given, others = take_own(arguments, EXAMPLES, job_keys())
    own = {key: values[-1] for key, values in given.items()}
    named = own["model.name"].split(",") if "model.name" in own else [None]
    models = [
        tuple(
            f"{key}={value}" for key, value in (("model", choice), ("model.name", name)) if value is not None
        )
        for choice in _choices("model", own.get("model"), options("model"))
        for name in named
    ]
    quants = _choices("quant", own.get("quant"), list(QUANTS))
    overrides = [other for other in others if other not in ("-m", "--multirun")]
    gpus = whole_number(own["gpus"], "gpus", EXAMPLES["gpus"], 1) if "gpus" in own else None
    return Arguments(models, quants, own.get("memory"), gpus, own.get("json"), overrides)


def _choices(group: str, value: str | None, known: list[str]) -> list[str | None]:
    if value is None:
        return [None]
    if value == "all":
        return [*known, *(name for name in options(group) if name not in known)]
    return list(value.split(","))


def plans(arguments: Arguments) -> list[Plan]:
    """Plan each model with each quantization.

    Raises:
        ConfigError: the config is wrong, or a model is neither known nor at hand.
        PromptError: the prompt file cannot be read.
    """
    # A composition costs 0.1 s, and a model does not depend on the quantization: one of each at a time.
    pairs = zip_longest(arguments.models, arguments.quants)
    configs = [_config(arguments, model or arguments.models[0], quant) for model, quant in pairs]
    models = dict(zip(arguments.models, configs, strict=False))
    device = _device(arguments, next(iter(models.values())))
    quants = dict(zip(arguments.quants, (config.quant for config in configs), strict=False))
    with kept(configs[0].prompts) as prompts:

        def workload(config: Config, name: str | None) -> Workload:
            return _workload(replace(config, prompts=prompts), name, device, arguments)

        workloads = [workload(config, _short(chosen)) for chosen, config in models.items()]

        @cache
        def others() -> list[Workload]:
            known = {each.model: each for each in workloads}
            return [
                known.get(name) or workload(_config(arguments, (f"model={name}",), None), name)
                for name in options("model")
            ]

        return [
            make_plan(each, name or quant_name(quant), quant, choice)
            for each in workloads
            for choice in [best_choice(each, SUGGESTED, others)]
            for name, quant in quants.items()
        ]


def rank_plans(arguments: Arguments) -> list[RankPlan]:
    """Plan each model with each quantization for vLLM.

    Raises:
        ConfigError: as `plans`, or the GPUs cannot be parted so.
    """
    pairs = [(model, quant) for model in arguments.models for quant in arguments.quants]
    configs = [_config(arguments, *pair) for pair in pairs]
    device, made = _device(arguments, configs[0]), []
    each = replace(device, free_bytes=device.free_bytes // max(1, len(device.gpus)), gpus=device.gpus[:1])
    with kept(configs[0].prompts) as prompts:
        for (model, quant), config in zip(pairs, configs, strict=True):
            engine = shared(config.engine, arguments.gpus)
            work = _workload(replace(config, prompts=prompts), _short(model), each, arguments)
            work, settled, stored = work.loaded(config.quant)
            named = stored or quant or quant_name(config.quant), settled
            made.append(plan_ranks(work.model, work.facts.architecture, named, work.lengths, engine, each))
    return made


def _config(arguments: Arguments, model: tuple[str, ...], quant: str | None) -> Config:
    chosen = [*model, *([] if quant is None else [f"quant={quant}"])]
    return expect_generation(read_config([*arguments.overrides, *chosen]))


def _short(model: tuple[str, ...]) -> str | None:
    """Call a model as `model=` does; None where its own name has to do."""
    return model[0].removeprefix("model=") if len(model) == 1 and model[0].startswith("model=") else None


def _device(arguments: Arguments, config: Config) -> Device:
    if arguments.memory is not None:
        return given_device(arguments.memory)
    return find_device(config.model.offload_dir)


def _workload(config: Config, name: str | None, device: Device, arguments: Arguments) -> Workload:
    facts = find_facts(config.model, config.models_dir)
    settings = Settings(
        memory_fraction=config.engine.memory_fraction,
        prefill_tokens=config.engine.prefill_tokens,
        max_rows=config.engine.max_rows,
        max_tokens_in_flight=config.engine.max_tokens_in_flight,
        pack_weights=config.engine.pack_weights,
    )
    lengths = expected_lengths(
        config,
        facts.architecture.max_position_embeddings,
        given=any(override.startswith("prompts=") for override in arguments.overrides),
    )
    return Workload(name or Path(config.model.name).name, facts, lengths, device, settings)


def main(arguments: list[str]) -> ExitStatus:
    """Plan, write the figures that json= asks for, and show them.

    Raises:
        ConfigError, PromptError: as `plans`.
    """
    parsed = parse(arguments)
    engine = shared(_config(parsed, parsed.models[0], parsed.quants[0]).engine, parsed.gpus)
    made: Sequence[Plan | RankPlan] = rank_plans(parsed) if engine.name is EngineName.vllm else plans(parsed)
    if parsed.json_file is not None:
        write_json({"plans": [asdict(plan) for plan in made]}, parsed.json_file)
    if parsed.json_file != "-":
        from pipeline.commands.plan_tables import print_plans, print_ranks

        ranks = [plan for plan in made if isinstance(plan, RankPlan)]
        if ranks:
            print_ranks(ranks)
        else:
            print_plans([plan for plan in made if isinstance(plan, Plan)])
    return ExitStatus.DONE
