"""Settings of the shift: which channels are taken from which frames, where, and what fills the ends of a clip."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from numbers import Real
from typing import Any, Literal, get_args

Edge = Literal["zero", "wrap", "hold"]
Place = Literal["conv1", "conv2", "both", "end", "kv", "attn", "ffn"]
Rule = Callable[[int], Sequence[int | Sequence[int]]]
Runs = tuple[tuple[int, tuple[int, ...]], ...]  # numbers of channels and their offsets
Table = tuple[tuple[str, Runs], ...]  # by the name of a layer
Groups = tuple[tuple[int, int, tuple[int, ...]], ...]
"""First channel, end, and offsets in frames of every group of channels, which becomes the mean over its offsets."""


@functools.lru_cache(4096)
def intern_groups(groups: Groups) -> Groups:
    """Return one object for equal groups, whose tables are then shared."""
    return groups


@dataclass(frozen=True)
class Shift:
    """Settings of the temporal shift.

    Args:
        forward: fraction of the channels taken from the previous frame, in [0, 1]. The paper's figure shows
            1/3, TSM uses 1/8.
        backward: fraction taken from the next frame. 0 makes the network causal.
        place: where a ResNet block is shifted. "conv1" shifts the input of its first convolution (as TSM
            does), "conv2" that of its second, "both" both, "end" the output of the residual branch. The paper's text
            and figure differ. Where a transformer block is shifted: "kv" shifts the tokens from which its
            self-attention takes keys and values, "attn" (for which the default "conv1" stands) also those of the queries,
            "ffn" the hidden channels of the feed-forward layer (before its convolution where it has one; where it stands
            beside attention, the tokens that both read), "both" those of "attn" and of "ffn"; always the tokens of the image alone.
        edge: fill for the vacated channels of the first and last frame: "zero" (the paper), "wrap" (values
            from the other end of the clip; the network then commutes with rotating the frames, so clips
            loop) or "hold" (the values of the first or last frame).
        rule: a custom shift instead of the two fractions: a function from the number of channels C to C whole
            numbers, the frame that each channel is taken from, relative to its own: -1 is the previous frame, 2
            the one after the next; a tuple of numbers takes the mean of those frames. Or these numbers for each layer,
            as `((name, ((num_channels, offsets), ...)), ...)`: an inflated network holds and saves its rule so. The
            names are those of norms or convolutions in a U-Net, and of attention or feed-forward layers where tokens
            are shifted.

    Raises:
        ValueError: fractions that are negative or sum to more than 1, an unknown place or edge, a rule beside
            fractions, or one that is neither a function nor such a table.
    """

    forward: float = 1 / 3
    backward: float = 1 / 3
    place: Place = "conv1"
    edge: Edge = "zero"
    rule: Rule | Table | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            object.__setattr__(self, name, _checked_fraction(name, getattr(self, name)))
        if self.rule is not None and (self.forward, self.backward) != (1 / 3, 1 / 3):
            raise ValueError("forward and backward have no effect beside a rule: leave them out")
        if self.rule is not None and not callable(self.rule):  # JSON has lists for tuples
            object.__setattr__(self, "rule", _checked_table(self.rule))
        if not (self.forward >= 0 and self.backward >= 0 and self.forward + self.backward <= 1 + 1e-9):
            raise ValueError(
                f"forward and backward are fractions of the channels: expected both at least 0 and their sum at most 1, "
                f"got forward={self.forward}, backward={self.backward}"
            )
        for name, choices in (("place", get_args(Place)), ("edge", get_args(Edge))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )

    def groups(self, num_channels: int, layer: str = "") -> Groups:
        """Return the groups of channels as (first channel, end, offsets), where offsets are the frames they are taken
        from, relative to their own.

        Fractions are rounded down (the widths of Stable Diffusion do not divide by 3; the paper does not say how
        it rounds).

        Args:
            num_channels: C.
            layer: name of the layer, for a rule that is a table.

        Raises:
            ValueError: the rule gives anything but C offsets, or a table lacks this layer.
        """
        if self.rule is None:
            ahead, back = int(num_channels * self.forward + 1e-6), int(num_channels * self.backward + 1e-6)
            runs: Runs = ((ahead, (-1,)), (num_channels - ahead - back, (0,)), (back, (1,)))
        elif callable(self.rule):
            given = _plain(self.rule(num_channels))
            if not isinstance(given, Iterable) or isinstance(given, (Mapping, Set)):
                raise ValueError(
                    f"the rule of the shift: expected one offset for each channel, got {given!r}"
                )
            runs = tuple((len(list(run)), each) for each, run in groupby(map(_checked_offsets, given)))
        elif layer in (table := dict(self.rule)):
            runs = table[layer]
        else:
            raise ValueError(
                f"the rule of the shift is that of a network with other layers: it has none of the name {layer!r}"
            )
        if (num := sum(num for num, _ in runs)) != num_channels:
            raise ValueError(
                f"the rule of the shift has {num} offset{'s' * (num != 1)} for {num_channels} channels"
                f"{' of ' + layer if layer else ''}; expected one for each"
            )
        groups, start = [], 0
        for num, each in runs:
            groups += [(start, start + num, each)] if num else []
            start += num
        return intern_groups(tuple(groups))

    @property
    def is_causal(self) -> bool:
        """Whether no channel comes from a later frame.

        Raises:
            ValueError: a rule that is a function, whose offsets are known once a network is inflated with it.
        """
        if self.rule is None:
            return self.backward == 0
        if callable(self.rule):
            raise ValueError("expected the settings of an inflated network, shift_of(network)")
        return all(max(offsets) <= 0 for _, runs in self.rule for _, offsets in runs)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments of these settings, for JSON; a rule only where there is one."""
        settings = asdict(self)
        if self.rule is None:
            del settings["rule"]
        return settings

    def resolved(self, widths: dict[str, int]) -> Shift:
        """Return the settings with the rule's numbers for layers of these names and widths instead of the rule.

        Raises:
            ValueError: as `groups`.
        """
        if not callable(self.rule):
            if self.rule is not None and (others := {name for name, _ in self.rule} - set(widths)):
                raise ValueError(
                    f"the rule of the shift is that of other layers or of another place: {min(others)!r} is not shifted here"
                )
            return self
        table = tuple(
            (name, tuple((stop - start, offsets) for start, stop, offsets in self.groups(width)))
            for name, width in widths.items()
        )
        return replace(self, rule=table)

    def with_rule(self, rule: Rule | Table) -> Shift:
        """Return the settings with this rule instead of the fractions or of another rule."""
        return Shift(place=self.place, edge=self.edge, rule=rule)


_MAX_OFFSET = 1000
"""As far as a model folder may say."""


def _plain(value: Any) -> Any:
    """Return the numbers of an array or a tensor."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_whole(given: Any) -> bool:
    """Return whether something is a whole number, of Python, NumPy or PyTorch, and no flag."""
    number = _plain(given)
    return isinstance(number, int) and not isinstance(number, bool)


def _checked_fraction(name: str, given: Any) -> float:
    """Return a fraction as a Python number, which JSON takes; raise ValueError for anything else."""
    fraction = _plain(given)
    if isinstance(fraction, bool) or not isinstance(fraction, Real):
        raise ValueError(f"expected {name} as a number, got {given!r}")
    return float(fraction)


def _checked_offsets(each: Any) -> tuple[int, ...]:
    """Return the offsets of a channel as a tuple; raise ValueError for anything but whole numbers."""
    each = _plain(each)
    numbers = tuple(map(_plain, each)) if isinstance(each, (tuple, list)) else (each,)
    if (
        not numbers
        or not all(map(is_whole, numbers))
        or max(abs(int(number)) for number in numbers) > _MAX_OFFSET
    ):
        raise ValueError(
            f"the rule of the shift: expected whole numbers from -{_MAX_OFFSET} to {_MAX_OFFSET}, or tuples of them, got {each!r}"
        )
    return tuple(map(int, numbers))


def _checked_table(rule: Any) -> Table:
    """Return a rule's numbers for each layer as tuples; raise ValueError for anything else."""
    if isinstance(rule, str):
        raise ValueError(f"expected rule as a function, got {rule!r}; recipes alone take a name")
    try:
        table = tuple(
            (
                str(name),
                tuple((operator.index(num), _checked_offsets(tuple(offsets))) for num, offsets in runs),
            )
            for name, runs in rule
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected rule as a function or a table, see Shift: {error}") from error
    if len(dict(table)) < len(table) or any(num < 1 for _, runs in table for num, _ in runs):
        raise ValueError(
            "the rule of the shift: expected each layer once, and one channel or more in each run"
        )
    return table
