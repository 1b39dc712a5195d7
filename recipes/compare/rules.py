"""Rules of the shift to compare, for `model.rule` (see docs/method.md)."""

from __future__ import annotations

from latent_shift.rules import shares


def distances(num_channels: int) -> list[int]:
    """A third of the channels each way, from one, two and four frames away."""
    third = num_channels // 3
    far = [(1, 2, 4)[channel * 3 // third] for channel in range(third)]
    return [-distance for distance in reversed(far)] + [0] * (num_channels - 2 * third) + far


def third_mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """The paper's thirds, but half of the channels that stay become the mean of seven frames."""
    return shares(num_channels, num_channels // 3, num_channels // 6)


def quarter_mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """A quarter of the channels from the previous frame, from the next, and from the mean of seven frames."""
    return shares(num_channels, num_channels // 4, num_channels // 4)


def eighth_mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """An eighth of the channels from the previous frame, from the next, and from the mean of seven frames."""
    return shares(num_channels, num_channels // 8, num_channels // 8)


def blend(num_channels: int) -> list[int | tuple[int, ...]]:
    """A third of the channels each way, as the mean of their own frame and its neighbour."""
    third = num_channels // 3
    return [(-1, 0)] * third + [0] * (num_channels - 2 * third) + [(0, 1)] * third


def near_and_far(num_channels: int) -> list[int | tuple[int, ...]]:
    """An eighth of the channels from the previous frame, an eighth from the next, an eighth the mean of seven frames, and one channel
    in 32 from each of two, four and eight frames before and after.

    With `edge="zero"` the far channels are zero near the ends of a clip, so frames can tell where they are in it. Meant for
    `place="both"` and `model.channels = "cheapest"`, as `neighbors_and_mean`.
    """
    eighth, few = num_channels // 8, num_channels // 32
    far = [offset for distance in (8, 4, 2) for offset in [distance] * few]
    near = shares(num_channels - 2 * len(far), eighth, eighth)
    return [*(-offset for offset in far), *near, *reversed(far)]
