"""The server as a process: its start, its end, its workers' deaths, and the clients that people use."""

import signal
import subprocess
import sys
import threading
import time
import urllib.request

import psutil
import pytest
from limited_process import run_process

from latent_shift.benchmark.server import Server
from latent_shift.serve.server import name_models


def run_command(*words):
    """Return the exit status and standard error of `latent-shift` in a new interpreter."""
    result = subprocess.run(
        [sys.executable, "-m", "latent_shift", *map(str, words)], capture_output=True, text=True
    )
    return result.returncode, result.stderr


LONG = {"prompt": "a long one", "num_inference_steps": 150, "num_frames": 16, "size": "64x64", "seed": 1}
SHORT = {"prompt": "a short one", "num_inference_steps": 2, "num_frames": 2, "seed": 1}


def worker_of(server):
    """Return the process of the worker: the child that uses most memory."""
    return max(psutil.Process(server.process.pid).children(), key=lambda child: child.memory_info().rss)


@pytest.mark.slow  # test_stop_with_an_open_stream and test_serve.py have the same laws without loading a model three times
def test_life_of_a_server(video_model, tmp_path):
    """Start, death of a worker, stop with an open stream, kill, restart: every job ends once. One test, because each start loads
    a model for seconds."""
    with Server(tmp_path, video_model) as server:
        assert server.request("GET", "/health") == (200, {"status": "ok"})
        status, early = server.request("GET", "/ready")
        assert (status, early["error"]["code"]) == (503, "not_ready")
        _, first = server.request("POST", "/v1/videos", LONG)  # queued before the model is loaded
        server.wait(f"/v1/videos/{first['id']}", lambda each: each["progress"] > 5)
        worker_of(server).kill()
        again = server.wait(
            f"/v1/videos/{first['id']}", lambda each: each["attempts"] == 2 and each["progress"] > 0
        )
        assert again["status"] == "in_progress"
        _, second = server.request("POST", "/v1/videos", SHORT)

        lines, closed = [], threading.Event()

        def listen():
            with urllib.request.urlopen(f"{server.url}v1/videos/{second['id']}/events") as stream:
                lines.extend(stream)
            closed.set()

        threading.Thread(target=listen, daemon=True).start()
        while not lines:
            time.sleep(0.05)
        assert server.end(signal.SIGTERM) < 5
        assert server.process.returncode in (0, -signal.SIGTERM)
        assert closed.wait(5)

    with Server(tmp_path, video_model) as server:
        # The stopped job is no third attempt.
        server.wait(
            f"/v1/videos/{first['id']}", lambda each: each["status"] == "in_progress" and each["progress"] > 0
        )
        children = psutil.Process(server.process.pid).children()
        server.end(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive  # no worker outlives its server

    with Server(tmp_path, video_model) as server:
        failed = server.finish(first["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "interrupted")
        assert server.finish(second["id"])["status"] == "completed"
        server.request("POST", "/v1/videos", LONG)
        children = psutil.Process(server.process.pid).children()
        server.process.send_signal(signal.SIGINT)
        assert server.end(signal.SIGINT) < 10  # at once, and its worker, too
        assert psutil.wait_procs(children, timeout=5)[1] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "expected a --token"),
        (("--token", "short"), "expected 8 ASCII characters or more"),
        (("--token", "with a space in it"), "without spaces"),
        (("--origin", "https://example.com/"), "expected a scheme and a name"),
        (("--origin", "*"), "expected a scheme and a name"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--model", "a=emoji", "--model", "a=other"), "'a' is emoji already"),
        (("--device", "gpu"), "expected cpu, cuda"),
        (("--allow-host", "http://x/"), "expected a name without scheme"),
        (("--port", "70000"), "65535"),
        (("--host", "no.such.host.invalid", "--token", "long-enough"), "cannot listen"),
    ],
)
def test_refused_starts(options, words, tmp_path):
    status, _, errors, _ = run_process(
        ["serve", "--data", tmp_path / "data", "--no-open", *options], tmp_path
    )
    assert status != 0
    assert words in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "data" / "jobs.sqlite").exists()


def test_port_in_use(tmp_path):
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        status, _, errors, _ = run_process(
            ["serve", "--data", tmp_path, "--port", port, "--no-open"], tmp_path
        )
    assert status == 1
    assert f"cannot listen at 127.0.0.1:{port}" in errors


def test_stop_with_an_open_stream(tmp_path):
    """The server answers at once, while its model is loaded behind it; it ends in time, and what was queued is there after a restart."""
    with Server(tmp_path, "emoji") as server:
        assert server.start_seconds < 10  # loose, for busy machines; `bench serve` prints the time
        status, early = server.request("GET", "/ready")
        assert (status, early["error"]["code"]) == (503, "not_ready")
        second = run_command("serve", "--data", tmp_path, "--port", "0", "--no-open")[1]
        assert second.endswith("another server uses it; expected another --data folder\n")
        _, video = server.request("POST", "/v1/videos", SHORT)
        with urllib.request.urlopen(f"{server.url}v1/videos/{video['id']}/events") as stream:
            assert stream.readline() == b"event: queued\n"
            assert server.end(signal.SIGTERM) < 5
            stream.read()  # and the stream has ended, too
        assert server.process.returncode in (0, -signal.SIGTERM)
    with Server(tmp_path, "emoji") as server:
        assert server.request("GET", f"/v1/videos/{video['id']}")[1]["status"] in ("queued", "in_progress")


@pytest.mark.skipif(sys.platform == "darwin", reason="has the device")
def test_models_that_cannot_be_loaded_end_the_server(tmp_path):
    """It would refuse every request, and a supervisor would take it for running."""
    status, errors = run_command(
        "serve", "--data", tmp_path, "--port", "0", "--no-open", "--device", "mps", "--log-level", "warning"
    )
    assert status == 1
    assert errors.splitlines()[-1].startswith("latent-shift: no worker could load its models: ")
    assert "Traceback" not in errors


def test_clients_behind_a_proxy(tmp_path):
    """Each client of a trusted proxy has its own number of requests a minute."""
    with Server(tmp_path, "emoji", "--max-rate", "1", "--trusted-proxy", "127.0.0.1") as server:
        for client in ("192.0.2.1", "192.0.2.2"):
            statuses = [
                server.fetch("POST", "/v1/videos", SHORT, {"X-Forwarded-For": client})[0] for _ in range(2)
            ]
            assert statuses == [200, 429]


def test_ids_of_models(tmp_path):
    run = tmp_path / "emoji-mine" / "model"
    run.mkdir(parents=True)
    (tmp_path / "photos.safetensors").touch()
    assert name_models(["emoji", str(run), str(tmp_path / "photos.safetensors"), f"best={run}"]) == {
        "emoji": "emoji",
        "emoji-mine": str(run),
        "photos": str(tmp_path / "photos.safetensors"),
        "best": str(run),
    }
