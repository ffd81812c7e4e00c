"""The bar of a job: rows, speed and the time that is left, which is this run's to tell."""

import io
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.job.progress import JobProgress


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`drawn((10, 60, 400), before=40)`: what a terminal shows after 10 s, with 60 rows done and 400 tokens made."""

    def draw(
        *updates: tuple[float, int, int], total: int = 100, before: int = 0, terminal: bool = True
    ) -> str:
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=100, color_system=None)
        now = [0.0]
        for module in ("common.bars", "job.progress", "common.terminal"):
            monkeypatch.setattr(f"pipeline.{module}.console", console)
        for module in ("common.bars", "job.progress"):
            monkeypatch.setattr(f"pipeline.{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
        with JobProgress(total, before) as progress:
            for now[0], done, tokens in updates:
                progress.update(done, tokens)
            progress._bar.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())

    return draw


def test_the_bar_shows_rows_speed_and_the_time_left(drawn):
    screen = drawn((10.0, 20, 400))
    assert "20/100 rows  40 tokens/s" in screen
    assert "40 s left" in screen


def test_before_the_first_row_no_time_is_told(drawn):
    assert "- left" in drawn((5.0, 0, 100))


def test_after_a_resume_only_the_rows_of_this_run_tell_the_time(drawn):
    screen = drawn((10.0, 60, 400), before=40)
    assert "60/100 rows" in screen
    assert "20 s left" in screen, "40 rows are left, and this run made 20 in 10 s"
    assert "- left" in drawn((10.0, 40, 400), before=40)


def test_a_log_gets_a_line_now_and_then_with_the_same_figures(drawn):
    said = drawn((10.0, 50, 100), (31.0, 71, 3100), (40.0, 80, 4000), before=40, terminal=False)
    assert re.findall(r"(\d+) of 100 rows, 100 tokens/s, 29 s left", said) == ["71"]
