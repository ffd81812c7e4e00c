"""Show memory plans as tables. MB is 10⁶ bytes, GB is 10⁹."""

from rich.console import Console
from rich.table import Table

from pipeline.common.terminal import answer
from pipeline.memory.fit import FITS, MOST_ROWS, OFFLOAD, Plan

_BITS = {"int8": 8, "nf4": 4, "fp4": 4}
_COLOURS = {FITS: "green", OFFLOAD: "yellow"}


def print_plans(plans: list[Plan], console: Console | None = None) -> None:
    """Show one plan in full, several as a line each."""
    out = console or answer
    if len(plans) == 1:
        _print_whole(plans[0], out)
    else:
        _print_lines(plans, out)


def _print_whole(plan: Plan, out: Console) -> None:
    out.print(
        f"[bold]{plan.name}[/bold], quant={plan.quant}: {plan.parameters:,} parameters", highlight=False
    )
    _print_facts(plan, out)
    out.print(_parts_table(plan))
    if plan.reasons:
        out.print(_reasons_table(plan))
    kinds = ", ".join(f"{size:,} bytes ({kind})" for kind, size in plan.kv_bytes_per_token.items())
    out.print(f"KV cache, each token: {kinds}", highlight=False)
    out.print(_needs_table(plan))
    _print_load_peak(plan, out)
    _print_prompts(plan, out)
    _print_verdict(plan, out)


def _print_facts(plan: Plan, out: Console) -> None:
    out.print(f"Shape from {plan.facts_source}", highlight=False)
    for difference in plan.facts_differences:
        out.print(f"  [yellow]differs[/yellow] {difference}; the config.json is used", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _parts_table(plan: Plan) -> Table:
    table = _table("Weights", "part", "stored as", "count", "MB")
    for part in plan.parts:
        table.add_row(part.part, part.dtype, f"{part.parameters:,}", _exact_mb(part.bytes))
    table.add_section()
    table.add_row("footprint", "", "", _exact_mb(plan.footprint_bytes))
    if plan.quant_state_bytes:
        table.add_row("quantization state, beside it", "", "", _exact_mb(plan.quant_state_bytes))
    return table


def _reasons_table(plan: Plan) -> Table:
    bits = next(bits for reason in plan.reasons if (bits := _BITS.get(reason.dtype)))
    table = _table(
        f"Why {_mb(plan.footprint_bytes)} MB and not {_mb(plan.simple_bytes)} MB (parameters × {bits} ÷ 8)",
        "what",
        "parameters",
        "stored as",
        "MB",
        f"at {bits} bits",
    )
    for reason in plan.reasons:
        simple = reason.parameters * bits // 8
        table.add_row(
            reason.what, f"{reason.parameters:,}", reason.dtype, _exact_mb(reason.bytes), _exact_mb(simple)
        )
    table.add_section()
    table.add_row(
        "footprint", f"{plan.parameters:,}", "", _exact_mb(plan.footprint_bytes), _exact_mb(plan.simple_bytes)
    )
    table.caption = "Only linear layers are quantized: the embedding is looked up and the head is kept exact."
    table.caption_justify = "left"
    return table


def _needs_table(plan: Plan) -> Table:
    table = _table(
        "Run peak, MB", "", *(f"{need.rows:,} rows" if need.rows > 1 else "1 row" for need in plan.needs)
    )
    names = {
        "footprint": "weights",
        "quant_state": "quantization state",
        "packed": "packed copy of the tied head",
        "kv_cache": "KV cache",
        "activations": "prefill activations",
        "logits": "logits",
        "scratch": "workspace, dequantized matrix" if plan.device.gpus else "dequantized matrix",
        "context": "CUDA context" if plan.device.gpus else "libraries",
    }
    for field, name in names.items():
        sizes = [getattr(need.peak, field) for need in plan.needs]
        if any(sizes):
            estimate = "" if field in ("footprint", "quant_state", "packed", "kv_cache") else " (estimate)"
            table.add_row(name + estimate, *map(_mb, sizes))
    table.add_section()
    table.add_row("total", *(_mb(need.total_bytes) for need in plan.needs))
    return table


def _print_load_peak(plan: Plan, out: Console) -> None:
    mapped = plan.load_peak.mapped
    text = f", and up to {_mb(mapped)} MB of mapped files that the system can take back" if mapped else ""
    out.print(f"Load peak: {_mb(plan.load_peak.needed)} MB{text} (estimate)", highlight=False)


def _print_prompts(plan: Plan, out: Console) -> None:
    prompts = plan.prompts
    out.print(
        f"Prompts: {prompts.completions:,} completions; {prompts.mean_prompt_tokens:,.0f} prompt tokens on "
        f"average, {prompts.longest_prompt_tokens:,} at most; {prompts.longest_total_tokens:,} with the "
        f"completion ({prompts.counted_by})",
        highlight=False,
    )
    for count, what in (
        (prompts.bad_rows, "cannot be run"),
        (prompts.too_long_rows, "are longer than the context"),
    ):
        if count:
            out.print(f"  [yellow]{count:,} rows {what}[/yellow]", highlight=False)


def _print_verdict(plan: Plan, out: Console) -> None:
    verdict, device = plan.verdict, plan.device
    colour = _COLOURS.get(verdict.status, "red")
    room = f", with room for {_rows(plan)} rows at once"
    if verdict.all_rows and plan.prompts.rows:
        room = f", all of the prompt file at once{room}"
    rows = room if verdict.status == FITS else ""
    out.print(
        f"[bold {colour}]{verdict.status}[/bold {colour}] on {device.name}{rows} "
        f"({_mb(device.free_bytes)} MB free, of which {_mb(verdict.budget_bytes)} MB may be used)",
        highlight=False,
    )
    if plan.best is None:
        out.print("Nothing that conf/ names would fit.")
    elif (plan.best.model, plan.best.quant) != (plan.model, plan.quant):
        out.print(
            f"Best choice that fits: {_best(plan)}, {_mb(plan.best.total_bytes)} MB with one row, "
            f"room for {plan.best.rows:,}",
            highlight=False,
        )


def _best(plan: Plan) -> str:
    if plan.best is None:
        return "nothing that conf/ names"
    model = "" if plan.best.model == plan.model else f"model={plan.best.model} "
    return f"{model}quant={plan.best.quant}"


def _print_lines(plans: list[Plan], out: Console) -> None:
    device = plans[0].device
    table = _table(
        f"Memory in MB, on {device.name} with {_mb(device.free_bytes)} MB free",
        *("model", "quant", "parameters", "by hand", "footprint", "state", "KV a token", "load peak"),
        *("1 row", "32 rows", "rows", "verdict"),
    )
    previous = plans[0].model
    for plan in plans:
        if plan.model != previous:
            table.add_section()
            previous = plan.model
        at_32 = next((need for need in plan.needs if need.rows == 32), None)
        colour = _COLOURS.get(plan.verdict.status, "red")
        table.add_row(
            plan.model,
            plan.quant,
            f"{plan.parameters / 1e6:,.0f} M",
            _mb(plan.simple_bytes),
            _mb(plan.footprint_bytes),
            _mb(plan.quant_state_bytes),
            f"{sum(plan.kv_bytes_per_token.values()) / 1e3:,.1f} kB",
            _mb(plan.load_peak.needed),
            _mb(plan.needs[0].total_bytes),
            _mb(at_32.total_bytes) if at_32 else "",
            _rows(plan),
            f"[{colour}]{plan.verdict.status}[/{colour}]",
        )
    table.caption = "by hand: parameters × bits ÷ 8. rows: how many of the longest prompts fit at once."
    table.caption_justify = "left"
    out.print(table)
    for plan in {plan.model: plan for plan in plans}.values():
        if plan.facts_differences:
            _print_facts(plan, out)
        out.print(f"Best choice that fits, for {plan.model}: {_best(plan)}", highlight=False)
    _print_prompts(plans[0], out)


def _rows(plan: Plan) -> str:
    rows = plan.verdict.rows
    return f"{rows:,} or more" if rows == MOST_ROWS else f"{rows:,}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _exact_mb(size: int) -> str:
    """Show MB, to the byte where it is less than a hundredth of one."""
    return f"{size / 1e6:,.1f}" if size >= 50_000 or size == 0 else f"{size / 1e6:,.6f}"
