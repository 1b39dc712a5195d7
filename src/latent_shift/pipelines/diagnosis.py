"""Results that hold NaN or infinite numbers: what happened, and what to try."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NotFiniteError(RuntimeError):
    """Latents or pixels are NaN or infinite."""


def check_finite(pipe, values: Tensor, name: str) -> None:
    """Raise NotFiniteError for values that are not all finite; the message names the reason.

    Args:
        pipe: the pipeline whose networks computed them.
        values: latents or pixels.
        name: what they are, a plural.
    """
    if not bool(values.isfinite().all()):
        raise NotFiniteError(f"{name} are NaN or infinite: {_reason(pipe, values)}")


def _reason(pipe, values: Tensor) -> str:
    for part_name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            for weight_name, weight in part.named_parameters():
                if weight.is_floating_point() and not bool(weight.isfinite().all()):
                    return f"the weights of {part_name} are damaged, {weight_name} is not finite; load or train the model again"
    signal = getattr(pipe.scheduler, "alphas_cumprod", None)
    if signal is not None and float(signal[len(signal) // 2]) < 1e-6:  # of Stable Diffusion: 0.28
        return (
            "the scheduler's noise levels (trained_betas, beta_end) leave no signal in half of the timesteps; use those that the "
            "model was trained with"
        )
    dtypes = {part.dtype for part in (pipe.unet, pipe.vae)} & {torch.float16, torch.bfloat16}
    if dtypes:
        dtype = str(dtypes.pop()).removeprefix("torch.")
        return (
            f"this model probably overflows in {dtype} on {values.device.type}; load it with dtype=torch.float32 (in the command: "
            "--device cpu), or lower the guidance scale"
        )
    return (
        "the guidance scale or the weight of words is probably too large; lower it, or try another scheduler"
    )
