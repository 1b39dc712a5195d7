"""A shift of one's own, from a recipe to a saved model."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError
from tiny import tiny_config, two_back

import latent_shift as ls
from latent_shift.models import sizes
from latent_shift.pipelines import catalog, loading
from latent_shift.shift import Shift, reach, shift_of
from latent_shift.training import checks
from latent_shift.training.loop import train


def test_a_rule_is_named_in_a_recipe_and_its_offsets_are_saved(latents, image_model, tmp_path):
    settings = {"init": str(image_model), "rule": "tiny:two_back", "edge": "hold"}
    folder = train(tiny_config("video", latents, steps=1, model=settings), tmp_path / "run")
    index = json.loads((folder / "model_index.json").read_text())
    assert ["mid_block.resnets.0.norm1", [[16, [-2]], [16, [0]]]] in index["latent_shift"]["rule"]
    pipe = loading.load(folder)
    assert shift_of(pipe.unet) == shift_of(ls.inflate(pipe.unet, Shift(rule=two_back, edge="hold")))
    num_layers = reach(ls.inflate(sizes.unet("tiny", sample_size=4)))[0]
    assert reach(pipe.unet) == (2 * num_layers, 0)
    assert "rule of its own" in catalog.describe(folder)["shift"]
    pipe.save_pretrained(tmp_path / "again")
    clips = [
        loading.load(path)("a red square", num_inference_steps=1, generator=ls.seed(0)).frames
        for path in (folder, tmp_path / "again")
    ]
    assert np.array_equal(*clips)
    stream = list(pipe.stream("a red square", num_frames=3, num_inference_steps=1, generator=ls.seed(0)))
    assert len(stream) == 3


@pytest.mark.parametrize("num_channels", [6, 8, 64, 320])
def test_neighbors_and_mean_are_a_sixth_each(num_channels):
    rule = sizes.load_rule("latent_shift.rules:neighbors_and_mean")(num_channels)
    counts = Counter(rule)
    assert counts == {
        -1: num_channels // 6, 1: num_channels // 6, (-3, -2, -1, 0, 1, 2, 3): num_channels // 6,
        0: num_channels - 3 * (num_channels // 6),
    }  # fmt: skip


def test_training_goes_on_with_the_same_rule_alone(latents, image_model, tmp_path):
    settings = {"init": str(image_model), "rule": "tiny:two_back"}
    folder = train(tiny_config("video", latents, steps=1, model=settings), tmp_path / "run")
    for rule, message in (("tiny:two_back", None), (None, "was trained to shift other channels")):
        config = tiny_config("video", latents, steps=1, model={"init": str(folder), "rule": rule})
        if message is None:
            checks.check_start(config, folder)
        else:
            with pytest.raises(ValueError, match=message):
                checks.check_start(config, folder)


@pytest.mark.parametrize("rule", ["two_back", "tiny:no_such", "no_such_module:f", "tiny:COLOURS"])
def test_a_wrong_name_is_told(rule):
    with pytest.raises(ValueError, match=f"model.rule={rule}: expected "):
        sizes.load_rule(rule)


def test_a_rule_must_fit_the_layers():
    with pytest.raises(ValueError, match="has 3 offsets for 16 channels; expected one for each"):
        ls.inflate(sizes.unet("tiny", sample_size=4), Shift(rule=lambda num_channels: [0, 1, 2]))
    with pytest.raises(ValidationError, match="backward have no effect beside rule"):
        tiny_config("video", "x", model={"size": "tiny", "rule": "tiny:two_back", "forward": 0.25})
