"""The shift as an operation on tensors: a copy with its derivatives, an operator for `torch.compile`, and a concatenation.

Shapes: B clips, F frames, C channels.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Edge = Literal["zero", "wrap", "hold"]
Groups = tuple[tuple[int, int, tuple[int, ...]], ...]
"""First channel, end, and offsets in frames of every group of channels, which becomes the mean over its offsets."""


MAX_GROUPS = 16
"""More groups than these are gathered by their offsets, instead of copied one by one."""


def shift_clips(x_BFCHW: Tensor, groups: Groups, edge: Edge) -> Tensor:
    """Take every group of channels from the frames at its offsets, by what is fastest here."""
    if not torch.compiler.is_compiling():
        shifted = _CopyShifted.apply if torch.is_grad_enabled() else copy_shifted
    elif x_BFCHW.device.type != "cpu" or forward_ad._current_level >= 0:
        return concatenate_shifted(x_BFCHW, groups, edge)
    else:
        shifted = shift_op
    return shifted(x_BFCHW, flatten_groups(groups), edge, False)


def flatten_groups(groups: Groups) -> list[int]:
    """Return first channel, end, number of offsets and the offsets of every group, one after the other, for an operator."""
    return [number for start, stop, offsets in groups for number in (start, stop, len(offsets), *offsets)]


@functools.lru_cache(1024)
def _parse_groups(numbers: tuple[int, ...]) -> Groups:
    """Undo `flatten_groups`."""
    groups, rest = [], iter(numbers)
    for start in rest:
        stop, num = next(rest), next(rest)
        groups.append((start, stop, tuple(next(rest) for _ in range(num))))
    return tuple(groups)


@functools.lru_cache(1024)
def merge_groups(groups: Groups) -> tuple[list[int], Groups]:
    """Return an order of the channels in which those with the same offsets are neighbours, and the groups in that order."""
    channels: dict[tuple[int, ...], list[int]] = {}
    for start, stop, offsets in groups:
        channels.setdefault(offsets, []).extend(range(start, stop))
    merged, start = [], 0
    for offsets, members in channels.items():
        merged.append((start, start + len(members), offsets))
        start += len(members)
    return [channel for members in channels.values() for channel in members], tuple(merged)


def copy_shifted(x_BFCHW: Tensor, groups: list[int], edge: Edge, adjoint: bool) -> Tensor:
    """Shift by copies: a group of channels with one offset goes straight to its destination.

    Args:
        groups: see `flatten_groups`.
        adjoint: apply the adjoint instead: the shift in the opposite direction, plus the other uses of the end frames
            where the edge is held.
    """
    y_BFCHW = torch.empty_like(x_BFCHW)
    if len(groups) <= 4 * MAX_GROUPS:
        for start, stop, offsets in _parse_groups(tuple(groups)):
            _copy_mean(x_BFCHW[:, :, start:stop], y_BFCHW[:, :, start:stop], offsets, edge, adjoint)
        return y_BFCHW
    if x_BFCHW.is_contiguous() and all(len(offsets) == 1 for *_, offsets in _parse_groups(tuple(groups))):
        return _gather_planes(x_BFCHW, _parse_groups(tuple(groups)), edge, adjoint)
    order, merged = merge_groups(_parse_groups(tuple(groups)))
    order_C = torch.tensor(order, device=x_BFCHW.device)
    for start, stop, offsets in merged:
        if offsets == (0,):
            y_BFCHW.index_copy_(2, order_C[start:stop], x_BFCHW.index_select(2, order_C[start:stop]))
            continue
        x = x_BFCHW.index_select(2, order_C[start:stop])
        y = torch.empty_like(x)
        _copy_mean(x, y, offsets, edge, adjoint)
        y_BFCHW.index_copy_(2, order_C[start:stop], y)
    return y_BFCHW


def _gather_planes(x_BFCHW: Tensor, groups: Groups, edge: Edge, adjoint: bool) -> Tensor:
    """Shift scattered channels in one pass: every channel of a frame is one row of memory."""
    num_frames, num_channels = x_BFCHW.shape[1:3]
    sign = -1 if adjoint else 1
    offsets_C = torch.tensor([sign * offset for start, stop, (offset,) in groups for _ in range(start, stop)])
    source_FC = torch.arange(num_frames)[:, None] + offsets_C
    is_outside_FC = (source_FC < 0) | (source_FC >= num_frames)
    source_FC = source_FC % num_frames if edge == "wrap" else source_FC.clamp(0, num_frames - 1)
    rows = (source_FC * num_channels + torch.arange(num_channels)).flatten().to(x_BFCHW.device)
    y_BFCHW = x_BFCHW.flatten(1, 2).index_select(1, rows)
    if edge == "zero" or (edge == "hold" and adjoint):
        y_BFCHW.index_fill_(1, is_outside_FC.flatten().nonzero().flatten().to(x_BFCHW.device), 0)
    y_BFCHW = y_BFCHW.unflatten(1, (num_frames, num_channels))
    if edge == "hold" and adjoint:
        for offset in offsets_C.unique().tolist():
            if offset:  # the other uses of the end frames
                channels = (offsets_C == offset).nonzero().flatten().to(x_BFCHW.device)
                num = min(abs(offset), num_frames)
                dropped = x_BFCHW[:, :num] if offset > 0 else x_BFCHW[:, -num:]
                end = y_BFCHW[:, 0 if offset > 0 else -1]
                end.index_add_(1, channels, dropped.index_select(2, channels).sum(dim=1))
    return y_BFCHW


def _copy_mean(x_BFCHW: Tensor, y_BFCHW: Tensor, offsets: tuple[int, ...], edge: Edge, adjoint: bool) -> None:
    """Write the mean of the frames at some offsets, or the adjoint of that, into `y_BFCHW`."""
    _copy_frames(x_BFCHW, y_BFCHW, offsets[0], edge, adjoint)
    if len(offsets) > 1:
        term = torch.empty_like(x_BFCHW)
        for offset in offsets[1:]:
            _copy_frames(x_BFCHW, term, offset, edge, adjoint)
            y_BFCHW += term
        y_BFCHW /= len(offsets)


def _copy_frames(x_BFCHW: Tensor, y_BFCHW: Tensor, offset: int, edge: Edge, adjoint: bool) -> None:
    """Write the frames at an offset, or the adjoint of that, into `y_BFCHW`."""
    num = _num_filled(offset, x_BFCHW.shape[1], edge)
    if num == 0:
        y_BFCHW.copy_(x_BFCHW)
        return
    from_previous = (offset < 0) != adjoint
    begin, end = slice(num), slice(-num, None)
    kept, filled = (slice(num, None), begin) if from_previous else (slice(-num), end)
    source, dropped = (slice(-num), end) if from_previous else (slice(num, None), begin)
    y_BFCHW[:, kept] = x_BFCHW[:, source]
    if edge == "wrap":
        y_BFCHW[:, filled] = x_BFCHW[:, dropped]
    elif edge == "zero" or adjoint:
        y_BFCHW[:, filled] = 0
    else:
        y_BFCHW[:, filled] = x_BFCHW[:, :1] if from_previous else x_BFCHW[:, -1:]
    if edge == "hold" and adjoint:
        y_BFCHW[:, -1 if from_previous else 0] += x_BFCHW[:, dropped].sum(dim=1)


class _CopyShifted(torch.autograd.Function):
    """`copy_shifted` with its derivatives. The shift is linear: its tangent is the shift, its gradient the
    adjoint."""

    @staticmethod
    def forward(x_BFCHW: Tensor, groups: list[int], edge: Edge, adjoint: bool) -> Tensor:  # type: ignore[override]
        return copy_shifted(x_BFCHW, groups, edge, adjoint)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.settings = inputs[1:]

    @staticmethod
    def backward(ctx, grad_BFCHW: Tensor):  # type: ignore[override]
        *settings, adjoint = ctx.settings
        return _CopyShifted.apply(grad_BFCHW, *settings, not adjoint), None, None, None

    @staticmethod
    def jvp(ctx, tangent_BFCHW: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return _CopyShifted.apply(tangent_BFCHW, *ctx.settings)

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor, *settings) -> tuple[Tensor, int]:  # type: ignore[override]
        x_VBFCHW = x.movedim(in_dims[0], 0)
        y_BFCHW = _CopyShifted.apply(x_VBFCHW.flatten(0, 1), *settings)
        return y_BFCHW.unflatten(0, x_VBFCHW.shape[:2]), 0


# For torch.compile on a CPU: one opaque operator, whose copies the compiler does not turn into slower loops.
shift_op = torch.library.custom_op(
    "latent_shift::shift",
    copy_shifted,
    mutates_args=(),
    schema="(Tensor x, int[] groups, str edge, bool adjoint) -> Tensor",
)


def _op_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.settings = inputs[1:]


def _op_backward(ctx, grad_BFCHW: Tensor):
    *settings, adjoint = ctx.settings
    return shift_op(grad_BFCHW, *settings, not adjoint), None, None, None


shift_op.register_fake(lambda x_BFCHW, *_: torch.empty_like(x_BFCHW))
shift_op.register_autograd(_op_backward, setup_context=_op_context)


def concatenate_shifted(x_BFCHW: Tensor, groups: Groups, edge: Edge) -> Tensor:
    """Shift by concatenation: for forward-mode derivatives in a compiled function, and for compilers that fuse it
    into the previous operation. (On a CPU the compiled loops are not vectorised, which makes a step 9 % slower.)"""
    if len(groups) > MAX_GROUPS:
        order, merged = merge_groups(groups)
        order_C = torch.tensor(order, device=x_BFCHW.device)
        return concatenate_shifted(x_BFCHW.index_select(2, order_C), merged, edge).index_select(
            2, order_C.argsort()
        )
    shifted = []
    for start, stop, offsets in groups:
        group = x_BFCHW[:, :, start:stop]
        first, *others = (_frames_at(group, offset, edge) for offset in offsets)
        shifted.append(sum(others, first) / len(offsets) if others else first)
    return torch.cat(shifted, dim=2)


def _frames_at(x_BFCHW: Tensor, offset: int, edge: Edge) -> Tensor:
    num_frames = x_BFCHW.shape[1]
    num = _num_filled(offset, num_frames, edge)
    if num == 0:
        return x_BFCHW
    kept = x_BFCHW[:, : num_frames - num] if offset < 0 else x_BFCHW[:, num:]
    if edge == "wrap":
        fill = x_BFCHW[:, num_frames - num :] if offset < 0 else x_BFCHW[:, :num]
    else:
        fill = (x_BFCHW[:, :1] if offset < 0 else x_BFCHW[:, -1:]).expand(-1, num, *x_BFCHW.shape[2:])
        fill = torch.zeros_like(fill) if edge == "zero" else fill
    return torch.cat([fill, kept] if offset < 0 else [kept, fill], dim=1)


def _num_filled(offset: int, num_frames: int, edge: Edge) -> int:
    """Return how many frames at one end of a clip have no source frame in it."""
    return abs(offset) % num_frames if edge == "wrap" else min(abs(offset), num_frames)
