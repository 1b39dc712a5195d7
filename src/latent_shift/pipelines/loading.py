"""Models by name or path, and clips to and from files: what a notebook needs beside the pipeline."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import fields
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from huggingface_hub.constants import HF_HUB_OFFLINE

from latent_shift.files import tensor_shapes
from latent_shift.models import sizes
from latent_shift.models.pixels import PixelSpace
from latent_shift.pipelines import single_file
from latent_shift.pipelines.clip_pipeline import ClipGeneration
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline, LatentShiftXLPipeline
from latent_shift.runtime import device_of
from latent_shift.shift import Shift

WEIGHTS = Path(__file__).parents[1] / "weights"
MODELS = {"emoji": "128x128, 16 frames at 8 fps, drawn as 3-D emoji; trained by recipes/emoji, embedded in this package"}


def folder(model: str | Path) -> Path:
    """The folder of a model in `MODELS`, or of "pixels", the autoencoder that keeps pixels (vdm.py); any other name is a folder already.
    Raises ValueError for what is neither."""
    path = WEIGHTS / str(model) if str(model) in (*MODELS, "pixels") else Path(model)
    if not path.is_dir():
        nearest = difflib.get_close_matches(str(model), MODELS, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{model}: expected one of {', '.join(MODELS)}, or a folder that is there{hint}")
    return path


def load(
    model: str | Path = "emoji", *, device: str | torch.device | None = None, dtype: torch.dtype | None = None, variant: str | None = None,
    prediction: str | None = None,
) -> ClipGeneration:  # fmt: skip
    """Load a pipeline: a `LatentShiftPipeline`, or a `LatentShiftXLPipeline` for the family of Stable Diffusion XL.

    Args:
        model: a name in `MODELS`, a diffusers folder, a `.safetensors` file in the original layout of SD 1.x, 2.x or XL, or, online, a
            Hub id ("owner/name").
        device: None takes CUDA where there is one, else the CPU.
        dtype: of weights and computation; None takes float16 on CUDA, float32 on the CPU.
        variant: of the weights' files in a folder, such as "fp16". None: the plain ones, or the only variant there is.
        prediction: "epsilon" or "v_prediction" where the model does not say it right (single files cannot always).

    Raises:
        ValueError: nothing that can be loaded; the message says what it is and what was expected. Or CUDA that is not there.
    """
    device = device_of(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if Path(model).is_file():
        return single_file.open_file(model, dtype=dtype, prediction=prediction).to(device)
    if on_hub(model):
        index = LatentShiftPipeline.load_config(str(model))
        path: Path | str = str(model)
    else:
        path = folder(model)
        index = _index(path)
        variant = variant or only_variant(path / "unet")
    pipeline = LatentShiftXLPipeline if "text_encoder_2" in index else LatentShiftPipeline
    given = {}
    if Path(path).is_dir() and (network := sizes.unet_of(path)) is not UNet2DConditionModel:  # diffusers knows what it is made of
        given["unet"] = network.from_pretrained(Path(path) / "unet", dtype=dtype, variant=variant)
    if Path(path).is_dir() and sizes.autoencoder_of(Path(path) / "vae") is PixelSpace:
        given["vae"] = PixelSpace.from_pretrained(Path(path) / "vae", dtype=dtype)
    pipe = pipeline.from_pretrained(path, dtype=dtype, variant=variant, **given)
    if prediction:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    return pipe.to(device)


def on_hub(model: str | Path) -> bool:
    """Whether a name can only be a Hub's, and the Hub may be asked."""
    known = str(model) in MODELS or Path(model).exists()
    return not known and not HF_HUB_OFFLINE and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is not None


def _index(path: Path) -> dict:
    """The model_index.json of a pipeline's folder whose parts are there; raises ValueError for another folder."""
    if not (path / "model_index.json").exists():
        part = path / "config.json"
        held = f"; it holds a {json.loads(part.read_text()).get('_class_name', 'model')} alone" if part.exists() else ""
        raise ValueError(f"{path}: expected a diffusers folder with a model_index.json{held}")
    index = json.loads((path / "model_index.json").read_text())
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", *(["text_encoder_2"] if "text_encoder_2" in index else [])):
        if index.get(name, [None])[0] is None or not (path / name).is_dir():
            raise ValueError(
                f"{path}: has no {name}; expected a Stable Diffusion folder of unet, vae, text_encoder, tokenizer and scheduler"
            )
    if index["unet"][1] != "UNet2DConditionModel":
        raise ValueError(f"{path}: its unet is a {index['unet'][1]}, expected UNet2DConditionModel")
    if not list((path / "unet").glob("*.safetensors")):
        raise ValueError(f"{path}: unet has no .safetensors weights (pickle files can run any program when they are opened)")
    return index


def only_variant(path: Path) -> str | None:
    """The variant of a folder in which there is no other."""
    names = {file.name.split(".")[1] if file.name.count(".") > 1 else None for file in path.glob("*.safetensors")}
    return names.pop() if len(names) == 1 else None


def scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """diffusers' scheduler of a name ("DDIM", "EulerDiscrete", ...) with the settings of `like`; raises ValueError for another name."""
    known = {each.removesuffix("Scheduler"): each for each in dir(diffusers) if each.endswith("Scheduler") and not each.startswith("Flax")}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise ValueError(f"unknown scheduler {name!r}; did you mean {' or '.join(nearest) or 'DDIM'}?")
    return getattr(diffusers, known[name]).from_config(like.config)


def describe(model: str | Path) -> dict[str, str]:
    """What a model is, by name, without reading its weights; raises ValueError as `load` does."""
    if Path(model).is_file():
        tensors = tensor_shapes(model)
        name = single_file.identify(tensors)
        family: single_file.Family | None = single_file.FAMILIES[name]
        parts = {
            part: [shape for key, shape in tensors.items() if key.startswith(prefix)]
            for part, prefix in (("unet", "model."), ("vae", "first_stage_model."), ("text_encoder", "cond"))
        }  # fmt: skip
        told = {"family": single_file.FAMILIES[name].title, "format": "a single file in the original layout"}
        unet, settings = single_file.FAMILIES[name].unet, {}
        scheduler = {**single_file.FAMILIES[name].scheduler, **({"prediction_type": "v_prediction"} if "v_pred" in tensors else {})}
    else:
        path = folder(model)
        index = _index(path)
        unet, scheduler = (json.loads(next((path / part).glob("*config.json")).read_text()) for part in ("unet", "scheduler"))
        settings = index.get("latent_shift", {})
        family = single_file.of(unet)
        told = {"family": family.title if family else "of its own size", "format": f"a diffusers folder, {index['_class_name']}"}
        parts = {}
        for part in [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if (path / part).is_dir()]:
            variant = only_variant(path / part)
            files = [file for file in (path / part).glob("*.safetensors") if variant or file.name.count(".") == 1]
            parts[part] = [shape for file in files for shape in tensor_shapes(file).values()]
    sampled = unet["sample_size"]
    told |= {part: f"{sum(math.prod(shape) for shape in shapes) / 1e6:,.1f} M parameters" for part, shapes in parts.items()}
    told["widths"] = ", ".join(map(str, unet["block_out_channels"]))
    told["text width"] = str(unet["cross_attention_dim"])
    told["picture"] = "x".join([str(8 * sampled)] * 2 if isinstance(sampled, int) else [str(8 * side) for side in sampled]) + " pixels"
    told["predicts"] = scheduler.get("prediction_type", "epsilon") + (
        ", zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
    )
    told["frames"] = f"{settings.get('num_frames', 16)} at {settings.get('fps', 8)} fps unless told otherwise"
    told["shift"] = str(Shift(**{field.name: settings[field.name] for field in fields(Shift) if field.name in settings}))
    return told
