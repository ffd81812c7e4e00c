"""Say whether a job will run on this machine, and what is missing."""

from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.commands.arguments import take_own, write_json
from pipeline.common.exit_status import ExitStatus
from pipeline.common.terminal import answer, visible
from pipeline.config.compose import job_keys, read_config
from pipeline.config.schema import Config

COLOURS = {"green": "bold green", "yellow": "bold yellow", "red": "bold red"}
EXAMPLES = {"json": "doctor.json"}
HELP = """\
  python -m pipeline doctor model=smollm2 quant=nf4

Checks versions, devices, bitsandbytes (it runs a 4-bit product on each device), the hub and the way to the
model, the tokenizer and its chat template, memory, disk, Slurm. It loads no weights and never shows a token.

  json=FILE   write the findings; json=- prints them instead of the table

All other arguments are a job's.
Exit status: 0 a job can run (yellow lines are worth reading), 1 something is red.
"""


def main(arguments: list[str]) -> ExitStatus:
    """Check everything, and show or write what was found.

    Raises:
        ConfigError: the configuration is wrong, or the file cannot be written.
    """
    own, overrides = take_own(arguments, EXAMPLES, job_keys())
    file = own["json"][-1] if "json" in own else None
    checks = diagnose(read_config(overrides))
    if file is not None:
        write_json({"checks": [as_data(check) for check in checks]}, file)
    if file != "-":
        show(checks)
    return ExitStatus.SOME_FAILED if any(check.state.name == "red" for check in checks) else ExitStatus.DONE


def diagnose(config: Config) -> list[Any]:
    """Make every check, in the order of the screen: a list of `health.Check`."""
    from pipeline.models.loading import quiet_transformers
    from pipeline.views import machine as health
    from pipeline.views import model as model_health
    from pipeline.views import room
    from pipeline.views.vllm import check_vllm

    quiet_transformers()
    return [
        *health.check_versions(),
        *health.check_devices(),
        *health.check_load(),
        *health.check_kernels(),
        *check_vllm(config),
        *(check for device in health.devices() for check in health.check_bitsandbytes(device)),
        *model_health.check_login(),
        *model_health.check_access(config.model, config.models_dir),
        *model_health.check_tokenizer(config),
        *room.check_room(config),
        *health.check_slurm(),
    ]


def show(checks: list[Any]) -> None:
    """Print one line a check; the word in front says what the colour says."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for check in checks:
        finding = Text(visible(check.found))
        if check.next_step:
            finding.append(f"\n→ {visible(check.next_step)}")
        table.add_row(
            Text(check.state.name, style=COLOURS[check.state.name]), Text(check.name, style="bold"), finding
        )
    counts = {name: sum(check.state.name == name for check in checks) for name in COLOURS}
    answer.print(table)
    verdict = "Something is broken: see the red lines." if counts["red"] else "A job can run here."
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    answer.print(Text(f"\n{verdict} {words}.", style="bold"))


def as_data(check: Any) -> dict[str, str]:
    """Turn a check into what json= writes."""
    return {"name": check.name, "state": check.state.name, "found": check.found, "next_step": check.next_step}
