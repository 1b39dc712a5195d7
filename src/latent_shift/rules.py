"""Rules of the shift by name, for `Shift(rule=...)` and `model.rule` (docs/method.md)."""

from __future__ import annotations


def neighbors_and_mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """A sixth of the channels from the previous frame, a sixth from the next, and a sixth the mean of seven frames.

    Meant for `place="both"` and the channels that cost the image least (`model.channels = "cheapest"`).
    """
    sixth = num_channels // 6
    stays = num_channels - 3 * sixth
    return [*[-1] * sixth, *[0] * stays, *[(-3, -2, -1, 0, 1, 2, 3)] * sixth, *[1] * sixth]
