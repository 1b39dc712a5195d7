"""Conditions of a call, its guider, and the callback that may change both between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from torch import Tensor

from latent_shift.pipelines.denoise import Condition, check_guider
from latent_shift.runtime import silenced


def make_guider(
    guider: BaseGuidance | None, scale: float | None, rescale: float, default: float
) -> BaseGuidance:
    """Return the guider of one call: a copy of the given one, or classifier-free guidance with a scale.

    Args:
        guider: a guider of diffusers, or None.
        scale: guidance scale; None stands for `default`. 1 and below is no guidance.
        rescale: rescale factor (Lin et al. 2024).
        default: scale of the model.

    Raises:
        ValueError: both a guider and a scale, or a guider that needs more than two predictions.
    """
    if guider is not None:
        if scale is not None or rescale:
            raise ValueError("expected a guider, or guidance_scale and guidance_rescale, not both")
        check_guider(guider)
        return copy.deepcopy(guider)
    scale = default if scale is None else scale
    with silenced("diffusers.guiders.guider_utils"):  # it calls guiders experimental each time one is made
        return ClassifierFreeGuidance(scale, rescale, enabled=scale > 1)


def make_conditions(
    embeds: dict[str, Tensor], image_embeds: list[Tensor] | None, use_guidance: bool
) -> list[Condition]:
    """Return the inputs of the U-Net beside the latents: with guidance the unconditional ones first."""
    prefixes, conditions = ["negative_", ""] if use_guidance else [""], []
    for position, prefix in enumerate(prefixes):
        condition: Condition = {"prompt_embeds": embeds[f"{prefix}prompt_embeds"]}
        for key in ("text_embeds", "time_ids"):
            if f"{prefix}add_{key}" in embeds:
                condition[key] = embeds[f"{prefix}add_{key}"]
        if image_embeds is not None:
            condition["image_embeds"] = [embed.chunk(len(prefixes))[position] for embed in image_embeds]
        conditions.append(condition)
    return conditions


@dataclass
class StepCallback:
    """Call `callback_on_step_end` after every step, and apply what it changes to the following steps.

    Args:
        pipe: the pipeline, which the callback gets and whose `_guidance_scale` it may set.
        function: the callback, or None.
        tensor_names: names of the tensors that it gets: "latents", "pred_original_sample" (the clean latents that the
            prediction of the step implies) and keys of `embeds`. Absent ones are None.
        embeds, image_embeds: text and image inputs of the U-Net.
        conditions: made from these; they are updated in place.
        guider: the guider of the call; its scale is updated.
    """

    pipe: object
    function: Callable | None
    tensor_names: list[str]
    embeds: dict[str, Tensor]
    image_embeds: list[Tensor] | None
    conditions: list[Condition]
    guider: BaseGuidance
    pred_original_sample: Tensor | None = None

    def observe(self, pred_original_sample: Tensor) -> None:
        """Keep the clean latents of the current step."""
        self.pred_original_sample = pred_original_sample

    def __call__(self, index: int, timestep: Tensor, latents: Tensor) -> Tensor:
        if self.function is None:
            return latents
        tensors = {"latents": latents, **self.embeds}
        arguments = {name: tensors.get(name) for name in self.tensor_names}
        if "pred_original_sample" in arguments:
            arguments["pred_original_sample"] = self.pred_original_sample
        scale = self.pipe._guidance_scale  # type: ignore[attr-defined]
        changed = self.function(self.pipe, index, timestep, arguments)
        changed = {} if changed is None else changed
        if not isinstance(changed, dict) or not all(
            isinstance(changed.get(name, latents), Tensor) for name in tensors
        ):
            raise ValueError(
                f"expected callback_on_step_end to return a dict of tensors, or None, got {changed!r:.80}"
            )
        new_scale = self.pipe._guidance_scale  # type: ignore[attr-defined]
        if new_scale != scale:
            self.guider.guidance_scale = new_scale
            self.guider.enable() if new_scale > 1 else self.guider.disable()
        self.embeds.update({name: changed[name] for name in self.embeds if name in changed})
        for name, value in self.embeds.items():
            if len(value) != len(latents):
                raise ValueError(
                    f"the callback left {len(value)} {name}, expected {len(latents)}: one a clip"
                )
        updated = make_conditions(self.embeds, self.image_embeds, use_guidance=len(self.conditions) > 1)
        for condition, values in zip(self.conditions, updated, strict=True):
            condition.update(values)
        result = changed.get("latents", latents)
        if result.shape != latents.shape:
            raise ValueError(
                f"the callback left latents of shape {tuple(result.shape)}, expected {tuple(latents.shape)}"
            )
        return result
