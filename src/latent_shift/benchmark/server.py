"""What a user of `latent-shift serve` waits for, and whether it loses anything: measured on the server as a process."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TIMEOUT = 120.0


class Server:
    """`latent-shift serve` as a process, on a free port.

    Args:
        folder: data folder.
        model: a name or folder.
        options: more words of the command.

    Attributes:
        url: address of the page.
        start_seconds: until the server answered.
    """

    def __init__(self, folder: Path, model: str | Path, *options: str):
        command = [
            sys.executable,
            "-m",
            "latent_shift",
            "serve",
            "--model",
            str(model),
            "--data",
            str(folder),
        ]
        start = time.perf_counter()
        self.folder = folder
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--no-open", *options], stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url.startswith("http://"):
            raise RuntimeError(f"the server ended with status {self.process.wait()}")
        self.port = int(self.url.rstrip("/").rpartition(":")[2])
        self.fetch("GET", "/health")
        self.start_seconds = time.perf_counter() - start

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    def fetch(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return status and content of an answer; `body` is sent as JSON."""
        with contextlib.closing(self.connect()) as connection:
            kind = {} if body is None else {"Content-Type": "application/json"}
            connection.request(
                method, path, None if body is None else json.dumps(body), {**kind, **(headers or {})}
            )
            answer = connection.getresponse()
            return answer.status, answer.read()

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Return status and JSON of an answer."""
        status, content = self.fetch(method, path, body)
        return status, json.loads(content)

    def wait(self, path: str, until: Callable[[Any], bool], seconds: float = 90) -> Any:
        """Return the JSON of a path when it is as wanted."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            _, value = self.request("GET", path)
            if until(value):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{path}: still {value}")

    def finish(self, video_id: str) -> Any:
        """Return a video when it has ended."""
        return self.wait(f"/v1/videos/{video_id}", lambda video: video["status"] in ("completed", "failed"))

    def wait_ready(self) -> None:
        """Wait until all workers have loaded their models."""

        def ready(workers: Any) -> bool:
            if failed := [worker["error"] for worker in workers["data"] if worker["status"] == "failed"]:
                raise RuntimeError(f"a worker failed: {failed[0]}")
            return all(worker["status"] in ("idle", "busy") for worker in workers["data"])

        self.wait("/v1/workers", ready, seconds=600)

    def count(self) -> Counter[str]:
        """Count the jobs of each status."""
        counts: Counter[str] = Counter()
        path = "/v1/videos?limit=100&order=asc"
        while True:
            _, page = self.request("GET", path)
            counts.update(video["status"] for video in page["data"])
            if not page["has_more"]:
                return counts
            path = f"/v1/videos?limit=100&order=asc&after={page['last_id']}"

    def end(self, signal_number: int = signal.SIGTERM) -> float:
        """Send a signal; return the seconds until the server has ended."""
        start = time.perf_counter()
        self.process.send_signal(signal_number)
        self.process.wait(30)
        return time.perf_counter() - start

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def durability(model: str, *, num: int, clients: int, kills: int, seed: int = 0) -> dict[str, Any]:
    """Send requests by many clients to a server that is killed and restarted meanwhile, and count what became of each.

    Each client sends a request with an Idempotency-Key again until it has an answer. The requests are for one frame in one
    step, so that what is measured is the queue.

    Args:
        model: a name or folder.
        num: requests in all.
        clients: threads that send them.
        kills: SIGKILLs, at random moments.
        seed: of these moments.
    """
    rng = random.Random(seed)
    body = {"num_inference_steps": 1, "num_frames": 1}
    options = ("--max-queue", str(num), "--max-rate", "1e9")
    ids: dict[int, set[str]] = {index: set() for index in range(num)}
    resent = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), model, *options)
        restarting = threading.Lock()

        def send(index: int) -> None:
            while True:
                try:
                    with contextlib.closing(server.connect()) as connection:
                        headers = {"Content-Type": "application/json", "Idempotency-Key": f"request {index}"}
                        request = {**body, "prompt": f"request {index}", "seed": index}
                        connection.request("POST", "/v1/videos", json.dumps(request), headers)
                        answer = connection.getresponse()
                        content = answer.read()
                    if answer.status == 200:
                        ids[index].add(json.loads(content)["id"])
                        return
                    raise RuntimeError(f"status {answer.status}: {content[:200]!r}")
                except (OSError, http.client.HTTPException):
                    resent["requests"] += 1
                    time.sleep(0.05)
                    with restarting:  # the server is back when this is free
                        pass

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            sending = [pool.submit(send, index) for index in range(num)]
            for turn in range(kills):
                target = num * (turn + 0.2 + 0.6 * rng.random()) / kills
                while True:  # first while requests still come, then after a part of the jobs has ended
                    answered = [future for future in sending if future.done()]
                    for future in answered:
                        future.result()  # raises what a refused request raised
                    if turn == 0:
                        reached = len(answered)
                    else:
                        counts = server.count()
                        reached = counts["completed"] + counts["failed"]
                    if reached >= target:
                        break
                    time.sleep(0.002 if turn == 0 else 0.02)
                with restarting:
                    server.end(signal.SIGKILL)
                    server.__exit__()
                    server = Server(Path(folder), model, *options)
            for future in sending:
                future.result()
        while (counts := server.count())["queued"] + counts["in_progress"]:
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        sizes = [
            sum(1 for _ in (Path(folder) / "jobs" / next(iter(each))).glob("frames.png"))
            for each in ids.values()
            if each
        ]
        server.end()
        server.__exit__()
    return {
        "requests": num, "clients": clients, "kills": kills, "completed": counts["completed"], "failed with a reason": counts["failed"],
        "lost": num - sum(counts.values()), "made twice": counts.total() - len(set.union(*ids.values())), "results on the disk": sum(sizes),
        "requests sent again": resent["requests"], "seconds": round(seconds, 1),
    }  # fmt: skip


def waiting(model: str, *, rounds: int = 20, steps: int = 1) -> dict[str, float]:
    """Measure what one user waits for: the start, a clip against the same call of a pipeline in a warm process, the first
    preview, and the end.

    Returns:
        Seconds: `start` (until /health answers), `ready` (models loaded), `clip` and `pipeline` (medians), `overhead` (median of
        the differences of each round), `first_event`, `first_preview` (medians, for a call with the model's steps; none for a model
        without previews), `first_paint` of the page in Chromium, if it is there, and `stop`.
    """
    from latent_shift.pipelines.loading import load
    from latent_shift.pipelines.request import Request, generate_clip

    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    clips, calls, previews, events = [], [], [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder), model, "--max-rate", "1e9") as server,
    ):
        begun = time.perf_counter()
        server.wait_ready()
        ready = server.start_seconds + time.perf_counter() - begun
        for turn in range(rounds + 1):
            request = {"prompt": "a red heart", "num_inference_steps": steps, "seed": turn}
            start = time.perf_counter()
            status, content = server.fetch("POST", "/v1/videos/sync", request)
            middle = time.perf_counter()
            if status != 200:
                raise RuntimeError(f"status {status}: {content[:200]!r}")
            generate_clip(Request(**request), pipe)  # type: ignore[arg-type]
            if turn:  # the first is a warm-up
                clips.append(middle - start)
                calls.append(time.perf_counter() - middle)
        for turn in range(3):
            first = _first_events(server, {"prompt": "rocket", "seed": turn})
            events.append(first["progress"])
            if "preview" in first:
                previews.append(first["preview"])
        paint = first_paint(f"http://127.0.0.1:{server.port}/")
        stop = server.end()
    overhead = statistics.median(clip - call for clip, call in zip(clips, calls, strict=True))
    result = {
        "start": server.start_seconds, "ready": ready, "clip": statistics.median(clips), "pipeline": statistics.median(calls),
        "overhead": overhead, "first_event": statistics.median(events), "stop": stop,
    }  # fmt: skip
    more = {"first_preview": statistics.median(previews) if previews else None, "first_paint": paint}
    return result | {name: value for name, value in more.items() if value is not None}


def first_paint(address: str, rounds: int = 5) -> float | None:
    """Return the median of the seconds until a new browser has painted the page; None without Playwright or Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if find_spec("playwright") is None or chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(rounds):
            page = browser.new_page()
            page.goto(address)
            page.wait_for_timeout(1000)
            entry = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            if (milliseconds := page.evaluate(entry)) is not None:
                seconds.append(milliseconds / 1000)
            page.close()
        browser.close()
    return statistics.median(seconds) if seconds else None


def _first_events(server: Server, request: dict[str, Any]) -> dict[str, float]:
    """Return the seconds from a request to its first event of each name; then cancel it."""
    start = time.perf_counter()
    _, video = server.request("POST", "/v1/videos", request)
    first: dict[str, float] = {}
    with contextlib.closing(server.connect()) as connection:
        connection.request("GET", f"/v1/videos/{video['id']}/events")
        for line in _lines(connection.getresponse()):
            if line.startswith("event: "):
                first.setdefault(line.removeprefix("event: "), time.perf_counter() - start)
                if "preview" in first or "completed" in first or "failed" in first:
                    break
    server.request("POST", f"/v1/videos/{video['id']}/cancel")
    return first


def _lines(answer: http.client.HTTPResponse) -> Iterator[str]:
    while line := answer.readline():
        yield line.decode().rstrip("\n")


def throughput(
    model: str, workers: Sequence[int], *, num: int = 20, steps: int = 4, ray: bool = True
) -> dict[str, float]:
    """Measure clips a second for several numbers of workers, each with one thread.

    Args:
        model: a name or folder.
        workers: numbers of workers.
        num: clips of each measurement.
        steps: of a clip.
        ray: workers of a local Ray cluster, else processes.
    """
    rates = {}
    for count in workers:
        engine = ["--ray", "local"] if ray else []
        options = ["--workers", str(count), "--threads", "1", "--max-rate", "1e9", *engine]
        with tempfile.TemporaryDirectory() as folder, Server(Path(folder), model, *options) as server:
            server.wait_ready()
            for index in range(count):  # a first call of each
                server.request(
                    "POST", "/v1/videos", {"prompt": "warm", "num_inference_steps": 1, "seed": index}
                )
            _drain(server)
            start = time.perf_counter()
            for index in range(num):
                server.request(
                    "POST",
                    "/v1/videos",
                    {"prompt": "a red heart", "num_inference_steps": steps, "seed": index},
                )
            _drain(server)
            rates[str(count)] = num / (time.perf_counter() - start)
            server.end()
    return rates


def _drain(server: Server) -> None:
    """Wait until no job is left, by asking seldom: the server shares the cores with its workers."""
    while (
        json.loads(server.fetch("GET", "/v1/videos?limit=1&status=queued")[1])["data"]
        or json.loads(server.fetch("GET", "/v1/videos?limit=1&status=in_progress")[1])["data"]
    ):
        time.sleep(0.2)
