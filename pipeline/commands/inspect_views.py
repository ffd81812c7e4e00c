"""Make the views that `inspect` shows. Each loads only what it needs."""

from dataclasses import replace
from typing import Any

from pipeline.commands.inspect_rows import Options, rows
from pipeline.common.errors import ConfigError
from pipeline.common.request import PromptRow
from pipeline.config.schema import Config


def _tokens(config: Config, options: Options) -> Any:
    from pipeline.models.loading import load_tokenizer
    from pipeline.views.tokens import tokens_view

    row = rows(config, options)[0]
    text = row.prompt if row.prompt is not None else "\n".join(m["content"] for m in row.messages or [])
    return tokens_view(load_tokenizer(config.model, config.models_dir), text)


def _chat(config: Config, options: Options) -> Any:
    from pipeline.models.loading import load_tokenizer
    from pipeline.views.chat import chat_view

    row = rows(config, options)[0]
    return chat_view(row, _prepare(load_tokenizer(config.model, config.models_dir), config))


def _batch(config: Config, options: Options) -> Any:
    from pipeline.models.loading import load_tokenizer
    from pipeline.prompts.chat import pad_token_id, render
    from pipeline.views.batch import batch_view

    chosen = rows(config, options)
    tokenizer = load_tokenizer(config.model, config.models_dir)
    chat = _prepare(tokenizer, config)
    token_ids = [render(row, chat) for row in chosen]
    return batch_view(token_ids, pad_token_id(tokenizer), [row.id for row in chosen])


def _architecture(config: Config, options: Options) -> Any:
    from pipeline.views.architecture import architecture_view, matching, pruned

    view = architecture_view(config.model, config.quant, config.models_dir)
    tree = view.tree if options.filter is None else matching(view.tree, options.filter)
    if tree is None:
        found = f"filter={options.filter}: no module's name or class matches"
        raise ConfigError(found, "Leave filter= out to see all.")
    return replace(view, tree=tree if options.depth is None else pruned(tree, options.depth))


def _step(config: Config, options: Options) -> Any:
    from pipeline.models.loading import load_model
    from pipeline.views.step import step_view

    row = rows(config, options)[0]
    loaded = load_model(config.model, config.quant, config.models_dir)
    token_ids = _step_ids(loaded.tokenizer, row, config, options)
    return step_view(
        loaded.model,
        loaded.tokenizer,
        token_ids,
        row.params,
        k=options.k,
        layer=options.layer,
        head=options.head,
    )


def _step_ids(tokenizer: Any, row: PromptRow, config: Config, options: Options) -> list[int]:
    """Read a bare text as the tokenizer does; render messages and rows of a file as a job sends them."""
    from pipeline.prompts.chat import render

    if options.texts and not options.chat:
        token_ids: list[int] = list(tokenizer.encode(row.prompt, verbose=False))
    else:
        token_ids = render(row, _prepare(tokenizer, config))
    if not token_ids:
        raise ConfigError("text=: makes no tokens", "Give a longer one.")
    return token_ids


def _prepare(tokenizer: Any, config: Config) -> Any:
    from pipeline.prompts.chat import prepare_chat

    return prepare_chat(tokenizer, config)


VIEWS = {"tokens": _tokens, "chat": _chat, "batch": _batch, "architecture": _architecture, "step": _step}
