"""What a pipeline is given, words and pictures, to the tensors that generation works on, and latents back to pictures."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_shift.models import text
from latent_shift.pipelines.denoise import Known, Pictures, as_mask


class Conditioning:
    """Mixed into a pipeline of diffusers' Stable Diffusion family. C channels, F frames, B clips."""

    family_arguments: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[tuple[str, ...]] = ()  # of a call, for who mistypes one
    vae: AutoencoderKL
    scheduler: Any
    tokenizer: PreTrainedTokenizerBase
    image_processor: VaeImageProcessor
    video_processor: VideoProcessor
    do_classifier_free_guidance: bool
    _encode_texts: Callable[..., dict[str, Tensor]]  # of the family
    _finished: Callable[[Tensor, torch.dtype], Tensor]

    def _texts(
        self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_frames: int, num_videos: int, height: int, width: int,
        tensor_inputs: list[str], family: dict,
    ) -> dict[str, Tensor]:  # fmt: skip
        """What the U-Net is told, by name: `(B, ...)`, or `(B, F, ...)` where frames are told different things. With guidance each
        name has a `negative_` one."""
        for name in set(family) - set(self.family_arguments):
            nearest = difflib.get_close_matches(name, [*self.family_arguments, *self.arguments], n=1)
            raise TypeError(f"{type(self).__name__} has no argument {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
        travel = sorted(prompt.items()) if isinstance(prompt, dict) else None
        if travel is not None:
            if not travel or not 0 <= travel[0][0] <= travel[-1][0] < num_frames:
                raise ValueError(f"expected texts for frames from 0 to {num_frames - 1}, got {[frame for frame, _ in travel]}")
            prompt = [words for _, words in travel]
        every_frame = prompt_embeds if prompt_embeds is not None and prompt_embeds.ndim == 4 else None
        if every_frame is not None:
            if every_frame.shape[1] != num_frames:
                raise ValueError(f"expected prompt_embeds of {num_frames} frames, got {every_frame.shape[1]}")
            prompt_embeds = every_frame[:, 0]
        plain = text.without_weights(prompt) if isinstance(prompt, str) else prompt and [text.without_weights(words) for words in prompt]
        if isinstance(plain, list) and isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * len(plain)
        num_each = 1 if travel else num_videos
        told = self._encode_texts(
            plain, negative_prompt, prompt_embeds, negative_prompt_embeds, num_each, height, width, tensor_inputs, family
        )
        if not self.do_classifier_free_guidance:
            told = {name: value for name, value in told.items() if not name.startswith("negative_")}
        if plain != prompt:
            listed = [prompt] if isinstance(prompt, str) else prompt
            weights = torch.stack([text.weights(self.tokenizer, words) for words in listed]).repeat_interleave(num_each, dim=0)
            null = self._encode_texts([""], None, None, None, 1, height, width, [], {})["prompt_embeds"]
            told["prompt_embeds"] = torch.lerp(null, told["prompt_embeds"], weights.to(null)[:, :, None])
        if every_frame is not None:
            told["prompt_embeds"] = every_frame.repeat_interleave(num_videos, dim=0).to(told["prompt_embeds"])
        if travel:
            keys = [frame for frame, _ in travel]
            for name, value in told.items():
                told[name] = value[:1] if name.startswith("negative_") else text.between(value, keys, num_frames)[None]
                told[name] = told[name].repeat_interleave(num_videos, dim=0)
        return told

    def _known(self, image, last_image, video, mask, noise: Tensor, height: int, width: int, batch_size: int) -> Known | None:
        """What the given pictures fix of the clip."""
        if image is None and video is None:
            return None
        num_frames = noise.shape[2]
        if video is not None:
            clean = self.encode(video, height, width, batch_size).to(noise)
            new = None if mask is None else as_mask(mask, num_frames, noise.shape[-2:]).to(noise)
        else:
            ends = [self.encode(each, height, width, 1).to(noise) for each in (image, last_image) if each is not None]
            clean = ends[0].repeat(1, 1, num_frames, 1, 1)
            new = torch.ones(1, 1, num_frames, 1, 1).to(noise)
            new[:, :, 0] = 0
            if last_image is not None:
                clean[:, :, num_frames // 2 :], new[:, :, -1] = ends[1], 0
        return Known(clean, noise / self.scheduler.init_noise_sigma, new)

    def encode(self, pictures: Pictures, height: int, width: int, batch_size: int) -> Tensor:
        """Pictures to the means of their latents `(1, C, F, h, w)`, each frame independently, scaled as the U-Net sees them."""
        if isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8:
            pictures = pictures / np.float32(255)
        pixels_NCHW = self.image_processor.preprocess(pictures, height, width)
        upcast = self._upcast_vae()
        parts = [self.vae.encode(part.to(self.vae.device, self.vae.dtype)).latent_dist.mean for part in pixels_NCHW.split(batch_size)]
        if upcast:
            self.vae.to(dtype=torch.float16)
        latents, config = torch.cat(parts), self.vae.config
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (config.latents_mean, config.latents_std))
            latents = (latents - mean) / std
        return (latents * config.scaling_factor).transpose(0, 1)[None]

    def decode(self, latents: Tensor, batch_size: int, output_type: str) -> Tensor | np.ndarray | list:
        """`(B, C, F, h, w)` latents to frames, each decoded independently, `batch_size` at a time."""
        config, latents_NCHW = self.vae.config, latents.transpose(1, 2).flatten(0, 1)
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (config.latents_mean, config.latents_std))
            latents_NCHW = latents_NCHW * std / config.scaling_factor + mean
        else:
            latents_NCHW = latents_NCHW / config.scaling_factor
        upcast = self._upcast_vae()
        pixels = torch.cat([self.vae.decode(part.to(self.vae.dtype), return_dict=False)[0] for part in latents_NCHW.split(batch_size)])
        if upcast:
            self.vae.to(dtype=torch.float16)
        pixels_BCFHW = self._finished(pixels, latents.dtype).unflatten(0, (len(latents), -1)).transpose(1, 2)
        return self.video_processor.postprocess_video(pixels_BCFHW, output_type=output_type)

    def _upcast_vae(self) -> bool:
        """Some autoencoders overflow in half precision, and their configuration says so."""
        upcast = self.vae.dtype == torch.float16 and bool(getattr(self.vae.config, "force_upcast", False)) and hasattr(self, "upcast_vae")
        if upcast:
            self.vae.to(dtype=torch.float32)
        return upcast
