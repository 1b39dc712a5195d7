"""The pipelines: `LatentShiftPipeline` is diffusers' StableDiffusionPipeline with an inflated U-Net,
`LatentShiftXLPipeline` the same for StableDiffusionXLPipeline. Components, loaders and saved files are those
of diffusers, and one frame gives the same numbers. A saved folder is an ordinary Stable Diffusion folder
with one more entry in model_index.json.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from latent_shift.pipelines.clip_pipeline import ClipPipeline, LatentShiftOutput
from latent_shift.pipelines.limits import CALL_DEFAULTS, XL_GUIDANCE_SCALE
from latent_shift.runtime import silenced

log = logging.getLogger("latent_shift")

__all__ = ["LatentShiftOutput", "LatentShiftPipeline", "LatentShiftXLPipeline"]


class LatentShiftPipeline(ClipPipeline, StableDiffusionPipeline):
    """Text to video and image by Latent-Shift (An et al. 2023), for the Stable Diffusion 1.x and 2.x
    families.

    The components are those of diffusers' `StableDiffusionPipeline`; the U-Net is inflated in place.

    Args:
        latent_shift: settings the U-Net was trained with: fields of `Shift`, and defaults of a call
            (`num_frames`, `fps`, `num_inference_steps`, `guidance_scale`, `shared_noise`,
            `noise_correlation`). A U-Net that is already inflated keeps its shift.
    """

    image_pipeline: ClassVar[type] = StableDiffusionPipeline
    _callback_tensor_inputs: ClassVar = [
        "latents",
        "pred_original_sample",
        "prompt_embeds",
        "negative_prompt_embeds",
    ]

    def __init__(
        self, vae: AutoencoderKL, text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel | PixArtTransformer2DModel | SanaTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers, safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None, image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False, latent_shift: dict | None = None,
    ):  # fmt: skip
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self._prepare_unet(latent_shift)

    def encode_family_prompts(
        self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, *, num_each: int, guided: bool, height: int, width: int,
        tensor_inputs: list[str], clip_skip: int | None, cross_attention_kwargs: dict | None, family: dict,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Encode plain prompts, `num_each` times each, to `prompt_embeds` and `negative_prompt_embeds`
        `(B, L, D)`."""
        self.check_inputs(
            prompt, height, width, None, negative_prompt, prompt_embeds, negative_prompt_embeds,
            callback_on_step_end_tensor_inputs=tensor_inputs,
        )  # fmt: skip
        if clip_skip is not None and self.text_encoder and not hasattr(self.text_encoder, "text_model"):
            # diffusers finds the last layer norm under the name it had before transformers 5.
            self.text_encoder.__dict__["text_model"] = self.text_encoder
        positive, negative = self.encode_prompt(
            prompt, self._execution_device, num_each, guided, negative_prompt, prompt_embeds, negative_prompt_embeds,
            (cross_attention_kwargs or {}).get("scale"), clip_skip,
        )  # fmt: skip
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def postprocess_pixels(self, pixels_N3HW: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[bool] | None]:
        """Run the safety checker, and blacken the frames that it refuses, as diffusers' image pipeline does;
        return the pixels and which frames these are (None without a checker)."""
        with silenced("diffusers.pipelines.stable_diffusion.safety_checker"):
            pixels_N3HW, flagged = self.run_safety_checker(pixels_N3HW, self._execution_device, dtype)
        if flagged is None:
            return pixels_N3HW, None
        flagged = [bool(flag) for flag in flagged]
        pixels_N3HW[torch.tensor(flagged)] = -1
        if any(flagged):
            log.warning(
                "the safety checker blackened %d of %d frames, in which it detected NSFW content; try another prompt or seed",
                sum(flagged), len(flagged),
            )  # fmt: skip
        return pixels_N3HW, flagged


class LatentShiftXLPipeline(ClipPipeline, StableDiffusionXLPipeline):
    """Text to video and image by Latent-Shift, for the Stable Diffusion XL family.

    The components are those of diffusers' `StableDiffusionXLPipeline`; the U-Net is inflated in place.

    Args:
        latent_shift: as in `LatentShiftPipeline`.
    """

    image_pipeline: ClassVar[type] = StableDiffusionXLPipeline
    _denoising_end: ClassVar[None] = None  # of the property `denoising_end`: a call samples to the end
    _callback_tensor_inputs: ClassVar = [
        "latents", "pred_original_sample", "prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "negative_add_text_embeds",
        "add_time_ids", "negative_add_time_ids",
    ]  # fmt: skip
    family_defaults: ClassVar[dict[str, float]] = {**CALL_DEFAULTS, "guidance_scale": XL_GUIDANCE_SCALE}
    family_arguments: ClassVar[tuple[str, ...]] = (
        "prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "original_size",
        "crops_coords_top_left", "target_size", "negative_original_size", "negative_crops_coords_top_left", "negative_target_size",
    )  # fmt: skip

    def __init__(
        self, vae: AutoencoderKL, text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer, unet: UNet2DConditionModel, scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None, feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True, add_watermarker: bool | None = None, latent_shift: dict | None = None,
    ):  # fmt: skip
        super().__init__(
            vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder, feature_extractor,
            force_zeros_for_empty_prompt, add_watermarker,
        )  # fmt: skip
        self._prepare_unet(latent_shift)

    def encode_family_prompts(
        self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, *, num_each: int, guided: bool, height: int, width: int,
        tensor_inputs: list[str], clip_skip: int | None, cross_attention_kwargs: dict | None, family: dict,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Encode plain prompts, `num_each` times each, to text and pooled embeddings and the sizes that XL
        takes as conditions."""
        second, negative_second = family.get("prompt_2"), family.get("negative_prompt_2")
        pooled, negative_pooled = (
            family.get("pooled_prompt_embeds"),
            family.get("negative_pooled_prompt_embeds"),
        )
        self.check_inputs(
            prompt, second, height, width, None, negative_prompt, negative_second, prompt_embeds, negative_prompt_embeds, pooled,
            negative_pooled, callback_on_step_end_tensor_inputs=tensor_inputs,
        )  # fmt: skip
        names = ("prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "negative_add_text_embeds")
        values = self.encode_prompt(
            prompt, second, self._execution_device, num_each, guided, negative_prompt, negative_second, prompt_embeds,
            negative_prompt_embeds, pooled, negative_pooled, (cross_attention_kwargs or {}).get("scale"), clip_skip,
        )  # fmt: skip
        embeds = dict(zip(names, values, strict=True))
        original_size, target_size = (
            family.get("original_size") or (height, width),
            family.get("target_size") or (height, width),
        )
        embeds["add_time_ids"] = self._time_ids(
            embeds, original_size, family.get("crops_coords_top_left", (0, 0)), target_size
        )
        embeds["negative_add_time_ids"] = embeds["add_time_ids"]
        negative_sizes = [family.get(f"negative_{name}") for name in ("original_size", "target_size")]
        crops = family.get("negative_crops_coords_top_left")
        if all(negative_sizes):
            embeds["negative_add_time_ids"] = self._time_ids(
                embeds, negative_sizes[0], crops or (0, 0), negative_sizes[1]
            )
        elif any(negative_sizes) or crops:
            raise ValueError("expected negative_original_size and negative_target_size together, or neither")
        return embeds

    def _time_ids(
        self, embeds: dict[str, Tensor], original_size, crops_coords_top_left, target_size
    ) -> Tensor:
        encoder, text_embeds = self.text_encoder_2, embeds["prompt_embeds"]
        projection_dim = (
            embeds["add_text_embeds"].shape[-1] if encoder is None else encoder.config.projection_dim
        )
        ids = self._get_add_time_ids(
            original_size, crops_coords_top_left, target_size, text_embeds.dtype, projection_dim
        )
        return ids.to(self._execution_device).repeat(len(text_embeds), 1)

    def postprocess_pixels(self, pixels_N3HW: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
        """Add the watermark, if there is one."""
        watermark = self.watermark
        return pixels_N3HW if watermark is None else watermark.apply_watermark(pixels_N3HW), None
