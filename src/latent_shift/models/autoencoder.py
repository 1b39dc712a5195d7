"""Autoencoders of images, applied to each video frame independently: load, encode, decode, scale.

Shapes: N frames, C channels. Pixels are `(N, 3, H, W)` in [-1, 1], latents `(N, C, h, w)` as the U-Net sees
them (scaled), unless a docstring says otherwise. Works for `AutoencoderKL` and `AutoencoderTiny`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin
from torch import Tensor

from latent_shift.models.loading import open_network

TINY = "tiny_vae"
"""Folder of a tiny autoencoder in the folder of a pipeline: an `AutoencoderTiny` for the same latents."""


def load_autoencoder(folder: str | Path) -> AutoencoderKL:
    """Load the autoencoder of a folder that holds one, or a pipeline, in float32.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    folder = Path(folder)
    inside = folder / "vae" if (folder / "vae").is_dir() else folder
    return open_network(inside, AutoencoderKL, kind="vae", dtype=torch.float32)  # type: ignore[return-value]


def load_tiny_autoencoder(model: str | Path) -> AutoencoderTiny | None:
    """Load the tiny autoencoder beside that of a pipeline, in float32; None for a pipeline without one.

    Raises:
        ValueError: it is damaged.
    """
    folder = Path(model) / TINY
    if not folder.is_dir():
        return None
    return open_network(folder, AutoencoderTiny, kind="vae", dtype=torch.float32)  # type: ignore[return-value]


def posterior(vae: ModelMixin, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the scaled latents of pixels. The deviation of an
    `AutoencoderTiny` is 0."""
    encoded = vae.encode(pixels_N3HW)
    if not hasattr(encoded, "latent_dist"):
        return scale_latents(vae, encoded.latents), torch.zeros_like(encoded.latents)
    distribution = encoded.latent_dist
    _, latents_std = _latents_mean_and_std(vae, distribution.std)
    std = distribution.std if latents_std is None else distribution.std / latents_std
    return scale_latents(vae, distribution.mean), std * vae.config.scaling_factor


def encode_frames(
    vae: ModelMixin, pixels_N3HW: Tensor, *, device: torch.device | None = None, batch_size: int = 16
) -> Tensor:
    """Encode pixels to the means of their latents, `batch_size` frames at once, on `device` (default: the
    autoencoder's)."""
    encoded = [
        vae.encode(batch.to(device or vae.device, vae.dtype)) for batch in pixels_N3HW.split(batch_size)
    ]
    means = [batch.latent_dist.mean if hasattr(batch, "latent_dist") else batch.latents for batch in encoded]
    return scale_latents(vae, torch.cat(means))


def decode_latents(vae: ModelMixin, latents_NChw: Tensor, *, batch_size: int = 16) -> Tensor:
    """Decode latents to pixels, `batch_size` frames at once."""
    unscaled = unscale_latents(vae, latents_NChw)
    return torch.cat(
        [vae.decode(batch.to(vae.dtype), return_dict=False)[0] for batch in unscaled.split(batch_size)]
    )


def scale_latents(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Scale latents `(N, C, h, w)` of an autoencoder to the ones that its U-Net sees."""
    mean, std = _latents_mean_and_std(vae, latents)
    if mean is not None and std is not None:
        latents = (latents - mean) / std
    return latents * vae.config.scaling_factor


def unscale_latents(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Undo `scale_latents`."""
    mean, std = _latents_mean_and_std(vae, latents)
    if mean is None or std is None:
        return latents / vae.config.scaling_factor
    return latents * std / vae.config.scaling_factor + mean


_UPCAST_LOCK = threading.RLock()


@contextmanager
def upcast(vae: ModelMixin, *, when: bool) -> Iterator[None]:
    """Run a float16 autoencoder in float32 inside this block: some overflow in half precision. The network is
    converted in place, so one thread at a time has the block."""
    if not when:
        yield
        return
    with _UPCAST_LOCK:
        is_half = vae.dtype == torch.float16
        if is_half:
            vae.to(dtype=torch.float32)
        try:
            yield
        finally:
            if is_half:
                vae.to(dtype=torch.float16)


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 by folding the scale into the 1x1 convolutions around
    the latents.

    Reconstructions do not change, and any diffusers pipeline can read the saved folder: it needs only
    `scaling_factor`, which is 1 afterwards.

    Args:
        vae: changed in place; needs `quant_conv` and `post_quant_conv`.
        latents: `(N, C, H, W)` posterior means of training frames.
    """
    mean = latents.mean(dim=(0, 2, 3), dtype=torch.float64)
    std = (latents.double() - mean[:, None, None]).square().mean(dim=(0, 2, 3)).sqrt()
    num_channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    # Encoder: moments are (mean, log variance): z -> (z - mean) / std, log variance -> log variance - 2 log
    # std.
    encode.bias[:num_channels] = ((encode.bias[:num_channels] - mean) / std).float()
    encode.weight[:num_channels] /= std[:, None, None, None].float()
    encode.bias[num_channels:] -= 2 * std.log().float()
    # Decoder: W z + b with z = std z' + mean.
    decode.bias += (decode.weight[:, :, 0, 0].double() @ mean).float()
    decode.weight *= std[None, :, None, None].float()
    vae.register_to_config(scaling_factor=1.0)


def to_pixels(frames: Tensor) -> Tensor:
    """Convert `(N, H, W, 3) uint8` frames to `(N, 3, H, W) float32` pixels in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_frames(pixels: Tensor) -> Tensor:
    """Convert `(N, 3, H, W)` pixels to `(N, H, W, 3) uint8` frames, clipping to [-1, 1]."""
    return (
        ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    )


def _latents_mean_and_std(vae: ModelMixin, latents: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return None, None
    return torch.tensor(mean).view(1, -1, 1, 1).to(latents), torch.tensor(std).view(1, -1, 1, 1).to(latents)
