"""Read what `inspect` looks at: texts, a conversation, or rows of a prompt file."""

import json
from dataclasses import dataclass, replace
from itertools import islice

from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.request import BadRow, PromptRow
from pipeline.config.schema import Config
from pipeline.prompts.reader import open_prompts
from pipeline.prompts.row import to_row
from pipeline.prompts.settings import BadLine

MESSAGES = '\'[{"role": "user", "content": "Hello"}]\''  # as typed in a shell
BATCH_ROWS = 4  # of a prompt file, without limit=


@dataclass(frozen=True, slots=True)
class Options:
    """Hold this command's own arguments; HELP says what they mean."""

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


def rows(config: Config, options: Options) -> list[PromptRow]:
    """Read what to look at: texts, messages, or rows of the prompt file.

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
            raise ConfigError(f"messages=: {error}", f"As messages={MESSAGES}") from error
    count = (config.limit or BATCH_ROWS) if options.view == "batch" else 1
    read = open_prompts(replace(config, limit=None, shard=None))
    chosen = list(islice(read, options.row, options.row + count))
    if not chosen:
        raise ConfigError(
            f"row={options.row}: {config.prompts} has fewer rows",
            "Name one that is there; they count from 0.",
        )
    good = [row for row in chosen if isinstance(row, PromptRow)]
    if not good:
        raise PromptError(next(row.error for row in chosen if isinstance(row, BadRow)))
    return good
