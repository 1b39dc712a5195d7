"""Degradations do what they say, and measures that should respond to them do."""

import json

import numpy as np
import pytest
import torch
from test_check import clouds
from test_cli import run
from test_extractors import videomae_folder
from typer.testing import CliRunner

from latent_shift import video
from latent_shift.cli import main
from latent_shift.data.pack import pack
from latent_shift.evaluation import sensitivity
from latent_shift.evaluation.features import Extractor, Weights
from latent_shift.evaluation.measures import DISTANCES, MEASURES, open_distances


@pytest.fixture(scope="module")
def clips():
    return np.stack([clouds(12, seed) for seed in range(12)])


def test_degradations_change_what_they_say(clips):
    rng, clip = np.random.default_rng(0), clips[0]
    assert np.std(sensitivity.add_noise(np.full((4, 64, 64, 3), 128, np.uint8), 0.25, rng)) == pytest.approx(
        16, rel=0.02
    )
    assert (
        np.abs(np.diff(sensitivity.blur(clip, 1.0, rng).astype(int), axis=2)).mean()
        < np.abs(np.diff(clip.astype(int), axis=2)).mean()
    )
    mixed = sensitivity.shuffle(clip, 1.0, rng)
    assert not np.array_equal(mixed, clip)
    assert sorted(frame.tobytes() for frame in mixed) == sorted(frame.tobytes() for frame in clip)
    half = sensitivity.shuffle(clip, 0.5, rng)
    assert 6 <= sum(np.array_equal(a, b) for a, b in zip(half, clip, strict=True)) < 12
    still = sensitivity.freeze(clip, 0.5, rng)
    assert np.array_equal(still[:6], clip[:6]) and np.array_equal(still[-1], still[6])
    assert np.array_equal(sensitivity.freeze(clip, 1.0, rng), np.repeat(clip[:1], 12, axis=0))


def test_sensitivity_rises_where_measures_respond(clips):
    found = sensitivity.sensitivity(clips, open_distances(Weights()), strengths=(0.25, 1.0))
    assert all(
        {name for name, measure in MEASURES.items() if measure.score} < measures.keys()
        for measures in found.values()
    )
    says = {
        way: {name: sensitivity.trend(values) for name, values in measures.items()}
        for way, measures in found.items()
    }
    assert says["noise"]["kd-efficientnet-lite0"] == says["noise"]["kd-efficientnet-lite0-motion"] == "rises"
    assert says["blur"]["kd-efficientnet-lite0"] == "rises"
    assert says["shuffle"]["kd-efficientnet-lite0"] == "stays"  # of single frames
    assert says["shuffle"]["kd-efficientnet-lite0-motion"] == "rises"
    assert says["shuffle"]["flicker"] == "rises" and says["shuffle"]["coherence"] == "falls"
    assert says["freeze"]["motion_energy"] == "falls"
    assert found["freeze"]["motion_energy"][-1] == 0
    assert says["noise"]["warping_error"] == "rises"


def test_sensitivity_covers_the_frechet_distance_of_motion(clips, monkeypatch):
    """It needs more clips than features, and none of the singular values of an interval."""
    rng = np.random.default_rng(0)
    narrow = Extractor("narrow", "", "", "clip", lambda x: torch.from_numpy(rng.standard_normal((len(x), 2))))
    (row,) = [MEASURES[name] for name in DISTANCES if name == "fd-efficientnet-lite0-motion"]
    assert row.protocols == () and row.options == {"motion": True}
    calls, svd = [], np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda *args, **options: calls.append(1) or svd(*args, **options))
    result = sensitivity.sensitivity(clips, [(row, narrow)], strengths=(1.0,))
    assert all(len(measures["fd-efficientnet-lite0-motion"]) == 2 for measures in result.values())
    assert len(calls) == 1 + len(sensitivity.DEGRADATIONS)


def test_trend_names_direction():
    assert [sensitivity.trend(values) for values in ([1, 2, 3], [3, 2, 2], [1, 1.001, 1], [1, 3, 2])] == [
        "rises",
        "falls",
        "stays",
        "",
    ]


def test_bench_measures_prints_table(tmp_path):
    videomae = videomae_folder(tmp_path / "videomae")
    rows = []
    for seed in range(6):
        video.write(clouds(12, seed), tmp_path / "clips" / f"{seed}.webp", fps=8)
        rows.append({"file_name": f"{seed}.webp", "text": f"cloud {seed}"})
    (tmp_path / "clips" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(tmp_path / "clips", tmp_path / "packed", size=32, fps=8)
    weights = ("--weights", f"videomae={videomae}")
    printed = run(
        "bench",
        "measures",
        tmp_path / "packed",
        "--num",
        6,
        "--num-frames",
        4,
        *weights,
        "-o",
        tmp_path / "measures.json",
    )
    found = json.loads((tmp_path / "measures.json").read_text())
    assert [each["name"] for each in found["extractors"]] == [
        "efficientnet-lite0",
        "efficientnet-lite0-motion",
        "videomae",
    ]
    assert len(found["measures"]["noise"]["kvd-videomae"]) == 5
    assert set(found["measures"]) == set(sensitivity.DEGRADATIONS)
    assert found["data"]["clips"] == 6
    refused = CliRunner().invoke(
        main.app,
        ["bench", "measures", str(tmp_path / "packed"), "--trust-weights", "--weights", f"c3d={tmp_path}"],
    )
    assert "c3d: no measure here uses it; expected i3d, inception, videomae" in str(refused.exception)
    energy = found["measures"]["freeze"]["motion_energy"]
    assert f"| motion_energy | freeze | {energy[0]:.4g} |" in printed
