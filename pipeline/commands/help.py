"""Answer --help: the whole of it, or one command's."""

import re
import textwrap
from itertools import groupby

from pipeline.commands.table import COMMANDS, module_of
from pipeline.common.exit_status import ExitStatus

WIDTH = 80
LIST = re.compile(r"( *\S.*?   *)(\S.*)")  # what stands to the left, and what is said of it

HEAD = """\
Run a file of prompts through a Hugging Face language model: completions, memory and speed, one folder a job.

  One job:    python -m pipeline model=smollm2 quant=nf4 prompts=jokes.jsonl
  A sweep:    python -m pipeline -m quant=none,int8,nf4 prompts=jokes.jsonl
  Any model:  python -m pipeline model.name=ORG/NAME quant=int8 prompts=my.jsonl
"""

KEYS = """\
Set anything with KEY=VALUE; the keys most used:
  prompts                     a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), a dataset's folder, hf://…, or -
  system                      a system prompt for every row that has none
  limit=10, shard=0/4         only the first rows; every fourth row, from the first
  devices=all                 every GPU: a process each; devices=2 model.device_map=cpu parts the cores
  generation.max_new_tokens   and temperature, top_p, top_k, min_p, repetition_penalty, stop, n, seed, logprobs
  engine.max_rows             rows in flight; else what the memory holds
  model.name                  ORG/NAME on the hub, or a local folder
  stream=true                 show the first row's text as it is made
  resume=never                start anew; retry_errors=true does failed rows again

The same command again goes on where it stopped. Results: outputs/PROMPT_SET/JOB/outputs.jsonl
"""

TAIL = "More: --cfg job (the whole config), --hydra-help (flags), README.md.\n"


def help_of(command: str) -> str:
    """Return what --help prints for a command; for `run` it is the whole of it."""
    if command != "run":
        return fit(f"{COMMANDS[command]}.\n\n{module_of(command).HELP}")
    from pipeline.config.compose import options
    from pipeline.config.sources import GROUPS

    groups = {group: ", ".join(options(group)) for group in GROUPS if options(group)}
    statuses = {str(int(status)): status.meaning for status in ExitStatus}
    commands = _listed(COMMANDS, "Commands; python -m pipeline COMMAND --help says more of each:")
    whole = "\n".join((
        HEAD,
        commands,
        _listed(groups, "Choose with GROUP=NAME:"),
        KEYS,
        _listed(statuses, "Exit status:"),
        TAIL,
    ))  # fmt: skip
    return fit(whole)


def fit(text: str) -> str:
    """Fold a text into 80 columns: paragraphs, and what a list says on the right; a command stays whole."""
    lines: list[str] = []
    for prose, group in groupby(text.splitlines(), lambda line: bool(re.match(r"\S(?!.*\S   *\S)", line))):
        found = list(group)
        lines += (
            textwrap.wrap(" ".join(found), WIDTH)
            if prose
            else [part for line in found for part in _fold(line)]
        )
    return "\n".join(lines) + "\n"


def _fold(line: str) -> list[str]:
    """Fold a line of a list below its right column."""
    if len(line) <= WIDTH or not (parts := LIST.fullmatch(line)):
        return [line]
    left, right = parts.groups()
    if len(left) > WIDTH - 20:  # too narrow a column: below, a little to the right
        return [
            left.rstrip(),
            *textwrap.wrap(right, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    first, *others = textwrap.wrap(right, WIDTH - len(left), break_long_words=False, break_on_hyphens=False)
    return [left + first, *(" " * len(left) + other for other in others)]


def _listed(words: dict[str, str], title: str) -> str:
    width = max(map(len, words))
    return "\n".join([title, *(f"  {word:{width}}  {meaning}" for word, meaning in words.items()), ""])
