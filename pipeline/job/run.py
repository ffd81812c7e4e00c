"""Run a model over the rows that a job lacks, in four steps. Imported only when there is work: it needs torch."""

from dataclasses import dataclass

from pipeline.common.signals import Interrupt
from pipeline.config.schema import Config
from pipeline.job.engine import Way, choose_way
from pipeline.job.folder import JobFolder
from pipeline.job.ledger import Ledger
from pipeline.job.load import load
from pipeline.job.manifest import check_same_model, day_facts, manifest, model_facts, with_day
from pipeline.job.meters import Meters, Taken
from pipeline.job.ready import Ready
from pipeline.job.stats import job_stats, show_stats
from pipeline.job.timeline import Timeline
from pipeline.job.work import Work


@dataclass
class Run:
    """Make what the ledger says is missing; end early, between two steps, after a signal."""

    config: Config
    prompts: str  # the file's path
    prompts_sha256: str | None
    results: JobFolder
    ledger: Ledger
    interrupt: Interrupt

    def __post_init__(self) -> None:
        self.done_before = self.ledger.done
        self.timeline = Timeline()
        self.config = with_day(self.config, self.results, goes_on=self.done_before > 0)

    def go(self) -> None:
        """Take the four steps.

        Raises:
            Stopped: a signal came before there was anything to finish.
            PipelineError: the job as a whole cannot go on; what was written stays.
        """
        ready = load(self.config, self.prompts, self.results)
        self.timeline.held_bytes = ready.held_bytes
        try:
            way = self.choose_way(ready)
            taken = self.run(ready, way)
            self.record(ready, way, taken)
        finally:
            ready.release()
        self.telling.end("stopped" if self.ledger.missing else "done")

    def choose_way(self, ready: Ready) -> Way:
        """Choose the fastest exact way through the model, and write down what the job runs on."""
        facts = model_facts(ready, self.config)
        if self.done_before:
            check_same_model(self.results, facts)
        way = choose_way(ready, self.config)
        facts |= day_facts(ready, self.config)
        written = manifest(self.prompts, self.prompts_sha256, ready.gpus, **facts, attention=way.report)
        self.results.write_json(self.results.manifest, written)
        return way

    def run(self, ready: Ready, way: Way) -> Taken:
        """Run what is missing, and measure it."""
        work = Work(
            self.config,
            self.prompts,
            self.results,
            self.ledger,
            ready,
            way.forward,
            self.interrupt,
            self.timeline,
        )
        self.telling = work.telling  # which goes on until stats.json is there
        self.interrupt.hold()
        with Meters(ready) as meters:
            work.run()
        return meters.taken(work.engine.stats)

    def record(self, ready: Ready, way: Way, taken: Taken) -> None:
        """Write stats.json, and show the short of it."""
        ledger = self.ledger
        stats = job_stats(self.config, ready, way.forward, taken)
        counts = {"done": ledger.done, "errors": ledger.errors, "done_before": self.done_before}
        stats |= {"rows": {"total": ledger.total, **counts}, "timeline": self.timeline.points}
        stats["attention"] = way.report
        self.results.write_json(self.results.stats, stats)
        show_stats(stats, self.results.rows)
