"""What `python -m pipeline --help` prints."""

from pipeline.config.compose import GROUPS, options

HEAD = """\
Run a file of prompts through a Hugging Face language model: completions, memory and speed, one folder a job.

  One job:    python -m pipeline model=smollm2 quant=nf4 prompts=jokes.jsonl
  A sweep:    python -m pipeline -m model=smollm2,qwen quant=none,nf4 prompts=jokes.jsonl
  Any model:  python -m pipeline model.name=ORG/NAME quant=int8 prompts=my.jsonl generation.max_new_tokens=64

Choose with GROUP=NAME:
"""

TAIL = """
Set anything with KEY=VALUE; the keys most used:
  prompts                     a path, a name in jobs/, or - for standard input (.jsonl, .jsonl.gz)
  system                      a system prompt for every row that has none
  limit=10   shard=0/4        only the first rows; every fourth row, from the first
  generation.max_new_tokens   and temperature, top_p, top_k, min_p, repetition_penalty, stop, n, seed, logprobs
  engine.max_rows             rows in flight; else what the memory holds
  model.name                  ORG/NAME on the hub, or a local folder
  stream=true                 show the first row's text as it is made
  resume=never                start anew; retry_errors=true does failed rows again

The same command again goes on where it stopped. Results: outputs/PROMPT SET/JOB/outputs.jsonl
Exit status: 0 all rows done, 1 some rows failed, 2 bad configuration, 3 the job failed,
  4 no progress (watchdog_sec), 75 stopped: run it again.
More: --cfg job (the whole config), --hydra-help (flags), README.md.
"""


def show_help() -> None:
    """Print it, with the groups as they are in conf/ and jobs/."""
    width = max(map(len, GROUPS)) + 1
    groups = [f"  {group:{width}} {', '.join(options(group))}" for group in GROUPS if options(group)]
    print(HEAD, *groups, TAIL, sep="\n", end="")
