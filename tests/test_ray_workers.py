"""Workers on a Ray cluster of two nodes, of which one is killed in the middle of a job."""

import json
import time

import pytest
from serving import events_of, running

ray = pytest.importorskip("ray")

LONG = {"prompt": "a ball", "num_inference_steps": 150, "num_frames": 16, "size": "64x64", "seed": 1}


@pytest.mark.slow  # two nodes that load torch; test_serve.py tests the same of the queue
def test_a_node_that_dies_loses_no_job(video_model, tmp_path):
    from ray.cluster_utils import Cluster

    from latent_shift.serve.ray_workers import connect

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        workers = connect(cluster.address, 2, {str(video_model): str(video_model)}, "cpu")
        with running(tmp_path, [video_model], workers=workers) as api:
            while [each["status"] for each in api.get("/v1/workers").json()["data"]] != ["idle", "idle"]:
                time.sleep(0.1)
            videos = [api.post("/v1/videos", json={**LONG, "seed": seed}).json() for seed in range(3)]
            while any(api.get(f"/v1/videos/{each['id']}").json()["progress"] < 10 for each in videos[:2]):
                time.sleep(0.05)
            cluster.remove_node(node, allow_graceful=False)
            ended = [events_of(api, each["id"])[-1] for each in videos]
            assert [name for name, _, _ in ended] == ["completed"] * 3
            assert sorted(data["attempts"] for _, data, _ in ended) == [1, 1, 2]
            # Each clip is what it is on one machine.
            contents = [api.get(f"/v1/videos/{each['id']}/content?format=png").content for each in videos]
            again = api.post("/v1/videos", json={**LONG, "seed": 0}).json()
            assert events_of(api, again["id"])[-1][0] == "completed"
            assert api.get(f"/v1/videos/{again['id']}/content?format=png").content in contents
            states = json.loads(api.get("/v1/workers").text)["data"]
            assert sorted(each["status"] for each in states) == [
                "idle",
                "starting",
            ]  # no machine has room for the second
    finally:
        ray.shutdown()
        cluster.shutdown()
