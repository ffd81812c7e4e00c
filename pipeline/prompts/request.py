"""Make the engine's request of a row; and, where a row's choices are compared, its completion of their scores.

Then every choice is a sample of one request, whose tokens are given to it: the prompt is computed once, nothing is
drawn. A choice weighs what its text weighs as a whole answer, with the token by which the chat template ends a
turn: so "no" does not count what "no idea" is worth, and a choice that another one begins with is not the more
probable for being short. Without a template a text has no such end.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from pipeline.common.errors import PromptError
from pipeline.common.request import BadRow, Completion, GenerationParams, Label, PromptRow, Request
from pipeline.prompts.answer import stop_token_ids
from pipeline.prompts.chat import Chat, render
from pipeline.prompts.control import encode_reply


def make_request(row: PromptRow | BadRow, chat: Chat, context: int) -> Request:
    """Make the engine's request; its completion ends where the context does.

    Args:
        context: the model's, in tokens.

    Raises:
        PromptError: the line is bad, its prompt cannot be made, or fills the context.
    """
    if isinstance(row, BadRow):
        raise PromptError(found=row.error)
    token_ids = tuple(render(row, chat))
    room = context - len(token_ids)
    if room < 1:
        raise PromptError(
            found=f"{row.source}: the prompt has {len(token_ids)} tokens and the model's context {context}",
            fix="Shorten the prompt, choose a model with a longer context, or, where the model's page says that "
            "it can read more, set model.context.",
        )
    if row.params.label_logprobs:
        return _label_request(row, token_ids, chat, context)
    params = replace(row.params, max_new_tokens=min(row.params.max_new_tokens, room))
    return Request(row.id, token_ids, params, _stops(chat.tokenizer, tuple(params.stop)), row.constraint)


@lru_cache(256)  # almost all rows have the job's own
def _stops(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> frozenset[int]:
    return stop_token_ids(tokenizer, stop)


def _label_request(row: PromptRow, prompt: tuple[int, ...], chat: Chat, context: int) -> Request:
    """Make the request that scores a row's choices."""
    own = (encode_reply(chat.tokenizer, text, chat.control_tokens, row.source) for text in row.params.choice)
    forced = tuple((*token_ids, *_end(chat)) for token_ids in own)
    if not all(forced):
        raise PromptError(
            found=f"{row.source}: choice {row.params.choice[forced.index(())]!r} has no tokens in this tokenizer",
            fix="Leave it out, or write it in another way.",
        )
    longest = max(map(len, forced))
    if len(prompt) + longest > context:
        raise PromptError(
            found=f"{row.source}: the prompt has {len(prompt)} tokens, a choice {longest} and the model's "
            f"context {context}",
            fix="Shorten them, or choose a model with a longer context.",
        )
    return Request(row.id, prompt, GenerationParams(max_new_tokens=longest, logprobs=0), forced=forced)


def _end(chat: Chat) -> tuple[int, ...]:
    """Give the token that ends an answer; none for a base model."""
    token_id = None if chat.turn_end is None else chat.tokenizer.convert_tokens_to_ids(chat.turn_end)
    return (token_id,) if isinstance(token_id, int) else ()


def weigh(choices: Sequence[str], scored: Sequence[Completion], chat: Chat) -> Completion:
    """Make a row's completion, the most probable choice, of what the engine says of all of them."""
    if failed := next((completion for completion in scored if completion.error), None):
        return replace(failed, sample=0)
    scored = sorted(scored, key=lambda completion: completion.sample)
    sums = [math.fsum(item.logprob for item in completion.logprobs or ()) for completion in scored]
    highest = max(sums)
    if not math.isfinite(highest):
        return replace(scored[0], error="the model gives none of the choices a chance")
    total = math.fsum(math.exp(own - highest) for own in sums)
    labels = tuple(
        Label(choice, own, len(completion.token_ids), math.exp(own - highest) / total)
        for choice, own, completion in zip(choices, sums, scored, strict=True)
    )
    best = scored[sums.index(highest)]
    token_ids = best.token_ids[: len(best.token_ids) - len(_end(chat))]
    return Completion(best.request_id, 0, token_ids, "stop", complete=True, labels=labels)
