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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from safetensors.torch import save_file
from torch import nn

from latent_shift import data, encode, zoo
from latent_shift.config import PACKING, Config, Lora
from latent_shift.latents import LatentStore
from latent_shift.pipeline import LatentShiftXLPipeline
from latent_shift.shift import Shift, ShiftConv2d, shift_of
from latent_shift.store import Store, stores

log = logging.getLogger("latent_shift")

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[str], AbstractContextManager[Callable[[int, int | None], None] | None]]


def prepare(config: Config, run: Path, *, device: str | torch.device = "cpu", progress: Progress | None = None) -> Config:
    """The settings with a store for `data.path` and a plain diffusers folder for `model.init`.

    Args:
        config: `data.path` may be a folder of videos and captions, or a store (or pattern of stores) of pixels where latents are wanted; `model.init` all
            that `zoo.load` takes.
        run: the run folder; what it holds already is not made again.
        device: where frames are encoded.
        progress: opens a progress bar of a name.

    Raises:
        ValueError: no such data or model, a family that is not trained here, a `data.size` that has no effect, a run folder that
            holds what was made of something else, or several processes that would all make the same.
    """
    bar = progress or (lambda name: nullcontext())
    init, path, stage = config.model.init, Path(config.data.path), config.stage
    if init is not None and stage != "autoencoder":
        init = str(_as_folder(init, run / "base"))
    defaults = {name: type(config.data).model_fields[name].default for name in PACKING}
    packed = stores(path)
    done = () if not packed else PACKING if "texts" in Store(path).info else tuple(name for name in PACKING if name != "mirror")
    if any(getattr(config.data, name) != defaults[name] for name in done):
        raise ValueError(
            f"{', '.join(f'data.{name}' for name in done)} have no effect: {path} is {'encoded' if 'mirror' in done else 'packed'} already"
        )
    made_of = {"data": config.data.path, "model": config.model.init, **{name: getattr(config.data, name) for name in PACKING}}
    workers = os.cpu_count() or 1
    if not packed:
        path, videos = run / "pixels", config.data.path
        if _to_make(path, "store.json", made_of):
            with bar("packing") as each:
                size, settings = config.data.size or _size_of(init), config.data
                problems = data.pack(videos, path, size=size, fps=settings.fps, aspects=settings.aspects, workers=workers, progress=each)
            for name, reason in problems:
                log.warning("%s: left out, %s", name, reason)
    if stage != "autoencoder" and "texts" not in Store(path).info:
        if init is None:
            raise ValueError(f"{config.data.path} holds no latents, and there is no model.init to encode it with: `latent-shift encode` it")
        path, pixels = run / "latents", path
        strides = set(config.data.strides)
        if _to_make(path, "store.json", made_of) or not strides <= set(LatentStore(path).info["strides"]):  # else the captions alone
            with bar("encoding") as each:
                encode.encode(
                    pixels, path, autoencoder=init, texts=init, mirror=config.data.mirror, strides=sorted(strides), device=device,
                    workers=workers if torch.device(device).type == "cpu" else 1, progress=each,
                )  # fmt: skip
    changed = {"path": str(path), **defaults}
    return config.model_copy(
        update={"data": config.data.model_copy(update=changed), "model": config.model.model_copy(update={"init": init})}
    )


def _to_make(folder: Path, last: str, made_of: dict) -> bool:
    """Whether `folder` is still to be made, whose file `last` is written when it is whole; writes beside it what it is made of."""
    note = folder.with_name(f"{folder.name}.json")
    if (folder / last).exists():
        before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        if before != made_of:
            raise ValueError(f"{folder} was made of {before}, not of {made_of}: delete it or choose another folder with --run")
        return False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{folder} is still to be made, which one process does: start the same run once without the others")
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(made_of), encoding="utf-8")
    return True


def _as_folder(init: str, base: Path) -> Path:
    """A diffusers folder of plain weights: the one that was given, or one made of it."""
    plain = str(init) in zoo.MODELS or (Path(init).is_dir() and zoo.only_variant(Path(init) / "unet") is None)
    if not plain and _to_make(base, "model_index.json", {"model": str(init)}):
        pipe = zoo.load(init, device="cpu", dtype=torch.float32)
        if not isinstance(pipe, LatentShiftXLPipeline):
            pipe.save_pretrained(base)
    folder = zoo.folder(init) if plain else base
    if not (folder / "model_index.json").exists() or (folder / "text_encoder_2").exists():
        raise ValueError(
            f"{init}: expected a model of SD 1.x or 2.x; the family of Stable Diffusion XL is generated with, not trained, here"
        )
    return folder


def _size_of(init: str | None) -> int:
    if init is None or not (Path(init) / "unet").is_dir():
        raise ValueError("a folder of videos needs data.size, the side in pixels to pack it at")
    unet, vae = (json.loads((Path(init) / part / "config.json").read_text()) for part in ("unet", "vae"))
    if not isinstance(unet["sample_size"], int):
        raise ValueError(f"{init} draws {unet['sample_size']} latents, clips are packed as squares: give their side as data.size")
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def add_lora(unet: UNet2DConditionModel, lora: Lora, *, dtype: torch.dtype) -> None:
    """Freeze a U-Net, keep it in `dtype`, and add float32 matrices of rank `lora.rank` to the layers of `lora.modules`.

    Raises:
        ValueError: peft is not installed, no layer has such a name, or one is a convolution that shifts (place "end").
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora needs the extra: pip install 'latent-shift-video[finetune]'") from error
    shifting = [name for name, part in unet.named_modules() if isinstance(part, ShiftConv2d) and name.split(".")[-1] in lora.modules]
    if shifting:
        raise ValueError(f"with model.place=end {shifting[0]} shifts and takes no LoRA: leave it out of lora.modules")
    nn.Module.to(unet.requires_grad_(False), dtype)  # diffusers' own warns of parts to keep in float32: there are none
    unet.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=list(lora.modules)))
    cast_training_params(unet, dtype=torch.float32)


def save_lora(unet: UNet2DConditionModel, folder: Path, *, call_defaults: dict) -> Path:
    """Write the additions as diffusers' LoRA file, `folder/pytorch_lora_weights.safetensors`.

    How the frames were mixed and noised in training is in its header under "latent_shift", for `zoo.add_lora`.
    """
    from peft import get_peft_model_state_dict

    told = json.dumps({**asdict(shift_of(unet) or Shift(0, 0)), **call_defaults, "sample_size": unet.config.sample_size})

    def write(tensors: dict[str, torch.Tensor], path: str) -> None:
        half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        save_file(half, path, metadata={"format": "pt", "latent_shift": told})

    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet), save_function=write)
    return folder / "pytorch_lora_weights.safetensors"
