"""Few-step distillation: a student that samples in `phases` steps, without guidance, what its teacher samples in many with it.

The timesteps are cut into phases, and the student predicts the end of the teacher's trajectory in a phase. There are two targets:

- "consistency": from anywhere in a phase, its own prediction one step of the teacher further on (Wang et al. 2024, "Phased Consistency
  Models", section 3);
- "trajectory": from the start of a phase, where the teacher's own steps lead (Salimans and Ho 2022, "Progressive Distillation", with all
  steps of a phase at once).

The student has the teacher's parameters and no others. DDIM with one step a phase samples it, so the result is deterministic, and loops,
chunks and streams are what they are for the teacher.

Shapes: B clips of F frames, N = B*F; C channels, h x w of the latents; L tokens, D width of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from latent_shift.clip_text import share_text
from latent_shift.config import Config, Distill
from latent_shift.diffusion import ddim_step, draw_timesteps, midpoint_step
from latent_shift.pipelines.schedulers import distilled_scheduler
from latent_shift.runtime import dtype_of
from latent_shift.shift import frames, shift_of
from latent_shift.training.prepare import Prepared
from latent_shift.training.stages import DenoiserStage, open_unet


class DistillationObjective(nn.Module):
    """Compute the loss of a student within the phases of its teacher's trajectory.

    Args:
        unet: the student, inflated, with one text per clip (`share_text`).
        teacher: the same network with the teacher's weights, frozen; None: the student without its LoRA.
        schedule: noise schedule of both.
        empty_text: `(1, L, D)` embedding of the empty prompt, for guidance.
        options: phases, steps of the teacher, guidance scale and the constant of the loss.
    """

    empty_text: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        teacher: UNet2DConditionModel | None,
        schedule: DDPMScheduler,
        empty_text: Tensor,
        options: Distill,
    ):
        super().__init__()
        self.unet = unet
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.schedule = schedule
        self.options = options
        self.register_buffer("empty_text", empty_text, persistent=False)

    def train(self, mode: bool = True) -> DistillationObjective:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self, latents_BFChw: Tensor, noise_BFChw: Tensor, timesteps_B: Tensor, text_BLD: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms.

        Args:
            timesteps_B: starts of the teacher's steps; with target "trajectory", of phases.
        """
        num_frames, num_timesteps = latents_BFChw.shape[1], self.schedule.config.num_train_timesteps
        timesteps = timesteps_B.repeat_interleave(num_frames)
        phase = num_timesteps // self.options.phases
        ends = timesteps // phase * phase - 1  # -1 is the clean latents
        length = num_timesteps // self.options.solver_steps
        noisy = self.schedule.add_noise(latents_BFChw.flatten(0, 1), noise_BFChw.flatten(0, 1), timesteps)

        def predict(unet: nn.Module, noisy_NChw: Tensor, timesteps_N: Tensor, text_BLD: Tensor) -> Tensor:
            with frames(unet, num_frames):
                return unet(noisy_NChw, timesteps_N, text_BLD).sample.float()

        def end_of_phase(noisy_NChw: Tensor, timesteps_N: Tensor) -> Tensor:
            prediction = predict(self.unet, noisy_NChw, timesteps_N.clamp(min=0), text_BLD)
            return ddim_step(self.schedule, noisy_NChw, prediction, timesteps_N, ends)

        teach = partial(self._teach, predict, text_BLD)
        with torch.no_grad():
            if self.options.target == "trajectory":
                target, now = noisy, timesteps
                for _ in range(self.options.solver_steps // self.options.phases):
                    before = now - length
                    target = midpoint_step(self.schedule, target, teach, now, before)
                    now = before
            else:
                before = timesteps - length
                target = ddim_step(self.schedule, noisy, teach(noisy, timesteps), timesteps, before)
                is_end_N111 = (before == ends)[:, None, None, None]
                target = torch.where(is_end_N111, target, end_of_phase(target, before))
        error = end_of_phase(noisy, timesteps) - target
        # Pseudo-Huber (Song and Dhariwal 2023, section 3.3), with each number on its own.
        c = self.options.huber_c
        loss = ((error.square() + c**2).sqrt() - c).mean()
        return loss, {"mse": error.detach().square().mean()}

    def _teach(
        self,
        predict: Callable[..., Tensor],
        text_BLD: Tensor,
        noisy_NChw: Tensor,
        timesteps_N: Tensor,
    ) -> Tensor:
        """Return the teacher's guided prediction."""
        scale = self.options.guidance_scale
        with self._teacher() as teacher:
            if scale == 1:
                return predict(teacher, noisy_NChw, timesteps_N, text_BLD)
            texts = torch.cat([self.empty_text.to(text_BLD).expand_as(text_BLD), text_BLD])
            both = predict(teacher, torch.cat([noisy_NChw] * 2), torch.cat([timesteps_N] * 2), texts)
            unconditional, conditional = both.chunk(2)
            return torch.lerp(unconditional, conditional, scale)

    @contextmanager
    def _teacher(self):
        if self.teacher is not None:
            yield self.teacher
            return
        self.unet.disable_adapters()
        try:
            yield self.unet
        finally:
            self.unet.enable_adapters()


class DistillationStage(DenoiserStage):
    """Distil the model that `model.init` names, or train a LoRA that does it.

    A batch is one of the stages image and video, except that its timesteps are those the student steps from and no caption is dropped:
    guidance is part of the student.
    """

    def make_objective(self, config: Config, prepared: Prepared) -> nn.Module:
        teacher = None
        if config.lora is None:
            teacher = open_unet(
                config, prepared, dtype=dtype_of(prepared.precision), shift=shift_of(self.model)
            )
            share_text(teacher)
        empty_text = torch.from_numpy(self.store.embed([""])).float()
        return DistillationObjective(self.model, teacher, self.schedule, empty_text, config.distill)

    @property
    def caption_dropout(self) -> float:
        return 0.0

    def draw_timesteps(self, rng: np.random.Generator, num: int) -> np.ndarray:
        num_starts = self.config.distill.num_starts
        length = self.config.diffusion.num_timesteps // num_starts
        indices = draw_timesteps(rng, num, num_starts, shift=self.config.diffusion.timestep_shift)
        return (indices + 1) * length - 1

    def make_scheduler(self) -> SchedulerMixin:
        return distilled_scheduler(self.schedule)

    def call_defaults(self) -> dict[str, Any]:
        distill = self.config.distill
        return super().call_defaults() | {
            "num_inference_steps": distill.phases,
            "guidance_scale": 1.0,
            "distilled_steps": distill.num_starts,
        }
