"""The method: a parameter-free shift of feature channels along time, in the residual branch of every 2D ResNet block.

Latent-Shift (An et al. 2023, arXiv 2304.08477) makes a text-to-image U-Net a text-to-video U-Net with one operation: of the
C channels of frame i, the first group is taken from frame i-1, the last group from frame i+1, the rest stay. A 2D convolution
after the shift sees three frames: it is the 3D convolution whose temporal kernel is a fixed mask.

    unet = UNet2DConditionModel.from_pretrained("any/stable-diffusion", subfolder="unet")
    inflate(unet, Shift())                      # in place, no new weights, the same state_dict; deflate(unet) undoes it
    with frames(unet, 16):
        epsilon = unet(noisy, t, text).sample   # (B*16, 4, H, W), the frames of a clip side by side

Letters: B clips, F frames, C channels, N = B*F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

Place = Literal["conv1", "conv2", "end"]
Edge = Literal["zero", "wrap", "hold"]


@dataclass(frozen=True)
class Shift:
    """Settings of the temporal shift.

    Args:
        forward: share of the channels taken from the frame before, in [0, 1]. 1/3 is the paper's figure, 1/8 TSM's.
        backward: share taken from the frame after. 0 makes the network causal.
        place: "conv1" shifts what enters the first convolution of a block (as TSM does), "conv2" what enters the second,
            "end" what the branch adds to the shortcut. The paper's text and figure differ; conv1 is the default here.
        edge: what the vacated channels of the first and last frame hold: "zero" (the paper), "wrap" (the other end of the
            clip: the network commutes with rotating the frames, so clips loop) or "hold" (that frame's own values).

    Raises:
        ValueError: shares that are negative or overlap, an unknown place or edge.
    """

    forward: float = 1 / 3
    backward: float = 1 / 3
    place: Place = "conv1"
    edge: Edge = "zero"

    def __post_init__(self) -> None:
        if self.forward < 0 or self.backward < 0 or self.forward + self.backward > 1 + 1e-9:
            raise ValueError(
                f"forward and backward are shares of the channels: expected both at least 0 and their sum at most 1, "
                f"got forward={self.forward}, backward={self.backward}"
            )
        for name, choices in (("place", get_args(Place)), ("edge", get_args(Edge))):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; expected one of {', '.join(choices)}")

    def channels(self, num_channels: int) -> tuple[int, int]:
        """How many of `num_channels` move forward and backward: the shares rounded down, the rest stays (widths of Stable
        Diffusion do not divide by 3; the paper does not say how it rounds)."""
        return int(num_channels * self.forward + 1e-6), int(num_channels * self.backward + 1e-6)


def temporal_shift(x_NCHW: Tensor, num_frames: int, shift: Shift = Shift()) -> Tensor:
    """Shift channels along time.

    Args:
        x_NCHW: `(B*F, C, ...)`, the frames of a clip side by side.
        num_frames: F. -1 takes the whole batch as one clip. One frame has no neighbours and is returned as it is (except by a
            compiled graph of -1, whose F is 2 or more).
        shift: shares and edge (`place` has no meaning here).

    Returns:
        The shifted tensor, of the same shape and memory format.

    Raises:
        ValueError: `num_frames` does not divide the batch.
    """
    if num_frames == 1 or (num_frames == -1 and not torch.compiler.is_compiling() and x_NCHW.shape[0] == 1):
        return x_NCHW
    if num_frames != -1 and (num_frames < 1 or x_NCHW.shape[0] % num_frames):
        batch = x_NCHW.shape[0]
        nearest = min((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: abs(n - num_frames))
        raise ValueError(f"num_frames={num_frames} does not divide the batch of {batch} frames; pass num_frames={nearest}")
    ahead, back = shift.channels(x_NCHW.shape[1])
    x_BFCHW = x_NCHW.unflatten(0, (1, -1) if num_frames == -1 else (-1, num_frames))
    if torch.compiler.is_compiling() and (torch.compiler.is_exporting() or x_NCHW.device.type != "cpu"):
        return _shift_functional(x_BFCHW, ahead, back, shift.edge).flatten(0, 1)
    # Where nothing is differentiated the function itself: what registers it as an operator takes the host time at every call.
    one_pass = _shift_in_one_pass if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x_NCHW.requires_grad) else _copy_shifted
    return one_pass(x_BFCHW, ahead, back, shift.edge, False).flatten(0, 1)


def _shift_functional(x_BFCHW: Tensor, ahead: int, back: int, edge: Edge) -> Tensor:
    """The shift as concatenations: for exporters, and for compilers that fuse them into what comes before (on a CPU they become
    loops that are not vectorised: a step that takes 9 % more)."""
    from_before, stays, from_after = x_BFCHW.split([ahead, x_BFCHW.shape[2] - ahead - back, back], dim=2)
    first, last = from_before[:, :1], from_after[:, -1:]
    if edge == "zero":
        first, last = torch.zeros_like(first), torch.zeros_like(last)
    elif edge == "wrap":
        first, last = from_before[:, -1:], from_after[:, :1]
    from_before = torch.cat([first, from_before[:, :-1]], dim=1)
    from_after = torch.cat([from_after[:, 1:], last], dim=1)
    return torch.cat([from_before, stays, from_after], dim=2)


def _copy_shifted(x_BFCHW: Tensor, ahead: int, back: int, edge: Edge, adjoint: bool) -> Tensor:
    """The shift as one pass over memory, every frame's group copied straight to where it goes; or its adjoint, which is the shift the
    other way (and what an end held counts twice)."""
    y_BFCHW = torch.empty_like(x_BFCHW)
    num_channels = x_BFCHW.shape[2]
    before, stays, after = slice(0, ahead), slice(ahead, num_channels - back), slice(num_channels - back, num_channels)
    if adjoint:
        before, after = after, before
    y_BFCHW[:, 1:, before] = x_BFCHW[:, :-1, before]
    y_BFCHW[:, :-1, after] = x_BFCHW[:, 1:, after]
    y_BFCHW[:, :, stays] = x_BFCHW[:, :, stays]
    from_before, from_after = (0, -1) if edge == "hold" else (-1, 0)
    nothing = edge == "zero" or (edge == "hold" and adjoint)
    y_BFCHW[:, 0, before] = 0 if nothing else x_BFCHW[:, from_before, before]
    y_BFCHW[:, -1, after] = 0 if nothing else x_BFCHW[:, from_after, after]
    if edge == "hold" and adjoint:
        y_BFCHW[:, 0, after] += x_BFCHW[:, 0, after]
        y_BFCHW[:, -1, before] += x_BFCHW[:, -1, before]
    return y_BFCHW


_shift_in_one_pass = torch.library.custom_op(
    "latent_shift::shift", _copy_shifted, mutates_args=(), schema="(Tensor x, int ahead, int back, str edge, bool adjoint) -> Tensor"
)


def _remember_settings(ctx, inputs: tuple, output: Tensor) -> None:
    _, ahead, back, edge, adjoint = inputs
    ctx.settings = (ahead, back, edge, not adjoint)


def _gradient(ctx, grad_BFCHW: Tensor):
    return _shift_in_one_pass(grad_BFCHW, *ctx.settings), None, None, None, None


_shift_in_one_pass.register_fake(lambda x_BFCHW, *_: torch.empty_like(x_BFCHW))
_shift_in_one_pass.register_autograd(_gradient, setup_context=_remember_settings)


@dataclass
class _Clip:
    """What every shifted layer of one network shares: the settings, how many frames make a clip just now, and, when frames come
    one after the other, what each layer keeps of the last one."""

    shift: Shift
    num_frames: int = 1
    memory: dict[nn.Module, Tensor] | None = None

    @contextmanager
    def of(self, num_frames: int, shift: Shift) -> Iterator[None]:
        before = self.num_frames, self.shift
        self.num_frames, self.shift = num_frames, shift
        try:
            yield
        finally:
            self.num_frames, self.shift = before

    def __call__(self, layer: nn.Module, x_NCHW: Tensor) -> Tensor:
        if self.memory is None:
            return temporal_shift(x_NCHW, self.num_frames, self.shift)
        now, stays = x_NCHW.tensor_split([self.shift.channels(x_NCHW.shape[1])[0]], dim=1)
        before = self.memory.get(layer)
        if before is None:
            before = now if self.shift.edge == "hold" else torch.zeros_like(now)
        self.memory[layer] = now.clone()
        return torch.cat([before, stays], dim=1)


class ShiftGroupNorm(nn.GroupNorm):
    """A group norm whose output is shifted.

    Between this norm and the convolution lie only maps that act on each frame and channel alone and keep 0 at 0 (SiLU, nearest
    upsampling, average pooling, dropout), so shifting here is shifting before the convolution. The parameters keep their names.
    """

    clip: _Clip

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.clip(self, super().forward(x_NCHW))


class ShiftConv2d(nn.Conv2d):
    """A convolution whose output is shifted: the end of the residual branch."""

    clip: _Clip

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.clip(self, super().forward(x_NCHW))


_LAYER = {"conv1": "norm1", "conv2": "norm2", "end": "conv2"}
_SHIFTED: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: ShiftGroupNorm, nn.Conv2d: ShiftConv2d}


def inflate(network: nn.Module, shift: Shift = Shift()) -> nn.Module:
    """Make an image U-Net a video U-Net, in place: its ResNet blocks shift channels along time. No parameter is added, renamed
    or moved, and until `frames` says how many frames make a clip the network is the image network, bit for bit.

    Args:
        network: any module with diffusers `ResnetBlock2D`s. One that is already inflated takes the new settings.
        shift: where, how many channels, which edge.

    Returns:
        `network`.

    Raises:
        ValueError: no block to shift, or a block in which this place cannot be shifted.
    """
    if getattr(network, "unbounded_in_time", False):
        raise ValueError(f"{type(network).__name__} sees time by layers of its own; expected a U-Net without, such as UNet2DConditionModel")
    blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no ResnetBlock2D to shift; expected a U-Net such as UNet2DConditionModel")
    if shift.place == "conv2" and any(block.time_embedding_norm != "default" for block in blocks):
        raise ValueError('place="conv2" needs blocks that add the time embedding; these scale and shift by it: use "conv1" or "end"')
    layers = [getattr(block, _LAYER[shift.place]) for block in blocks]
    for layer in layers:
        if type(layer) not in {*_SHIFTED.keys(), *_SHIFTED.values()}:
            raise ValueError(f"cannot shift a {type(layer).__name__}: inflate before adding adapters to this layer")
    deflate(network)
    clip = _Clip(shift)
    for layer in layers:
        layer.__class__ = _SHIFTED[type(layer)]
        layer.clip = clip
    network.__dict__["_latent_shift_clip"] = clip
    return network


def deflate(network: nn.Module) -> nn.Module:
    """Undo `inflate`, in place; a network that is not inflated stays as it is. Returns `network`."""
    for layer in network.modules():
        for plain, shifted in _SHIFTED.items():
            if type(layer) is shifted:
                layer.__class__ = plain
                del layer.clip
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _CheckpointAsClips):
            layer._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]
    for layer in _cross_attentions(network):
        if type(layer.processor) is ClipTextProcessor:
            layer.set_processor(AttnProcessor2_0())
    network.__dict__.pop("_latent_shift_clip", None)
    return network


def shift_of(network: nn.Module) -> Shift | None:
    """The settings `network` was inflated with, or None if it is not inflated."""
    clip = getattr(network, "_latent_shift_clip", None)
    return clip.shift if clip else None


@contextmanager
def frames(network: nn.Module, num_frames: int, *, edge: Edge | None = None) -> Iterator[nn.Module]:
    """Within this block every `num_frames` successive images of a batch are one clip.

    Args:
        network: an inflated network.
        num_frames: F; 1 is the image network. -1 takes the whole batch as one clip, so that an exported graph keeps F free: any
            number from 2 on.
        edge: another edge than the network's own, e.g. "wrap" for a loop.

    Raises:
        ValueError: `network` is not inflated, or `num_frames` is neither -1 nor above 0.
    """
    clip: _Clip | None = getattr(network, "_latent_shift_clip", None)
    if clip is None:
        raise ValueError(f"{type(network).__name__} is not inflated; call inflate(network, Shift()) first")
    if edge is not None and getattr(network, "unbounded_in_time", False):
        raise ValueError(f"{type(network).__name__} has no edges to set: it has no loops")
    if num_frames != -1 and num_frames < 1:
        raise ValueError(f"num_frames must be 1 or more, or -1 for the whole batch, got {num_frames}")
    if getattr(network, "is_gradient_checkpointing", False):
        for module in network.modules():
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, _CheckpointAsClips):
                module._gradient_checkpointing_func = _CheckpointAsClips(checkpoint, clip)  # type: ignore[assignment]
    with clip.of(num_frames, clip.shift if edge is None else replace(clip.shift, edge=edge)):
        yield network


@contextmanager
def streaming(network: nn.Module, memory: dict[nn.Module, Tensor]) -> Iterator[nn.Module]:
    """Within this block every image of a batch is the next frame of a clip, whose frames come one call after the other.

    Args:
        network: an inflated network whose shift is causal: nothing comes from the frame after.
        memory: what each layer keeps of the frame before; empty before the first. Use one for each sequence of calls that makes a
            clip: when sampling, one for each timestep.

    Raises:
        ValueError: `network` is not inflated, not causal, or loops.
    """
    clip: _Clip | None = getattr(network, "_latent_shift_clip", None)
    if clip is None or clip.shift.backward > 0 or clip.shift.edge == "wrap" or getattr(network, "unbounded_in_time", False):
        settings = "not inflated" if clip is None else f"inflated with {clip.shift}"
        raise ValueError(
            f'frames can come one by one only where none needs the next: expected Shift(backward=0, edge="zero" or "hold"), '
            f"{type(network).__name__} is {settings}"
        )
    clip.memory = memory
    try:
        yield network
    finally:
        clip.memory = None


def reach(network: nn.Module) -> int:
    """How many frames away, on either side, a frame of an inflated network still has an effect: one for each shifted layer.

    Raises:
        ValueError: a network whose attention sees all frames of a clip (`LatentVDMUNet`).
    """
    if getattr(network, "unbounded_in_time", False):
        raise ValueError(f"{type(network).__name__} sees all frames of a clip at once: it has no chunks")
    return sum(isinstance(layer, (ShiftGroupNorm, ShiftConv2d)) for layer in network.modules())


@dataclass
class _CheckpointAsClips:
    """Gradient checkpointing runs blocks again during the backward pass, when `frames` has ended: this brings the clips back.
    (An object and not a closure: a deep copy of the network takes a copy along that knows the copy's clips.)"""

    checkpoint: Callable
    clip: _Clip

    def __call__(self, block: Callable, *args):
        num_frames, shift = self.clip.num_frames, self.clip.shift

        def run(*inputs):
            with self.clip.of(num_frames, shift):
                return block(*inputs)

        return self.checkpoint(run, *args)


class ClipTextProcessor(AttnProcessor2_0):
    """Cross-attention of all frames of a clip to one text: keys and values are computed once a clip, not once a frame.

    With `(B, L, D)` text and `(B*F, S, D)` positions the queries of a clip become one sequence of F*S, which is the same sum.
    """

    def __call__(self, attn: Attention, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return super().__call__(attn, hidden_states, *args, **kwargs).reshape(hidden_states.shape)


def share_text(network: nn.Module) -> bool:
    """Let the cross-attention layers of a U-Net take one text a clip; returns whether all of them do now.

    Layers with another processor than the default (an IP-Adapter's, say) keep it; then the text must be repeated for each frame.
    """
    layers = _cross_attentions(network)
    for layer in layers:
        if type(layer.processor) is AttnProcessor2_0:
            layer.set_processor(ClipTextProcessor())
    return all(isinstance(layer.processor, ClipTextProcessor) for layer in layers)


def _cross_attentions(network: nn.Module) -> list[Attention]:
    return [module for module in network.modules() if isinstance(module, Attention) and module.is_cross_attention]
