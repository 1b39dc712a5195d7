"""Measure the page of `latent-shift export --web` in a headless Chromium, and take its picture.

    latent-shift export emoji-page --web
    python docs/browser.py emoji-page -o docs/results/browser.json --screenshot docs/serving/browser.png

Times are of a first visit and of clips in the loaded page, with one thread and with those that the page takes; memory is what the
page's process has in RAM at its peak.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from latent_shift.benchmark.hardware import machine
from latent_shift.files import write_json

PROMPT = "rocket"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def renderer_gib() -> float:
    """Return the peak memory of the largest renderer process of Chromium."""
    peaks = [0.0]
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if b"--type=renderer" in status.with_name("cmdline").read_bytes():
                peak = status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()
                peaks.append(int(peak[0]) / 2**20 if peak else 0.0)
    return max(peaks)


def measure(
    browser: Browser, address: str, *, threads: bool, clips: int, screenshot: Path | None
) -> dict[str, Any]:
    """Return seconds until the page is ready, seconds of clips (the first and the median of the others), and memory."""
    # Without its service worker the page is not isolated, and WebAssembly has one thread.
    context = browser.new_context(
        service_workers="allow" if threads else "block", viewport={"width": 1000, "height": 640}
    )
    page = context.new_page()
    start = time.perf_counter()
    page.goto(f"{address}?webgpu=off")
    page.wait_for_selector("body[data-ready=true]", timeout=300_000)
    result: dict[str, Any] = {
        "engine": page.inner_text("#engine").partition(".")[0],
        "ready_seconds": time.perf_counter() - start,
    }
    seconds = []
    page.fill("#prompt", PROMPT)
    page.check("#keep")
    for seed in range(clips + 1):
        page.fill("#seed", str(seed))
        page.evaluate("delete document.body.dataset.state")
        start = time.perf_counter()
        page.click("#go")
        page.wait_for_selector("body[data-state=done]", timeout=600_000)
        seconds.append(time.perf_counter() - start)
    result |= {
        "steps": int(page.input_value("#steps")),
        "first_clip_seconds": seconds[0],
        "clip_seconds": statistics.median(seconds[1:]),
        "peak_gib": renderer_gib(),
    }
    if screenshot:
        page.screenshot(path=screenshot)
    context.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--clips", type=int, default=3)
    arguments = parser.parse_args()
    manifest = json.loads((arguments.folder / "web.json").read_text(encoding="utf-8"))
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=arguments.folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    skipped = manifest["runtime"]["webgpu"]["binary"]
    result = machine("cpu") | {
        "model": manifest["model"],
        "download_mb": sum(size for name, size in manifest["files"].items() if name != skipped) / 1e6,
    }
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    for threads in (False, True):
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            result["all threads" if threads else "one thread"] = measure(
                browser, f"http://127.0.0.1:{server.server_port}/", threads=threads, clips=arguments.clips,
                screenshot=arguments.screenshot if threads else None,
            )  # fmt: skip
            browser.close()
    print(json.dumps(result, indent=1))
    if arguments.output:
        write_json(result, arguments.output)


if __name__ == "__main__":
    main()
