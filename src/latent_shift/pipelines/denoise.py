"""Sampling as plain functions over a callable: a loop, a U-Net as such a callable, guidance, chunks.

A `Predict` takes noisy latents `(B, C, F, h, w)`, a timestep and the indices of their frames in the clip,
`(F,)`, and returns the prediction of the network for them. Each wrapper takes one `Predict` and returns
another; it captures its numbers when it is made and reads no state later, so two streams or two calls never
see each other's settings.

Shapes: B clips of F frames, N = B*F; C channels and h x w of the latents; K conditions (conditional,
unconditional).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.guiders import BaseGuidance
from torch import Tensor

from latent_shift.clip_text import share_text
from latent_shift.pipelines.schedulers import input_scales, predicted_clean, step_order
from latent_shift.shift import frames, streaming
from latent_shift.shift_settings import Edge

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Condition = dict[str, Any]
"""Inputs of the U-Net beside the latents, `(B, ...)` a clip or `(B, F, ...)` a frame: `prompt_embeds`, and
where the U-Net takes them `text_embeds`, `time_ids` and `image_embeds` (a list)."""


def denoise(
    predict: Predict,
    scheduler: SchedulerMixin,
    latents: Tensor,
    timesteps: Tensor,
    *,
    step_options: Mapping[str, Any] | None = None,
    known: KnownFrames | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Denoise latents from the first timestep to the last.

    Args:
        predict: network.
        scheduler: a diffusers scheduler whose timesteps are set.
        latents: `(B, C, F, h, w)` noise, scaled by `scheduler.init_noise_sigma`.
        timesteps: `(T,)`.
        step_options: arguments of `scheduler.step`, such as `generator` and `eta`.
        known: frames that are given; the network sees them, with noise, at every step, and they are in the
            result.
        on_step: called as `on_step(index, timestep, latents)` after every step; returns the latents to go on
            with.
        stop: asked before every step; the remaining steps are skipped once it returns True.

    Returns:
        `(B, C, F, h, w)` latents.
    """
    frame_indices_F = torch.arange(latents.shape[2], device=latents.device)
    for index, timestep in enumerate(timesteps):
        if stop():
            break
        inputs = scheduler.scale_model_input(latents, timestep)
        if known is not None:
            inputs = known.blend_input(inputs, scheduler, timestep)
        prediction = predict(inputs, timestep, frame_indices_F)
        options = {**(step_options or {}), **step_order(scheduler, index)}
        latents = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
        if on_step is not None:
            latents = on_step(index, timestep, latents)
    return latents if known is None else known.blend_clean(latents)


def unet_predictor(
    unet: UNet2DConditionModel,
    conditions: Sequence[Condition],
    *,
    edge: Edge | None = None,
    memories: Sequence[dict] | None = None,
    timestep_cond: Tensor | None = None,
    cross_attention_kwargs: dict | None = None,
) -> Predict:
    """Run an inflated U-Net on K conditions in one batch.

    Args:
        unet: an inflated U-Net.
        conditions: K conditions of the same latents. Changes to them take effect at the next step.
        edge: an edge other than the network's own.
        memories: one for each timestep, makes each pass over the timesteps the next frame of a stream, see
            `streaming`.
        timestep_cond: `(1, D)` embedding of the guidance scale, for distilled U-Nets.
        cross_attention_kwargs: as in diffusers.

    Returns:
        A function from `(B, C, F, h, w)` latents to `(K*B, C, F, h, w)` predictions, condition by condition.
    """
    text_per_clip = share_text(unet)
    memory_in_turn = itertools.cycle(memories) if memories else None

    def predict(latents_BCFhw: Tensor, timestep: Tensor, frame_indices_F: Tensor) -> Tensor:
        num_frames = len(frame_indices_F)
        latents_NChw = latents_BCFhw.transpose(1, 2).flatten(0, 1)
        latents_NChw = torch.cat([latents_NChw] * len(conditions)) if len(conditions) > 1 else latents_NChw

        def per_frame(values: list[Tensor], ndim: int) -> Tensor:
            """Values of `ndim` dimensions a clip, or one more where frames differ, as one row for each image
            of the batch."""
            rows = [
                value[:, frame_indices_F].flatten(0, 1)
                if value.ndim > ndim
                else value.repeat_interleave(num_frames, dim=0)
                for value in values
            ]
            return torch.cat(rows)

        texts = [condition["prompt_embeds"] for condition in conditions]
        if text_per_clip and all(text.ndim == 3 for text in texts):
            text = torch.cat(texts)
        else:
            text = per_frame(texts, 3)
        added: dict[str, Any] = {
            name: per_frame([condition[name] for condition in conditions], 2)
            for name in ("text_embeds", "time_ids")
            if name in conditions[0]
        }
        if "image_embeds" in conditions[0]:
            adapters = zip(*(condition["image_embeds"] for condition in conditions), strict=True)
            added["image_embeds"] = [
                torch.cat(images).repeat_interleave(num_frames, dim=0) for images in adapters
            ]
        embedding = (
            None if timestep_cond is None else timestep_cond.to(latents_NChw).expand(len(latents_NChw), -1)
        )
        with streaming(unet, next(memory_in_turn)) if memory_in_turn else frames(unet, num_frames, edge=edge):
            prediction_NChw = unet(
                latents_NChw, timestep, text, timestep_cond=embedding, cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added or None, return_dict=False,
            )[0]  # fmt: skip
        return prediction_NChw.unflatten(0, (-1, num_frames)).transpose(1, 2)

    return predict


def guided(conditional: Predict, both: Predict, guider: BaseGuidance, num_steps: int) -> Predict:
    """Combine conditional and unconditional predictions by a guider of diffusers, over whole clips.

    Args:
        conditional: predicts `(B, C, F, h, w)`, for steps at which the guider asks for one prediction.
        both: predicts `(2*B, C, F, h, w)`, the unconditional first.
        guider: a guider that combines two predictions (`ClassifierFreeGuidance`,
            `AdaptiveProjectedGuidance`, ...), if need be in an interval of the steps.
        num_steps: timesteps of the loop; calls are counted to tell the guider its step.

    Raises:
        ValueError: a guider that needs more than the two predictions.
    """
    check_guider(guider)
    steps = itertools.cycle(range(num_steps))

    def predict(latents_BCFhw: Tensor, timestep: Tensor, frame_indices_F: Tensor) -> Tensor:
        guider.set_state(step=next(steps), num_inference_steps=num_steps, timestep=timestep)
        guider.prepare_inputs({})
        if guider.num_conditions == 1:
            return guider.forward(conditional(latents_BCFhw, timestep, frame_indices_F), None).pred
        unconditional, prediction = both(latents_BCFhw, timestep, frame_indices_F).chunk(2)
        return guider.forward(prediction, unconditional).pred

    return predict


def check_guider(guider: BaseGuidance) -> None:
    """Raise ValueError for a guider that needs more than a conditional and an unconditional prediction."""
    if not isinstance(guider, BaseGuidance):
        raise ValueError(
            f"expected a guider of diffusers, such as ClassifierFreeGuidance(7.5), got {guider!r:.60}"
        )
    two_predictions = guider._input_predictions == ["pred_cond", "pred_uncond"]
    if not two_predictions or type(guider).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(
            f"{type(guider).__name__} needs other predictions or changes the network; expected a guider of a conditional "
            "and an unconditional prediction, such as ClassifierFreeGuidance or AdaptiveProjectedGuidance"
        )


def observed(predict: Predict, scheduler: SchedulerMixin, observe: Callable[[Tensor], None]) -> Predict:
    """Pass the clean latents that each prediction implies to a function, such as one that shows them."""

    def predict_and_observe(latents_BCFhw: Tensor, timestep: Tensor, frame_indices_F: Tensor) -> Tensor:
        prediction = predict(latents_BCFhw, timestep, frame_indices_F)
        observe(predicted_clean(scheduler, latents_BCFhw, prediction, timestep))
        return prediction

    return predict_and_observe


def in_chunks(predict: Predict, chunk: int, halo: tuple[int, int], *, loop: bool = False) -> Predict:
    """Predict `chunk` frames at a time, together with some frames before and after: memory does not grow
    with the clip.

    With a halo of `reach(network)` this equals the prediction for the whole clip. A shorter halo is faster;
    each chunk then knows less of the frames around it.

    Args:
        predict: network for clips of up to `chunk + sum(halo)` frames, whose ends are not joined.
        chunk: frames of a chunk.
        halo: frames before and after it that are computed with it.
        loop: the last frame is followed by the first.
    """
    before, after = halo

    def chunked(latents_BCFhw: Tensor, timestep: Tensor, frame_indices_F: Tensor) -> Tensor:
        num_frames, parts = latents_BCFhw.shape[2], []
        for start in range(0, num_frames, chunk):
            stop = min(start + chunk, num_frames)
            first, last = (
                (start - before, stop + after)
                if loop
                else (max(0, start - before), min(num_frames, stop + after))
            )
            window = torch.arange(first, last, device=frame_indices_F.device) % num_frames
            prediction = predict(latents_BCFhw[:, :, window], timestep, frame_indices_F[window])
            parts.append(prediction[:, :, start - first : stop - first])
        return torch.cat(parts, dim=2)

    return chunked


@dataclass
class KnownFrames:
    """Frames or regions of a clip that are given (blended latent diffusion, Avrahami et al. 2023).

    Args:
        latents: `(1 or B, C, F, h, w)`, clean.
        noise: `(B, C, F, h, w)`, standard normal.
        mask: `(1, 1, F, h or 1, w or 1)`: 1 where something new is generated, 0 where `latents` stay. None:
            everything is new, and `latents` are only the start.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor | None

    def noised(self, scheduler: SchedulerMixin, timestep: Tensor) -> Tensor:
        """Return the known latents at the noise level of a timestep `(1,)`, to start from."""
        return scheduler.add_noise(self.latents.expand_as(self.noise), self.noise, timestep)

    def blend_input(self, inputs: Tensor, scheduler: SchedulerMixin, timestep: Tensor) -> Tensor:
        """Blend the known latents, at the noise level of a timestep, into the input of the network."""
        if self.mask is None:
            return inputs
        signal, noise = input_scales(scheduler, timestep)
        known = (self.latents * signal + self.noise * noise).to(inputs)
        return torch.lerp(known, inputs, self.mask)

    def blend_clean(self, latents: Tensor) -> Tensor:
        """Blend the known latents into the result."""
        return (
            latents if self.mask is None else torch.lerp(self.latents.expand_as(latents), latents, self.mask)
        )
