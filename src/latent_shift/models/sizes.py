"""Named sizes: the configurations of the autoencoders and U-Nets that the recipes train.

Every model is an ordinary diffusers class; the temporal shift adds no parameter, so an image and a video model of one
name have the same configuration.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from latent_shift.config import Model
from latent_shift.models.baselines import LatentVDMUNet
from latent_shift.models.pixels import PixelSpace, VDMUNet
from latent_shift.shift import Shift, inflate

AUTOENCODERS: dict[str, dict] = {
    # 8x down, 4 channels, no attention: works on any size. Parameters: tiny 0.06 M, emoji 3.1 M.
    "tiny": dict(block_out_channels=(8, 8, 16, 16), norm_num_groups=4),
    "emoji": dict(block_out_channels=(16, 48, 96, 128), norm_num_groups=8),
}

UNETS: dict[str, dict] = {
    # Three resolutions, cross-attention at the two lower ones: 16x16 latents spend their time in convolutions.
    # Heads are 32 wide: with the class's default of 8 a narrow U-Net spends half its time in attention.
    "tiny": dict(block_out_channels=(16, 32, 32), cross_attention_dim=32, norm_num_groups=8),
    "emoji": dict(block_out_channels=(128, 192, 256), cross_attention_dim=384, norm_num_groups=32),
    # A quarter of that, for comparisons (recipes/compare); and the same over pixels of 64x64, seen at three more resolutions.
    "small": dict(block_out_channels=(64, 96, 128), cross_attention_dim=384, norm_num_groups=16),
    "pixels": dict(block_out_channels=(32, 64, 96, 128), cross_attention_dim=384, norm_num_groups=16, in_channels=3, out_channels=3),
}


def autoencoder(size: str) -> AutoencoderKL:
    """A new `AutoencoderKL` of a named size, 8x down to 4 channels; raises ValueError for an unknown name."""
    config = _named(AUTOENCODERS, size)
    num_levels = len(config["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        latent_channels=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # export folds the latents' mean and variance into the 1x1 convolutions instead
        **config,
    )


def check_size(size: str, *, autoencoder: bool) -> None:
    """Raise ValueError for a size that has no name here."""
    _named(AUTOENCODERS if autoencoder else UNETS, size)


def load_autoencoder(folder: str | Path) -> AutoencoderKL:
    """The `AutoencoderKL` of a folder that holds one or a pipeline, in float32."""
    inside = Path(folder) / "vae"
    inside = inside if inside.is_dir() else Path(folder)
    return autoencoder_of(inside).from_pretrained(inside, dtype=torch.float32)


def autoencoder_of(folder: Path) -> type[AutoencoderKL]:
    """The class of the autoencoder in a folder."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    return PixelSpace if config.get("_class_name") == PixelSpace.__name__ else AutoencoderKL


def unet(size: str, *, sample_size: int = 16) -> UNet2DConditionModel:
    """A new `UNet2DConditionModel` of a named size; raises ValueError for an unknown name."""
    config = _named(UNETS, size)
    plain = len(config["block_out_channels"]) - 2  # the higher resolutions have convolutions alone
    return UNet2DConditionModel(
        sample_size=sample_size,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * plain,
        # In this class "attention_head_dim" is the number of heads.
        attention_head_dim=tuple(max(1, width // 32) for width in config["block_out_channels"]),
        **config,
    )


def in_time(unet: UNet2DConditionModel, settings: Model) -> UNet2DConditionModel:
    """An image U-Net made to see time as a recipe's table `model` says: inflated in place, or the baseline's with its weights."""
    if network := {"attention": LatentVDMUNet, "vdm": VDMUNet}.get(settings.temporal):
        return unet if type(unet) is network else network.of(unet)
    return inflate(unet, shift_in_time(settings))  # type: ignore[return-value]


def shift_in_time(settings: Model) -> Shift:
    """What moves as a recipe's table `model` says."""
    return Shift(settings.forward, settings.backward, settings.place, settings.edge) if settings.temporal == "shift" else Shift(0, 0)


def unet_of(folder: str | Path) -> type[UNet2DConditionModel]:
    """The class of the U-Net in a pipeline's folder."""
    config = json.loads((Path(folder) / "unet" / "config.json").read_text())
    known = {each.__name__: each for each in (LatentVDMUNet, VDMUNet)}
    return known.get(config.get("_class_name"), UNet2DConditionModel)


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _named(sizes: dict[str, dict], size: str) -> dict:
    if size not in sizes:
        raise ValueError(f"unknown model size {size!r}; expected one of {', '.join(sizes)}")
    return sizes[size]
