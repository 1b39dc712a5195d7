"""The method: a parameter-free shift of feature channels along time, in the residual branch of every 2D
ResNet block.

Latent-Shift (An et al. 2023, arXiv 2304.08477) turns a text-to-image U-Net into a text-to-video U-Net with
one operation: among the C channels of frame i, the first group is taken from frame i-1, the last group from
frame i+1, and the rest stay. A 2D convolution after the shift sees three frames: it equals the 3D
convolution whose temporal kernel is a fixed mask.

    unet = UNet2DConditionModel.from_pretrained("any/stable-diffusion", subfolder="unet")
    inflate(unet, Shift())                      # in place, no new weights, same state_dict; deflate(unet)
    undoes it with frames(unet, 16):
        epsilon = unet(noisy, t, text).sample   # (B*16, 4, H, W), the frames of a clip side by side

Shapes: B clips, F frames, C channels, N = B*F; the frames of a clip are adjacent in a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd import forward_ad

Place = Literal["conv1", "conv2", "end"]
Edge = Literal["zero", "wrap", "hold"]


@dataclass(frozen=True)
class Shift:
    """Settings of the temporal shift.

    Args:
        forward: fraction of the channels taken from the previous frame, in [0, 1]. The paper's figure shows
            1/3, TSM uses 1/8.
        backward: fraction taken from the next frame. 0 makes the network causal.
        place: where a ResNet block is shifted. "conv1" shifts the input of its first convolution (as TSM
            does), "conv2" the input of its second, "end" the output of the residual branch. The paper's text
            and figure differ.
        edge: fill for the vacated channels of the first and last frame: "zero" (the paper), "wrap" (values
            from the other end of the clip; the network then commutes with rotating the frames, so clips
            loop) or "hold" (the frame's own values).

    Raises:
        ValueError: fractions that are negative or sum to more than 1, an unknown place or edge.
    """

    forward: float = 1 / 3
    backward: float = 1 / 3
    place: Place = "conv1"
    edge: Edge = "zero"

    def __post_init__(self) -> None:
        if self.forward < 0 or self.backward < 0 or self.forward + self.backward > 1 + 1e-9:
            raise ValueError(
                f"forward and backward are fractions of the channels: expected both at least 0 and their sum at most 1, "
                f"got forward={self.forward}, backward={self.backward}"
            )
        for name, choices in (("place", get_args(Place)), ("edge", get_args(Edge))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )

    def channels(self, num_channels: int) -> tuple[int, int]:
        """Return how many of `num_channels` are taken from the previous and from the next frame, rounded
        down (the widths of Stable Diffusion do not divide by 3; the paper does not say how it rounds)."""
        return int(num_channels * self.forward + 1e-6), int(num_channels * self.backward + 1e-6)


def temporal_shift(x_NCHW: Tensor, num_frames: int, shift: Shift = Shift()) -> Tensor:
    """Shift channels along time.

    Differentiable in reverse and forward mode, and under `torch.func`.

    Args:
        x_NCHW: `(B*F, C, ...)`, the frames of a clip adjacent.
        num_frames: F. A single frame has no neighbours and is returned unchanged.
        shift: fractions and edge; `place` has no effect here.

    Returns:
        The shifted tensor, with the shape and memory format of `x_NCHW`.

    Raises:
        ValueError: `num_frames` does not divide the batch.
    """
    if num_frames == 1:
        return x_NCHW
    if num_frames < 1 or x_NCHW.shape[0] % num_frames:
        batch = x_NCHW.shape[0]
        nearest = min((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: abs(n - num_frames))
        raise ValueError(
            f"num_frames={num_frames} does not divide the batch of {batch} frames; pass num_frames={nearest}"
        )
    ahead, back = shift.channels(x_NCHW.shape[1])
    x_BFCHW = x_NCHW.unflatten(0, (-1, num_frames))
    if not torch.compiler.is_compiling():
        shifted = _CopyShifted.apply if torch.is_grad_enabled() else _copy_shifted
    elif x_NCHW.device.type != "cpu" or forward_ad._current_level >= 0:
        return _concatenate_shifted(x_BFCHW, ahead, back, shift.edge).flatten(0, 1)
    else:
        shifted = _shift_op
    return shifted(x_BFCHW, ahead, back, shift.edge, False).flatten(0, 1)


def _concatenate_shifted(x_BFCHW: Tensor, ahead: int, back: int, edge: Edge) -> Tensor:
    """Shift by concatenation: for forward-mode derivatives in a compiled function, and for compilers that fuse it
    into the previous operation. (On a CPU the compiled loops are not vectorised, which
    makes a step 9 % slower.)"""
    from_previous, stays, from_next = x_BFCHW.split([ahead, x_BFCHW.shape[2] - ahead - back, back], dim=2)
    first, last = from_previous[:, :1], from_next[:, -1:]
    if edge == "zero":
        first, last = torch.zeros_like(first), torch.zeros_like(last)
    elif edge == "wrap":
        first, last = from_previous[:, -1:], from_next[:, :1]
    from_previous = torch.cat([first, from_previous[:, :-1]], dim=1)
    from_next = torch.cat([from_next[:, 1:], last], dim=1)
    return torch.cat([from_previous, stays, from_next], dim=2)


def _gather_shifted(x_NCHW: Tensor, previous_N: Tensor, next_N: Tensor, shift: Shift) -> Tensor:
    """Shift by the indices of neighbours, see `neighbors`."""
    ahead, back = shift.channels(x_NCHW.shape[1])
    from_previous, stays, from_next = x_NCHW.split([ahead, x_NCHW.shape[1] - ahead - back, back], dim=1)
    if shift.edge == "zero":  # index N is a frame of zeros
        from_previous = torch.cat([from_previous, torch.zeros_like(from_previous[:1])])
        from_next = torch.cat([from_next, torch.zeros_like(from_next[:1])])
    return torch.cat([from_previous[previous_N], stays, from_next[next_N]], dim=1)


def _copy_shifted(x_BFCHW: Tensor, ahead: int, back: int, edge: Edge, adjoint: bool) -> Tensor:
    """Shift in one pass over memory: copy every group of channels straight to its destination. The adjoint
    is the shift in the opposite direction, plus the second use of the end frames where the edge is held."""
    y_BFCHW = torch.empty_like(x_BFCHW)
    num_channels = x_BFCHW.shape[2]
    previous, stays, following = (
        slice(0, ahead),
        slice(ahead, num_channels - back),
        slice(num_channels - back, num_channels),
    )
    if adjoint:
        previous, following = following, previous
    y_BFCHW[:, 1:, previous] = x_BFCHW[:, :-1, previous]
    y_BFCHW[:, :-1, following] = x_BFCHW[:, 1:, following]
    y_BFCHW[:, :, stays] = x_BFCHW[:, :, stays]
    fill_first, fill_last = (0, -1) if edge == "hold" else (-1, 0)
    fill_zero = edge == "zero" or (edge == "hold" and adjoint)
    y_BFCHW[:, 0, previous] = 0 if fill_zero else x_BFCHW[:, fill_first, previous]
    y_BFCHW[:, -1, following] = 0 if fill_zero else x_BFCHW[:, fill_last, following]
    if edge == "hold" and adjoint:
        y_BFCHW[:, 0, following] += x_BFCHW[:, 0, following]
        y_BFCHW[:, -1, previous] += x_BFCHW[:, -1, previous]
    return y_BFCHW


class _CopyShifted(torch.autograd.Function):
    """`_copy_shifted` with its derivatives. The shift is linear: its tangent is the shift, its gradient the
    adjoint."""

    @staticmethod
    def forward(x_BFCHW: Tensor, ahead: int, back: int, edge: Edge, adjoint: bool) -> Tensor:  # type: ignore[override]
        return _copy_shifted(x_BFCHW, ahead, back, edge, adjoint)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.settings = inputs[1:]

    @staticmethod
    def backward(ctx, grad_BFCHW: Tensor):  # type: ignore[override]
        *settings, adjoint = ctx.settings
        return _CopyShifted.apply(grad_BFCHW, *settings, not adjoint), None, None, None, None

    @staticmethod
    def jvp(ctx, tangent_BFCHW: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return _CopyShifted.apply(tangent_BFCHW, *ctx.settings)

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor, *settings) -> tuple[Tensor, int]:  # type: ignore[override]
        x_VBFCHW = x.movedim(in_dims[0], 0)
        y_BFCHW = _CopyShifted.apply(x_VBFCHW.flatten(0, 1), *settings)
        return y_BFCHW.unflatten(0, x_VBFCHW.shape[:2]), 0


# For torch.compile on a CPU: one opaque operator, whose copies the compiler does not turn into slower loops.
_shift_op = torch.library.custom_op(
    "latent_shift::shift",
    _copy_shifted,
    mutates_args=(),
    schema="(Tensor x, int ahead, int back, str edge, bool adjoint) -> Tensor",
)


def _shift_op_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.settings = inputs[1:]


def _shift_op_backward(ctx, grad_BFCHW: Tensor):
    *settings, adjoint = ctx.settings
    return _shift_op(grad_BFCHW, *settings, not adjoint), None, None, None, None


_shift_op.register_fake(lambda x_BFCHW, *_: torch.empty_like(x_BFCHW))
_shift_op.register_autograd(_shift_op_backward, setup_context=_shift_op_context)


class _ShiftState(threading.local):
    """State that the shifted layers of one network share: the settings, the number of frames in a clip, and,
    when frames come one after the other, the channels that each layer passes on to the next frame. Every
    thread has its own, so that two threads can use one network at once; a thread starts with the image
    network (one frame)."""

    def __init__(self, shift: Shift):
        self.inflated = shift
        self.shift = shift
        self.num_frames = 1
        self.memory: dict[nn.Module, Tensor] | None = None
        self.neighbors: tuple[Tensor, Tensor] | None = None

    # A thread's state cannot be copied; a copy of the network starts as the image network.
    def __reduce__(
        self,
    ):
        return _ShiftState, (self.inflated,)

    @contextmanager
    def using(
        self, num_frames: int, shift: Shift, memory: dict[nn.Module, Tensor] | None = None,
        neighbors: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        before = self.num_frames, self.shift, self.memory, self.neighbors
        self.num_frames, self.shift, self.memory, self.neighbors = num_frames, shift, memory, neighbors
        try:
            yield
        finally:
            self.num_frames, self.shift, self.memory, self.neighbors = before


def _shift_output(layer: ShiftGroupNorm | ShiftConv2d, x_NCHW: Tensor) -> Tensor:
    """Shift the output of a layer among the frames of a clip, or of a stream."""
    state = layer.shift_state
    if state.neighbors is not None:
        return _gather_shifted(x_NCHW, *state.neighbors, state.shift)
    if state.memory is None:
        return temporal_shift(x_NCHW, state.num_frames, state.shift)
    passed_on, stays = x_NCHW.tensor_split([state.shift.channels(x_NCHW.shape[1])[0]], dim=1)
    previous = state.memory.get(layer)
    if previous is None:
        previous = passed_on if state.shift.edge == "hold" else torch.zeros_like(passed_on)
    state.memory[layer] = passed_on.clone()
    return torch.cat([previous, stays], dim=1)


class ShiftGroupNorm(nn.GroupNorm):
    """Group norm whose output is shifted.

    Between this norm and the convolution there are only maps that act on each frame and channel separately
    and keep 0 at 0 (SiLU, nearest upsampling, average pooling, dropout), so shifting here equals shifting
    the input of the convolution. Parameter names do not change.
    """

    shift_state: _ShiftState

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return _shift_output(self, super().forward(x_NCHW))


class ShiftConv2d(nn.Conv2d):
    """Convolution whose output is shifted: the end of the residual branch."""

    shift_state: _ShiftState

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return _shift_output(self, super().forward(x_NCHW))


_SHIFT_LAYER = {"conv1": "norm1", "conv2": "norm2", "end": "conv2"}
_SHIFT_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: ShiftGroupNorm, nn.Conv2d: ShiftConv2d}


def inflate(network: nn.Module, shift: Shift = Shift()) -> nn.Module:
    """Turn an image U-Net into a video U-Net, in place: its ResNet blocks shift channels along time. No
    parameter is added, renamed or moved. Outside `frames` the network is still the image network, bit for
    bit.

    Args:
        network: a module with diffusers `ResnetBlock2D`s. A network that is already inflated takes the new
            settings.
        shift: settings of the shift.

    Returns:
        `network`.

    Raises:
        ValueError: no block to shift, a block that cannot be shifted at this place, or a network with
            temporal layers of its own.
    """
    if has_temporal_layers(network):
        raise ValueError(
            f"{type(network).__name__} has temporal layers of its own; expected an image U-Net such as UNet2DConditionModel"
        )
    blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    if not blocks:
        raise ValueError(
            f"{type(network).__name__} has no ResnetBlock2D to shift; expected a U-Net such as UNet2DConditionModel"
        )
    if shift.place == "conv2" and any(block.time_embedding_norm != "default" for block in blocks):
        raise ValueError(
            'place="conv2" needs blocks that add the time embedding; these scale and shift by it: use place="conv1" or "end"'
        )
    layers = [getattr(block, _SHIFT_LAYER[shift.place]) for block in blocks]
    for layer in layers:
        if type(layer) not in {*_SHIFT_CLASS.keys(), *_SHIFT_CLASS.values()}:
            raise ValueError(
                f"cannot shift a {type(layer).__name__}: inflate before adding adapters to this layer"
            )
    deflate(network)
    state = _ShiftState(shift)
    for layer in layers:
        layer.__class__ = _SHIFT_CLASS[type(layer)]
        layer.shift_state = state
    network.__dict__["_shift_state"] = state
    return network


def deflate(network: nn.Module) -> nn.Module:
    """Undo `inflate`, in place. A network that is not inflated does not change.

    Returns:
        `network`.

    Raises:
        ValueError: a network with temporal layers of its own (`LatentVDMUNet`), which has no image network
            to return to.
    """
    if has_temporal_layers(network):
        raise ValueError(
            f"{type(network).__name__} has temporal layers of its own and cannot be deflated; call it on single frames instead"
        )
    for layer in network.modules():
        for plain, shifted in _SHIFT_CLASS.items():
            if type(layer) is shifted:
                layer.__class__ = plain
                del layer.shift_state
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _CheckpointClips):
            layer._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]
    for layer in _cross_attentions(network):
        if type(layer.processor) is ClipTextProcessor:
            layer.set_processor(AttnProcessor2_0())
    network.__dict__.pop("_shift_state", None)
    return network


def has_temporal_layers(network: nn.Module) -> bool:
    """Return whether a network relates frames by layers with parameters (the baselines), not by a shift."""
    return bool(getattr(network, "temporal_layers", False))


def shift_of(network: nn.Module) -> Shift | None:
    """Return the settings that `network` was inflated with, or None if it is not inflated."""
    state = getattr(network, "_shift_state", None)
    return state.shift if state else None


@contextmanager
def frames(network: nn.Module, num_frames: int, *, edge: Edge | None = None) -> Iterator[nn.Module]:
    """Treat every `num_frames` successive images of a batch as one clip, inside this block and this thread.

    Args:
        network: an inflated network.
        num_frames: F; 1 is the image network.
        edge: an edge other than the network's own, e.g. "wrap" for a loop.

    Raises:
        ValueError: `network` is not inflated, or `num_frames` is not positive.
    """
    state: _ShiftState | None = getattr(network, "_shift_state", None)
    if state is None:
        raise ValueError(f"{type(network).__name__} is not inflated; call inflate(network, Shift()) first")
    if edge is not None and has_temporal_layers(network):
        raise ValueError(f"{type(network).__name__} has no edge to set: only a shifted network can loop")
    if num_frames < 1:
        raise ValueError(f"num_frames must be 1 or more, got {num_frames}")
    if getattr(network, "is_gradient_checkpointing", False):
        for module in network.modules():
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, _CheckpointClips):
                module._gradient_checkpointing_func = _CheckpointClips(checkpoint, state)  # type: ignore[assignment]
    with state.using(num_frames, state.shift if edge is None else replace(state.shift, edge=edge)):
        yield network


@contextmanager
def neighbors(network: nn.Module, previous_N: Tensor, next_N: Tensor) -> Iterator[nn.Module]:
    """Name the neighbours of every image of a batch, inside this block: one exported graph then serves clips of
    any length, one or many, with any edge.

    Args:
        network: an inflated network.
        previous_N, next_N: `(N,)` whole numbers: the images whose channels image n takes as those of the frame
            before and of the frame after it; N, which edge "zero" alone allows, stands for zeros.

    Raises:
        ValueError: `network` is not inflated, or has temporal layers of its own.
    """
    state: _ShiftState | None = getattr(network, "_shift_state", None)
    if state is None or has_temporal_layers(network):
        raise ValueError(f"{type(network).__name__} is not inflated; call inflate(network, Shift()) first")
    with state.using(1, state.shift, neighbors=(previous_N, next_N)):
        yield network


@contextmanager
def streaming(network: nn.Module, memory: dict[nn.Module, Tensor]) -> Iterator[nn.Module]:
    """Treat every image of a batch as the next frame of a clip whose frames come one call after the other,
    inside this block.

    Args:
        network: an inflated network with a causal shift (`backward=0`).
        memory: channels that each layer passes on to the next frame; empty before the first frame. Use one
            for each sequence of calls that makes a clip: when sampling, one for each timestep.

    Raises:
        ValueError: `network` is not inflated, not causal, or loops.
    """
    state: _ShiftState | None = getattr(network, "_shift_state", None)
    if (
        state is None
        or state.shift.backward > 0
        or state.shift.edge == "wrap"
        or has_temporal_layers(network)
    ):
        settings = "not inflated" if state is None else f"inflated with {state.shift}"
        raise ValueError(
            f'a stream needs a causal shift: expected Shift(backward=0, edge="zero" or "hold"), {type(network).__name__} is {settings}'
        )
    with state.using(1, state.shift, memory):
        yield network


def reach(network: nn.Module) -> tuple[int, int]:
    """Return how many frames before and after a frame can affect it in an inflated network: one for each
    layer that takes channels from the previous frame, and one for each that takes channels from the next.

    Raises:
        ValueError: a network with temporal layers (`LatentVDMUNet`), which attends to all frames.
    """
    if has_temporal_layers(network):
        raise ValueError(
            f"{type(network).__name__} attends to all frames of a clip: it cannot be run in chunks"
        )
    shift = shift_of(network) or Shift(0, 0)
    layers = [layer for layer in network.modules() if isinstance(layer, (ShiftGroupNorm, ShiftConv2d))]
    widths = [
        layer.num_channels if isinstance(layer, ShiftGroupNorm) else layer.out_channels for layer in layers
    ]
    moved = [shift.channels(width) for width in widths]
    return sum(ahead > 0 for ahead, _ in moved), sum(back > 0 for _, back in moved)


@dataclass
class _CheckpointClips:
    """Gradient checkpointing that runs blocks again with the frames of the forward pass, although `frames`
    has ended by then. (An object and not a closure, so that a deep copy of the network refers to the state
    of the copy.)"""

    checkpoint: Callable
    state: _ShiftState

    def __call__(self, block: Callable, *args):
        num_frames, shift = self.state.num_frames, self.state.shift

        def run(*inputs):
            with self.state.using(num_frames, shift):
                return block(*inputs)

        return self.checkpoint(run, *args)


class ClipTextProcessor(AttnProcessor2_0):
    """Cross-attention of all frames of a clip to one text: keys and values are computed once a clip instead
    of once a frame.

    With `(B, L, D)` text and `(B*F, S, D)` positions the queries of a clip become one sequence of F*S, which
    gives the same sums.
    """

    def __call__(self, attn: Attention, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return super().__call__(attn, hidden_states, *args, **kwargs).reshape(hidden_states.shape)


def share_text(network: nn.Module) -> bool:
    """Let the cross-attention layers of a U-Net take one text a clip; return whether all of them do.

    Layers with a custom processor (an IP-Adapter's, for example) keep it; the text must then be repeated for
    each frame.
    """
    layers = _cross_attentions(network)
    for layer in layers:
        if type(layer.processor) is AttnProcessor2_0:
            layer.set_processor(ClipTextProcessor())
    return all(isinstance(layer.processor, ClipTextProcessor) for layer in layers)


def _cross_attentions(network: nn.Module) -> list[Attention]:
    return [
        module for module in network.modules() if isinstance(module, Attention) and module.is_cross_attention
    ]
