"""Protocols, resumed evaluations, the values of every measure and the metadata of every record."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from test_extractors import clip_folder, scripts  # noqa: F401
from test_public_sets import msrvtt as make_msrvtt
from test_public_sets import ucf101 as make_ucf101
from tiny import enter_process, full_disk, launch, traced

from latent_shift import video
from latent_shift.cli.main import main
from latent_shift.data.latents import LatentStore
from latent_shift.data.pack import pack
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store
from latent_shift.diffusion import noise_schedule
from latent_shift.evaluation import (
    clip_metrics,
    denoising,
    features,
    measures,
    protocols,
    statistics,
    systems,
)
from latent_shift.evaluation.comparison import Comparison
from latent_shift.evaluation.evaluate import SavedClips, add_paired_differences, evaluate, generate_clips
from latent_shift.evaluation.features import Weights
from latent_shift.evaluation.measures import MEASURES, Label, Measure
from latent_shift.evaluation.tables import markdown, skipped_measures
from latent_shift.models.autoencoder import to_pixels
from latent_shift.models.text import embed
from latent_shift.noise import correlated_noise
from latent_shift.pipelines.loading import load
from latent_shift.runtime import seed
from latent_shift.shift import Shift, inflate
from latent_shift.training.objectives import DenoisingObjective


@pytest.fixture
def system(video_model):
    return systems.open_system(
        str(video_model), name="tiny", num_frames=4, num_inference_steps=1, guidance_scale=1.0, device="cpu"
    )


@pytest.fixture
def protocol(packed):
    return protocols.open_protocol("own", packed, num_frames=4)


SCORES = {name: measure.score for name, measure in MEASURES.items() if measure.score}


def values(result):
    return {record["measure"]: record["value"] for record in result["records"]}


def test_evaluate_measures_saved_clips(system, protocol, packed, tmp_path):
    result = evaluate(system, protocol, tmp_path)
    numbers, saved = values(result), SavedClips(tmp_path / "tiny" / "clips", 4)
    clips = np.stack([saved(k) for k in range(3)])
    assert clips.shape == (3, 4, 32, 32, 3)
    again = np.concatenate([system.generate([prompt], [k]) for k, prompt in enumerate(protocol.prompts)])
    # Each clip has its own seed in any batch; batches may round differently.
    assert np.abs(clips.astype(int) - again).max() <= 1
    real = np.stack([protocol.real(k) for k in range(3)])
    assert all(
        any(np.array_equal(clip, Store(packed).window(index, 0, 4)) for index in range(3)) for clip in real
    )
    for name, score in SCORES.items():
        assert numbers[name] == pytest.approx(np.mean([score(clip) for clip in clips])), name
        assert numbers[name + "_real"] == pytest.approx(np.mean([score(clip) for clip in real])), name
    generated_energy, real_energy = (
        np.array([clip_metrics.motion_energy(clip) for clip in some]) + 0.1 for some in (clips, real)
    )
    assert numbers["motion_error"] == pytest.approx(
        np.exp(np.abs(np.log(generated_energy / real_energy)).mean())
    )
    captions = {"other_cluster_ids": np.arange(3)}
    motion = [features.efficientnet(motion=True)(some) for some in (clips, real)]
    assert numbers["kd-efficientnet-lite0-motion"] == pytest.approx(
        statistics.kernel_estimate(*motion, **captions).value
    )
    frames = [features.efficientnet()(some) for some in (clips, real)]
    assert numbers["kd-efficientnet-lite0"] == pytest.approx(
        statistics.kernel_estimate(*frames, **captions).value
    )
    ranks = retrieval_ranks(*frames)
    assert numbers["retrieval_top1"] == np.mean(ranks == 1) and numbers["retrieval_median_rank"] == np.median(
        ranks
    )
    # Three clips are all among the first five.
    assert 0 <= numbers["retrieval_top1"] <= 1 and "retrieval_top5" not in numbers
    pairs = enumerate(zip(real, protocol.prompts, strict=True))
    denoised = [
        denoising.denoising(system.pipe, clip, prompt, noise=(0, 0), number=k) for k, (clip, prompt) in pairs
    ]
    assert numbers["denoising_error"] == pytest.approx(np.mean([errors for errors, _ in denoised]))
    residual = sum(motions[875].residual_per_frame for _, motions in denoised)
    total = sum(motions[875].total for _, motions in denoised)
    assert numbers["motion_seen_at_875_frame_by_frame"] == pytest.approx(1 - residual / total)
    assert {"motion_seen_at_125", "motion_seen_at_875", "motion_seen_at_875_frame_by_frame"} <= numbers.keys()
    assert "reconstruction_psnr_db" not in numbers
    assert "one clip has no interval" in result["skipped"]["reconstruction"]  # the set holds out one concept


def retrieval_ranks(*features_NGD):
    means = [rows.mean(axis=1) for rows in features_NGD]
    return clip_metrics.retrieval_ranks(
        *(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12) for rows in means)
    )


def test_retrieval_counts_first_five_of_more_clips(system, protocol, tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (6, 4, 32, 32, 3), np.uint8)
    six = replace(
        protocol,
        prompts=protocol.prompts * 2,
        cluster_ids=[*range(6)],
        num_real=6,
        real=lambda n: protocol.real(n % 3),
    )
    comparison = Comparison(system, six, lambda k: clips[k], tmp_path, tmp_path / "tiny", Weights())
    _, top5, _ = measures.compute(comparison, "retrieval")
    ranks = retrieval_ranks(
        *(comparison.features(features.efficientnet(), real=real) for real in (False, True))
    )
    assert (top5.measure, top5.samples, top5.value) == ("retrieval_top5", 6, np.mean(ranks <= 5))


def test_reconstruction_uses_train_split_where_nothing_is_held_out(system, protocol, packed, tmp_path):
    protocol.store.splits = {"train"}
    comparison = Comparison(
        system, protocol, lambda k: protocol.real(k), tmp_path, tmp_path / "tiny", Weights()
    )
    (record,) = measures.compute(comparison, "reconstruction")
    expected = denoising.reconstruction(system.pipe.vae, Store(packed), splits=("train",), num=3)
    assert (record.value, record.samples) == (pytest.approx(expected.mean()), 3)
    assert (record.reference["splits"], record.reference["clips"], record.seeds) == (["train"], 3, None)


def test_measures_table_takes_a_new_measure_in_one_row(system, protocol, tmp_path, monkeypatch):
    """A row is all that a new measure needs: it is computed, labelled and compared."""
    row = Measure(
        "brightness",
        measures.per_clip,
        {"brightness": Label("brightness", "higher", "mean grey level")},
        ("own",),
        score=np.mean,
    )
    monkeypatch.setattr(measures, "MEASURES", {"brightness": row})
    task = replace(protocol, measures=measures.names_for("own"))
    results = [evaluate(replace(system, name=name), task, tmp_path) for name in ("a", "b")]
    clips = SavedClips(tmp_path / "a" / "clips", 4)
    assert values(results[0])["brightness"] == pytest.approx(np.mean([clips(k) for k in range(3)]))
    assert measures.label_of("brightness_real").text == "brightness"
    assert add_paired_differences(results, tmp_path)[1]["records"][0]["more"]["value"] == 0


def test_records_hold_their_metadata(system, protocol, tmp_path):
    result = evaluate(system, protocol, tmp_path)
    assert json.loads((tmp_path / "tiny" / "results.json").read_text()) == json.loads(json.dumps(result))
    for record in result["records"]:
        slack = 1e-9 * abs(record["value"])  # for constant values
        held = record["low"] - slack <= record["value"] <= record["high"] + slack
        assert held or record["measure"].startswith("retrieval"), record
        assert (record["protocol"], record["clips"], record["num_frames"], record["fps"]) == (
            "own",
            3,
            4,
            8.0,
        )
        own = (None, None) if record["measure"].endswith("_real") else ([32, 32], "0..2")
        assert (record["made_at"], record["seeds"]) == own
        assert record["resamples"] > 1 and record["samples"] > 1
    (distance,) = [
        record for record in result["records"] if record["measure"] == "kd-efficientnet-lite0-motion"
    ]
    assert distance["extractor"]["sha256"] == features.efficientnet().sha256
    assert distance["reference"]["clips"] == 3 and len(distance["reference"]["sha256"]) == 64
    assert result["system"]["weights"] == features.digest(system.pipe.config._name_or_path)
    assert result["skipped"]["fd-efficientnet-lite0"].startswith("3 clips of 1280 features")
    assert "StyleGAN-V" not in result["skipped"]["clipsim"] and "CLIPModel" in result["skipped"]["clipsim"]
    shown = markdown([result])
    assert shown.startswith("protocol own: 3 clips of 4 frames; 95 % intervals in brackets")
    assert f"| motion_energy | {values(result)['motion_energy']:.4g} (" in shown and "biased" not in shown
    distance["biased"] = True
    assert f"{distance['value']:.4g} (biased; {distance['low']:.4g} to " in markdown([result])


def test_evaluate_resumes_and_shares_clips(system, protocol, tmp_path, monkeypatch):
    calls = []

    def stopping(prompts, seeds, generate=system.generate):
        calls.append(seeds)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(prompts, seeds)

    broken = replace(system, generate=stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(broken, protocol, tmp_path, batch_size=2)
    first = evaluate(broken, protocol, tmp_path, batch_size=2)
    assert calls == [[0, 1], [2], [2]]
    features = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert evaluate(broken, protocol, tmp_path) == first
    assert len(calls) == 3 and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == features
    for rank in (1, 0):  # each of two processes generates its own clips
        generate_clips(system, protocol, tmp_path / "shared", rank=rank, world_size=2)
        assert len(list((tmp_path / "shared" / "clips").iterdir())) == (1 if rank else 3)
    a, b = (SavedClips(tmp_path / name / "clips", 4) for name in ("tiny", "shared"))
    assert all(np.abs(a(k).astype(int) - b(k)).max() <= 1 for k in range(3))


def test_cached_rows_reuse_finished_parts(system, protocol, clip_folder, tmp_path):  # noqa: F811
    weights = Weights({"clip": str(clip_folder)})
    evaluate(system, protocol, tmp_path, weights=weights)
    paths = list(tmp_path.rglob("*.npy"))
    before = {path: np.load(path) for path in paths}
    kinds = {path.stem.split("-")[0] for path in paths}
    assert kinds == {"efficientnet", "temporal", "denoising", "reconstruction", "clipsim"} and not list(
        tmp_path.rglob("*.parts")
    )
    for path in paths:
        path.unlink()
        path.with_suffix(".parts").mkdir()
        # A part on disk is not computed again.
        np.save(path.with_suffix(".parts") / "000000.npy", before[path] + 1)
    evaluate(system, protocol, tmp_path, weights=weights)
    assert all(np.array_equal(np.load(path), before[path] + 1) for path in paths) and not list(
        tmp_path.rglob("*.parts")
    )


def test_cached_rows_compute_parts_of_256_clips(system, protocol, tmp_path):
    comparison = Comparison(system, protocol, lambda k: k, tmp_path, tmp_path, Weights())
    asked: list[range] = []

    def take(numbers):
        asked.append(numbers)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return np.array([[k, k * k] for k in numbers], np.float32)

    with pytest.raises(KeyboardInterrupt):
        comparison.cached_rows("squares", take, 600)
    np.testing.assert_array_equal(
        comparison.cached_rows("squares", take, 600), [[k, k * k] for k in range(600)]
    )
    assert asked == [range(256), range(256, 512), range(256, 512), range(512, 600)]


def test_cached_rows_on_a_full_disk_keep_the_parts(system, protocol, tmp_path):
    comparison = Comparison(system, protocol, lambda k: k, tmp_path, tmp_path, Weights())
    rows = np.random.default_rng(0).normal(size=(600, 10))
    with full_disk(30_000), pytest.raises(OSError, match="the disk is full") as error:
        comparison.cached_rows("rows", lambda numbers: rows[numbers], 600)
    assert error.value.filename == str(tmp_path / "rows.npy") and not (tmp_path / "rows.npy").exists()
    asked: list[range] = []
    assert np.array_equal(comparison.cached_rows("rows", asked.append, 600), rows) and not asked
    (tmp_path / "rows.parts").mkdir()
    (tmp_path / "rows.npy").rename(tmp_path / "rows.parts" / "000000.npy")
    with pytest.raises(ValueError, match=r"000000\.npy: expected .*; delete it to have it computed again"):
        comparison.cached_rows("rows", lambda numbers: rows[numbers], 600)


def test_clip_scores_of_another_set_have_a_cache_of_their_own(system, protocol, tmp_path, monkeypatch):
    """Evaluations by version 0.1.0 have the six scores in temporal-6.npy."""
    comparison = Comparison(system, protocol, protocol.real, tmp_path, tmp_path / "tiny", Weights())
    before = measures.clip_scores(comparison, "flicker")
    assert [path.name for path in tmp_path.rglob("*.npy")] == ["temporal-6.npy"]
    scores = {name: measure for name, measure in MEASURES.items() if measure.score}
    renamed = {{"coherence": "brightness"}.get(name, name): measure for name, measure in scores.items()}
    renamed["brightness"] = replace(scores["coherence"], name="brightness", score=np.mean)
    monkeypatch.setattr(measures, "MEASURES", renamed)
    np.testing.assert_array_equal(measures.clip_scores(comparison, "flicker"), before)
    means = [protocol.real(k).mean() for k in range(len(protocol.prompts))]
    np.testing.assert_allclose(measures.clip_scores(comparison, "brightness"), means)
    assert len([*tmp_path.rglob("temporal-6-????????.npy")]) == 1


def test_measure_check_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    with pytest.raises(statistics.MeasureUnavailable, match=r"needs OpenCV \(optical flow\): pip install"):
        MEASURES["warping_error"].check(4)


def test_evaluate_counts_clips_of_one_caption_as_one_sample(system, packed, tmp_path):
    task = protocols.open_protocol("classes", packed, num=2, num_frames=4)
    assert (len(task.prompts), task.cluster_ids, task.num_real) == (8, [0, 1] * 4, 2)
    result = evaluate(system, task, tmp_path)
    records = {record["measure"]: record for record in result["records"]}
    assert all(record["samples"] == 2 for record in records.values())
    assert (
        records["flicker"]["clips"],
        records["flicker_real"]["clips"],
        records["flicker"]["reference"],
    ) == (8, 2, None)
    assert records["flicker_real"]["value"] == pytest.approx(
        np.mean([clip_metrics.flicker(task.real(n)) for n in (0, 1)])
    )
    saved = SavedClips(tmp_path / "tiny" / "clips", 4)
    energies = np.array(
        [[clip_metrics.motion_energy(clip) + 0.1 for clip in (saved(k), task.real(k % 2))] for k in range(8)]
    )
    assert records["motion_error"]["value"] == pytest.approx(
        np.exp(np.abs(np.log(energies[:, 0] / energies[:, 1])).mean())
    )


@pytest.mark.parametrize(
    ("num_frames", "missing"),
    [(1, {"motion_energy", "flicker", "coherence"}), (2, {"flicker", "persistence", "loop_gap"})],
)
def test_evaluate_skips_measures_of_longer_clips(video_model, packed, tmp_path, num_frames, missing):
    options = dict(
        name="tiny", num_frames=num_frames, num_inference_steps=1, guidance_scale=1.0, device="cpu"
    )
    task = protocols.open_protocol("own", packed, num_frames=num_frames)
    result = evaluate(systems.open_system(str(video_model), **options), task, tmp_path)
    assert all(f"frames or more, these have {num_frames}" in result["skipped"][name] for name in missing)
    assert np.isfinite(
        [[record[key] for key in ("value", "low", "high")] for record in result["records"]]
    ).all()
    assert "kd-efficientnet-lite0" in values(result)


def test_records_of_real_clips_have_no_seeds_and_size(system, protocol, tmp_path):
    (record,) = [
        record
        for record in evaluate(system, protocol, tmp_path)["records"]
        if record["measure"] == "flicker_real"
    ]
    assert (record["seeds"], record["made_at"], record["clips"], record["reference"]["fps"]) == (
        None,
        None,
        3,
        8.0,
    )


@pytest.mark.timeout(300)
def run_command(words, log):
    enter_process(log, None)
    sys.argv = ["latent-shift", *words]
    main()


def test_eval_command_shares_clips_among_processes(packed, video_model, tmp_path):
    models = ["-m", f"a={video_model}", "-m", f"b={video_model}"]
    options = ["--num-frames", "4", "--steps", "1", "--batch-size", "1"]
    outputs = ["--out", str(tmp_path / "evals"), "-o", str(tmp_path / "out.json")]
    launch(run_command, ["eval", str(packed), *models, *options, *outputs], tmp_path / "log")
    assert (tmp_path / "log").read_text().count(
        "protocol own: 3 clips of 4 frames"
    ) == 1  # one process prints it
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert values(first) == values(second)
    assert len(list((tmp_path / "evals").glob("?/clips/*.png"))) == 6


def test_add_paired_differences_compares_the_same_clips(system, protocol, video_model, tmp_path):
    options = dict(num_frames=4, num_inference_steps=1, guidance_scale=3.0, device="cpu")
    first = evaluate(system, protocol, tmp_path)
    second = evaluate(
        systems.open_system(str(video_model), name="more guided", **options), protocol, tmp_path
    )
    same, other = add_paired_differences([first, second], tmp_path)
    assert same == first and all("more" not in record for record in same["records"])
    clips = [SavedClips(tmp_path / name / "clips", 4) for name in ("tiny", "more-guided")]
    flickers = np.array([[clip_metrics.flicker(saved(k)) for k in range(3)] for saved in clips])
    more = {record["measure"]: record["more"] for record in other["records"] if "more" in record}
    assert more["flicker"]["value"] == pytest.approx(flickers[1].mean() - flickers[0].mean())
    assert (
        more["flicker"]["low"] <= more["flicker"]["value"] <= more["flicker"]["high"]
        and more["flicker"]["than"] == "tiny"
    )
    # Guidance does not affect it.
    assert more["denoising_error"]["value"] == more["motion_seen_at_625"]["high"] == 0
    assert (
        "retrieval_median_rank" in more
        and not {"flicker_real", "kd-efficientnet-lite0", "reconstruction_psnr_db"} & more.keys()
    )
    shown = markdown([same, other])
    assert "signed values are paired differences from tiny on the same clips" in shown
    assert "{value:+.3g} ({low:+.3g} to {high:+.3g})".format(**more["flicker"]) in shown
    reasons = skipped_measures(
        [same, {**other, "skipped": {**other["skipped"], "denoising": "there is a reason"}}]
    )
    assert reasons == [*same["skipped"].items(), ("denoising of more guided", "there is a reason")]


@pytest.mark.slow  # its fast twin is train.compile in test_settings.py
def test_open_system_compiled_generates_the_same_clips(system, protocol, video_model, tmp_path, monkeypatch):
    graphs: list = []
    monkeypatch.setattr(torch.nn.Module, "compile", traced(graphs))
    options = dict(name="tiny", num_frames=4, num_inference_steps=2, guidance_scale=2.0, device="cpu")
    plain, compiled = (
        systems.open_system(str(video_model), **options, compile=each) for each in (False, True)
    )
    first = evaluate(plain, protocol, tmp_path / "plain", batch_size=3)
    assert not graphs
    second = evaluate(compiled, protocol, tmp_path / "compiled", batch_size=3)
    assert len(graphs) == 1  # for the clips; stills and denoising run eagerly
    a, b = (SavedClips(tmp_path / name / "tiny" / "clips", 4) for name in ("plain", "compiled"))
    assert all(np.abs(a(k).astype(int) - b(k)).max() <= 1 for k in range(3))
    assert values(second) == pytest.approx(values(first), rel=0.02, abs=0.02)


def test_evaluate_refuses_other_settings_protocols_and_clips(system, protocol, packed, tmp_path):
    result = evaluate(system, protocol, tmp_path)
    with pytest.raises(ValueError, match="holds an evaluation with another guidance_scale"):
        evaluate(replace(system, settings={**system.settings, "guidance_scale": 2.0}), protocol, tmp_path)
    assert evaluate(replace(system, title="another"), protocol, tmp_path)["records"] == result["records"]
    shutil.copytree(tmp_path, older := tmp_path.with_name("older"))
    (older / "protocol.json").write_text(json.dumps({**protocol.metadata, "latent_shift": "0.0.1"}))
    # Its measures may differ.
    with pytest.raises(ValueError, match="holds an evaluation with another latent_shift"):
        evaluate(system, protocol, older)
    fewer = protocols.open_protocol("own", packed, num=2, num_frames=4)
    with pytest.raises(ValueError, match="holds an evaluation with another clips, "):
        evaluate(system, fewer, tmp_path)
    with pytest.raises(ValueError, match="generates 4 frames a second, the real clips have 8"):
        evaluate(replace(system, fps=4), protocol, tmp_path)
    longer = protocols.open_protocol("own", packed, num_frames=6)
    with pytest.raises(ValueError, match="generates clips of 4 frames, protocol own has 6"):
        evaluate(system, longer, tmp_path / "longer")
    with pytest.raises(ValueError, match="results of different clips cannot be compared"):
        markdown([result, evaluate(system, fewer, tmp_path / "fewer")])
    other = json.loads(json.dumps(result))
    for record in other["records"]:
        record["extractor"] = record["extractor"] and {**record["extractor"], "sha256": "another"}
    with pytest.raises(ValueError, match="with different extractor cannot be compared"):
        markdown([result, other])
    with pytest.raises(
        ValueError, match="results of denoising_error with different noise cannot be compared"
    ):
        markdown([result, evaluate(replace(system, name="b"), protocol, tmp_path, noise=(0.5, 0.5))])
    # The folder of the real clips' features.
    with pytest.raises(ValueError, match="a system cannot be called real"):
        evaluate(replace(system, name="real"), protocol, tmp_path)


def test_evaluate_resizes_clips_to_the_protocols_size(system, protocol, tmp_path):
    def small(prompts, seeds, generate=system.generate):
        return generate(prompts, seeds)[:, :, ::2, ::2]

    result = evaluate(replace(system, generate=small), protocol, tmp_path)
    (record,) = [record for record in result["records"] if record["measure"] == "motion_energy"]
    assert (record["made_at"], record["measured_at"]) == ([16, 16], [32, 32])
    saved = SavedClips(tmp_path / "tiny" / "clips", 4)
    assert saved(0).shape == (4, 16, 16, 3)


def test_open_protocol_ucf101_follows_the_papers(tmp_path):
    task = protocols.open_protocol("ucf101", folder := make_ucf101(tmp_path))
    files = [protocols._first_frames(path) for path in sorted(folder.rglob("*_g08_*.avi"))]
    order = [
        next(n for n, clip in enumerate(files) if np.array_equal(clip, task.real(k)))
        for k in range(task.num_real)
    ]
    assert sorted(order) == [0, 1, 2] != order  # in random order, so that the first clips cover all classes
    assert len(task.prompts) == 10_100 and len(set(task.prompts)) == 101
    assert sum(prompt.startswith("A person") for prompt in set(task.prompts)) > 90
    assert {task.prompts.count(prompt) for prompt in set(task.prompts)} == {100}
    assert set(task.measures) == {"is", "fvd", "kvd", "fvd-videomae", "kvd-videomae", *SCORES}
    assert task.metadata["complete"] is False  # the protocol has 9,537 real clips
    assert replace(task, num_real=9_537).metadata["complete"] is True
    part = protocols.open_protocol("ucf101", folder, num=101)
    assert len(set(part.prompts)) == 101 and part.metadata["complete"] is False
    assert task.real(0).shape[0] == 16 and task.real(0).shape[1] == task.real(0).shape[2]
    with pytest.raises(ValueError, match="has clips of 16 frames, got num_frames=8"):
        protocols.open_protocol("ucf101", folder, num_frames=8)
    with pytest.raises(ValueError, match="num=10101 is out of range; expected 1 to 10100"):
        protocols.open_protocol("ucf101", folder, num=10_101)
    for name in ("trainlist01.txt", "testlist01.txt"):
        next(folder.rglob(name)).unlink()
    with pytest.raises(ValueError, match=r"has no trainlist01\.txt"):
        protocols.open_protocol("ucf101", folder)


def test_open_protocol_msrvtt_follows_the_papers(tmp_path):
    folder = make_msrvtt(tmp_path / "msrvtt", split="test", wordings=2)
    every, one = (protocols.open_protocol(name, folder) for name in ("msrvtt-mav", "msrvtt-lavie"))
    assert len(every.prompts) > len(one.prompts) == one.num_real
    assert set(one.prompts) < set(every.prompts)
    videos = one.num_real
    # In turns, so that the first clips cover all videos.
    assert every.cluster_ids[: 2 * videos] == [*range(videos)] * 2
    assert one.cluster_ids == [*range(videos)]
    assert one.metadata["complete"] is every.metadata["complete"] is False  # the protocol has 2,990 videos
    with pytest.raises(ValueError, match="expected UCF-101 with videos of split train"):
        protocols.open_protocol("ucf101", folder)


def test_open_protocol_of_captions_takes_one_clip_of_each_concept(tmp_path, packed):
    task = protocols.open_protocol("own", packed, num=2, num_frames=4)
    others = {
        "is",
        "fd-efficientnet-lite0-motion",
        "adherence",
        "recognition",
    }  # of UCF-101, of `bench measures` alone, of words
    assert {"fvd", "kvd", "fid", "kid", "is-frames", "clipsim"} < set(task.measures) == set(MEASURES) - others
    assert task.measures == measures.names_for("emoji")
    for name in ("own", "classes"):
        assert protocols.open_protocol(name, packed, num=2, num_frames=4).metadata["complete"] is False
        assert protocols.open_protocol(name, packed, num_frames=4).metadata["complete"] is True
    others = pack_hundred(tmp_path)
    assert len(protocols.open_protocol("own", others).prompts) == 100
    for arguments, message in (
        (("nope", packed), "unknown protocol 'nope'; expected one of own, emoji, words, classes, ucf101"),
        (("emoji", packed), "100 are needed"),
        (("emoji", others), "has no clip of 'birthday cake', which protocol emoji needs"),
    ):
        with pytest.raises(ValueError, match=message):
            protocols.open_protocol(*arguments)
    with pytest.raises(ValueError, match="num=-1 is out of range; expected 1 or more"):
        protocols.open_protocol("own", packed, num=-1, num_frames=4)
    with pytest.raises(ValueError, match="3 concepts of train have clips of 4 frames, 4 are needed"):
        protocols.open_protocol("own", packed, num=4, num_frames=4)


def test_evaluate_computes_published_measures_of_public_sets(system, scripts, clip_folder, tmp_path):  # noqa: F811
    """IS, FVD and CLIPSIM are computed with files of the published signatures."""
    longer = replace(system, generate=lambda prompts, seeds: np.stack([noise(k) for k in seeds]))

    def small(name, data, **options):
        return replace(protocols.open_protocol(name, data, **options), size=(32, 32))

    weights = Weights(
        {"i3d": str(scripts / "i3d.pt"), "c3d": str(scripts / "c3d.pt"), "clip": str(clip_folder)},
        trust=True,
    )
    (tmp_path / "u").mkdir()
    result = evaluate(
        longer, small("ucf101", make_ucf101(tmp_path / "u"), num=102), tmp_path / "1", weights=weights
    )
    numbers, (record,) = values(result), [record for record in result["records"] if record["measure"] == "is"]
    assert numbers["is"] == pytest.approx(
        statistics.inception_score(weights.open("c3d")(np.stack([noise(k) for k in range(102)]))).value
    )
    assert record["low"] < record["value"] < record["high"] and record["samples"] == 102
    assert result["skipped"]["fvd"].startswith("3 samples of 400 features: the Frechet distance needs more")
    assert "kvd" in numbers and "VideoMAE" in result["skipped"]["fvd-videomae"]
    # Motion cannot be compared.
    assert result["skipped"]["flicker"] == "the real clips have 25 frames a second, these 8"
    with pytest.raises(ValueError, match="clip: no measure here uses it; expected i3d, c3d, videomae"):
        measures.check_weights(weights, protocols.open_protocol("ucf101", tmp_path / "u").measures)
    prompts = protocols.open_protocol("msrvtt-lavie", make_msrvtt(tmp_path / "m", split="test")).prompts
    result = evaluate(longer, small("msrvtt-lavie", tmp_path / "m"), tmp_path / "2", weights=weights)
    with pytest.raises(ValueError, match="generates 16 frames a second, the real clips have 8"):
        evaluate(replace(longer, fps=16), small("msrvtt-lavie", tmp_path / "m"), tmp_path / "3")
    expected = weights.open("clip")(np.stack([noise(k) for k in range(len(prompts))]), prompts).mean()
    assert values(result)["clipsim"] == pytest.approx(expected, abs=1e-6)


def test_evaluate_refuses_unreadable_real_clips_before_generating(system, scripts, tmp_path):  # noqa: F811
    folder = make_ucf101(tmp_path / "ucf")
    ucf = protocols.open_protocol("ucf101", folder, num=3)
    for file in folder.rglob("*.avi"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"\.avi: cannot be decoded"):
        evaluate(system, ucf, tmp_path / "out", weights=Weights({"i3d": str(scripts / "i3d.pt")}, trust=True))
    assert not list((tmp_path / "out").rglob("clips/*.png"))


def pack_hundred(folder):
    """Pack a data set of 100 captions with the format of emoji's."""
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
def test_denoising_equals_training_objective_and_knows_motion(packed, video_model, prediction):
    pipe = load(video_model)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    clip = Store(packed).window(0, 0, 4)
    errors, seen = denoising.denoising(pipe, clip, "red", noise=(0.3, 0.6), levels=1)
    objective = DenoisingObjective(pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config))
    latents = (
        pipe.vae.encode(to_pixels(torch.from_numpy(clip))).latent_dist.mean * pipe.vae.config.scaling_factor
    )
    own, common = (
        torch.randn(1, n, *latents.shape[1:], generator=generator) for generator in [seed(0)] for n in (4, 1)
    )
    loss, _ = objective(
        latents[None],
        correlated_noise(own, common, 0.3, 0.6),
        torch.tensor([500]),
        embed(pipe.tokenizer, pipe.text_encoder, ["red"]),
    )
    assert errors.shape == (4,)
    assert errors.mean() == pytest.approx(float(loss), rel=1e-4)
    residual, residual_per_frame, moving = seen[500]
    assert residual_per_frame != residual
    assert moving == pytest.approx(float((latents - latents.mean(dim=0)).square().sum()), rel=1e-4)
    assert residual > 0
    real_call = pipe.unet.forward

    def oracle(noisy, timestep, *args, **kwargs):  # a model that knows the clip predicts all of its motion
        made = real_call(noisy, timestep, *args, **kwargs)
        schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        a, s = schedule.alphas_cumprod[500] ** 0.5, (1 - schedule.alphas_cumprod[500]) ** 0.5
        noise = (noisy - a * latents) / s
        made.sample = noise if prediction == "epsilon" else a * noise - s * latents
        return made

    pipe.unet.forward = oracle
    errors, seen = denoising.denoising(pipe, clip, "red", noise=(0.3, 0.6), levels=1)
    assert errors.mean() == pytest.approx(0, abs=1e-6)
    assert seen[500].residual == pytest.approx(0, abs=1e-4 * moving)
    pipe.unet.forward = real_call
    with_it = denoising.denoising(pipe, clip, "red", noise=(0.3, 0.6), levels=2)[1]
    inflate(pipe.unet, Shift(0, 0))
    without = denoising.denoising(pipe, clip, "red", noise=(0.3, 0.6), levels=2)[1]
    for timestep, motion in without.items():  # without a shift, frames together tell no more
        assert motion.residual == pytest.approx(motion.residual_per_frame, rel=1e-4)
        assert with_it[timestep].residual_per_frame == pytest.approx(motion.residual_per_frame, rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
def test_held_out_losses_of_a_network_that_predicts_zero(latents, video_model, prediction):
    """They are the mean square of what it should have predicted: of independent noise and whitened latents."""
    unet, store = load(video_model, device="cpu", dtype=torch.float32).unet, LatentStore(latents)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    schedule = noise_schedule(prediction=prediction)
    settings = {"splits": tuple(store.splits), "num_clips": 6, "num_frames": 4, "levels": 2}
    losses = denoising.held_out_losses(unet, schedule, store, **settings)
    torch.manual_seed(1)
    assert losses == denoising.held_out_losses(unet, schedule, store, **settings)
    rng, square = np.random.default_rng(0), []
    for index in BalancedSampler(store, store.select(splits=store.splits, num_frames=4)).draw(rng, 6):
        square.append(np.square(store.window(index, 0, 4)[:, 0].astype(np.float32)).mean())
    latent = float(np.mean(square))
    signal = schedule.alphas_cumprod
    for step, loss in losses.items():
        expected = {
            "epsilon": 1.0,
            "v_prediction": float(signal[int(step)] + (1 - signal[int(step)]) * latent),
            "flow_prediction": 1 + latent,
        }
        assert loss == pytest.approx(expected[prediction], rel=0.15), step
