"""Export a pipeline to ONNX: graphs of any number of frames and any size, whose weights are stored in half precision.

What is written is described in exported.py.
"""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SchedulerMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_shift.clip_text import share_text
from latent_shift.engines.exported import SETTINGS, Settings, neighbor_indices, write_settings
from latent_shift.engines.runtimes import CACHE
from latent_shift.files import sha256
from latent_shift.models import names
from latent_shift.models.autoencoder import TINY, load_tiny_autoencoder, to_frames, unscale_latents
from latent_shift.models.parts import downscale_factor
from latent_shift.pipelines import catalog, preview
from latent_shift.pipelines.loading import load
from latent_shift.pipelines.provenance import hash_inputs
from latent_shift.pipelines.schedulers import check_own_scheduler, make_scheduler
from latent_shift.shift import has_temporal_layers, neighbors, shift_of

log = logging.getLogger("latent_shift")
OPSET = 20
_SAMPLERS: dict[str, Literal["ddim", "dpm-solver++"]] = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm-solver++",
}


_OF_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_SUPPORTED: dict[str, tuple] = {
    **dict.fromkeys(
        ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), (False, None)
    ),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf,),
}
"""Options of DPM-Solver, and the values with which the engines sample as diffusers does."""


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, previous: Tensor, following: Tensor
    ) -> Tensor:
        with neighbors(self.unet, previous, following):
            output: Tensor = self.unet(sample, timestep, text, return_dict=False)[0]
            return output


class _Decoder(nn.Module):
    def __init__(self, vae: AutoencoderKL | AutoencoderTiny):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return to_frames(self.vae.decode(unscale_latents(self.vae, latents), return_dict=False)[0])


class _TextEncoder(nn.Module):
    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        self.encoder = encoder
        self.takes_mask = bool(getattr(encoder.config, "use_attention_mask", False))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids, attention_mask=attention_mask if self.takes_mask else None)[
            0
        ]
        return states


@torch.no_grad()
def export(model: str, folder: str | Path, *, large_decoder: bool = False) -> Path:
    """Export a model.

    Args:
        model: a name, a diffusers folder or a file, of the families of Stable Diffusion 1.x and 2.x.
        folder: where it is written; made if missing.
        large_decoder: take the decoder of the model's autoencoder even if it has a tiny one.

    Returns:
        `folder`.

    Raises:
        ValueError: a model of another family, a network with temporal layers, or a scheduler that the engines do not have.
        RuntimeError: the extra `onnx` is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError("export needs the extra: pip install 'latent-shift-video[onnx]'") from error
    folder = Path(folder)
    is_folder = not catalog.on_hub(model) and not catalog.is_file(model)
    if is_folder and folder.resolve() == catalog.folder(model).resolve():
        raise ValueError(f"{folder} is the model itself; expected another folder for the exported one")
    if large_decoder and not (is_folder and (catalog.folder(model) / TINY).is_dir()):
        raise ValueError(f"{model} has no {TINY}, so --large-decoder has no effect: leave it out")
    pipe = load(model, device="cpu", dtype=torch.float32)
    tiny = load_tiny_autoencoder(catalog.folder(model)) if is_folder and not large_decoder else None
    if tiny is not None:
        _check_tiny(tiny, pipe.vae, model)
    _check_unet(pipe, model)
    scheduler = _scheduler_of(pipe, model)
    if getattr(pipe, "safety_checker", None) is not None:
        log.warning("%s: its safety checker is not exported: no frame is blackened", model)
    settings = _settings(model, pipe, scheduler)
    if tiny is not None:
        for path in sorted((catalog.folder(model) / TINY).glob("*.safetensors")):
            settings.sha256[f"{TINY}/{path.name}"] = sha256(path)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS).exists():
        shutil.rmtree(folder / CACHE, ignore_errors=True)
        for name in (SETTINGS, names.FILE, preview.FILE):  # of the model that was exported here before
            (folder / name).unlink(missing_ok=True)
    share_text(pipe.unet)
    unit = settings.multiple
    # Sides that differ and never become 1 within the network: torch.export takes such sizes for constants.
    latents = torch.zeros(3, settings.channels, 3 * unit, 5 * unit)
    tokens = torch.full((1, settings.max_tokens), settings.pad_token_id)
    text_encoder = _TextEncoder(pipe.text_encoder)
    indices = {name: torch.from_numpy(array) for name, array in neighbor_indices(3, settings.edge).items()}
    dim = torch.export.Dim
    # From 64 images on diffusers makes a tensor contiguous before it is enlarged, which means nothing in the graph.
    frames, rows, columns = (
        dim("frames", min=1, max=63),
        dim("rows", min=1, max=4096),
        dim("columns", min=1, max=4096),
    )
    ids = torch.full((2, settings.max_tokens - 1), settings.pad_token_id)
    texts, length = dim("texts", min=1, max=10_000), dim("length", min=2, max=settings.max_tokens)
    _write(
        text_encoder,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        folder / "text_encoder.onnx",
        {"input_ids": {0: texts, 1: length}, "attention_mask": {0: texts, 1: length}},
    )
    text = text_encoder(tokens, torch.ones_like(tokens))
    _write(
        _UNet(pipe.unet),
        {"sample": latents, "timestep": torch.tensor([1]), "text": text, "previous": indices["previous"], "next": indices["next"]},
        folder / "unet.onnx",
        {"sample": {0: frames, 2: unit * rows, 3: unit * columns}, "previous": {0: frames}, "next": {0: frames}},
    )  # fmt: skip
    _write(
        _Decoder(tiny or pipe.vae), {"latents": latents}, folder / "decoder.onnx", {"latents": {0: frames, 2: rows, 3: columns}}
    )  # fmt: skip
    backend = pipe.tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))
    if is_folder:
        for name in (names.FILE, preview.FILE):
            if (catalog.folder(model) / name).exists():
                shutil.copyfile(catalog.folder(model) / name, folder / name)
    write_settings(settings, folder)
    return folder


def _check_tiny(tiny: AutoencoderTiny, vae: AutoencoderKL, model: str) -> None:
    """Raise ValueError for a tiny autoencoder of other latents."""
    expected, found = ((downscale_factor(each.config), each.config.latent_channels) for each in (vae, tiny))
    if found != expected:
        raise ValueError(
            f"{model}/{TINY}: expected {expected[0]} pixels to a latent and {expected[1]} channels, got {found[0]} and {found[1]}; "
            "--large-decoder leaves it out"
        )


def _check_unet(pipe: Any, model: str) -> None:
    """Raise ValueError for a network that cannot be exported."""
    config = pipe.unet.config
    is_unet = hasattr(config, "block_out_channels")  # and no transformer
    if not is_unet or getattr(pipe, "text_encoder_2", None) is not None or has_temporal_layers(pipe.unet):
        raise ValueError(f"{model}: expected a model of Stable Diffusion 1.x or 2.x with the shift")
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{model}: its U-Net takes the guidance scale (LCM), which the engines do not pass to it"
        )


def _scheduler_of(pipe: Any, model: str) -> SchedulerMixin:
    """Return the scheduler that the engines sample a model by.

    Raises:
        ValueError: the engines would sample otherwise than diffusers does with it.
    """
    scheduler, name = pipe.scheduler, type(pipe.scheduler).__name__
    if scheduler.config.prediction_type not in get_args(Settings.model_fields["prediction"].annotation):
        raise ValueError(
            f"{model} predicts {scheduler.config.prediction_type}: the engines sample models that predict epsilon or v_prediction"
        )
    if name in _OF_FEW_STEPS:
        raise ValueError(f"{model} is sampled by {name}, which the engines do not have")
    if name not in _SAMPLERS:
        scheduler = make_scheduler("DPMSolverMultistep", scheduler)
        log.warning(
            "%s: the engines sample it by DPM-Solver++ instead of its %s, so a seed gives another clip",
            model,
            name,
        )
    check_own_scheduler(scheduler)
    options = {} if _SAMPLERS[type(scheduler).__name__] == "ddim" else _SUPPORTED
    for option, values in options.items():
        if scheduler.config.get(option, values[0]) not in values:
            raise ValueError(
                f"{model}: its scheduler has {option}={scheduler.config[option]!r}, which the engines do not sample; expected {values[0]!r}"
            )
    return scheduler


def _settings(model: str, pipe: Any, scheduler: Any) -> Settings:
    config, size = scheduler.config, pipe.resolve_size(None, None)
    factor = pipe.vae_scale_factor
    sampler = _SAMPLERS[type(scheduler).__name__]
    last_alpha = 1.0
    if sampler == "ddim" and not config.set_alpha_to_one:
        last_alpha = float(scheduler.alphas_cumprod[0])
    shift = shift_of(pipe.unet)
    assert shift is not None
    defaults = {
        name: pipe.call_defaults[name] for name in Settings.model_fields if name in pipe.call_defaults
    }
    return Settings(
        model=str(model), **defaults, height=size[0] // factor, width=size[1] // factor, channels=pipe.unet.config.in_channels,
        factor=factor, multiple=2 ** (len(pipe.unet.config.block_out_channels) - 1), edge=shift.edge, sampler=sampler,
        spacing=config.timestep_spacing, offset=config.get("steps_offset", 0), prediction=config.prediction_type,
        alphas_cumprod=scheduler.alphas_cumprod.tolist(), last_alpha=last_alpha, max_tokens=pipe.tokenizer.model_max_length,
        pad_token_id=pipe.tokenizer.pad_token_id, sha256=hash_inputs(model),
    )  # fmt: skip


def _write(module: nn.Module, inputs: Mapping[str, Tensor], path: Path, dynamic: Mapping[str, Any]) -> None:
    """Export a module, with its weights in half precision."""
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = tuple(dynamic.get(name) for name in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, verbose=False, opset_version=OPSET, dynamic_shapes=shapes,
            input_names=list(inputs), output_names=["output"],
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    _halve(model)
    onnx.save(model, path)


def _halve(model: Any) -> None:
    """Store weights in half precision, and cast them to float32 in the graph: engines do so once, when they load it."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < 1024 or np.abs(values).max() > 65504:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    for node in reversed(casts):
        model.graph.node.insert(0, node)
