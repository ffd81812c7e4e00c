"""Let the engine work: rows in, completions out, until all is done or a signal comes."""

from dataclasses import dataclass

from pipeline.common.signals import Interrupt
from pipeline.config.schema import Config
from pipeline.engine.probe import AnyForward
from pipeline.job.engine import make_engine
from pipeline.job.folder import JobFolder
from pipeline.job.ledger import Ledger
from pipeline.job.progress import JobProgress
from pipeline.job.ready import Ready
from pipeline.job.requests import Requests
from pipeline.job.timeline import Timeline
from pipeline.job.tracker import Telling
from pipeline.job.watchdog import Watchdog


@dataclass
class Work:
    """Run the engine, and say how far it is."""

    config: Config
    prompts: str  # the file's path
    results: JobFolder
    ledger: Ledger
    ready: Ready
    forward: AnyForward | None
    interrupt: Interrupt
    timeline: Timeline

    def __post_init__(self) -> None:
        self.engine, room = make_engine(self.ready, self.forward, self.config)
        self.requests = Requests(self.config, self.prompts, self.results, self.ledger, self.ready, room)
        self.telling = Telling(self.config.tracker, self.results)
        self.watchdog = Watchdog(self.config.watchdog_sec, self.results.sync)

    def run(self) -> None:
        """Run all missing rows, or those that are done before a signal comes; all of them are on the disk."""
        engine, ledger = self.engine, self.ledger
        with JobProgress(ledger.total, ledger.done) as progress, self.watchdog:
            for finished in engine.steps(self.requests.read(self._going_on)):
                for completion in finished:
                    self.requests.write(completion)
                self.results.sync_if_due()
                going_on = self._going_on(f"step {engine.stats.steps}, with {ledger.shown} done")
                self._show(progress)
                if not going_on:
                    break
        self.results.sync()

    def _going_on(self, where: str) -> bool:
        """Tell the watchdog that there is progress; no signal has come."""
        self.watchdog.beat(where)
        return not self.interrupt.signal

    def _show(self, progress: JobProgress) -> None:
        live, tokens = self.engine.live, self.engine.tokens
        self.timeline.sample(tokens)
        self.telling.point(self.ledger.done, tokens, self.timeline.points[-1][1])
        progress.update(self.ledger.done, tokens)
        if self.config.stream and live:
            first = min(live, key=lambda s: (self.requests.place(s.request.id), s.index))
            progress.stream(first.request.id, self.ready.decode(first.token_ids))
