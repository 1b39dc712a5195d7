"""Who may ask: Host and Origin checks, the token, and a limit of requests a minute."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from latent_shift.serve.schema import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "latent-shift-token"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def security_headers(origins: Collection[str]) -> dict[str, str]:
    """Return the headers of every answer. Pages of other origins, where some are allowed, may show clips in their own elements."""
    policy = "cross-origin" if origins else "same-origin"
    return _SECURITY_HEADERS | {"Cross-Origin-Resource-Policy": policy}


def check_host(headers: Headers, allowed: Collection[str] | None) -> None:
    """Raise ApiError for a Host header that is not one of the server's names: a page of another site can make its own name
    point here (DNS rebinding).

    Args:
        headers: of the request.
        allowed: names; None allows all.
    """
    name = _host_name(headers.get("host", ""))[:100]
    if allowed is not None and name not in allowed:
        message = f"Host: {name or 'no name'} is not a name of this server; start it with --allow-host {name or 'NAME'}"
        raise ApiError(403, message, code="host_not_allowed")


def check_origin(headers: Headers, method: str, origins: Collection[str]) -> None:
    """Raise ApiError for a request of a page of another site that would change something: browsers send forms anywhere."""
    origin = headers.get("origin")
    if method in ("GET", "HEAD", "OPTIONS") or origin is None or origin in origins:
        return
    try:
        site = urlsplit(origin).netloc.lower()
    except ValueError:
        site = ""
    if not site or site != headers.get("host", "").lower():
        raise ApiError(
            403,
            f"Origin: {origin:.100} may not use this server; start it with --origin {origin:.100}",
            code="origin_not_allowed",
        )


def check_token(headers: Headers, token: str | None) -> None:
    """Raise ApiError for a request without the token, as `Authorization: Bearer TOKEN` or in the page's cookie. The comparison
    takes the same time for every wrong token."""
    if token is None:
        return
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        sent = cookie_token(headers)
    if not hmac.compare_digest(sent.strip().encode(), token.encode()):
        raise ApiError(401, "expected Authorization: Bearer TOKEN", code="invalid_token")


def cookie_token(headers: Headers) -> str:
    """Return the token in the page's cookie; "" without."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if morsel is None else morsel.value


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class RateLimit:
    """A token bucket for each client.

    Args:
        per_minute: requests a minute; as many may come at once.
    """

    def __init__(self, per_minute: float):
        self._rate, self._size = per_minute / 60, max(1.0, per_minute)
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self, client: str, num: int = 1) -> None:
        """Count requests of a client; raise ApiError if it has sent too many."""
        now = time.monotonic()
        with self._lock:
            if len(self._buckets) > 10_000:  # full ones hold nothing
                full = self._size / self._rate
                self._buckets = {key: value for key, value in self._buckets.items() if now - value[1] < full}
            left, since = self._buckets.get(client, (self._size, now))
            left = min(self._size, left + (now - since) * self._rate)
            if left < num:
                seconds = (num - left) / self._rate
                raise ApiError(429, "too many requests", code="rate_limit_exceeded", retry_after=seconds)
            self._buckets[client] = (left - num, now)
