"""What routes have in common: dependencies, answers with files, and waiting for a job."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from latent_shift.serve import results
from latent_shift.serve.jobs import Job
from latent_shift.serve.schema import ApiError
from latent_shift.serve.service import Service

CACHED = {"Cache-Control": "private, max-age=31536000, immutable"}


async def get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


async def count_request(request: Request, service: ServiceDep) -> None:
    """Count a request of a client, before its body is read; raise ApiError for one too many."""
    service.rate.take(request.client.host if request.client else "")


def find_job(video_id: str, service: ServiceDep) -> Job:
    return service.job(video_id)


JobDep = Annotated[Job, Depends(find_job)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


def content_file(service: Service, job: Job, kind: str | None, *, download: bool = False) -> FileResponse:
    """Return the file of a completed job, encoded when it is first asked for.

    Args:
        service: of the job.
        job: completed.
        kind: a key of `results.FORMATS`; None is mp4, or png of one frame.
        download: whether a browser saves the file instead of showing it.
    """
    folder = service.store.path(job.id)
    kind = kind or ("png" if job.result["num_frames"] == 1 else "mp4")
    is_new = not (folder / f"video.{kind}").exists()
    try:
        path = results.content(folder, kind)
    except (ValueError, OverflowError) as error:
        message = f"format: {str(error).removeprefix(str(folder)).lstrip('/')}"
        raise ApiError(400, message, code="invalid_value", param="format") from None
    if is_new and kind != "png":
        service.store.update_bytes(job.id)
        service.queue.keep_quota(job.id)
    disposition = "attachment" if download else "inline"
    return FileResponse(
        path, media_type=results.FORMATS[kind], filename=f"{job.id}.{kind}", content_disposition_type=disposition, headers=CACHED,
        stat_result=path.stat(),
    )  # fmt: skip


async def wait_for(service: Service, job: Job, request: Request, *, cancel: bool) -> Job:
    """Wait until a job has ended and return it; raise ApiError if it failed.

    Args:
        service: of the job.
        job: the job.
        request: whose client waits.
        cancel: whether the job is cancelled when the client goes away.
    """

    async def listen() -> None:
        with service.events.listen(job.id) as events:
            async for _ in events:
                pass

    listening = asyncio.ensure_future(listen())
    try:
        while True:
            is_deleted = service.queue.is_deleted(job.id)
            now = None if is_deleted else await run_in_threadpool(service.store.get, job.id)
            if now is None or now.status in ("completed", "failed") or service.events.closed:
                break
            if await request.is_disconnected():
                if cancel:
                    await run_in_threadpool(service.queue.cancel, job.id)
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
