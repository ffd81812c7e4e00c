"""Draw the views on the model: the module tree, and one step with its attention."""

from collections.abc import Container, Sequence
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pipeline.common.errors import ConfigError
from pipeline.common.terminal import how_many
from pipeline.common.units import small_bytes
from pipeline.views.architecture import ArchitectureView, Node
from pipeline.views.draw_text import facts, shown
from pipeline.views.step import AttentionHead, StepView

_SHADES = " ░▒▓█"
_LABEL = 10
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def draw_architecture(view: ArchitectureView, console: Console) -> None:
    """Draw one line a module: name, class, shape, parameters, dtype, bytes."""
    state = f"{small_bytes(view.quant_state_bytes)} beside it" if view.quant_state_bytes else "none"
    facts(
        console,
        [
            ("model", f"{view.model}, quant={view.quant}"),
            ("config", view.source),
            ("parameters", f"{view.parameters:,}"),
            ("total", f"{small_bytes(view.bytes)} as loaded (get_memory_footprint)"),
            *([("quantized", view.quantized.words)] if view.quantized else []),
            ("quantization state", state),
            ("attention", _window_words(view.windows)),
        ],
    )
    tree = Tree(_label(view.tree))
    _grow(tree, view.tree)
    console.print(tree)
    if _has_folds(view.tree):
        console.print(Text("The line N × counts all N; the lines inside it are one of them.", style="dim"))


def draw_step(view: StepView, console: Console) -> None:
    """Draw the way up through the layers, then the candidates for the next token."""
    console.print(Text(" → ".join(_stations(view)), style="bold"))
    places = _table("place", "|x|", "p", "top token by the logit lens")
    for place in view.places:
        places.add_row(
            place.name, f"{place.norm:,.1f}", f"{place.top_probability:.3f}", Text(shown(place.top_text))
        )
    console.print(places)
    console.print()
    following = _table("next id", "logit", "p", "p sampled", "token")
    for token in view.next:
        following.add_row(
            str(token.token_id),
            f"{token.logit:.2f}",
            f"{token.probability:.4f}",
            f"{token.sampled_probability:.4f}",
            Text(shown(token.text)),
        )
    console.print(following)
    console.print(
        Text(
            f"p is softmax(logits), entropy {view.entropy_bits:.2f} bits; "
            f"p sampled is after temperature, top_k, top_p and min_p, "
            f"which keep {view.kept:,} of {view.shape['vocabulary']:,}."
        )
    )
    if view.attention is None:
        console.print(
            Text("layer=-1 head=0 shows an attention head; png=FILE writes it as a picture.", style="dim")
        )
    else:
        _draw_attention(view.attention, view.token_texts, console)


def write_png(attention: AttentionHead, texts: Sequence[str], path: str) -> None:
    """Write the attention of one head as a picture.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib import font_manager
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"png={path}: needs matplotlib", "Install it: pip install 'llm-job-pipeline[report]'"
        ) from error
    size = max(4.0, 0.3 * len(texts) + 1.5)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        title=f"layer {attention.layer}, head {attention.head}", xlabel="attends to", ylabel="token"
    )
    axes.imshow(attention.weights, cmap="magma", vmin=0, vmax=1)
    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    labels = [_in_font(shown(text), glyphs) for text in texts]
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    try:
        figure.savefig(Path(path).expanduser(), format="png", dpi=120)
    except OSError as error:
        raise ConfigError(
            f"png={path}: cannot be written ({error.strerror or error})", "Choose another file"
        ) from error


def _in_font(text: str, glyphs: Container[int]) -> str:
    """Spell characters that the font lacks, as Korean in matplotlib's own, by their code."""
    made = "".join(c if ord(c) in glyphs else f"\\u{ord(c):04x}" for c in text)
    return made.replace("$", "\\$")


def _grow(tree: Tree, node: Node) -> None:
    for child in node.children:
        _grow(tree.add(_label(child)), child)


def _label(node: Node) -> Text:
    line = Text()
    line.append(f"{node.count} × " if node.count > 1 else "", "bold magenta")
    line.append(f"{shown(node.name)} " if node.name and node.count == 1 else "", "bold")
    line.append(node.kind)
    line.append(f"({node.shape})" if node.shape else "")
    line.append(f" {node.name}" if node.count > 1 else "")
    if node.parameters or node.bytes:
        dtypes = " + ".join(_SHORT.get(dtype, dtype) for dtype in node.dtype.split(" + "))
        line.append(f"  {_millions(node.parameters)}  {dtypes}  ", "dim")
        line.append(small_bytes(node.bytes))
    if node.note:
        line.append(f"  is {node.note}", "dim")
    return line


def _millions(count: int) -> str:
    """Show 58.7M weights; the exact number is in the JSON."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:,.1f}{letter}"
    return str(count)


def _has_folds(node: Node) -> bool:
    return node.count > 1 or any(_has_folds(child) for child in node.children)


def _window_words(windows: list[int | None]) -> str:
    if not windows:
        return "unknown to the memory plan"
    kinds = {window: windows.count(window) for window in dict.fromkeys(windows)}
    return ", ".join(
        f"{n} layers see {f'{window} tokens' if window else 'all tokens'}" for window, n in kinds.items()
    )


def _stations(view: StepView) -> list[str]:
    shape = view.shape
    return [
        f"{shape['tokens']} ids",
        f"embedding [{shape['tokens']}, {shape['hidden_size']}]",
        f"{how_many(shape['layers'], 'layer')} × {how_many(shape['heads'], 'head')}",
        "final norm",
        f"head [{shape['vocabulary']}]",
    ]


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        words = column == columns[-1] or (i == 0 and column == "place")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _draw_attention(attention: AttentionHead, texts: Sequence[str], console: Console) -> None:
    """Draw two columns of the screen a cell; the last tokens, if not all have room."""
    room = max(4, (console.width - _LABEL - 8) // 2)
    first = max(0, len(texts) - room)
    note = f", the last {room} tokens" if first else ""
    console.print(Text(f"\nAttention of layer {attention.layer}, head {attention.head}{note}", style="bold"))
    for row in range(first, len(texts)):
        line = Text.assemble((f"{row:>5} ", "dim"), _fixed(shown(texts[row])), " ")
        line.append("".join(2 * _shade(w) for w in attention.weights[row][first : row + 1]))
        console.print(line, no_wrap=True, crop=True)
    console.print(
        Text(
            "A row is a token; across, what it attends to, from the first. ░ 10 % ▒ 30 % ▓ 50 % █ 70 %",
            style="dim",
        )
    )


def _shade(weight: float) -> str:
    return _SHADES[sum(weight >= limit for limit in (0.1, 0.3, 0.5, 0.7))]


def _fixed(text: str) -> str:
    return set_cell_size(text, _LABEL) if cell_len(text) <= _LABEL else set_cell_size(text, _LABEL - 1) + "…"
