"""Models by name, folder, file or Hub id."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import fields
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from huggingface_hub.constants import HF_HUB_OFFLINE

from latent_shift.files import tensor_shapes
from latent_shift.models.autoencoder import downscale_factor
from latent_shift.models.baselines import saved_class
from latent_shift.pipelines import single_file
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline, LatentShiftXLPipeline
from latent_shift.runtime import device_of
from latent_shift.shift import Shift

WEIGHTS = Path(__file__).parents[1] / "weights"
MODELS = {"emoji": "128x128, 16 frames at 8 fps, 3-D emoji on white; trained by recipes/emoji, part of this package"}


def folder(model: str | Path) -> Path:
    """Return the folder of a model: of a name in `MODELS`, of "pixels" (the autoencoder that keeps pixels), or the folder itself.

    Raises:
        ValueError: neither a name nor a folder.
    """
    path = WEIGHTS / str(model) if str(model) in (*MODELS, "pixels") else Path(model)
    if not path.is_dir():
        nearest = difflib.get_close_matches(str(model), MODELS, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{model}: expected one of {', '.join(MODELS)}, or a folder that exists{hint}")
    return path


def load(
    model: str | Path = "emoji", *, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    variant: str | None = None, prediction: str | None = None,
) -> LatentShiftPipeline | LatentShiftXLPipeline:  # fmt: skip
    """Load a pipeline: a `LatentShiftPipeline`, or a `LatentShiftXLPipeline` for the Stable Diffusion XL family.

    Args:
        model: a name in `MODELS`, a diffusers folder, a `.safetensors` file in the original layout of SD 1.x, 2.x or XL, or, online,
            a Hub id ("owner/name").
        device: None takes CUDA where there is one, else the CPU.
        dtype: dtype of weights and computation; None takes float16 on CUDA, float32 on the CPU.
        variant: variant of the weights in a folder, such as "fp16". None: the plain files, or the only variant there is.
        prediction: "epsilon" or "v_prediction", where the model does not say it correctly (single files cannot always).

    Raises:
        ValueError: nothing that can be loaded; the message says what it is and what was expected. Or CUDA that is not available.
    """
    device = device_of(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if Path(model).is_file():
        return single_file.open_file(model, dtype=dtype, prediction=prediction).to(device)
    parts = {}
    if on_hub(model):
        index = LatentShiftPipeline.load_config(str(model))
        path: Path | str = str(model)
    else:
        path = folder(model)
        index = _index(path)
        variant = variant or only_variant(path / "unet")
        for name, default in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            network = saved_class(path / name, default)
            if network is not default:  # a baseline's: diffusers knows the class it extends
                parts[name] = network.from_pretrained(path / name, dtype=dtype, variant=variant)
    pipeline = LatentShiftXLPipeline if "text_encoder_2" in index else LatentShiftPipeline
    pipe = pipeline.from_pretrained(path, dtype=dtype, variant=variant, **parts)
    if prediction:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    return pipe.to(device)


def on_hub(model: str | Path) -> bool:
    """Return whether a name can only be a Hub id, and the Hub may be asked."""
    known = str(model) in MODELS or Path(model).exists()
    return not known and not HF_HUB_OFFLINE and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is not None


def _index(path: Path) -> dict:
    """Read the model_index.json of a pipeline folder; raise ValueError if a part is missing."""
    if not (path / "model_index.json").exists():
        part = path / "config.json"
        content = f"; it holds a {json.loads(part.read_text()).get('_class_name', 'model')} alone" if part.exists() else ""
        raise ValueError(f"{path}: expected a diffusers folder with a model_index.json{content}")
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
    """Return the variant of the weights in a folder if it is the only one."""
    names = {file.name.split(".")[1] if file.name.count(".") > 1 else None for file in path.glob("*.safetensors")}
    return names.pop() if len(names) == 1 else None


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """Return diffusers' scheduler of a name ("DDIM", "EulerDiscrete", ...) with the settings of `like`.

    Raises:
        ValueError: an unknown name; the message names the nearest.
    """
    classes = [attribute for attribute in dir(diffusers) if attribute.endswith("Scheduler") and not attribute.startswith("Flax")]
    known = {attribute.removesuffix("Scheduler"): attribute for attribute in classes}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise ValueError(f"unknown scheduler {name!r}; did you mean {' or '.join(nearest) or 'DDIM'}?")
    return getattr(diffusers, known[name]).from_config(like.config)


def describe(model: str | Path) -> dict[str, str]:
    """Describe a model, by name, without reading its weights.

    Raises:
        ValueError: as `load`.
    """
    if Path(model).is_file():
        tensors = tensor_shapes(model)
        family = single_file.FAMILIES[single_file.identify(tensors)]
        prefixes = {"unet": "model.", "vae": "first_stage_model.", "text_encoder": "cond"}
        shapes = {part: [shape for name, shape in tensors.items() if name.startswith(prefix)] for part, prefix in prefixes.items()}
        unet, vae, settings = family.unet, family.vae, {}
        make_scheduler = {**family.scheduler, **({"prediction_type": "v_prediction"} if "v_pred" in tensors else {})}
        layout, title = "a single file in the original layout", family.title
    else:
        path = folder(model)
        index = _index(path)
        unet, vae, make_scheduler = (
            json.loads(next((path / part).glob("*config.json")).read_text()) for part in ("unet", "vae", "scheduler")
        )
        settings = index.get("latent_shift", {})
        known = single_file.family_of(unet)
        layout, title = f"a diffusers folder, {index['_class_name']}", known.title if known else "of its own size"
        shapes = {}
        for part in [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if (path / part).is_dir()]:
            variant = only_variant(path / part)
            files = [file for file in (path / part).glob("*.safetensors") if variant or file.name.count(".") == 1]
            shapes[part] = [shape for file in files for shape in tensor_shapes(file).values()]
    size = unet["sample_size"]
    height, width = (side * downscale_factor(vae) for side in ((size, size) if isinstance(size, int) else size))
    zero_snr = ", zero terminal SNR" if make_scheduler.get("rescale_betas_zero_snr") else ""
    shift = Shift(**{field.name: settings[field.name] for field in fields(Shift) if field.name in settings})
    return {
        "family": title,
        "format": layout,
        **{part: f"{sum(map(math.prod, tensors)) / 1e6:,.1f} M parameters" for part, tensors in shapes.items()},
        "widths": ", ".join(map(str, unet["block_out_channels"])),
        "text width": str(unet["cross_attention_dim"]),
        "picture": f"{width}x{height} pixels",
        "predicts": make_scheduler.get("prediction_type", "epsilon") + zero_snr,
        "frames": (
            f"{settings['num_frames']} at {settings.get('fps', 8):g} fps" if "num_frames" in settings
            else "an image model: not trained on clips"
        ),
        "shift": str(shift) if "num_frames" in settings else f"none in training; inflated with {shift}",
    }  # fmt: skip
