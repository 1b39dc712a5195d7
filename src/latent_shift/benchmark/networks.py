"""The U-Nets that are timed, all of the same widths and each called as its pipeline calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel

from latent_shift.clip_text import share_text
from latent_shift.models.baselines import LatentVDMUNet
from latent_shift.shift import frames, inflate


class Size(NamedTuple):
    """Sizes of the U-Nets: their common configuration, the number of attention heads, and the width of a
    head.

    diffusers' 2D U-Nets take the number of heads as `attention_head_dim`; ModelScope's U-Net takes their
    width.
    """

    widths: dict[str, Any]
    num_heads: int | tuple[int, ...]
    head_width: int

    def image_unet(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(**self.widths, attention_head_dim=self.num_heads)


SMALL = Size(
    dict(sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=128), (2, 4, 8, 8), 32
)
FULL = Size(dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768), 8, 64)

NETWORKS: dict[str, Callable[[Size], torch.nn.Module]] = {
    "Latent-Shift": lambda size: inflate(size.image_unet()),
    "frame by frame": lambda size: size.image_unet(),
    "Latent-VDM": lambda size: LatentVDMUNet(**size.widths, attention_head_dim=size.num_heads),
    "AnimateDiff (UNetMotionModel)": lambda size: UNetMotionModel(
        **size.widths, num_attention_heads=size.num_heads
    ),
    "ModelScope (UNet3DConditionModel)": lambda size: UNet3DConditionModel(
        **size.widths, attention_head_dim=size.head_width
    ),
}


@dataclass
class TimedNetwork:
    """A U-Net as its pipeline calls it.

    Attributes:
        network: the U-Net, with random weights.
        call: (clips, frames, side of the latents) to a function without arguments that runs one denoising
            step.
        max_frames: the most frames that it takes; None: any number.
    """

    network: torch.nn.Module
    call: Callable[[int, int, int], Callable[[], object]]
    max_frames: int | None = None


def timed_networks(
    *,
    text_length: int = 77,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compiled: bool = False,
    full: bool = False,
    only: str | None = None,
) -> dict[str, TimedNetwork]:
    """Build the U-Nets of `NETWORKS`.

    Args:
        text_length: tokens of the prompt.
        device, dtype: of weights and inputs.
        channels_last: whether convolution weights have the memory format channels last.
        compiled: whether to use `torch.compile`.
        full: widths of Stable Diffusion 1.5 instead of 64/128/256/256.
        only: name of the one network to build. None: all.
    """
    size, networks = FULL if full else SMALL, {}
    for name in [only] if only else NETWORKS:
        torch.manual_seed(0)
        with torch.device(device):  # initialising a full-size network takes minutes on a CPU
            network = NETWORKS[name](size)
        torch.nn.Module.to(network, device, dtype).eval()
        for parameter in network.parameters() if channels_last else ():
            if parameter.ndim == 4:  # the temporal convolutions of ModelScope have five
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        if name in ("Latent-Shift", "Latent-VDM"):
            share_text(network)  # type: ignore[arg-type]
        call = _caller(
            name, network, torch.compile(network) if compiled else network, size, text_length, device, dtype
        )
        # The length of its positional embedding.
        max_frames = 32 if isinstance(network, UNetMotionModel) else None
        networks[name] = TimedNetwork(network, call, max_frames)
    return networks


def _caller(
    name: str,
    network: torch.nn.Module,
    run: Callable,
    size: Size,
    text_length: int,
    device: str,
    dtype: torch.dtype,
) -> Callable[[int, int, int], Callable[[], object]]:
    """Return `TimedNetwork.call` of a network."""

    def call(clips: int, num_frames: int, side: int) -> Callable[[], object]:
        x = torch.randn(clips * num_frames, 4, side, side, device=device, dtype=dtype)
        text = torch.randn(clips, text_length, size.widths["cross_attention_dim"], device=device, dtype=dtype)
        text_of_frames = text.repeat_interleave(num_frames, dim=0)
        if isinstance(network, UNetMotionModel | UNet3DConditionModel):
            x = x.unflatten(0, (clips, num_frames)).transpose(1, 2)
            return lambda: run(x, 500, text_of_frames if isinstance(network, UNetMotionModel) else text)
        if name == "frame by frame":
            return lambda: run(x, 500, text_of_frames)

        def step() -> object:
            with frames(network, num_frames):
                return run(x, 500, text)

        return step

    return call
