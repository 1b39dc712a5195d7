"""Training of the three stages at tiny size with real classes, from data to export, and exact resuming."""

import json
import os
import platform
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import ROUNDING, alike, stage_of, tiny_config, traced

from latent_shift import runtime, video
from latent_shift.data.encode import encode
from latent_shift.data.latents import LatentStore
from latent_shift.data.pack import pack
from latent_shift.data.store import Store
from latent_shift.models.autoencoder import to_pixels, whiten
from latent_shift.pipelines import loading
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.recipe import dump, load
from latent_shift.runtime import has_bf16_units, resolve_precision
from latent_shift.training import checkpoint, checks, loop, prepare, stages
from latent_shift.training.loop import train
from latent_shift.training.memory import suggest_smaller_settings
from latent_shift.training.objectives import AutoencoderObjective


def test_train_writes_settings_stats_samples_and_model(video_model):
    run = video_model.parent
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "lr", "grad_norm", "seconds", "clips_per_s", "data_wait_s", "eta_s"} <= set(rows[0])
    assert 0 < rows[0]["seconds"] < rows[-1]["seconds"]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert load(run / "config.toml").stage == "video"
    names = [f"{step:08d}{suffix}" for step in (2, 4) for suffix in (".png", ".webp")]
    assert [path.name for path in sorted((run / "samples").iterdir())] == names
    assert video.read(run / "samples" / "00000004.webp")[0].shape == (4, 3 * 32 + 2 * 2, 4 * 32 + 3 * 2, 3)
    with Image.open(run / "samples" / "00000004.png") as sheet:
        assert sheet.size == (
            4 * 32 + 3 * 2,
            9 * 32 + 8 * 2,
        )  # four frames of eight training prompts and of the one held out
    pipe = LatentShiftPipeline.from_pretrained(video_model)
    weights = load_file(video_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert pipe.config.latent_shift["num_frames"] == 4


def test_train_lowers_the_loss(packed, tmp_path):
    """Forty steps of the smallest autoencoder: the loss falls by half."""
    config = tiny_config("autoencoder", packed, steps=40, optim={"lr": 1e-2}, loss={"kl": 1e-6})
    rows = []
    train(config, tmp_path, report=rows.append)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"purple": 2}, "has no concept 'purple'"),
        ({"{concept}": 0}, "greater than or equal to"),
        ({"{concept}": 1e308}, "less than or equal to"),
        ({"{concept}": "8"}, "valid number"),
        ({"{concept}": True}, "valid number"),
        ([1], "expected a JSON object"),
    ],
)
def test_concept_weights_are_those_of_known_concepts(weights, problem, latents, tmp_path):
    concept, file = LatentStore(latents).records[0].concept, tmp_path / "weights.json"
    file.write_text(json.dumps(weights).replace("{concept}", concept))
    with pytest.raises(ValueError, match=rf"weights\.json: .*{problem}"):
        stage_of(tiny_config("image", latents, data={"concept_weights": str(file)}))


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [("autoencoder", "adamw"), ("image", "adamw"), ("image", "muon"), ("video", "adamw")],
)
def test_train_resumes_exactly(stage, optimizer, packed, latents, tmp_path):
    """Six steps without a break equal 2 + 1 + 3 steps: weights, averages and optimizer states, on a CPU bit for bit."""
    options = {"seed": 3, "log_every": 2}  # the second stop is between two lines of stats.jsonl
    data = packed if stage == "autoencoder" else latents
    config = tiny_config(stage, data, steps=6, train=options, optim={"optimizer": optimizer})
    train(config, tmp_path / "uninterrupted")
    train(
        config,
        tmp_path / "parts",
        report=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 2 else None,
    )
    assert checkpoint.steps(tmp_path / "parts")[-1].name == "step-00000002"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "set_learning_rate", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or set_rate(*_)
        )
        train(config, tmp_path / "parts")
    assert checkpoint.steps(tmp_path / "parts")[-1].name == "step-00000003"
    train(config, tmp_path / "parts")
    uninterrupted, parts = (checkpoint.steps(tmp_path / run)[-1] for run in ("uninterrupted", "parts"))
    assert uninterrupted.name == parts.name == "step-00000006"
    for name in ("model.safetensors", "average.safetensors"):
        assert alike(load_file(uninterrupted / name), load_file(parts / name)), name
    assert (
        ROUNDING
        or (uninterrupted / "average.safetensors").read_bytes()
        == (parts / "average.safetensors").read_bytes()
    )
    a, b = (torch.load(folder / "optimizer.bin", weights_only=False) for folder in (uninterrupted, parts))
    assert alike(a, b)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "stats.jsonl").read_text().splitlines()]
    expected = [
        json.loads(line) for line in (tmp_path / "uninterrupted" / "stats.jsonl").read_text().splitlines()
    ]
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in expected], rel=ROUNDING, abs=0
    )


set_rate = loop.set_learning_rate


def test_train_logs_every_validation(latents, tmp_path):
    config = tiny_config(
        "video",
        latents,
        steps=10,
        data={"val_splits": ["train"]},
        train={"validate_every": 3, "val_batches": 1, "log_every": 5},
    )
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 5, 6, 9, 10]
    assert ["val_loss" in row for row in rows] == [True, False, True, True, True]


def test_save_keeps_complete_checkpoints_over_corrupt_ones(latents, tmp_path):
    config = tiny_config("video", latents, steps=3, train={"checkpoint_minutes": 1e-9, "keep_checkpoints": 2})
    train(config, tmp_path)
    newest = checkpoint.steps(tmp_path)[-1]
    (newest / "optimizer.bin").write_bytes(b"x")
    train(
        tiny_config("video", latents, steps=4, train={"checkpoint_minutes": 1e9, "keep_checkpoints": 2}),
        tmp_path,
    )
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000002", "step-00000004"]
    (checkpoint.steps(tmp_path)[-1] / "state.json").unlink()
    train(config, tmp_path)  # step 2 is still there to resume from
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000002", "step-00000003"]


def test_train_resumes_after_an_interrupted_preparation(latents, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config("video", latents, steps=1), tmp_path / "run")
    assert load(tmp_path / "run" / "config.toml") == tiny_config("video", latents, steps=1)
    train(
        tiny_config("video", latents, steps=1, model={"size": "tiny", "edge": "hold"}), tmp_path / "run"
    )  # nothing had been trained yet


def test_check_store_reports_short_clips_and_unknown_splits(latents, caplog):
    stage_of(tiny_config("video", latents, data={"num_frames": 21}))
    assert "2 of 3 clips are too short for 21 frames at stride 1 and are skipped" in caplog.text
    with pytest.raises(ValueError, match=r"has no split vall; expected train, val_concept"):
        stage_of(tiny_config("video", latents, data={"splits": ["train", "vall"]}))


def test_prepare_resolves_the_precision_of_the_device(latents, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checks, "resolve_device", lambda: torch.device("cpu"))
    for units, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(runtime, "has_bf16_units", lambda units=units: units)
        prepared = prepare.prepare(tiny_config("video", latents, train={"precision": "auto"}), tmp_path)
        assert prepared.precision == expected
    checks.check_settings(tiny_config("video", latents, train={"precision": "bf16"}), tmp_path)
    assert "no units for bf16" in caplog.text
    assert (
        resolve_precision("auto", torch.device("cuda")) == "bf16"
    )  # on a machine without CUDA: that of a recent GPU
    assert resolve_precision("fp16", torch.device("cpu")) == "fp16"


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="reads what Linux says of an x86",
)
def test_has_bf16_units_agrees_with_the_processor():
    assert has_bf16_units() == ("avx512_bf16" in Path("/proc/cpuinfo").read_text().split())


def test_save_deletes_later_corrupt_checkpoints(latents, tmp_path):
    every = {"checkpoint_minutes": 1e-9, "keep_checkpoints": 1}
    train(tiny_config("image", latents, steps=2, train={**every, "keep_checkpoints": 2}), tmp_path)
    newest = checkpoint.steps(tmp_path)[-1]
    (newest / "average.safetensors").write_bytes(b"cut short")
    newest.rename(newest.with_name("step-00000009"))  # as if it were of a much later step
    train(tiny_config("image", latents, steps=3, train=every), tmp_path)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000003"]


def test_check_settings_runs_before_data_is_read(media, image_model, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: pytest.fail("data was read"))
    config = tiny_config("video", media, model={"init": str(image_model)})

    def refused(message: str, **sections) -> None:
        with pytest.raises((ValueError, RuntimeError), match=message):
            train(tiny_config("video", media, **{"model": {"init": str(image_model)}, **sections}), tmp_path)

    refused("unknown model size 'nope'; expected one of", model={"size": "nope"})
    refused(r"train\.shard needs several processes", train={"shard": True})
    find_spec = checks.find_spec
    for package, sections in (
        ("bitsandbytes", {"optim": {"optimizer": "adamw8bit", "steps": 2, "lr": 1e-3, "warmup_steps": 1}}),
        ("peft", {"lora": {"rank": 2}}),
        ("wandb", {"train": {"tracker": "wandb"}}),
    ):
        monkeypatch.setattr(
            checks, "find_spec", lambda name, package=package: None if name == package else find_spec(name)
        )
        refused("pip install", **sections)
    assert config.with_settings({"optim.steps": 5}).optim.steps == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ema", "steps", "warns"), [(0.999, 600, True), (0.999, 5000, False), (0.0, 4, False)]
)
def test_check_settings_warns_of_a_long_average(ema, steps, warns, tmp_path, caplog):
    checks.check_settings(tiny_config("image", "data", steps=steps, optim={"ema": ema}), tmp_path)
    assert ("optim.ema=0.999 averages over about 1000 steps, optim.steps is 600" in caplog.text) == warns
    assert ("try optim.ema=0.983333" in caplog.text) == warns


def test_check_same_run_refuses_another_run(packed, latents, tmp_path):
    train(tiny_config("image", latents, steps=1), tmp_path)
    with pytest.raises(ValueError, match="holds a run with another stage; choose another folder with --run"):
        train(tiny_config("video", latents, steps=1), tmp_path)
    changes = {"model": {"size": "tiny", "edge": "wrap"}, "diffusion": {"prediction": "v_prediction"}}
    with pytest.raises(ValueError, match=r"another model\.edge, diffusion\.prediction"):
        train(tiny_config("image", latents, steps=1, **changes), tmp_path)
    with pytest.raises(ValueError, match=r"another data\.path"):
        train(tiny_config("image", packed, steps=1), tmp_path)


def test_train_step_averages_accumulated_batches(latents, tmp_path):
    """Every part has its own data; loss and gradient are the means over the parts."""
    config = tiny_config("image", latents, steps=2, optim={"accumulate": 3})
    rows = []
    train(config, tmp_path, report=rows.append)
    assert [row["step"] for row in rows] == [1, 2]
    torch.manual_seed(config.train.seed)
    stage = stage_of(config)
    losses = [stage.objective(*stage.draw_batch(np.random.default_rng([0, 0, part])))[0] for part in range(3)]
    torch.stack(losses).mean().backward()
    norm = torch.stack([parameter.grad.norm() for parameter in stage.model.parameters()]).norm()
    assert rows[0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def averages(run) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.steps(run)[-1] / "average.safetensors")


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def two_steps(latents, tmp_path_factory):
    """A run of two steps, and the averages of one of three; resumed, the first ends like the second."""
    folder = tmp_path_factory.mktemp("steps")
    for name, steps in (("two", 2), ("three", 3)):
        train(tiny_config("image", latents, steps=steps), folder / name)
    shutil.copytree(folder / "two", folder / "resumed")
    train(tiny_config("image", latents, steps=3), folder / "resumed")
    assert not differ(averages(folder / "resumed"), averages(folder / "three"))
    return folder / "two", averages(folder / "three")


@pytest.mark.parametrize("key", ["lr", "weight_decay", "beta2", "grad_clip", "ema"])
def test_optimizer_settings_apply_from_the_first_step_and_after_resuming(key, two_steps, latents, tmp_path):
    two, plain = two_steps
    changed = {"lr": 5e-4, "weight_decay": 0.5, "beta2": 0.5, "grad_clip": 1e-3, "ema": 0.0}[key]
    shutil.copytree(two, tmp_path / "resumed")
    for name in ("whole", "resumed"):
        train(tiny_config("image", latents, steps=3, optim={key: changed}), tmp_path / name)
        assert differ(averages(tmp_path / name), plain)


def test_train_in_bf16_or_with_checkpointing_gives_the_same_losses(latents, tmp_path, monkeypatch):
    """bf16 gives nearly the same losses, gradient checkpointing exactly the same."""
    recomputed = []
    checkpoint_once = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: recomputed.append(1) or checkpoint_once(*a, **k)
    )
    losses = {}
    for name, options in (
        ("plain", {}),
        ("bf16", {"precision": "bf16"}),
        ("recomputed", {"gradient_checkpointing": True}),
    ):
        rows: list[dict] = []
        train(tiny_config("video", latents, train=options), tmp_path / name, report=rows.append)
        losses[name] = [row["loss"] for row in rows]
        assert bool(recomputed) == (name == "recomputed")
    assert losses["bf16"] != losses["plain"]
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.02)
    assert losses["recomputed"] == pytest.approx(losses["plain"], rel=1e-6 + ROUNDING)


@pytest.mark.slow  # its fast twin is the setting train.compile in test_settings
def test_train_compiled_gives_the_same_losses(latents, tmp_path, monkeypatch):
    graphs, losses = [], {}
    monkeypatch.setattr(torch.nn.Module, "compile", traced(graphs))
    for name, compiled in (("plain", False), ("compiled", True)):
        torch._dynamo.reset()
        config = tiny_config(
            "video",
            latents,
            steps=6,
            data={"image_share": 0.5, "val_splits": ["train"]},
            train={"compile": compiled, "sample_every": 3},
        )
        rows: list[dict] = []
        train(config, tmp_path / name, report=rows.append)
        losses[name] = [[row["loss"], row.get("val_loss", 0)] for row in rows]
    assert len(graphs) == 2  # one for clips, one for single frames; none for validation and sampling
    np.testing.assert_allclose(losses["compiled"], losses["plain"], rtol=1e-4 + ROUNDING)
    with pytest.raises(ValueError, match=r"train\.compile has no effect in stage autoencoder"):
        tiny_config("autoencoder", latents, train={"compile": True})


def test_train_in_fp16_needs_a_gpu(latents, tmp_path):
    config = tiny_config("video", latents, train={"precision": "fp16"})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"train\.precision=fp16 needs a GPU; on a CPU take bf16"):
            train(config, tmp_path)
        return
    losses: dict[str, list[float]] = {"fp16": [], "no": []}
    for precision in losses:
        config = tiny_config("video", latents, steps=8, train={"precision": precision})
        train(
            config,
            tmp_path / precision,
            report=lambda row, precision=precision: losses[precision].append(row["loss"]),
        )
    assert losses["fp16"] != losses["no"]
    assert losses["fp16"] == pytest.approx(losses["no"], rel=0.02)


def test_prefetch_batches_does_not_depend_on_the_loaders(latents, tmp_path):
    losses = {}
    for loaders in (1, 3):
        rows: list[dict] = []
        config = tiny_config(
            "video", latents, data={"loaders": loaders, "image_share": 0.5}, optim={"accumulate": 2}
        )
        train(config, tmp_path / str(loaders), report=rows.append)
        losses[loaders] = [row["loss"] for row in rows]
    assert losses[1] == pytest.approx(losses[3], rel=ROUNDING, abs=0) and len(set(losses[1])) == 4


def test_draw_batch_may_use_independent_noise(latents):
    def is_shared(probability: float) -> list[bool]:
        """Whether the noise of twelve batches is shared between frames."""
        options = {"shared_noise": 0.9, "independent_noise_prob": probability}
        stage = stage_of(tiny_config("video", latents, diffusion=options))
        noises = [stage.draw_batch(np.random.default_rng(k))[1] for k in range(12)]
        return [float((noise[:, 0] * noise[:, 1]).mean()) > 0.5 for noise in noises]

    assert all(is_shared(0.0)) and not any(is_shared(1.0)) and len(set(is_shared(0.5))) == 2
    with pytest.raises(
        ValueError, match=r"independent_noise_prob has no effect without shared_noise or noise_correlation"
    ):
        tiny_config("video", latents, diffusion={"independent_noise_prob": 0.5})


def test_trim_stats_drops_later_and_cut_lines(tmp_path):
    rows = [{"step": step, "seconds": float(step)} for step in (10, 20, 30)]
    (tmp_path / "stats.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "sec'
    )  # cut by a crash
    assert checkpoint.trim_stats(tmp_path, 20) == 20.0
    assert [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()] == rows[:2]
    assert checkpoint.trim_stats(tmp_path / "absent", 0) == 0.0


def test_check_crop_refuses_crops_that_do_not_fit(packed):
    with pytest.raises(ValueError, match="crop must be a multiple of 8, the autoencoder's factor, got 20"):
        stage_of(tiny_config("autoencoder", packed, data={"crop": 20}))
    with pytest.raises(ValueError, match=r"crop=64 is larger than the frames of .*, 32 a side"):
        stage_of(tiny_config("autoencoder", packed, data={"crop": 64}))


def test_train_saves_on_sigterm_and_resumes(packed, tmp_path):
    """A run stopped in the middle writes a checkpoint and returns; the next call finishes as without the stop."""
    config = tiny_config("autoencoder", packed, steps=6)
    train(
        config,
        tmp_path / "stopped",
        report=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 2 else None,
    )
    assert [path.name for path in checkpoint.steps(tmp_path / "stopped")] == ["step-00000002"]
    assert not (tmp_path / "stopped" / "model").exists()
    train(config, tmp_path / "stopped")
    train(config, tmp_path / "uninterrupted")
    a, b = (
        load_file(tmp_path / run / "model" / "diffusion_pytorch_model.safetensors")
        for run in ("stopped", "uninterrupted")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_save_deletes_old_checkpoints_and_steps_ignores_partial_ones(packed, tmp_path):
    config = tiny_config(
        "autoencoder", packed, steps=5, train={"checkpoint_minutes": 1e-9, "keep_checkpoints": 2}
    )
    train(config, tmp_path)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000004", "step-00000005"]
    (tmp_path / "checkpoints" / ".step-00000009.partial").mkdir()
    assert checkpoint.steps(tmp_path)[-1].name == "step-00000005"


def test_whiten_changes_latents_and_not_pictures(packed):
    torch.manual_seed(0)
    from latent_shift.models import sizes

    vae = sizes.autoencoder("tiny").eval()
    pixels = to_pixels(torch.from_numpy(Store(packed).window(0, 0, 20)))
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        picture = vae.decode(before.mean).sample
        vae.register_to_config(scaling_factor=0.18215)
        whiten(vae, before.mean)
        assert vae.config.scaling_factor == 1
        after = vae.encode(pixels).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            after.mean.std(dim=(0, 2, 3), correction=0), torch.ones(4), rtol=1e-3, atol=1e-3
        )
        scale = before.mean.std(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(after.std, before.std / scale[None, :, None, None], rtol=1e-3, atol=1e-5)


def test_autoencoder_objective_sums_its_terms(packed):
    from latent_shift.models import sizes

    pixels = to_pixels(torch.from_numpy(Store(packed).window(0, 0, 4)))
    noise = torch.randn(4, 4, 4, 4)
    vae = sizes.autoencoder("tiny")
    loss, terms = AutoencoderObjective(vae, kl=0.5, perceptual=2.0)(pixels, noise)
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    l1 = (decoded - pixels).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    torch.testing.assert_close(loss, l1 + 0.5 * kl + 2 * terms["perceptual"])
    assert terms["perceptual"] > 0
    same, _ = AutoencoderObjective(vae, kl=0.0, perceptual=0.0)(pixels, noise)
    torch.testing.assert_close(same, l1)


def test_draw_batch_follows_the_settings(latents):
    stage = stage_of(tiny_config("video", latents, data={"image_share": 0.5, "batch_size": 3}))
    shapes = set()
    for seed in range(20):
        x, noise, timesteps, text = stage.draw_batch(np.random.default_rng(seed))
        assert x.shape == noise.shape
        assert timesteps.shape == (len(x),)
        assert text.shape == (len(x), 20, 32)
        shapes.add(tuple(x.shape))
    assert shapes == {(3, 4, 4, 4, 4), (12, 1, 4, 4, 4)}
    again = stage.draw_batch(np.random.default_rng(19))
    assert all(torch.equal(a, b) for a, b in zip(again, (x, noise, timesteps, text), strict=True))
    emptied = stage_of(tiny_config("video", latents, diffusion={"caption_dropout": 1.0})).draw_batch(
        np.random.default_rng(0)
    )
    null = torch.from_numpy(LatentStore(latents).embed([""])[0])
    assert (emptied[3] == null).all()


def test_draw_batch_adds_the_frame_rate_to_captions_of_strided_clips(packed, autoencoder, texts, tmp_path):
    """Every second frame goes with a caption that names the frame rate."""
    store = encode(packed, tmp_path, autoencoder=autoencoder, texts=texts, strides=[1, 2])
    captions = {text for record in store.records for text in record.texts}
    options = {"strides": [1, 2], "window": "first", "image_share": 0.3, "batch_size": 1}
    stage = stage_of(tiny_config("video", tmp_path, data=options, diffusion={"caption_dropout": 0.0}))
    embeddings = {
        stride: {text.tobytes() for text in store.embed([caption + suffix for caption in captions])}
        for stride, suffix in ((1, ""), (2, ", 4 fps"))
    }
    stage.store._open_shard = lambda key: (
        np.load(tmp_path / "shards" / f"{key}.npy") * np.array([1, 0], np.float16)[:, None, None, None]
    )
    batches = set()
    for seed in range(30):
        latents, _, _, text = (tensor.numpy() for tensor in stage.draw_batch(np.random.default_rng(seed)))
        stride = next(stride for stride in (1, 2) if text[0].tobytes() in embeddings[stride])
        batches.add((latents.shape[1], stride))
        if latents.shape[1] > 1:
            clips = [
                stage.store.window(index, 0, 4, stride=stride)[:, 0].astype(np.float32) for index in range(3)
            ]
            assert any(np.array_equal(latents[0], clip) for clip in clips)
    assert batches == {(1, 1), (4, 1), (4, 2)}
    with pytest.raises(ValueError, match=r"has no captions for data\.strides \[3\]: encode it with --stride"):
        stage_of(tiny_config("video", tmp_path, data={"strides": [1, 3]}))


def test_build_pipeline_samples_with_the_noise_of_training(latents):
    settings = {"shared_noise": 0.5, "noise_correlation": 0.6}
    stage = stage_of(tiny_config("video", latents, diffusion=settings, data={"batch_size": 64}))
    noise = stage.draw_batch(np.random.default_rng(0))[1].flatten(2)
    covariance = torch.einsum("bfn,bgn->fg", noise, noise) / (noise.shape[0] * noise.shape[2])
    apart = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    torch.testing.assert_close(covariance, 0.5 + 0.5 * 0.6**apart, atol=0.08, rtol=0)
    assert settings.items() <= stage.build_pipeline().call_defaults.items()
    other = {"sample_shared_noise": 0.0, "sample_noise_correlation": 0.9}  # the settings of samples win
    stage = stage_of(tiny_config("video", latents, diffusion=settings, train=other))
    assert {
        "shared_noise": 0.0,
        "noise_correlation": 0.9,
    }.items() <= stage.build_pipeline().call_defaults.items()


def test_draw_batch_shifts_timesteps(latents):
    timesteps = [
        stage_of(
            tiny_config("video", latents, diffusion={"timestep_shift": shift}, data={"batch_size": 64})
        ).draw_batch(np.random.default_rng(0))[2]
        for shift in (1.0, 3.0)
    ]
    assert timesteps[1].float().mean() > timesteps[0].float().mean() + 100


def test_exported_model_generates_at_its_training_size(
    media, packed, image_model, autoencoder, texts, tmp_path
):
    pack(media, tmp_path / "pixels", size=64, fps=8)
    encode(tmp_path / "pixels", tmp_path / "latents", autoencoder=autoencoder, texts=texts)
    config = tiny_config("image", tmp_path / "latents", steps=1, model={"init": str(image_model)})
    pipe = loading.load(train(config, tmp_path / "run"))
    assert pipe("red", num_inference_steps=1).frames.shape == (1, 1, 64, 64, 3)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError("8 GiB")]
)
def test_train_out_of_memory_suggests_smaller_settings(error, latents, image_model, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.DenoisingObjective, "forward", lambda *_: (_ for _ in ()).throw(error))
    config = tiny_config(
        "video", latents, model={"init": str(image_model)}, data={"batch_size": 4}, optim={"accumulate": 3}
    )
    other = " in another run folder"
    options = f"train.gradient_checkpointing=true, data.batch_size=2 optim.accumulate=6, train.precision=bf16, optim.optimizer=adamw8bit{other}, lora.rank=32{other}, data.num_frames=2"
    with pytest.raises(RuntimeError, match=f"out of memory: try, in this order, {options}"):
        train(config, tmp_path)
    monkeypatch.setattr(
        stages.DenoisingObjective, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("something else"))
    )
    with pytest.raises(RuntimeError, match=r"^something else$"):
        train(config, tmp_path)
    lowered = config_of(
        config,
        "train.gradient_checkpointing=true",
        "data.batch_size=1",
        "optim.optimizer=adamw8bit",
        "data.num_frames=2",
    )
    assert suggest_smaller_settings(lowered).endswith(
        f"try, in this order, train.precision=bf16, lora.rank=32{other}"
    )
    attention = tiny_config(
        "video", latents, model={"init": str(image_model), "temporal": "attention"}, data={"num_frames": 3}
    )
    assert "lora" not in suggest_smaller_settings(attention) and "num_frames" not in suggest_smaller_settings(
        attention
    )  # which would be refused


def config_of(config, *overrides):
    """Apply suggestions as overrides, which also shows that they are valid ones."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(dump(config))
        return load(path, list(overrides))


def test_check_start_refuses_other_training(latents, image_model, video_model, tmp_path):
    def stage_from(**sections):
        config = tiny_config("video", latents, **sections)
        return stages.DenoiserStage(config, prepare.prepare(config, tmp_path))

    moving = {"init": str(video_model), "edge": "wrap"}
    with pytest.raises(
        ValueError, match=r"model\.edge is wrap, but .* was trained with zero: set it to that"
    ):
        stage_from(model=moving)
    stage_from(model={"init": str(image_model), "edge": "wrap"})
    model = {"init": str(image_model)}
    with pytest.raises(ValueError, match=r"diffusion\.num_timesteps is 100, but .* was trained with 1000"):
        stage_from(model=model, diffusion={"num_timesteps": 100})
    with pytest.raises(
        ValueError,
        match=r"diffusion\.prediction is v_prediction, but .* was trained with epsilon: set it to that",
    ):
        stage_from(model=model, diffusion={"prediction": "v_prediction"})
    with pytest.raises(ValueError, match="texts 32 wide, the network takes 4 and 384"):
        stage_from(model={"size": "emoji"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "expected a JSON object"), ('{"step": 2}', "sizes: Field required"), ('{"step": "2", "sizes": {}, "seen": {}}', "step: ")],
)  # fmt: skip
def test_restore_names_a_damaged_state(text, message, latents, tmp_path):
    config = tiny_config("video", latents, steps=2)
    train(config, tmp_path)
    (checkpoint.steps(tmp_path)[-1] / "state.json").write_text(text)
    with pytest.raises(ValueError, match=f"no checkpoint is complete .*{message}"):
        train(config, tmp_path)


def test_restore_names_a_checkpoint_that_is_damaged_inside(latents, tmp_path):
    """Every file has its size; the weights are no safetensors, the optimizer no pickle."""
    config = tiny_config("video", latents, steps=2)
    train(config, tmp_path)
    newest = checkpoint.steps(tmp_path)[-1]
    for name in ("model.safetensors", "optimizer.bin"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(bytes(len(whole)))
        with pytest.raises(ValueError, match="move it away to resume from the one before") as error:
            train(config, tmp_path)
        assert newest.name in str(error.value) and "\n" not in str(error.value)
        (newest / name).write_bytes(whole)


def test_trim_stats_drops_lines_of_others(tmp_path):
    lines = [
        '{"step": 1, "seconds": 2.0}',
        "[]",
        "null",
        '{"step": "1"}',
        '{"step": 2, "seconds": "x"}',
        '{"step": 3, "seconds": 9}',
        '{"st',
    ]
    (tmp_path / "stats.jsonl").write_text("\n".join(lines))
    assert checkpoint.trim_stats(tmp_path, 2) == 2.0
    assert (tmp_path / "stats.jsonl").read_text() == '{"step": 1, "seconds": 2.0}\n'
