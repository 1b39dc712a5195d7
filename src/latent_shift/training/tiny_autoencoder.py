"""A tiny autoencoder beside a large one: diffusers' `AutoencoderTiny` learns the latents of an `AutoencoderKL`, which stays as it is.

It decodes in a fraction of the time, as TAESD does for Stable Diffusion (github.com/madebyollin/taesd), and takes the same latents:
`pipe.vae = AutoencoderTiny.from_pretrained(folder)`.

Shapes: N frames of H x W pixels; C channels, h x w of the latents.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from latent_shift.config import Config
from latent_shift.files import read_json_object, write_json
from latent_shift.models import sizes
from latent_shift.models.autoencoder import TINY, load_autoencoder, posterior
from latent_shift.models.parts import downscale_factor
from latent_shift.models.perceptual import FeatureDistance
from latent_shift.training.prepare import Prepared
from latent_shift.training.stages import AutoencoderStage

_FLOOR = 1e-5
"""Added to squared errors, a PSNR of 56 dB: images that are nearly exact have bounded gradients."""
_ENCODER_SHARE = 4
"""The encoder learns from one image in so many: the decoder is what a tiny autoencoder is trained for, and takes more steps."""


class TinyAutoencoderObjective(nn.Module):
    """Compute the losses of a tiny autoencoder: its decoder's on the frames, its encoder's on the teacher's latents.

    The decoder learns from every image, the encoder from one in four. Both losses are means over images of the logarithm of the squared
    error, which is PSNR up to a factor and its sign: an image with a small error, such as one of mostly plain ground, counts as much as one
    with a large error.

    Args:
        vae: the tiny autoencoder.
        teacher: the autoencoder whose latents it learns, frozen.
        perceptual: weight of the perceptual distance; 0 loads no network for it.
    """

    def __init__(self, vae: AutoencoderTiny, teacher: AutoencoderKL, *, perceptual: float):
        super().__init__()
        self.vae = vae
        self.teacher = teacher.requires_grad_(False)
        self.perceptual = perceptual
        # A tuple hides the frozen network from this module's parameters and checkpoints.
        self._features = (FeatureDistance(),) if perceptual else ()

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms.

        Args:
            pixels: `(N, 3, H, W)`, -1..1.
            noise: `(N, C, h, w)` standard normal, to sample the teacher's posterior with.
        """
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # as convolutions on a CPU prefer it
        with torch.no_grad():
            mean, std = posterior(self.teacher, pixels)
        decoded = self.vae.decode(mean + std * noise).sample.float()
        encoded = self.vae.encode(pixels[::_ENCODER_SHARE]).latents.float()
        terms = {
            "frames": _log_error(decoded, pixels),
            "latents": _log_error(encoded, mean[::_ENCODER_SHARE].float()),
        }
        loss = terms["frames"] + terms["latents"]
        for features in self._features:
            terms["perceptual"] = features(decoded, pixels)
            loss = loss + self.perceptual * terms["perceptual"]
        return loss, {name: term.detach() for name, term in terms.items()}


def _log_error(x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
    """Return the mean over images of the logarithm of their mean squared error."""
    return ((x_NCHW - y_NCHW).square().mean(dim=(1, 2, 3)) + _FLOOR).log().mean()


class TinyAutoencoderStage(AutoencoderStage):
    """Train a tiny autoencoder on random crops of random frames, with every concept equally likely. It goes on from the `tiny_vae` in the
    folder that training starts from, if there is one."""

    objective: TinyAutoencoderObjective

    def make_objective(self, config: Config, prepared: Prepared) -> TinyAutoencoderObjective:
        assert prepared.init is not None  # Config
        teacher = load_autoencoder(prepared.init)
        if (tiny := Path(prepared.init) / TINY).is_dir():
            vae = AutoencoderTiny.from_pretrained(tiny)
        else:
            vae = sizes.tiny_autoencoder(
                factor=downscale_factor(teacher.config), latent_channels=teacher.config.latent_channels
            )
        return TinyAutoencoderObjective(vae, teacher, perceptual=config.loss.perceptual)

    def reconstruct(self, pixels: Tensor) -> list[Tensor]:
        """Return what the teacher and the tiny decoder make of the teacher's latents, then both halves of the tiny autoencoder."""
        latents, _ = posterior(self.objective.teacher, pixels)
        own = self.model.encode(pixels).latents
        return [
            self.objective.teacher.decode(latents).sample,
            self.model.decode(latents).sample,
            self.model.decode(own).sample,
        ]

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write an AutoencoderTiny in half precision."""
        vae = AutoencoderTiny.from_config(self.model.config)
        vae.load_state_dict(weights)
        vae.half().save_pretrained(folder)
        config = read_json_object(folder / "config.json")
        del config["block_out_channels"]  # diffusers derives it, and warns where it is given
        config.pop("_name_or_path", None)  # the folder that training started from
        write_json(config, folder / "config.json")
