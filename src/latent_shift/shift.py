"""The method: a parameter-free shift of feature channels along time, in the residual branch of every 2D
ResNet block.

Latent-Shift (An et al. 2023, arXiv 2304.08477) turns a text-to-image U-Net into a text-to-video U-Net with
one operation: among the C channels of frame i, the first group is taken from frame i-1, the last group from
frame i+1, and the rest stay. A 2D convolution after the shift sees three frames: it equals the 3D
convolution whose temporal kernel is a fixed mask.

    unet = UNet2DConditionModel.from_pretrained("any/stable-diffusion", subfolder="unet")
    inflate(unet, Shift())      # in place, no new weights, same state_dict; deflate(unet) undoes it
    with frames(unet, 16):
        epsilon = unet(noisy, t, text).sample   # (B*16, 4, H, W), the frames of a clip side by side

Shapes: B clips, F frames, C channels, N = B*F; the frames of a clip are adjacent in a batch.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import get_args

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from latent_shift.clip_text import unshare_text
from latent_shift.shift_kernels import gather_shifted, mean_of, shift_clips
from latent_shift.shift_settings import Edge, Groups, Shift, is_whole
from latent_shift.transformer_blocks import (
    BLOCK_LAYERS,
    InputHook,
    TextHook,
    place_hooks,
    remove_hooks,
    shifted_inputs,
    transformer_blocks,
)

# Of each layer of a causal network, the latest frames of each group of channels that it passes on, by first channel.
Memory = dict[nn.Module, dict[int, list[Tensor]]]


def temporal_shift(x_NCHW: Tensor, num_frames: int, shift: Shift = Shift()) -> Tensor:
    """Shift channels along time.

    Differentiable in reverse and forward mode, and under `torch.func`.

    Args:
        x_NCHW: `(B*F, C, ...)`, the frames of a clip adjacent.
        num_frames: F. A single frame has no neighbours and is returned unchanged.
        shift: fractions or a rule, and edge; `place` has no effect here.

    Returns:
        The shifted tensor, with the shape and memory format of `x_NCHW`.

    Raises:
        ValueError: `num_frames` does not divide the batch, a rule that does not fit C (the table of an inflated network
            is for its layers), or one with means for a tensor of whole numbers.
    """
    return _shift_frames(x_NCHW, num_frames, shift.groups(x_NCHW.shape[1]), shift.edge)


def _shift_frames(x_NCHW: Tensor, num_frames: int, groups: Groups, edge: Edge) -> Tensor:
    if num_frames == 1:
        return x_NCHW
    if num_frames < 1 or x_NCHW.shape[0] % num_frames:
        batch = x_NCHW.shape[0]
        nearest = min((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: abs(n - num_frames))
        advice = f"pass num_frames={nearest}"
        if num_frames > batch:
            advice = f"its images are the frames of a clip: in a pipeline of diffusers, pass num_images_per_prompt={num_frames}"
        raise ValueError(f"num_frames={num_frames} does not divide the batch of {batch} frames; {advice}")
    if len(groups) == 1 and groups[0][2] == (0,):  # the baselines', which need the number of frames alone
        return x_NCHW
    x_BFCHW = x_NCHW.unflatten(0, (-1, num_frames))
    return shift_clips(x_BFCHW, groups, edge).flatten(0, 1)


class _ShiftState(threading.local):
    """State that the shifted layers of one network share: the settings, and those of the clips at hand: the number
    of frames, the edge, and, when frames come one after the other, the channels that each layer passes on to the
    next frame. Every thread has its own, so that two threads can use one network at once; a thread starts with the
    image network (one frame)."""

    def __init__(self, shift: Shift):
        self.shift = shift
        self.num_text_tokens = 0
        self.num_frames = 1
        self.edge: Edge = shift.edge
        self.memory: Memory | None = None
        self.neighbors: tuple[Tensor, Tensor] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this thread is inside `frames`, `neighbors` or `streaming`."""
        return self.num_frames > 1 or self.memory is not None or self.neighbors is not None

    # A thread's state cannot be copied; a copy of the network starts as the image network.
    def __reduce__(self):
        return _ShiftState, (self.shift,)

    @contextmanager
    def using(
        self, num_frames: int, edge: Edge, memory: Memory | None = None,
        neighbors: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        before = self.num_frames, self.edge, self.memory, self.neighbors
        self.num_frames, self.edge, self.memory, self.neighbors = num_frames, edge, memory, neighbors
        try:
            yield
        finally:
            self.num_frames, self.edge, self.memory, self.neighbors = before


def _shift(x_NCHW: Tensor, state: _ShiftState, groups: Groups, layer: nn.Module) -> Tensor:
    """Shift the input or output of a layer among the frames of a clip, or of a stream."""
    if state.neighbors is not None:
        return gather_shifted(x_NCHW, *state.neighbors, groups, state.edge)
    if state.memory is None:
        return _shift_frames(x_NCHW, state.num_frames, groups, state.edge)
    shifted, memory = [], state.memory.setdefault(layer, {})
    for start, stop, offsets in groups:
        group, farthest = x_NCHW[:, start:stop], -min(offsets)
        if farthest:
            fill = group if state.edge == "hold" else torch.zeros_like(group)
            # The oldest first.
            frames_of_group = [*memory.get(start, [fill.clone()] * farthest), group.clone()]
            if frames_of_group[0].shape != group.shape:
                raise ValueError(
                    f"the memory of this stream is of {tuple(frames_of_group[0].shape)}, the frame of {tuple(group.shape)}: start with an empty one"
                )
            memory[start] = frames_of_group[1:]
            group = mean_of([frames_of_group[offset - 1] for offset in offsets])
        shifted.append(group)
    return torch.cat(shifted, dim=1)


class ShiftGroupNorm(nn.GroupNorm):
    """Group norm whose output is shifted.

    Between this norm and the convolution there are only maps that act on each frame and channel separately
    and keep 0 at 0 (SiLU, nearest upsampling, average pooling, dropout), so shifting here equals shifting
    the input of the convolution (but a rule's means are taken before the SiLU). Parameter names do not change.
    """

    shift_state: _ShiftState
    shift_groups: Groups

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return _shift(super().forward(x_NCHW), self.shift_state, self.shift_groups, self)


class ShiftConv2d(nn.Conv2d):
    """Convolution whose output is shifted: the end of the residual branch."""

    shift_state: _ShiftState
    shift_groups: Groups

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return _shift(super().forward(x_NCHW), self.shift_state, self.shift_groups, self)


_SHIFT_LAYERS = {"conv1": ["norm1"], "conv2": ["norm2"], "both": ["norm1", "norm2"], "end": ["conv2"]}
_TEMPORAL_LAYERS = {
    "AnimateDiffTransformer3D", "LatteTransformer3DModel", "SpatioTemporalResBlock", "TemporalConvLayer", "TransformerSpatioTemporalModel",
    "TransformerTemporalModel",
}  # fmt: skip
"""Classes of diffusers with which a network relates frames already."""
_SHIFT_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: ShiftGroupNorm, nn.Conv2d: ShiftConv2d}


def inflate(network: nn.Module, shift: Shift | None = None) -> nn.Module:
    """Turn an image network into a video network, in place: its residual blocks shift channels along time. No
    parameter is added, renamed or moved. Outside `frames` the network is still the image network, bit for
    bit.

    Args:
        network: a module with diffusers `ResnetBlock2D`s (a U-Net), or a transformer with blocks of PixArt, Sana,
            Stable Diffusion 3 or Flux. A network that is already inflated takes the new settings.
        shift: settings of the shift; default: `Shift()`, whose place is "attn" in a transformer. Where tokens are shifted,
            whatever this process has compiled is compiled again at its next call.

    Returns:
        `network`.

    Raises:
        ValueError: no block to shift, a block that cannot be shifted at this place, a rule that does not fit, a
            network with temporal layers of its own, or a call inside `frames`.
    """
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"expected a network such as pipe.unet or pipe.transformer, got a {type(network).__name__}"
        )
    if shift is not None and not isinstance(shift, Shift):
        raise ValueError(f"expected the settings as a Shift, got {shift!r}")
    if has_temporal_layers(network) or any(
        type(module).__name__ in _TEMPORAL_LAYERS for module in network.modules()
    ):
        raise ValueError(
            f"{type(network).__name__} has temporal layers of its own; expected an image U-Net such as UNet2DConditionModel"
        )
    blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    is_transformer = bool(transformer_blocks(network)) and not blocks
    shift = shift or Shift()
    if is_transformer and shift.place == "conv1":
        shift = replace(shift, place="attn")
    if shift.place in ("kv", "attn", "ffn") or (shift.place == "both" and is_transformer):
        return _inflate_transformer(network, shift)
    if not blocks:
        hint = (
            'use place="kv", "attn", "ffn" or "both"'
            if is_transformer
            else "expected a U-Net such as UNet2DConditionModel, or a transformer of PixArt, Sana, Stable Diffusion 3 or Flux"
        )
        raise ValueError(f"{type(network).__name__} has no ResnetBlock2D to shift; {hint}")
    if all(block.time_emb_proj is None for block in blocks):
        raise ValueError(f"{type(network).__name__} takes no timestep; expected a denoiser such as pipe.unet")
    if shift.place in ("conv2", "both") and any(block.time_embedding_norm != "default" for block in blocks):
        raise ValueError(
            f'place="{shift.place}" needs blocks that add the time embedding; these scale and shift by it: use place="conv1" or "end"'
        )
    layers = [getattr(block, name) for block in blocks for name in _SHIFT_LAYERS[shift.place]]
    for layer in layers:
        if type(layer) not in {*_SHIFT_CLASS.keys(), *_SHIFT_CLASS.values()}:
            raise ValueError(
                f"cannot shift a {type(layer).__name__}: inflate before adding adapters to this layer"
            )
    shift, groups_of = _resolve(network, shift, {layer: _width(layer) for layer in layers})
    deflate(network)
    state = _ShiftState(shift)
    for layer in layers:
        layer.shift_groups = groups_of[layer]
        layer.__class__ = _SHIFT_CLASS[type(layer)]
        layer.shift_state = state
    uncompiled(network).__dict__["_shift_state"] = state
    return network


def uncompiled(network: nn.Module) -> nn.Module:
    """Return the network that `torch.compile` has wrapped, or one that is not wrapped."""
    return getattr(network, "_orig_mod", network)


def _forget_compiled() -> None:
    """Let networks be compiled again: compiled code does not notice that hooks have come or gone, as it does with classes."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _resolve(
    network: nn.Module, shift: Shift, widths: dict[nn.Module, int]
) -> tuple[Shift, dict[nn.Module, Groups]]:
    """Return the settings with the rule's numbers for layers of these widths, and the groups of each layer."""
    names = {module: name for name, module in uncompiled(network).named_modules()}
    shift = shift.resolved({names[layer]: width for layer, width in widths.items()})
    return shift, {layer: shift.groups(width, names[layer]) for layer, width in widths.items()}


def _inflate_transformer(network: nn.Module, shift: Shift) -> nn.Module:
    """Shift the inputs of layers of transformer blocks. The layers keep their classes, which adapters and quantized
    layers need: hooks shift."""
    blocks = transformer_blocks(network)
    if not blocks:
        raise ValueError(
            f"{type(network).__name__} has no transformer block to shift; expected one of {', '.join(BLOCK_LAYERS)}"
        )
    inputs = [each for block in blocks for each in shifted_inputs(block, shift.place)]
    shift, groups_of = _resolve(network, shift, {each.layer: each.width for each in inputs})
    deflate(network)
    state = _ShiftState(shift)
    _forget_compiled()
    uncompiled(network).__dict__["_shift_state"] = state
    uncompiled(network).__dict__["_shift_hooks"] = [
        (each, InputHook(_shift, state, groups_of[each.layer], each.has_text)) for each in inputs
    ]
    for block in blocks:
        if BLOCK_LAYERS[type(block).__name__].has_text:
            block.register_forward_pre_hook(TextHook(state), with_kwargs=True)
    place_hooks(network)
    return network


def deflate(network: nn.Module) -> nn.Module:
    """Undo `inflate`, in place. A network that is not inflated does not change.

    Returns:
        `network`.

    Raises:
        ValueError: a network with temporal layers of its own (`LatentVDMUNet`), which has no image network
            to return to, or a call inside `frames`.
    """
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"expected a network such as pipe.unet or pipe.transformer, got a {type(network).__name__}"
        )
    inflated = [
        module for module in network.modules() if "_shift_state" in module.__dict__
    ]  # also inside a wrapper
    if any(module.__dict__["_shift_state"].is_busy for module in inflated):
        raise ValueError(
            "inflate and deflate change a network between clips, not inside frames, neighbors or streaming"
        )
    if has_temporal_layers(network):
        raise ValueError(
            f"{type(network).__name__} has temporal layers of its own and cannot be deflated; call it on single frames instead"
        )
    for layer in network.modules():
        for plain, shifted in _SHIFT_CLASS.items():
            if type(layer) is shifted:
                layer.__class__ = plain
                del layer.shift_state, layer.shift_groups
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _CheckpointClips):
            layer._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]
    for module in inflated:
        del module.__dict__["_shift_state"]
        if module.__dict__.pop("_shift_hooks", None):
            _forget_compiled()
    remove_hooks(network)
    unshare_text(network)
    return network


def has_temporal_layers(network: nn.Module) -> bool:
    """Return whether a network relates frames by layers with parameters (the baselines), not by a shift."""
    return bool(getattr(network, "temporal_layers", False))


def shift_of(network: nn.Module) -> Shift | None:
    """Return the settings that `network` was inflated with, or None if it is not inflated."""
    state = getattr(network, "_shift_state", None)
    return state.shift if state else None


def _state_of(network: nn.Module) -> _ShiftState:
    """Return the state of an inflated network, whose hooks are then where its layers are now; raise ValueError for another."""
    state: _ShiftState | None = getattr(network, "_shift_state", None)
    if state is None:
        raise ValueError(f"{type(network).__name__} is not inflated; call inflate(network) first")
    place_hooks(network)
    return state


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
    state = _state_of(network)
    if edge is not None and has_temporal_layers(network):
        raise ValueError(f"{type(network).__name__} has no edge to set: only a shifted network can loop")
    if not is_whole(num_frames) or num_frames < 1:
        raise ValueError(f"expected num_frames as a whole number of 1 or more, got {num_frames!r}")
    if edge not in (None, *get_args(Edge)):
        raise ValueError(f"unknown edge {edge!r}; expected one of {', '.join(get_args(Edge))}")
    _checkpoint_clips(network, state)
    with state.using(num_frames, edge or state.edge):
        yield network
        if _checkpoint_clips(network, state):
            raise ValueError("gradient checkpointing was enabled inside frames; enable it before")


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
    state = _state_of(network)
    if has_temporal_layers(network):
        raise ValueError(f"{type(network).__name__} relates frames by layers of its own, not by a shift")
    _checkpoint_clips(network, state)
    with state.using(1, state.edge, neighbors=(previous_N, next_N)):
        yield network


@contextmanager
def streaming(network: nn.Module, memory: Memory) -> Iterator[nn.Module]:
    """Treat every image of a batch as the next frame of a clip whose frames come one call after the other,
    inside this block.

    Args:
        network: an inflated network with a causal shift (`backward=0`).
        memory: channels that each layer passes on to the next frame; empty before the first frame. Use one
            for each sequence of calls that makes a clip, always with equally many images: when sampling, one for each
            timestep.

    Raises:
        ValueError: `network` is not inflated, not causal, or loops, or gradient checkpointing would run a frame twice.
    """
    state = _state_of(network)
    if has_temporal_layers(network):
        raise ValueError(f"{type(network).__name__} relates frames by layers of its own, not by a shift")
    if not state.shift.is_causal:
        wanted = "Shift(backward=0)" if state.shift.rule is None else "a rule without positive offsets"
        raise ValueError(
            f"a stream needs a causal shift: expected {wanted}; here channels come from later frames"
        )
    if state.edge == "wrap":
        raise ValueError(
            'a stream has no end that leads into its start: expected edge="zero" or "hold", not "wrap"'
        )
    if getattr(network, "is_gradient_checkpointing", False) and torch.is_grad_enabled():
        raise ValueError(
            "a stream keeps what each call passes on, and gradient checkpointing runs calls again: disable it, or use torch.no_grad()"
        )
    with state.using(1, state.edge, memory):
        yield network


def reach(network: nn.Module) -> tuple[int, int]:
    """Return how many frames before and after a frame can affect it in an inflated network: for each shifted
    layer, one where it takes channels from the previous frame and one where it takes them from the next, or as
    many as a rule says; none in an image network.

    Raises:
        ValueError: a network with temporal layers (`LatentVDMUNet`), which attends to all frames.
    """
    if has_temporal_layers(network):
        raise ValueError(
            f"{type(network).__name__} attends to all frames of a clip: it cannot be run in chunks"
        )
    groups_of: dict[nn.Module, Groups] = {}  # once for inputs that are shifted side by side
    for module in network.modules():
        if isinstance(module, (ShiftGroupNorm, ShiftConv2d)):
            groups_of[module] = module.shift_groups
        for each, hook in module.__dict__.get("_shift_hooks", ()):
            groups_of[each.layer] = hook.groups
    offsets = [[offset for *_, offsets in groups for offset in offsets] for groups in groups_of.values()]
    return sum(max(0, -min(each)) for each in offsets), sum(max(0, max(each)) for each in offsets)


def _width(layer: nn.GroupNorm | nn.Conv2d) -> int:
    return layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.out_channels


def _checkpoint_clips(network: nn.Module, state: _ShiftState) -> bool:
    """Let gradient checkpointing, where a network uses it, keep the clips of the forward pass; return whether it did not before."""
    if not getattr(network, "is_gradient_checkpointing", False):
        return False
    plain = [
        module
        for module in network.modules()
        if not isinstance(
            getattr(module, "_gradient_checkpointing_func", None), (_CheckpointClips, type(None))
        )
    ]
    for module in plain:
        module._gradient_checkpointing_func = _CheckpointClips(module._gradient_checkpointing_func, state)  # type: ignore
    return bool(plain)


@dataclass
class _CheckpointClips:
    """Gradient checkpointing that runs blocks again with the clips of the forward pass, although `frames` or
    `neighbors` has ended by then. (An object and not a closure, so that a deep copy of the network refers to the state
    of the copy.)"""

    checkpoint: Callable
    state: _ShiftState

    def __call__(self, block: Callable, *args):
        state = self.state
        num_frames, edge, nearby = state.num_frames, state.edge, state.neighbors

        def run(*inputs):
            with state.using(num_frames, edge, neighbors=nearby):
                return block(*inputs)

        return self.checkpoint(run, *args)
