"""Fault tolerance of the server: kills, a full disk, clients that go away. `python tests/server_faults.py` prints a table.

The server is a process with the smallest model. After the fault every job is asked for, and every result is compared, byte for byte,
with that of an undisturbed server.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from test_modes import sd
from tiny import make_texts

from latent_shift.benchmark.hardware import machine
from latent_shift.benchmark.server import Server
from latent_shift.files import write_json

LONG = {"num_inference_steps": 120, "num_frames": 16, "size": "64x64"}
NUM = 4


def requests() -> list[dict]:
    return [{**LONG, "prompt": f"prompt {seed}", "seed": seed} for seed in range(NUM)]


def add_all(server: Server) -> list[str]:
    return [server.request("POST", "/v1/videos", request)[1]["id"] for request in requests()]


def in_progress(server: Server, video_id: str) -> None:
    server.wait(f"/v1/videos/{video_id}", lambda each: each["progress"] > 5)


def worker_of(server: Server) -> psutil.Process:
    return max(psutil.Process(server.process.pid).children(), key=lambda child: child.memory_info().rss)


def results(server: Server, ids: list[str]) -> tuple[list[str], list[str]]:
    """Return what was lost, and the hashes of the results, when all jobs have ended."""
    lost, hashes = [], []
    for video_id in ids:
        video = server.finish(video_id)
        if video["status"] == "completed":
            hashes.append(
                hashlib.sha256((server.folder / "jobs" / video_id / "frames.png").read_bytes()).hexdigest()
            )
        else:
            hashes.append("")
            lost.append(f"{video['error']['code']}: {video['error']['message']}")
    return lost, hashes


def killed_server(server: Server, again: Callable[[], Server]) -> tuple[Server, list[str]]:
    ids = add_all(server)
    in_progress(server, ids[0])
    server.end(signal.SIGKILL)
    return again(), ids


def stopped_server(server: Server, again: Callable[[], Server]) -> tuple[Server, list[str]]:
    ids = add_all(server)
    in_progress(server, ids[0])
    server.end(signal.SIGTERM)
    return again(), ids


def killed_worker(server: Server, again: Callable[[], Server]) -> tuple[Server, list[str]]:
    ids = add_all(server)
    in_progress(server, ids[0])
    worker_of(server).kill()
    return server, ids


def client_gone(server: Server, again: Callable[[], Server]) -> tuple[Server, list[str]]:
    """Event streams and a download are cut; a synchronous request, whose client goes away, is cancelled and is no job of these."""
    ids = add_all(server)
    for path in (f"/v1/videos/{ids[0]}/events", "/v1/events", f"/v1/videos/{ids[1]}"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            connection.recv(10)
    body = json.dumps({**LONG, "prompt": "gone"}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/videos/sync HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(0.5)
    gone = server.wait("/v1/videos?limit=1", lambda page: page["data"][0]["prompt"] == "gone")["data"][0][
        "id"
    ]
    assert server.finish(gone)["error"]["code"] == "cancelled"
    return server, ids


def upload_cut_short(server: Server, again: Callable[[], Server]) -> tuple[Server, list[str]]:
    ids = add_all(server)
    head = "POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000\r\n\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall((head + part).encode() + bytes(5000))
        time.sleep(0.2)
    return server, ids


def full_disk(server: Server, again: Callable[[], Server]) -> tuple[Server, list[str]]:
    """The limit on the size of a file is set so low that no frame fits; then it is lifted, and new requests are served."""
    ids = add_all(server)
    in_progress(server, ids[0])
    process = psutil.Process(server.process.pid)
    hard = process.rlimit(psutil.RLIMIT_FSIZE)[1]
    process.rlimit(psutil.RLIMIT_FSIZE, (100, hard))
    server.wait(f"/v1/videos/{ids[0]}", lambda each: each["progress"] == 95)
    time.sleep(3)  # neither the result nor what became of the job can be written
    process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    return server, ids


def disk_full_of_requests(server: Server, again: Callable[[], Server]) -> tuple[Server, list[str]]:
    ids = add_all(server)
    process = psutil.Process(server.process.pid)
    hard = process.rlimit(psutil.RLIMIT_FSIZE)[1]
    process.rlimit(psutil.RLIMIT_FSIZE, (100, hard))
    status, answer = server.request("POST", "/v1/videos", {**LONG, "prompt": "refused"})
    process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    assert status == 507, answer
    return server, ids


FAULTS = {
    "server killed (SIGKILL), started again": killed_server,
    "server stopped (SIGTERM), started again": stopped_server,
    "worker killed": killed_worker,
    "clients gone: event streams, a synchronous request": client_gone,
    "upload cut short": upload_cut_short,
    "disk full when a result is written": full_disk,
    "disk full when a request comes": disk_full_of_requests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="also write the table to this .json")
    output = parser.parse_args().output
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        make_texts(folder / "texts")
        sd(folder / "texts").save_pretrained(folder / "model")
        with Server(folder / "undisturbed", folder / "model") as server:
            _, expected = results(server, add_all(server))
        for number, (name, fault) in enumerate(FAULTS.items()):
            data = folder / str(number)

            def start(servers: ExitStack, data: Path = data) -> Server:
                return servers.enter_context(Server(data, folder / "model"))

            with ExitStack() as servers:
                server, ids = fault(start(servers), lambda: start(servers))
                lost, hashes = results(server, ids)
                wrong = sum(got not in ("", want) for got, want in zip(hashes, expected, strict=True))
                more = server.request(
                    "POST", "/v1/videos", {**LONG, "prompt": "after", "num_inference_steps": 2}
                )[1]["id"]
                assert server.finish(more)["status"] == "completed"  # it serves on
            rows.append([name, "; ".join([*lost, *[f"{wrong} wrong results"] * (wrong > 0)]) or "nothing"])
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if output:
        write_json({**machine(), "rows": rows}, output)


if __name__ == "__main__":
    main()
