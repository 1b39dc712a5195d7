"""A server inside the process of a test: the real application, queue and generator, with a tiny model."""

import io
import json
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
from PIL import Image

from latent_shift import video
from latent_shift.serve.app import create_app
from latent_shift.serve.generator import Generator
from latent_shift.serve.jobs import JobStore
from latent_shift.serve.server import model_info
from latent_shift.serve.service import Limits, Settings
from latent_shift.serve.uploads import UploadLimits
from latent_shift.serve.workers import WorkerDied

HOST = "http://127.0.0.1"
LIMITS = Limits(
    num_frames=24, side=64, num_inference_steps=60, uploads=UploadLimits(bytes=100_000, num_frames=12)
)
REQUEST = {"prompt": "a red ball", "num_inference_steps": 2, "num_frames": 4, "seed": 7}


class ThreadWorker:
    """A worker in this process. `dies` makes its next jobs end as those of a killed process do."""

    def __init__(self, number, models, make=Generator):
        self.name, self._models, self._make = f"worker {number}", models, make
        self._generator = None
        self.deaths = 0

    def start(self):
        self._generator = self._generator or self._make(self._models, "cpu")

    def run(self, task):
        for message in self._generator.run(task):
            yield message
            if self.deaths:
                self.deaths -= 1
                raise WorkerDied(f"{self.name} ended")

    def cancel(self, job_id):
        self._generator.cancel(job_id)

    def stop(self):
        pass


@contextmanager
def running(folder, models, *, settings=None, names=None, workers=None, **store):
    """Yield a client of a server with models in a data folder, and its service as `client.service`."""
    from starlette.testclient import TestClient

    models = {str(model): str(model) for model in models}
    app = create_app(
        JobStore(folder, **store),
        [ThreadWorker(1, models)] if workers is None else workers,
        {model: model_info(model) for model in models},
        names=dict.fromkeys(models) | (names or {}),
        settings=settings or Settings(),
    )
    with TestClient(app, base_url=HOST, raise_server_exceptions=False) as client:
        client.service = app.state.service
        yield client


@contextmanager
def listening(folder, models, **options):
    """Yield the address of such a server that listens to browsers, from a thread of this process."""
    import uvicorn

    with running(folder, models, **options) as client, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        # The test client has started the application; this only listens.
        server = uvicorn.Server(
            uvicorn.Config(client.app, lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            client.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            yield client
        finally:
            server.should_exit = True
            thread.join()


def png(width=32, height=32, colour=(200, 0, 0)):
    """Return the content of a picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def events_of(client, video_id, **headers):
    """Return the server-sent events of a video until it ends, as (name, data, id)."""
    answer = client.get(f"/v1/videos/{video_id}/events", headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in answer.text.split("\n\n") if block.strip() and not block.startswith(":")]
    fields = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
    return [(event["event"], json.loads(event["data"]), event.get("id")) for event in fields]


def create(api, expect=200, **fields):
    """Queue a video and return its object."""
    answer = api.post("/v1/videos", json={**REQUEST, **fields})
    assert answer.status_code == expect, answer.text
    return answer.json()


def finish(api, video_id):
    """Return a video when it has ended."""
    for _ in range(600):
        result = api.get(f"/v1/videos/{video_id}").json()
        if result["status"] in ("completed", "failed"):
            return result
        time.sleep(0.02)
    raise AssertionError(f"{video_id} did not end")


def error_of(answer, status):
    """Return the error of an answer, which has the shape of every error."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return error


def film(tmp_path, num_frames, suffix=".mp4"):
    """Return the content of a video in which every frame differs."""
    frames = np.full((num_frames, 32, 32, 3), 200, np.uint8)
    frames[:, :, :8] = np.arange(num_frames)[:, None, None, None] * 9
    return video.write(frames, tmp_path / f"film{suffix}", fps=8).read_bytes()
