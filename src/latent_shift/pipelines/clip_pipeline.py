"""Generating clips: text to video, image to video, video to video, inpainting, loops, long clips and streams, with one set of weights.

What the families of Stable Diffusion have in common; pipeline.py says what differs. One frame is diffusers' own image, bit for bit.

B prompts x clips, F frames, C channels, N = B*F, L tokens, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.free_init_utils import FreeInitMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from latent_shift.diffusion import drift, share_noise
from latent_shift.pipelines.conditioning import Conditioning
from latent_shift.pipelines.denoise import Pictures, Predict, in_chunks, last_steps
from latent_shift.shift import Shift, frames, inflate, reach, share_text, shift_of, streaming


@dataclass
class LatentShiftOutput(BaseOutput):
    """`frames`: one entry a clip. "pil": lists of F images; "np": `(B, F, H, W, 3)` in [0, 1]; "pt": `(B, F, 3, H, W)`;
    "latent": `(B, C, F, h, w)`."""

    frames: Tensor | np.ndarray | list[list[Image.Image]]


class ClipGeneration(Conditioning, FreeInitMixin):
    """What the families have in common: everything but their components and texts."""

    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def _prepare_unet(self, latent_shift: dict | None) -> None:
        given = dict(latent_shift or {})
        unknown = set(given) - {field.name for field in fields(Shift)} - set(_CALL_DEFAULTS)
        if unknown:
            raise ValueError(f"unknown latent_shift settings {sorted(unknown)}; expected fields of Shift or {sorted(_CALL_DEFAULTS)}")
        if shift_of(self.unet) is None:
            inflate(self.unet, Shift(**{field.name: given[field.name] for field in fields(Shift) if field.name in given}))
        self._told = {key: given[key] for key in _CALL_DEFAULTS if key in given}
        self.call_defaults = {**_CALL_DEFAULTS, **self._told}
        self._register_settings()
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | dict[int, str] | None = None,
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
        noise_correlation: float | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Pictures = None,
        last_image: Pictures = None,
        video: Pictures = None,
        mask: Pictures = None,
        strength: float | None = None,
        loop: bool = False,
        chunk: int | None = None,
        halo: int | None = None,
        ip_adapter_image: Pictures = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        decode_batch_size: int = 16,
        output_type: str = "np",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        **family: Any,
    ) -> LatentShiftOutput | tuple:
        """Generate clips.

        Args:
            prompt: text, or a list of texts; "(words:1.4)" weighs words. A dict {frame: text} goes from one text to the next.
            num_frames: frames a clip; 1 makes an image, with the image model. None: the video's, or the model's own number.
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
            shared_noise: share of the initial noise's variance that all frames have in common; more moves less. None: the model's.
            noise_correlation: of the rest from one frame to the next; more moves more slowly. None: the model's.
            prompt_embeds, negative_prompt_embeds: `(B, L, D)` instead of texts, or `(B, F, L, D)`, one for each frame.
            image, last_image: the first frame of the clip, and its last.
            video: a clip of F frames to make another of.
            mask: where the video is made anew (white) and where it stays (black): one image, or F.
            strength: share of the steps that is taken from the video, or from the image standing still, in (0, 1]. 1 starts from
                noise alone. None: 0.6 for a video without a mask, else 1.
            loop: the last frame runs on into the first: the shift wraps round the clip.
            chunk: frames the U-Net sees at once (and `halo` more on either side): memory does not grow with `num_frames`.
            halo: frames; None: as many as have an effect (`reach`), which makes chunks exact. Fewer is faster.
            ip_adapter_image, ip_adapter_image_embeds: as in diffusers, after `load_ip_adapter`.
            decode_batch_size: frames decoded at once.
            output_type: "np", "pil", "pt" or "latent", see `LatentShiftOutput`.
            return_dict: False returns `(frames,)`.
            cross_attention_kwargs, clip_skip: as in diffusers.
            callback_on_step_end: called as `f(pipeline, step, timestep, tensors)` after every step; may return changed tensors. Or one
                of diffusers' `PipelineCallback`s.
            callback_on_step_end_tensor_inputs: names of the tensors it wants.
            family: of Stable Diffusion XL: `prompt_2`, `negative_prompt_2`, `pooled_prompt_embeds`, `negative_pooled_prompt_embeds`,
                `original_size`, `crops_coords_top_left`, `target_size`.

        Raises:
            ValueError: arguments that contradict or do not fit the model; the message says what was expected.
        """
        num_frames = self._num_frames(num_frames, image, last_image, video, mask, strength, loop)
        num_inference_steps = self.call_defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        shared_noise, noise_correlation = self._noise_settings(shared_noise, noise_correlation)
        height, width = self._size(height, width)
        for name, number, least in (
            ("num_frames", num_frames, 1), ("num_inference_steps", num_inference_steps, 1),
            ("height", height, 1), ("width", width, 1), ("chunk", 1 if chunk is None else chunk, 1), ("halo", halo or 0, 0),
        ):  # fmt: skip
            if number < least:
                raise ValueError(f"{name} must be {least} or more, got {number}")
        if output_type not in ("np", "pil", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}; expected np, pil, pt or latent")
        tensor_inputs = list(callback_on_step_end_tensor_inputs)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = list(callback_on_step_end.tensor_inputs)
        self._guidance_scale = self.call_defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        self._clip_skip, self._cross_attention_kwargs, self._interrupt = clip_skip, cross_attention_kwargs, False
        self._guidance_rescale = guidance_rescale
        device = self._execution_device

        texts = self._texts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_frames, num_videos_per_prompt, height, width,
            tensor_inputs, family,
        )  # fmt: skip
        num_clips, dtype = len(texts["prompt_embeds"]), texts["prompt_embeds"].dtype
        pictures = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            pictures = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, num_clips, self.do_classifier_free_guidance
            )
        times: Tensor
        times, num_inference_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        latents = self.prepare_video_latents(
            num_clips, num_frames, height, width, dtype, device, generator, latents, shared_noise, noise_correlation, loop
        )
        known = self._known(image, last_image, video, mask, latents, height, width, decode_batch_size)
        if known is not None:
            strength = (0.6 if image is None and mask is None else 1.0) if strength is None else strength
            times = last_steps(self.scheduler, times, strength)
            if not len(times):
                raise ValueError(f"strength {strength} of {num_inference_steps} steps leaves none; expected more of either")
            if strength < 1:
                latents = self.scheduler.add_noise(known.latents.expand_as(latents), known.noise, times[:1])
        elif hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        step_options = self.prepare_extra_step_kwargs(generator, eta)

        if chunk is not None and halo is None:
            halo = reach(self.unet)
        if chunk is not None and halo is not None and num_frames > chunk + 2 * halo:
            predict = in_chunks(self._predictor(texts, pictures, edge="hold" if loop else None), chunk, halo, loop=loop)
        else:
            predict = self._predictor(texts, pictures, edge="wrap" if loop else None)
        numbers = torch.arange(num_frames, device=device)
        self._num_timesteps = len(times)
        for iteration in range(self._free_init_num_iters if self.free_init_enabled else 1):
            if self.free_init_enabled:
                latents, times = self._apply_free_init(latents, iteration, num_inference_steps, device, dtype, generator)
            with self.progress_bar(total=len(times) // self.scheduler.order) as progress:
                for index, timestep in enumerate(times):
                    if self.interrupt:
                        continue
                    predicted = predict(self.scheduler.scale_model_input(latents, timestep), timestep, numbers)
                    latents = self.scheduler.step(predicted, timestep, latents, **step_options, return_dict=False)[0]
                    if known is not None:
                        latents = known.put_back(latents, self.scheduler, times[index + 1] if index + 1 < len(times) else None)
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents, **texts}
                        changed = callback_on_step_end(self, index, timestep, {name: tensors[name] for name in tensor_inputs}) or {}
                        latents = changed.get("latents", latents)
                        texts.update({name: changed[name] for name in texts if name in changed})
                        for name, value in texts.items():
                            if len(value) != num_clips:
                                raise ValueError(f"the callback left {len(value)} {name}, expected {num_clips}: one a clip")
                    if (index + 1) % self.scheduler.order == 0:
                        progress.update()

        made = latents if output_type == "latent" else self.decode(latents, decode_batch_size, output_type)
        self.maybe_free_model_hooks()
        return LatentShiftOutput(frames=made) if return_dict else (made,)

    @torch.no_grad()
    def stream(
        self, prompt: str, *, num_frames: int | None = None, height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None, guidance_rescale: float = 0.0,
        negative_prompt: str | None = None, generator: torch.Generator | None = None, shared_noise: float | None = None,
        noise_correlation: float | None = None, output_type: str = "np", **family: Any,
    ) -> Iterator[np.ndarray | Tensor | Image.Image]:  # fmt: skip
        """Yield frame after frame of one clip, at constant memory; for deterministic schedulers they are those of the whole clip.

        Needs a causal shift, `inflate(pipe.unet, Shift(backward=0))`: then no frame depends on a later one, and of each layer only
        the last frame's shifted channels are kept, for each step of sampling. Arguments as in a call; `num_frames=None` never ends.
        """
        guided = self.call_defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        self._guidance_scale, self._guidance_rescale = guided, guidance_rescale
        self._clip_skip, self._cross_attention_kwargs, self._interrupt = None, None, False
        steps = int(num_inference_steps or self.call_defaults["num_inference_steps"])
        share, correlation = self._noise_settings(shared_noise, noise_correlation)
        height, width = self._size(height, width)
        texts = self._texts(prompt, negative_prompt, None, None, 1, 1, height, width, [], family)
        memories: list[dict] = [{} for _ in range(steps * self.scheduler.order)]
        device, dtype = self._execution_device, texts["prompt_embeds"].dtype
        draw = lambda: self.prepare_video_latents(1, 1, height, width, torch.float32, device, generator, None)  # noqa: E731
        common, rest, number = draw() if share or correlation else 0.0, None, 0
        while num_frames is None or number < num_frames:
            rest = drift(draw(), rest, correlation)
            latents = (rest * (1 - share) ** 0.5 + common * share**0.5).to(dtype)
            timesteps, _ = retrieve_timesteps(self.scheduler, steps, device)
            for index, timestep in enumerate(timesteps):
                predict = self._predictor(texts, None, memory=memories[index])
                predicted = predict(self.scheduler.scale_model_input(latents, timestep), timestep, torch.zeros(1, dtype=torch.long))
                latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            yield self.decode(latents, 1, output_type)[0][0]
            number += 1

    def _predictor(self, texts: dict[str, Tensor], pictures: list[Tensor] | None, *, edge=None, memory: dict | None = None) -> Predict:
        """The U-Net with classifier-free guidance, in one batch: the unconditional half first, frames clip by clip."""
        one_text_a_clip = share_text(self.unet)

        def predict(latents_BCFhw: Tensor, timestep: Tensor, numbers_F: Tensor) -> Tensor:
            num_frames, guided = len(numbers_F), self.do_classifier_free_guidance
            inputs_NChw = latents_BCFhw.transpose(1, 2).flatten(0, 1)
            inputs_NChw = torch.cat([inputs_NChw] * 2) if guided else inputs_NChw

            def rows(name: str, ndim: int) -> Tensor:
                """What is said of each frame `(N, ...)`; of each clip if that is enough."""
                halves = [texts[f"negative_{name}"], texts[name]] if guided else [texts[name]]
                if one_text_a_clip and name == "prompt_embeds" and all(half.ndim == ndim for half in halves):
                    return torch.cat(halves)
                return torch.cat([
                    half[:, numbers_F].flatten(0, 1) if half.ndim > ndim else half.repeat_interleave(num_frames, dim=0) for half in halves
                ])  # fmt: skip

            added: dict[str, Any] = {name[4:]: rows(name, 2) for name in ("add_text_embeds", "add_time_ids") if name in texts}
            if pictures is not None:
                added["image_embeds"] = [picture.repeat_interleave(num_frames, dim=0) for picture in pictures]
            condition = None
            if self.unet.config.time_cond_proj_dim is not None:
                scale = torch.full((len(inputs_NChw),), self.guidance_scale - 1)
                condition = self.get_guidance_scale_embedding(scale, embedding_dim=self.unet.config.time_cond_proj_dim).to(inputs_NChw)
            with frames(self.unet, num_frames, edge=edge) if memory is None else streaming(self.unet, memory):
                predicted = self.unet(
                    inputs_NChw, timestep, rows("prompt_embeds", 3), timestep_cond=condition,
                    cross_attention_kwargs=self.cross_attention_kwargs, added_cond_kwargs=added or None, return_dict=False,
                )[0]  # fmt: skip
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + self.guidance_scale * (conditional - unconditional)
                if self._guidance_rescale > 0:
                    predicted = rescale_noise_cfg(predicted, conditional, self._guidance_rescale)
            return predicted.unflatten(0, (len(latents_BCFhw), num_frames)).transpose(1, 2)

        return predict

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor, size = self.vae_scale_factor, self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else size
        return size[0] * factor if height is None else height, size[1] * factor if width is None else width

    def _num_frames(self, num_frames, image, last_image, video, mask, strength, loop) -> int:
        """Frames of the clip; raises ValueError for pictures that contradict."""
        for wrong, message in (
            (video is not None and (image is not None or last_image is not None), "a video or an image to start from, not both"),
            (last_image is not None and image is None, "an image before last_image"),
            (mask is not None and video is None, "a video for the mask to lie over"),
            (strength is not None and video is None and image is None, "a video or an image for strength to start from"),
            (strength is not None and not 0 < strength <= 1, f"strength above 0 and up to 1, not {strength}"),
            (last_image is not None and loop, "a last_image or a loop, not both"),
            (
                self.free_init_enabled and (video is not None or image is not None),
                "no image or video with FreeInit, which starts from noise",
            ),
        ):
            if wrong:
                raise ValueError(f"expected {message}")
        if video is None:
            chosen = self.call_defaults["num_frames"] if num_frames is None else num_frames
            least = 1 + (image is not None) + (last_image is not None)
            if least > max(chosen, 1):
                raise ValueError(f"num_frames must be {least} or more to go on from what is given, got {chosen}")
            return int(chosen)
        if num_frames not in (None, len(video)):
            raise ValueError(f"the video has {len(video)} frames, num_frames is {num_frames}: expected the same, or no num_frames")
        return len(video)

    def prepare_video_latents(
        self, num_clips: int, num_frames: int, height: int, width: int, dtype: torch.dtype, device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None, shared_noise: float = 0.0,
        noise_correlation: float = 0.0, loop: bool = False,
    ) -> Tensor:  # fmt: skip
        """Initial noise `(B, C, F, h, w)` scaled for the scheduler: drawn, or the caller's after a check of its shape.

        First what the frames share is drawn, then frame by frame: one frame gets the noise of diffusers' image pipeline (in float32), and a
        longer clip begins as a shorter one (a loop whose noise is correlated does not: its last frame leads into its first). It is
        drawn in float32: a seed is the same clip in any dtype, which PyTorch's own half-precision noise is not in every release.
        """
        channels, factor = self.unet.config.in_channels, self.vae_scale_factor
        shape = (num_clips, channels, num_frames, height // factor, width // factor)
        if latents is None:
            if isinstance(generator, list) and len(generator) != num_clips:
                raise ValueError(f"expected one generator or {num_clips}, one for each clip, got {len(generator)}")
            common = 1 if (shared_noise or noise_correlation) and num_frames > 1 else 0
            drawn = (num_clips, common + num_frames, channels, *shape[3:])
            noise = randn_tensor(drawn, generator=generator, device=device, dtype=torch.float32)
            if common:
                noise = share_noise(noise[:, 1:], noise[:, :1], shared_noise, noise_correlation, loop=loop)
            latents = noise.transpose(1, 2)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"expected latents of shape {shape} (clips, channels, frames, height/{factor}, width/{factor}), got {tuple(latents.shape)}"
            )
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def save_pretrained(self, *args, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`, with the settings that the U-Net is inflated with now."""
        self._register_settings()
        super().save_pretrained(*args, **kwargs)

    def _register_settings(self) -> None:
        """What model_index.json says: the shift, and of a call's defaults those that the model came with or that were changed. An image
        model has none, and that tells it from one that was trained on clips."""
        told = {key: value for key, value in self.call_defaults.items() if key in self._told or value != _CALL_DEFAULTS[key]}
        if isinstance(self.unet, UNet2DConditionModel):  # or the baseline's, which plain diffusers then opens as what it is made of
            self.register_to_config(unet=("diffusers", UNet2DConditionModel.__name__))
        if isinstance(self.vae, AutoencoderKL):
            self.register_to_config(vae=("diffusers", AutoencoderKL.__name__))
        self.register_to_config(latent_shift={**asdict(shift_of(self.unet) or Shift()), **told})

    def _noise_settings(self, shared_noise: float | None, noise_correlation: float | None) -> tuple[float, float]:
        share = self.call_defaults["shared_noise"] if shared_noise is None else shared_noise
        correlation = self.call_defaults["noise_correlation"] if noise_correlation is None else noise_correlation
        if not 0 <= share <= 1:
            raise ValueError(f"shared_noise must be from 0 to 1, got {share}")
        if not 0 <= correlation < 1:
            raise ValueError(f"noise_correlation must be from 0 to below 1, got {correlation}")
        return share, correlation


ClipGeneration.arguments = tuple(inspect.signature(ClipGeneration.__call__).parameters)
_CALL_DEFAULTS: dict[str, float] = {
    "num_frames": 16, "fps": 8, "shared_noise": 0.0, "noise_correlation": 0.0, "num_inference_steps": 50, "guidance_scale": 7.5,
}  # fmt: skip
