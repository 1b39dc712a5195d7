"""Requests to the HTTP API: fields, files, images, the openai client."""

import base64
import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from serving import (
    REQUEST,
    create,
    error_of,
    film,
    finish,
    listening,
    png,
)

from latent_shift import video
from latent_shift.serve.schema import ApiError, ModelInfo, check_request


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
        ({"then": {"4": "a blue ball"}}, "then"),
        ({"num_frames": None, "seconds": 90}, "seconds"),
        ({"size": "1024x1024"}, "size"),
        ({"size": "auto"}, "size"),
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


def test_messages_name_what_is_expected(api):
    def message(**fields):
        return error_of(api.post("/v1/videos", json={**REQUEST, **fields}), 400)["message"]

    assert "video, mask" in message(colour="red")
    assert message(then="15:ghost") == 'then: expected {frame: prompt} as JSON, such as {"8": "a lion"}'
    assert message(then={"9": "a ghost"}) == "then: frame 9 is not in the clip; expected 1 to 3"
    assert message(num_inference_steps=40, free_init=2).startswith("num_inference_steps: 80 in 2 passes")
    assert message(size="33x32") == "size=33x32: expected multiples of 8, such as 32 or 40"
    assert "did you mean EulerDiscrete" in message(scheduler="Euler")


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
    assert error_of(api.get("/v1/videos?after=video_nothing"), 404)["param"] == "after"
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
    assert api.get(f"/v1/models/{model['id']}").json() == model
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
    operation = schema["paths"]["/v1/videos"]["post"]
    kinds = operation["requestBody"]["content"]
    assert set(kinds) == {"application/json", "multipart/form-data", "application/x-www-form-urlencoded"}
    assert kinds["application/json"]["schema"]["properties"]["image"]["type"] == "string"
    assert "422" not in operation["responses"]
    assert api.head("/health").status_code == api.head("/ready").status_code == 200
    assert api.get("/v1/workers").json()["data"][0]["status"] in ("idle", "busy")
    error_of(api.get("/nothing"), 404)
    error_of(api.put("/v1/videos"), 405)
    for number in range(3):  # clients can invent methods
        api.request(f"FOO{number}", "/v1/videos")
    assert "FOO" not in api.get("/metrics").text


@pytest.mark.parametrize(
    ("param", "value"),
    [("num_inference_steps", 20), ("guidance_scale", 3.0), ("negative_prompt", "blue"), ("scheduler", "EulerDiscrete")],
)  # fmt: skip
def test_what_a_distilled_model_does_not_know_is_refused_before_it_is_queued(param, value):
    model = ModelInfo(
        id="fast", num_frames=4, fps=8, width=32, height=32, multiple=4, num_inference_steps=4, guidance_scale=1, shared_noise=0,
        noise_correlation=0, distilled_steps=4,
    )  # fmt: skip
    fields = {"prompt": "a red square", "num_frames": 4}
    check_request({**fields, "num_inference_steps": 2, "scheduler": "DDIM"}, model, {})
    with pytest.raises(ApiError) as error:
        check_request({**fields, param: value}, model, {})
    assert error.value.param == param
    check_request({**fields, param: value, "guidance_scale": 3.0}, replace(model, distilled_steps=0), {})
