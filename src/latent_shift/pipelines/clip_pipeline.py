"""The call of every pipeline: text to video, image to video, video to video, inpainting, loops, long clips,
and streams.

`ClipPipeline` is what the pipelines of all model families share; stable_diffusion.py holds what differs:
components and text encoders. A clip of one frame equals the image of diffusers' own pipeline, bit for bit.

B clips (prompts times clips of each), F frames, C channels, h w latent height and width, L tokens, D text
width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from latent_shift.noise import ar1_step
from latent_shift.pipelines import limits
from latent_shift.pipelines.conditioning import (
    Pictures,
    check_family_arguments,
    check_image_prompts,
    decode_clips,
    known_frames,
    resolve_num_frames,
    to_pictures,
)
from latent_shift.pipelines.denoise import (
    Condition,
    Predict,
    denoise,
    guided,
    in_chunks,
    observed,
    unet_predictor,
)
from latent_shift.pipelines.diagnosis import check_finite
from latent_shift.pipelines.free_init import Filter, FreeInit
from latent_shift.pipelines.guidance import StepCallback, make_conditions, make_guider
from latent_shift.pipelines.lora import Sampling, has_lora, merged
from latent_shift.pipelines.noise import check_generator, check_latents, draw_noise
from latent_shift.pipelines.prompts import encode_prompts
from latent_shift.pipelines.schedulers import (
    check_distilled_scheduler,
    check_own_scheduler,
    for_strength,
    set_timesteps,
    timesteps_for_strength,
)
from latent_shift.shift import Shift, has_temporal_layers, inflate, reach, shift_of
from latent_shift.shift_settings import Edge


@dataclass
class LatentShiftOutput(BaseOutput):
    """`frames`, one entry a clip. "pil": lists of F images; "np": `(B, F, H, W, 3)` in [0, 1]; "pt":
    `(B, F, 3, H, W)`; "latent": `(B, C, F, h, w)`.

    `nsfw_content_detected[clip][frame]`: whether the safety checker blackened a frame; None without one.
    """

    frames: Tensor | np.ndarray | list[list[Image.Image]]
    nsfw_content_detected: list[list[bool]] | None = None


class ClipPipeline(DiffusionPipeline):
    """Base of the pipelines, combined with a pipeline of diffusers' Stable Diffusion family.

    A call keeps settings on the pipeline for its callbacks, as in diffusers. Threads that share one therefore call copies of it
    (`copy.copy(pipe)`, with the same weights) that have schedulers of their own, as `generate_clip` does.

    Attributes:
        call_defaults: defaults of a call, the model's own: `num_frames`, `fps` and so on. They may be changed.
        free_init: settings of FreeInit, or None.
    """

    family_arguments: ClassVar[tuple[str, ...]] = ()
    family_defaults: ClassVar[dict[str, float]] = limits.CALL_DEFAULTS
    free_init: FreeInit | None = None
    call_defaults: dict[str, float]
    encode_family_prompts: Callable[..., dict[str, Tensor]]
    postprocess_pixels: Callable[[Tensor, torch.dtype], tuple[Tensor, list[bool] | None]]
    image_pipeline: ClassVar[type]

    def _prepare_unet(self, latent_shift: dict | None) -> None:
        """Inflate the U-Net of a new pipeline and set the defaults of its calls. `latent_shift` holds fields
        of `Shift` and the model's own defaults (frames, steps, guidance, noise)."""
        settings = dict(latent_shift or {})
        shift = {field.name: settings.pop(field.name) for field in fields(Shift) if field.name in settings}
        if self.unet is not None and shift_of(self.unet) is None:
            inflate(self.unet, Shift(**shift))
        self.model_defaults: dict[str, float] = {}
        self.sampling_before: Sampling | None = None  # of the first LoRA
        self.call_defaults = dict(self.family_defaults)
        self.set_model_defaults(settings)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def _guidance_embedding_dim(self) -> int | None:
        """Width of the embedded guidance scale that a distilled U-Net takes; None: it takes none."""
        return getattr(self.unet.config, "time_cond_proj_dim", None)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """As in diffusers."""
        return self._guidance_scale > 1 and self._guidance_embedding_dim is None

    def set_model_defaults(self, defaults: dict[str, float]) -> None:
        """Set defaults of a call that a model or a LoRA brings; they are saved with it even where they equal
        the general ones. Raise ValueError for an unknown name."""
        unknown = set(defaults) - set(limits.CALL_DEFAULTS)
        if unknown:
            raise ValueError(
                f"unknown latent_shift settings {sorted(unknown)}; expected fields of Shift or {sorted(limits.CALL_DEFAULTS)}"
            )
        self.model_defaults |= defaults
        self.call_defaults |= defaults
        self._register_settings()

    def _register_settings(self) -> None:
        """Put the shift into model_index.json, and those defaults of a call that the model brought or that
        were changed. An image model has none, which distinguishes it from one that was trained on clips."""
        changed = {
            name: value
            for name, value in self.call_defaults.items()
            if name in self.model_defaults or value != self.family_defaults[name]
        }
        self.register_to_config(latent_shift={**(shift_of(self.unet) or Shift()).to_dict(), **changed})
        for name, part in self.components.items():
            base = next(cls for cls in type(part).__mro__ if not cls.__module__.startswith("latent_shift."))
            if base is not type(part):  # a baseline's network, which diffusers opens as the class it extends
                self.register_to_config(**{name: ("diffusers", base.__name__)})

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does, with the current settings of the shift in
        model_index.json, and a LoRA that is loaded merged into the weights."""
        networks = {name: part for name, part in self.components.items() if has_lora(part)}
        try:
            for name, network in networks.items():
                setattr(self, name, merged(network))
            self._register_settings()
            super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name, network in networks.items():
                setattr(self, name, network)

    def to_json_string(self) -> str:
        """Return model_index.json. It names the image pipeline, so that generic loaders (`DiffusionPipeline`,
        `AutoPipelineForText2Image`) open the folder as an image model; `latent_shift.load` opens it as a
        video model."""
        index = json.loads(super().to_json_string())  # type: ignore[misc]
        return (
            json.dumps({**index, "_class_name": self.image_pipeline.__name__}, indent=2, sort_keys=True)
            + "\n"
        )

    def enable_free_init(
        self,
        num_iters: int = 3,
        use_fast_sampling: bool = False,
        method: Filter = "butterworth",
        order: int = 4,
        spatial_stop_frequency: float = 0.25,
        temporal_stop_frequency: float = 0.25,
    ) -> None:
        """Sample every clip `num_iters` times (FreeInit); arguments as in `FreeInit`."""
        self.free_init = FreeInit(
            num_iters, use_fast_sampling, method, order, spatial_stop_frequency, temporal_stop_frequency
        )

    def disable_free_init(self) -> None:
        """Sample every clip once."""
        self.free_init = None

    @property
    def free_init_enabled(self) -> bool:
        return self.free_init is not None

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
        guider: BaseGuidance | None = None,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
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
            prompt: text, or a list of texts. "(words:1.4)" weights words. A dict {frame: text} interpolates
                from text to text.
            num_frames: frames of a clip; 1 generates an image with the image model. None: the video's, or
                the model's own number.
            height, width: pixels, multiples of the autoencoder's factor. None: the size the U-Net was
                trained at.
            num_inference_steps: sampling steps, resampled from the training timesteps (the paper's T^).
                None: the model's.
            timesteps, sigmas: custom steps, for schedulers that take them.
            guidance_scale: classifier-free guidance w: uncond + w (cond - uncond); 1 and below is off. None:
                the model's.
            guidance_rescale: rescale factor phi of guidance (Lin et al. 2024), over a whole clip; 0 is off.
            guider: a guider of diffusers instead of guidance_scale and guidance_rescale:
                `ClassifierFreeGuidance(7.5, start=0.1, stop=0.8)` guides in an interval of the steps,
                `AdaptiveProjectedGuidance(...)` in another way.
            negative_prompt: text to guide away from; "" if None. Words can be weighted. Needs guidance.
            num_videos_per_prompt: clips for each prompt.
            eta: eta of DDIM; other schedulers ignore it, as in diffusers.
            generator: one generator, or one for each clip.
            latents: `(B, C, F, h, w)` initial noise, standard normal.
            shared_noise: fraction of the variance of the initial noise that all frames share; more moves
                less. None: the model's.
            noise_correlation: correlation of the rest from frame to frame; higher values give slower motion.
                None: the model's.
            prompt_embeds, negative_prompt_embeds: `(B, L, D)` instead of texts, or `(B, F, L, D)`, one for
                each frame.
            image, last_image: first and last frame of the clip, of any type, see `Pictures`: one picture, or one for each
                prompt.
            video: a clip of F frames to start from.
            mask: white where the video is generated anew, black where it stays: one picture, or F.
            strength: fraction of the steps to take from the video, or from the still image, in (0, 1]. 1
                starts from pure noise. None: 0.6 for a video without a mask, else 1.
            loop: the last frame is followed by the first: the shift wraps round the clip.
            chunk: frames the U-Net sees at once (with `halo` more on either side): memory does not grow with
                `num_frames`.
            halo: frames; None: all that have an effect (`reach`), which makes chunks exact. Fewer is faster.
            ip_adapter_image, ip_adapter_image_embeds: as in diffusers, after `load_ip_adapter`.
            decode_batch_size: frames decoded at once.
            output_type: "np", "pil", "pt" or "latent", see `LatentShiftOutput`.
            return_dict: False returns `(frames,)`.
            cross_attention_kwargs, clip_skip: as in diffusers.
            callback_on_step_end: called as `f(pipeline, step, timestep, tensors)` after every step; may
                return changed tensors. Or a `PipelineCallback` of diffusers.
            callback_on_step_end_tensor_inputs: names of the tensors that it gets: "latents", those of the prompts,
                "pred_original_sample" (the clean latents that the step's prediction implies).
            family: Stable Diffusion XL only: `prompt_2`, `negative_prompt_2`, `pooled_prompt_embeds`,
                `negative_pooled_prompt_embeds`, `original_size`, `crops_coords_top_left`, `target_size` and
                their `negative_` counterparts.

        Raises:
            ValueError: arguments that contradict each other, have no effect or do not fit the model.
            TypeError: an unknown argument.
        """
        # 1. Check the arguments and resolve defaults.
        check_family_arguments(self, family)
        num_inference_steps = self._default("num_inference_steps", num_inference_steps)
        motion = dict(
            shared_noise=shared_noise, noise_correlation=noise_correlation, loop=loop, chunk=chunk, halo=halo
        )
        shared_noise, noise_correlation = self._noise_settings(shared_noise, noise_correlation)
        height, width = self.resolve_size(height, width)
        limits.check_numbers(
            num_frames=num_frames, num_inference_steps=num_inference_steps, height=height, width=width, chunk=chunk, halo=halo,
            num_videos_per_prompt=num_videos_per_prompt, decode_batch_size=decode_batch_size, guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale, eta=eta, strength=strength, shared_noise=shared_noise, noise_correlation=noise_correlation,
        )  # fmt: skip
        pictures = to_pictures(
            self, image=image, last_image=last_image, video=video, mask=mask, height=height, width=width
        )
        num_frames = resolve_num_frames(self, num_frames, **pictures, strength=strength, loop=loop)
        check_own_scheduler(self.scheduler)
        if output_type not in ("np", "pil", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}; expected np, pil, pt or latent")
        custom_guider = guider is not None
        if custom_guider and self._guidance_embedding_dim is not None:
            raise ValueError("a distilled U-Net takes the guidance scale as an input; expected no guider")
        if (
            self.free_init
            and self.free_init.use_fast_sampling
            and (timesteps is not None or sigmas is not None)
        ):
            raise ValueError("use_fast_sampling of FreeInit has no effect with timesteps or sigmas")
        guider = make_guider(guider, guidance_scale, guidance_rescale, self.call_defaults["guidance_scale"])
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"expected callback_on_step_end as a function, got {callback_on_step_end!r:.60}")
        if cross_attention_kwargs is not None and not isinstance(cross_attention_kwargs, dict):
            raise ValueError(f"expected cross_attention_kwargs as a dict, got {cross_attention_kwargs!r:.60}")
        tensor_names = list(callback_on_step_end_tensor_inputs or ())
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_names = list(callback_on_step_end.tensor_inputs)
        # Callbacks and properties of diffusers' pipelines read these.
        self._guidance_scale = getattr(guider, "guidance_scale", 1.0)
        self._guidance_rescale, self._clip_skip = guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        device = self._execution_device
        use_guidance = custom_guider or self.do_classifier_free_guidance
        limits.check_effects(
            num_frames=num_frames, has_latents=latents is not None, guided=use_guidance, **motion, return_dict=return_dict,
            negative_prompt=negative_prompt, negative_prompt_2=family.get("negative_prompt_2"),
            negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        check_image_prompts(self, ip_adapter_image, ip_adapter_image_embeds)
        is_custom = timesteps is not None or sigmas is not None
        self._check_distilled(num_inference_steps, guided=use_guidance, custom=is_custom)

        # 2. Encode prompts and image prompts.
        embeds = encode_prompts(
            self, prompt, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, num_frames=num_frames, num_videos=num_videos_per_prompt,
            guided=use_guidance, height=height, width=width, tensor_inputs=tensor_names, clip_skip=clip_skip,
            cross_attention_kwargs=cross_attention_kwargs, family=family,
        )  # fmt: skip
        num_clips, dtype = len(embeds["prompt_embeds"]), embeds["prompt_embeds"].dtype
        image_embeds = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, num_clips, use_guidance
            )
        conditions = make_conditions(embeds, image_embeds, use_guidance)

        # 3. Timesteps and initial latents.
        check_generator(generator, num_clips)
        generator = list(generator) if isinstance(generator, Sequence) else generator
        if strength is None:
            strength = 1.0 if video is None or mask is not None else 0.6
        scheduler = for_strength(self.scheduler, strength)
        start_schedule = partial(set_timesteps, scheduler, device=device, timesteps=timesteps, sigmas=sigmas)
        steps_T = start_schedule(num_inference_steps)
        latents = self.prepare_video_latents(
            num_clips, num_frames, height, width, dtype, device, generator, latents, shared_noise, noise_correlation, loop
        )  # fmt: skip

        # 4. Frames that are given.
        known = known_frames(
            self, **pictures, noise=latents, height=height, width=width, num_videos=num_videos_per_prompt,
            batch_size=decode_batch_size,
        )  # fmt: skip
        if known is not None:
            steps_T = timesteps_for_strength(scheduler, steps_T, strength)
            latents = latents if strength == 1 else known.noised(scheduler, steps_T[:1])

        # 5. Denoise: the U-Net, in chunks and guided as asked; with FreeInit several times.
        make_predictor = partial(
            self._predictor, conditions, guider if use_guidance else None, num_frames=num_frames, loop=loop, chunk=chunk,
            halo=halo, cross_attention_kwargs=cross_attention_kwargs,
        )  # fmt: skip
        callback = StepCallback(
            self, callback_on_step_end, tensor_names, embeds, image_embeds, conditions, guider
        )
        step_options = self.prepare_extra_step_kwargs(generator, eta)
        noise = latents / scheduler.init_noise_sigma
        for iteration in range(self.free_init.num_iters if self.free_init else 1):
            if self.interrupt:
                break
            if self.free_init:
                steps_T = start_schedule(self.free_init.num_steps(iteration, num_inference_steps))
            if self.free_init and iteration:
                fresh = randn_tensor(latents.shape, generator=generator, device=device, dtype=torch.float32)
                latents = self.free_init.renoise(latents, noise, fresh, scheduler)
            latents = self._denoise(
                make_predictor(len(steps_T)),
                scheduler,
                latents,
                steps_T,
                callback,
                step_options=step_options,
                known=known,
            )

        # 6. Decode.
        check_finite(self, latents, "the sampled latents")
        frames: Any = latents
        flagged = None
        if output_type != "latent":
            frames, flagged = decode_clips(self, latents, decode_batch_size, output_type)
        self.maybe_free_model_hooks()
        return LatentShiftOutput(frames=frames, nsfw_content_detected=flagged) if return_dict else (frames,)

    def _denoise(
        self, predict: Predict, scheduler: SchedulerMixin, latents: Tensor, steps_T: Tensor, callback: StepCallback, **options: Any
    ) -> Tensor:  # fmt: skip
        """Run `denoise` with a progress bar, the callback, and a stop when `interrupt` is set."""
        self._num_timesteps, order = len(steps_T), scheduler.order
        if "pred_original_sample" in callback.tensor_names:
            predict = observed(predict, scheduler, callback.observe)

        def on_step(index: int, timestep: Tensor, latents: Tensor) -> Tensor:
            if index == 0:
                check_finite(self, latents, "the latents of the first sampling step")
            if (index + 1) % order == 0:
                progress.update()
            return callback(index, timestep, latents)

        with self.progress_bar(total=-(-len(steps_T) // order)) as progress:
            return denoise(
                predict, scheduler, latents, steps_T, on_step=on_step, stop=lambda: self.interrupt, **options
            )  # fmt: skip

    @torch.no_grad()
    def stream(
        self, prompt: str, *, num_frames: int | None = None, height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None, guidance_rescale: float = 0.0,
        negative_prompt: str | None = None, eta: float = 0.0, generator: torch.Generator | None = None,
        shared_noise: float | None = None, noise_correlation: float | None = None, output_type: str = "np", **family: Any,
    ) -> Iterator[np.ndarray | Tensor | Image.Image]:  # fmt: skip
        """Yield the frames of one clip, one after the other, at constant memory.

        Needs a causal shift, `inflate(pipe.unet, Shift(backward=0))`: no frame then depends on a later one,
        and each layer keeps only the channels that it passes on, for each sampling step. With a
        deterministic scheduler the frames equal those of the whole clip. Other calls and streams may run
        between two frames.

        Args:
            prompt: text. It and the other arguments are those of a call.
            num_frames: frames to yield; None never ends.
        """
        check_family_arguments(self, family)
        if not isinstance(prompt, str):
            raise ValueError(f"a stream takes one prompt, got {prompt!r}")
        if output_type not in ("np", "pil", "pt"):
            raise ValueError(f"unknown output_type {output_type!r} of a stream; expected np, pil or pt")
        check_own_scheduler(self.scheduler)
        num_inference_steps = self._default("num_inference_steps", num_inference_steps)
        shared_noise, noise_correlation = self._noise_settings(shared_noise, noise_correlation)
        height, width = self.resolve_size(height, width)
        limits.check_numbers(
            num_frames=num_frames, num_inference_steps=num_inference_steps, height=height, width=width, guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale, eta=eta, shared_noise=shared_noise, noise_correlation=noise_correlation,
        )  # fmt: skip
        check_generator(generator)
        guider = make_guider(None, guidance_scale, guidance_rescale, self.call_defaults["guidance_scale"])
        self._guidance_scale = guider.guidance_scale
        use_guidance, device = self.do_classifier_free_guidance, self._execution_device
        check_image_prompts(self, None, None)
        self._check_distilled(num_inference_steps, guided=use_guidance)
        limits.check_effects(
            guided=use_guidance, negative_prompt=negative_prompt, negative_prompt_2=family.get("negative_prompt_2")
        )  # fmt: skip
        scheduler = copy.deepcopy(self.scheduler)
        step_options = self.prepare_extra_step_kwargs(generator, eta)
        embeds = encode_prompts(
            self, prompt, negative_prompt=negative_prompt, prompt_embeds=None, negative_prompt_embeds=None, num_frames=1,
            num_videos=1, guided=use_guidance, height=height, width=width, tensor_inputs=[], clip_skip=None,
            cross_attention_kwargs=None, family=family,
        )  # fmt: skip
        conditions, dtype = make_conditions(embeds, None, use_guidance), embeds["prompt_embeds"].dtype
        steps_T = set_timesteps(scheduler, num_inference_steps, device=device)
        memories: list[dict] = [{} for _ in range(len(steps_T))]
        predict = self._predictor(
            conditions, guider if use_guidance else None, len(steps_T), memories=memories
        )
        shape = self._latent_shape(1, 1, height, width)
        draw = partial(draw_noise, shape, generator=generator, device=device)
        if num_frames == 1:
            shared_noise = noise_correlation = 0.0  # as in a call, there are no frames to share it
        clip_noise = draw() if shared_noise or noise_correlation else 0.0
        frame_noise, index = None, 0
        while num_frames is None or index < num_frames:
            frame_noise = ar1_step(draw(), frame_noise, noise_correlation)
            noise = frame_noise * (1 - shared_noise) ** 0.5 + clip_noise * shared_noise**0.5
            steps_T = set_timesteps(scheduler, num_inference_steps, device=device)
            latents = noise.to(dtype) * scheduler.init_noise_sigma
            latents = denoise(predict, scheduler, latents, steps_T, step_options=step_options)
            frames, _ = decode_clips(self, latents, 1, output_type)
            yield frames[0][0]
            index += 1

    def unload_lora_weights(self) -> None:
        """As in diffusers. Unless a LoRA was fused, the shift, scheduler and defaults are those from before the first one again."""
        super().unload_lora_weights()  # type: ignore[misc]
        if self.sampling_before is not None and not self.num_fused_loras:
            self.sampling_before.restore(self)
        self.sampling_before = None

    def _check_distilled(self, num_inference_steps: int, *, guided: bool, custom: bool = False) -> None:
        if distilled_steps := int(self.call_defaults["distilled_steps"]):
            check_distilled_scheduler(self.scheduler, custom=custom)
            limits.check_distilled(
                num_inference_steps, distilled_steps, guided=guided, free_init=self.free_init
            )

    def _predictor(
        self, conditions: list[Condition], guider: BaseGuidance | None, num_steps: int, *, num_frames: int = 1, loop: bool = False,
        chunk: int | None = None, halo: int | None = None, memories: list[dict] | None = None,
        cross_attention_kwargs: dict | None = None,
    ) -> Predict:  # fmt: skip
        """Compose the network of a call: the U-Net, in chunks if asked, guided if asked."""
        wraps = loop or (shift_of(self.unet) or Shift()).edge == "wrap"
        edge: Edge | None = "wrap" if loop else None
        halos = (0, 0)
        if chunk is not None:
            halos = reach(self.unet) if not has_temporal_layers(self.unet) or halo is None else (halo, halo)
            halos = halos if halo is None else (min(halo, halos[0]), min(halo, halos[1]))
            chunk = chunk if num_frames > chunk + sum(halos) else None
        if chunk is not None and wraps:
            edge = "hold"  # within a window; the chunks join the ends of the clip
        timestep_cond = None
        if self._guidance_embedding_dim is not None:
            scale = torch.tensor([self._guidance_scale - 1.0])
            timestep_cond = self.get_guidance_scale_embedding(
                scale, embedding_dim=self._guidance_embedding_dim
            )

        def network(conditions: list[Condition]) -> Predict:
            predict = unet_predictor(
                self.unet, conditions, edge=edge, memories=memories, timestep_cond=timestep_cond,
                cross_attention_kwargs=cross_attention_kwargs,
            )  # fmt: skip
            return predict if chunk is None else in_chunks(predict, chunk, halos, loop=wraps)

        if guider is None:
            return network(conditions)
        return guided(network(conditions[-1:]), network(conditions), guider, num_steps)

    def prepare_video_latents(
        self, num_clips: int, num_frames: int, height: int, width: int, dtype: torch.dtype, device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None, shared_noise: float = 0.0,
        noise_correlation: float = 0.0, loop: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return initial latents `(B, C, F, h, w)` scaled for the scheduler: noise, or the caller's after a
        check of its shape.

        Noise is drawn in float32, see `draw_noise`, so a seed gives the same clip in any dtype.
        """
        shape = self._latent_shape(num_clips, num_frames, height, width)
        if latents is None:
            latents = draw_noise(
                shape, generator=generator, device=device, shared_noise=shared_noise, noise_correlation=noise_correlation, loop=loop
            )  # fmt: skip
        else:
            check_latents(latents, shape, self.vae_scale_factor)
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def _latent_shape(
        self, num_clips: int, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int, int]:
        factor = self.vae_scale_factor
        limits.check_size(height, width, limits.size_multiple(factor, self.unet.config))
        return num_clips, self.unet.config.in_channels, num_frames, height // factor, width // factor

    def _default(self, name: str, value):
        return self.call_defaults[name] if value is None else value

    def resolve_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in pixels; None stands for the size the U-Net was trained at."""
        size = self.unet.config.sample_size
        if size is None:
            if height is None or width is None:
                raise ValueError(
                    "expected height and width (--height, --width): unet/config.json of this model has no sample_size"
                )
            return height, width
        rows, columns = (size, size) if isinstance(size, int) else size
        factor = self.vae_scale_factor
        return rows * factor if height is None else height, columns * factor if width is None else width

    def _noise_settings(
        self, shared_noise: float | None, noise_correlation: float | None
    ) -> tuple[float, float]:
        shared = self._default("shared_noise", shared_noise)
        correlation = self._default("noise_correlation", noise_correlation)
        return shared, correlation
