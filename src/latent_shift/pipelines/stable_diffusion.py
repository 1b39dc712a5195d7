"""The pipelines: `LatentShiftPipeline` is diffusers' StableDiffusionPipeline whose U-Net is inflated, `LatentShiftXLPipeline` the same of
StableDiffusionXLPipeline: the same components, loaders and saved files, and for one frame the same numbers. A saved folder is an
ordinary Stable Diffusion folder with one more entry in model_index.json.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
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

from latent_shift.pipelines.clip_pipeline import ClipGeneration, LatentShiftOutput

__all__ = ["LatentShiftOutput", "LatentShiftPipeline", "LatentShiftXLPipeline"]


class LatentShiftPipeline(ClipGeneration, StableDiffusionPipeline):
    """Text to video and image by Latent-Shift (An et al. 2023), of the Stable Diffusion 1.x and 2.x family.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
        requires_safety_checker: as in `StableDiffusionPipeline`. The U-Net is inflated in place.
        latent_shift: how the U-Net was trained: the fields of `Shift`, and the defaults of a call (`num_frames`, `fps`,
            `num_inference_steps`, `guidance_scale`, `shared_noise`, `noise_correlation`). A U-Net that is already inflated keeps its settings.
    """

    def __init__(
        self, vae: AutoencoderKL, text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers, safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None, image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False, latent_shift: dict | None = None,
    ):  # fmt: skip
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder, requires_safety_checker
        )
        self._prepare_unet(latent_shift)

    def _encode_texts(
        self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_each, height, width, tensor_inputs, family
    ) -> dict[str, Tensor]:
        self.check_inputs(
            prompt, height, width, None, negative_prompt, prompt_embeds, negative_prompt_embeds,
            callback_on_step_end_tensor_inputs=tensor_inputs,
        )  # fmt: skip
        positive, negative = self.encode_prompt(
            prompt, self._execution_device, num_each, self.do_classifier_free_guidance, negative_prompt, prompt_embeds,
            negative_prompt_embeds, (self.cross_attention_kwargs or {}).get("scale"), self.clip_skip,
        )  # fmt: skip
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def _finished(self, pixels_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
        pixels_NCHW, flagged = self.run_safety_checker(pixels_NCHW, self._execution_device, dtype)
        if flagged is not None:
            pixels_NCHW[torch.tensor(flagged)] = -1  # black, as diffusers' image pipeline shows what the checker refuses
        return pixels_NCHW


class LatentShiftXLPipeline(ClipGeneration, StableDiffusionXLPipeline):
    """The same of the Stable Diffusion XL family.

    Args:
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder, feature_extractor,
        force_zeros_for_empty_prompt, add_watermarker: as in `StableDiffusionXLPipeline`. The U-Net is inflated in place.
        latent_shift: as in `LatentShiftPipeline`.
    """

    _callback_tensor_inputs: ClassVar = [
        "latents", "prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "negative_add_text_embeds",
        "add_time_ids", "negative_add_time_ids",
    ]  # fmt: skip
    family_arguments = (
        "prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "original_size",
        "crops_coords_top_left", "target_size",
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

    def _encode_texts(
        self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_each, height, width, tensor_inputs, family
    ) -> dict[str, Tensor]:
        second, negative_second = family.get("prompt_2"), family.get("negative_prompt_2")
        pooled, negative_pooled = family.get("pooled_prompt_embeds"), family.get("negative_pooled_prompt_embeds")
        self.check_inputs(
            prompt, second, height, width, None, negative_prompt, negative_second, prompt_embeds, negative_prompt_embeds, pooled,
            negative_pooled, callback_on_step_end_tensor_inputs=tensor_inputs,
        )  # fmt: skip
        names = ("prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "negative_add_text_embeds")
        told = dict(zip(names, self.encode_prompt(
            prompt, second, self._execution_device, num_each, self.do_classifier_free_guidance, negative_prompt, negative_second,
            prompt_embeds, negative_prompt_embeds, pooled, negative_pooled, (self.cross_attention_kwargs or {}).get("scale"), self.clip_skip,
        ), strict=True))  # fmt: skip
        projected = told["add_text_embeds"].shape[-1] if self.text_encoder_2 is None else self.text_encoder_2.config.projection_dim
        ids = self._get_add_time_ids(
            family.get("original_size") or (height, width), family.get("crops_coords_top_left", (0, 0)),
            family.get("target_size") or (height, width), told["prompt_embeds"].dtype, projected,
        )  # fmt: skip
        told["add_time_ids"] = told["negative_add_time_ids"] = ids.to(self._execution_device).repeat(len(told["prompt_embeds"]), 1)
        return told

    def _finished(self, pixels_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
        return pixels_NCHW if self.watermark is None else self.watermark.apply_watermark(pixels_NCHW)
