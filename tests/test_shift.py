"""The laws of the shift, each against a slow independent version written here."""

import copy
import itertools
import json
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from latent_shift import shift, shift_kernels
from latent_shift.clip_text import share_text
from latent_shift.engines.exported import neighbor_indices
from latent_shift.rules import neighbors_and_mean
from latent_shift.shift import (
    Shift,
    deflate,
    frames,
    inflate,
    neighbors,
    reach,
    shift_of,
    streaming,
    temporal_shift,
)

EDGES = ("zero", "wrap", "hold")
PLACES = ("conv1", "conv2", "both", "end")


def tiny_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = dict(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, cross_attention_dim=8,
    )  # fmt: skip
    return UNet2DConditionModel(**{**config, **changes}).eval()


def smallest_unet() -> UNet2DConditionModel:
    """One resolution and every kind of layer but the changes of resolution: for what is done to each layer in turn."""
    return tiny_unet(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


def inputs(num: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num, 4, 8, 8, generator=generator),
        torch.tensor(7),
        torch.randn(num, 3, 8, generator=generator),
    )


def far(num_channels):
    """A rule: channels come from one, two and seven frames away, in no order, and two from a mean; the last two stay."""
    return [
        (-1, 2, (-2, 0, 7), (-2, 0, 7), 7, 1, -7)[c % 7] if c < num_channels - 2 else 0
        for c in range(num_channels)
    ]


def scattered(num_channels):
    """A rule of many groups: hardly two neighbouring channels come from one frame."""
    return [(-1, 0, 1, 0, -2, (-1, 1))[c * c % 6] for c in range(num_channels)]


def shuffled(num_channels):
    """A rule of many groups without means."""
    return [(-1, 0, 1, 0, -2, 7)[c * c % 6] for c in range(num_channels)]


def far_back(num_channels):
    """A causal rule, with means."""
    return [(-1, (0, -2, -3), 0, -3)[c % 4] for c in range(num_channels)]


def shift_by_loops(x, num_frames, ahead, back, edge):
    """Frame by frame and channel by channel."""
    num_channels = x.shape[1]
    return shift_by_offsets(
        x, num_frames, [-1] * ahead + [0] * (num_channels - ahead - back) + [1] * back, edge
    )


def shift_by_offsets(x, num_frames, offsets, edge):
    out = torch.zeros_like(x)
    for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        start, f = n - n % num_frames, n % num_frames
        sources = offsets[c] if isinstance(offsets[c], tuple) else (offsets[c],)
        for source in (f + offset for offset in sources):
            if edge == "wrap":
                source %= num_frames
            if edge == "hold":
                source = min(max(source, 0), num_frames - 1)
            if 0 <= source < num_frames:
                out[n, c] += x[start + source, c] / len(sources)
    return out


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    ("ahead", "back"),
    [(1 / 3, 1 / 3), (1 / 8, 1 / 8), (1 / 4, 1 / 4), (1 / 2, 0), (0, 1 / 3), (0, 0), (0.5, 0.5), (1, 0)],
)
def test_temporal_shift_moves_channels_to_neighbouring_frames(edge, ahead, back):
    x = torch.randn(3 * 5, 10, 2, 3)
    expected = shift_by_loops(x, 5, int(10 * ahead), int(10 * back), edge)
    assert torch.equal(temporal_shift(x, 5, Shift(ahead, back, edge=edge)), expected)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("rule", [far, far_back, scattered, shuffled])
def test_a_rule_moves_channels_as_far_as_it_says(edge, rule):
    x = torch.randn(2 * 5, 32, 2, 3)
    expected = shift_by_offsets(x, 5, rule(32), edge)
    settings = Shift(rule=rule, edge=edge)
    torch.testing.assert_close(temporal_shift(x, 5, settings), expected)
    assert torch.equal(temporal_shift(x, 1, settings), x)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("rule", [None, far, scattered, shuffled])
def test_temporal_shift_is_the_same_when_compiled(edge, rule):
    x = torch.randn(8, 36 if rule in (scattered, shuffled) else 9, 4, 4, requires_grad=True)
    torch.compiler.reset()  # each case is a graph of its own
    compiled = torch.compile(temporal_shift, backend="aot_eager", fullgraph=True)
    outputs = [call(x, 4, Shift(edge=edge, rule=rule)) for call in (temporal_shift, compiled)]
    assert torch.equal(*outputs)
    upstream = torch.randn_like(x)
    assert torch.equal(*[torch.autograd.grad(output, x, upstream)[0] for output in outputs])


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("rule", [None, far, scattered, shuffled])
def test_concatenate_shifted_equals_copy_shifted(edge, rule):
    num_channels = 36 if rule in (scattered, shuffled) else 9
    x = torch.randn(2, 4, num_channels, 4, 4)
    groups = Shift(rule=rule).groups(num_channels)
    expected = shift_kernels.copy_shifted(x, groups, edge, False)
    torch.testing.assert_close(shift_kernels.concatenate_shifted(x, groups, edge), expected)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("adjoint", [False, True])
def test_shift_op_passes_opcheck(edge, adjoint):
    """PyTorch's own: schema, fake tensors and autograd tell the truth."""
    for x in (
        torch.randn(2, 4, 6, 3, 3),
        torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 4)),
    ):
        groups = [0, 2, 1, -1, 2, 4, 1, 0, 4, 5, 2, 1, 2, 5, 6, 1, 2]
        torch.library.opcheck(shift_kernels.shift_op, (x.requires_grad_(), groups, edge, adjoint))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("rule", [None, far, scattered, shuffled])
def test_temporal_shift_keeps_the_memory_format(edge, rule):
    """With channels last the values and gradients are those of contiguous frames."""
    x = torch.randn(8, 36, 4, 4, requires_grad=True)
    y = temporal_shift(x, 4, Shift(edge=edge, rule=rule))
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    z = temporal_shift(last, 4, Shift(edge=edge, rule=rule))
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, y)
    (found,) = torch.autograd.grad(z, last, upstream.contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, gradient)


def test_tables_are_made_anew_after_they_were_dropped(monkeypatch):
    x = torch.randn(8, 9, 2, 2)
    settings = [Shift(edge=edge, rule=rule) for edge in EDGES for rule in (None, far)]
    expected = [temporal_shift(x, 4, shift) for shift in settings]
    monkeypatch.setattr(shift_kernels, "_MAX_TABLES", 2)
    monkeypatch.setattr(shift_kernels, "_tables", OrderedDict())
    for _ in range(2):
        assert all(
            torch.equal(temporal_shift(x, 4, shift), y) for shift, y in zip(settings, expected, strict=True)
        )
    assert len(shift_kernels._tables) == 2


def test_means_keep_the_precision_of_their_input():
    """Under autocast, too, where a matrix product would not; whole numbers have no mean, and an empty batch no frames."""
    x, shift = torch.randn(4, 12, 4, 4), Shift(rule=neighbors_and_mean, edge="hold")
    expected = temporal_shift(x, 4, shift)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(temporal_shift(x, 4, shift), expected)
    for like in (x, x.to(memory_format=torch.channels_last)):
        with pytest.raises(
            ValueError, match=r"means over frames need floating-point numbers, got torch\.int64"
        ):
            temporal_shift(like.long(), 4, shift)
        assert temporal_shift(like[:0], 4, shift).shape == (0, 12, 4, 4)
        full = torch.full_like(like, 40_000, dtype=torch.float16)  # a sum would not hold
        torch.testing.assert_close(temporal_shift(full, 4, shift), full, rtol=2e-3, atol=0)
        whole = shift_kernels.concatenate_shifted(full.unflatten(0, (1, 4)), shift.groups(12), "hold")
        torch.testing.assert_close(whole[0], full, rtol=2e-3, atol=0)
    assert temporal_shift(x.to("meta"), 4, shift).shape == x.shape
    assert torch.equal(temporal_shift(x.long(), 4), temporal_shift(x.long().float(), 4).long())


def test_temporal_shift_is_a_permutation_or_a_permutation_plus_zeros():
    x = torch.arange(1.0, 1 + 4 * 6 * 2 * 2).view(4, 6, 2, 2)
    wrapped = temporal_shift(x, 4, Shift(edge="wrap"))
    assert torch.equal(wrapped.flatten().sort().values, x.flatten())
    zeroed = temporal_shift(x, 4)
    kept = zeroed[zeroed != 0]
    assert len(kept.unique()) == len(kept)
    assert (zeroed == 0).sum() == 2 * 2 * 2 * 2  # two channels at either end, of 2x2 pixels
    assert set(kept.tolist()) <= set(x.flatten().tolist())


@pytest.mark.parametrize("edge", ["zero", "wrap"])
def test_temporal_shift_has_the_reverse_shift_as_gradient(edge):
    x = torch.randn(8, 9, 2, 2, requires_grad=True, dtype=torch.float64)
    upstream = torch.randn_like(x)
    temporal_shift(x, 4, Shift(edge=edge)).backward(upstream)
    # Channels in reverse order swap the two groups, so the reverse shift is the shift of the flipped tensor.
    assert torch.equal(x.grad, temporal_shift(upstream.flip(1), 4, Shift(edge=edge)).flip(1))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("rule", [None, far, scattered, shuffled])
def test_temporal_shift_passes_gradcheck_to_second_order(edge, rule):
    num_channels = 36 if rule in (scattered, shuffled) else 9 if rule else 3
    x = torch.randn(
        4, num_channels, 1, 1 if rule in (scattered, shuffled) else 2, requires_grad=True, dtype=torch.float64
    )
    settings = Shift(edge=edge, rule=rule)
    assert torch.autograd.gradcheck(lambda x: temporal_shift(x, 4, settings) ** 2, x)
    assert torch.autograd.gradgradcheck(lambda x: temporal_shift(x, 4, settings) ** 2, x)


@pytest.mark.parametrize(("edge", "mode"), [("zero", "zeros"), ("wrap", "circular"), ("hold", "replicate")])
def test_temporal_shift_then_conv2d_equals_the_masked_conv3d(edge, mode):
    """Channel group by channel group the temporal kernel of three has one tap: before, same, after."""
    num_frames, num_channels = 5, 6
    conv2d = torch.nn.Conv2d(num_channels, 7, 3, padding=1).double()
    conv3d = torch.nn.Conv3d(num_channels, 7, 3, bias=False).double()
    with torch.no_grad():
        conv3d.weight.zero_()
        for tap, group in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
            conv3d.weight[:, group, tap] = conv2d.weight[:, group]
    x_BCFHW = torch.randn(2, num_channels, num_frames, 4, 4, dtype=torch.float64)
    x_NCHW = x_BCFHW.transpose(1, 2).flatten(0, 1)
    ours = (
        conv2d(temporal_shift(x_NCHW, num_frames, Shift(edge=edge)))
        .unflatten(0, (2, num_frames))
        .transpose(1, 2)
    )
    padded = torch.nn.functional.pad(
        x_BCFHW, (0, 0, 0, 0, 1, 1), mode="constant" if mode == "zeros" else mode
    )
    theirs = conv3d(torch.nn.functional.pad(padded, (1, 1, 1, 1))) + conv2d.bias[:, None, None, None]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("place", PLACES)
def test_inflate_adds_no_parameters_and_deflate_undoes_it(place):
    unet = tiny_unet()
    names, parameters = list(unet.state_dict()), [id(parameter) for parameter in unet.parameters()]
    types = [type(module) for module in unet.modules()]
    settings = Shift(place=place)
    assert inflate(unet, settings) is unet and shift_of(unet) == settings
    assert (
        list(unet.state_dict()) == names and [id(parameter) for parameter in unet.parameters()] == parameters
    )
    deflate(unet)
    assert [type(module) for module in unet.modules()] == types and shift_of(unet) is None
    assert not any(
        name.startswith(("shift_", "_shift_")) for module in unet.modules() for name in vars(module)
    )


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_inflate_keeps_the_image_network_for_one_frame(place):
    x, t, text = inputs(3)
    image = tiny_unet()(x, t, text).sample
    unet = inflate(tiny_unet(), Shift(place=place))
    assert torch.equal(unet(x, t, text).sample, image)
    with frames(unet, 1):
        assert torch.equal(unet(x, t, text).sample, image)
    with frames(unet, 3):
        assert not torch.allclose(unet(x, t, text).sample, image)


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_inflate_equals_a_network_with_shifted_convolutions(place):
    """An independent network: hooks on the convolutions, with the shift written as loops."""
    x, t, text = inputs(8)
    hooked = tiny_unet()
    for name, module in hooked.named_modules():
        if "resnets" in name and name.endswith(
            {"both": ("conv1", "conv2"), "end": "conv2"}.get(place, place)
        ):
            third = module.in_channels // 3 if place != "end" else module.out_channels // 3
            if place == "end":
                module.register_forward_hook(
                    lambda _, args, y, third=third: shift_by_loops(y, 4, third, third, "zero")
                )
            else:
                module.register_forward_pre_hook(
                    lambda _, args, third=third: (shift_by_loops(args[0], 4, third, third, "zero"),)
                )
    unet = inflate(tiny_unet(), Shift(place=place))
    with frames(unet, 4):
        torch.testing.assert_close(unet(x, t, text).sample, hooked(x, t, text).sample)


def test_inflate_shifts_blocks_with_any_activation():
    x, t, text = inputs(4)
    results = []
    for activation in ("silu", "gelu"):
        unet = inflate(tiny_unet(act_fn=activation))
        with torch.no_grad(), frames(unet, 4):
            changed = x.clone()
            changed[0] += 1
            results.append((unet(changed, t, text).sample - unet(x, t, text).sample)[1].abs().max())
    assert min(results) > 1e-4


@torch.no_grad()
def test_frames_never_mixes_clips_of_a_batch():
    unet = inflate(tiny_unet())
    x, t, text = inputs(8)
    with frames(unet, 4):
        before = unet(x, t, text).sample
        x[4:] = torch.randn(4, 4, 8, 8)
        after = unet(x, t, text).sample
    torch.testing.assert_close(after[:4], before[:4], rtol=0, atol=1e-6)
    assert not torch.allclose(after[4:], before[4:], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("backward", [1 / 3, 0])
def test_reach_is_one_frame_for_each_shift_of_a_block(place, backward):
    torch.manual_seed(0)
    block = inflate(
        ResnetBlock2D(in_channels=12, out_channels=12, temb_channels=4, groups=3).eval(),
        Shift(1 / 3, backward, place),
    )
    x, temb = torch.randn(7, 12, 4, 4), torch.randn(7, 4)
    changed = x.clone()
    changed[3] += torch.randn(12, 4, 4)
    with frames(block, 7):
        difference = (block(changed, temb) - block(x, temb)).abs().amax(dim=(1, 2, 3))
    num_shifts = 2 if place == "both" else 1
    first = 3 - (num_shifts if backward else 0)
    assert reach(block) == (num_shifts, 3 - first)
    assert difference.nonzero().flatten().tolist() == list(range(first, 4 + num_shifts))


@torch.no_grad()
def test_shift_without_backward_is_causal():
    unet = inflate(tiny_unet(), Shift(backward=0))
    x, t, text = inputs(6)
    changed = x.clone()
    changed[3] += 1
    with frames(unet, 6):
        difference = (unet(changed, t, text).sample - unet(x, t, text).sample).abs().amax(dim=(1, 2, 3))
    assert (difference[:3] < 1e-6).all() and (difference[3:] > 1e-4).all()


@torch.no_grad()
def test_wrap_makes_the_network_commute_with_rolling():
    unet = inflate(tiny_unet(), Shift(edge="wrap"))
    x, t, text = inputs(5)
    text = text[:1].expand(5, -1, -1)
    with frames(unet, 5):
        rolled, plain = unet(x.roll(2, 0), t, text).sample, unet(x, t, text).sample
    torch.testing.assert_close(rolled, plain.roll(2, 0), rtol=0, atol=1e-5)


@torch.no_grad()
def test_frames_sets_the_edge_and_restores_it():
    unet = inflate(tiny_unet())
    x, t, text = inputs(4)
    with frames(inflate(tiny_unet(), Shift(edge="wrap")), 4) as wrapped:
        expected = wrapped(x, t, text).sample
    with frames(unet, 4, edge="wrap"):
        assert torch.equal(unet(x, t, text).sample, expected)
    with pytest.raises(KeyError), frames(unet, 4, edge="wrap"):
        raise KeyError
    assert shift_of(unet) == Shift()
    assert torch.equal(unet(x, t, text).sample, tiny_unet()(x, t, text).sample)


@torch.no_grad()
@pytest.mark.parametrize("edge", EDGES)
def test_laws_hold_in_a_network_with_a_rule(edge):
    """Reach, streams, loops and clips of a batch."""
    unet = inflate(smallest_unet(), Shift(rule=far_back, edge=edge))
    x, t, text = inputs(24)
    text = text[:1].expand(24, -1, -1)
    num_layers = sum(isinstance(layer, shift.ShiftGroupNorm) for layer in unet.modules())
    assert reach(unet) == (3 * num_layers, 0)
    with frames(unet, 12):
        whole = unet(x, t, text).sample
        changed = x.clone()
        changed[3] += 1
        difference = (unet(changed, t, text).sample - whole).abs().amax(dim=(1, 2, 3))
        if edge == "wrap":
            rolled = torch.cat([clip.roll(5, 0) for clip in x.chunk(2)])
            expected = torch.cat([clip.roll(5, 0) for clip in whole.chunk(2)])
            torch.testing.assert_close(unet(rolled, t, text).sample, expected, rtol=0, atol=1e-5)
    assert (difference[12:] < 1e-6).all()
    if edge != "wrap":
        assert (difference[:3] < 1e-6).all() and (difference[3:12] > 1e-5).all()
        memory = {}
        for number in range(12):
            with streaming(unet, memory):
                frame = unet(x[number : number + 1], t, text[:1]).sample
            torch.testing.assert_close(frame[0], whole[number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", [None, far, scattered, shuffled])
@torch.no_grad()
@pytest.mark.parametrize("edge", EDGES)
def test_neighbors_by_index_equal_frames(edge, rule):
    """One clip or several, of one frame or more, with any edge: the indices say it all."""
    unet = inflate(tiny_unet(block_out_channels=(32, 40)), Shift(edge=edge, rule=rule))
    x, t, text = inputs(6)
    for num in (6, 3, 1):
        one = neighbor_indices(num, edge)
        starts = np.repeat(np.arange(0, 6, num), num)
        previous, following = (
            torch.from_numpy(
                np.where(np.tile(one[name], 6 // num) == num, 6, np.tile(one[name], 6 // num) + starts)
            )
            for name in ("previous", "next")
        )
        with frames(unet, num):
            expected = unet(x, t, text).sample
        with neighbors(unet, previous, following):
            tolerance = 4e-6 if rule else 0  # the order of the terms of a mean
            torch.testing.assert_close(unet(x, t, text).sample, expected, rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match="not inflated"), neighbors(tiny_unet(), previous, following):
        pass


@torch.no_grad()
@pytest.mark.parametrize(
    ("backend", "network"),
    [("eager", smallest_unet), pytest.param("aot_eager", tiny_unet, marks=pytest.mark.slow)],
)
def test_inflated_network_compiles_without_graph_breaks(backend, network):
    unet = inflate(network())
    x, t, text = inputs(4)
    with frames(unet, 4):
        expected = unet(x, t, text).sample
        compiled = torch.compile(unet, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x, t, text, return_dict=False)[0], expected)


def test_gradient_checkpointing_keeps_the_gradients():
    gradients = []
    for checkpointing in (False, True):
        unet = inflate(tiny_unet()).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        x, t, text = inputs(4)
        with frames(unet, 4):
            loss = unet(x, t, text).sample.square().mean()
        loss.backward()  # after the clip: the blocks are run again here
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_gradient_checkpointing_keeps_the_neighbours():
    gradients = []
    x, t, text = inputs(4)
    order = torch.tensor([2, 0, 3, 1])
    for checkpointing in (False, True):
        unet = inflate(tiny_unet()).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with neighbors(unet, order, order.flip(0)):
            loss = unet(x, t, text).sample.square().mean()
        with frames(unet, 2):  # busy with clips
            loss.backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_stream_with_gradient_checkpointing_is_refused():
    unet = inflate(tiny_unet(), Shift(backward=0)).train()
    unet.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="runs calls again"), streaming(unet, {}):
        pass
    with torch.no_grad(), streaming(unet, {}):
        unet(*inputs(1))


def test_no_channel_is_copied_where_none_moves(monkeypatch):
    """The baselines are inflated for the number of frames alone."""
    unet = inflate(tiny_unet(), Shift(0, 0))
    monkeypatch.setattr(shift, "shift_clips", None)
    x, t, text = inputs(4)
    with torch.no_grad(), frames(unet, 4):
        assert torch.equal(unet(x, t, text).sample, tiny_unet()(x, t, text).sample)


@pytest.mark.parametrize("num_frames", [0, -1, 2.0, "2", None, True])
def test_frames_takes_a_whole_number(num_frames):
    with pytest.raises(ValueError, match="expected num_frames as a whole number of 1 or more, got "):
        frames(inflate(tiny_unet()), num_frames).__enter__()


def test_a_batch_smaller_than_a_clip_is_told_from_where_frames_come():
    """Two images are often the negative and the positive prompt of one: no clip."""
    x, t, text = inputs(2)
    unet = inflate(tiny_unet())
    with pytest.raises(ValueError, match="pass num_images_per_prompt=16"), frames(unet, 16):
        unet(x, t, text)


@pytest.mark.parametrize("change", [inflate, deflate])
def test_a_network_does_not_change_inside_frames(change):
    unet = inflate(tiny_unet())
    with pytest.raises(ValueError, match="between clips, not inside frames"), frames(unet, 2):
        change(unet)


def test_checkpointing_that_begins_inside_frames_is_refused():
    unet = inflate(tiny_unet()).train()
    with pytest.raises(ValueError, match="enable it before"), frames(unet, 4):
        unet.enable_gradient_checkpointing()


@pytest.mark.parametrize("number", [np.float32(0.25), torch.tensor(0.25), np.float64(0.25)])
def test_fractions_become_numbers_that_json_takes(number):
    shift = Shift(number, 0.25)
    assert shift == Shift(0.25, 0.25) and Shift(**json.loads(json.dumps(shift.to_dict()))) == shift


@pytest.mark.parametrize("number", ["0.3", None, True, 1j])
def test_fractions_are_numbers(number):
    with pytest.raises(ValueError, match="expected forward as a number, got "):
        Shift(number, 0.25)


def test_only_a_network_is_deflated():
    with pytest.raises(ValueError, match="expected a network such as"):
        deflate("a pipeline")


def test_a_stream_keeps_its_number_of_images():
    unet, memory = inflate(tiny_unet(), Shift(backward=0)), {}
    with torch.no_grad(), streaming(unet, memory):
        unet(*inputs(1))
        with pytest.raises(ValueError, match="start with an empty one"):
            unet(*inputs(2))


def test_a_network_compiled_before_is_inflated_inside():
    unet = tiny_unet()
    compiled = torch.compile(unet, backend="eager")
    inflate(compiled, Shift(rule=lambda num: [-1] * num))
    assert shift_of(unet) == shift_of(compiled)
    assert all("_orig_mod" not in name for name, _ in shift_of(unet).rule)


def test_another_edge_leaves_the_settings():
    unet = inflate(tiny_unet(), Shift(edge="hold"))
    with frames(unet, 4, edge="wrap"):
        assert shift_of(unet) == Shift(edge="hold")
    with pytest.raises(ValueError, match="unknown edge 'loop'"), frames(unet, 4, edge="loop"):
        pass


def test_gradient_checkpointing_of_copies_uses_their_own_state():
    """A deep copy recomputes with its own clips, and after `deflate` nothing of the shift is left in the checkpointing."""
    unet = inflate(tiny_unet()).train()
    unet.enable_gradient_checkpointing()
    x, t, text = inputs(4)
    with frames(unet, 4):
        unet(x, t, text)
    twin = copy.deepcopy(unet)
    with frames(twin, 4):
        loss = twin(x, t, text).sample.square().mean()
    with frames(unet, 2):  # the original is busy with other clips
        loss.backward()
    plain = inflate(tiny_unet()).train()
    with frames(plain, 4):
        plain(x, t, text).sample.square().mean().backward()
    for expected, parameter in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(expected.grad, parameter.grad)
    deflate(unet)
    torch.testing.assert_close(unet(x, t, text).sample, tiny_unet().train()(x, t, text).sample)


def test_inflate_leaves_the_network_unchanged_on_error():
    unet = inflate(tiny_unet(resnet_time_scale_shift="scale_shift"), Shift(place="end"))
    with pytest.raises(ValueError, match="scale and shift"):
        inflate(unet, Shift(place="conv2"))
    assert shift_of(unet) == Shift(place="end")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(forward=0.6, backward=0.6), "sum at most 1"),
        (dict(forward=-0.1), "at least 0"),
        (dict(forward=math.nan), "at least 0"),
        (
            dict(place="conv3"),
            "unknown place 'conv3'; expected one of conv1, conv2, both, end, kv, attn, ffn",
        ),
        (dict(rule=far, backward=0), "no effect beside a rule"),
        (dict(edge="mirror"), "unknown edge 'mirror'; expected one of zero, wrap, hold"),
    ],
)
def test_shift_rejects_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Shift(**options)


def test_wrong_calls_are_rejected():
    with pytest.raises(
        ValueError, match="num_frames=15 does not divide the batch of 32 frames; pass num_frames=16"
    ):
        temporal_shift(torch.zeros(32, 3, 1, 1), 15)
    with pytest.raises(ValueError, match="not inflated"), frames(tiny_unet(), 4):
        pass
    with pytest.raises(ValueError, match="whole number of 1 or more"), frames(inflate(tiny_unet()), 0):
        pass
    with pytest.raises(ValueError, match="Linear has no ResnetBlock2D"):
        inflate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="conv2"):
        inflate(tiny_unet(resnet_time_scale_shift="scale_shift"), Shift(place="conv2"))
    unet = inflate(tiny_unet())
    with pytest.raises(ValueError, match="does not divide"), frames(unet, 3), torch.no_grad():
        unet(*inputs(4))


@torch.no_grad()
def test_share_text_equals_text_repeated_for_each_frame():
    unet = inflate(tiny_unet())
    x, t, text = inputs(8)
    with frames(unet, 4):
        repeated = unet(x, t, text[:2].repeat_interleave(4, dim=0)).sample
        assert share_text(unet)
        shared = unet(x, t, text[:2]).sample
    torch.testing.assert_close(shared, repeated)


def test_deflate_undoes_share_text():
    unet = inflate(tiny_unet())
    share_text(unet)
    x, t, text = inputs(4)
    assert torch.equal(deflate(unet)(x, t, text).sample, tiny_unet()(x, t, text).sample)
    with pytest.raises(RuntimeError), torch.no_grad():
        unet(x, t, text[:2])


def test_share_text_skips_custom_processors():
    unet = tiny_unet()
    foreign = type("Foreign", (), {"__call__": lambda *_: None})()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.set_processor(foreign)
    assert not share_text(unet)
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.processor is foreign
