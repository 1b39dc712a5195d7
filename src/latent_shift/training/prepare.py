"""From what people have, a checkpoint and a folder of videos, to what the stages read; and the LoRA that may come of it.

Whatever has to be made is made once, in the run folder:

run/
  base/        the checkpoint as a diffusers folder, if it was a single file, a Hub id or a variant
  pixels/      the videos, packed (data.py)
  latents/     their latents and embeddings (encode.py)
  *.json       what each of them was made of
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from latent_shift.config import PACKING, Config
from latent_shift.data.encode import encode
from latent_shift.data.pack import pack
from latent_shift.data.readers import find_splits
from latent_shift.data.store import Store, find_stores
from latent_shift.diffusion import schedule_of
from latent_shift.models import sizes
from latent_shift.models.baselines import TEMPORAL_NETWORKS, saved_class
from latent_shift.pipelines import loading
from latent_shift.pipelines.stable_diffusion import LatentShiftXLPipeline
from latent_shift.runtime import rank, resolve_precision

log = logging.getLogger("latent_shift")

Progress = Callable[[str], AbstractContextManager[Callable[[int, int | None], None] | None]]


def prepare(config: Config, run: Path, *, device: str | torch.device = "cpu", progress: Progress | None = None) -> Config:
    """The settings with a store for `data.path`, a plain diffusers folder for `model.init`, and the precision of this device.

    Args:
        config: `data.path` may be a folder of videos and captions, or a store (or pattern of stores) of pixels where latents are wanted; `model.init` all
            that `zoo.load` takes.
        run: the run folder; what it holds already is not made again.
        device: where frames are encoded.
        progress: opens a progress bar of a name.

    Raises:
        ValueError: no such data or model, a family that is not trained here, a `data.size` that has no effect or that the autoencoder would cut, a run folder that
            holds what was made of something else, a split that the data has not, or a model that learnt something else before.
    """
    bar = progress or (lambda name: nullcontext())
    init, path, stage = config.model.init, Path(config.data.path), config.stage
    if init is not None and stage != "autoencoder":
        init = str(_as_folder(init, run / "base"))
        check_start(config, Path(init))
    defaults = {name: type(config.data).model_fields[name].default for name in PACKING}
    packed = find_stores(path)
    done = () if not packed else PACKING if "texts" in Store(path).info else tuple(name for name in PACKING if name != "mirror")
    if any(getattr(config.data, name) != defaults[name] for name in done):
        raise ValueError(
            f"{', '.join(f'data.{name}' for name in done)} have no effect: {path} is {'encoded' if 'mirror' in done else 'packed'} already"
        )
    made_of = {"data": config.data.path, "model": config.model.init, **{name: getattr(config.data, name) for name in PACKING}}
    workers = os.cpu_count() or 1
    if not packed:
        path, videos = run / "pixels", config.data.path
        splits = find_splits(videos)
        if splits is not None and (unknown := {*config.data.splits, *config.data.val_splits} - splits):
            raise ValueError(f"{videos}: has no split {', '.join(sorted(unknown))}; expected {', '.join(sorted(splits))}")
        size, settings = config.data.size or _size_of(init), config.data
        name, side = ("size", size) if settings.aspects is None else ("aspects", settings.aspects)
        if stage != "autoencoder" and init is not None and side % (factor := _factor_of(init)):
            raise ValueError(f"data.{name}={side}: the autoencoder of {config.model.init} needs a multiple of {factor}")
        if _to_make(path, "store.json", made_of):
            with bar("packing") as each:
                problems = pack(videos, path, size=size, fps=settings.fps, aspects=settings.aspects, workers=workers, progress=each)
            for name, reason in problems:
                log.warning("%s: left out, %s", name, reason)
    if stage != "autoencoder" and "texts" not in Store(path).info:
        if init is None:
            raise ValueError(f"{config.data.path} holds no latents, and there is no model.init to encode it with: `latent-shift encode` it")
        path, pixels = run / "latents", path
        strides = set(config.data.strides)

        def has_captions() -> bool:
            try:
                return strides <= set(_read(path / "store.json")["strides"])
            except (OSError, ValueError):  # another process is at it
                return False

        if _to_make(path, "store.json", made_of, has_captions):  # what is there is not made again: of a new stride the captions alone
            with bar("encoding") as each:
                encode(
                    pixels, path, autoencoder=init, texts=init, mirror=config.data.mirror, strides=sorted(strides), device=device,
                    workers=workers if torch.device(device).type == "cpu" else torch.cuda.device_count(), progress=each,
                )  # fmt: skip
    changed = {"path": str(path), **defaults}
    precision = resolve_precision(config.train.precision, torch.device(device))
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=changed),
            "model": config.model.model_copy(update={"init": init}),
            "train": config.train.model_copy(update={"precision": precision}),
        }
    )


def check_start(config: Config, start: Path) -> None:
    """The denoiser in the folder `start` learns what it has learnt before, moving the channels it moved before.

    Raises:
        ValueError: it was trained with other settings than these.
    """
    init, shift, now, before = config.model.init, sizes.shift_settings(config.model), dict[str, object](), dict[str, object]()
    if (start / "scheduler" / "scheduler_config.json").exists():
        learnt = DDPMScheduler(**{k: v for k, v in _read(start / "scheduler" / "scheduler_config.json").items() if k in _LEARNT}).config
        before |= {name: learnt[key] for key, name in _LEARNT.items()}
        now |= {name: schedule_of(config.diffusion).config[key] for key, name in _LEARNT.items()}
    trained = _read(start / "model_index.json").get("latent_shift", {}) if (start / "model_index.json").exists() else {}
    if trained.get("num_frames", 1) > 1:  # an image model has moved none
        moved = trained.get("forward") or trained.get("backward")
        network = saved_class(start / "unet", UNet2DConditionModel)
        temporal = next((name for name, baseline in TEMPORAL_NETWORKS.items() if baseline is network), None)
        before["model.temporal"] = temporal or ("shift" if moved else "none")
        now["model.temporal"] = config.model.temporal
        before |= {f"model.{field}": trained[field] for field in asdict(shift) if field in trained}
        now |= {f"model.{field}": asdict(shift)[field] for field in asdict(shift) if field in trained}
    told = lambda value: str(value).lower() if isinstance(value, bool) else value  # noqa: E731
    wrong = [name for name, value in before.items() if now[name] != value]
    if wrong:
        each = (f"{name} is {told(now[name])}, but {init} was trained with {told(before[name])}: set it to that" for name in wrong)
        raise ValueError("; ".join(each))


_LEARNT = {
    "prediction_type": "diffusion.prediction",
    "beta_schedule": "diffusion.schedule",
    "rescale_betas_zero_snr": "diffusion.zero_terminal_snr",
    "num_train_timesteps": "diffusion.num_timesteps",
    "beta_start": "beta_start of diffusion.schedule",
    "beta_end": "beta_end of diffusion.schedule",
}


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _to_make(folder: Path, last: str, made_of: dict, enough: Callable[[], bool] = lambda: True) -> bool:
    """Whether this process is to make `folder`, whose file `last` is written when it is whole; writes beside it what it is made of. Of
    several processes the first makes it, and the others wait here until it is there (torchrun ends them if the first fails)."""
    note, told = folder.with_name(f"{folder.name}.json"), False
    while not ((folder / last).exists() and enough()) and rank() > 0:
        if not told:
            log.info("waiting until the first process has made %s", folder)
        told = True
        time.sleep(0.2)
    if (folder / last).exists():
        before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        if before != made_of:
            raise ValueError(f"{folder} was made of {before}, not of {made_of}: delete it or choose another folder with --run")
        return not enough()
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(made_of), encoding="utf-8")
    return True


def _as_folder(init: str, base: Path) -> Path:
    """A diffusers folder of plain weights: the one that was given, or one made of it."""
    plain = str(init) in loading.MODELS or (Path(init).is_dir() and loading.only_variant(Path(init) / "unet") is None)
    if not plain and _to_make(base, "model_index.json", {"model": str(init)}):
        pipe = loading.load(init, device="cpu", dtype=torch.float32)
        if not isinstance(pipe, LatentShiftXLPipeline):
            pipe.save_pretrained(base)
    folder = loading.folder(init) if plain else base
    if plain and not (folder / "model_index.json").exists():
        raise ValueError(f"{init}: expected the folder of a pipeline, with a model_index.json")
    if not (folder / "model_index.json").exists() or (folder / "text_encoder_2").exists():
        raise ValueError(
            f"{init}: expected a model of SD 1.x or 2.x; the family of Stable Diffusion XL is generated with, not trained, here"
        )
    return folder


def _size_of(init: str | None) -> int:
    if init is None or not (Path(init) / "unet").is_dir():
        raise ValueError("a folder of videos needs data.size, the side in pixels to pack it at")
    unet = _read(Path(init) / "unet" / "config.json")
    if not isinstance(unet["sample_size"], int):
        raise ValueError(f"{init} draws {unet['sample_size']} latents, clips are packed as squares: give their side as data.size")
    return unet["sample_size"] * _factor_of(init)


def _factor_of(init: str) -> int:
    """Pixels to a side of a latent."""
    return 2 ** (len(_read(Path(init) / "vae" / "config.json")["block_out_channels"]) - 1)
