"""A shift of one's own, from a recipe to a saved model."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_config, two_back

import latent_shift as ls
from latent_shift.models import sizes
from latent_shift.pipelines import descriptions, loading
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
    assert "rule custom" in descriptions.describe(folder)["shift"]
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


def test_near_and_far_takes_as_many_channels_from_before_as_from_after():
    rule = sizes.load_rule("recipes.compare.rules:near_and_far")(96)
    counts = Counter(rule)
    assert all(counts[offset] == (12 if abs(offset) == 1 else 3) for offset in (-8, -4, -2, -1, 1, 2, 4, 8))
    assert counts[-3, -2, -1, 0, 1, 2, 3] == 12


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


@pytest.mark.parametrize(
    "rule",
    ["two_back", "tiny:no_such", "no_such_module:f", "tiny:COLOURS", "os.getcwd", "broken:f", "leaves:f"],
)
def test_a_wrong_name_is_told(rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("f = (")
    (tmp_path / "leaves.py").write_text("raise SystemExit")
    path = list(sys.path)
    with pytest.raises(ValueError, match=f"model.rule={rule}: expected "):
        sizes.load_rule(rule)
    assert sys.path == path
    with pytest.raises(ValueError, match=f"model.rule={rule}: expected "):  # before anything is packed
        checks.check_settings(
            tiny_config("video", "absent", model={"size": "tiny", "rule": rule}), tmp_path / "run"
        )


def test_what_a_rule_raises_names_the_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "nothing = lambda num: None\nshort = lambda num: [0]\nwrong = lambda num: {}[num]\n"
    )
    for name, problem in (
        ("nothing", "ValueError: the rule of the shift: expected one"),
        ("short", "ValueError: the rule of the shift has 1 off"),
        ("wrong", "KeyError: 16"),
    ):
        with pytest.raises(ValueError, match=rf"model\.rule=mine:{name}: fails for 16 channels \({problem}"):
            ls.inflate(sizes.unet("tiny", sample_size=4), Shift(rule=sizes.load_rule(f"mine:{name}")))


NO_OFFSETS = [
    0.5, -1.9, True, "1", (), (1, (2,)), 10**20, 1001, (0, -1001), None, np.bool_(True), np.float32(1), torch.tensor(0.7), torch.tensor(True),
    np.array([0.5, 1]),
]  # fmt: skip


@pytest.mark.parametrize("given", NO_OFFSETS)
def test_offsets_are_whole_numbers(given):
    """What is rounded, read as a flag or cut elsewhere would be a shift that nobody asked for."""
    with pytest.raises(ValueError, match="expected whole numbers from -1000 to 1000, or tuples of them"):
        ls.inflate(sizes.unet("tiny", sample_size=4), Shift(rule=lambda num: [given] * num))
    with pytest.raises(ValueError, match=r"the rule of the shift|expected rule as"):
        Shift(rule=[("norm", [(4, [given])])])


def test_offsets_may_be_of_any_integer_type():
    expected = Shift(rule=lambda num: [-1] * num).groups(4)
    for given in (
        np.full(4, -1),
        (np.int64(-1) for _ in range(4)),
        [[-1]] * 4,
        torch.full((4,), -1),
        np.full((4, 1), -1),
    ):
        assert Shift(rule=lambda num, given=given: given).groups(4) == expected


@pytest.mark.parametrize("rule", ["two_back", [-1, 0, 1], {0: 1}, [("norm", 3)], 3, [("a", []), ("a", [])]])
def test_a_rule_is_a_function_or_a_table(rule):
    with pytest.raises(ValueError, match=r"expected (rule as|each layer once)|the rule of the shift"):
        Shift(rule=rule)


@pytest.mark.parametrize("given", [{0: 1, 1: 0, 2: 0, 3: 0}, {-1, 0, 1, 2}])
def test_offsets_are_in_order(given):
    with pytest.raises(ValueError, match=r"expected one offset for each channel, got \{"):
        Shift(rule=lambda num: given).groups(4)


def test_a_rule_is_checked_before_anything_is_packed(image_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checked_early.py").write_text(
        "import torch\nshort = lambda num: [0]\ntensor = lambda num: torch.full((num,), -1)\n"
    )
    short, tensor = (
        tiny_config("video", "absent", model={"init": str(image_model), "rule": f"checked_early:{name}"})
        for name in ("short", "tensor")
    )
    with pytest.raises(ValueError, match="the rule of the shift has 1 offset for 16 channels"):
        checks.check_start(short, image_model)
    checks.check_start(tensor, image_model)


def test_a_table_is_of_one_place():
    shift = shift_of(ls.inflate(sizes.unet("tiny", sample_size=4), Shift(rule=two_back, place="both")))
    with pytest.raises(ValueError, match=r"other layers or of another place: 'down.*norm2' is not shifted"):
        ls.inflate(sizes.unet("tiny", sample_size=4), Shift(rule=shift.rule, place="conv1"))


def test_a_table_is_of_one_network():
    shift = shift_of(ls.inflate(sizes.unet("tiny", sample_size=4), Shift(rule=two_back)))
    with pytest.raises(ValueError, match="that of a network with other layers: it has none of the name ''"):
        ls.temporal_shift(torch.randn(4, 16, 2, 2), 4, shift)
    with pytest.raises(ValueError, match="expected the settings of an inflated network"):
        Shift(rule=two_back).is_causal  # noqa: B018


def test_a_run_keeps_its_channels(latents, image_model, tmp_path, monkeypatch):
    """Its checkpoints are of the offsets that the rule gave at the start."""
    monkeypatch.chdir(tmp_path)
    rule = {"offset": -1}
    monkeypatch.setattr("tiny.two_back", lambda num: [rule["offset"]] * num)
    settings, run = {"init": str(image_model), "rule": "tiny:two_back"}, tmp_path / "run"
    train(tiny_config("video", latents, steps=1, model=settings), run)
    train(tiny_config("video", latents, steps=2, model=settings), run)
    rule["offset"] = 2
    with pytest.raises(ValueError, match="has checkpoints of other channels"):
        train(tiny_config("video", latents, steps=3, model=settings), run)
    rule["offset"] = -1
    (run / "channels.json").unlink()
    with pytest.raises(ValueError, match="has checkpoints of other channels"):
        train(tiny_config("video", latents, steps=3, model=settings), run)


def test_a_rule_must_fit_the_layers():
    with pytest.raises(ValueError, match="has 3 offsets for 16 channels; expected one for each"):
        ls.inflate(sizes.unet("tiny", sample_size=4), Shift(rule=lambda num_channels: [0, 1, 2]))
    with pytest.raises(ValueError, match="has 1 offset for 16 channels"):
        ls.inflate(sizes.unet("tiny", sample_size=4), Shift(rule=lambda num_channels: [0]))
    with pytest.raises(ValidationError, match="backward have no effect beside rule"):
        tiny_config("video", "x", model={"size": "tiny", "rule": "tiny:two_back", "forward": 0.25})
