"""Show a model and its text from within."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pipeline.commands.arguments import take_own, whole_number, write_json
from pipeline.commands.inspect_rows import MESSAGES, Options
from pipeline.commands.inspect_views import VIEWS
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.terminal import answer
from pipeline.config.compose import job_keys, read_config
from pipeline.models.own_settings import settle_generation

EXAMPLES = {
    "view": "tokens",
    "text": '"Tell a joke."',
    "row": "3",
    "messages": MESSAGES,
    "chat": "true",
    "depth": "2",
    "filter": "q_proj",
    "k": "10",
    "layer": "-1",
    "head": "0",
    "json": "view.json",
    "png": "attention.png",
}
HELP = """\
  python -m pipeline inspect view=tokens model=smollm2 text="안녕하세요! LLM을 학습 중입니다."
  python -m pipeline inspect view=chat model=smollm2 prompts=jokes.jsonl row=3

Views:
  tokens        the text's ids, the bytes behind each token, and whether the text comes back unchanged
  chat          what the model is sent: the chat template's text, told apart by who wrote it
  batch         several prompts as one padded rectangle, padded left and right
  architecture  the module tree with shapes and bytes as it will be loaded; needs no weights
  step          one forward pass: layer by layer, the next token's probabilities, attention

What to look at (tokens, chat, batch, step):
  text=TEXT            several of them for view=batch
  prompts=FILE row=3   a row of a prompt file, counted from 0; view=batch takes it and the next, limit=4 of them
  messages=JSON        a conversation: '[{"role": "user", "content": "Hi"}]'
  chat=true            view=step: put the text through the chat template

How:
  depth=2 filter=q_proj    view=architecture: how deep; only modules whose name or class matches
  k=10 layer=-1 head=0     view=step: how many candidates; whose attention to show
  png=FILE                 view=step: the attention as a picture
  json=FILE                write the view as data; json=- prints it instead of the screen

All other arguments are a job's: model=, quant=, generation=, system=, model.name=ORG/NAME …
"""


def main(arguments: list[str]) -> ExitStatus:
    """Make the view, and show or write it.

    Raises:
        ConfigError: the command line is wrong.
        JobError: the model or the prompt cannot be read.
    """
    options, overrides = parse(arguments)
    view = VIEWS[options.view](settle_generation(read_config(overrides)), options)
    if options.png_file is not None:
        from pipeline.views.draw_model import write_png

        write_png(view.attention, view.token_texts, options.png_file)
    if options.json_file is not None:
        write_json(asdict(view), options.json_file)
    if options.json_file != "-":
        _show(view, options.view)
    return ExitStatus.DONE


def _show(view: Any, name: str) -> None:
    from pipeline.views import draw_model, draw_text

    draw: dict[str, Callable[[Any, Any], None]] = {
        "tokens": draw_text.draw_tokens,
        "chat": draw_text.draw_chat,
        "batch": draw_text.draw_batch,
        "architecture": draw_model.draw_architecture,
        "step": draw_model.draw_step,
    }
    draw[name](view, answer)


def parse(arguments: list[str]) -> tuple[Options, list[str]]:
    """Take this command's options and the overrides for the job's config apart.

    Raises:
        ConfigError: no such view, or a value of a wrong kind.
    """
    own, overrides = take_own(arguments, EXAMPLES, job_keys())

    def last(key: str) -> str | None:
        return own[key][-1] if key in own else None

    view = last("view")
    if view not in VIEWS:
        raise ConfigError(f"view={view or ''}: no such view", f"Choose one of {', '.join(VIEWS)}.")
    layer = _number(last("layer"), "layer")
    if last("png") and (view != "step" or layer is None):
        raise ConfigError("png=: draws an attention head", "Add view=step layer=-1 head=0.")
    if (chat := last("chat")) not in (None, "true", "false"):
        raise ConfigError(f"chat={chat}: neither true nor false", "Choose one of them.")
    options = Options(
        view=view,
        texts=own.get("text", []),
        row=_number(last("row"), "row", 0) or 0,
        messages=last("messages"),
        chat=chat == "true",
        depth=_number(last("depth"), "depth", 0),
        filter=last("filter"),
        k=_number(last("k"), "k", 1) or 10,
        layer=layer,
        head=_number(last("head"), "head") or 0,
        json_file=last("json"),
        png_file=last("png"),
    )
    return options, overrides


def _number(value: str | None, key: str, least: int | None = None) -> int | None:
    return None if value is None else whole_number(value, key, EXAMPLES[key], least)
