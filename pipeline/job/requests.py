"""Turn the rows that a job lacks into requests, and their completions into rows of outputs.jsonl."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from pipeline.common.errors import PromptError
from pipeline.common.fingerprint import row_key
from pipeline.common.request import BadRow, Completion, PromptRow, Request
from pipeline.config.schema import Config
from pipeline.job.folder import JobFolder
from pipeline.job.ledger import Ledger
from pipeline.job.ready import Ready
from pipeline.job.rows import completion_row, error_row
from pipeline.memory.capacity import Capacity
from pipeline.prompts.chat import prepare_chat, say_what_matters
from pipeline.prompts.reader import open_prompts
from pipeline.prompts.request import make_request, weigh


@dataclass
class Pending:
    """Hold a row that is in the engine."""

    row: PromptRow
    number: int  # of the job's rows, from 0
    prompt_token_ids: tuple[int, ...]
    samples: int  # still to come from the engine
    missing: list[int]  # the samples that are not written by an earlier run
    scored: list[Completion] = field(default_factory=list)  # of its choices, where those are compared


class Requests:
    """Read what is missing, write what comes back, and keep the ledger of both."""

    def __init__(
        self, config: Config, prompts: str, results: JobFolder, ledger: Ledger, ready: Ready, room: Capacity
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._results = results
        self._ledger = ledger
        self._tokenizer = ready.tokenizer
        self._chat = prepare_chat(self._tokenizer, config, ready.embeddings)
        say_what_matters(config, self._chat, ready.ends)
        self._context = ready.context(config.model.context)
        self._longest_row = ready.longest_row or self._context
        self._room = room
        self._refusal = ready.refusal
        self._pending: dict[str, Pending] = {}

    def read(self, going_on: Callable[[str], bool]) -> Iterator[Request]:
        """Render the rows that are missing; a row that cannot be run is written at once.

        Args:
            going_on: is told what was done last, and says whether there is to be more.
        """
        number = -1
        for number, row in enumerate(open_prompts(self._config, self._prompts)):
            if number == self._ledger.rows:
                return  # the file has grown since it was held against the rows: what is new is for the next run
            missing = self._ledger.missing_samples(number, row_key(row))
            if missing is None:
                raise _changed(row.source)
            if not going_on(f"row {row.index} was read"):
                return
            if not missing:
                continue
            try:
                request = self._request(row)
            except PromptError as error:
                for sample in missing:
                    self._results.append(error_row(row, str(error), sample))
                    self._ledger.mark(number, sample, failed=True)
                continue
            assert isinstance(row, PromptRow)
            self._pending[row.id] = Pending(row, number, request.prompt_token_ids, request.samples, missing)
            yield request
        if number + 1 < self._ledger.rows:
            raise _changed(self._prompts)

    def write(self, completion: Completion) -> None:
        """Write a completion, unless an earlier run did: the engine makes all samples of a row."""
        pending = self._pending[completion.request_id]
        pending.samples -= 1
        if pending.samples == 0:
            del self._pending[completion.request_id]
        if pending.row.params.label_logprobs:
            pending.scored.append(completion)
            if pending.samples:
                return
            completion = weigh(pending.row.params.choice, pending.scored, self._chat)
        if completion.sample not in pending.missing:
            return
        self._results.append(
            completion_row(
                pending.row,
                pending.prompt_token_ids,
                completion,
                self._tokenizer,
                self._config,
                self._chat.tags,
            )
        )
        self._ledger.mark(pending.number, completion.sample, failed=completion.error is not None)

    def place(self, request_id: str) -> int:
        """Give the place in the prompt file of a row that is in the engine."""
        return self._pending[request_id].row.index

    def _request(self, row: PromptRow | BadRow) -> Request:
        """Make the engine's request.

        Raises:
            PromptError: the row cannot be run, or can never fit in memory.
        """
        if isinstance(row, PromptRow) and (wrong := self._refusal(row.params)):
            raise PromptError(
                found=f"{row.source}: generation.{wrong}", fix="Change it, or use engine=default."
            )
        request = self._shortened(make_request(row, self._chat, self._context), row.source)
        assert isinstance(row, PromptRow)
        if refusal := self._room.refusal(len(request.prompt_token_ids)):
            raise PromptError(found=f"{row.source}: {refusal}")
        if row.params.constraints and self._config.generation.thinking:
            raise PromptError(
                found=f"{row.source}: generation.{row.params.constraints[0]} in a job with generation.thinking",
                fix="Run such rows in a job without thinking.",
            )
        return request

    def _shortened(self, request: Request, source: str) -> Request:
        """End a completion where the engine's memory for a row does, which may be before the context does.

        Raises:
            PromptError: the prompt fills it.
        """
        tokens = len(request.prompt_token_ids)
        if tokens >= self._longest_row:
            raise PromptError(
                found=f"{source}: the prompt has {tokens} tokens, and the engine has room for rows of "
                f"{self._longest_row}",
                fix="Shorten the prompt, or make room: a larger engine.max_model_len, engine.max_tokens_in_flight or "
                "engine.memory_fraction.",
            )
        most, params = self._longest_row - tokens, request.params
        if params.max_new_tokens <= most:
            return request
        return replace(request, params=replace(params, max_new_tokens=most))


def _changed(where: str) -> PromptError:
    return PromptError(
        found=f"{where}: the prompt file changed while the job was reading it",
        fix="Run the same command again.",
    )
