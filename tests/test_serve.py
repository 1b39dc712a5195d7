"""The HTTP API, with a real pipeline behind it."""

import base64
import hashlib
import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from serving import HOST, ThreadWorker, events_of, listening, png, running

from latent_shift import video
from latent_shift.models.names import Names
from latent_shift.pipelines.request import Request, generate_clip
from latent_shift.serve.security import RateLimit
from latent_shift.serve.service import Limits, Settings
from latent_shift.serve.uploads import UploadLimits

LIMITS = Limits(
    num_frames=24, side=64, num_inference_steps=60, uploads=UploadLimits(bytes=100_000, num_frames=12)
)
REQUEST = {"prompt": "a red ball", "num_inference_steps": 2, "num_frames": 4, "seed": 7}


@pytest.fixture(scope="module")
def api(video_model, tmp_path_factory):
    names = {
        str(video_model): Names(("red ball", "ball of wool", "blue box"), np.eye(3, dtype=np.float32), 0.5)
    }
    folder = tmp_path_factory.mktemp("data")
    with running(folder, [video_model], settings=Settings(LIMITS), names=names) as client:
        client.post("/v1/videos/sync", json=REQUEST).raise_for_status()  # the model is loaded
        yield client


def create(api, expect=200, **fields):
    answer = api.post("/v1/videos", json={**REQUEST, **fields})
    assert answer.status_code == expect, answer.text
    return answer.json()


def finish(api, video_id):
    """Return a video when it has ended."""
    for _ in range(600):
        result = api.get(f"/v1/videos/{video_id}").json()
        if result["status"] in ("completed", "failed"):
            return result
        time.sleep(0.02)
    raise AssertionError(f"{video_id} did not end")


def film(tmp_path, num_frames, suffix=".mp4"):
    frames = np.full((num_frames, 32, 32, 3), 200, np.uint8)
    frames[:, :, :8] = np.arange(num_frames)[:, None, None, None] * 9
    return video.write(frames, tmp_path / f"film{suffix}", fps=8).read_bytes()


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return error


def test_life_of_a_video(api):
    answer = api.post("/v1/videos", json=REQUEST)
    created = answer.json()
    assert int(answer.headers["openai-poll-after-ms"]) > 0
    assert created["status"] in ("queued", "in_progress")
    assert (created["object"], created["seed"], created["size"], created["seconds"]) == (
        "video",
        7,
        "32x32",
        "0.5",
    )
    done = finish(api, created["id"])
    assert (done["status"], done["progress"], done["error"], done["queue_position"]) == (
        "completed",
        100,
        None,
        None,
    )
    assert done["completed_at"] >= done["created_at"]
    assert done["settings"]["guidance_scale"] > 0  # what was left to the model is said
    assert api.get("/v1/videos").json()["data"][0] == done
    assert api.delete(f"/v1/videos/{done['id']}").json() == {
        "id": done["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    assert error_of(api.get(f"/v1/videos/{done['id']}"), 404)["code"] == "not_found"
    assert not api.service.store.path(done["id"]).exists()


def test_the_pixels_are_those_of_the_pipeline(api, video_model):
    from latent_shift.pipelines.loading import load

    content = api.post("/v1/videos/sync", json=REQUEST)
    assert content.headers["content-type"] == "video/mp4"
    video_id = api.get("/v1/videos").json()["data"][0]["id"]
    strip = Image.open(io.BytesIO(api.get(f"/v1/videos/{video_id}/content?format=png").content))
    pipe = load(video_model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    clip = generate_clip(Request(**REQUEST), pipe)
    np.testing.assert_array_equal(np.asarray(strip), np.concatenate(list(clip.frames), axis=1))
    assert video.read("clip.mp4", content=content.content)[0].shape == clip.frames.shape


@pytest.mark.parametrize(
    ("query", "kind", "start"),
    [
        ("", "video/mp4", b"\0\0\0"),
        ("?format=webm", "video/webm", b"\x1aE\xdf\xa3"),
        ("?format=gif", "image/gif", b"GIF8"),
        ("?format=webp", "image/webp", b"RIFF"),
        ("?format=png", "image/png", b"\x89PNG"),
        ("?variant=spritesheet", "image/png", b"\x89PNG"),
        ("?variant=thumbnail", "image/webp", b"RIFF"),
    ],
)
def test_formats(api, query, kind, start):
    video_id = api.get("/v1/videos?status=completed").json()["data"][0]["id"]
    answer = api.get(f"/v1/videos/{video_id}/content{query}")
    assert answer.headers["content-type"] == kind
    assert answer.content.startswith(start)
    part = api.get(f"/v1/videos/{video_id}/content{query}", headers={"Range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, answer.content[2:6])
    beyond = api.get(f"/v1/videos/{video_id}/content{query}", headers={"Range": "bytes=99999999-"})
    assert error_of(beyond, 416)
    assert error_of(api.get(f"/v1/videos/{video_id}/content{query}", headers={"Range": "bytes=5-1"}), 400)
    assert (
        "attachment" in api.get(f"/v1/videos/{video_id}/content?download=true").headers["content-disposition"]
    )


def test_content_names_its_settings(api, tmp_path):
    video_id = api.get("/v1/videos?status=completed").json()["data"][0]["id"]
    (tmp_path / "clip.mp4").write_bytes(api.get(f"/v1/videos/{video_id}/content").content)
    metadata = video.read_metadata(tmp_path / "clip.mp4")
    assert (metadata["prompt"], metadata["seed"], metadata["num_inference_steps"]) == ("a red ball", "7", "2")


def test_one_frame_is_a_png(api):
    created = create(api, num_frames=1)
    finish(api, created["id"])
    assert api.get(f"/v1/videos/{created['id']}/content").headers["content-type"] == "image/png"


def test_forms_coerce_text(api):
    form = {
        **REQUEST,
        "seed": "9",
        "loop": "true",
        "num_frames": "4",
        "guidance_scale": "",
        "then": '{"2": "a blue ball"}',
    }
    created = api.post("/v1/videos", data=form).json()
    settings = created["settings"]
    assert (settings["seed"], settings["loop"], settings["num_frames"], settings["then"]) == (
        9,
        True,
        4,
        {"2": "a blue ball"},
    )
    assert finish(api, created["id"])["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": "16x24", "num_frames": None, "seconds": 0.5}, ("16x24", 4)),
        ({"seconds": "1", "num_frames": 2}, ("32x32", 2)),
        ({"num_frames": None, "seconds": 1, "fps": 4}, ("32x32", 4)),
        ({"width": 48}, ("48x32", 4)),
    ],
)
def test_size_and_length(api, fields, expected):
    done = finish(api, create(api, **fields)["id"])
    assert (done["size"], done["num_frames"]) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"seed": "seven"}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 25}, "num_frames"),
        ({"num_frames": 1e300}, "num_frames"),
        ({"num_inference_steps": 61}, "num_inference_steps"),
        ({"num_inference_steps": 30, "free_init": 3}, "num_inference_steps"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": 1, "negative_prompt": "blue"}, "negative_prompt"),
        ({"size": "33x32"}, "size"),
        ({"size": "32"}, "size"),
        ({"size": "32x32", "width": 16}, "size"),
        ({"width": 72}, "width"),
        ({"fps": 0}, "fps"),
        ({"fps": 0.0005}, "fps"),
        ({"seconds": "inf"}, "seconds"),
        ({"size": "१२८x१२८"}, "size"),
        ({"strength": 0.5}, "strength"),
        ({"then": {"0x": "a"}}, "then"),
        ({"then": "["}, "then"),
        ({"scheduler": "Nonesuch"}, "scheduler"),
        ({"halo": 1}, "halo"),
        ({"num_frames": 1, "loop": True}, "loop"),
        ({"loop": "maybe"}, "loop"),
        ({"colour": "red"}, "colour"),
        ({"image": "https://example.com/a.png"}, "image"),
        ({"video": "file:///etc/passwd"}, "video"),
        ({"input_reference": {"image_url": "http://169.254.169.254/"}}, "input_reference"),
        ({"image": "data:image/png;base64,!!"}, "image"),
        ({"image": "data:image/png;base64," + base64.b64encode(b"no picture").decode()}, "image"),
    ],
)  # fmt: skip
def test_bad_fields_are_refused_by_their_names(api, fields, param):
    error = error_of(api.post("/v1/videos", json={**REQUEST, **fields}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"a": [' + b"{}," * 1000 + b"{}]}", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"prompt=a&prompt=b", "application/x-www-form-urlencoded", 400),
        (b"nothing", "multipart/form-data", 400),
        (b"--x\r\nno header", "multipart/form-data; boundary=x", 400),
        (
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n',
            "multipart/form-data; boundary=x; charset=undefined",
            400,
        ),
        (b"a", "text/plain", 415),
    ],
)
def test_bad_bodies(api, body, kind, status):
    error_of(api.post("/v1/videos", content=body, headers={"Content-Type": kind}), status)


def test_first_frame(api):
    files = {"input_reference": ("../../etc/passwd", png(), "image/png")}
    created = api.post("/v1/videos", data=REQUEST, files=files).json()
    assert created["inputs"] == ["image"]
    done = finish(api, created["id"])
    assert done["status"] == "completed"
    assert api.get(f"/v1/videos/{done['id']}/input/image").content == png()
    error_of(api.get(f"/v1/videos/{done['id']}/input/..%2f..%2fframes.png"), 404)
    frames = np.asarray(
        Image.open(io.BytesIO(api.get(f"/v1/videos/{done['id']}/content?format=png").content))
    )
    assert frames[:, :32, 0].mean() - frames[:, :32, 2].mean() > 15  # the tiny autoencoder keeps red reddish


def test_video_to_video(api, tmp_path):
    data = {name: value for name, value in REQUEST.items() if name != "num_frames"}
    files = {
        "video": ("a.mp4", film(tmp_path, 6), "video/mp4"),
        "mask": ("m.png", png(colour=(255, 255, 255)), "image/png"),
    }
    created = api.post("/v1/videos", data={**data, "strength": "0.5"}, files=files).json()
    done = finish(api, created["id"])
    assert (done["status"], done["num_frames"], sorted(done["inputs"])) == ("completed", 6, ["mask", "video"])
    assert (created["num_frames"], created["seconds"], created["size"]) == (
        6,
        "0.75",
        "32x32",
    )  # known before it is made


def test_cost_of_a_video_with_one_side(api, tmp_path):
    """The other side follows from the shape of the video, and is limited, too."""
    frames = np.full((3, 16, 2048, 3), 200, np.uint8)
    wide = video.write(frames, tmp_path / "wide.mp4", fps=8).read_bytes()
    answer = api.post(
        "/v1/videos", data={"prompt": "a", "height": "64"}, files={"video": ("a.mp4", wide, "video/mp4")}
    )
    assert error_of(answer, 400)["param"] == "width"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("image", lambda tmp_path: film(tmp_path, 4), "expected a picture"),
        ("video", lambda tmp_path: png(), "expected several frames"),
        ("video", lambda tmp_path: film(tmp_path, 13), "expected at most 12 frames"),
        ("image", lambda tmp_path: bytes(200_000), "MiB"),
        ("image", lambda tmp_path: b"", "is empty"),
        ("video", lambda tmp_path: film(tmp_path, 8)[:-400], "video"),
        ("video", lambda tmp_path: b"ffconcat version 1.0\nfile /etc/passwd\n", "video"),
        ("video", lambda tmp_path: b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/\n", "video"),
    ],
)
def test_bad_uploads(api, tmp_path, name, content, words):
    answer = api.post("/v1/videos", data=REQUEST, files={name: ("file.mp4", content(tmp_path), "video/mp4")})
    assert words in error_of(answer, 413 if words == "MiB" else 400)["message"]
    assert list(api.service.store.folder.glob("jobs/*/inputs/*.part*")) == []


def test_queue_position_and_cancel(api):
    first = create(api, num_inference_steps=40, num_frames=16)
    others = [create(api) for _ in range(3)]
    positions = [api.get(f"/v1/videos/{each['id']}").json()["queue_position"] for each in others]
    assert positions[0] is not None
    assert positions == list(range(positions[0], positions[0] + 3))
    cancelled = api.post(f"/v1/videos/{others[1]['id']}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    while api.get(f"/v1/videos/{first['id']}").json()["status"] == "queued":
        time.sleep(0.02)
    api.post(f"/v1/videos/{first['id']}/cancel").raise_for_status()
    ended = finish(api, first["id"])
    assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
    for each in (others[0], others[2]):  # no other job is touched
        assert finish(api, each["id"])["status"] == "completed"
    assert error_of(api.post(f"/v1/videos/{first['id']}/cancel"), 409)["code"] == "already_ended"


def test_cancel_before_the_worker_has_the_job(api, monkeypatch):
    """The worker did not hear of it, because the job was not its own yet."""
    worker = api.service.queue._workers[0]
    monkeypatch.setattr(worker, "cancel", lambda job_id: None)
    created = create(api, num_inference_steps=60, num_frames=16)
    while api.get(f"/v1/videos/{created['id']}").json()["status"] == "queued":
        time.sleep(0.01)
    api.post(f"/v1/videos/{created['id']}/cancel").raise_for_status()
    monkeypatch.undo()
    assert finish(api, created["id"])["error"]["code"] == "cancelled"


def test_one_file_for_many_clients(api):
    """Formats are written when they are first asked for, once, however many ask."""
    from concurrent.futures import ThreadPoolExecutor

    video_id = finish(api, create(api, num_frames=8)["id"])["id"]
    with ThreadPoolExecutor(8) as pool:
        queries = ["?format=gif", "?variant=thumbnail"] * 8
        answers = list(pool.map(lambda query: api.get(f"/v1/videos/{video_id}/content{query}"), queries))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 2


def test_delete_while_it_runs(api):
    running_video = create(api, num_inference_steps=40, num_frames=16)
    while api.get(f"/v1/videos/{running_video['id']}").json()["status"] == "queued":
        time.sleep(0.02)
    api.delete(f"/v1/videos/{running_video['id']}").raise_for_status()
    error_of(api.get(f"/v1/videos/{running_video['id']}"), 404)
    assert finish(api, create(api)["id"])["status"] == "completed"
    assert api.service.store.get(running_video["id"]) is None
    assert not api.service.store.path(running_video["id"]).exists()


def test_events(api):
    created = create(api, num_inference_steps=5)
    events = events_of(api, created["id"])
    names = [name for name, _, _ in events]
    assert names[0] in ("queued", "in_progress")
    assert names[-1] == "completed"
    steps = [data["step"] for name, data, _ in events if name == "progress" and data["stage"] == "sampling"]
    assert steps == sorted(steps)
    assert steps[-1] == 5
    again = events_of(api, created["id"])
    assert [name for name, _, _ in again] == ["completed"]
    assert again[0][1]["id"] == created["id"]
    error_of(api.get("/v1/videos/video_nothing/events"), 404)


@pytest.mark.parametrize("error", [ValueError("a size that no codec takes"), RuntimeError("lost")])
def test_a_result_that_cannot_be_written(api, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("latent_shift.serve.results.write_results", fail)
    failed = finish(api, create(api)["id"])
    assert failed["error"] == {"code": "generation_failed", "message": str(error)}
    monkeypatch.undo()
    assert finish(api, create(api)["id"])["status"] == "completed"  # the worker lives on


def test_progress_of_free_init_counts_all_passes(api):
    events = events_of(api, create(api, num_inference_steps=3, free_init=2)["id"])
    steps = [
        (data["step"], data["of"])
        for name, data, _ in events
        if name == "progress" and data["stage"] == "sampling"
    ]
    assert steps[-1] == (6, 6)
    assert {total for _, total in steps} == {6}


def test_idempotency(api):
    headers = {"Idempotency-Key": "one"}
    body = {"prompt": "twice", "num_inference_steps": 2, "num_frames": 2}  # the server chooses the seed
    first = api.post("/v1/videos", json=body, headers=headers).json()
    assert api.post("/v1/videos", json=body, headers=headers).json()["id"] == first["id"]
    answer = api.post("/v1/videos", json={**body, "prompt": "other"}, headers=headers)
    assert error_of(answer, 409)["code"] == "idempotency_key_reused"


def test_openai_client(video_model, tmp_path):
    openai = pytest.importorskip("openai")
    with listening(tmp_path, [video_model]) as server:
        check_openai_client(openai, openai.OpenAI(base_url=f"{server.url}v1", api_key="none"))


def check_openai_client(openai, client):
    video = client.videos.create_and_poll(
        prompt="a red ball", seconds="1", size="32x32", poll_interval_ms=100,
        extra_body={"num_inference_steps": 2, "num_frames": 2, "seed": 7, "loop": True},
    )  # fmt: skip
    assert (video.status, video.seed, video.settings["loop"]) == ("completed", 7, True)
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    assert client.videos.download_content(video.id, variant="thumbnail").read()[:4] == b"RIFF"
    assert client.videos.list(limit=1).data[0].id == video.id
    with pytest.raises(openai.BadRequestError, match="num_frames"):
        client.videos.create(prompt="a", extra_body={"num_frames": 0})
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_pages(api):
    ids = [create(api, num_frames=2)["id"] for _ in range(3)]
    listed = api.get("/v1/videos?limit=2").json()
    assert [each["id"] for each in listed["data"]] == [ids[2], ids[1]]
    assert listed["has_more"]
    following = api.get(f"/v1/videos?limit=1&after={listed['last_id']}").json()
    assert following["first_id"] == ids[0]
    error_of(api.get("/v1/videos?limit=0"), 400)
    error_of(api.get("/v1/videos?after=video_nothing"), 404)
    for each in ids:
        finish(api, each)


def test_images(api):
    body = {
        "prompt": "a ball",
        "n": 2,
        "size": "32x32",
        "response_format": "b64_json",
        "seed": 3,
        "num_inference_steps": 2,
    }
    before = api.get("/v1/videos").json()
    data = api.post("/v1/images/generations", json=body).json()["data"]
    pictures = [base64.b64decode(each["b64_json"]) for each in data]
    assert [Image.open(io.BytesIO(picture)).size for picture in pictures] == [(32, 32)] * 2
    assert len({hashlib.sha256(picture).digest() for picture in pictures}) == 2
    assert api.get("/v1/videos").json() == before  # no videos, and nothing is left
    assert api.service.store.count("completed") == len(
        api.service.store.videos(limit=1000, status="completed")
    )
    assert error_of(api.post("/v1/images/generations", json={**body, "n": 11}), 400)["param"] == "n"
    assert (
        error_of(api.post("/v1/images/generations", json={**body, "response_format": "url"}), 400)["param"]
        == "response_format"
    )


def test_models_and_names(api, video_model):
    (model,) = api.get("/v1/models").json()["data"]
    assert (model["id"], model["multiple"], model["width"]) == (str(video_model), 8, 32)
    names = api.get(f"/v1/models/{model['id']}/names?query=ball").json()["data"]
    assert names == ["ball of wool", "red ball"]
    assert error_of(api.get("/v1/models/other/names"), 404)["code"] == "model_not_found"
    assert error_of(api.post("/v1/videos", json={**REQUEST, "model": "other"}), 404)["param"] == "model"


def test_health_ready_metrics_openapi(api):
    assert api.get("/health").json() == {"status": "ok"}
    assert api.get("/ready").json() == {"status": "ready"}
    metrics = api.get("/metrics").text
    assert 'latent_shift_jobs_total{status="completed"}' in metrics
    assert "latent_shift_step_seconds_bucket" in metrics
    schema = api.get("/openapi.json").json()
    assert "multipart/form-data" in schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert api.get("/v1/workers").json()["data"][0]["status"] in ("idle", "busy")
    error_of(api.get("/nothing"), 404)
    error_of(api.put("/v1/videos"), 405)
    for number in range(3):  # clients can invent methods
        api.request(f"FOO{number}", "/v1/videos")
    assert "FOO" not in api.get("/metrics").text


def test_headers_of_every_answer(api):
    for path in ("/", "/v1/videos", "/nothing"):
        headers = api.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_other_sites_are_kept_out(api):
    assert (
        error_of(api.get("/v1/videos", headers={"Host": "evil.example"}), 403)["code"] == "host_not_allowed"
    )
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
        assert "Token of this server" in api.get("/").text
        assert error_of(api.get("/app.js"), 401)
        login = api.get("/?token=a-long-secret", follow_redirects=False)
        assert (login.status_code, login.headers["location"]) == (303, "/")
        assert "httponly" in login.headers["set-cookie"].lower()
        assert "samesite=strict" in login.headers["set-cookie"].lower()
        assert api.get("/v1/videos").status_code == 200  # by the cookie
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


def test_restart_keeps_everything(video_model, tmp_path):
    with running(tmp_path, [video_model], workers=[]) as api:  # nobody takes a job
        waiting = create(api)
    with running(tmp_path, [video_model]) as api:
        assert finish(api, waiting["id"])["status"] == "completed"
    with running(tmp_path, [video_model], workers=[]) as api:
        assert api.get(f"/v1/videos/{waiting['id']}/content").status_code == 200


def test_a_worker_that_dies_loses_no_job(video_model, tmp_path):
    worker = ThreadWorker(1, [str(video_model)])
    with running(tmp_path, [video_model], workers=[worker]) as api:
        worker.deaths = 1
        assert (done := finish(api, create(api)["id"]))["status"] == "completed"
        assert done["attempts"] == 2
        worker.deaths = 2
        failed = finish(api, create(api)["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "interrupted")
        assert finish(api, create(api)["id"])["status"] == "completed"


def test_cancelled_while_its_worker_dies(video_model, tmp_path):
    worker = ThreadWorker(1, [str(video_model)])
    with running(tmp_path, [video_model], workers=[worker]) as api:
        created = create(api, num_inference_steps=60, num_frames=16)
        while api.get(f"/v1/videos/{created['id']}").json()["progress"] == 0:
            time.sleep(0.01)
        worker.cancel = lambda job_id: None
        worker.deaths = 1
        api.post(f"/v1/videos/{created['id']}/cancel")
        assert finish(api, created["id"])["error"]["code"] == "cancelled"


def test_synchronous_request_whose_video_is_deleted(api):
    import threading

    answers = []
    body = {**REQUEST, "num_inference_steps": 60, "num_frames": 16, "prompt": "to be deleted"}
    thread = threading.Thread(target=lambda: answers.append(api.post("/v1/videos/sync", json=body)))
    thread.start()
    while not (
        found := [
            each for each in api.get("/v1/videos?limit=3").json()["data"] if each["prompt"] == "to be deleted"
        ]
    ):
        time.sleep(0.01)
    api.delete(f"/v1/videos/{found[0]['id']}").raise_for_status()
    thread.join(10)
    assert error_of(answers[0], 404)


def test_models_that_cannot_be_loaded(video_model, tmp_path):
    def fail(*_):
        raise ValueError("no such weights")

    with running(tmp_path, [video_model], workers=[ThreadWorker(1, [], make=fail)]) as api:
        for _ in range(100):
            if (answer := api.get("/ready")).json()["error"]["code"] == "setup_failed":
                break
            time.sleep(0.02)
        assert error_of(answer, 503)
        assert api.get("/v1/workers").json()["data"][0]["error"] == "no such weights"
        assert error_of(api.post("/v1/videos", json=REQUEST), 503)["code"] == "setup_failed"
        assert api.get("/health").status_code == 200


def test_full_disk(api, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latent_shift.serve.results.video.write", full)
    failed = finish(api, create(api)["id"])
    assert failed["error"] == {"code": "disk_full", "message": "No space left on device"}
    monkeypatch.undo()
    assert finish(api, create(api)["id"])["status"] == "completed"


def test_full_disk_of_the_database(api, monkeypatch):
    """What became of a job is written when there is space again; requests are refused meanwhile."""
    from latent_shift.serve import queue

    monkeypatch.setattr(queue, "RETRY_SECONDS", 0.05)
    running_video = create(api, num_inference_steps=30)
    database = api.service.store._database
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    with api.service.store._lock:
        database.execute(f"PRAGMA max_page_count = {pages}")
    for _ in range(200):  # until the last pages are full
        answer = api.post(
            "/v1/videos", json={**REQUEST, "prompt": "x" * 1000, "num_frames": 1, "num_inference_steps": 1}
        )
        if answer.status_code != 200:
            break
    assert error_of(answer, 507)["code"] == "disk_full"
    with api.service.store._lock:
        database.execute(f"PRAGMA max_page_count = {2**30}")
    assert finish(api, running_video["id"])["status"] == "completed"
    assert finish(api, create(api)["id"])["status"] == "completed"


def test_previews(api, tmp_path, video_model):
    import shutil

    from latent_shift.pipelines.preview import write_preview

    model = shutil.copytree(video_model, tmp_path / "model")
    write_preview(model, np.vstack([np.eye(4, 3) * 50, [128, 128, 128]]))
    with running(tmp_path / "data", [model]) as server:
        answer = server.post("/v1/videos", json={**REQUEST, "num_inference_steps": 8})
        events = events_of(server, answer.json()["id"])
    previews = [data["image"] for name, data, _ in events if name == "preview"]
    assert previews
    picture = Image.open(io.BytesIO(base64.b64decode(previews[0].partition(",")[2])))
    assert picture.size == (4 * 4, 4)  # four frames of 4x4 latents side by side
    assert json.dumps(previews).count("data:image/png;base64,") == len(previews)
