"""Protocols say what is drawn, evaluations keep it and go on, and every number says what it was taken with."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import traced
from diffusers import DDPMScheduler
from test_extractors import clip_folder, scripts  # noqa: F401
from test_public_sets import msrvtt as make_msrvtt
from test_public_sets import ucf101 as make_ucf101

from latent_shift import video
from latent_shift.data.pack import pack
from latent_shift.data.store import Store
from latent_shift.diffusion import correlated_noise
from latent_shift.evaluation import clip_metrics, denoising, features, protocols, statistics, systems
from latent_shift.evaluation.evaluate import Drawn, compared, draw, evaluate
from latent_shift.evaluation.measures import Measuring, Weights
from latent_shift.evaluation.tables import lacking, table
from latent_shift.models.autoencoder import to_pixels
from latent_shift.models.text import embed
from latent_shift.pipelines.loading import load
from latent_shift.runtime import seed
from latent_shift.shift import Shift, inflate
from latent_shift.training.objectives import DenoisingObjective


@pytest.fixture
def system(video_model):
    return systems.open_system(str(video_model), name="tiny", num_frames=4, num_inference_steps=1, guidance_scale=1.0, device="cpu")


@pytest.fixture
def protocol(packed):
    return protocols.open_protocol("own", packed, num_frames=4)


def values(result):
    return {record["measure"]: record["value"] for record in result["records"]}


def test_the_numbers_are_those_of_the_kept_clips(system, protocol, packed, tmp_path):
    result = evaluate(system, protocol, tmp_path)
    found, drawn = values(result), Drawn(tmp_path / "tiny" / "clips", 4)
    clips = np.stack([drawn(k) for k in range(3)])
    assert clips.shape == (3, 4, 32, 32, 3)
    again = np.concatenate([system.generate([prompt], [k]) for k, prompt in enumerate(protocol.prompts)])
    assert np.abs(clips.astype(int) - again).max() <= 1  # each has its own seed, whatever it was drawn with; a batch may round otherwise
    real = np.stack([protocol.real(k) for k in range(3)])
    assert all(any(np.array_equal(clip, Store(packed).window(index, 0, 4)) for index in range(3)) for clip in real)
    for name, measure in clip_metrics.CLIP_MEASURES.items():
        assert found[name] == pytest.approx(np.mean([measure(clip) for clip in clips])), name
        assert found[name + "_real"] == pytest.approx(np.mean([measure(clip) for clip in real])), name
    energies = [np.array([clip_metrics.motion_energy(clip) for clip in each]) + 0.1 for each in (clips, real)]
    assert found["motion_error"] == pytest.approx(np.exp(np.abs(np.log(energies[0] / energies[1])).mean()))
    of_clips = [features.efficientnet(motion=True)(each) for each in (clips, real)]
    assert found["kd-efficientnet-lite0-motion"] == pytest.approx(statistics.kernel_estimate(*of_clips, units_M=np.arange(3)).value)
    of_frames = [features.efficientnet()(each) for each in (clips, real)]
    assert found["kd-efficientnet-lite0"] == pytest.approx(statistics.kernel_estimate(*of_frames, units_M=np.arange(3)).value)
    ranks = clip_metrics.retrieval_ranks(
        *(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12) for rows in (each.mean(axis=1) for each in of_frames))
    )
    assert found["retrieval_top1"] == np.mean(ranks == 1) and found["retrieval_median_rank"] == np.median(ranks)
    seen = [
        denoising.denoising(system.pipe, clip, prompt, noise=(0, 0), number=k)
        for k, (clip, prompt) in enumerate(zip(real, protocol.prompts, strict=True))
    ]
    assert found["denoising_error"] == pytest.approx(np.mean([errors for errors, _ in seen]))
    missed, there = (sum(getattr(motions[875], each) for _, motions in seen) for each in ("missed_alone", "there"))
    assert found["motion_seen_at_875_frame_by_frame"] == pytest.approx(1 - missed / there)
    assert 0 <= found["retrieval_top1"] <= 1 and "retrieval_top5" not in found  # of three all are among the first five
    assert "reconstruction_psnr_db" not in found and "one clip has no interval" in result["skipped"]["reconstruction"]  # held out is one
    six = replace(protocol, prompts=protocol.prompts * 2, of=[*range(6)], num_real=6, real=lambda n: protocol.real(n % 3))
    again = Measuring(system, six, lambda k: drawn(k % 3), tmp_path / "six", tmp_path / "six" / "tiny", Weights(), None)
    top5 = again.retrieval()[1]
    rows = [again.features(features.efficientnet(), real=each).mean(axis=1) for each in (False, True)]
    ranks = clip_metrics.retrieval_ranks(*(each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in rows))
    assert (top5["measure"], top5["samples"], top5["value"]) == ("retrieval_top5", 6, np.mean(ranks <= 5))
    protocol.store.splits = {"train"}  # as of a set that holds nothing out
    result = evaluate(system, protocol, tmp_path / "train")
    (record,) = [record for record in result["records"] if record["measure"] == "reconstruction_psnr_db"]
    expected = denoising.reconstruction(system.pipe.vae, Store(packed), splits=("train",), num=3)
    assert (record["value"], record["samples"]) == (pytest.approx(expected.mean()), 3)
    assert (record["reference"]["splits"], record["reference"]["clips"], record["seeds"]) == (["train"], 3, None)
    assert {"motion_seen_at_125", "motion_seen_at_875", "motion_seen_at_875_frame_by_frame"} <= found.keys()


def test_every_record_says_what_it_was_taken_with(system, protocol, tmp_path):
    result = evaluate(system, protocol, tmp_path)
    assert json.loads((tmp_path / "tiny" / "results.json").read_text()) == json.loads(json.dumps(result))
    for record in result["records"]:
        slack = 1e-9 * abs(record["value"])  # where all are one value
        held = record["low"] - slack <= record["value"] <= record["high"] + slack
        assert held or record["measure"].startswith("retrieval"), record
        assert (record["protocol"], record["clips"], record["num_frames"], record["fps"]) == ("own", 3, 4, 8.0)
        own = (None, None) if record["measure"].endswith("_real") else ([32, 32], "0..2")
        assert (record["made_at"], record["seeds"]) == own
        assert record["resamples"] > 1 and record["samples"] > 1
    (distance,) = [record for record in result["records"] if record["measure"] == "kd-efficientnet-lite0-motion"]
    assert distance["extractor"]["sha256"] == features.efficientnet().sha256
    assert distance["reference"]["clips"] == 3 and len(distance["reference"]["sha256"]) == 64
    assert result["system"]["weights"] == features.digest(system.pipe.config._name_or_path)
    assert result["skipped"]["fd-efficientnet-lite0"].startswith("3 clips of 1280 features")
    assert "StyleGAN-V" not in result["skipped"]["clipsim"] and "CLIPModel" in result["skipped"]["clipsim"]
    shown = table([result])
    assert shown.startswith("protocol own: 3 clips of 4 frames; in brackets 95 % by bootstrap")
    assert f"| motion_energy | {values(result)['motion_energy']:.4g} (" in shown and "biased" not in shown
    distance["biased"] = True
    assert f"{distance['value']:.4g} (biased; {distance['low']:.4g} to " in table([result])


def test_an_evaluation_goes_on_and_shares_its_work(system, protocol, tmp_path, monkeypatch):
    calls = []

    def stopping(prompts, seeds, draw=system.generate):
        calls.append(seeds)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(prompts, seeds)

    broken = replace(system, generate=stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(broken, protocol, tmp_path, batch_size=2)
    first = evaluate(broken, protocol, tmp_path, batch_size=2)
    assert calls == [[0, 1], [2], [2]]
    features = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert evaluate(broken, protocol, tmp_path) == first
    assert len(calls) == 3 and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == features
    for rank in (1, 0):  # of two processes each draws its own
        draw(system, protocol, tmp_path / "shared", rank=rank, world=2)
        assert len(list((tmp_path / "shared" / "clips").iterdir())) == (1 if rank else 3)
    a, b = (Drawn(tmp_path / name / "clips", 4) for name in ("tiny", "shared"))
    assert all(np.abs(a(k).astype(int) - b(k)).max() <= 1 for k in range(3))


def test_what_is_found_of_clips_goes_on_where_it_was(system, protocol, clip_folder, tmp_path):  # noqa: F811
    weights = Weights({"clip": str(clip_folder)})
    evaluate(system, protocol, tmp_path, weights=weights)
    paths = list(tmp_path.rglob("*.npy"))
    before = {path: np.load(path) for path in paths}
    kinds = {path.stem.split("-")[0] for path in paths}
    assert kinds == {"efficientnet", "temporal", "denoising", "reconstruction", "clipsim"} and not list(tmp_path.rglob("*.parts"))
    for path in paths:
        path.unlink()
        path.with_suffix(".parts").mkdir()
        np.save(path.with_suffix(".parts") / "000000.npy", before[path] + 1)  # a part that is there is not taken again
    evaluate(system, protocol, tmp_path, weights=weights)
    assert all(np.array_equal(np.load(path), before[path] + 1) for path in paths) and not list(tmp_path.rglob("*.parts"))


def test_many_clips_are_taken_some_at_once(system, protocol, tmp_path):
    measuring = Measuring(system, protocol, lambda k: k, tmp_path, tmp_path, Weights(), None)
    asked: list[range] = []

    def take(numbers):
        asked.append(numbers)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return np.array([[k, k * k] for k in numbers], np.float32)

    with pytest.raises(KeyboardInterrupt):
        measuring.kept("squares", take, 600)
    np.testing.assert_array_equal(measuring.kept("squares", take, 600), [[k, k * k] for k in range(600)])
    assert asked == [range(256), range(256, 512), range(256, 512), range(512, 600)]


def test_clips_of_one_caption_are_one_sample(system, packed, tmp_path):
    task = protocols.open_protocol("classes", packed, num=2, num_frames=4)
    assert (len(task.prompts), task.of, task.num_real) == (8, [0, 1] * 4, 2)
    result = evaluate(system, task, tmp_path)
    records = {record["measure"]: record for record in result["records"]}
    assert all(record["samples"] == 2 for record in records.values())
    assert (records["flicker"]["clips"], records["flicker_real"]["clips"], records["flicker"]["reference"]) == (8, 2, None)
    assert records["flicker_real"]["value"] == pytest.approx(np.mean([clip_metrics.flicker(task.real(n)) for n in (0, 1)]))
    drawn = Drawn(tmp_path / "tiny" / "clips", 4)
    energies = np.array([[clip_metrics.motion_energy(clip) + 0.1 for clip in (drawn(k), task.real(k % 2))] for k in range(8)])
    assert records["motion_error"]["value"] == pytest.approx(np.exp(np.abs(np.log(energies[:, 0] / energies[:, 1])).mean()))


@pytest.mark.parametrize(
    ("num_frames", "missing"), [(1, {"motion_energy", "flicker", "coherence"}), (2, {"flicker", "persistence", "loop_gap"})]
)
def test_clips_too_short_for_a_measure(video_model, packed, tmp_path, num_frames, missing):
    options = dict(name="tiny", num_frames=num_frames, num_inference_steps=1, guidance_scale=1.0, device="cpu")
    task = protocols.open_protocol("own", packed, num_frames=num_frames)
    result = evaluate(systems.open_system(str(video_model), **options), task, tmp_path)
    assert all(f"frames or more, these have {num_frames}" in result["skipped"][name] for name in missing)
    assert np.isfinite([[record[key] for key in ("value", "low", "high")] for record in result["records"]]).all()
    assert "kd-efficientnet-lite0" in values(result)


def test_real_clips_are_told_as_what_they_are(system, protocol, tmp_path):
    (record,) = [record for record in evaluate(system, protocol, tmp_path)["records"] if record["measure"] == "flicker_real"]
    assert (record["seeds"], record["made_at"], record["clips"], record["reference"]["fps"]) == (None, None, 3, 8.0)


@pytest.mark.timeout(300)
def test_processes_share_an_evaluation(packed, video_model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
        "latent_shift",
        "eval",
        packed,
    ]
    options = [
        "-m",
        f"a={video_model}",
        "-m",
        f"b={video_model}",
        "--num-frames",
        "4",
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--out",
        tmp_path / "evals",
    ]
    result = subprocess.run(
        [*map(str, command), *map(str, options), "-o", str(tmp_path / "out.json")], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("protocol own: 3 clips of 4 frames") == 1  # one of them says it
    records = [
        {record["measure"]: record["value"] for record in each["records"]} for each in json.loads((tmp_path / "out.json").read_text())
    ]
    assert records[0] == records[1]
    assert len(list((tmp_path / "evals").glob("?/clips/*.png"))) == 6


def test_systems_are_compared_clip_by_clip(system, protocol, video_model, tmp_path):
    options = dict(num_frames=4, num_inference_steps=1, guidance_scale=3.0, device="cpu")
    first = evaluate(system, protocol, tmp_path)
    second = evaluate(systems.open_system(str(video_model), name="more guided", **options), protocol, tmp_path)
    same, other = compared([first, second], tmp_path)
    assert same == first and all("more" not in record for record in same["records"])
    clips = [Drawn(tmp_path / name / "clips", 4) for name in ("tiny", "more-guided")]
    flickers = np.array([[clip_metrics.flicker(drawn(k)) for k in range(3)] for drawn in clips])
    more = {record["measure"]: record["more"] for record in other["records"] if "more" in record}
    assert more["flicker"]["value"] == pytest.approx(flickers[1].mean() - flickers[0].mean())
    assert more["flicker"]["low"] <= more["flicker"]["value"] <= more["flicker"]["high"] and more["flicker"]["than"] == "tiny"
    assert more["denoising_error"]["value"] == more["motion_seen_at_625"]["high"] == 0  # guidance has no part in it
    assert "retrieval_median_rank" in more and not {"flicker_real", "kd-efficientnet-lite0", "reconstruction_psnr_db"} & more.keys()
    shown = table([same, other])
    assert "with a sign what is more than of tiny, of the same clips" in shown
    assert "{value:+.3g} ({low:+.3g} to {high:+.3g})".format(**more["flicker"]) in shown
    reasons = lacking([same, {**other, "skipped": {**other["skipped"], "denoising": "there is a reason"}}])
    assert reasons == [*same["skipped"].items(), ("denoising of more guided", "there is a reason")]


def test_a_compiled_system_draws_the_same(system, protocol, video_model, tmp_path, monkeypatch):
    graphs: list = []
    monkeypatch.setattr(torch.nn.Module, "compile", traced(graphs))
    options = dict(name="tiny", num_frames=4, num_inference_steps=2, guidance_scale=2.0, device="cpu")
    plain, compiled = (systems.open_system(str(video_model), **options, compile=each) for each in (False, True))
    first = evaluate(plain, protocol, tmp_path / "plain", batch_size=3)
    assert not graphs
    second = evaluate(compiled, protocol, tmp_path / "compiled", batch_size=3)
    assert len(graphs) == 1  # of the clips; none of stills and probing
    a, b = (Drawn(tmp_path / name / "tiny" / "clips", 4) for name in ("plain", "compiled"))
    assert all(np.abs(a(k).astype(int) - b(k)).max() <= 1 for k in range(3))
    assert values(second) == pytest.approx(values(first), rel=0.02, abs=0.02)


def test_other_settings_protocols_and_clips_are_refused(system, protocol, packed, tmp_path):
    result = evaluate(system, protocol, tmp_path)
    with pytest.raises(ValueError, match="was begun with another guidance_scale"):
        evaluate(replace(system, settings={**system.settings, "guidance_scale": 2.0}), protocol, tmp_path)
    shutil.copytree(tmp_path, older := tmp_path.with_name("older"))
    (older / "protocol.json").write_text(json.dumps({**protocol.told, "latent_shift": "0.0.1"}))
    with pytest.raises(ValueError, match="was begun with another latent_shift"):  # whose measures may be others
        evaluate(system, protocol, older)
    fewer = protocols.open_protocol("own", packed, num=2, num_frames=4)
    with pytest.raises(ValueError, match="was begun with another clips, "):
        evaluate(system, fewer, tmp_path)
    with pytest.raises(ValueError, match="makes 4 frames a second, the real clips have 8"):
        evaluate(replace(system, fps=4), protocol, tmp_path)
    longer = protocols.open_protocol("own", packed, num_frames=6)
    with pytest.raises(ValueError, match="makes clips of 4 frames, protocol own is of 6 frames"):
        evaluate(system, longer, tmp_path / "longer")
    with pytest.raises(ValueError, match="results of different clips cannot stand in one table"):
        table([result, evaluate(system, fewer, tmp_path / "fewer")])
    other = json.loads(json.dumps(result))
    for record in other["records"]:
        record["extractor"] = record["extractor"] and {**record["extractor"], "sha256": "another"}
    with pytest.raises(ValueError, match="was taken with different weights"):
        table([result, other])
    with pytest.raises(ValueError, match="denoising_error was taken through different noise"):
        table([result, evaluate(replace(system, name="b"), protocol, tmp_path, noise=(0.5, 0.5))])
    with pytest.raises(ValueError, match="a system cannot be called real"):  # where the features of real clips lie
        evaluate(replace(system, name="real"), protocol, tmp_path)


def test_clips_of_another_size_are_measured_at_the_protocols(system, protocol, tmp_path):
    def small(prompts, seeds, draw=system.generate):
        return draw(prompts, seeds)[:, :, ::2, ::2]

    result = evaluate(replace(system, generate=small), protocol, tmp_path)
    (record,) = [record for record in result["records"] if record["measure"] == "motion_energy"]
    assert (record["made_at"], record["measured_at"]) == ([16, 16], [32, 32])
    drawn = Drawn(tmp_path / "tiny" / "clips", 4)
    assert drawn(0).shape == (4, 16, 16, 3)


def test_protocols_are_those_of_their_papers(tmp_path, packed):
    (tmp_path / "ucf").mkdir()
    ucf = make_ucf101(tmp_path / "ucf")
    task = protocols.open_protocol("ucf101", ucf)
    files = [protocols._clip(path) for path in sorted(ucf.rglob("*_g08_*.avi"))]
    order = [next(n for n, clip in enumerate(files) if np.array_equal(clip, task.real(k))) for k in range(task.num_real)]
    assert sorted(order) == [0, 1, 2] != order  # the first so many are of all classes
    assert len(task.prompts) == 10_100 and len(set(task.prompts)) == 101
    assert sum(prompt.startswith("A person") for prompt in set(task.prompts)) > 90
    assert {task.prompts.count(prompt) for prompt in set(task.prompts)} == {100}
    assert task.told["complete"] is False and task.measures[:3] == ("is", "fvd", "kvd")  # of 9,537 real clips
    assert replace(task, num_real=9_537).told["complete"] is True
    assert len(set(protocols.open_protocol("ucf101", ucf, num=101).prompts)) == 101
    assert protocols.open_protocol("ucf101", ucf, num=101).told["complete"] is False
    assert task.real(0).shape[0] == 16 and task.real(0).shape[1] == task.real(0).shape[2]
    others = hundred(tmp_path / "others")
    assert len(protocols.open_protocol("own", others).prompts) == 100
    shutil.copytree(ucf, unlisted := tmp_path / "unlisted")
    next(unlisted.rglob("trainlist01.txt")).unlink()
    next(unlisted.rglob("testlist01.txt")).unlink()
    msrvtt = make_msrvtt(tmp_path / "msrvtt", split="test", wordings=2)
    every, one = (protocols.open_protocol(name, msrvtt) for name in ("msrvtt-mav", "msrvtt-lavie"))
    assert len(every.prompts) > len(one.prompts) == one.num_real
    assert set(one.prompts) < set(every.prompts)
    videos = one.num_real
    assert every.of[: 2 * videos] == [*range(videos)] * 2 and one.of == [*range(videos)]  # the first so many are of all videos
    assert one.told["complete"] is every.told["complete"] is False  # of 2,990 videos
    asked = protocols.open_protocol("own", packed, num=2, num_frames=4).measures
    assert {"fvd", "kvd", "fid", "kid", "is-frames", "clipsim"} < set(asked) == set(protocols.CAPTIONED["emoji"][2])
    assert protocols.open_protocol("own", packed, num=2, num_frames=4).told["complete"] is False
    assert protocols.open_protocol("own", packed, num_frames=4).told["complete"] is True
    assert protocols.open_protocol("classes", packed, num=2, num_frames=4).told["complete"] is False
    assert protocols.open_protocol("classes", packed, num_frames=4).told["complete"] is True
    for call, message in (
        (("ucf101", msrvtt), "expected UCF-101 with videos of split train"),
        (("nope", packed), "unknown protocol 'nope'; expected one of own, emoji, classes, ucf101"),
        (("emoji", packed), "100 asked for"),
        (("ucf101", unlisted), r"has no trainlist01\.txt"),
        (("emoji", others), "holds other captions than the set of recipes/emoji"),
    ):
        with pytest.raises(ValueError, match=message):
            protocols.open_protocol(*call)
    with pytest.raises(ValueError, match="is of clips of 16 frames, got 8"):
        protocols.open_protocol("ucf101", ucf, num_frames=8)
    with pytest.raises(ValueError, match="the protocol has 10100 clips, 10101 asked for"):
        protocols.open_protocol("ucf101", ucf, num=10_101)
    with pytest.raises(ValueError, match="expected one clip or more, -1 asked for"):
        protocols.open_protocol("own", packed, num=-1, num_frames=4)
    with pytest.raises(ValueError, match="3 concepts of train have clips of 4 frames, 4 asked for"):
        protocols.open_protocol("own", packed, num=4, num_frames=4)


def test_published_measures_of_public_sets(system, scripts, clip_folder, tmp_path):  # noqa: F811
    """IS, FVD and CLIPSIM by their names, of files of the published signatures."""
    longer = replace(system, generate=lambda prompts, seeds: np.stack([noise(k) for k in seeds]))
    small = lambda name, data, **options: replace(protocols.open_protocol(name, data, **options), size=(32, 32))  # noqa: E731
    weights = Weights({"i3d": str(scripts / "i3d.pt"), "c3d": str(scripts / "c3d.pt"), "clip": str(clip_folder)})
    (tmp_path / "u").mkdir()
    result = evaluate(longer, small("ucf101", make_ucf101(tmp_path / "u"), num=102), tmp_path / "1", weights=weights)
    found, (record,) = values(result), [record for record in result["records"] if record["measure"] == "is"]
    assert found["is"] == pytest.approx(statistics.inception_score(weights.open("c3d")(np.stack([noise(k) for k in range(102)]))).value)
    assert record["low"] < record["value"] < record["high"] and record["samples"] == 102
    assert result["skipped"]["fvd"].startswith("3 samples of 400 features: the Frechet distance needs more")
    assert "kvd" in found and "VideoMAE" in result["skipped"]["fvd-videomae"]
    assert result["skipped"]["flicker"] == "the real clips have 25 frames a second, these 8"  # so what moves cannot be compared
    with pytest.raises(ValueError, match="clip: nothing here is measured by it; expected i3d, c3d, videomae"):
        weights.check(protocols.open_protocol("ucf101", tmp_path / "u").measures)
    prompts = protocols.open_protocol("msrvtt-lavie", make_msrvtt(tmp_path / "m", split="test")).prompts
    result = evaluate(longer, small("msrvtt-lavie", tmp_path / "m"), tmp_path / "2", weights=weights)
    with pytest.raises(ValueError, match="makes 16 frames a second, the real clips have 8"):
        evaluate(replace(longer, fps=16), small("msrvtt-lavie", tmp_path / "m"), tmp_path / "3")
    expected = weights.open("clip")(np.stack([noise(k) for k in range(len(prompts))]), prompts).mean()
    assert values(result)["clipsim"] == pytest.approx(expected, abs=1e-6)


def test_a_real_clip_that_cannot_be_read_is_told_before_anything_is_drawn(system, scripts, tmp_path):  # noqa: F811
    folder = make_ucf101(tmp_path / "ucf")
    ucf = protocols.open_protocol("ucf101", folder, num=3)
    for file in folder.rglob("*.avi"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"\.avi: cannot be decoded"):
        evaluate(system, ucf, tmp_path / "out", weights=Weights({"i3d": str(scripts / "i3d.pt")}))
    assert not list((tmp_path / "out").rglob("clips/*.png"))


def hundred(folder):
    """A packed data set of 100 words that has the form of emoji's."""
    for k in range(100):
        clip = np.full((16, 128, 128, 3), k, np.uint8) + np.arange(16, dtype=np.uint8)[:, None, None, None]
        video.write(clip, folder / "media" / f"{k}.webp", fps=8)
    rows = [{"file_name": f"{k}.webp", "text": f"grey {k}"} for k in range(100)]
    (folder / "media" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(folder / "media", folder / "packed", size=128, fps=8)
    return folder / "packed"


def noise(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (16, 32, 32, 3), np.uint8)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_denoising_error_is_the_objectives_and_motion_is_found(packed, video_model, prediction):
    pipe = load(video_model)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    clip = Store(packed).window(0, 0, 4)
    errors, seen = denoising.denoising(pipe, clip, "red", noise=(0.3, 0.6), levels=1)
    objective = DenoisingObjective(pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config))
    latents = pipe.vae.encode(to_pixels(torch.from_numpy(clip))).latent_dist.mean * pipe.vae.config.scaling_factor
    own, common = (torch.randn(1, n, *latents.shape[1:], generator=generator) for generator in [seed(0)] for n in (4, 1))
    loss, _ = objective(
        latents[None], correlated_noise(own, common, 0.3, 0.6), torch.tensor([500]), embed(pipe.tokenizer, pipe.text_encoder, ["red"])
    )
    assert errors.shape == (4,)
    assert errors.mean() == pytest.approx(float(loss), rel=1e-4)
    missed, missed_alone, moving = seen[500]
    assert missed_alone != missed
    assert moving == pytest.approx(float((latents - latents.mean(dim=0)).square().sum()), rel=1e-4)
    assert missed > 0
    real_call = pipe.unet.forward

    def knowing(noisy, timestep, *args, **kwargs):  # one that knows the clip finds all of its motion
        made = real_call(noisy, timestep, *args, **kwargs)
        schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        a, s = schedule.alphas_cumprod[500] ** 0.5, (1 - schedule.alphas_cumprod[500]) ** 0.5
        noise = (noisy - a * latents) / s
        made.sample = noise if prediction == "epsilon" else a * noise - s * latents
        return made

    pipe.unet.forward = knowing
    errors, seen = denoising.denoising(pipe, clip, "red", noise=(0.3, 0.6), levels=1)
    assert errors.mean() == pytest.approx(0, abs=1e-6)
    assert seen[500].missed == pytest.approx(0, abs=1e-4 * moving)
    pipe.unet.forward = real_call
    with_it = denoising.denoising(pipe, clip, "red", noise=(0.3, 0.6), levels=2)[1]
    inflate(pipe.unet, Shift(0, 0))
    without = denoising.denoising(pipe, clip, "red", noise=(0.3, 0.6), levels=2)[1]
    for timestep, motion in without.items():  # a model without a shift sees no more of frames together
        assert motion.missed == pytest.approx(motion.missed_alone, rel=1e-4)
        assert with_it[timestep].missed_alone == pytest.approx(motion.missed_alone, rel=1e-4)
