"""Every setting has an effect: a run with another value of it has another outcome."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, traced
from torch import nn

from latent_shift import config
from latent_shift.data.encode import encode
from latent_shift.data.latents import LatentStore
from latent_shift.files import write_json
from latent_shift.training import checkpoint, loop
from latent_shift.training.loop import train

# key: (stage, another value, further settings of both runs); ... stands for the image model
OTHERS: dict[str, tuple] = {
    "stage": ("image", None, {}),
    "data.path": ("image", None, {}),
    "data.size": ("image", 64, {}),
    "data.fps": ("image", 4.0, {}),
    "data.aspects": ("image", 24, {}),
    "data.mirror": ("image", True, {}),
    "data.batch_size": ("image", 3, {}),
    "data.loaders": ("image", 3, {}),
    "data.crop": ("autoencoder", 16, {}),
    "data.num_frames": ("video", 3, {}),
    "data.strides": ("video", [2], {}),
    "data.window": ("video", "first", {}),
    "data.image_share": ("video", 1.0, {}),
    "data.splits": ("image", ["val_concept"], {}),
    "data.val_splits": ("image", ["val_concept"], {}),
    "data.concept_weights": ("image", "weights.json", {}),
    "model.size": ("autoencoder", "emoji", {}),
    "model.init": ("video", None, {}),
    "model.prediction": ("image", "epsilon", {"model.init": ...}),  # converted into the run folder
    "model.variant": ("image", "fp16", {"model.init": ...}),
    "model.temporal": ("video", "attention", {}),
    "model.place": ("video", "end", {}),
    "model.forward": ("video", 0.0, {}),
    "model.backward": ("video", 0.0, {}),
    "model.edge": ("video", "wrap", {}),
    "model.channels": ("video", "cheapest", {}),
    "model.rule": ("video", "tiny:two_back", {}),
    "lora.rank": ("image", 3, {"lora.rank": 2, "model.init": ...}),
    "lora.modules": ("image", ["to_q"], {"lora.rank": 2, "model.init": ...}),
    "loss.kl": ("autoencoder", 1.0, {}),
    "loss.perceptual": ("autoencoder", 1.0, {}),
    "diffusion.prediction": ("image", "v_prediction", {}),
    "diffusion.schedule": ("image", "linear", {}),
    "diffusion.num_timesteps": ("image", 100, {}),
    "diffusion.zero_terminal_snr": ("image", True, {"diffusion.prediction": "v_prediction"}),
    "diffusion.timestep_shift": ("image", 3.0, {}),
    "diffusion.min_snr": ("image", 1e-3, {}),
    "diffusion.motion_weight": ("video", 3.0, {}),
    "diffusion.shared_noise": ("video", 0.5, {}),
    "diffusion.noise_correlation": ("video", 0.5, {}),
    "diffusion.independent_noise_prob": ("video", 1.0, {"diffusion.shared_noise": 0.5}),
    "diffusion.caption_dropout": ("image", 1.0, {}),
    "distill.phases": ("distill", 2, {}),
    "distill.target": ("distill", "trajectory", {}),
    "distill.solver_steps": ("distill", 20, {}),
    "distill.guidance_scale": ("distill", 3.0, {}),
    "distill.huber_c": ("distill", 0.1, {}),
    "optim.steps": ("image", 3, {}),
    "optim.lr": ("image", 1e-4, {}),
    "optim.shift_lr_scale": ("video", 3.0, {}),
    "optim.optimizer": ("image", "adamw8bit", {}),
    "optim.warmup_steps": ("image", 2, {}),
    "optim.cooldown_steps": ("image", 2, {"optim.warmup_steps": 0}),
    "optim.cooldown": (
        "image",
        "cosine",
        {"optim.steps": 3, "optim.warmup_steps": 0, "optim.cooldown_steps": 3},
    ),
    "optim.weight_decay": ("image", 0.5, {}),
    "optim.beta2": ("image", 0.5, {}),
    "optim.grad_clip": ("image", 1e-3, {}),
    "optim.ema": ("image", 0.0, {}),
    "optim.accumulate": ("image", 2, {}),
    "train.seed": ("image", 1, {}),
    "train.precision": ("image", "bf16", {}),
    "train.log_every": ("image", 2, {}),
    "train.sample_every": ("image", 1, {}),
    "train.sample_steps": ("image", 3, {}),
    "train.sample_guidance": ("image", 2.0, {}),
    "train.sample_shared_noise": ("video", 0.5, {}),
    "train.sample_noise_correlation": ("video", 0.5, {}),
    "train.checkpoint_minutes": ("image", 1e-9, {}),
    "train.keep_checkpoints": ("image", 1, {"train.checkpoint_minutes": 1e-9}),
    "train.validate_every": ("image", 1, {"data.val_splits": ["val_concept"]}),
    "train.val_batches": ("image", 1, {"data.val_splits": ["val_concept"]}),
    "train.tracker": ("image", "tensorboard", {}),
    "train.compile": ("video", True, {"data.image_share": 0.5}),
    "train.gradient_checkpointing": ("image", True, {}),
    "train.shard": ("image", True, {}),
}


def keys() -> set[str]:
    names = set()
    for name, field in config.Config.model_fields.items():
        section = config.Lora if name == "lora" else field.annotation
        names |= (
            {f"{name}.{key}" for key in section.model_fields} if hasattr(section, "model_fields") else {name}
        )
    return names


def test_others_cover_every_setting():
    assert set(OTHERS) == keys()


def outcome(settings: config.Config, run) -> dict[str, object] | str:
    """Return everything that a run leaves except times, or the error that ends it."""
    recomputed, compiled, loaders = [], [], []
    executor, recompute = loop.ThreadPoolExecutor, torch.utils.checkpoint.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.utils.checkpoint,
            "checkpoint",
            lambda *args, **options: recomputed.append(1) or recompute(*args, **options),
        )
        patch.setattr(nn.Module, "compile", traced(compiled))
        patch.setattr(
            loop, "ThreadPoolExecutor", lambda threads: loaders.append(threads) or executor(threads)
        )
        try:
            model = train(settings, run)
        except ValueError as error:
            return str(error)
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    newest = checkpoint.steps(run)[-1]
    times = ("seconds", "clips_per_s", "data_wait_s", "eta_s", "gib_peak")
    return {
        "rows": [{name: value for name, value in row.items() if name not in times} for row in rows],
        "weights": {name: digest(tensor) for name, tensor in load_file(newest / "model.safetensors").items()},
        "average": {
            name: digest(tensor) for name, tensor in load_file(newest / "average.safetensors").items()
        },
        "optimizer": sorted(
            str(state.keys())
            for state in torch.load(newest / "optimizer.bin", weights_only=False)["state"].values()
        ),
        "files": sorted(
            str(path.relative_to(run))
            for path in run.rglob("*")
            if "tfevents" not in path.name and path.name != "config.toml"
        ),
        "index": (model / "model_index.json").read_text() if (model / "model_index.json").exists() else "",
        "recomputed": len(recomputed),
        "compiled": len(compiled),
        "loaders": loaders,
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def plain_outcomes() -> dict[str, object]:
    return {}


@pytest.mark.parametrize("key", OTHERS)
def test_setting_changes_the_outcome(
    key, plain_outcomes, media, packed, latents, image_model, autoencoder, texts, tmp_path
):
    stage, value, further = OTHERS[key]
    path = packed if stage == "autoencoder" else latents
    if key == "data.strides":
        path = encode(
            packed, tmp_path / "latents", autoencoder=autoencoder, texts=texts, strides=[1, 2]
        ).folder
    if key.removeprefix("data.") in config.PACKING:  # of a folder that is packed and encoded first
        path, further = media, {"model.init": ...}
    if key == "data.path":
        value = str(
            encode(packed, tmp_path / "mirrored", autoencoder=autoencoder, texts=texts, mirror=True).folder
        )
    if key == "data.concept_weights":
        value = str(tmp_path / value)
        write_json({LatentStore(latents).records[0].concept: 1e6}, value)
    value = {"stage": "video", "model.init": str(image_model)}.get(key, value)

    def run(folder, changes: dict[str, object]) -> object:
        start = {"model": {"init": str(image_model)}} if stage == "distill" else {}
        tables = tiny_config(stage, path, steps=2, **start).model_dump(exclude_none=True)
        for name, setting in changes.items():
            table, _, field = name.rpartition(".")
            (tables.setdefault(table, {}) if table else tables)[field] = (
                str(image_model) if setting is ... else setting
            )
            if name == "model.init":
                tables["model"].pop("size", None)
            if name == "stage":
                tables["data"]["num_frames"] = 4
        return outcome(config.Config.model_validate(tables), folder)

    same_run = f"{stage} {path} {further}"  # most keys share the run without the other value
    if same_run not in plain_outcomes:
        plain_outcomes[same_run] = run(tmp_path / "plain", further)
    plain = plain_outcomes[same_run]
    assert not isinstance(plain, str), plain
    other = run(tmp_path / "other", {**further, key: value})
    assert other != plain
    # Sharding has its effect on several processes (test_distributed.py), a variant in a folder that has it
    # (test_finetune.py).
    assert isinstance(other, str) == (key in ("train.shard", "model.variant")), other


def test_outcome_is_the_same_for_the_same_settings(latents, tmp_path):
    """Otherwise the test above could not fail."""
    for stage in ("image", "video"):
        settings = tiny_config(stage, latents, steps=2)
        assert outcome(settings, tmp_path / f"{stage}1") == outcome(settings, tmp_path / f"{stage}2")
