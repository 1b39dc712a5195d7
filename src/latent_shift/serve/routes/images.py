"""`/v1/images/generations`: OpenAI's shape, for clips of one frame."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from latent_shift.serve import results
from latent_shift.serve.bodies import body_schema, read_body
from latent_shift.serve.routes.dependencies import ServiceDep, count_request, wait_for
from latent_shift.serve.schema import ApiError, ImageRequest, VideoRequest, parse_fields

router = APIRouter(prefix="/v1/images", tags=["images"])


@router.post(
    "/generations", openapi_extra=body_schema(ImageRequest, files=False), dependencies=[Depends(count_request)]
)  # fmt: skip
async def create_images(request: Request, service: ServiceDep) -> dict[str, Any]:
    """Generate images and return them as base64 PNGs."""
    fields, inputs = await read_body(request, service)
    for name in inputs:
        raise ApiError(400, f"{name}: expected text, got a file", code="invalid_value", param=name)
    images: ImageRequest = parse_fields(ImageRequest, fields)
    shared = images.model_dump(exclude={"n", "response_format", "seed"}, exclude_none=True)
    jobs, data = [], []
    try:
        for index in range(images.n):
            seed = {} if images.seed is None else {"seed": images.seed + index}
            frame = parse_fields(VideoRequest, {**shared, **seed, "num_frames": 1})
            jobs.append((await service.create(frame, {}, key=None, kind="image"))[0])
        for job in jobs:
            await wait_for(service, job, request, cancel=True)
            picture = await run_in_threadpool((service.store.path(job.id) / results.FRAMES).read_bytes)
            data.append({"b64_json": base64.b64encode(picture).decode(), "seed": job.request["seed"]})
    finally:
        for job in jobs:
            await run_in_threadpool(service.queue.delete, job.id)
    return {"created": int(jobs[0].created), "data": data}
