"""Prepare the checkpoint and the captioned videos of a recipe for its stage, once, in the run folder.

run/
  base/        the checkpoint as a diffusers folder, if it is a single file, a Hub id or a variant
  pixels/      the packed videos (data/pack.py)
  latents/     their latents and text embeddings (data/encode.py)
  *.json       the source of each of them
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from latent_shift.config import PACKING, Config
from latent_shift.data.encode import encode
from latent_shift.data.pack import pack
from latent_shift.data.records import summarize
from latent_shift.data.shards import without_secrets
from latent_shift.data.store import Store, find_stores
from latent_shift.files import full_disk_named, read_json_object, write_json
from latent_shift.models.parts import check_network, downscale_factor, read_part, variants
from latent_shift.pipelines import catalog, loading
from latent_shift.pipelines.stable_diffusion import LatentShiftXLPipeline
from latent_shift.runtime import rank, resolve_precision
from latent_shift.training import checks

log = logging.getLogger("latent_shift")

Progress = Callable[[str], AbstractContextManager[Callable[[int, int | None], None] | None]]
"""Opens a progress bar with a title; the bar is called with the items done and their number, None while it
is unknown."""


@dataclass(frozen=True)
class Prepared:
    """The sources of a run in the form that its stage reads.

    Attributes:
        store: a store, or a glob pattern of several: of pixels for autoencoders, else of latents.
        init: the diffusers folder with the starting weights; None for random weights.
        precision: "no" (float32), "bf16" or "fp16".
        run: the run folder; None keeps nothing in it.
    """

    store: str
    init: Path | None
    precision: str
    run: Path | None = field(default=None, compare=False)


def prepare(
    config: Config, run: Path, *, device: str | torch.device = "cpu", progress: Progress | None = None
) -> Prepared:
    """Convert the checkpoint, pack the videos and encode them, each only where needed and not built before.

    Args:
        config: `data.path` may name captioned videos or a store (or a pattern of stores) of pixels where
            latents are needed; `model.init` may be anything that `loading.load` takes.
        run: the run folder.
        device: where frames and captions are encoded.
        progress: opens a progress bar of the given title.

    Raises:
        ValueError: no such data or model, a family that cannot be trained, settings that do not fit the data
            or the starting weights (see checks.py), or a run folder whose data was built from another source.
    """
    init, store = config.model.init, config.data.path
    open_bar = progress or (lambda title: nullcontext())
    encodes = not config.reads_pixels
    folder, factor = None, None
    if init is not None and not encodes:
        folder = loading.folder(init)
    elif init is not None:
        folder = _diffusers_folder(config, run / "base")
        checks.check_start(config, folder)
        factor = _scale_factor(folder) if not find_stores(store) else None
    checks.check_source(config, factor)
    source = {
        "data": without_secrets(config.data.path),  # signatures expire, and the folder may be passed on
        "model": init,
        **{name: getattr(config.data, name) for name in PACKING},
    }
    if not find_stores(store):
        store = _pack_videos(config, folder, run / "pixels", source, open_bar)
    if encodes and Store(store).info["dtype"] == "uint8":
        assert folder is not None  # check_source
        store = _encode_pixels(config, store, folder, run / "latents", source, device, open_bar)
    return Prepared(store, folder, resolve_precision(config.train.precision, torch.device(device)), run)


def _pack_videos(config: Config, init: Path | None, out: Path, source: dict, open_bar: Progress) -> str:
    """Pack the videos of `data.path` into the store `out`."""
    data = config.data
    size = data.size or _default_size(init)
    if _claim_build(out, "store.json", source):
        with open_bar("packing") as update:
            problems = pack(
                data.path, out, size=size, fps=data.fps, aspects=data.aspects, min_frames=data.num_frames,
                workers=os.cpu_count() or 1, progress=update,
            )  # fmt: skip
        for line in summarize(problems, out / "problems.txt"):
            log.warning("%s", line)
    return str(out)


def _encode_pixels(
    config: Config,
    pixels: str,
    init: Path,
    out: Path,
    source: dict,
    device: str | torch.device,
    open_bar: Progress,
) -> str:
    """Encode a store of pixels and its captions with the autoencoder and text encoder of `init` into the
    store `out`."""
    strides = set(config.data.strides)

    def has_captions() -> bool:
        try:
            return strides <= set(read_json_object(out / "store.json").get("strides", []))
        except (OSError, ValueError):  # another process is writing it
            return False

    # For a new stride `encode` adds captions and keeps the latents.
    if _claim_build(out, "store.json", source, has_captions):
        with open_bar("encoding") as update:
            encode(
                pixels, out, autoencoder=init, texts=init, mirror=config.data.mirror, strides=sorted(strides), device=device,
                workers=None, progress=update,
            )  # fmt: skip
    return str(out)


def _claim_build(
    folder: Path, last_file: str, source: dict, is_enough: Callable[[], bool] = lambda: True
) -> bool:
    """Decide whether this process builds `folder`, and note its source beside it.

    The first process builds; the others wait here until it has (torchrun ends them if it fails).

    Args:
        folder: what is to be built.
        last_file: the file in it that is written last.
        source: what it is built from; a folder built from something else raises ValueError.
        is_enough: whether a complete folder contains all that is needed of it.
    """
    note, is_waiting = folder.with_name(f"{folder.name}.json"), False
    while not ((folder / last_file).exists() and is_enough()) and rank() > 0:
        if not is_waiting:
            log.info("waiting until the first process has built %s", folder)
        is_waiting = True
        time.sleep(0.2)
    if (folder / last_file).exists():
        try:
            before = read_json_object(note) if note.exists() else {}
        except ValueError as error:
            raise ValueError(f"{note}: damaged ({error}); delete it and {folder}") from error
        if before != source:
            raise ValueError(
                f"{folder} was made of {before}, not of {source}: delete it or choose another folder with --run"
            )
        return not is_enough()
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(source, note)
    return True


def _diffusers_folder(config: Config, base: Path) -> Path:
    """Return `model.init` as a diffusers folder with plain weights, converted into `base` if it is anything
    else."""
    init = str(config.model.init)
    options = {"variant": config.model.variant, "prediction": config.model.prediction}
    if not any(options.values()) and init not in loading.MODELS and _is_denoiser_alone(Path(init)):
        check_network(Path(init) / "unet")
        return Path(init)
    catalog.check_model(init, **options)
    if init in catalog.TEACHERS:
        raise ValueError(
            f"{init} is distilled: expected {catalog.TEACHERS[init]}, the model that it was distilled from"
        )
    plain = not any(options.values()) and (
        init in loading.MODELS or (Path(init).is_dir() and None in variants(Path(init) / "unet"))
    )
    source = {"model": init, **{name: value for name, value in options.items() if value}}
    if not plain and _claim_build(base, "model_index.json", source):
        pipe = loading.load(init, device="cpu", dtype=torch.float32, **options)
        if not isinstance(pipe, LatentShiftXLPipeline):
            with full_disk_named(base):
                pipe.save_pretrained(base)
    folder = loading.folder(init) if plain else base
    if not (folder / "model_index.json").exists() or (folder / "text_encoder_2").exists():
        raise ValueError(
            f"{init}: expected a model of SD 1.x or 2.x; the family of Stable Diffusion XL can generate here, but not be trained"
        )
    return folder


def _is_denoiser_alone(folder: Path) -> bool:
    """Return whether a folder has a U-Net and its noise schedule, but no autoencoder: enough to train on a store of
    latents, which has the others."""
    return (
        (folder / "model_index.json").exists()
        and (folder / "unet").is_dir()
        and not (folder / "vae").exists()
    )


def _default_size(init: Path | None) -> int:
    """Return the side in pixels of the pictures that the U-Net in `init` was trained on."""
    if init is None or not (init / "unet").is_dir():
        raise ValueError("a folder of videos needs data.size, the side in pixels to pack it at")
    side = read_part(init / "unet").get("sample_size")
    if not isinstance(side, int):
        raise ValueError(
            f"{init} generates {side or 'any size of'} latents, and clips are packed as squares: give their side as data.size"
        )
    return side * _scale_factor(init)


def _scale_factor(init: Path) -> int:
    """Return how many pixels the autoencoder in `init` encodes into one latent pixel, along a side."""
    return downscale_factor(read_part(init / "vae"))
