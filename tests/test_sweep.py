"""The sweep times every network for every load that it takes, and says which it does not take."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from test_cli import run

from latent_shift.benchmark import networks, sweep
from latent_shift.benchmark.roofline import Work, limits
from latent_shift.benchmark.timing import run_alone
from latent_shift.models import sizes
from latent_shift.report import plots
from latent_shift.shift import temporal_shift

SMALL = dict(sample_size=8, block_out_channels=(32, 32, 32, 32), cross_attention_dim=32)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(networks, "SMALL", networks.Size(SMALL, (1, 1, 1, 1), 32))


@pytest.mark.slow  # its fast twin is test_bench_sweep_writes_json_tables_and_plots
def test_sweep_times_every_network_for_every_load(small, monkeypatch):
    monkeypatch.setattr(sweep, "limits", lambda *_: {"flops_per_s": 1e12, "bytes_per_s": 1e10})
    result = sweep.sweep(num_frames=(1, 16, 33), sides=(16,), clips=(2,), side=16, rounds=1)
    points = result["points"]
    assert {each["name"] for each in points} == set(networks.NETWORKS)
    assert len(points) == 5 * len(networks.NETWORKS)
    (cannot,) = [each for each in points if "cannot" in each]
    assert (cannot["name"], cannot["frames"], cannot["cannot"]) == (
        "AnimateDiff (UNetMotionModel)",
        33,
        "at most 32 frames",
    )
    at = {(each["name"], each["line"], each["frames"]): each for each in points if "cannot" not in each}
    # One load, timed once.
    assert all(
        at[name, "frames", 16] == at[name, "side", 16] | {"line": "frames"} for name in networks.NETWORKS
    )
    ours, image = (at[name, "frames", 33] for name in ("Latent-Shift", "frame by frame"))
    assert ours["parameters"] == image["parameters"]
    # The shift adds no multiplications; one text a clip instead of one a frame saves some.
    assert ours["flops"] < image["flops"] < at["Latent-VDM", "frames", 33]["flops"]
    two = at["frame by frame", "clips", 16]
    assert two["flops"] == 2 * at["frame by frame", "side", 16]["flops"]
    assert ours["share_of_the_matrix_rate"] == pytest.approx(ours["flops"] / ours["seconds"] / 1e12)
    assert 0 < ours["share_of_the_matrix_rate"] < ours["share_of_the_roofline"]  # moving bytes takes time too
    assert ours["bytes"] > 33 * 16 * 16 * 32 * 4
    assert ours["frames_per_s"] == pytest.approx(33 / ours["seconds"])
    assert all(each["ratio"] == 1 for each in points if each["name"] == "Latent-Shift")


def test_work_counts_every_operation():
    a, b, x = torch.ones(8, 16), torch.ones(16, 4), torch.ones(2, 6, 8, 8)
    with Work({"flops_per_s": 1e9, "bytes_per_s": 1e9}) as work:
        c = a @ b
        c.t().contiguous().view(-1)  # one copy among views
    moved = 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert work.flops == 2 * 8 * 16 * 4
    assert work.bytes == moved + 2 * 4 * 8 * 4
    assert work.seconds == pytest.approx((max(work.flops, moved) + 2 * 4 * 8 * 4) / 1e9)
    q = torch.ones(2, 3, 10, 8)
    with Work({"flops_per_s": 1e9, "bytes_per_s": 1e9}) as work, torch.no_grad():
        # PyTorch's own counter sees none of it on a CPU.
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert work.flops == 4 * 2 * 3 * 10 * 10 * 8
    with Work({"flops_per_s": 1e9, "bytes_per_s": 1e9}) as work:
        temporal_shift(x, 2)
    # All rows are read and written once, four are zeros at an edge; and the numbers of both.
    assert (work.flops, work.bytes) == (0, 2 * x.nbytes + x.nbytes * 4 // 12 + 8 * (12 + 4))


def test_timed_networks_call_like_their_pipelines(small):
    found = networks.timed_networks(text_length=4)
    with torch.no_grad():
        clips = {name: each.call(2, 3, 8)() for name, each in found.items()}
    for name, made in clips.items():
        in_time = name.startswith(("AnimateDiff", "ModelScope"))
        assert tuple(made.sample.shape) == ((2, 4, 3, 8, 8) if in_time else (6, 4, 8, 8)), name
    assert set(networks.timed_networks(only="Latent-VDM")) == {"Latent-VDM"}


def test_limits_are_plausible():
    found = limits(seconds=0.05, num_bytes=2**27)
    assert found["flops_per_s"] > 1e8
    assert 1e8 < found["bytes_per_s"] < 5e12


def test_memory_of_step_returns_peaks_or_the_limit_of_a_network():
    row = sweep._memory_of_step("frame by frame", 2, 8, False, torch.float32)
    assert row["gib_before"] > 0.1 and row["gib_peak"] > 0.1
    refused = sweep._memory_of_step("AnimateDiff (UNetMotionModel)", 64, 8, False, torch.float32)
    assert refused["cannot"] == "at most 32 frames"


@pytest.mark.slow
def test_memory_of_step_measures_one_process():
    assert run_alone(sweep._memory_of_step, "frame by frame", 2, 8, False, torch.float32)["gib_peak"] < 3


def test_bench_sweep_writes_json_tables_and_plots(small, video_model, monkeypatch, tmp_path):
    monkeypatch.setattr(
        sweep,
        "memory_of_steps",
        lambda numbers, **given: [
            {
                "name": "Latent-Shift",
                "frames": number,
                "gib_peak": 1.0,
                "side": given["side"],
                "full": given["full"],
            }
            for number in numbers
        ],
    )
    monkeypatch.setattr(sweep, "limits", partial(limits, seconds=0.05, num_bytes=2**27))
    row = {"frames": 8, "seconds_a_clip": 12.34, "clips_per_s": 0.123}
    monkeypatch.setattr(sweep, "whole_clips", lambda model, **_: [{"model": model, **row}])
    monkeypatch.setattr(
        sweep, "timed_networks", lambda **options: dict([*networks.timed_networks(**options).items()][:2])
    )
    made = run(
        "bench", "sweep", "--frames", 2, "--sides", 16, "--clips", 1, "--side", 8, "--rounds", 3, "-m", video_model, "-o", tmp_path / "sweep.json",
        "--plots", tmp_path / "plots",
    )  # fmt: skip
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert {each["line"] for each in result["points"]} == {"frames", "side", "clips"}
    assert (result["memory"][0]["frames"], result["memory"][0]["side"], result["memory"][0]["full"]) == (
        2,
        8,
        False,
    )
    assert result["whole clips"] == [{"model": str(video_model), **row}]
    assert f"| {video_model}, 8 frames | 12.3 | 0.123 |" in made
    assert (result["dtype"], result["rounds"]) == ("float32", 3)
    image = next(
        each for each in result["points"] if each["name"] == "frame by frame" and each["line"] == "side"
    )
    assert image["ratio_least"] <= image["ratio"] <= image["ratio_most"]
    assert (
        f"| 1 x 16 frames, 16x16 | {_cell(result, 'Latent-Shift')} | {_cell(result, 'frame by frame')} |"
        in made
    )
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "sweep-frames-a-second-by-clips.svg", "sweep-memory-at-the-peak-of-one-step.svg", "sweep-relative-to-latent-shift.svg",
        "sweep-share-of-the-roofline.svg", "sweep-time-of-one-step-by-size.svg", "sweep-time-of-one-step.svg",
    ]  # fmt: skip
    again = plots.save(result, tmp_path / "again")
    # Ids are deterministic.
    assert [path.read_text() for path in again] == [
        (tmp_path / "plots" / path.name).read_text() for path in again
    ]
    assert (
        "Relative to Latent-Shift</text>"
        in (tmp_path / "plots" / "sweep-relative-to-latent-shift.svg").read_text()
    )


def _cell(result, name):
    point = [
        each
        for each in result["points"]
        if each["name"] == name and (each["side"], each["frames"]) == (16, 16)
    ][-1]
    return f"{point['seconds']:.3g} s ({point['ratio']:.2f})"


def test_whole_clips_times_the_models_own_settings(video_model):
    (row,) = sweep.whole_clips(str(video_model), num_frames=(2,), rounds=1)
    assert row["frames"] == 2 and np.isfinite([row["seconds_a_clip"], row["clips_per_s"]]).all()


def test_timed_networks_at_full_size_match_stable_diffusion():
    """SD 1.5's U-Net has 860 M parameters, as published; the shift adds none, the others add theirs."""
    counts = {
        name: sizes.num_parameters(each.network)
        for name, each in networks.timed_networks(full=True, device="meta").items()
    }
    assert counts["Latent-Shift"] == counts["frame by frame"] == 859_520_964
    assert all(
        size > 859_520_964 for name, size in counts.items() if name not in ("Latent-Shift", "frame by frame")
    )
