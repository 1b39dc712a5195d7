"""Diffusion transformers of diffusers with the call of a U-Net: training, sampling and evaluation take them in place of one.

Shapes: N images, S positions of an image, L tokens of a text, D channels, C latent channels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from latent_shift.models.baselines import TemporalAttention
from latent_shift.shift import Shift, inflate
from latent_shift.transformer_blocks import transformer_blocks, width_of


class PixArtDenoiser(PixArtTransformer2DModel):
    """A `PixArtTransformer2DModel` that is called as a `UNet2DConditionModel`."""

    def forward(
        self, sample_NChw: Tensor, timestep: Tensor | float, text_NLD: Tensor, *, return_dict: bool = True, **options: Any
    ) -> UNet2DConditionOutput | tuple[Tensor]:  # fmt: skip
        """Return the prediction `(N, C, h, w)`, without the variance that PixArt's own weights predict beside it.

        Args:
            sample_NChw: noised latents.
            timestep: one, or `(N,)`.
            text_NLD: text embeddings, of each image or of each clip.
            return_dict: as in diffusers.
            options: of a U-Net; all must be None.
        """
        _check_options(self, options)
        timesteps_N, text_NLD = _of_each_image(sample_NChw, timestep, text_NLD)
        output_NChw = super().forward(
            sample_NChw, encoder_hidden_states=text_NLD, timestep=timesteps_N, return_dict=False,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )[0][:, : sample_NChw.shape[1]]  # fmt: skip
        return UNet2DConditionOutput(sample=output_NChw) if return_dict else (output_NChw,)


class SanaDenoiser(SanaTransformer2DModel):
    """A `SanaTransformer2DModel` that is called as a `UNet2DConditionModel`."""

    def forward(
        self, sample_NChw: Tensor, timestep: Tensor | float, text_NLD: Tensor, *, return_dict: bool = True, **options: Any
    ) -> UNet2DConditionOutput | tuple[Tensor]:  # fmt: skip
        """Return the prediction `(N, C, h, w)`; arguments as of `PixArtDenoiser.forward`."""
        _check_options(self, options)
        timesteps_N, text_NLD = _of_each_image(sample_NChw, timestep, text_NLD)
        output_NChw = super().forward(
            sample_NChw, encoder_hidden_states=text_NLD, timestep=timesteps_N, return_dict=False
        )[0]
        return UNet2DConditionOutput(sample=output_NChw) if return_dict else (output_NChw,)


def _check_options(network: nn.Module, options: dict[str, Any]) -> None:
    used = [name for name, value in options.items() if value is not None]
    if used:
        raise ValueError(f"{type(network).__name__} takes no {used[0]}")


def _of_each_image(sample_NChw: Tensor, timestep: Tensor | float, text_NLD: Tensor) -> tuple[Tensor, Tensor]:
    num, num_texts = sample_NChw.shape[0], text_NLD.shape[0]
    if num_texts == 0 or num % num_texts:
        raise ValueError(f"expected a text for each image or for each clip, got {num_texts} for {num} images")
    timesteps = torch.as_tensor(timestep, device=sample_NChw.device).expand(num)
    return timesteps, text_NLD.repeat_interleave(num // num_texts, dim=0)


class PixArtVDM(PixArtDenoiser):
    """`PixArtDenoiser` with attention over time after each block, what `VDMUNet` is to a U-Net. `frames(network, F)` sets how many
    frames make a clip."""

    @functools.wraps(PixArtTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        _add_temporal_attention(self)


class SanaVDM(SanaDenoiser):
    """`SanaDenoiser` with attention over time after each block."""

    @functools.wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        _add_temporal_attention(self)


def _add_temporal_attention(network: nn.Module) -> None:
    inflate(network, Shift(0, 0, place="attn"))  # moves no channel; its state holds the number of frames
    hook = _AttendOverTime(network.__dict__["_shift_state"])
    for block in transformer_blocks(network):
        width = width_of(block)
        block.over_time = TemporalAttention(width, max(1, width // 32))
        block.register_forward_hook(hook)
    network.temporal_layers = True  # type: ignore[assignment]


@dataclass(eq=False)
class _AttendOverTime:
    """A hook on a transformer block: attention over the frames of a clip at each position of its output."""

    state: Any

    def __call__(self, block: nn.Module, args: tuple, tokens_NSD: Tensor) -> Tensor:
        x_NDS1 = tokens_NSD.transpose(1, 2).unsqueeze(-1)
        y_NDS1: Tensor = block.get_submodule("over_time")(x_NDS1, self.state.num_frames)
        return y_NDS1.squeeze(-1).transpose(1, 2)
