"""Every check of a training run, at the earliest of three moments: before anything is read, with the data,
with the starting weights."""

from __future__ import annotations

import logging
import re
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from pydantic import Field

from latent_shift.config import PACKING, Config
from latent_shift.data.readers import find_splits
from latent_shift.data.store import Store, find_stores
from latent_shift.diffusion import schedule_of
from latent_shift.files import check_schema, read_json_object
from latent_shift.models import sizes
from latent_shift.models.loading import one_line_errors
from latent_shift.models.network_classes import baseline_name, saved_class
from latent_shift.models.parts import IndexSettings, read_part, read_settings, text_width
from latent_shift.recipe import load
from latent_shift.runtime import resolve_device, resolve_precision, warn_of_slow_bf16, world_size
from latent_shift.shift import Shift, inflate
from latent_shift.training import checkpoint

log = logging.getLogger("latent_shift")

# Settings: before anything is read.


def check_settings(config: Config, run: Path) -> None:
    """Check the settings against this machine, the installed packages and the run folder.

    Raises:
        ValueError: an unknown size, a missing package, a setting that this machine does not support, or a
            folder with another run.
        RuntimeError: the package of `train.tracker` is not installed.
    """
    tracker, device = config.train.tracker, resolve_device()
    if tracker and not find_spec(tracker):
        raise RuntimeError(
            f"train.tracker={tracker} needs its package: pip install 'latent-shift-video[{tracker}]'"
        )
    if config.optim.optimizer == "adamw8bit" and not find_spec("bitsandbytes"):
        raise ValueError(
            "optim.optimizer=adamw8bit needs the extra: pip install 'latent-shift-video[finetune]'"
        )
    if config.lora and not find_spec("peft"):
        raise ValueError("lora needs the extra: pip install 'latent-shift-video[lora]'")
    if config.train.shard and world_size() == 1:
        raise ValueError("train.shard needs several processes: start the run with torchrun")
    if config.train.shard and resolve_precision(config.train.precision, device) == "fp16":
        raise ValueError(
            "train.shard cannot scale the gradients of fp16: expected train.precision bf16 or no"
        )
    if config.train.precision == "fp16" and device.type == "cpu":  # there is no gradient scaler for CPUs
        raise ValueError("train.precision=fp16 needs a GPU; on a CPU take bf16")
    if config.train.precision == "bf16":
        warn_of_slow_bf16(device, "train.precision=auto or no")
    ema, num_steps = config.optim.ema, config.optim.steps
    if ema and 1 / (1 - ema) > num_steps / 2:
        log.warning(
            "optim.ema=%g averages over about %d steps, optim.steps is %d: the exported weights will lag behind; try optim.ema=%g",
            ema, round(1 / (1 - ema)), num_steps, max(0.0, 1 - 10 / num_steps),
        )  # fmt: skip
    if config.model.size:
        sizes.check_size(config.model.size, autoencoder=config.reads_pixels)
    if config.model.rule:
        sizes.load_rule(config.model.rule)
    if config.data.concept_weights:
        read_concept_weights(config.data.concept_weights)
    check_same_run(config, run)


def read_concept_weights(path: str) -> dict[str, float]:
    """Return the weights in the file of `data.concept_weights`, by concept; raise ValueError for a file of another kind."""
    schema = dict[str, Annotated[float, Field(strict=True, ge=1e-6, le=1e6)]]
    return check_schema(read_json_object(path), schema, path)  # type: ignore[no-any-return]


def check_same_run(config: Config, run: Path) -> None:
    """Raise ValueError if the folder `run` has checkpoints of a run with another `Config.identity`."""
    if checkpoint.steps(run):
        if not (run / "config.toml").exists():
            raise ValueError(
                f"{run}: holds checkpoints but no config.toml, so their settings are unknown; choose another folder with --run"
            )
        before, now = load(run / "config.toml").identity(), checkpoint.without_secrets(config).identity()
        changed = [name for name, value in before.items() if now[name] != value]
        if changed:
            raise ValueError(
                f"{run} holds a run with another {', '.join(changed)}; choose another folder with --run"
            )
        _check_has_effect(config, run)


def _check_has_effect(config: Config, run: Path) -> None:
    """Raise ValueError for settings that differ from those of a run that has ended: what is left is to export it again,
    with the settings of sampling."""
    newest = checkpoint.steps(run)[-1]
    if int(newest.name.removeprefix("step-")) < config.optim.steps or checkpoint.find_corruption(newest):
        return
    before, now = _flatten(load(run / "config.toml")), _flatten(config)
    changed = [
        name
        for name in now
        if now[name] != before[name] and not name.startswith(("train.sample_", "data.path"))
    ]
    if changed:
        raise ValueError(
            f"{run}: has ended, so another {', '.join(changed)} would have no effect; choose another folder with --run, or "
            "train on with a larger optim.steps"
        )


def _flatten(config: Config) -> dict[str, object]:
    """Return all settings by their full names."""
    tables = {table: values for table, values in config.model_dump().items() if isinstance(values, dict)}
    return {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}


# Data: the source before it is packed or encoded, then the store.


def check_source(config: Config, factor: int | None) -> None:
    """Check `data.path` before it is packed or encoded.

    Args:
        factor: pixels per latent pixel of the autoencoder that will encode the frames; None where none will.

    Raises:
        ValueError: a setting without effect, pixels that nothing can encode, an unknown split, or a size that
            the autoencoder would cut.
    """
    data, source = config.data, config.data.path
    packed = bool(find_stores(source))
    encoded = packed and Store(source).info["dtype"] == "float16"
    without_effect = (
        PACKING if encoded else tuple(name for name in PACKING if name != "mirror") if packed else ()
    )
    given = [name for name in without_effect if getattr(data, name) != type(data).model_fields[name].default]
    if given:
        names, verb = ", ".join(f"data.{name}" for name in given), "has" if len(given) == 1 else "have"
        raise ValueError(
            f"{names} {verb} no effect: {source} is {'encoded' if encoded else 'packed'} already"
        )
    if not packed and not Path(source).exists() and not re.search(r"://|[*?{]", source):
        raise ValueError(f"{source}: no such file or folder")
    if not config.reads_pixels and not encoded and config.model.init is None:
        raise ValueError(
            f"{source} holds no latents, and there is no model.init to encode it with: `latent-shift encode` it"
        )
    if packed:
        return
    splits = find_splits(source)
    if splits is not None:
        _check_splits(config, splits, source)
    name, side = ("size", data.size) if data.aspects is None else ("aspects", data.aspects)
    if factor is not None and side is not None and side % factor:
        raise ValueError(
            f"data.{name}={side}: the autoencoder of {config.model.init} needs a multiple of {factor}"
        )


def check_store(config: Config, store: Store) -> None:
    """Check that a store has what the settings name; log how many clips are too short.

    Raises:
        ValueError: it lacks a split, captions for a stride, or validation clips.
    """
    data = config.data
    if not config.reads_pixels and (missing := set(data.strides) - set(store.info["strides"])):
        raise ValueError(
            f"{data.path} has no captions for data.strides {sorted(missing)}: encode it with --stride"
        )
    _check_splits(config, store.splits, store.folder)
    val_clips = store.select(splits=data.val_splits, num_frames=data.num_frames, stride=data.strides[0])
    if data.val_splits and not len(val_clips):
        raise ValueError(
            f"{store.folder}: no clip of {data.num_frames} frames in data.val_splits {data.val_splits}"
        )
    if data.num_frames == 1:
        return
    clips = store.select(splits=data.splits, num_frames=2)
    for stride in data.strides:
        long_enough = store.select(splits=data.splits, num_frames=data.num_frames, stride=stride)
        if num_short := len(np.setdiff1d(clips, long_enough)):
            log.warning(
                "%d of %d clips are too short for %d frames at stride %d and are skipped",
                num_short,
                len(clips),
                data.num_frames,
                stride,
            )


def check_crop(config: Config, store: Store, factor: int) -> None:
    """Raise ValueError if the autoencoder's crops do not fit the frames of the store or its own factor."""
    crop, smallest = config.data.crop, min(min(shape[1:3]) for shape in store.shapes.values())
    if crop > smallest:
        raise ValueError(
            f"data.crop={crop} is larger than the frames of {config.data.path}, {smallest} a side"
        )
    if crop % factor:
        raise ValueError(f"data.crop must be a multiple of {factor}, the autoencoder's factor, got {crop}")


def _check_splits(config: Config, splits: set[str], source: object) -> None:
    if unknown := {*config.data.splits, *config.data.val_splits} - splits:
        raise ValueError(
            f"{source}: has no split {', '.join(sorted(unknown))}; expected {', '.join(sorted(splits))}"
        )


# Start: the denoiser that the run starts from.

_LEARNED = {  # fields of a checkpoint's scheduler that its weights depend on, and the settings that must agree
    "prediction_type": "diffusion.prediction",
    "beta_schedule": "diffusion.schedule",
    "rescale_betas_zero_snr": "diffusion.zero_terminal_snr",
    "num_train_timesteps": "diffusion.num_timesteps",
    "beta_start": "beta_start of diffusion.schedule",
    "beta_end": "beta_end of diffusion.schedule",
}


def check_start(config: Config, start: Path) -> None:
    """Check that the denoiser in the diffusers folder `start` is trained further as it was trained before.

    Raises:
        ValueError: it was trained with another noise schedule, prediction, shift, or temporal layers, or it is distilled.
    """
    now, before = dict[str, object](), dict[str, object]()
    network = saved_class(start / "unet", UNet2DConditionModel)
    if config.lora and not issubclass(network, UNet2DConditionModel):
        raise ValueError(f"lora needs a U-Net, got a {network.__name__}")
    scheduler_file, index_file = start / "scheduler" / "scheduler_config.json", start / "model_index.json"
    if scheduler_file.exists():
        settings = {name: value for name, value in read_part(start / "scheduler").items() if name in _LEARNED}
        with one_line_errors(scheduler_file, "a noise schedule"):
            learned = DDPMScheduler(**settings).config
        wanted = schedule_of(config.diffusion).config
        before |= {name: learned[key] for key, name in _LEARNED.items()}
        now |= {name: wanted[key] for key, name in _LEARNED.items()}
    trained = read_settings(index_file, IndexSettings).get("latent_shift", {}) if index_file.exists() else {}
    if trained.get("distilled_steps"):
        raise ValueError(f"{config.model.init} is distilled: expected the model that it was distilled from")
    if trained.get("num_frames", 1) > 1:  # an image model has not learned from shifted channels
        shifted = trained.get("forward") or trained.get("backward")
        before["model.temporal"] = baseline_name(network) or ("shift" if shifted else "none")
        now["model.temporal"] = config.model.temporal
    if trained.get("num_frames", 1) > 1 and config.model.temporal == before["model.temporal"] == "shift":
        names = [field.name for field in fields(Shift) if field.name in trained or field.name == "rule"]
        saved = Shift(**{name: trained.get(name) for name in names})  # type: ignore[arg-type]
        shift = sizes.shift_settings(config.model)
        if shift.place == "conv1" and not issubclass(network, UNet2DConditionModel):
            shift = replace(shift, place="attn")  # as in `inflate`
        widths = {name: sum(num for num, _ in runs) for name, runs in trained.get("rule") or ()}
        if config.model.channels == "cheapest":
            if saved.rule is None:
                before["model.channels"], now["model.channels"] = "first", "cheapest"
            elif _sources(saved, widths) == _sources(shift, widths):
                shift = shift.with_rule(saved.rule)
        shift = shift.resolved(widths)
        before |= {f"model.{name}": getattr(saved, name) for name in names}
        now |= {f"model.{name}": getattr(shift, name) for name in names}
    elif config.model.rule and before.get("model.temporal", "shift") == "shift":
        with torch.device("meta"):  # the widths alone
            unet = network.from_config(read_part(start / "unet"))
        inflate(unet, sizes.shift_settings(config.model))
    problems = [
        f"{config.model.init} was trained to shift other channels: expected the model.rule and model.channels of that run"
        if name == "model.rule"
        else f"{name} is {_in_toml(now[name])}, but {config.model.init} was trained with {_in_toml(value)}: set it to that"
        for name, value in before.items()
        if now[name] != value
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _sources(shift: Shift, widths: dict[str, int]) -> dict[str, list[tuple[int, ...]]]:
    """Return, for layers of these names and widths, the frames that channels are taken from, in no order of the channels."""
    return {
        name: sorted(
            offsets for start, stop, offsets in shift.groups(width, name) for _ in range(start, stop)
        )
        for name, width in widths.items()
    }


def trained_rule(start: Path | None) -> Any:
    """Return the rule of the shift that the video model in `start` was trained with; None if it has none."""
    index_file = start / "model_index.json" if start else None
    if index_file is None or not index_file.exists():
        return None
    trained = read_settings(index_file, IndexSettings).get("latent_shift", {})
    return trained.get("rule") if trained.get("num_frames", 1) > 1 else None


def check_denoiser(unet: UNet2DConditionModel, store: Store) -> None:
    """Raise ValueError if a U-Net does not take the latents and the text of a store."""
    channels, width = store.info["channels"], store.info["texts"][1]
    expected = (unet.config.in_channels, text_width(unet.config))
    if (channels, width) != expected:
        raise ValueError(
            f"{store.folder} has latents of {channels} channels and texts {width} wide, the network takes {expected[0]} and {expected[1]}"
        )


def _in_toml(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value
