"""Will a job run here? python -m pipeline doctor model=smollm2 quant=nf4

Checks versions, devices, bitsandbytes (it runs a 4-bit product on each device), the hub and the way to the
model, the tokenizer and its chat template, memory, disk, Slurm. It loads no weights and never shows a token.
json=FILE writes the findings; json=- prints them instead of the table. All other arguments are a job's.

Exit status: 0 a job can run (yellow lines are worth reading), 1 something is red, 2 bad configuration.
"""

import os
import sys
from typing import Any

from pipeline.common.errors import PipelineError
from pipeline.common.terminal import say, visible
from pipeline.config.compose import read_config, take_own
from pipeline.config.schema import Config

COLOURS = {"green": "bold green", "yellow": "bold yellow", "red": "bold red"}


def diagnose(config: Config) -> list[Any]:
    """Every check, in the order of the screen: a list of `health.Check`."""
    from pipeline.models.loading import quiet_transformers
    from pipeline.views import machine as health
    from pipeline.views import model as model_health

    quiet_transformers()
    return [
        *health.check_versions(),
        *health.check_devices(),
        *health.check_kernels(),
        *(check for device in health.devices() for check in health.check_bitsandbytes(device)),
        *model_health.check_login(),
        *model_health.check_access(config.model, config.models_dir),
        *model_health.check_tokenizer(config),
        *model_health.check_room(config),
        *health.check_slurm(),
    ]


def show(checks: list[Any]) -> None:
    """One line a check; the word in front says what the colour says."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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
    console = Console(highlight=False)
    console.print(table)
    verdict = "Something is broken: see the red lines." if counts["red"] else "A job can run here."
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(Text(f"\n{verdict} {words}.", style="bold"))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        print(__doc__)
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        own, overrides = take_own(given, {"json": "doctor.json"})
        checks = diagnose(read_config(overrides))
        if "json" in own:
            from pipeline.commands.inspect import write_json

            write_json({"checks": [as_data(check) for check in checks]}, own["json"][-1])
    except PipelineError as error:
        say(f"Error: {error}", style="red")
        return error.exit_status
    if own.get("json", [""])[-1] != "-":
        show(checks)
    return int(any(check.state.name == "red" for check in checks))


def as_data(check: Any) -> dict[str, str]:
    return {"name": check.name, "state": check.state.name, "found": check.found, "next_step": check.next_step}


if __name__ == "__main__":
    sys.exit(main())
