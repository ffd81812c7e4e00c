"""See inside: python -m pipeline.commands.inspect view=VIEW model=smollm2 text="안녕하세요! LLM을 학습 중입니다."

Views:
  tokens        the text's ids, the bytes behind each token, and whether the text comes back unchanged
  chat          what the model is sent: the chat template's text, told apart by who wrote it
  batch         several prompts as one padded rectangle, padded left and right
  architecture  the module tree with shapes and bytes as it will be loaded; needs no weights
  step          one forward pass: layer by layer, the next token's probabilities, attention

What to look at (tokens, chat, batch, step):
  text=TEXT            several of them for view=batch
  prompts=FILE row=3   a row of a prompt file, counted from 0; view=batch takes it and the next, limit=4 of them
  messages=JSON        a conversation, as '[{"role": "user", "content": "Hello"}]'
  chat=true            view=step: put the text through the chat template

How:
  depth=2 filter=q_proj    view=architecture: how deep; only modules whose name or class matches
  k=10 layer=-1 head=0     view=step: how many candidates; whose attention to show
  png=FILE                 view=step: the attention as a picture
  json=FILE                the view as data; json=- prints it instead of the screen

All other arguments are a job's: model=, quant=, generation=, system=, model.name=ORG/NAME …
Exit status: 0 shown, 2 bad configuration, 3 the model or the prompt cannot be read.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.common.errors import ConfigError, PipelineError, PromptError
from pipeline.common.request import BadRow, PromptRow
from pipeline.common.terminal import say
from pipeline.config.compose import read_config, take_own
from pipeline.config.schema import Config
from pipeline.prompts.reader import open_prompts
from pipeline.prompts.row import BadLine, to_row

EXAMPLES = {
    "view": "tokens",
    "text": '"Tell a joke."',
    "row": "3",
    "messages": '\'[{"role": "user", "content": "Hello"}]\'',
    "chat": "true",
    "depth": "2",
    "filter": "q_proj",
    "k": "10",
    "layer": "-1",
    "head": "0",
    "json": "view.json",
    "png": "attention.png",
}
BATCH_ROWS = 4  # of a prompt file, without limit=
Draw = Callable[[Any, Any], None]


@dataclass(frozen=True, slots=True)
class Options:
    """This command's own arguments; see the module."""

    view: str
    texts: list[str]
    row: int
    messages: str | None
    chat: bool
    depth: int | None
    filter: str | None
    k: int
    layer: int | None
    head: int
    json_file: str | None
    png_file: str | None


def parse(arguments: list[str]) -> tuple[Options, list[str]]:
    """This command's options, and the overrides for the job's config.

    Raises:
        ConfigError: no such view, or a value of a wrong kind.
    """
    own, overrides = take_own(arguments, EXAMPLES)

    def last(key: str) -> str | None:
        return own[key][-1] if key in own else None

    view = last("view")
    if view not in VIEWS:
        raise ConfigError(f"view={view or ''}: choose one of {', '.join(VIEWS)}.")
    layer = _number(last("layer"), "layer")
    if last("png") and (view != "step" or layer is None):
        raise ConfigError("png=: is of an attention head. Add view=step layer=-1 head=0.")
    if (chat := last("chat")) not in (None, "true", "false"):
        raise ConfigError(f"chat={chat}: true or false.")
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
    if value is None:
        return None
    try:
        number = int(value)
    except ValueError:
        raise ConfigError(f"{key}={value}: not a whole number, as {key}={EXAMPLES[key]}.") from None
    if least is not None and number < least:
        raise ConfigError(f"{key}={value}: at least {least}.")
    return number


def rows(config: Config, options: Options) -> list[PromptRow]:
    """What to look at: texts, messages, or rows of the prompt file.

    Raises:
        ConfigError: messages= cannot be read, or there is no such row.
        PromptError: the file cannot be read, or the row cannot be run.
    """
    params = config.generation.params()
    if options.texts:
        return [
            PromptRow(i, f"text {i}", "text=", text, None, None, params, {})
            for i, text in enumerate(options.texts)
        ]
    if options.messages is not None:
        try:
            fields = {"messages": json.loads(options.messages)}
            return [to_row(fields, 0, "messages", "messages=", params, config.prompt_field)]
        except (ValueError, BadLine) as error:
            raise ConfigError(f"messages=: {error} As messages={EXAMPLES['messages']}.") from error
    count = (config.limit or BATCH_ROWS) if options.view == "batch" else 1
    rows = open_prompts(replace(config, limit=None, shard=None))
    chosen = list(islice(rows, options.row, options.row + count))
    if not chosen:
        raise ConfigError(f"row={options.row}: {config.prompts} has fewer rows; they count from 0.")
    good = [row for row in chosen if isinstance(row, PromptRow)]
    if not good:
        raise PromptError(next(row.error for row in chosen if isinstance(row, BadRow)))
    return good


def _tokens(config: Config, options: Options) -> tuple[Any, Draw]:
    from pipeline.models.loading import load_tokenizer
    from pipeline.views.draw_text import draw_tokens
    from pipeline.views.tokens import tokens_view

    row = rows(config, options)[0]
    text = row.prompt if row.prompt is not None else "\n".join(m["content"] for m in row.messages or [])
    return tokens_view(load_tokenizer(config.model, config.models_dir), text), draw_tokens


def _chat(config: Config, options: Options) -> tuple[Any, Draw]:
    from pipeline.models.loading import load_tokenizer
    from pipeline.views.chat import chat_view
    from pipeline.views.draw_text import draw_chat

    row = rows(config, options)[0]
    return chat_view(row, _prepare(load_tokenizer(config.model, config.models_dir), config)), draw_chat


def _batch(config: Config, options: Options) -> tuple[Any, Draw]:
    from pipeline.models.loading import load_tokenizer
    from pipeline.prompts.chat import pad_token_id, render
    from pipeline.views.batch import batch_view
    from pipeline.views.draw_text import draw_batch

    chosen = rows(config, options)
    tokenizer = load_tokenizer(config.model, config.models_dir)
    chat = _prepare(tokenizer, config)
    token_ids = [render(row, chat) for row in chosen]
    return batch_view(token_ids, pad_token_id(tokenizer), [row.id for row in chosen]), draw_batch


def _architecture(config: Config, options: Options) -> tuple[Any, Draw]:
    from pipeline.views.architecture import architecture_view, matching, pruned
    from pipeline.views.draw_model import draw_architecture

    view = architecture_view(config.model, config.quant, config.models_dir)
    tree = view.tree if options.filter is None else matching(view.tree, options.filter)
    if tree is None:
        raise ConfigError(
            f"filter={options.filter}: no module's name or class matches. Leave filter= out to see all."
        )
    return replace(
        view, tree=tree if options.depth is None else pruned(tree, options.depth)
    ), draw_architecture


def _step(config: Config, options: Options) -> tuple[Any, Draw]:
    from pipeline.models.loading import load_model
    from pipeline.views.draw_model import draw_step, write_png
    from pipeline.views.step import step_view

    row = rows(config, options)[0]
    loaded = load_model(config.model, config.quant, config.models_dir)
    token_ids = _step_ids(loaded.tokenizer, row, config, options)
    view = step_view(
        loaded.model,
        loaded.tokenizer,
        token_ids,
        row.params,
        k=options.k,
        layer=options.layer,
        head=options.head,
    )
    if options.png_file is not None and view.attention is not None:
        write_png(view.attention, view.token_texts, options.png_file)
    return view, draw_step


def _step_ids(tokenizer: Any, row: PromptRow, config: Config, options: Options) -> list[int]:
    """A bare text as the tokenizer reads it; messages and rows of a file as a job sends them."""
    from pipeline.prompts.chat import render

    if options.texts and not options.chat:
        token_ids: list[int] = list(tokenizer.encode(row.prompt, verbose=False))
    else:
        token_ids = render(row, _prepare(tokenizer, config))
    if not token_ids:
        raise ConfigError("text=: makes no tokens. Give a longer one.")
    return token_ids


def _prepare(tokenizer: Any, config: Config) -> Any:
    from pipeline.prompts.chat import prepare_chat

    return prepare_chat(tokenizer, config)


VIEWS = {"tokens": _tokens, "chat": _chat, "batch": _batch, "architecture": _architecture, "step": _step}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or {"-h", "--help"} & set(given):
        print(__doc__)
        return 0
    try:
        options, overrides = parse(given)
        view, draw = VIEWS[options.view](read_config(overrides), options)
        if options.json_file is not None:
            write_json(asdict(view), options.json_file)
    except PipelineError as error:
        say(f"Error: {error}", style="red")
        return error.exit_status
    if options.json_file != "-":
        from rich.console import Console

        draw(view, Console(highlight=False))
    return 0


def write_json(data: dict[str, Any], path: str) -> None:
    """To a file, or with - to standard output.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if path == "-":
        print(text)
        return
    try:
        Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"json={path}: cannot be written ({error.strerror or error}).") from error


if __name__ == "__main__":
    sys.exit(main())
