"""The page of the server, driven in a real browser where there is a Chromium."""

import re
from importlib.resources import files

import numpy as np
import pytest
from serving import listening, png
from test_browser import browser  # noqa: F401

from latent_shift.models.names import Names
from latent_shift.pipelines.preview import write_preview


@pytest.fixture(scope="module")
def server(video_model, tmp_path_factory):
    write_preview(video_model, np.vstack([np.eye(4, 3) * 50, [128, 128, 128]]))
    names = {
        str(video_model): Names(("red ball", "ball of wool", "blue box"), np.eye(3, dtype=np.float32), 0.5)
    }
    with listening(tmp_path_factory.mktemp("data"), [video_model], names=names) as client:
        yield client


@pytest.fixture
def page(browser, server):  # noqa: F811
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.problems, page.asked = [], []
    page.on(
        "console",
        lambda message: page.problems.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#server[data-state=ready]")
    yield page
    page.close()


def until(page, expression):
    """Wait until an expression is true. Playwright's own function is forbidden by the page's policy."""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {expression}")


def generate(page, prompt="a red ball", steps=3, frames=4, **fields):
    """Type a prompt and settings, and press the button."""
    page.fill("#prompt", prompt)
    page.evaluate("document.getElementById('more').open = true")
    for name, value in {"num_inference_steps": steps, "num_frames": frames, **fields}.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")


def wait_for(page, state):
    page.wait_for_selector(f"#stage[data-state={state}]", timeout=30_000)


def test_from_words_to_a_clip(page):
    page.click("#prompt")
    page.keyboard.type("a red b")
    page.wait_for_selector("#suggestions li")
    assert page.locator("#suggestions li").all_inner_texts() == ["red ball"]
    page.fill("#prompt", "")
    page.keyboard.type("a bal")
    until(page, "document.querySelectorAll('#suggestions li').length === 2")
    page.wait_for_selector("#suggestions li")
    assert page.locator("#suggestions li").all_inner_texts() == ["ball of wool", "red ball"]
    assert page.get_attribute("#prompt", "aria-expanded") == "true"
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#prompt", "aria-activedescendant") == "suggestion-0"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.input_value("#prompt") == "a red ball"
    page.evaluate("document.getElementById('more').open = true")
    page.fill("#num_inference_steps", "60")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#preview:not([hidden])")
    assert re.match(r"Step \d+ of 60", page.inner_text("#progress-text"))
    assert int(page.get_attribute("#bar", "aria-valuenow")) > 0
    assert re.match(r"\d+% · ", page.title())
    wait_for(page, "completed")
    until(page, "document.getElementById('video').currentTime > 0.05")  # it plays
    assert "Done" in page.inner_text("#announce")
    assert page.inner_text("#clip-title") == "a red ball"
    assert page.title() == "Latent-Shift"
    page.keyboard.press("Escape")
    page.focus("#screen")
    page.keyboard.press("Space")
    assert page.evaluate("document.getElementById('video').paused")
    assert page.problems == []
    own = re.escape(page.url.split("#")[0])
    assert [url for url in page.asked if not re.match(f"{own}|data:|blob:", url)] == []


def test_reload_in_the_middle_loses_nothing(page):
    generate(page, steps=150, frames=16)
    wait_for(page, "in_progress")
    page.reload()
    wait_for(page, "in_progress")
    until(page, "Number(document.getElementById('bar').getAttribute('aria-valuenow')) > 0")
    assert "steps=150" in page.url  # and the settings are in the address
    page.click("#cancel")
    wait_for(page, "failed")
    assert page.inner_text("#clip-error") == "Cancelled."
    assert page.problems == []


def test_gallery_brings_settings_back(page, server):
    generate(page, "a green ball", steps=2, seed=5, negative_prompt="blue", guidance_scale=3)
    wait_for(page, "completed")
    generate(page, "another", steps=2)
    until(page, "document.getElementById('clip-title').textContent === 'another'")
    wait_for(page, "completed")
    page.fill("#filter", "green")
    assert page.locator("#cards li").count() == 1
    page.click("#cards button")
    values = {
        name: page.input_value(f"#{name}") for name in ("prompt", "seed", "negative_prompt", "guidance_scale")
    }
    assert values == {"prompt": "a green ball", "seed": "5", "negative_prompt": "blue", "guidance_scale": "3"}
    assert page.get_attribute("#lock", "aria-pressed") == "true"
    page.fill("#filter", "")
    before = page.locator("#cards li").count()
    page.click("#more-seeds")
    until(page, f"document.querySelectorAll('#cards li').length === {before + 4}")
    newest = server.get("/v1/videos?limit=4").json()["data"]
    assert {each["prompt"] for each in newest} == {"a green ball"}
    assert len({each["seed"] for each in newest}) == 4
    assert {each["settings"]["guidance_scale"] for each in newest} == {3}
    page.click("#remove")
    assert page.inner_text("#remove") == "Delete for good?"
    page.click("#remove")
    until(page, f"document.querySelectorAll('#cards li').length === {before + 3}")
    page.reload()
    page.wait_for_selector("#cards button")
    shown = page.evaluate("[...document.querySelectorAll('#cards li')].map((card) => card.dataset.id)")
    assert shown == [each["id"] for each in server.get(f"/v1/videos?limit={len(shown)}").json()["data"]]
    assert page.problems == []


def test_clip_and_gallery_never_overlap(page):
    """With a long form the clip scrolls along it, and not on over the cards."""
    page.set_viewport_size({"width": 1280, "height": 700})
    generate(page, "a red ball", steps=2)
    wait_for(page, "completed")
    page.evaluate("for (let turn = 0; turn < 6; turn++) document.getElementById('add-then').click()")
    for _ in range(12):
        page.mouse.wheel(0, 120)
        page.wait_for_timeout(30)
        gap = page.evaluate(
            """document.getElementById("gallery").getBoundingClientRect().top
            - document.getElementById("stage").getBoundingClientRect().bottom"""
        )
        assert gap > 0


def test_link_holds_all_settings(page, browser, server):  # noqa: F811
    page.fill("#prompt", "a blue box & more")
    page.check("#loop", force=True)
    page.evaluate("document.getElementById('more').open = true")
    page.fill("#num_frames", "8")
    page.click("#add-then")
    page.fill("#then input[type=number]", "4")
    page.fill("#then input:not([type=number])", "a red box")
    page.click("#share")
    other = browser.new_page()
    other.goto(page.url)
    other.wait_for_selector("#server[data-state=ready]")
    assert other.input_value("#prompt") == "a blue box & more"
    assert other.is_checked("#loop")
    assert other.input_value("#num_frames") == "8"
    assert other.input_value("#then input:not([type=number])") == "a red box"
    other.close()


def test_errors_are_shown_at_their_field(page):
    generate(page, width=33)
    page.wait_for_selector("#form-error:not([hidden])")
    assert "multiples of 8" in page.inner_text("#form-error")
    assert page.evaluate("document.activeElement.id") == "width"
    page.fill("#width", "")
    page.fill("#prompt", "")
    page.click("#generate")
    assert "Type what should move" in page.inner_text("#form-error")


def test_first_frame_from_a_file(page, server):
    page.set_input_files("#file", {"name": "red.png", "mimeType": "image/png", "buffer": png()})
    assert page.input_value("#input-list select") == "image"
    assert (page.is_visible("#strength-row"), page.inner_text("#strength-value")) == (True, "1")
    generate(page, "from a picture", steps=2)
    wait_for(page, "completed")
    newest = server.get("/v1/videos?limit=1").json()["data"][0]
    assert newest["inputs"] == ["image"]
    page.reload()
    page.wait_for_selector("#cards button")
    page.click("#cards button")
    page.wait_for_selector("#input-list li")  # a click brings the picture back, too
    assert page.locator("#others button").count() == 0  # and no setting that nobody chose
    assert page.problems == []


def test_keyboard_alone(page):
    generate(page, "with keys", steps=2)
    wait_for(page, "completed")
    page.keyboard.press("Tab")
    reached = []
    for _ in range(60):
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.closest('[id]')?.id")
        )
        page.keyboard.press("Tab")
    assert {"prompt", "loop", "seed", "dice", "lock", "pick", "generate", "screen", "filter", "cards"} <= set(
        reached
    )
    page.focus("#cards button")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(
        "[...document.querySelectorAll('#cards button')].indexOf(document.activeElement)"
    ) in (0, 1)
    page.keyboard.press("Enter")
    assert page.get_attribute("#cards button:focus", "aria-current") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(browser, server, scheme):  # noqa: F811
    page = browser.new_page(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, reduced_motion="reduce", has_touch=True
    )
    page.goto(server.url)
    page.wait_for_selector("#server[data-state=ready]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    generate(page, "on a phone", steps=2)
    wait_for(page, "completed")
    assert page.is_visible("#play")  # nothing plays by itself
    assert page.evaluate("document.getElementById('video').paused")
    page.click("#play")
    until(page, "!document.getElementById('video').paused")
    page.close()


def test_every_control_has_a_name(page):
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input:not([hidden]), textarea, select")].filter(
            (element) => !(element.labels?.length || element.ariaLabel || element.getAttribute("aria-label") || element.textContent)
        ).map((element) => element.outerHTML)"""
    )
    assert nameless == []


def test_the_page_is_small_and_alone():
    folder = files("latent_shift.serve") / "static"
    contents = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    assert sum(map(len, contents.values())) < 60 * 1024
    addresses = {
        address
        for content in contents.values()
        for address in re.findall(rb"https?://[^\s\"')]+", content)
        if address != b"http://www.w3.org/2000/svg"
    }
    assert addresses == set()
    assert b" style=" not in contents["index.html"]  # the policy forbids it
    assert b"innerHTML" not in contents["app.js"]
