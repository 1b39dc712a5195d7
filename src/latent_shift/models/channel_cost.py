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

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from latent_shift.shift import Shift, deflate, frames, inflate
from latent_shift.transformer_blocks import shifted_inputs, transformer_blocks


@torch.no_grad()
def cheapest_channels(network: nn.Module, shift: Shift, run: Callable[[], None], num_frames: int) -> Shift:
    """Return settings that shift as many channels of each layer as `shift` does, but the cheapest.

    Args:
        network: an image network. It is inflated with `shift` for the measurement, and deflated again.
        shift: how many channels come from which frame, place and edge.
        run: runs the network on noised clips, frame by frame.
        num_frames: F of these clips, 2 or more.

    Returns:
        Settings whose rule is a table, for `inflate`.

    Raises:
        ValueError: clips of one frame, `place="end"`, a `run` that does not run the network, or costs that are not finite.
    """
    if num_frames < 2:
        raise ValueError(
            f"channels change from frame to frame: expected clips of 2 frames or more, got {num_frames}"
        )
    readers = dict(shifted_readers(network, shift.place))
    changes: dict[str, list[Tensor]] = {name: [] for name in readers}

    def measure(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple, *_: object) -> None:
            x = args[0] if args[0].ndim == 4 else args[0].transpose(1, 2)
            x_BFCS = x.flatten(2).unflatten(0, (-1, num_frames)).float()
            changes[name].append((x_BFCS[:, 1:] - x_BFCS[:, :-1]).square().mean(dim=(0, 1, 3)))

        return hook

    handles = [layers[0].register_forward_pre_hook(measure(name)) for name, layers in readers.items()]
    inflate(network, shift)
    try:
        with frames(network, 1):
            run()
    finally:
        for handle in handles:
            handle.remove()
        deflate(network)
    table = []
    for name, layers in readers.items():
        if not changes[name]:
            raise ValueError(f"run did not call {name}: expected it to run the network on clips")
        weights = torch.stack([_squared_weights(layer) for layer in layers]).sum(dim=0)
        costs = weights * torch.stack(changes[name]).mean(dim=0)
        if not costs.isfinite().all():
            raise ValueError(
                f"the costs of the channels of {name} are not finite: check the weights and the clips"
            )
        table.append((name, _offsets(costs, shift, name)))
    return Shift(place=shift.place, edge=shift.edge, rule=tuple(table))


def shifted_readers(network: nn.Module, place: str) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield the name of each shifted layer, as the rule of `Shift` has it, and the layers that read its channels."""
    blocks = [(name, block) for name, block in network.named_modules() if isinstance(block, ResnetBlock2D)]
    if place in ("conv1", "conv2", "both") and blocks:
        for name, block in blocks:
            for number in {"conv1": (1,), "conv2": (2,), "both": (1, 2)}[place]:
                yield f"{name}.norm{number}".lstrip("."), [block.get_submodule(f"conv{number}")]
        return
    if place == "end":
        raise ValueError('place="end" is read by no layer of its block: expected "conv1" or another place')
    names = {module: name for name, module in network.named_modules()}
    readers: dict[str, list[nn.Module]] = {}
    for block in transformer_blocks(network):
        for each in shifted_inputs(block, place):
            reader = each.parent.get_submodule(each.name)
            readers.setdefault(names[each.layer], []).extend(_first_layers(reader))
    yield from readers.items()


def _first_layers(reader: nn.Module) -> list[nn.Module]:
    """Return the layers with weights that read the input of a layer: three in self-attention, else the first."""
    if hasattr(reader, "to_q"):
        return [reader.get_submodule(name) for name in ("to_k", "to_v", "to_q")]
    return [next(layer for layer in reader.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))]


def _squared_weights(layer: nn.Module) -> Tensor:
    """Return the sum of squares of a layer's weights for each input channel `(C,)`."""
    weight = layer.get_parameter("weight").float()
    return weight.square().sum(dim=[dim for dim in range(weight.ndim) if dim != 1])


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
