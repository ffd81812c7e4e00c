"""The report's page in a real browser: Chromium, headless, from disk, with no network."""

import base64
import json
import re
import time
from urllib.parse import quote

import pytest
from synthetic_jobs import (
    HOSTILE,
    answer_row,
    hostile_rows,
    many_rows,
    scores,
    write_failed,
    write_job,
    write_jobs,
)

from pipeline.report.write import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three jobs of 45 rows, two errors each, and a job that failed."""
    folder = write_jobs(tmp_path_factory.mktemp("outputs"), jobs=2, rows=44)
    rows = [*many_rows(44, "int8"), answer_row(44, "", row_id="late/error & more", error="boom <i>")]
    write_job(folder, "int8", rows)
    write_failed(folder)
    return write_report([folder]).as_uri()


@pytest.fixture
def opened(browser, page):
    return open_page(browser, page)


def open_page(browser, address):
    """Load a page and wait until its script is ready; it must complain of nothing."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get("about:blank")
    browser.get(address)
    wait_for(browser, "document.documentElement.dataset.ready === 'true'")
    assert browser.get_log("browser") == []
    return browser


def wait_for(browser, condition, seconds=20):
    end = time.monotonic() + seconds
    while not browser.execute_script(f"return {condition}"):
        assert time.monotonic() < end, f"never true: {condition}"
        time.sleep(0.02)


def ids(browser):
    return browser.execute_script("return [...document.querySelectorAll('.row h3')].map(n => n.textContent)")


def press(browser, keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def text_of(browser, selector):
    return browser.execute_script(f"return document.querySelector({selector!r}).textContent")


def choose(browser, control, value):
    script = "const c = document.getElementById(arguments[0]); c.value = arguments[1]; "
    browser.execute_script(script + "c.dispatchEvent(new Event('change'));", control, value)


def test_the_page_shows_twenty_prompts_and_turns_pages(opened):
    assert ids(opened) == [f"row-{i}" for i in range(20)]
    assert "45 of 45 prompts" in text_of(opened, "#found")
    opened.find_element("css selector", "#pages button:last-child").click()
    wait_for(opened, "document.querySelector('.row h3').textContent === 'row-20'")
    assert "2 / 3" in text_of(opened, "#pages")


def test_a_click_on_a_column_sorts_the_table_both_ways_and_failed_jobs_stay_last(opened):
    jobs = "return [...document.querySelectorAll('#jobs tbody th')].map(n => n.firstChild.textContent.trim())"
    button = opened.find_element("css selector", "[data-column=tokens_per_sec]")
    button.click()
    assert opened.execute_script(jobs) == ["tiny · fp32", "tiny · bf16", "tiny · int8", "broken · int8"]
    button.click()
    assert opened.execute_script(jobs) == ["tiny · int8", "tiny · bf16", "tiny · fp32", "broken · int8"]
    assert opened.find_element("css selector", "th[aria-sort=descending]")


def test_filters_and_the_order_by_disagreement_work(opened):
    choose(opened, "filter", "errors")
    wait_for(opened, "document.getElementById('found').textContent.startsWith('2 of')")
    assert ids(opened) == ["row-5", "late/error & more"]
    choose(opened, "filter", "differ")
    choose(opened, "sort", "disagreement")
    wait_for(opened, "!document.getElementById('found').textContent.startsWith('2 of')")
    shares = opened.execute_script(
        "return [...document.querySelectorAll('.row header .muted')].map(n => parseInt(n.textContent))"
    )
    assert len(shares) > 5
    assert shares == sorted(shares, reverse=True)


def test_search_finds_text_on_later_pages_and_marks_it(opened):
    press(opened, "/")
    press(opened, "question 31?")
    wait_for(opened, "document.getElementById('found').textContent.startsWith('1 of')")
    assert ids(opened) == ["row-31"]
    assert text_of(opened, ".row mark") == "Question 31?"


def test_differences_from_the_baseline_are_marked_and_equal_answers_stand_together(opened):
    shapes = opened.execute_script(
        "const names = '.base h4 span:not(.tag)';"
        "return [...document.querySelectorAll('.row')].map("
        "r => [r.querySelectorAll('.answer').length, r.querySelectorAll(names).length])"
    )
    assert [1, 3] in shapes  # all three jobs agree
    assert any(cards == 3 for cards, _ in shapes)
    marked = opened.execute_script(
        "const a = [...document.querySelectorAll('.answer:not(.base)')].find(n => n.querySelector('ins'));"
        "const words = n => n.textContent.split(/\\s+/);"
        "const base = words(a.closest('.row').querySelector('.base .text'));"
        "return [a.querySelector('.text').firstChild.textContent, base.join(' ')]"
    )
    assert marked[1].startswith(marked[0].strip())


def test_a_link_to_a_row_opens_its_page(browser, page):
    open_page(browser, f"{page}#row={quote('late/error & more', safe='')}")
    assert text_of(browser, ".row.here h3") == "late/error & more"
    assert text_of(browser, ".row.here .wrong .text") == "boom <i>"


def test_the_link_of_a_row_leads_back_to_it(opened):
    opened.find_element("css selector", "#pages button:last-child").click()
    wait_for(opened, "document.querySelector('.row h3').textContent === 'row-20'")
    link = opened.execute_script("return document.querySelectorAll('.row h3 a')[3].href")
    open_page(opened, link)
    assert text_of(opened, ".row.here h3") == "row-23"


def test_keys_move_between_prompts_and_pages(opened):
    press(opened, "jjk")
    assert text_of(opened, ".row.here h3") == "row-0"
    press(opened, "j")
    assert opened.execute_script("return document.activeElement.querySelector('h3').textContent") == "row-1"
    press(opened, "n")
    wait_for(opened, "document.querySelector('.row h3').textContent === 'row-20'")
    press(opened, "p")
    wait_for(opened, "document.querySelector('.row h3').textContent === 'row-0'")


def test_a_job_can_be_hidden(opened):
    opened.find_element("css selector", "#shown label:last-child input").click()
    wait_for(
        opened, "![...document.querySelectorAll('.answer h4')].some(n => n.textContent.includes('int8'))"
    )


def test_errors_have_their_own_view_with_links_to_the_rows(opened):
    rows = opened.execute_script(
        "return [...document.querySelectorAll('#error-rows tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert len(rows) == 4
    assert ["tiny · int8", "late/error & more", "boom <i>"] in rows
    assert "not found" in text_of(opened, "#errors")


def test_dark_mode_follows_the_system_and_the_button(opened):
    def back():
        return opened.execute_script("return getComputedStyle(document.body).backgroundColor")

    def images():
        shown = (
            "[...document.querySelectorAll('figure img')].filter(n => getComputedStyle(n).display !== 'none')"
        )
        return set(opened.execute_script(f"return {shown}.map(n => n.className)"))

    assert (back(), images()) == ("rgb(246, 247, 249)", {"light"})
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert (back(), images()) == ("rgb(18, 22, 28)", {"dark"})
    opened.find_element("id", "theme").click()
    assert (back(), images()) == ("rgb(246, 247, 249)", {"light"})
    press(opened, "d")
    assert (back(), images()) == ("rgb(18, 22, 28)", {"dark"})


def test_plots_are_drawn(opened):
    loaded = "[...document.querySelectorAll('figure img')].map(n => n.complete && n.naturalWidth > 100)"
    assert opened.execute_script(f"return {loaded}") == [True] * 12


def test_a_phone_needs_no_sideways_scrolling(browser, page):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    open_page(browser, page)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    """Two models whose jobs have every figure that a page can show, and a prompt that one did not answer."""
    folder = tmp_path_factory.mktemp("full")
    counter = {"joules": 3000.0, "source": "RAPL", "completion_tokens": 900}
    for model, quant, count in (
        ("tiny", "fp32", 12),
        ("tiny", "nf4", 12),
        ("phi-4-mini-instruct", "nf4", 11),
    ):
        rows = [
            {**answer_row(i, f"{quant} says {model} {i} and more", reference=str(i)), "complete": i % 3 > 0}
            for i in range(count)
        ]
        job = write_job(folder, quant, rows, model=model, energy=counter)
        (job / "scores.json").write_text(json.dumps(scores(0.01)))
    return write_report([folder]).as_uri()


def size(browser, width):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def test_nothing_is_cut_on_a_laptops_screen_with_every_figure(browser, full_page):
    size(browser, 1280)
    open_page(browser, full_page)
    browser.execute_script("document.querySelector('.figures').open = true")
    widths = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(n => [n.scrollWidth, n.clientWidth])"
    )
    assert len(widths) == 2
    assert all(needed <= there for needed, there in widths)
    heads = "return [...document.querySelectorAll('#jobs thead th')].map(n => n.textContent)"
    assert browser.execute_script(heads) == [
        "Job", "Peak", "Tokens/s", "Agreement", "Reference", "KL divergence", "In shape", "J / 1,000 tokens"
    ]  # fmt: skip
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_phone_shows_jobs_as_cards_with_three_large_figures_and_plots_of_its_own(browser, full_page):
    wide = open_page(browser, full_page).execute_script("return document.querySelector('img').currentSrc")
    size(browser, 420)
    open_page(browser, full_page)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 420
    shown = browser.execute_script(
        "const font = n => parseFloat(getComputedStyle(n).fontSize);"
        "const cells = [...document.querySelector('#jobs tbody tr').querySelectorAll('td')];"
        "const large = cells.filter(n => font(n) > font(document.body));"
        "return [large.map(n => n.dataset.title), large.map(n => n.getBoundingClientRect().top)]"
    )
    assert shown[0] == ["Peak", "Tokens/s", "Agreement"]
    assert len(set(shown[1])) == 1
    assert browser.execute_script("return document.querySelector('img').currentSrc") != wide
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.usefixtures("no_plots")
def test_words_that_an_answer_lacks_are_struck_out_where_they_would_stand(browser, tmp_path):
    write_job(tmp_path, "fp32", [answer_row(0, "One two three four five six. The end.")])
    write_job(tmp_path, "nf4", [answer_row(0, "One two five SIX seven. The end.")])
    open_page(browser, write_report([tmp_path]).as_uri())
    parts = browser.execute_script(
        "return [...document.querySelector('.answer:not(.base) .text').childNodes]"
        ".map(n => [n.nodeName, n.textContent]).filter(([_, text]) => text)"
    )
    assert parts == [
        ["#text", "One two "], ["DEL", "three four "], ["#text", "five"], ["#text", " "],
        ["DEL", "six"], ["INS", "SIX seven"], ["#text", ". The end."],
    ]  # fmt: skip


def test_answers_are_compared_across_models_by_choice_and_a_missing_one_is_named(browser, full_page):
    open_page(browser, full_page)
    marked = "document.querySelectorAll('.row:first-child .answer:has(ins)').length"
    assert browser.execute_script(f"return {marked}") == 1  # nf4 of the same model
    labels = browser.execute_script("return [...document.getElementById('against').options].map(n => n.text)")
    choose(browser, "against", labels.index("tiny · fp32") - 1)
    wait_for(browser, f"{marked} === 2")
    assert text_of(browser, ".row:first-child .base h4 span") == "tiny · fp32"
    assert text_of(browser, ".row:last-child .silent") == "No answer by phi-4-mini-instruct · nf4"


def test_a_prompt_with_long_answers_prints_alone_on_one_sheet(browser, tmp_path):
    for quant in ("fp32", "int8", "nf4"):
        write_job(tmp_path, quant, [answer_row(i, f"{quant} goes on. " * 260) for i in range(3)])
    open_page(browser, write_report([tmp_path]).as_uri())
    browser.execute_script(
        "window.print = () => { window.printed = 'asked';"
        " window.kept = document.querySelector('.row.alone').cloneNode(true); };"
        "document.querySelectorAll('.print')[1].click();"
        "document.querySelectorAll('.row')[1].replaceWith(window.kept)"
    )
    assert browser.execute_script("return window.printed") == "asked"
    sheets = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert len(re.findall(rb"/Type\s*/Page\b", sheets)) == 1


def test_hostile_text_stays_text(browser, tmp_path):
    for quant in ("fp32", "nf4"):
        write_job(tmp_path, quant, hostile_rows(quant))
    open_page(browser, write_report([tmp_path]).as_uri())
    assert browser.execute_script("return window.hacked") is None
    answers = browser.execute_script(
        "document.querySelectorAll('.answer del').forEach(n => n.remove());"  # the baseline's words
        "return [...document.querySelectorAll('.answer:not(.base) .text')].map(n => n.textContent)"
    )
    plain = [f"{text} nf4" for name, text in HOSTILE.items() if name not in ("bidi", "control")]
    assert answers[: len(plain)] == plain
    assert "U+202E" in answers[4]
    assert all(mark in answers[5] for mark in ("U+0007", "U+0000", "U+001B", "U+2028"))
    assert not any(c in "".join(answers) for c in "\u202e\u2066\x1b\x07")
    made = "document.querySelectorAll('#rows script, #rows img, #rows a[href^=javascript], #rows [onerror]').length"
    assert browser.execute_script(f"return {made}") == 0
