"""Show memory plans as tables. MB is 10⁶ bytes, GB is 10⁹."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.common.terminal import answer, how_many
from pipeline.common.units import gigabytes, in_gigabytes, in_megabytes, megabytes
from pipeline.config.quant import STORED_BITS
from pipeline.memory.fit import FITS, MOST_ROWS, OFFLOAD, TOO_LARGE, Plan
from pipeline.memory.ranks import RankPlan

_COLOURS = {FITS: "green", OFFLOAD: "yellow"}


def print_plans(plans: list[Plan], console: Console | None = None) -> None:
    """Show one plan in full, or several as a line each."""
    out = console or answer
    if len(plans) == 1:
        _print_whole(plans[0], out)
    else:
        _print_lines(plans, out)


def print_ranks(plans: list[RankPlan], console: Console | None = None) -> None:
    """Show what each of vLLM's ranks would hold, a line a plan."""
    out = console or answer
    columns = ("GPUs", "weights", "work", "keys, values", "tokens", "rows", "")
    table = _table(f"engine=vllm, each rank on {plans[0].device}", "model, quant", *columns)
    for plan in plans:
        gpus = f"{plan.tensor_parallel} × {plan.pipeline_parallel}"
        sizes = map(gigabytes, (plan.weight_bytes, plan.work_bytes, max(0, plan.kv_cache_bytes)))
        verdict = f"[green]{FITS}[/green]" if plan.fits else f"[red]{TOO_LARGE}[/red]"
        name = f"{plan.model}, {plan.quant}"
        table.add_row(name, gpus, *sizes, f"{plan.tokens:,}", str(plan.rows), verdict)
    out.print(table)
    for plan in plans:
        if plan.refused:
            out.print(f"{plan.model}: [red]vLLM refuses it[/red]: {escape(plan.refused)}", highlight=False)
    out.print(
        f"GPUs: tensor × pipeline parallel. The longest row has {plans[0].longest_row_tokens:,} tokens. "
        "vLLM measures its own work at its start; that of a pass is an estimate here.",
        highlight=False,
    )


def _print_whole(plan: Plan, out: Console) -> None:
    share = "" if plan.quantized_share is None else f", {100 * plan.quantized_share:.0f} % of them quantized"
    out.print(
        f"[bold]{plan.name}[/bold], quant={plan.quant}: {plan.parameters:,} parameters{share}",
        highlight=False,
    )
    _print_facts(plan, out)
    out.print(_parts_table(plan))
    if plan.reasons:
        out.print(_reasons_table(plan))
    kinds = ", ".join(f"{size:,} bytes ({kind})" for kind, size in plan.kv_bytes_per_token.items())
    out.print(f"KV cache, each token: {kinds}", highlight=False)
    if plan.row_state_bytes:
        out.print(f"States of recurrent layers, each row: {plan.row_state_bytes:,} bytes", highlight=False)
    out.print(_needs_table(plan))
    _print_load_peak(plan, out)
    _print_prompts(plan, out)
    _print_verdict(plan, out)


def _print_facts(plan: Plan, out: Console) -> None:
    out.print(f"Shape from {plan.facts_source}", highlight=False)
    for difference in plan.facts_differences:
        out.print(f"  [yellow]differs[/yellow] {difference}; the config.json is used", highlight=False)
    if plan.estimated:
        out.print(f"  [yellow]estimated[/yellow] {escape(plan.estimated)}", highlight=False)
    if plan.refused:
        out.print(f"  [red]A job would be refused[/red]: {escape(plan.refused)}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _parts_table(plan: Plan) -> Table:
    table = _table("Weights", "part", "stored as", "count", "MB")
    for part in plan.parts:
        table.add_row(part.part, part.dtype, f"{part.parameters:,}", in_megabytes(part.bytes, exact=True))
    table.add_section()
    table.add_row("footprint", "", "", in_megabytes(plan.footprint_bytes, exact=True))
    if plan.quant_state_bytes:
        table.add_row(
            "quantization state, beside it", "", "", in_megabytes(plan.quant_state_bytes, exact=True)
        )
    return table


def _reasons_table(plan: Plan) -> Table:
    bits = min(STORED_BITS.get(reason.dtype, 64) for reason in plan.reasons)  # the linear layers'
    table = _table(
        f"Why {megabytes(plan.footprint_bytes)} and not {megabytes(plan.simple_bytes)} (parameters × {bits} ÷ 8)",
        "what",
        "parameters",
        "stored as",
        "MB",
        f"at {bits} bits",
    )
    for reason in plan.reasons:
        simple = reason.parameters * bits // 8
        table.add_row(
            reason.what,
            f"{reason.parameters:,}",
            reason.dtype,
            in_megabytes(reason.bytes, exact=True),
            in_megabytes(simple, exact=True),
        )
    table.add_section()
    table.add_row(
        "footprint",
        f"{plan.parameters:,}",
        "",
        in_megabytes(plan.footprint_bytes, exact=True),
        in_megabytes(plan.simple_bytes, exact=True),
    )
    table.caption = "Only linear layers are quantized: the embedding is looked up and the head is kept exact."
    table.caption_justify = "left"
    return table


def _needs_table(plan: Plan) -> Table:
    table = _table("Run peak, MB", "", *(how_many(need.rows, "row") for need in plan.needs))
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
            table.add_row(name + estimate, *map(in_megabytes, sizes))
    table.add_section()
    table.add_row("total", *(in_megabytes(need.total_bytes) for need in plan.needs))
    return table


def _print_load_peak(plan: Plan, out: Console) -> None:
    load = plan.load_peak
    text = (
        f", and {megabytes(load.mapped)} only mapped, which the system can take back" if load.mapped else ""
    )
    out.print(f"Load peak: {megabytes(load.needed)} have to be free (estimate){text}", highlight=False)


def _print_prompts(plan: Plan, out: Console) -> None:
    prompts = plan.prompts
    out.print(
        f"Prompts: {how_many(prompts.completions, 'completion')}; {prompts.mean_prompt_tokens:,.0f} prompt tokens on "
        f"average, {prompts.longest_prompt_tokens:,} at most; {prompts.longest_total_tokens:,} with the "
        f"completion ({prompts.counted_by})",
        highlight=False,
    )
    for count, what in (
        (prompts.bad_rows, "that cannot be run"),
        (prompts.too_long_rows, "longer than the context"),
    ):
        if count:
            out.print(f"  [yellow]{how_many(count, 'row')} {what}[/yellow]", highlight=False)


def _print_verdict(plan: Plan, out: Console) -> None:
    verdict, device = plan.verdict, plan.device
    colour = _COLOURS.get(verdict.status, "red")
    room = f", with room for {_rows(plan)} rows at once"
    if verdict.all_rows and plan.prompts.rows:
        room = f", all of the prompt file at once{room}"
    rows = room if verdict.status == FITS else ""
    out.print(
        f"[bold {colour}]{verdict.status}[/bold {colour}] on {device.name}{rows} "
        f"({megabytes(device.free_bytes)} free, of which {megabytes(verdict.budget_bytes)} may be used)",
        highlight=False,
    )
    if plan.best is None:
        out.print("Nothing that conf/ names would fit.")
    elif (plan.best.model, plan.best.quant) != (plan.model, plan.quant):
        out.print(
            f"Best choice that fits: {_best(plan)}, {megabytes(plan.best.total_bytes)} with one row, "
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
    out.print(f"Memory in GB, on {device.name} with {gigabytes(device.free_bytes)} free", highlight=False)
    models = list(dict.fromkeys(plan.model for plan in plans))
    for model in models:
        own = [plan for plan in plans if plan.model == model]
        out.print(_lines_table(own))
        if own[0].facts_differences or own[0].estimated or any(plan.refused for plan in own):
            _print_facts(own[0], out)
    out.print(_best_table([next(plan for plan in plans if plan.model == model) for model in models]))
    out.print("weights: with what quantization keeps beside them.", highlight=False)
    out.print("at once: how many of the longest prompts fit together.", highlight=False)
    _print_prompts(plans[0], out)


def _best_table(plans: list[Plan]) -> Table:
    """Say of each model what comes nearest to its own answers and fits, in lines of at most 80 columns."""
    table = _table("\nWhich of these fits, and as what", "model", "best choice that fits", "1 row", "at once")
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    for plan in plans:
        best = plan.best
        sizes = (in_gigabytes(best.total_bytes), f"{best.rows:,}") if best else ("", "")
        table.add_row(escape(plan.model), _best(plan), *sizes)
    return table


def _lines_table(plans: list[Plan]) -> Table:
    """Set one model's plans in lines of at most 80 columns."""
    title = f"\n{plans[0].model}: {plans[0].parameters:,} parameters"
    names = ("quant", "weights", "load peak", "1 row", "32 rows", "at once", "verdict")
    table = _table(title, *names)
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    for plan in plans:
        at_32 = next((need for need in plan.needs if need.rows == 32), None)
        colour = _COLOURS.get(plan.verdict.status, "red")
        table.add_row(
            plan.quant,
            in_gigabytes(plan.footprint_bytes + plan.quant_state_bytes),
            in_gigabytes(plan.load_peak.needed),
            in_gigabytes(plan.needs[0].total_bytes),
            in_gigabytes(at_32.total_bytes) if at_32 else "",
            _rows(plan),
            f"[{colour}]{plan.verdict.status}[/{colour}]",
        )
    return table


def _rows(plan: Plan) -> str:
    rows = plan.verdict.rows
    return f"{rows:,}+" if rows == MOST_ROWS else f"{rows:,}"
