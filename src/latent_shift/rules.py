"""Rules of the shift by name, for `Shift(rule=...)` and `model.rule` (docs/method.md)."""

from __future__ import annotations


def neighbors_and_mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """A sixth of the channels from the previous frame, a sixth from the next, and a sixth the mean of seven frames.

    Meant for `place="both"` and the channels that cost the image least (`model.channels = "cheapest"`).
    """
    return shares(num_channels, num_channels // 6, num_channels // 6)


def shares(num_channels: int, num_each_way: int, num_mean: int) -> list[int | tuple[int, ...]]:
    """So many channels from the previous frame, as many from the next, so many the mean of seven frames; the others stay."""
    window = (-3, -2, -1, 0, 1, 2, 3)
    stays = num_channels - 2 * num_each_way - num_mean
    return [*[-1] * num_each_way, *[0] * stays, *[window] * num_mean, *[1] * num_each_way]
