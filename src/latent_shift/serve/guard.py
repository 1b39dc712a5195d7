"""What stands before the application: checks that need no body, the headers of every answer, and the page's login."""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latent_shift.serve import bodies, security
from latent_shift.serve.schema import ApiError
from latent_shift.serve.service import Settings

OPEN_PATHS = ("/health", "/ready", "/login", "/style.css", "/icon.svg", "/favicon.ico")
"""Paths that need no token: probes, and the page that asks for the token."""


class Guard:
    """ASGI middleware that refuses requests before their bodies are read.

    Args:
        app: the application.
        settings: of the server.
        count: called with the method and the status of every answer.
    """

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[str, int], None]):
        self._app, self._settings, self._count = app, settings, count
        self._headers = security.security_headers(settings.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        plain_error: Message | None = None

        async def send_guarded(message: Message) -> None:
            nonlocal plain_error
            if message["type"] == "http.response.start":
                self._count(scope["method"], message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                if message["status"] >= 400 and headers.get("content-type", "").startswith("text/plain"):
                    plain_error = message  # of a library, such as for a Range that makes no sense
                    return
            elif plain_error is not None:
                status, text = plain_error["status"], message.get("body", b"").decode(errors="replace")
                if status == 416:
                    text = "Range: lies outside the file"
                error = ApiError(status, text, code="range_not_satisfiable" if status == 416 else None)
                content, start = json.dumps(error.body()).encode(), plain_error
                headers = MutableHeaders(scope=start)
                headers["content-type"], headers["content-length"] = "application/json", str(len(content))
                plain_error = None
                await send(start)
                message = {"type": "http.response.body", "body": content}
            await send(message)

        response = self._answer(scope)
        await (self._app if response is None else response)(scope, receive, send_guarded)

    def _answer(self, scope: Scope) -> Response | None:
        """Return an answer that needs no more of the request; None to let it pass."""
        headers, settings = Headers(scope=scope), self._settings
        try:
            security.check_host(headers, settings.hosts)
            security.check_origin(headers, scope["method"], settings.origins)
            if scope["path"] not in OPEN_PATHS:
                if (login := _login(scope, settings.token)) is not None:
                    return login
                security.check_token(headers, settings.token)
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > bodies.MAX_BYTES:
                raise ApiError(413, f"a body has at most {bodies.MAX_BYTES / 2**20:g} MiB", code="too_large")
        except ApiError as error:
            return error_response(error)
        return None


def _login(scope: Scope, token: str | None) -> Response | None:
    """Return the answer to the page's address with the right token: a cookie, and the address without it. Without the token,
    or with a wrong one, the answer is the address of the page that asks for it."""
    if token is None or scope["path"] != "/" or scope["method"] != "GET":
        return None
    sent = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
    if not hmac.compare_digest(sent.encode(), token.encode()):
        has_cookie = hmac.compare_digest(security.cookie_token(Headers(scope=scope)).encode(), token.encode())
        return None if has_cookie else RedirectResponse("/login?wrong" if sent else "/login", status_code=303)
    response = RedirectResponse("/", status_code=303)
    secure = scope["scheme"] == "https"
    response.set_cookie(
        security.COOKIE, token, httponly=True, samesite="strict", secure=secure, max_age=30 * 86400
    )
    return response


def error_response(error: ApiError) -> JSONResponse:
    """Return an error as an answer."""
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
