"""Rules of the shift to compare, for `model.rule` (see docs/method.md)."""

from __future__ import annotations


def distances(num_channels: int) -> list[int]:
    """A third of the channels each way, from one, two and four frames away."""
    return _both_ways(num_channels, num_channels // 3, (1, 2, 4))


def near_and_far(num_channels: int) -> list[int]:
    """The same, from one and three frames away."""
    return _both_ways(num_channels, num_channels // 3, (1, 3))


def quarter_distances(num_channels: int) -> list[int]:
    """A quarter of the channels each way, from one, two and four frames away."""
    return _both_ways(num_channels, num_channels // 4, (1, 2, 4))


def eighth_distances(num_channels: int) -> list[int]:
    """An eighth of the channels each way, from one, two and four frames away."""
    return _both_ways(num_channels, num_channels // 8, (1, 2, 4))


def mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """A sixth of the channels from the previous frame, one from the next, and one the mean of seven frames."""
    return _with_mean(num_channels, num_channels // 6, num_channels // 6)


def much_mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """The same with a quarter each."""
    return _with_mean(num_channels, num_channels // 4, num_channels // 4)


def third_mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """The paper's thirds, but half of the channels that stay become the mean of seven frames."""
    return _with_mean(num_channels, num_channels // 3, num_channels // 6)


def eighth_mean(num_channels: int) -> list[int | tuple[int, ...]]:
    """An eighth each."""
    return _with_mean(num_channels, num_channels // 8, num_channels // 8)


def blend(num_channels: int) -> list[int | tuple[int, ...]]:
    """A third of the channels each way, as the mean of their own frame and its neighbour."""
    third = num_channels // 3
    return [(-1, 0)] * third + [0] * (num_channels - 2 * third) + [(0, 1)] * third


def blend_all(num_channels: int) -> list[int | tuple[int, ...]]:
    """The paper's thirds, and half of the channels that stay are the mean of three frames."""
    third, mean = num_channels // 3, num_channels // 6
    return [-1] * third + [0] * (num_channels - 2 * third - mean) + [(-1, 0, 1)] * mean + [1] * third


def _with_mean(num_channels: int, num_each_way: int, num_mean: int) -> list[int | tuple[int, ...]]:
    window = (-3, -2, -1, 0, 1, 2, 3)
    stays = num_channels - 2 * num_each_way - num_mean
    return [-1] * num_each_way + [0] * stays + [window] * num_mean + [1] * num_each_way


def _both_ways(num_channels: int, num_each_way: int, distances: tuple[int, ...]) -> list[int]:
    """Return offsets whose first `num_each_way` channels come from earlier frames and as many last ones from later frames, in
    equal parts from each distance."""
    far = [distances[channel * len(distances) // num_each_way] for channel in range(num_each_way)]
    stays = [0] * (num_channels - 2 * num_each_way)
    return [-distance for distance in reversed(far)] + stays + far
