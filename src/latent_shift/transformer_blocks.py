"""Hooks on the inputs of layers of diffusers' transformer blocks, through which `shift.inflate` shifts tokens.

Shapes: N images, S positions of an image, L tokens of a text, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockLayers:
    """Names of the layers of a transformer block whose inputs can be shifted.

    Attributes:
        attention: self-attention.
        feed_forward: the layer that reads the hidden channels of the feed-forward layer, in Sana its convolution; in blocks where
            attention and feed-forward layer are side by side the one that reads the same tokens as attention.
        has_text: whether they take text and image as one sequence (in Flux: side by side).
        second_attention: of the image tokens alone, beside the first; empty for a block without one.
    """

    attention: str
    feed_forward: str
    has_text: bool = False
    second_attention: str = ""


# By the name of the class: importing all of them would take seconds.
BLOCK_LAYERS = {
    "BasicTransformerBlock": BlockLayers("attn1", "ff.net.2"),  # PixArt; the attention of U-Nets, too
    "SanaTransformerBlock": BlockLayers("attn1", "ff.conv_depth"),
    # Stable Diffusion 3; 3.5 has a second attention.
    "JointTransformerBlock": BlockLayers("attn", "ff.net.2", second_attention="attn2"),
    "FluxTransformerBlock": BlockLayers("attn", "ff.net.2"),
    "FluxSingleTransformerBlock": BlockLayers("attn", "proj_mlp", has_text=True),
}


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network whose layers are known, but for those whose attention reads the text alone."""
    return [
        module
        for module in network.modules()
        if type(module).__name__ in BLOCK_LAYERS
        and type(module).__module__.startswith("diffusers.")
        and not getattr(module, "only_cross_attention", False)
    ]


@dataclass(frozen=True)
class ShiftedInput:
    """A layer of a block whose input is shifted.

    Attributes:
        parent, name: the module that calls it, and its name there.
        layer: the attention or feed-forward layer that names its channels: layers side by side shift the same ones.
        width: number of channels D.
        has_text: whether text precedes the image in the input.
    """

    parent: nn.Module
    name: str
    layer: nn.Module
    width: int
    has_text: bool


def attentions(block: nn.Module) -> list[nn.Module]:
    """Return the layers of a block's self-attention."""
    layers = BLOCK_LAYERS[type(block).__name__]
    first, second = (getattr(block, name, None) for name in (layers.attention, layers.second_attention))
    return [layer for layer in (first, second) if layer is not None]


def width_of(block: nn.Module) -> int:
    """Return the number of channels D of a block's tokens."""
    attention: Any = attentions(block)[0]
    return int(attention.to_q.in_features)


def shifted_inputs(block: nn.Module, place: str) -> Iterator[ShiftedInput]:
    """Yield the inputs of a block that are shifted at a place."""
    layers = BLOCK_LAYERS[type(block).__name__]
    attention, width = attentions(block)[0], width_of(block)
    if place == "kv":
        for each in attentions(block):
            for name in ("to_k", "to_v"):
                yield ShiftedInput(each, name, attention, width, layers.has_text)
    if place in ("attn", "both"):
        for name in (layers.attention, layers.second_attention):
            if getattr(block, name, None) is not None:
                yield ShiftedInput(block, name, attention, width, layers.has_text)
    if place in ("ffn", "both"):
        # Attention and feed-forward layer read the same tokens where they are side by side.
        side_by_side = place == "both" and layers.has_text
        parent, _, name = layers.feed_forward.rpartition(".")
        reader: Any = block.get_submodule(layers.feed_forward)
        width = reader.in_channels if isinstance(reader, nn.Conv2d) else reader.in_features
        layer = attention if side_by_side else reader
        yield ShiftedInput(block.get_submodule(parent), name, layer, width, layers.has_text)


@dataclass(eq=False)
class InputHook:
    """A hook that shifts the input of a layer: tokens `(N, S, D)`, of the image alone, or `(N, D, H, W)`.

    Args:
        shift: called with the input as `(N, D, ...)`, `state`, `groups` and the layer.
        state: of the network.
        groups: of the channels.
        has_text: whether text precedes the image in the input; `state.num_text_tokens` says how much.
    """

    shift: Callable[[Tensor, Any, Any, nn.Module], Tensor]
    state: Any
    groups: Any
    has_text: bool

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = args[0] if args else kwargs["hidden_states"]
        if x.ndim == 4:
            shifted = self.shift(x, self.state, self.groups, layer)
        else:
            num_text = self.state.num_text_tokens if self.has_text else 0
            shifted = self.shift(x[:, num_text:].transpose(1, 2), self.state, self.groups, layer).transpose(
                1, 2
            )
            if num_text:
                shifted = torch.cat([x[:, :num_text], shifted], dim=1)
        return ((shifted, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": shifted})


@dataclass(eq=False)
class TextHook:
    """A hook on a block that joins text and image in one sequence: it counts the tokens of the text."""

    state: Any

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        text_NLD = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        self.state.num_text_tokens = text_NLD.shape[1]


def place_hooks(network: nn.Module) -> None:
    """Put each hook of an inflated transformer on the layer that its block calls: adapters (LoRA) replace a layer by one
    of their own, and give it back.

    Raises:
        ValueError: queries, keys and values have been fused into one layer, which reads the same tokens for all three.
    """
    for shifted, hook in getattr(network, "_shift_hooks", ()):
        parent, name = shifted.parent, shifted.name
        if name in ("to_k", "to_v") and _is_fused(parent):
            raise ValueError(
                'place="kv" shifts the input of keys and values, not that of queries: call unfuse_qkv_projections(), or use place="attn"'
            )
        layer = getattr(parent, name)
        if hook in layer._forward_pre_hooks.values():
            continue
        for inner in layer.modules():
            _remove(inner, hook)
        layer.register_forward_pre_hook(hook, with_kwargs=True)


def _is_fused(attention: Any) -> bool:
    """Return whether one layer computes queries, keys and values. (diffusers' `Attention` keeps its flag when it is unfused, and takes
    its other processor back; newer classes have the flag alone.)"""
    by_processor = type(attention).__name__ == "Attention"
    return bool(getattr(attention, "fused_projections", False)) and (
        not by_processor or type(attention.processor).__name__.startswith("Fused")
    )


def remove_hooks(network: nn.Module) -> None:
    """Remove all hooks of this module from a network."""
    for layer in network.modules():
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, (InputHook, TextHook)):
                _remove(layer, hook)


def _remove(layer: nn.Module, hook: object) -> None:
    for number in [number for number, other in layer._forward_pre_hooks.items() if other is hook]:
        del layer._forward_pre_hooks[number]
        layer._forward_pre_hooks_with_kwargs.pop(number, None)
