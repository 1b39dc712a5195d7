"""The shift as an operation on tensors: a copy with its derivatives, an operator for `torch.compile`, and a concatenation.

Shapes: B clips, F frames, C channels.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from latent_shift.shift_settings import Edge, Groups

MAX_GROUPS = 16
"""More groups than these are brought into an order with fewer, before they are copied one by one."""


def shift_clips(x_BFCHW: Tensor, groups: Groups, edge: Edge) -> Tensor:
    """Take every group of channels from the frames at its offsets, by what is fastest here."""
    if not torch.compiler.is_compiling():
        shifted = _CopyShifted.apply if torch.is_grad_enabled() else copy_shifted
        return shifted(x_BFCHW, groups, edge, False)
    if x_BFCHW.device.type != "cpu" or forward_ad._current_level >= 0:
        return concatenate_shifted(x_BFCHW, groups, edge)
    return shift_op(x_BFCHW, flatten_groups(groups), edge, False)


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


def _merge_order(groups: Groups, device: torch.device) -> tuple[Tensor, Tensor, Groups]:
    """Return the order of `merge_groups` and its inverse `(C,)`, and the groups in that order."""
    order, merged = merge_groups(groups)
    order_C = torch.tensor(order, device=device)
    return order_C, order_C.argsort(), merged


def copy_shifted(x_BFCHW: Tensor, groups: Groups, edge: Edge, adjoint: bool) -> Tensor:
    """Shift by copies, each channel of a frame from its source.

    Args:
        adjoint: apply the adjoint instead: the shift in the opposite direction, plus the other uses of the end frames
            where the edge is held.
    """
    if x_BFCHW.numel() == 0:
        return torch.empty_like(x_BFCHW)
    if not x_BFCHW.is_floating_point() and any(len(offsets) > 1 for *_, offsets in groups):
        raise ValueError(f"means over frames need floating-point numbers, got {x_BFCHW.dtype}")
    is_fake = (
        type(x_BFCHW) is not Tensor
    )  # as memory is estimated with: it reads no real tables, and must not leave its own
    if x_BFCHW.is_contiguous() and not is_fake:
        settings = (*x_BFCHW.shape[:2], edge, adjoint, x_BFCHW.device)
        return _gather_rows(x_BFCHW, _table(_Rows.of, groups, *settings))
    x_BFHWC, y_BFCHW, merged = x_BFCHW.movedim(2, -1), torch.empty_like(x_BFCHW), groups
    y_BFHWC, order_C = y_BFCHW.movedim(2, -1), None
    if len(merged) > MAX_GROUPS:
        settings = groups, x_BFCHW.device
        order_C, _, merged = _merge_order(*settings) if is_fake else _table(_merge_order, *settings)
        x_BFHWC, y_BFHWC = x_BFHWC.index_select(-1, order_C), torch.empty_like(x_BFHWC)
    for start, stop, offsets in merged:
        _copy_mean(x_BFHWC[..., start:stop], y_BFHWC[..., start:stop], offsets, edge, adjoint)
    if order_C is not None:
        y_BFCHW.movedim(2, -1).index_copy_(-1, order_C, y_BFHWC)
    return y_BFCHW


@dataclass(frozen=True, eq=False)
class _Rows:
    """The shift as a gather of rows: row (b * F + f) * C + c is channel c of frame f of clip b.

    Attributes:
        first: a source for each row `(B*F*C,)`.
        empty: rows without a source, which become zero; None: there are none.
        more: further sources to add, as (rows, their sources); no row comes twice in one of them.
        means: channels that are means over frames, as rows in the order of clips, frames and channels, and a matrix `(F, F)`
            from the frames to their means.
    """

    first: Tensor
    empty: Tensor | None
    more: tuple[tuple[Tensor, Tensor], ...]
    means: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(
        cls, groups: Groups, num_clips: int, num_frames: int, edge: Edge, adjoint: bool, device: torch.device
    ) -> _Rows:
        num_channels = groups[-1][1]
        frame_F = np.arange(num_frames)

        def pairs(offset: int) -> tuple[np.ndarray, np.ndarray]:
            """Return frames and their sources at an offset."""
            from_F = frame_F + offset
            exists_F = (from_F >= 0) & (from_F < num_frames)
            if edge == "zero":
                return frame_F[exists_F], from_F[exists_F]
            return frame_F, from_F % num_frames if edge == "wrap" else from_F.clip(0, num_frames - 1)

        def in_all_clips(rows: np.ndarray) -> Tensor:
            clips = np.arange(num_clips)[:, None] * (num_frames * num_channels)
            return torch.from_numpy((clips + rows.ravel()).ravel()).to(device)

        to, source = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        means: dict[tuple[int, ...], list[np.ndarray]] = {}
        for start, stop, offsets in groups:
            channels = np.arange(start, stop)
            if len(offsets) > 1:
                means.setdefault(offsets, []).append(channels)
                offsets = (0,)  # any source: the means are written over it
            to_F, from_F = pairs(offsets[0])
            to.append((to_F[:, None] * num_channels + channels).ravel())
            source.append((from_F[:, None] * num_channels + channels).ravel())
        to_E, source_E = np.concatenate(to), np.concatenate(source)
        if adjoint:
            to_E, source_E = source_E, to_E
        # The first source of every row, then the second, and so on.
        order = np.argsort(to_E, kind="stable")
        to_E, source_E = to_E[order], source_E[order]
        number_E = np.arange(len(to_E)) - np.searchsorted(to_E, to_E)
        first, has_source = (
            np.zeros(num_frames * num_channels, np.int64),
            np.zeros(num_frames * num_channels, bool),
        )
        first[to_E[number_E == 0]], has_source[to_E[number_E == 0]] = source_E[number_E == 0], True
        more = [number_E == number for number in range(1, number_E.max(initial=0) + 1)]
        mixed = []
        for offsets, members in means.items():
            matrix_FF = np.zeros((num_frames, num_frames), np.float32 if device.type == "mps" else np.float64)
            for offset in offsets:
                np.add.at(matrix_FF, pairs(offset), 1 / len(offsets))
            rows = frame_F[:, None] * num_channels + np.concatenate(members)
            mixed.append(
                (in_all_clips(rows), torch.from_numpy(matrix_FF.T if adjoint else matrix_FF).to(device))
            )
        return cls(
            in_all_clips(first),
            None if has_source.all() else in_all_clips(np.flatnonzero(~has_source)),
            tuple((in_all_clips(to_E[chosen]), in_all_clips(source_E[chosen])) for chosen in more),
            tuple(mixed),
        )


def _gather_rows(x_BFCHW: Tensor, rows: _Rows) -> Tensor:
    x_RHW = x_BFCHW.flatten(0, 2)
    y_RHW = x_RHW.index_select(0, rows.first)
    if rows.empty is not None:
        y_RHW.index_fill_(0, rows.empty, 0)
    for to, sources in rows.more:
        y_RHW.index_add_(0, to, x_RHW.index_select(0, sources))
    for mixed, matrix_FF in rows.means:
        x_BFM = x_RHW.index_select(0, mixed).view(*x_BFCHW.shape[:2], -1)
        with _without_autocast(x_BFCHW.device.type):  # in the precision of the other channels
            mean_BFM = torch.matmul(matrix_FF.to(x_BFM.dtype), x_BFM)
        y_RHW.index_copy_(0, mixed, mean_BFM.view(-1, *x_RHW.shape[1:]))
    return y_RHW.unflatten(0, x_BFCHW.shape[:3])


def _without_autocast(device_type: str) -> AbstractContextManager:
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


_tables: OrderedDict[tuple, Any] = OrderedDict()
_MAX_TABLES = 1024
_lock = threading.Lock()
_collector = threading.local()


def _table(make: Callable[..., Any], groups: Groups, *settings: Any) -> Any:
    """Return the index tensors of a shift, made once for the groups of a layer and other settings."""
    key = (make, id(groups), *settings)  # to hash the groups would take as long as to shift a small layer
    with _lock:
        entry = _tables.get(key)
        if entry is None:
            entry = _tables[key] = make(groups, *settings), groups  # which keeps their id
            while len(_tables) > _MAX_TABLES:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
    if (tables := getattr(_collector, "tables", None)) is not None:
        tables.append(entry)
    return entry[0]


@contextmanager
def collect_tables() -> Iterator[list[Any]]:
    """Collect the index tensors that this thread's shifts read: what a CUDA graph of them has to keep alive."""
    _collector.tables = []
    try:
        yield _collector.tables
    finally:
        _collector.tables = None


def channel_offsets(groups: Groups, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the offsets in frames of each channel `(C, K)`, and how many of them count `(C,)`, as int32."""
    return _table(_channel_offsets, groups, device)


def _channel_offsets(groups: Groups, device: torch.device) -> tuple[Tensor, Tensor]:
    offsets_C = [offsets for start, stop, offsets in groups for _ in range(start, stop)]
    counts_C = [len(offsets) for offsets in offsets_C]
    padded_CK = [[*offsets, *[0] * (max(counts_C) - len(offsets))] for offsets in offsets_C]
    sources_CK, counts = (
        torch.tensor(each, dtype=torch.int32, device=device) for each in (padded_CK, counts_C)
    )
    return sources_CK, counts


def _copy_mean(x_BF: Tensor, y_BF: Tensor, offsets: tuple[int, ...], edge: Edge, adjoint: bool) -> None:
    """Write the mean of the frames at some offsets, or the adjoint of that, into `y_BF`."""
    if len(offsets) == 1:
        _copy_frames(x_BF, y_BF, offsets[0], edge, adjoint)
        return
    x_BF = x_BF / len(offsets)  # before the sum, which half precision may not hold
    _copy_frames(x_BF, y_BF, offsets[0], edge, adjoint)
    term = torch.empty_like(x_BF)
    for offset in offsets[1:]:
        _copy_frames(x_BF, term, offset, edge, adjoint)
        y_BF += term


def _copy_frames(x_BF: Tensor, y_BF: Tensor, offset: int, edge: Edge, adjoint: bool) -> None:
    """Write the frames at an offset, or the adjoint of that, into `y_BF`."""
    num = _num_filled(offset, x_BF.shape[1], edge)
    if num == 0:
        y_BF.copy_(x_BF)
        return
    from_previous = (offset < 0) != adjoint
    begin, end = slice(num), slice(-num, None)
    kept, filled = (slice(num, None), begin) if from_previous else (slice(-num), end)
    source, dropped = (slice(-num), end) if from_previous else (slice(num, None), begin)
    y_BF[:, kept] = x_BF[:, source]
    if edge == "wrap":
        y_BF[:, filled] = x_BF[:, dropped]
    elif edge == "zero" or adjoint:
        y_BF[:, filled] = 0
    else:
        y_BF[:, filled] = x_BF[:, :1] if from_previous else x_BF[:, -1:]
    if edge == "hold" and adjoint:
        y_BF[:, -1 if from_previous else 0] += x_BF[:, dropped].sum(dim=1)


class _CopyShifted(torch.autograd.Function):
    """`copy_shifted` with its derivatives. The shift is linear: its tangent is the shift, its gradient the
    adjoint."""

    @staticmethod
    def forward(x_BFCHW: Tensor, groups: Groups, edge: Edge, adjoint: bool) -> Tensor:  # type: ignore[override]
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
    lambda x, groups, edge, adjoint: copy_shifted(x, _parse_groups(tuple(groups)), edge, adjoint),
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
        order_C, inverse_C, merged = _merge_order(groups, x_BFCHW.device)
        return concatenate_shifted(x_BFCHW.index_select(2, order_C), merged, edge).index_select(2, inverse_C)
    shifted = []
    for start, stop, offsets in groups:
        group = x_BFCHW[:, :, start:stop]
        shifted.append(mean_of([_frames_at(group, offset, edge) for offset in offsets]))
    return torch.cat(shifted, dim=2)


def gather_shifted(x_NCHW: Tensor, previous_N: Tensor, next_N: Tensor, groups: Groups, edge: Edge) -> Tensor:
    """Shift images `(N, C, ...)` by the indices of their neighbours, see `shift.neighbors`."""
    if len(groups) > MAX_GROUPS:
        order_C, inverse_C, merged = _merge_order(groups, x_NCHW.device)
        return gather_shifted(x_NCHW[:, order_C], previous_N, next_N, merged, edge)[:, inverse_C]
    num, shifted = x_NCHW.shape[0], []
    if edge == "zero":  # index N is a frame of zeros, and its own neighbour
        x_NCHW = torch.cat([x_NCHW, torch.zeros_like(x_NCHW[:1])])
        previous_N, next_N = (
            torch.cat([each, torch.full_like(each[:1], num)]) for each in (previous_N, next_N)
        )
    for start, stop, offsets in groups:
        group, frames_at = x_NCHW[:, start:stop], []
        for offset in offsets:
            neighbor_N = source_N = previous_N if offset < 0 else next_N
            for _ in range(abs(offset) - 1):
                source_N = neighbor_N[source_N]
            frames_at.append(group[source_N[:num]] if offset else group[:num])
        shifted.append(mean_of(frames_at))
    return torch.cat(shifted, dim=1)


def mean_of(terms: list[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape; each is divided before the sum, which half precision may not hold."""
    if len(terms) == 1:
        return terms[0]
    first, *others = (term / len(terms) for term in terms)
    return sum(others, first)


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
