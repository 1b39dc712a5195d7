"""The HTTP API.

Routes that touch the disk are plain functions, which Starlette runs in threads; the others are coroutines. Annotations are no
strings here, because FastAPI reads those of routes, which name local types.
"""

import asyncio
import base64
import dataclasses
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from latent_shift.serve import results
from latent_shift.serve.bodies import body_schema, read_body
from latent_shift.serve.events import ALL
from latent_shift.serve.jobs import Job
from latent_shift.serve.schema import (
    ApiError,
    DeletedVideo,
    ImageRequest,
    Video,
    VideoList,
    VideoRequest,
    parse_fields,
)
from latent_shift.serve.service import Service

POLL_AFTER_MS = 500


def add_routes(app: FastAPI, server: Service) -> None:
    """Add the routes of the API."""

    async def count(request: Request) -> None:
        """Count a request of a client, before its body is read."""
        server.rate.take(request.client.host if request.client else "")

    Counted = Depends(count)
    Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]

    async def find(video_id: str) -> Job:
        return await run_in_threadpool(server.job, video_id)

    Found = Annotated[Job, Depends(find)]

    @app.post(
        "/v1/videos", response_model=Video, openapi_extra=body_schema(VideoRequest), tags=["videos"], dependencies=[Counted]
    )  # fmt: skip
    async def create_video(request: Request, response: Response, key: Key = None) -> Any:
        """Queue a video. The answer comes at once; the video when its status is `completed`."""
        fields, inputs = await read_body(request, server)
        job, _ = await server.create(parse_fields(VideoRequest, fields), inputs, key=key)
        response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
        return await run_in_threadpool(lambda: server.video(server.job(job.id)))

    @app.post(
        "/v1/videos/sync", openapi_extra=body_schema(VideoRequest), response_class=FileResponse, tags=["videos"],
        responses={200: {"content": {"video/mp4": {}, "image/png": {}}}}, dependencies=[Counted],
    )  # fmt: skip
    async def create_video_and_wait(request: Request, key: Key = None) -> Any:
        """Generate a video and return its file, an mp4, or a png of one frame. A client that goes away cancels it."""
        fields, inputs = await read_body(request, server)
        job, is_new = await server.create(parse_fields(VideoRequest, fields), inputs, key=key)
        job = await _wait(server, job, request, cancel=is_new)
        kind = "png" if job.result["num_frames"] == 1 else "mp4"
        return await run_in_threadpool(_file, server, job, kind)

    @app.get("/v1/videos", response_model=VideoList, tags=["videos"])
    def list_videos(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        status: Literal["queued", "in_progress", "completed", "failed"] | None = None,
    ) -> Any:
        """List videos, the newest first; the next page begins after `last_id`."""
        number = None if after is None else server.job(after).number
        jobs = server.store.videos(limit=limit + 1, after=number, descending=order == "desc", status=status)
        data = [server.video(job) for job in jobs[:limit] if not server.queue.is_deleted(job.id)]
        return {
            "object": "list", "data": data, "first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None,
            "has_more": len(jobs) > limit,
        }  # fmt: skip

    @app.get("/v1/videos/{video_id}", response_model=Video, tags=["videos"])
    async def retrieve_video(job: Found, response: Response) -> Any:
        """Return a video object."""
        response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
        return await run_in_threadpool(server.video, job)

    @app.delete("/v1/videos/{video_id}", response_model=DeletedVideo, tags=["videos"])
    def delete_video(job: Found) -> Any:
        """Delete a video and its files; one in progress is cancelled first."""
        server.queue.delete(job.id)
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{video_id}/cancel", response_model=Video, tags=["videos"])
    def cancel_video(job: Found) -> Any:
        """Cancel a video: it becomes `failed` with the code `cancelled`, before its next step if it is in progress."""
        if not server.queue.cancel(job.id):
            job = server.job(job.id)
            raise ApiError(
                409, f"video {job.id} is {job.status}, expected queued or in_progress", code="already_ended"
            )
        return server.video(server.job(job.id))

    @app.get(
        "/v1/videos/{video_id}/content", response_class=FileResponse, tags=["videos"],
        responses={200: {"content": {kind: {} for kind in results.FORMATS.values()}}},
    )  # fmt: skip
    def download_video(
        video_id: str,
        format: Literal["mp4", "webm", "gif", "webp", "png"] | None = None,
        variant: Literal["video", "thumbnail", "spritesheet"] = "video",
        download: bool = False,
    ) -> Any:
        """Return the file of a completed video: an mp4, or a png of one frame, unless another format is asked for. A png, and
        the variant `spritesheet`, hold all frames side by side. Ranges of bytes can be asked for."""
        job = server.finished(video_id)
        if variant != "video" and format is not None:
            raise ApiError(
                400, f"format has no effect with variant={variant}", code="invalid_value", param="format"
            )
        if variant == "thumbnail":
            path = results.thumbnail(server.store.path(job.id))
            return FileResponse(path, media_type="image/webp", headers=_CACHED, stat_result=path.stat())
        kind = (
            "png"
            if variant == "spritesheet"
            else format or ("png" if job.result["num_frames"] == 1 else "mp4")
        )
        return _file(server, job, kind, download=download)

    @app.get("/v1/videos/{video_id}/input/{name}", response_class=FileResponse, tags=["videos"])
    def download_input(job: Found, name: str) -> Any:
        """Return a file that came with the request."""
        if name not in job.inputs:
            raise ApiError(404, f"no input {name!r:.40}", code="not_found")
        path = server.store.path(job.id) / "inputs" / name
        return FileResponse(path, media_type=results.sniff(path), headers=_CACHED, stat_result=path.stat())

    @app.get("/v1/videos/{video_id}/events", response_class=EventSourceResponse, tags=["videos"])
    async def stream_events(
        job: Found, last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None
    ) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: `queued` and `in_progress` with the video object, `progress` with step, of, progress (percent) and
        eta_ms, `preview` with a PNG of the frames side by side as a data URL, `completed` and `failed` with the video object,
        `deleted`. The state of now comes first; with Last-Event-ID, what was missed."""
        with server.events.listen(job.id, last_event_id) as events:
            now = await run_in_threadpool(server.store.get, job.id)
            if now is None:
                return
            if last_event_id is None or now.status != "in_progress":
                video = await run_in_threadpool(server.video, now)
                yield ServerSentEvent(data=video, event=now.status, id=f"{now.id}-{now.status}")
            if now.status in ("completed", "failed"):
                return
            async for event in events:
                yield ServerSentEvent(data=event.data, event=event.name, id=event.id)

    @app.get("/v1/events", response_class=EventSourceResponse, tags=["videos"])
    async def stream_all_events() -> AsyncIterator[ServerSentEvent]:
        """Server-sent events of all videos from now on, as of one video. `GET /v1/videos` says what is now."""
        with server.events.listen(ALL) as events:
            async for event in events:
                yield ServerSentEvent(data=event.data, event=event.name, id=event.id)

    @app.post(
        "/v1/images/generations", openapi_extra=body_schema(ImageRequest, form=False), tags=["images"], dependencies=[Counted]
    )  # fmt: skip
    async def create_images(request: Request) -> dict[str, Any]:
        """Generate images and return them as base64 PNGs."""
        fields, inputs = await read_body(request, server)
        if inputs:
            raise ApiError(
                400, f"{next(iter(inputs))}: expected no file", code="invalid_value", param=next(iter(inputs))
            )
        images: ImageRequest = parse_fields(ImageRequest, fields)
        shared = images.model_dump(exclude={"n", "response_format", "seed"}, exclude_none=True)
        jobs, data = [], []
        try:
            for index in range(images.n):
                seed = {} if images.seed is None else {"seed": images.seed + index}
                frame = parse_fields(VideoRequest, {**shared, **seed, "num_frames": 1})
                jobs.append((await server.create(frame, {}, key=None, kind="image"))[0])
            for job in jobs:
                await _wait(server, job, request, cancel=True)
                picture = await run_in_threadpool((server.store.path(job.id) / results.FRAMES).read_bytes)
                data.append({"b64_json": base64.b64encode(picture).decode(), "seed": job.request["seed"]})
        finally:
            for job in jobs:
                await run_in_threadpool(server.queue.delete, job.id)
        return {"created": int(jobs[0].created), "data": data}

    @app.get("/v1/models", tags=["models"])
    async def list_models() -> dict[str, Any]:
        """List the models, with the defaults of each."""
        data = [
            {"object": "model", "owned_by": "latent-shift", "created": 0, **dataclasses.asdict(model)}
            for model in server.models.values()
        ]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{model_id:path}/names", tags=["models"])
    async def search_names(
        model_id: str, query: str = "", limit: Annotated[int, Query(ge=1, le=100)] = 10
    ) -> dict[str, Any]:
        """Complete the beginning of a name of what a model was trained on."""
        names = server.names.get(server.model(model_id).id)
        return {"object": "list", "data": [] if names is None else names.complete(query, limit)}

    @app.get("/v1/workers", tags=["server"])
    async def list_workers() -> dict[str, Any]:
        """List the workers: each is starting, idle, busy, failed or stopped."""
        return {"object": "list", "data": [dataclasses.asdict(state) for state in server.queue.states]}

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """Say that the server is alive."""
        return {"status": "ok"}

    @app.get("/ready", tags=["server"])
    async def ready() -> dict[str, str]:
        """Say whether a clip can be generated now; 503 while the models load, or when no worker could load them."""
        server.check_workers()
        if not server.queue.ready:
            raise ApiError(503, "the models are being loaded", code="not_ready", retry_after=1)
        return {"status": "ready"}

    @app.get("/metrics", tags=["server"])
    def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


_CACHED = {"Cache-Control": "private, max-age=31536000, immutable"}


def _file(server: Service, job: Job, kind: str, *, download: bool = False) -> FileResponse:
    folder = server.store.path(job.id)
    is_new = not (folder / f"video.{kind}").exists()
    try:
        path = results.content(folder, kind)
    except (ValueError, OverflowError) as error:
        raise ApiError(
            400,
            f"format: {str(error).removeprefix(str(folder)).lstrip('/')}",
            code="invalid_value",
            param="format",
        ) from None
    if is_new and kind != "png":
        server.store.update_bytes(job.id)
        server.queue.keep_quota(job.id)
    disposition = "attachment" if download else "inline"
    return FileResponse(
        path, media_type=results.FORMATS[kind], filename=f"{job.id}.{kind}", content_disposition_type=disposition, headers=_CACHED,
        stat_result=path.stat(),
    )  # fmt: skip


async def _wait(server: Service, job: Job, request: Request, *, cancel: bool) -> Job:
    """Wait until a job has ended and return it; raise ApiError if it failed.

    Args:
        server: of the job.
        job: the job.
        request: whose client waits.
        cancel: whether the job is cancelled when the client goes away.
    """

    async def listen() -> None:
        with server.events.listen(job.id) as events:
            async for _ in events:
                pass

    listening = asyncio.ensure_future(listen())
    try:
        while True:
            now = (
                None if server.queue.is_deleted(job.id) else await run_in_threadpool(server.store.get, job.id)
            )
            if now is None or now.status in ("completed", "failed") or server.events.closed:
                break
            if await request.is_disconnected():
                if cancel:
                    await run_in_threadpool(server.queue.cancel, job.id)
                raise ApiError(499, "the client went away", code="cancelled")
            if listening.done():  # the final event comes just after the database is written
                await asyncio.sleep(0.05)
            else:
                await asyncio.wait([listening], timeout=0.5)
    finally:
        listening.cancel()
    if now is None:
        raise ApiError(404, "the video was deleted", code="not_found")
    if now.status == "failed":
        statuses = {"invalid_value": 400, "cancelled": 409, "disk_full": 507}
        raise ApiError(statuses.get(now.error_code or "", 500), now.error_message or "", code=now.error_code)
    if now.status != "completed":
        raise ApiError(503, "the server is stopping", code="stopping", retry_after=10)
    return now
