"""The page in a browser: clips play in step, nothing is missing or asked for outside, keys work. Where there is a Chromium."""

import json
import shutil
from pathlib import Path

import pytest
from test_report import SWEEP, evals  # noqa: F401

from latent_shift import benchmark, report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--disable-component-update"]


@pytest.fixture(scope="module")
def page(evals, video_model, tmp_path_factory):  # noqa: F811
    (sweep := tmp_path_factory.mktemp("found") / "sweep.json").write_text(json.dumps(SWEEP))
    (training := sweep.with_name("training.json")).write_text(json.dumps(benchmark.runs([video_model.parent])))
    path = report.report(
        tmp_path_factory.mktemp("page"), evals / "compare", classes=evals / "classes", ablations=[evals / "compare"], training=training,
        sweeps=[sweep, sweep], rows=2,
    )  # fmt: skip
    with playwright.sync_playwright() as driver:
        found = CHROMIUM or driver.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no Chromium on this machine")
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1000, "height": 900})
        opened.problems, opened.asked = [], []
        opened.on("console", lambda message: opened.problems.append(message.text) if message.type in ("error", "warning") else None)
        opened.on("requestfailed", lambda request: opened.problems.append(request.url))
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.goto(path.as_uri())
        opened.wait_for_selector("body[data-ready=true]", timeout=30_000)
        yield opened
        browser.close()


def state(page) -> list[list]:
    return page.evaluate("[...document.querySelectorAll('video')].map(v => [v.readyState, v.currentTime, v.paused, v.duration])")


def test_all_clips_play_in_step(page):
    held, clips = 0, None
    for _ in range(100):  # a busy machine takes its time to begin; then they stay together
        page.wait_for_timeout(130)
        before, clips = clips, state(page)
        apart = [abs(at - clips[0][1]) for _, at, _, _ in clips]
        in_step = max(min(each, 0.5 - each) for each in apart) <= 1 / 8  # a frame of eight a second, round the loop
        playing = all(ready >= 2 and not paused for ready, _, paused, _ in clips) and before != clips
        held = held + 1 if in_step and playing else 0
        if held == 5:
            break
    assert held == 5, clips
    assert len(clips) == 2 * (2 + 1) + 2 * 4  # of two systems and of real clips, and of classes
    assert [length for *_, length in clips] == pytest.approx([0.5] * len(clips), abs=0.05)


def test_nothing_is_missing_or_asked_for_outside(page):
    assert page.problems == []
    assert len(page.asked) > 8 and all(url.startswith(("file:", "data:")) for url in page.asked)
    drawn = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)")
    assert len(drawn) == 2 * 4 and min(drawn) > 100
    outside = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert outside <= 0  # wide tables scroll in themselves
    images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert images and all(complete and width for complete, width in images)


def test_keys_stop_and_step(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "play"
    assert page.inner_text("#play") == "Stop all clips"
    page.keyboard.press("Space")
    page.wait_for_timeout(200)
    assert (page.inner_text("#state"), page.inner_text("#play")) == ("stopped", "Play all clips")
    before = state(page)
    assert all(paused for _, _, paused, _ in before)
    assert max(at for _, at, _, _ in before) - min(at for _, at, _, _ in before) < 0.05
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    ahead = [(after[1] - at[1]) % 0.5 for at, after in zip(before, state(page), strict=True)]
    assert ahead == pytest.approx([1 / 8] * len(ahead), abs=0.05)


def test_a_reader_is_told_what_there_is(page):
    told = page.locator("body").aria_snapshot()
    parts = (
        'heading "Clips"',
        'group "Playing"',
        'region "Numbers"',
        'columnheader "b',
        "rowheader",
        'region "Compare"',
        'img "Time of one step',
    )
    for words in parts:
        assert words in told, told
