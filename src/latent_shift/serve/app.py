"""The server as an ASGI application: routes, errors, page, and what stands before them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import latent_shift
from latent_shift.models.names import Names
from latent_shift.serve import bodies
from latent_shift.serve.events import TooManyListeners
from latent_shift.serve.guard import OPEN_PATHS, Guard, error_response
from latent_shift.serve.jobs import JobStore
from latent_shift.serve.routes import ROUTERS
from latent_shift.serve.schema import ApiError, ErrorBody, ModelInfo
from latent_shift.serve.security import CONTENT_SECURITY_POLICY
from latent_shift.serve.service import Service, Settings
from latent_shift.serve.workers import Worker

log = logging.getLogger("latent_shift")


def create_app(
    store: JobStore,
    workers: Sequence[Worker],
    models: Mapping[str, ModelInfo],
    *,
    names: Mapping[str, Names | None],
    settings: Settings,
) -> FastAPI:
    """Return the server as an ASGI application; its lifespan starts and stops the workers.

    Args:
        store: of the jobs; the application closes it.
        workers: not started.
        models: by id; the first is the default.
        names: what each model knows, for suggestions.
        settings: of the server.
    """
    service = Service(store, workers, models, names, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start(asyncio.get_running_loop())
        yield
        await run_in_threadpool(service.stop)

    app = FastAPI(
        title="Latent-Shift", version=latent_shift.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Text to video. The shape is that of OpenAI's video API.",
        responses={code: {"model": ErrorBody} for code in (400, 401, 403, 404, 409, 413, 415, 416, 429, 503, 507)},
    )  # fmt: skip
    app.openapi = partial(_describe, app, has_token=settings.token is not None)  # type: ignore[method-assign]
    app.state.service = service
    _add_errors(app)
    for router in ROUTERS:
        app.include_router(router)
    _add_page(app, has_web=settings.web is not None)
    if settings.web is not None:
        app.mount("/web", _WebPage(directory=settings.web, html=True))
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=bodies.MAX_BYTES)
    app.add_middleware(Guard, settings=settings, count=service.metrics.request)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            expose_headers=["openai-poll-after-ms", "Retry-After"],
        )  # fmt: skip
    return app


def _describe(app: FastAPI, *, has_token: bool) -> dict[str, Any]:
    """Return the OpenAPI description, with the errors and the security of this server instead of FastAPI's."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        if has_token:
            schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if has_token and path not in OPEN_PATHS:
                    operation["security"] = [{"token": []}]
        app.openapi_schema = schema
    return app.openapi_schema


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        body = ApiError(400, f"{param}: {first['msg']}", code="invalid_value", param=param).body()
        return JSONResponse(body, status_code=400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 416: "range_not_satisfiable"}
        body = ApiError(error.status_code, str(error.detail), code=codes.get(error.status_code)).body()
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(TooManyListeners)
    async def too_many(request: Request, error: TooManyListeners) -> JSONResponse:
        return error_response(ApiError(429, str(error), code="too_many_streams", retry_after=5))

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return error_response(ApiError(400, "the client went away", code="client_gone"))

    @app.exception_handler(FileNotFoundError)
    async def deleted_meanwhile(request: Request, error: FileNotFoundError) -> JSONResponse:
        return error_response(ApiError(404, "the video was deleted", code="not_found"))

    @app.exception_handler(OSError)
    async def disk_error(request: Request, error: OSError) -> JSONResponse:
        if error.errno == errno.EBUSY:
            return error_response(
                ApiError(503, "the database is locked", code="database_locked", retry_after=5)
            )
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return await other_error(request, error)
        log.error("%s", error)
        return error_response(
            ApiError(507, "the disk of the server is full", code="disk_full", retry_after=60)
        )

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        body = ApiError(500, "an error of the server; its log says more", code="internal_error").body()
        return JSONResponse(body, status_code=500)


class _WebPage(StaticFiles):
    """A page of `latent-shift export --web`, which compiles WebAssembly and runs it in threads."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY.replace(
            "script-src 'self'", "script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'"
        )
        response.headers["Cross-Origin-Embedder-Policy"] = "require-corp"
        response.headers["Cache-Control"] = "no-cache"
        return response


def _add_page(app: FastAPI, *, has_web: bool) -> None:
    static = files("latent_shift.serve") / "static"
    kinds = {
        "index.html": "text/html; charset=utf-8", "login.html": "text/html; charset=utf-8", "app.js": "text/javascript; charset=utf-8", "style.css": "text/css; charset=utf-8",
        "icon.svg": "image/svg+xml",
    }  # fmt: skip

    def add(path: str, name: str) -> None:
        content = (static / name).read_bytes()
        if has_web:
            content = content.replace(b'<p id="web" hidden>', b'<p id="web">')
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache"}

        @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
        async def page(request: Request) -> Response:
            if request.headers.get("if-none-match") == tag and not request.query_params:
                return Response(status_code=304, headers=headers)
            if name == "login.html" and "wrong" in request.query_params:  # its one hidden element says so
                return Response(content.replace(b" hidden>", b">"), media_type=kinds[name], headers=headers)
            return Response(content, media_type=kinds[name], headers=headers)

    add("/", "index.html")
    add("/login", "login.html")
    add("/favicon.ico", "icon.svg")
    for name in ("app.js", "style.css", "icon.svg"):
        add(f"/{name}", name)
