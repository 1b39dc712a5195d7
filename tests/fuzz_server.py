"""Send wrong requests to the server and count what becomes of each. `python tests/fuzz_server.py --num 5000`

Half are drawn by schemathesis from the server's own OpenAPI description, the other half are random forms: texts, numbers, files and
damage of every kind. Right is any answer below 500, 503 and 507 included, within the time; the memory of the server must not grow.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import random
import tempfile
import time
from pathlib import Path

import psutil
import torch
from PIL import Image
from test_modes import sd
from tiny import make_texts

from latent_shift.benchmark.hardware import machine
from latent_shift.benchmark.server import Server
from latent_shift.files import write_json
from latent_shift.serve.schema import FILE_FIELDS, VideoRequest

SECONDS = 30.0
"""Time after which a request counts as a hang."""
TEXTS = [
    "", "a", "\0", "🦀" * 300, "true", "-1", "1e309", "nan", "inf", "0x10", "٣", "{}", "[]", "null", "../../etc/passwd", "'; DROP TABLE jobs;--",
    "a\r\nb", "\ud7ff", "((a:1.5)", "<script>alert(1)</script>", "%s%n", "1,5", "32x32", "x" * 70_000, "data:image/png;base64,AAAA", "http://[::1]/",
]  # fmt: skip


def picture(rng: random.Random) -> bytes:
    """Return a picture, perhaps damaged, perhaps huge when it is decoded."""
    file = io.BytesIO()
    side = rng.choice([1, 8, 32, 300, 6000])
    image = Image.new(rng.choice(["RGB", "RGBA", "L", "1", "P"]), (side, rng.choice([1, side])))
    kind = rng.choice(["PNG", "GIF", "WEBP", "BMP", "TIFF"])
    frames = [image.copy() for _ in range(rng.choice([0, 0, 3]))] if kind in ("GIF", "WEBP") else []
    image.save(file, kind, **({"save_all": True, "append_images": frames} if frames else {}))
    content = bytearray(file.getvalue())
    for _ in range(rng.choice([0, 0, 1, 20])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.choice([len(content), len(content), rng.randrange(len(content) + 1)])])


def random_form(rng: random.Random) -> dict:
    """Return arguments of `httpx.Client.request` for a random form or body."""
    names = [*VideoRequest.model_fields, *FILE_FIELDS, "colour", "prompt\0", ""]
    fields = {
        rng.choice(names): rng.choice([rng.choice(TEXTS), str(rng.randrange(-5, 40))])
        for _ in range(rng.randrange(7))
    }
    if rng.random() < 0.8:
        fields |= {
            "prompt": rng.choice(TEXTS) or "a",
            "num_inference_steps": "1",
            "num_frames": rng.choice(["1", "2"]),
        }
    path = rng.choice(["/v1/videos"] * 6 + ["/v1/videos/sync", "/v1/images/generations"])
    kind = rng.randrange(4)
    if kind == 0:
        return {
            "method": "POST",
            "url": path,
            "json": {**fields, rng.choice(names): rng.choice([None, [], {}, 1e308, -1, True, [[]]])},
        }
    if kind == 1:
        body = json.dumps(fields).encode()
        return {"method": "POST", "url": path, "content": body[: rng.randrange(len(body) + 1)], "headers": {"Content-Type": rng.choice(["application/json", "text/plain", "multipart/form-data", "multipart/form-data; boundary="])}}  # fmt: skip
    files = {
        rng.choice([*FILE_FIELDS, "prompt"]): (rng.choice(["a.png", "../a.mp4", "\0", "a" * 500]), picture(rng), rng.choice(["image/png", "video/mp4", ""]))
        for _ in range(kind - 1)
    }  # fmt: skip
    return {
        "method": "POST",
        "url": path,
        "data": {name: value for name, value in fields.items() if name},
        "files": files or None,
    }


def random_get(rng: random.Random, ids: list[str]) -> dict:
    """Return arguments for a random request without a body."""
    video_id = rng.choice([*ids[-20:], "video_0", "..%2f..", "%00", "a" * 3000, "🦀"])
    path = rng.choice(
        ["", "/content", "/events", "/cancel", "/input/image", "/input/..%2fframes.png", "/nothing"]
    )
    query = rng.choice(
        [
            "",
            "?format=gif",
            "?format=exe",
            "?variant=thumbnail",
            "?limit=-1",
            "?limit=1e9",
            "?after=x",
            "?download=maybe",
        ]
    )
    headers = rng.choice(
        [
            {},
            {"Range": "bytes=5-1"},
            {"Range": "bytes=0-0,-1"},
            {"Last-Event-ID": "\x7f"},
            {"Idempotency-Key": "x" * 300},
        ]
    )
    return {
        "method": rng.choice(["GET", "GET", "POST", "DELETE", "PUT"]),
        "url": f"/v1/videos/{video_id}{path}{query}",
        "headers": headers,
    }


class Counter:
    """Sends requests and counts their outcomes."""

    def __init__(self, server: Server):
        import httpx2

        self.client = httpx2.Client(base_url=server.url, timeout=SECONDS)
        self.statuses: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.ids: list[str] = []

    def send(self, **request) -> None:
        import httpx2

        try:
            with self.client.stream(**request) as answer:
                is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
                content = b"" if is_stream else answer.read()
        except httpx2.TimeoutException:
            self.faults.append(f"hang: {request!r:.300}")
            return
        except (
            httpx2.InvalidURL,
            httpx2.LocalProtocolError,
            UnicodeEncodeError,
            ValueError,
            TypeError,
            AttributeError,
        ):
            return  # the client itself refuses it
        except httpx2.RemoteProtocolError as error:
            self.statuses["connection closed"] += 1
            if "without sending" in str(error):
                self.faults.append(f"no answer: {request!r:.300}")
            return
        self.note(answer.status_code, content, repr(request))

    def note(self, status: int, content: bytes, request: str) -> None:
        self.statuses[str(status)] += 1
        if status == 500 or b"Traceback" in content:
            self.faults.append(f"{status}: {content[:200]!r} for {request[:300]}")
        if status >= 400 and b'"error"' not in content:
            self.faults.append(f"{status} without an error: {content[:100]!r} for {request[:300]}")
        if status == 200 and content.startswith(b'{"id":"video_'):
            self.ids.append(json.loads(content)["id"])


def from_openapi(counter: Counter, num: int) -> None:
    """Send requests that schemathesis draws from the description of the API."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_dict(counter.client.get("/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=max(1, num // len(operations)),
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        def send(case):
            request = case.as_transport_kwargs(base_url=str(counter.client.base_url))
            url = request.pop("url")
            if not url.endswith("/events"):
                counter.send(
                    url=url,
                    **{
                        name: value
                        for name, value in request.items()
                        if name in ("method", "headers", "params", "json", "data", "files", "content")
                    },
                )

        send()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="also write the counts to this .json")
    arguments = parser.parse_args()
    rng, start = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        make_texts(folder / "texts")
        sd(folder / "texts").save_pretrained(folder / "model")
        options = ("--max-rate", "1e9", "--max-queue", "100000", "--max-gib", "0.2")
        with Server(folder / "data", folder / "model", *options) as server:
            server.wait("/v1/workers", lambda each: each["data"][0]["status"] == "idle")
            process, counter = psutil.Process(server.process.pid), Counter(server)
            sizes = []
            for part in range(10):
                from_openapi(counter, arguments.num // 20)
                while counter.statuses.total() < arguments.num * (part + 1) // 10:
                    counter.send(**random_form(rng))
                    counter.send(**random_get(rng, counter.ids))
                sizes.append(process.memory_info().rss / 2**20)
                print(
                    f"part {part}: {sizes[-1]:.0f} MiB, {counter.statuses.total()} answers, {len(counter.faults)} faults",
                    flush=True,
                )
            assert server.request("GET", "/health")[0] == 200
    result = {
        **machine(), "requests": counter.statuses.total(), "statuses": dict(sorted(counter.statuses.items())),
        "faults": len(counter.faults), "MiB of the server after each tenth": [round(size) for size in sizes],
        "minutes": round((time.monotonic() - start) / 60, 1),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    for fault in counter.faults[:20]:
        print(fault)
    if arguments.output:
        write_json(result, arguments.output)


if __name__ == "__main__":
    main()
