"""Choose which channels of each layer to shift: those that cost the image network least.

A layer with weights W reads the shifted channels. Where channel c of a frame is replaced by that of a neighbour, the layer's output
changes by W_c (x_c[f - 1] - x_c[f]); if channels differ independently, the expected squares add up. So the cost of shifting channel c
is |W_c|^2 E (x_c[f - 1] - x_c[f])^2, measured on clips frame by frame; channels that come from farther away, or become means, are
chosen by the same cost. Taking the cheapest channels, the video network starts close to the image network (docs/method.md).

Shapes: N images, the F frames of a clip adjacent; C channels, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from latent_shift.shift import Shift, deflate, frames, inflate, shift_of, uncompiled
from latent_shift.transformer_blocks import shifted_inputs, transformer_blocks


@torch.no_grad()
def cheapest_channels(network: nn.Module, shift: Shift, run: Callable[[], None], num_frames: int) -> Shift:
    """Return settings that shift as many channels of each layer as `shift` does, but the cheapest.

    Args:
        network: an image network. It is inflated with `shift` for the measurement, and left as it was.
        shift: how many channels come from which frame, place and edge.
        run: calls the network on noised clips `(B*F, C, h, w)`, the frames of a clip adjacent, outside `frames`.
        num_frames: F of these clips, 2 or more.

    Returns:
        Settings whose rule is a table, for `inflate`.

    Raises:
        ValueError: clips of one frame, `place="end"`, a `run` that does not call the network, calls it within `frames` or on a
            batch that is no multiple of F, or costs that are not finite.
    """
    if num_frames < 2:
        raise ValueError(
            f"channels change from frame to frame: expected clips of 2 frames or more, got {num_frames}"
        )
    network = uncompiled(network)
    before, costs, handles = shift_of(network), dict[str, Tensor](), []

    def measure(name: str, has_text: bool) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple) -> None:
            x = args[0]
            if state.num_frames > 1:
                raise ValueError("run must call the network frame by frame, outside latent_shift.frames")
            if x.shape[0] % num_frames:
                raise ValueError(
                    f"num_frames={num_frames} does not divide the batch of {x.shape[0]} frames that run makes"
                )
            if x.ndim == 3:
                x = x[:, state.num_text_tokens if has_text else 0 :].transpose(1, 2)
            x_BFCS = x.flatten(2).unflatten(0, (-1, num_frames)).float()
            change_C = (x_BFCS[:, 1:] - x_BFCS[:, :-1]).square().mean(dim=(0, 1, 3))
            costs[name] = costs.get(name, 0) + _squared_weights(layer) * change_C

        return hook

    try:
        shift = shift_of(inflate(network, shift)) or shift
        state: Any = network._shift_state
        readers = list(shifted_readers(network, shift.place))
        handles += [
            layer.register_forward_pre_hook(measure(name, has_text))
            for name, layers, has_text in readers
            for layer in layers
        ]
        with frames(network, 1):
            run()
    finally:
        for handle in handles:
            handle.remove()
        inflate(network, before) if before else deflate(network)
    table = []
    for name, *_ in readers:
        if name not in costs:
            raise ValueError(f"run did not call {name}: expected it to run the network on clips")
        if not costs[name].isfinite().all():
            raise ValueError(
                f"the costs of the channels of {name} are not finite: check the weights and the clips"
            )
        table.append((name, _offsets(costs[name], shift, name)))
    return Shift(place=shift.place, edge=shift.edge, rule=tuple(table))


def shifted_readers(network: nn.Module, place: str) -> Iterator[tuple[str, list[nn.Module], bool]]:
    """Yield the name of each shifted layer, as the rule of `Shift` has it, the layers that read its channels, and whether text
    precedes the image in their input."""
    blocks = [(name, block) for name, block in network.named_modules() if isinstance(block, ResnetBlock2D)]
    if place in ("conv1", "conv2", "both") and blocks:
        for name, block in blocks:
            for number in {"conv1": (1,), "conv2": (2,), "both": (1, 2)}[place]:
                yield f"{name}.norm{number}".lstrip("."), [block.get_submodule(f"conv{number}")], False
        return
    if place == "end":
        raise ValueError('place="end" is read by no layer of its block: expected "conv1" or another place')
    names = {module: name for name, module in network.named_modules()}
    for block in transformer_blocks(network):
        for layer, inputs in groupby(shifted_inputs(block, place), lambda each: each.layer):
            shifted = list(inputs)
            readers = [each.parent.get_submodule(each.name) for each in shifted]
            yield (
                names[layer],
                [first for reader in readers for first in _first_layers(reader)],
                shifted[0].has_text,
            )


def _first_layers(reader: nn.Module) -> list[nn.Module]:
    """Return the layers with weights that read the input of a layer: three in self-attention, else the first."""
    if hasattr(reader, "to_q"):
        return [reader.get_submodule(name) for name in ("to_k", "to_v", "to_q")]
    return [next(layer for layer in reader.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))]


def _squared_weights(layer: nn.Module) -> Tensor:
    """Return the sum of squares of a layer's weights for each input channel `(C,)`."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.get_parameter("weight").float()
    by_group = weight.square().reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return by_group.sum(dim=(1, 3)).flatten()


def _offsets(costs_C: Tensor, shift: Shift, layer: str) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return the groups of a layer's channels: by rising cost, the offsets of `shift` take turns."""
    turns = []
    for start, stop, offsets in shift.groups(len(costs_C), layer):
        if offsets != (0,):
            turns += [((number + 0.5) / (stop - start), offsets) for number in range(stop - start)]
    turns.sort(key=lambda turn: (turn[0], [-offset for offset in turn[1]]))
    chosen: list[tuple[int, ...]] = [(0,)] * len(costs_C)
    for channel, (_, offsets) in zip(costs_C.argsort(stable=True).tolist(), turns, strict=False):
        chosen[channel] = offsets
    return tuple((len(list(run)), offsets) for offsets, run in groupby(chosen))
