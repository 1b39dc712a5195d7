"""Models, workers, and what a load balancer or Prometheus asks for."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from latent_shift.serve.routes.dependencies import ServiceDep
from latent_shift.serve.schema import ApiError, ModelInfo

router = APIRouter()


@router.get("/v1/models", tags=["models"])
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """List the models, with the defaults of each."""
    return {"object": "list", "data": [_describe(model) for model in service.models.values()]}


@router.get("/v1/models/{model_id:path}/names", tags=["models"])
async def search_names(
    model_id: str, service: ServiceDep, query: str = "", limit: Annotated[int, Query(ge=1, le=10_000)] = 10
) -> dict[str, Any]:
    """Complete the beginning of a name of what a model was trained on."""
    names = service.names.get(service.model(model_id).id)
    return {"object": "list", "data": [] if names is None else names.complete(query, limit)}


@router.get("/v1/models/{model_id:path}", tags=["models"])
async def retrieve_model(model_id: str, service: ServiceDep) -> dict[str, Any]:
    """Return a model, with its defaults."""
    return _describe(service.model(model_id))


@router.get("/v1/workers", tags=["server"])
async def list_workers(service: ServiceDep) -> dict[str, Any]:
    """List the workers: each is starting, idle, busy, failed or stopped."""
    return {"object": "list", "data": [dataclasses.asdict(state) for state in service.queue.states]}


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["server"])
async def health() -> dict[str, str]:
    """Say that the server is alive."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", tags=["server"])
async def ready(service: ServiceDep) -> dict[str, str]:
    """Say whether a clip can be generated now; 503 while the models load, or when no worker could load them."""
    service.check_workers()
    if not service.queue.ready:
        raise ApiError(503, "the model is loading", code="not_ready", retry_after=1)
    return {"status": "ready"}


@router.get("/metrics", tags=["server"])
def metrics(service: ServiceDep) -> Response:
    """Return metrics for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _describe(model: ModelInfo) -> dict[str, Any]:
    return {"object": "model", "owned_by": "latent-shift", "created": 0, **dataclasses.asdict(model)}
