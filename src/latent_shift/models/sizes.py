"""Named sizes: configurations of the autoencoders and U-Nets that the recipes train.

Every network is an ordinary diffusers class. The temporal shift adds no parameter, so an image and a video
model of one name have the same configuration.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

from latent_shift.config import Model
from latent_shift.models.dit import PixArtDenoiser, SanaDenoiser
from latent_shift.models.network_classes import BASELINES, baseline_of
from latent_shift.shift import Shift, inflate
from latent_shift.shift_settings import Rule

AUTOENCODERS: dict[str, dict] = {
    # 8x down, 4 channels, no attention: works on any size. Parameters: tiny 0.06 M, emoji 3.1 M.
    "tiny": dict(block_out_channels=(8, 8, 16, 16), norm_num_groups=4),
    "emoji": dict(block_out_channels=(16, 48, 96, 128), norm_num_groups=8),
}

UNETS: dict[str, Any] = {
    # Three resolutions (tiny: two), cross-attention at all but the highest: 16x16 latents spend their time in
    # convolutions. Heads are 32 wide: with the class's default of 8 a narrow U-Net spends half its time in
    # attention.
    "tiny": dict(block_out_channels=(16, 32), cross_attention_dim=32, norm_num_groups=8),
    "emoji": dict(block_out_channels=(128, 192, 256), cross_attention_dim=384, norm_num_groups=32),
    # A quarter of that, for comparisons (recipes/compare); and the same over pixels of 64x64, seen at three
    # more resolutions.
    "small": dict(block_out_channels=(64, 96, 128), cross_attention_dim=384, norm_num_groups=16),
    "pixels": dict(
        block_out_channels=(32, 64, 96, 128),
        cross_attention_dim=384,
        norm_num_groups=16,
        in_channels=3,
        out_channels=3,
    ),
}


# Transformers of as many parameters as the U-Net "small", 64 tokens for 16x16 latents.
TRANSFORMERS: dict[str, Any] = {
    "pixart": (
        PixArtDenoiser,
        dict(
            num_attention_heads=6, attention_head_dim=32, num_layers=9, cross_attention_dim=192, caption_channels=384, patch_size=2,
            in_channels=4, out_channels=4, use_additional_conditions=False,
        ),
    ),
    "sana": (
        SanaDenoiser,
        dict(
            num_attention_heads=6, attention_head_dim=32, num_layers=9, cross_attention_dim=192, num_cross_attention_heads=6,
            cross_attention_head_dim=32, caption_channels=384, patch_size=2, in_channels=4, out_channels=4,
        ),
    ),
}  # fmt: skip


def autoencoder(size: str) -> AutoencoderKL:
    """Return a new `AutoencoderKL` of a named size, 8x down to 4 channels; raise ValueError for an unknown
    name."""
    config = _lookup(AUTOENCODERS, size)
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


def tiny_autoencoder(*, factor: int, latent_channels: int) -> AutoencoderTiny:
    """Return a new `AutoencoderTiny` of 32 channels: TAESD at half its width, with many blocks where pixels are few.

    Args:
        factor: pixels to a side of a latent, a power of 2.
        latent_channels: of the latents.
    """
    num_levels = factor.bit_length()
    widths, levels = (32,) * num_levels, range(num_levels)
    return AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=latent_channels,
        num_encoder_blocks=tuple((0, 2, 3, 4)[min(level, 3)] for level in levels),
        num_decoder_blocks=tuple((0, 2, 8, 12)[min(level, 3)] for level in reversed(levels)),
    )  # fmt: skip


def check_size(size: str, *, autoencoder: bool) -> None:
    """Raise ValueError for an unknown size."""
    _lookup(AUTOENCODERS if autoencoder else UNETS | TRANSFORMERS, size)


def unet(size: str, *, sample_size: int = 16) -> UNet2DConditionModel:
    """Return a new `UNet2DConditionModel` of a named size; raise ValueError for an unknown name."""
    if size in TRANSFORMERS:
        network, config = TRANSFORMERS[size]
        return network(sample_size=sample_size, **config)
    config = _lookup(UNETS, size)
    num_levels = len(config["block_out_channels"])
    plain = max(1, num_levels - 2)  # the higher resolutions have convolutions alone
    return UNet2DConditionModel(
        sample_size=sample_size,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * (num_levels - plain),
        up_block_types=("CrossAttnUpBlock2D",) * (num_levels - plain) + ("UpBlock2D",) * plain,
        # In this class "attention_head_dim" is the number of heads.
        attention_head_dim=tuple(max(1, width // 32) for width in config["block_out_channels"]),
        **config,
    )


def inflate_unet(
    unet: UNet2DConditionModel, settings: Model, *, shift: Shift | None = None
) -> UNet2DConditionModel:
    """Turn an image network into the video network of a recipe's table `model`: inflate it in place, or build
    the baseline from its weights. `shift` replaces the settings of the shift."""
    if settings.temporal not in BASELINES:
        return inflate(unet, shift or shift_settings(settings))  # type: ignore[return-value]
    baseline = baseline_of(unet, settings.temporal)
    if type(unet) is baseline:
        return unet
    network = baseline.from_config(unet.config)
    network.load_state_dict(unet.state_dict(), strict=False)  # an image network has no layers over time
    return network


def shift_settings(settings: Model) -> Shift:
    """Return the shift of a recipe's table `model`; one that moves no channel where `temporal` is not
    "shift"."""
    if settings.temporal != "shift":
        return Shift(0, 0)
    rule = load_rule(settings.rule) if settings.rule else None
    return Shift(settings.forward, settings.backward, settings.place, settings.edge, rule)


def load_rule(path: str) -> Rule:
    """Return the function that `module:function` names; modules are also found in the working directory.

    Raises:
        ValueError: there is no such module or function. Whatever the function raises becomes a ValueError, too.
    """
    before = list(sys.path)
    sys.path.append("")
    try:
        if ":" not in path:
            raise ValueError("no colon")
        rule = pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:
        raise ValueError(f"model.rule={path}: expected module:function ({_kind(error)})") from error
    finally:
        sys.path[:] = before
    if not callable(rule):
        raise ValueError(f"model.rule={path}: expected a function, got {rule!r}")

    def checked(num_channels: int) -> Sequence[int | Sequence[int]]:
        try:
            given = rule(num_channels)
            given = list(given) if isinstance(given, Iterator) else given
            Shift(rule=lambda _: given).groups(num_channels)
            return given
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"model.rule={path}: fails for {num_channels} channels ({_kind(error)})"
            ) from error

    return checked


def _kind(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def num_parameters(model) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in model.parameters())


def _lookup(sizes: dict[str, Any], size: str) -> Any:
    if size not in sizes:
        raise ValueError(f"unknown model size {size!r}; expected one of {', '.join(sizes)}")
    return sizes[size]
