"""The page in a browser, where there is a Chromium: clips play in step, nothing is missing, keys work."""

import json
import shutil
from pathlib import Path

import pytest
from test_report import SWEEP, evals  # noqa: F401

from latent_shift.benchmark.training import runs
from latent_shift.report.page import report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--disable-component-update",
    "--js-flags=--liftoff-only",  # WebAssembly is not optimised: for a tiny network that takes longer than it saves
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = CHROMIUM or driver.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no Chromium on this machine")
        started = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


def opened(browser, path):
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.problems, page.asked = [], []
    page.on(
        "console",
        lambda message: page.problems.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("requestfailed", lambda request: page.problems.append(request.url))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=true]", timeout=30_000)
    return page


@pytest.fixture(scope="module")
def page(browser, evals, video_model, tmp_path_factory):  # noqa: F811
    (sweep := tmp_path_factory.mktemp("found") / "sweep.json").write_text(json.dumps(SWEEP))
    (training := sweep.with_name("training.json")).write_text(json.dumps(runs([video_model.parent])))
    path = report(
        tmp_path_factory.mktemp("page"), evals / "compare", classes=evals / "classes", ablations=[evals / "compare"], training=training,
        sweeps=[sweep, sweep], rows=2,
    )  # fmt: skip
    return opened(browser, path)


@pytest.fixture(scope="module")
def published(browser):
    """The page of this repository, with many more clips."""
    return opened(browser, Path(__file__).parent.parent / "docs" / "page" / "index.html")


def state(page) -> list[list]:
    return page.evaluate(
        "[...document.querySelectorAll('video')].map(v => [v.readyState, v.currentTime, v.paused, v.duration])"
    )


SIGHT = """[...document.querySelectorAll('video')].map(v => {
    const box = v.getBoundingClientRect(), table = v.closest('.wide').getBoundingClientRect();
    return {sight: box.bottom > 0 && box.top < innerHeight && box.right > table.left && box.left < table.right, at: v.currentTime, paused: v.paused,
            heights: v.getVideoPlaybackQuality().totalVideoFrames};
})"""


def in_step(page, length: float) -> int:
    """Waits until all clips in sight play, are heights, and stay within a frame of each other for a second; how many there are."""
    since: list[list[dict]] = []
    for _ in range(100):  # a busy machine takes its time to begin; then they stay together
        page.wait_for_timeout(250)
        clips = page.evaluate(SIGHT)
        seen = [k for k, clip in enumerate(clips) if clip["sight"]]
        apart = [abs(clips[k]["at"] - clips[seen[0]]["at"]) % length for k in seen]
        # A frame of eight a second, round the loop.
        together = max(min(each, length - each) for each in apart) <= 1 / 8
        since = (
            [*since, clips] if together and all(clip["paused"] is not clip["sight"] for clip in clips) else []
        )
        if len(since) >= 5 and all(clips[k]["heights"] > since[0][k]["heights"] for k in seen):
            return len(seen)
    raise AssertionError(clips)


def test_page_plays_visible_clips_in_step(page):
    clips = state(page)
    assert len(clips) == 2 * (2 + 1) + 2 * 4  # of two systems and of real clips, and of classes
    assert [length for *_, length in clips] == pytest.approx([0.5] * len(clips), abs=0.05)
    assert in_step(page, 0.5) >= 3
    page.evaluate("document.getElementById('classes').scrollIntoView()")
    assert in_step(page, 0.5) >= 4
    page.evaluate("scrollTo(0, 0)")


def test_published_page_plays(published):
    assert published.problems == [] and all(url.startswith(("file:", "data:")) for url in published.asked)
    assert len(state(published)) > 50
    published.set_viewport_size({"width": 1400, "height": 400})
    # What is above it has its height by the machine's fonts.
    published.evaluate("document.getElementById('clips').scrollIntoView()")
    columns = published.evaluate(
        "document.querySelector('table.clips tbody tr').querySelectorAll('video').length"
    )
    assert in_step(published, min(length for *_, length in state(published))) >= 2 * columns > 10
    published.close()


def test_page_is_complete_and_requests_nothing_outside(page):
    assert page.problems == []
    assert len(page.asked) > 8 and all(url.startswith(("file:", "data:")) for url in page.asked)
    heights = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(heights) == 2 * 4 and min(heights) > 100
    outside = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert outside <= 0  # wide tables scroll in themselves
    images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert images and all(complete and width for complete, width in images)


def test_page_stops_and_steps_by_keyboard(page):
    page.reload()  # where Tab begins is where a reader has scrolled to
    page.wait_for_selector("body[data-ready=true]", timeout=30_000)
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


def test_page_has_labels_for_screen_readers(page):
    text = page.locator("body").aria_snapshot()
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
        assert words in text, text
