"""LatentShiftPipeline: text to video and text to image with one set of weights.

It is diffusers' StableDiffusionPipeline whose U-Net is inflated: the same components, loaders and saved files, and for one frame
the same numbers. A saved folder is an ordinary Stable Diffusion folder with one more entry in model_index.json.

B prompts x clips, F frames, C channels, N = B*F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from latent_shift.diffusion import share_noise
from latent_shift.shift import Edge, Shift, frames, inflate, share_text, shift_of


@dataclass
class LatentShiftOutput(BaseOutput):
    """`frames`: one entry a clip. "pil": lists of F images; "np": `(B, F, H, W, 3)` in [0, 1]; "pt": `(B, F, 3, H, W)`;
    "latent": `(B, C, F, h, w)`."""

    frames: Tensor | np.ndarray | list[list[Image.Image]]


class LatentShiftPipeline(StableDiffusionPipeline):
    """Text to video and image by Latent-Shift (An et al. 2023).

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
        requires_safety_checker: as in `StableDiffusionPipeline`. The U-Net is inflated in place.
        latent_shift: how the U-Net was trained: the fields of `Shift`, and the defaults of a call (`num_frames`, `fps`,
            `num_inference_steps`, `guidance_scale`, `shared_noise`). A U-Net that is already inflated keeps its settings.
    """

    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self, vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker: bool = False, latent_shift: dict | None = None,
    ):  # fmt: skip
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder, requires_safety_checker
        )
        given = dict(latent_shift or {})
        unknown = set(given) - {field.name for field in fields(Shift)} - set(_CALL_DEFAULTS)
        if unknown:
            raise ValueError(f"unknown latent_shift settings {sorted(unknown)}; expected fields of Shift or {sorted(_CALL_DEFAULTS)}")
        settings = shift_of(unet) or Shift(**{field.name: given[field.name] for field in fields(Shift) if field.name in given})
        inflate(unet, settings)
        self.call_defaults = {**_CALL_DEFAULTS, **{key: given[key] for key in _CALL_DEFAULTS if key in given}}
        self.register_to_config(latent_shift={**asdict(settings), **self.call_defaults})
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        shared_noise: float | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        loop: bool = False,
        decode_batch_size: int = 16,
        output_type: str = "np",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> LatentShiftOutput | tuple:
        """Generate clips.

        Args:
            prompt: text, or a list of texts.
            num_frames: frames a clip; 1 makes an image, with the image model. None: the model's own number.
            height, width: pixels, multiples of the autoencoder's factor. None: the size the U-Net was trained at.
            num_inference_steps: steps of sampling, resampled from the training timesteps (the paper's T^). None: the model's.
            timesteps, sigmas: own steps, for schedulers that take them.
            guidance_scale: classifier-free guidance w: uncond + w (cond - uncond); 1 and below is off. None: the model's.
            guidance_rescale: rescale factor phi of guidance (Lin et al. 2024), 0 is off.
            negative_prompt: what to guide away from; "" if None.
            num_videos_per_prompt: clips for each prompt.
            eta: the eta of DDIM, ignored by other schedulers (as diffusers does).
            generator: one generator, or one for each clip.
            latents: `(B, C, F, h, w)` initial noise, standard normal.
            shared_noise: share of the initial noise's variance that all frames have in common; more moves less. None: as trained.
            prompt_embeds, negative_prompt_embeds: `(B, L, D)` instead of texts.
            loop: the last frame runs on into the first: the shift wraps round the clip.
            decode_batch_size: frames decoded at once.
            output_type: "np", "pil", "pt" or "latent", see `LatentShiftOutput`.
            return_dict: False returns `(frames,)`.
            cross_attention_kwargs, clip_skip: as in `StableDiffusionPipeline`.
            callback_on_step_end: called as `f(pipeline, step, timestep, tensors)` after every step; may return changed tensors. Or one
                of diffusers' `PipelineCallback`s.
            callback_on_step_end_tensor_inputs: names of the tensors it wants.

        Raises:
            ValueError: arguments that contradict or do not fit the model; the message says what was expected.
        """
        num_frames = self.call_defaults["num_frames"] if num_frames is None else num_frames
        num_inference_steps = self.call_defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        factor, size = self.vae_scale_factor, self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else size
        height = size[0] * factor if height is None else height
        width = size[1] * factor if width is None else width
        shared_noise = self.call_defaults["shared_noise"] if shared_noise is None else shared_noise
        if not 0 <= shared_noise <= 1:
            raise ValueError(f"shared_noise must be from 0 to 1, got {shared_noise}")
        for name, number in (
            ("num_frames", num_frames),
            ("num_inference_steps", num_inference_steps),
            ("height", height),
            ("width", width),
        ):
            if number < 1:
                raise ValueError(f"{name} must be 1 or more, got {number}")
        if output_type not in ("np", "pil", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}; expected np, pil, pt or latent")
        tensor_inputs = list(callback_on_step_end_tensor_inputs)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = list(callback_on_step_end.tensor_inputs)
        self.check_inputs(
            prompt, height, width, None, negative_prompt, prompt_embeds, negative_prompt_embeds,
            callback_on_step_end_tensor_inputs=tensor_inputs,
        )  # fmt: skip
        self._guidance_scale = self.call_defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        self._clip_skip, self._cross_attention_kwargs, self._interrupt = clip_skip, cross_attention_kwargs, False
        device = self._execution_device

        lora_scale = cross_attention_kwargs.get("scale") if cross_attention_kwargs else None
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt, device, num_videos_per_prompt, self.do_classifier_free_guidance, negative_prompt,
            prompt_embeds, negative_prompt_embeds, lora_scale, clip_skip,
        )  # fmt: skip
        num_clips = len(prompt_embeds)
        timesteps, num_inference_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        latents = self.prepare_video_latents(
            num_clips, num_frames, height, width, prompt_embeds.dtype, device, generator, latents, shared_noise
        )
        step_options = self.prepare_extra_step_kwargs(generator, eta)
        edge: Edge | None = "wrap" if loop else None
        one_text_a_clip = share_text(self.unet)

        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as progress, frames(self.unet, num_frames, edge=edge):
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                text_BLD = torch.cat([negative_prompt_embeds, prompt_embeds]) if self.do_classifier_free_guidance else prompt_embeds
                if not one_text_a_clip:
                    text_BLD = text_BLD.repeat_interleave(num_frames, dim=0)
                # (B, C, F, h, w) -> (B*F, C, h, w): a batch of frames, clip by clip; with guidance the unconditional half first.
                latents_NCHW = latents.transpose(1, 2).flatten(0, 1)
                inputs_NCHW = torch.cat([latents_NCHW] * 2) if self.do_classifier_free_guidance else latents_NCHW
                inputs_NCHW = self.scheduler.scale_model_input(inputs_NCHW, timestep)
                predicted = self.unet(inputs_NCHW, timestep, text_BLD, cross_attention_kwargs=cross_attention_kwargs, return_dict=False)[0]
                if self.do_classifier_free_guidance:
                    unconditional, conditional = predicted.chunk(2)
                    predicted = unconditional + self.guidance_scale * (conditional - unconditional)
                    if guidance_rescale > 0:
                        predicted = rescale_noise_cfg(predicted, conditional, guidance_rescale)
                predicted = predicted.unflatten(0, (num_clips, num_frames)).transpose(1, 2)
                latents = self.scheduler.step(predicted, timestep, latents, **step_options, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
                    changed = callback_on_step_end(self, index, timestep, {name: tensors[name] for name in tensor_inputs}) or {}
                    latents = changed.get("latents", latents)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = changed.get("negative_prompt_embeds", negative_prompt_embeds)
                    if len(prompt_embeds) != num_clips:
                        raise ValueError(f"the callback left {len(prompt_embeds)} prompt_embeds, expected {num_clips}: one a clip")
                if index == len(timesteps) - 1 or (index + 1) % self.scheduler.order == 0:
                    progress.update()

        video = latents if output_type == "latent" else self.decode(latents, decode_batch_size, output_type)
        self.maybe_free_model_hooks()
        return LatentShiftOutput(frames=video) if return_dict else (video,)

    def prepare_video_latents(
        self, num_clips: int, num_frames: int, height: int, width: int, dtype: torch.dtype, device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None,
        shared_noise: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Initial noise `(B, C, F, h, w)` scaled for the scheduler: drawn, or the caller's after a check of its shape.

        Noise is drawn frame by frame, so that one frame gets the noise of diffusers' image pipeline; what the frames share, last.
        """
        channels, factor = self.unet.config.in_channels, self.vae_scale_factor
        shape = (num_clips, channels, num_frames, height // factor, width // factor)
        if latents is None:
            if isinstance(generator, list) and len(generator) != num_clips:
                raise ValueError(f"expected one generator or {num_clips}, one for each clip, got {len(generator)}")
            common = 1 if shared_noise and num_frames > 1 else 0
            drawn = (num_clips, num_frames + common, channels, *shape[3:])
            noise = randn_tensor(drawn, generator=generator, device=device, dtype=dtype)
            if common:
                noise = share_noise(noise[:, :-1], noise[:, -1:], shared_noise)
            latents = noise.transpose(1, 2)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"expected latents of shape {shape} (clips, channels, frames, height/{factor}, width/{factor}), got {tuple(latents.shape)}"
            )
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def save_pretrained(self, *args, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`, with the settings that the U-Net is inflated with now."""
        self.register_to_config(latent_shift={**asdict(shift_of(self.unet) or Shift()), **self.call_defaults})
        super().save_pretrained(*args, **kwargs)

    def decode(self, latents: Tensor, batch_size: int, output_type: str) -> Tensor | np.ndarray | list:
        """`(B, C, F, h, w)` latents to frames, each decoded independently, `batch_size` at a time."""
        latents_NCHW = (latents / self.vae.config.scaling_factor).transpose(1, 2).flatten(0, 1)
        pixels = torch.cat([self.vae.decode(part.to(self.vae.dtype), return_dict=False)[0] for part in latents_NCHW.split(batch_size)])
        pixels, flagged = self.run_safety_checker(pixels, self._execution_device, latents.dtype)
        if flagged is not None:
            pixels[torch.tensor(flagged)] = -1  # black, as diffusers' image pipeline shows what the checker refuses
        pixels_BCFHW = pixels.unflatten(0, (len(latents), -1)).transpose(1, 2)
        return self.video_processor.postprocess_video(pixels_BCFHW, output_type=output_type)


_CALL_DEFAULTS: dict[str, float] = {"num_frames": 16, "fps": 8, "shared_noise": 0.0, "num_inference_steps": 50, "guidance_scale": 7.5}
