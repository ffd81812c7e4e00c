"""The page of `status html=`, in a real browser: it follows what runs, and rests when all is done."""

import re
import subprocess
import sys
import time

import pytest
from job_helper import environment, note_todo
from synthetic_jobs import HOSTILE, answer_row

from pipeline.commands.door import main
from pipeline.job.events import append_event
from pipeline.job.folder import JobFolder

REFRESH = '<meta http-equiv="refresh" content="5">'


@pytest.fixture(autouse=True)
def no_slurm(browser, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def sweep(tmp_path):
    """Four jobs: one is complete, one stopped, one failed on a cluster, one is called as an attack would be."""
    top = tmp_path / "outputs"
    for name, done in (("tiny-fp32-greedy-1", 4), ("tiny-nf4-greedy-2", 1), (HOSTILE["handler"][:40], 4)):
        write(top / "questions" / name, done)
    failed = top / "questions" / "tiny-int8-greedy-3"
    log = tmp_path / "task.log"
    log.write_text("Error: <b>no</b> weights there\n")
    append_event(failed, "submitted", job="1_0", total=4, log=str(log))
    append_event(failed, "started", job="1_0", node="n1", rows=0)
    append_event(failed, "ended", job="1_0", status=3)
    return top


def write(folder, done, total=4):
    note_todo(folder, [1] * total, 0)
    with JobFolder(folder) as job:
        for index in range(done):
            job.append(answer_row(index, f"answer {index}"))
    if done == total:
        note_todo(folder, [1] * total, done)


def test_the_page_shows_every_job_as_text_with_its_rows_and_its_error(browser, sweep, tmp_path):
    page = tmp_path / "page.html"
    assert main(["status", str(sweep), f"html={page}"]) == 1
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#jobs tbody tr')].map(r => [r.cells[0].firstChild.textContent,"
        " r.querySelector('progress')?.value, r.cells[5].textContent])"
    )
    assert [HOSTILE["handler"][:40], 4, "complete"] in shown
    assert ["tiny-nf4-greedy-2", 1, "stopped"] in shown
    assert ["tiny-fp32-greedy-1", 4, "complete"] in shown
    assert ["tiny-int8-greedy-3", 0, "failed: <b>no</b> weights there"] in shown
    assert "9 of 16 rows." in browser.find_element("css selector", "header").text
    assert browser.execute_script("return window.hacked") is None
    assert "refresh" not in page.read_text()
    assert [path.name for path in tmp_path.glob("*page.html*")] == ["page.html"]


def test_nothing_is_cut_on_a_laptop_or_a_phone(browser, sweep, tmp_path):
    page = tmp_path / "page.html"
    main(["status", str(sweep), f"html={page}"])
    for width in (1280, 420):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_that_is_watched_loads_itself_again_until_all_is_done(browser, tmp_path):
    folder, page = tmp_path / "outputs" / "questions" / "tiny-fp32-greedy-1", tmp_path / "page.html"
    write(folder, 2)
    with JobFolder(folder) as job:
        watching = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "status", str(tmp_path / "outputs"), "watch=true", f"html={page}"],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(page.exists)
        browser.get(page.as_uri())
        assert REFRESH in browser.page_source
        assert "1 running" in browser.page_source
        for index in (2, 3):
            job.append(answer_row(index, f"answer {index}"))
    note_todo(folder, [1] * 4, 4)
    assert watching.wait(60) == 0
    until(lambda: "1 complete; 4 of 4 rows." in browser.page_source)  # nobody pressed a key
    assert "refresh" not in browser.page_source


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_page_that_cannot_be_written_is_an_error_that_says_so(sweep, tmp_path, capsys):
    assert main(["status", str(sweep), f"html={tmp_path / 'none' / 'page.html'}"]) == 3
    assert re.search(r"html=.*cannot be written \(No such file", " ".join(capsys.readouterr().err.split()))
    folder = tmp_path / "folder.html"
    folder.mkdir()
    assert main(["status", str(sweep), f"html={folder}"]) == 3
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".new")] == []


def test_a_page_is_written_over_nothing_but_pages(sweep, capsys):
    (answers, *_) = sorted(sweep.rglob("outputs.jsonl"))
    before = answers.read_bytes()
    for name in (answers, ".", "/", sweep):
        assert main(["status", str(sweep), f"html={name}"]) == 2
        assert "Let it end in .html." in capsys.readouterr().err
    assert answers.read_bytes() == before
