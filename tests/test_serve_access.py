"""Who may use the server, and how much: tokens, other sites, limits."""

import pytest
from serving import HOST, LIMITS, REQUEST, create, error_of, running

from latent_shift.serve.security import RateLimit
from latent_shift.serve.service import Limits, Settings


def test_headers_of_every_answer(api):
    for path in ("/", "/v1/videos", "/nothing"):
        headers = api.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_other_sites_are_kept_out(api):
    error = error_of(api.get("/v1/videos", headers={"Host": "evil.example:80"}), 403)
    assert (error["code"], "--allow-host evil.example" in error["message"]) == ("host_not_allowed", True)
    answer = api.post("/v1/videos", json=REQUEST, headers={"Origin": "http://evil.example"})
    assert error_of(answer, 403)["code"] == "origin_not_allowed"
    for origin in ("null", "http://[", "file://", ""):
        error_of(api.post("/v1/videos", json=REQUEST, headers={"Origin": origin}), 403)
    assert api.post("/v1/videos", json=REQUEST, headers={"Origin": HOST}).status_code == 200
    assert (
        "access-control-allow-origin"
        not in api.get("/health", headers={"Origin": "http://evil.example"}).headers
    )


def test_large_bodies_are_refused_unread(api):
    answer = api.post(
        "/v1/videos", content=b"", headers={"Content-Length": str(10**12), "Content-Type": "application/json"}
    )
    assert error_of(answer, 413)["code"] == "too_large"


def test_token_and_origins(video_model, tmp_path):
    settings = Settings(LIMITS, token="a-long-secret", hosts=None, origins=("https://shop.example",))
    with running(tmp_path, [video_model], settings=settings, workers=[]) as api:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic a-long-secret"},
            {"Cookie": "a=b"},
        ):
            assert error_of(api.get("/v1/videos", headers=headers), 401)["type"] == "authentication_error"
        good = {"Authorization": "Bearer a-long-secret"}
        assert api.get("/v1/videos", headers=good).status_code == 200
        assert api.get("/health").status_code == 200
        away = api.get("/", follow_redirects=False)
        assert (away.status_code, away.headers["location"]) == (303, "/login")
        assert "Access token" in api.get("/").text
        assert 'role="alert" hidden' in api.get("/").text
        wrong = api.get("/?token=another-secret")
        assert wrong.url.path == "/login"
        assert 'role="alert">This token is not accepted' in wrong.text
        assert (
            api.get("/openapi.json", headers=good).json()["components"]["securitySchemes"]["token"]["scheme"]
            == "bearer"
        )
        assert error_of(api.get("/app.js"), 401)
        login = api.get("/?token=a-long-secret", follow_redirects=False)
        assert (login.status_code, login.headers["location"]) == (303, "/")
        assert "httponly" in login.headers["set-cookie"].lower()
        assert "samesite=strict" in login.headers["set-cookie"].lower()
        assert api.get("/v1/videos").status_code == 200  # by the cookie
        # Pages of the other site show clips in elements of their own.
        assert api.get("/health").headers["cross-origin-resource-policy"] == "cross-origin"
        preflight = api.options(
            "/v1/videos", headers={"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
        )
        assert preflight.headers["access-control-allow-origin"] == "https://shop.example"


def test_rate_limit_and_full_queue(video_model, tmp_path):
    settings = Settings(Limits(requests_per_minute=3))
    with running(tmp_path, [video_model], settings=settings, workers=[], max_queued=2) as api:
        create(api), create(api)
        full = api.post("/v1/videos", json=REQUEST)
        assert error_of(full, 429)["code"] == "queue_full"
        assert int(full.headers["retry-after"]) > 0
        limited = api.post("/v1/videos", json=REQUEST)
        assert error_of(limited, 429)["code"] == "rate_limit_exceeded"
        assert int(limited.headers["retry-after"]) > 0


def test_tokens_of_the_bucket_come_back(monkeypatch):
    now = 0.0
    monkeypatch.setattr("latent_shift.serve.security.time.monotonic", lambda: now)
    rate = RateLimit(60)
    rate.take("a", 60)
    with pytest.raises(Exception, match="too many"):
        rate.take("a")
    rate.take("b")
    now = 2.0
    rate.take("a", 2)
    with pytest.raises(Exception, match="too many"):
        rate.take("a")
