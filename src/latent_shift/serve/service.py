"""What the routes call: one object that holds the jobs, the workers and the models of a server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from latent_shift.data.workers import WorkerDied as CheckDied
from latent_shift.data.workers import Workers
from latent_shift.models.names import Names
from latent_shift.pipelines.request import size_like
from latent_shift.serve import security
from latent_shift.serve.events import Events
from latent_shift.serve.jobs import Job, JobStore, KeyReused, QueueFull
from latent_shift.serve.metrics import Metrics
from latent_shift.serve.queue import Queue
from latent_shift.serve.schema import MAX_CHARACTERS, ApiError, ModelInfo, VideoRequest, blamed_field, resolve
from latent_shift.serve.uploads import MediaShape, UploadLimits, inspect, name_reference, too_large
from latent_shift.serve.workers import Worker

log = logging.getLogger("latent_shift")

STOP_SECONDS = 2.5
MAX_LARGE_BODIES = 4
"""Bodies with files that are read at once; others wait."""
MAX_CHECKS = 8
"""Uploads that may wait to be decoded."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    num_frames: int = 256
    side: int = 1024
    pixels: int = 16 * 1024 * 1024
    """Pixels of all frames."""
    num_inference_steps: int = 150
    requests_per_minute: float = 240
    uploads: UploadLimits = field(default_factory=UploadLimits)


@dataclass(frozen=True)
class Settings:
    """How a server is run.

    Attributes:
        token: that clients must send; None: none.
        hosts: names of the server in the Host header; None allows all.
        origins: of other sites whose pages may use it (CORS).
        web: folder of a page that runs a model in the browser, served below /web/.
    """

    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    hosts: frozenset[str] | None = frozenset(security.LOOPBACK)
    origins: tuple[str, ...] = ()
    web: Path | None = None


class Service:
    """The jobs, workers and models of a server; what its routes call.

    Attributes:
        on_failure: called by another thread when no worker could load its models, see `Queue.failure`.

    Args:
        store: of the jobs; closed by `stop`.
        workers: not started.
        models: by id; the first is the default.
        names: what each model knows, for suggestions.
        settings: of the server.
    """

    def __init__(
        self,
        store: JobStore,
        workers: Sequence[Worker],
        models: Mapping[str, ModelInfo],
        names: Mapping[str, Names | None],
        settings: Settings,
    ):
        self.store, self.models, self.names, self.settings = store, models, names, settings
        self.events, self.metrics = Events(), Metrics(store)
        self.queue = Queue(
            store,
            self.events,
            workers,
            describe=self.video,
            metrics=self.metrics,
            on_failure=lambda: self.on_failure(),
        )
        self.rate = security.RateLimit(settings.limits.requests_per_minute)
        self._checks: Workers | None = None  # started by the first upload
        self._num_checks = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: threading.Thread | None = None
        self._has_stopped = False
        self.on_failure: Callable[[], None] = lambda: None
        self.large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.events.attach(loop)
        again, failed = self.store.recover()
        if again or failed:
            log.warning("%d jobs that were in progress are queued again, %d failed", again, failed)
        self.queue.start()

    def begin_stop(self) -> None:
        """Take no more jobs, let the running steps end, and end the event streams, which would keep the server from ending.
        May be called in a signal handler."""
        self.queue.stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_stop)

    def _begin_stop(self) -> None:
        if self._stopping is None:
            self.events.close()
            self._stopping = threading.Thread(target=self.queue.stop, args=(STOP_SECONDS,))
            self._stopping.start()

    def stop(self) -> None:
        """Stop everything, once; called in a thread, when no request runs any more."""
        if self._has_stopped:
            return
        self._has_stopped = True
        if self._stopping is None:
            self.queue.stop(STOP_SECONDS)
        else:
            self._stopping.join()
        if self._checks is not None:
            self._checks.__exit__()
        self.store.close()

    def job(self, job_id: str, param: str = "video_id") -> Job:
        """Return a job; raise ApiError that names a parameter if there is none."""
        job = None if self.queue.is_deleted(job_id) else self.store.get(job_id)
        if job is None or job.kind != "video" or (job.expires or math.inf) <= time.time():
            raise ApiError(404, f"no video {job_id!r:.60}", code="not_found", param=param)
        return job

    def finished(self, job_id: str) -> Job:
        job = self.job(job_id)
        if job.status != "completed":
            raise ApiError(409, f"video {job_id} is {job.status}, expected completed", code="video_not_ready")
        return job

    def video(self, job: Job) -> dict[str, Any]:
        """Return the video object of a job."""
        model, request, result = self.models.get(job.model), job.request, job.result
        settings = {"model": job.model, **request, **(result.get("settings") or {})}
        num_frames = (
            result.get("num_frames") or request.get("num_frames") or (model.num_frames if model else 16)
        )
        fps = result.get("fps") or request.get("fps") or (model.fps if model else 8)
        width = result.get("width") or request.get("width") or (model and model.width) or 0
        height = result.get("height") or request.get("height") or (model and model.height) or 0
        progress = self.queue.progress(job.id) if job.status == "in_progress" else None
        percent = 100 if job.status == "completed" else progress.percent if progress else 0
        error = (
            None if job.error_code is None else {"code": job.error_code, "message": job.error_message or ""}
        )
        return {
            "id": job.id, "object": "video", "model": job.model, "status": job.status, "progress": percent,
            "created_at": int(job.created), "started_at": _second(job.started),
            "completed_at": _second(job.ended) if job.status == "completed" else None, "expires_at": _second(job.expires),
            "prompt": request["prompt"], "size": f"{width}x{height}", "seconds": f"{num_frames / fps:g}", "seed": request["seed"],
            "num_frames": num_frames, "fps": fps, "attempts": job.attempts,
            "queue_position": self.store.position(job) if job.status == "queued" else None,
            "remixed_from_video_id": None, "error": error, "settings": settings, "inputs": job.inputs,
        }  # fmt: skip

    async def create(
        self,
        request: VideoRequest,
        inputs: dict[str, bytes],
        *,
        key: str | None,
        kind: str = "video",
    ) -> tuple[Job, bool]:
        """Check a request and queue it; return its job and whether it is new.

        Args:
            request: the fields.
            inputs: the files, by the names of their fields.
            key: Idempotency-Key; the same key with the same request is the same job.
            kind: see `Job`.

        Raises:
            ApiError: a request that is refused.
        """
        model = self.model(request.model)
        shapes = {name: await self._inspect(name, content, model.fps) for name, content in inputs.items()}
        name_reference(inputs, shapes)
        return await run_in_threadpool(
            self._check_and_add, request, model, inputs, shapes, key=key, kind=kind
        )

    def _check_and_add(
        self,
        request: VideoRequest,
        model: ModelInfo,
        inputs: dict[str, bytes],
        shapes: Mapping[str, MediaShape],
        *,
        key: str | None,
        kind: str,
    ) -> tuple[Job, bool]:
        digest = hashlib.sha256(json.dumps([request.model_dump(mode="json"), model.id]).encode())
        for name, content in sorted(inputs.items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        fields = resolve(request, model, inputs)
        height, width = fields.get("height"), fields.get("width")
        num_frames = fields.get("num_frames")
        if "video" in shapes:
            video = shapes["video"]
            num_frames = min(num_frames or video.num_frames, video.num_frames)
            if None in (height, width) and model.height is not None and model.width is not None:
                height, width = size_like(
                    (video.height, video.width), height, width, model_size=(model.height, model.width), multiple=model.multiple
                )  # fmt: skip
        height, width = height or model.height, width or model.width
        if height is None or width is None:
            raise ApiError(
                400, "size: expected one, the model has none of its own", code="invalid_value", param="size"
            )
        assert num_frames is not None
        self._check_cost(request, fields, model, num_frames=num_frames, height=height, width=width)
        if late := [frame for frame in fields.get("then", {}) if frame >= num_frames]:
            message = f"then: frame {late[0]} is not in the clip; expected 1 to {num_frames - 1}"
            raise ApiError(400, message, code="invalid_value", param="then")
        self.check_workers()
        if self.queue.stopping:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=10)
        try:
            job, is_new = self.store.add(
                fields, model=model.id, kind=kind, inputs=inputs, idempotency_key=key, request_hash=digest.hexdigest(),
                result={"num_frames": num_frames, "height": height, "width": width},
            )  # fmt: skip
        except KeyReused as error:
            raise ApiError(409, str(error), code="idempotency_key_reused") from None
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=10) from None
        if is_new:
            self.queue.add(job)
        return job, is_new

    def check_workers(self) -> None:
        """Raise ApiError if no worker could load its models."""
        if (failure := self.queue.failure) is not None:
            raise ApiError(503, f"the models could not be loaded: {failure}", code="setup_failed")

    def model(self, name: str | None) -> ModelInfo:
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"model: no {name!r:.60} here; expected {known}", code="model_not_found", param="model"
            )
        return self.models[name]

    async def _inspect(self, name: str, content: bytes, fps: float) -> MediaShape:
        """Decode an upload in a process of its own; raise ApiError for one that is refused."""
        limits = self.settings.limits.uploads
        if len(content) > limits.bytes:
            raise too_large(name, limits)
        if self._num_checks >= MAX_CHECKS:
            raise ApiError(429, "too many uploads at once", code="rate_limit_exceeded", retry_after=5)
        self._num_checks += 1
        try:
            if self._checks is None:
                self._checks = await run_in_threadpool(Workers, inspect, 1, seconds=limits.seconds)
            return await asyncio.wrap_future(self._checks.submit(content, fps, limits))
        except CheckDied:
            message = f"{name}: takes more than {limits.seconds:g} s to decode, or cannot be decoded"
        except ValueError as error:
            message = f"{name}: {str(error).removeprefix('file: ')}"
        finally:
            self._num_checks -= 1
        raise ApiError(400, message, code="invalid_file", param=name)

    def _check_cost(
        self, request: VideoRequest, fields: Mapping[str, Any], model: ModelInfo, *, num_frames: int, height: int, width: int
    ) -> None:  # fmt: skip
        """Raise ApiError for a request that costs more than one may."""
        limits = self.settings.limits
        passes = fields.get("free_init", 1)
        steps = (fields.get("num_inference_steps") or model.num_inference_steps) * passes
        for name, value, most in (
            ("then", sum(map(len, fields.get("then", {}).values())), MAX_CHARACTERS),
            ("num_frames", num_frames, limits.num_frames),
            ("width", width, limits.side),
            ("height", height, limits.side),
            ("size", width * height * num_frames, limits.pixels),
            ("num_inference_steps", steps, limits.num_inference_steps),
        ):
            if value > most:
                units = {"size": " pixels in all frames", "then": " characters"}
                if passes > 1:
                    units["num_inference_steps"] = f" in {passes} passes of free_init"
                message = f"{name}: {value:,}{units.get(name, '')} is more than this server allows, {most:,}"
                raise ApiError(400, message, code="limit_exceeded", param=blamed_field(request, name))


def _second(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
