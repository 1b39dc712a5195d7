"""The initial noise of clips: standard normal numbers of a seed, and noise that is alike from frame to frame.

Nothing here imports torch unless it is given tensors: every engine draws the same noise of a seed.

Shapes: B clips, F frames, C channels, h w latent height and width.
"""

from __future__ import annotations

import numpy as np


def standard_normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return what `torch.randn` draws on a CPU with a new generator of a seed, in float32 to rounding: the Mersenne Twister, and
    Box and Muller's method for 16 numbers at a time.

    Args:
        seed: as of `torch.Generator.manual_seed`, which uses its last 32 bits.
        shape: of 16 numbers or more.
    """
    size = int(np.prod(shape))
    if size < 16:
        raise ValueError(f"expected a shape of 16 numbers or more, got {shape}")
    rest = size % 16
    bits = np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator.random_raw(size + (16 if rest else 0))
    uniform = (bits & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)

    def transform(numbers: np.ndarray) -> np.ndarray:
        first, second = numbers.reshape(-1, 2, 8).transpose(1, 0, 2)
        radius = np.sqrt(np.float32(-2) * np.log1p(-first))
        angle = np.float32(2 * np.pi) * second
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

    noise = np.empty(size, np.float32)
    noise[: size - rest] = transform(uniform[: size - rest])
    if rest:  # the last 16 are drawn anew
        noise[-16:] = transform(uniform[size:])
    return noise.reshape(shape)


def clip_noise(
    seed: int,
    shape_CFhw: tuple[int, int, int, int],
    *,
    shared_noise: float = 0.0,
    noise_correlation: float = 0.0,
    loop: bool = False,
) -> np.ndarray:
    """Return the initial noise `(C, F, h, w) float32` of a clip, as `pipelines.noise.draw_noise` draws it for one clip.

    Args:
        seed: of the clip.
        shape_CFhw: of the latents.
        shared_noise, noise_correlation, loop: see `correlated_noise`.
    """
    channels, num_frames, height, width = shape_CFhw
    num_shared = int(bool(shared_noise or noise_correlation) and num_frames > 1)
    noise = standard_normal(seed, (num_shared + num_frames, channels, height, width))[None]
    if num_shared:
        noise = correlated_noise(noise[:, 1:], noise[:, :1], shared_noise, noise_correlation, loop=loop)
    return np.ascontiguousarray(noise[0].swapaxes(0, 1), np.float32)


def correlated_noise(frame_noise, clip_noise, shared: float, correlation: float = 0.0, *, loop: bool = False):
    """Return noise of unit variance whose frames are alike: frames k apart correlate by shared + (1 -
    shared) correlation^k.

    This is the mixed and the progressive noise of PYoCo (Ge et al. 2023, section 4.1) in one.

    Args:
        frame_noise: standard normal noise of each frame, an array or tensor `(B, F, ...)`.
        clip_noise: standard normal noise of the clip, `(B, 1, ...)`.
        shared: fraction of the variance that all frames share; 0 without correlation returns `frame_noise`.
        correlation: of the rest between successive frames, in [0, 1).
        loop: the last frame leads into the first.
    """
    frames = [ar1_step(frame_noise[:, :1], None, correlation)]
    if loop:
        num, gain = frame_noise.shape[1], (1 - correlation**2) ** 0.5
        last = sum(frame_noise[:, num - 1 - k : num - k] * correlation**k for k in range(num)) * (
            gain / (1 - correlation**num)
        )
        frames = [ar1_step(frame_noise[:, :1], last, correlation)]
    for frame in range(1, frame_noise.shape[1]):
        frames.append(ar1_step(frame_noise[:, frame : frame + 1], frames[-1], correlation))
    rest = _concatenate(frames)
    if loop:  # going round adds to the variance
        rest = rest * ((1 - correlation**num) / (1 + correlation**num)) ** 0.5
    return rest * (1 - shared) ** 0.5 + clip_noise * shared**0.5


def ar1_step(noise, previous, correlation: float):
    """Return the noise of the frame after `previous` (None: the first frame), of an autoregressive process
    of order 1."""
    return noise if previous is None else previous * correlation + noise * (1 - correlation**2) ** 0.5


def _concatenate(frames):
    if isinstance(frames[0], np.ndarray):
        return np.concatenate(frames, axis=1)
    import torch

    return torch.cat(frames, dim=1)
