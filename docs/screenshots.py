"""Take the screenshots of docs/serving: `python docs/screenshots.py` starts a server with `emoji`, drives the page in Chromium and looks
at every state."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent / "serving"
PROMPTS = ("unicorn", "red heart", "spider", "face with tears of joy", "waving hand", "rocket")


def generate(page: Page, prompt: str, seed: int = 0) -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.keyboard.press("Escape")
    page.click("#generate")


def wait_for(page: Page, state: str) -> None:
    page.wait_for_selector(f"#stage[data-state={state}]", timeout=120_000)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as data, sync_playwright() as driver:
        command = [sys.executable, "-m", "latent_shift", "serve", "--data", data, "--port", "0", "--no-open"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            address = server.stdout.readline().strip()
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1180, "height": 800})
            page.goto(address)
            page.wait_for_selector("#server[data-state=ready]", timeout=120_000)
            page.screenshot(path=FOLDER / "empty.png")
            page.click("#prompt")
            page.keyboard.type("a uni")
            page.wait_for_selector("#suggestions li")
            page.screenshot(path=FOLDER / "typing.png")
            for prompt in PROMPTS[:-1]:
                generate(page, prompt)
                page.wait_for_timeout(300)
            page.screenshot(path=FOLDER / "queued.png")
            page.wait_for_timeout(1000)
            wait_for(page, "completed")
            generate(page, PROMPTS[-1])
            page.wait_for_selector("#preview:not([hidden])", timeout=120_000)
            page.screenshot(path=FOLDER / "running.png")
            wait_for(page, "completed")
            page.wait_for_timeout(1500)
            page.screenshot(path=FOLDER / "done.png", full_page=True)
            page.evaluate("document.getElementById('more').open = true")
            page.fill("#width", "33")
            page.click("#generate")
            page.wait_for_selector("#form-error:not([hidden])")
            page.screenshot(path=FOLDER / "error.png")
            page.close()
            for name, options in {
                "dark": {"viewport": {"width": 1180, "height": 1000}, "color_scheme": "dark"},
                "phone": {
                    "viewport": {"width": 390, "height": 844},
                    "has_touch": True,
                },
            }.items():
                page = browser.new_page(**options)
                page.goto(address)
                page.wait_for_selector("#cards button")
                page.click("#cards li:nth-child(2) button")
                wait_for(page, "completed")
                page.wait_for_timeout(1500)
                page.screenshot(path=FOLDER / f"{name}.png", full_page=name == "phone")
                page.close()
            browser.close()
        finally:
            server.terminate()
            server.wait(20)
    for path in FOLDER.glob("*.png"):
        Image.open(path).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main()
