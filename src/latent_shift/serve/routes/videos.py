"""`/v1/videos`: the shape of OpenAI's video API, with more fields and more formats."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from latent_shift.serve import results
from latent_shift.serve.bodies import body_schema, read_body
from latent_shift.serve.events import ALL
from latent_shift.serve.routes.dependencies import (
    CACHED,
    IdempotencyKey,
    JobDep,
    ServiceDep,
    content_file,
    count_request,
    wait_for,
)
from latent_shift.serve.schema import ApiError, DeletedVideo, Video, VideoList, VideoRequest, parse_fields

POLL_AFTER_MS = 500
Format = Literal["mp4", "webm", "gif", "webp", "png"]

router = APIRouter(prefix="/v1", tags=["videos"])


@router.post(
    "/videos", response_model=Video, openapi_extra=body_schema(VideoRequest), dependencies=[Depends(count_request)]
)  # fmt: skip
async def create_video(
    request: Request, response: Response, service: ServiceDep, key: IdempotencyKey = None
) -> Any:
    """Queue a video. The answer comes at once; the video when its status is `completed`."""
    fields, inputs = await read_body(request, service)
    job, _ = await service.create(parse_fields(VideoRequest, fields), inputs, key=key)
    response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
    return await run_in_threadpool(lambda: service.video(service.job(job.id)))


@router.post(
    "/videos/sync", response_class=FileResponse, openapi_extra=body_schema(VideoRequest),
    responses={200: {"content": {kind: {} for kind in results.FORMATS.values()}}}, dependencies=[Depends(count_request)],
)  # fmt: skip
async def create_video_and_wait(
    request: Request, service: ServiceDep, format: Format | None = None, key: IdempotencyKey = None
) -> Any:
    """Generate a video and return its file, an mp4 or a png of one frame, unless another format is asked for; Content-Location
    names the video. A client that goes away cancels it."""
    fields, inputs = await read_body(request, service)
    job, is_new = await service.create(parse_fields(VideoRequest, fields), inputs, key=key)
    job = await wait_for(service, job, request, cancel=is_new)
    response = await run_in_threadpool(content_file, service, job, format)
    response.headers["Content-Location"] = f"/v1/videos/{job.id}/content"
    return response


@router.get("/videos", response_model=VideoList)
def list_videos(
    service: ServiceDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    status: Literal["queued", "in_progress", "completed", "failed"] | None = None,
) -> Any:
    """List videos, the newest first; the next page begins after `last_id`."""
    number = None if after is None else service.job(after, "after").number
    jobs = service.store.videos(limit=limit + 1, after=number, descending=order == "desc", status=status)
    data = [service.video(job) for job in jobs[:limit] if not service.queue.is_deleted(job.id)]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {
        "object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(jobs) > limit
    }  # fmt: skip


@router.get("/videos/{video_id}", response_model=Video)
def retrieve_video(job: JobDep, response: Response, service: ServiceDep) -> Any:
    """Return a video object."""
    response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
    return service.video(job)


@router.delete("/videos/{video_id}", response_model=DeletedVideo)
def delete_video(job: JobDep, service: ServiceDep) -> Any:
    """Delete a video and its files; one in progress is cancelled first."""
    service.queue.delete(job.id)
    return {"id": job.id, "object": "video.deleted", "deleted": True}


@router.post("/videos/{video_id}/cancel", response_model=Video)
def cancel_video(job: JobDep, service: ServiceDep) -> Any:
    """Cancel a video: it becomes `failed` with the code `cancelled`, before its next step if it is in progress."""
    if not service.queue.cancel(job.id):
        message = f"video {job.id} is {service.job(job.id).status}, expected queued or in_progress"
        raise ApiError(409, message, code="already_ended")
    return service.video(service.job(job.id))


@router.head("/videos/{video_id}/content", include_in_schema=False)
@router.get(
    "/videos/{video_id}/content", response_class=FileResponse,
    responses={200: {"content": {kind: {} for kind in results.FORMATS.values()}}},
)  # fmt: skip
def download_video(
    video_id: str,
    service: ServiceDep,
    format: Format | None = None,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    download: bool = False,
) -> Any:
    """Return the file of a completed video: an mp4, or a png of one frame, unless another format is asked for. A png, and
    the variant `spritesheet`, hold all frames side by side. Ranges of bytes can be asked for."""
    job = service.finished(video_id)
    if variant != "video" and format is not None:
        message = f"format has no effect with variant={variant}"
        raise ApiError(400, message, code="invalid_value", param="format")
    if variant == "thumbnail":
        path = results.thumbnail(service.store.path(job.id))
        return FileResponse(path, media_type="image/webp", headers=CACHED, stat_result=path.stat())
    return content_file(service, job, "png" if variant == "spritesheet" else format, download=download)


@router.head("/videos/{video_id}/input/{name}", include_in_schema=False)
@router.get("/videos/{video_id}/input/{name}", response_class=FileResponse)
def download_input(job: JobDep, name: str, service: ServiceDep) -> Any:
    """Return a file that came with the request."""
    if name not in job.inputs:
        raise ApiError(404, f"no input {name!r:.40}", code="not_found")
    path = service.store.path(job.id) / "inputs" / name
    return FileResponse(path, media_type=results.sniff(path), headers=CACHED, stat_result=path.stat())


@router.get("/videos/{video_id}/events", response_class=EventSourceResponse)
async def stream_events(
    job: JobDep,
    service: ServiceDep,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `queued` and `in_progress` with the video object, `progress` with step, of, progress (percent) and
    eta_ms, `preview` with a PNG of the frames side by side as a data URL, `completed` and `failed` with the video object,
    `deleted`. The state of now comes first; with Last-Event-ID, what was missed."""
    with service.events.listen(job.id, last_event_id) as events:
        now = await run_in_threadpool(service.store.get, job.id)
        if now is None:
            return
        if last_event_id is None or now.status != "in_progress":
            video = await run_in_threadpool(service.video, now)
            yield ServerSentEvent(data=video, event=now.status, id=f"{now.id}-{now.status}")
        if now.status in ("completed", "failed"):
            return
        async for event in events:
            yield ServerSentEvent(data=event.data, event=event.name, id=event.id)


@router.get("/events", response_class=EventSourceResponse)
async def stream_all_events(service: ServiceDep) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events of all videos from now on, as of one video. `GET /v1/videos` says what is now."""
    with service.events.listen(ALL) as events:
        async for event in events:
            yield ServerSentEvent(data=event.data, event=event.name, id=event.id)
