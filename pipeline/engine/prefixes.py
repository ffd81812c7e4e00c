"""Share what prompts begin with: of waiting prompts that begin alike, each group has its beginning computed once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.scheduler import Prefix, Sample, Scheduler

LEAST_TOKENS = 8  # of a prefix
PASS_TOKENS = 32  # a prefix has a pass of its own, which costs as much as so many tokens in another's pass
MOST = 1 / 4  # of the tokens in flight

Tokens = tuple[int, ...]
Key = tuple[Tokens, Tokens | None]  # a prompt without its last token, and the prompt; or a prefix and None


class Prefixes:
    """Hold the prefixes of what waits; each is computed when the first row that begins with it is admitted.

    They count as tokens in flight from the time they are planned, so that there is room for them.

    Args:
        compute: makes the keys and values of a prefix.
        free: gives them back.
        unit: a prefix has a multiple of so many tokens.
        longest: samples of more tokens share nothing.
    """

    def __init__(
        self,
        compute: Callable[[Tokens], Any],
        free: Callable[[Any], None] = lambda stored: None,
        unit: int = 1,
        longest: int | None = None,
    ) -> None:
        self._compute = compute
        self._free = free
        self._unit = unit
        self._longest = longest or 1 << 62
        self._planned: dict[Tokens, Prefix] = {}

    @property
    def tokens(self) -> int:
        """Count the tokens of all prefixes, computed or not."""
        return sum(map(len, self._planned))

    @property
    def tokens_to_come(self) -> int:
        """Count the tokens of those not yet computed."""
        return sum(len(ids) for ids, prefix in self._planned.items() if prefix.stored is None)

    @property
    def stored(self) -> list[Any]:
        """List the keys and values of those that are computed."""
        return [p.stored for p in self._planned.values() if p.stored is not None]

    def plan(self, scheduler: Scheduler) -> None:
        """Find anew what waiting prompts share, and put those that share it side by side."""
        waiting: dict[Tokens, list[Sample]] = {}
        for sample in scheduler.waiting:
            sample.prefix = None
            if sample.length <= self._longest:
                waiting.setdefault(sample.request.prompt_token_ids, []).append(sample)
        before, self._planned = self._planned, {}
        held = [ids for ids, prefix in before.items() if prefix.stored is not None]
        room = int(scheduler.max_tokens * MOST)
        for group in find_groups(waiting, held, self._unit):
            if len(group.prefix) > room:
                continue
            room -= len(group.prefix)
            prefix = before.pop(group.prefix, None) or Prefix(group.prefix)
            samples = [sample for prompt in group.prompts for sample in waiting[prompt]]
            prefix.waiting = len(samples)
            self._planned[group.prefix] = prefix
            for sample in samples:
                sample.prefix = prefix
        for prefix in before.values():
            self._forget(prefix)
        scheduler.sort()

    def take(self, sample: Sample) -> Prefix | None:
        """Return what an admitted sample shares, computed; None if that is nothing, or there is no memory for it."""
        prefix, sample.prefix = sample.prefix, None
        if prefix is None or self._planned.get(prefix.token_ids) is not prefix:
            return None
        prefix.waiting -= 1
        if prefix.stored is None:
            try:
                prefix.stored = self._compute(prefix.token_ids)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                del self._planned[prefix.token_ids]
                return None
        return prefix

    def free_unneeded(self) -> None:
        """Free what no waiting sample begins with."""
        for prefix in [p for p in self._planned.values() if not p.waiting]:
            self._forget(self._planned.pop(prefix.token_ids))

    def clear(self) -> None:
        """Free all, and share nothing until the next plan."""
        while self._planned:
            self._forget(self._planned.popitem()[1])

    def _forget(self, prefix: Prefix) -> None:
        if prefix.stored is not None:
            self._free(prefix.stored)
            prefix.stored = None


@dataclass(frozen=True, slots=True)
class Group:
    """Hold prompts that begin alike."""

    prefix: Tokens
    prompts: list[Tokens]
    saved_tokens: int  # that need no computing


def find_groups(prompts: Iterable[Tokens], held: Iterable[Tokens] = (), unit: int = 1) -> list[Group]:
    """Choose the prefixes that save most, each short of its prompts' last token; those first that save most.

    In lexical order the prompts under each node of their radix tree are side by side, and the nodes are found
    on the way, with a stack. Each node is worth its own prefix or what its children are worth.

    Args:
        prompts: all different.
        held: prefixes that are computed already.
        unit: a prefix has a multiple of so many tokens.
    """
    long = ((p[:-1], p) for p in prompts if len(p) > LEAST_TOKENS)
    keys: list[Key] = sorted([*((ids, None) for ids in held), *long], key=itemgetter(0))
    path = [_Node(0, 0)]  # from the root to the newest leaf
    for place, (key, prompt) in enumerate(keys):
        path.append(_Node(len(key), place, prompts=int(prompt is not None)))
        after = keys[place + 1][0] if place + 1 < len(keys) else ()
        common = _common_tokens(key, after)
        while path[-1].tokens > common:
            node = path.pop()
            if path[-1].tokens < common:
                path.append(_Node(common, node.first))
            path[-1].prompts += node.prompts
            path[-1].groups += node.best(keys, place + 1, unit)
    return sorted(path[0].groups, key=lambda g: g.saved_tokens, reverse=True)


@dataclass(slots=True)
class _Node:
    """Hold a node of the radix tree: keys from the `first` on that have so many tokens in common."""

    tokens: int
    first: int
    prompts: int = 0  # among the keys
    groups: list[Group] = field(default_factory=list)  # the best of its children

    def best(self, keys: list[Key], end: int, unit: int) -> list[Group]:
        """Return the better of its own prefix for keys [first, end), and its children's."""
        prefix = keys[self.first][0][: self.tokens // unit * unit]
        held = keys[self.first] == (prefix, None)
        saved = (self.prompts - (not held)) * len(prefix) - PASS_TOKENS
        if len(prefix) < LEAST_TOKENS or saved <= sum(g.saved_tokens for g in self.groups):
            return self.groups
        under = [prompt for _, prompt in keys[self.first : end] if prompt is not None]
        return [Group(prefix, under, saved)]


def _common_tokens(a: Tokens, b: Tokens) -> int:
    """Count the tokens that both begin with, by halving: comparing slices is faster than token by token."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
