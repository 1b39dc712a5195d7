"""U-Nets of the same widths, each as its pipeline calls it: Latent-Shift's, the image model's frame by frame, and other systems'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel

from latent_shift.models.baselines import LatentVDMUNet
from latent_shift.shift import frames, inflate, share_text


class Size(NamedTuple):
    """Of the U-Nets that are timed. `heads` is how many (in `attention_head_dim` of diffusers' 2D U-Nets, too), ModelScope's U-Net wants
    how wide they are."""

    widths: dict[str, Any]
    heads: int | tuple[int, ...]
    width_of_heads: int

    def image_unet(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(**self.widths, attention_head_dim=self.heads)


SMALL = Size(dict(sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=128), (2, 4, 8, 8), 32)
FULL = Size(dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768), 8, 64)

MAKERS: dict[str, Callable[[Size], torch.nn.Module]] = {
    "Latent-Shift": lambda size: inflate(size.image_unet()),
    "frame by frame": lambda size: size.image_unet(),
    "Latent-VDM": lambda size: LatentVDMUNet(**size.widths, attention_head_dim=size.heads),
    "AnimateDiff (UNetMotionModel)": lambda size: UNetMotionModel(**size.widths, num_attention_heads=size.heads),
    "ModelScope (UNet3DConditionModel)": lambda size: UNet3DConditionModel(**size.widths, attention_head_dim=size.width_of_heads),
}


@dataclass
class Contender:
    """A U-Net as its pipeline calls it.

    Attributes:
        network: with random weights.
        call: (clips, frames, side of the latents) to a function without arguments, one step of sampling.
        most_frames: that it can see at once; None: any number.
    """

    network: torch.nn.Module
    call: Callable[[int, int, int], Callable[[], object]]
    most_frames: int | None = None


def contenders(
    *, text_length: int = 77, device: str = "cpu", dtype: torch.dtype = torch.float32, channels_last: bool = False, compiled: bool = False,
    full: bool = False, only: str | None = None,
) -> dict[str, Contender]:  # fmt: skip
    """U-Nets of the same widths, 64/128/256/256, two layers a block, or in `full` those of Stable Diffusion 1.5: Latent-Shift's, frame by
    frame the image model that all of them begin with, the paper's baseline Latent-VDM, AnimateDiff's and ModelScope's; or `only` one of
    them."""
    size, found = FULL if full else SMALL, {}
    for name in [only] if only else MAKERS:
        torch.manual_seed(0)
        with torch.device(device):  # random weights are drawn where they stay: at full size minutes on a CPU
            network = MAKERS[name](size)
        torch.nn.Module.to(network, device, dtype).eval()
        for parameter in network.parameters() if channels_last else ():
            if parameter.ndim == 4:  # ModelScope's has convolutions over time beside
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        if name in ("Latent-Shift", "Latent-VDM"):
            share_text(network)  # type: ignore[arg-type]
        run = torch.compile(network) if compiled else network

        def call(clips: int, num_frames: int, side: int, name=name, network=network, run=run) -> Callable[[], object]:
            x = torch.randn(clips * num_frames, 4, side, side, device=device, dtype=dtype)
            text = torch.randn(clips, text_length, size.widths["cross_attention_dim"], device=device, dtype=dtype)
            of_frames = text.repeat_interleave(num_frames, dim=0)
            if isinstance(network, UNetMotionModel | UNet3DConditionModel):
                x = x.unflatten(0, (clips, num_frames)).transpose(1, 2)
                return lambda: run(x, 500, of_frames if isinstance(network, UNetMotionModel) else text)
            if name == "frame by frame":
                return lambda: run(x, 500, of_frames)

            def as_clips() -> object:
                with frames(network, num_frames):
                    return run(x, 500, text)

            return as_clips

        found[name] = Contender(network, call, 32 if isinstance(network, UNetMotionModel) else None)  # its table of positions ends there
    return found
