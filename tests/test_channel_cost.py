"""Choosing the channels to shift by what they cost the image network."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_config

import latent_shift as ls
from latent_shift.models import sizes
from latent_shift.models.channel_cost import cheapest_channels
from latent_shift.pipelines import loading
from latent_shift.shift import Shift, frames, reach, shift_of
from latent_shift.training import checkpoint, checks
from latent_shift.training.loop import train
from latent_shift.training.prepare import Prepared
from latent_shift.training.stages import DenoiserStage


def test_the_cheapest_channels_of_a_layer_are_shifted():
    """Against the formula, channel by channel. (How much outputs change is measured in test_transformers.py.)"""
    torch.manual_seed(0)
    unet = sizes.unet("tiny", sample_size=8).eval()
    plain = copy.deepcopy(unet)
    x, text = torch.randn(2 * 3, 4, 8, 8), torch.randn(6, 5, 32)
    shift = cheapest_channels(unet, Shift(edge="hold"), lambda: unet(x, 7, text), 3)
    assert shift.place == "conv1" and shift.edge == "hold"
    name = "down_blocks.1.resnets.0"
    block, inputs = plain.get_submodule(name), []
    block.conv1.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    with torch.no_grad():
        plain(x, 7, text)
        y = inputs[0].unflatten(0, (2, 3))
        costs = []
        for channel in range(y.shape[2]):
            change = torch.zeros_like(y[:, 1:])
            change[:, :, channel] = y[:, 1:, channel] - y[:, :-1, channel]
            kernel = block.conv1.weight[:, channel].square().sum()
            costs.append(float(kernel * change.square().sum()))
    offsets = [offset for num, (offset,) in dict(shift.rule)[f"{name}.norm1"] for _ in range(num)]
    third = len(offsets) // 3
    assert (offsets.count(-1), offsets.count(1)) == (third, third)
    moved = {channel for channel, offset in enumerate(offsets) if offset}
    assert moved == set(np.argsort(costs, kind="stable")[: 2 * third].tolist())
    ls.inflate(unet, shift)
    assert reach(unet) == reach(ls.inflate(plain, Shift()))


@pytest.mark.parametrize(
    ("make", "place"),
    [
        ("tiny", "both"),
        ("tiny", "kv"),
        ("pixart", "ffn"),
        ("sana", "ffn"),
        ("sana", "attn"),
        ("sana", "both"),
    ],
)
def test_every_place_has_layers_that_read_it(make, place, monkeypatch):
    if make != "tiny":
        network, config = sizes.TRANSFORMERS[make]
        small = {"num_layers": 1, "num_attention_heads": 1, "cross_attention_dim": 32, "caption_channels": 32}
        small |= {"num_cross_attention_heads": 1} if make == "sana" else {}
        monkeypatch.setitem(sizes.TRANSFORMERS, make, (network, {**config, **small}))
    network = sizes.unet(make, sample_size=8).eval()
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 32)
    settings = Shift(1 / 4, 1 / 8, place)
    shift = cheapest_channels(network, settings, lambda: network(x, torch.tensor(7), text), 2)
    for _, runs in shift.rule:
        width = sum(num for num, _ in runs)
        counts = [sum(num for num, offsets in runs if offsets == (offset,)) for offset in (-1, 1)]
        assert counts == [width // 4, width // 8]
    ls.inflate(network, shift)
    with torch.no_grad(), frames(network, 4):
        assert network(x, torch.tensor(7), text).sample.isfinite().all()


def test_a_rule_says_how_many_channels_come_from_where():
    """The cheapest channels, and each distance gets cheap and dear ones alike."""
    unet = sizes.unet("tiny", sample_size=8).eval()
    x, text = torch.randn(2 * 3, 4, 8, 8), torch.randn(6, 5, 32)

    def measure() -> None:
        unet(x, 7, text)

    by_fractions = cheapest_channels(unet, Shift(1 / 4, 1 / 4), measure, 3)
    by_rule = cheapest_channels(
        unet, Shift(rule=lambda num: [-2] * (num // 8) + [0] * (num // 2) + [-1, (0, 1)] * (num // 8) + [3] * (num // 8)),
        measure, 3,
    )  # fmt: skip
    for (name, runs), (_, expected) in zip(by_rule.rule, by_fractions.rule, strict=True):
        found, moved = ([offsets for num, offsets in each for _ in range(num)] for each in (runs, expected))
        assert [offsets == (0,) for offsets in found] == [offsets == (0,) for offsets in moved], name
        counts = Counter(offsets for offsets in found if offsets != (0,))
        assert counts == dict.fromkeys([(-2,), (-1,), (0, 1), (3,)], len(found) // 8)


def test_a_run_is_frame_by_frame_and_the_network_is_left_as_it_was():
    unet = ls.inflate(sizes.unet("tiny", sample_size=8).eval(), Shift(edge="hold"))
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 32)

    def inside() -> None:
        with frames(unet, 2):
            unet(x, 7, text)

    with pytest.raises(ValueError, match="frame by frame, outside"):
        cheapest_channels(unet, Shift(), inside, 2)
    with pytest.raises(ValueError, match="num_frames=3 does not divide the batch of 4 frames"):
        cheapest_channels(unet, Shift(), lambda: unet(x, 7, text), 3)
    with pytest.raises(ValueError, match="for 16 channels"):
        cheapest_channels(unet, Shift(rule=lambda num: [0]), lambda: unet(x, 7, text), 2)
    cheapest_channels(unet, Shift(), lambda: unet(x, 7, text), 2)
    assert shift_of(unet) == Shift(edge="hold")
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_a_place_that_nothing_reads_is_refused():
    unet = sizes.unet("tiny")
    with pytest.raises(ValueError, match="is read by no layer"):
        cheapest_channels(unet, Shift(place="end"), lambda: None, 2)
    assert shift_of(unet) is None
    with pytest.raises(ValidationError, match="channels=cheapest needs a place whose channels a layer"):
        tiny_config("video", "x", model={"size": "tiny", "channels": "cheapest", "place": "end"})


def test_costs_that_say_nothing_are_refused():
    network = sizes.unet("tiny", sample_size=4)
    x, text = torch.full((4, 4, 4, 4), torch.nan), torch.randn(4, 5, 32)
    with pytest.raises(ValueError, match="clips of 2 frames or more, got 1"):
        cheapest_channels(network, Shift(), lambda: network(x, 0, text), 1)
    with pytest.raises(ValueError, match="run did not call "):
        cheapest_channels(network, Shift(), lambda: None, 2)
    with pytest.raises(ValueError, match="are not finite: check the weights and the clips"):
        cheapest_channels(network, Shift(), lambda: network(x, 0, text), 2)
    assert shift_of(network) is None


def test_training_measures_once_and_saves_the_channels(latents, image_model, tmp_path):
    settings = {"init": str(image_model), "channels": "cheapest", "edge": "hold"}
    run = tmp_path / "run"
    folder = train(tiny_config("video", latents, steps=2, model=settings), run)
    saved = json.loads((run / "channels.json").read_text())
    rule = saved["rule"]
    assert json.loads((folder / "model_index.json").read_text())["latent_shift"]["rule"] == rule
    pipe = loading.load(folder)
    clip = pipe("a red square", num_inference_steps=1, generator=ls.seed(0), chunk=2).frames
    assert clip.shape == (1, 4, 32, 32, 3)
    # A resumed run goes on with the same channels, although another start would give others.
    newest = checkpoint.steps(run)[-1]
    assert newest.name.endswith("2")
    reversed_rule = [[name, runs[::-1]] for name, runs in rule]
    (run / "channels.json").write_text(json.dumps({**saved, "rule": reversed_rule}))
    more = train(tiny_config("video", latents, steps=3, model=settings), run)
    assert dict(shift_of(loading.load(more).unet).rule) != dict(shift_of(pipe.unet).rule)
    # What another run without a checkpoint measured for other settings is measured again.
    quarter = {**settings, "forward": 0.25, "backward": 0.25}
    other = tmp_path / "other"
    other.mkdir()
    stage = DenoiserStage(
        tiny_config("video", latents, model=quarter), Prepared(str(latents), image_model, "no", other)
    )
    (other / "channels.json").write_text(json.dumps(saved))
    again = DenoiserStage(
        tiny_config("video", latents, model=quarter), Prepared(str(latents), image_model, "no", other)
    )
    assert shift_of(again.model) == shift_of(stage.model) != shift_of(pipe.unet)
    # Training goes on from a trained model with that model's channels, and with no others.
    going_on = tiny_config("video", latents, steps=1, model={**settings, "init": str(folder)})
    on = train(going_on, tmp_path / "on")
    assert shift_of(loading.load(on).unet) == shift_of(loading.load(more).unet)
    for other in ({"edge": "hold"}, quarter, {**settings, "rule": "tiny:two_back"}):
        with pytest.raises(ValueError, match=r"was trained to shift other channels"):
            checks.check_start(tiny_config("video", latents, model={**other, "init": str(folder)}), folder)


def test_a_rule_and_cheapest_channels_in_one_run(latents, image_model, tmp_path):
    """The channels are measured once for a run; a model that was trained without them goes on without them; an image model's own
    settings of the shift do not count."""
    mixed = {"rule": "latent_shift.rules:neighbors_and_mean", "channels": "cheapest", "place": "both"}
    image = train(
        tiny_config("image", latents, model={"size": "tiny", "rule": "tiny:two_back"}), tmp_path / "image"
    )
    config = tiny_config("video", latents, steps=1, model={"init": str(image), **mixed})
    folder = train(config, tmp_path / "run")
    saved = (tmp_path / "run" / "channels.json").read_text()
    stage = DenoiserStage(config, Prepared(str(latents), image, "no", tmp_path / "run"))
    assert (tmp_path / "run" / "channels.json").read_text() == saved
    assert shift_of(stage.model) == shift_of(loading.load(folder).unet)
    widths = {offsets for _, runs in shift_of(stage.model).rule for _, offsets in runs}
    assert widths == {(-1,), (0,), (1,), (-3, -2, -1, 0, 1, 2, 3)}
    plain = train(
        tiny_config("video", latents, steps=1, model={"init": str(image_model)}), tmp_path / "plain"
    )
    for other in (mixed, {"channels": "cheapest"}, {"channels": "cheapest", "forward": 0.1, "backward": 0.1}):
        with pytest.raises(ValueError, match=r"model\.channels is cheapest, but .* was trained with first"):
            checks.check_start(tiny_config("video", latents, model={"init": str(plain), **other}), plain)
