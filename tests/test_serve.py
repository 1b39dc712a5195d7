"""The life of a video behind the HTTP API, with a real pipeline: formats, events, cancelling, workers and disks that fail."""

import base64
import io
import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from serving import (
    REQUEST,
    ThreadWorker,
    create,
    error_of,
    events_of,
    finish,
    running,
)

from latent_shift import video
from latent_shift.pipelines.request import Request, generate_clip


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
    head = api.head(f"/v1/videos/{video_id}/content{query}")
    assert (head.status_code, head.content, head.headers["content-length"]) == (
        200,
        b"",
        str(len(answer.content)),
    )
    beyond = api.get(f"/v1/videos/{video_id}/content{query}", headers={"Range": "bytes=99999999-"})
    assert error_of(beyond, 416)["message"] == "Range: lies outside the file"
    assert error_of(api.get(f"/v1/videos/{video_id}/content{query}", headers={"Range": "bytes=5-1"}), 400)
    assert (
        "attachment" in api.get(f"/v1/videos/{video_id}/content?download=true").headers["content-disposition"]
    )


def test_content_names_its_settings(api, tmp_path):
    video_id = api.get("/v1/videos?status=completed").json()["data"][0]["id"]
    (tmp_path / "clip.mp4").write_bytes(api.get(f"/v1/videos/{video_id}/content").content)
    metadata = video.read_metadata(tmp_path / "clip.mp4")
    assert (metadata["prompt"], metadata["seed"], metadata["num_inference_steps"]) == ("a red ball", "7", "2")


def test_wait_for_a_format(api):
    answer = api.post("/v1/videos/sync?format=gif", json=REQUEST)
    assert answer.content.startswith(b"GIF8")
    again = api.get(answer.headers["content-location"] + "?format=gif")
    assert again.content == answer.content


def test_job_of_a_model_that_is_not_served_any_more(video_model, tmp_path):
    with running(tmp_path, [video_model], workers=[]) as api:
        waiting = create(api)
    other = ThreadWorker(1, {"other": str(video_model)})
    with running(tmp_path, [video_model], workers=[other]) as api:
        error = finish(api, waiting["id"])["error"]
        assert (error["code"], "is not served any more" in error["message"]) == ("invalid_value", True)


def test_one_frame_is_a_png(api):
    created = create(api, num_frames=1)
    finish(api, created["id"])
    assert api.get(f"/v1/videos/{created['id']}/content").headers["content-type"] == "image/png"


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
    """A cancel that reaches the worker before the job does has no effect there."""
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


def test_files_that_vanish_during_a_request(api):
    """Between the row of the database and its files a client may delete a video."""
    video_id = finish(api, create(api)["id"])["id"]
    shutil.rmtree(api.service.store.path(video_id))
    for query in ("", "?format=gif", "?variant=thumbnail"):
        answer = api.get(f"/v1/videos/{video_id}/content{query}")
        assert error_of(answer, 404)["code"] == "not_found"


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


def test_restart_keeps_everything(video_model, tmp_path):
    with running(tmp_path, [video_model], workers=[]) as api:  # no worker takes the job
        waiting = create(api)
    with running(tmp_path, [video_model]) as api:
        assert finish(api, waiting["id"])["status"] == "completed"
    with running(tmp_path, [video_model], workers=[]) as api:
        assert api.get(f"/v1/videos/{waiting['id']}/content").status_code == 200


def test_a_worker_that_dies_loses_no_job(video_model, tmp_path):
    worker = ThreadWorker(1, {str(video_model): str(video_model)})
    with running(tmp_path, [video_model], workers=[worker]) as api:
        worker.deaths = 1
        assert (done := finish(api, create(api)["id"]))["status"] == "completed"
        assert done["attempts"] == 2
        worker.deaths = 2
        failed = finish(api, create(api)["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "interrupted")
        assert finish(api, create(api)["id"])["status"] == "completed"


def test_cancelled_while_its_worker_dies(video_model, tmp_path):
    worker = ThreadWorker(1, {str(video_model): str(video_model)})
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

    with running(tmp_path, [video_model], workers=[ThreadWorker(1, {}, make=fail)]) as api:
        for _ in range(100):
            if (answer := api.get("/ready")).json()["error"]["code"] == "setup_failed":
                break
            time.sleep(0.02)
        assert error_of(answer, 503)["message"].endswith("no such weights")
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
