"""Recipes: settings are used as written, and every mistake is reported before anything is read."""

from pathlib import Path

import pytest

from latent_shift.config import (
    Config,
    Data,
    Diffusion,
    Lora,
    Loss,
    Model,
    Optim,
    Train,
)
from latent_shift.recipe import RENAMED_KEYS, dump, load
from latent_shift.training.optimizer import learning_rate

RECIPE = """
stage = "image"
[data]
path = "latents"
[model]
size = "emoji"
[optim]
steps = 100
lr = 1e-3
warmup_steps = 10
cooldown_steps = 20
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_load_applies_overrides_and_reads_back_a_dump(recipe, tmp_path):
    config = load(
        recipe,
        ["optim.lr=5e-4", "data.path=/elsewhere/a b", "train.tracker=wandb", 'data.splits=["train", "val"]'],
    )
    assert config.optim.lr == 5e-4
    assert config.data.path == "/elsewhere/a b"
    assert config.train.tracker == "wandb"
    assert config.data.splits == ["train", "val"]
    (tmp_path / "again.toml").write_text(dump(config))
    assert load(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], r"recipe.toml: unknown key optim.lrr; did you mean optim.lr\?"),
        (["sage='image'"], r"unknown key sage; did you mean stage\?"),
        (["optim.lr='fast'"], "optim.lr: Input should be a valid number, got 'fast'"),
        (["optim.steps=1.5"], "optim.steps: Input should be a valid integer"),
        (["optim.steps=0"], "optim.steps: Input should be greater than or equal to 1, got 0"),
        (
            ["stage=movie"],
            "stage: Input should be 'autoencoder', 'tiny_autoencoder', 'image', 'video' or 'distill', got 'movie'",
        ),
        (["stage=video"], "stage video needs data.num_frames of 2 or more"),
        (["data.num_frames=4"], "trains on single frames: data.num_frames must be 1"),
        (["model.init=there"], "give either size"),
        (["optim.cooldown_steps=95"], "together are more than optim.steps"),
        (["diffusion.prediction=flow_prediction", "diffusion.schedule=linear"], "have no effect on a flow"),
        (["diffusion.zero_terminal_snr=true"], "zero_terminal_snr needs prediction v_prediction"),
        (["loss.kl=0.1"], "loss.kl has no effect in stage image: leave it out"),
        (["data.image_share=0.5"], "data.image_share has no effect in stage image"),
        (["model.channels=cheapest"], "model.channels has no effect in stage image"),
        (["model.rule=''"], "model.rule: String should have at least 1 character"),
        (
            ["diffusion.num_timesteps=1"],
            "diffusion.num_timesteps: Input should be greater than or equal to 2",
        ),
        (
            ["stage=autoencoder", "diffusion.min_snr=5.0"],
            "diffusion.min_snr has no effect in stage autoencoder",
        ),
        (["stage=autoencoder", "data.mirror=true"], "data.mirror has no effect in stage autoencoder"),
        (
            ["stage=autoencoder", "train.shard=true"],
            "got stage autoencoder and optim.optimizer=adamw",
        ),
        (
            ["optim.optimizer=adamw8bit", "train.shard=true"],
            "and optim.optimizer=adamw8bit",
        ),
        (["optim.optimizer=muon", "train.shard=true"], "and optim.optimizer=muon"),
        (["optim.optimizer=muon", "lora.rank=32"], "muon moves whole weights, not a lora"),
        (["train.seed=-1"], "train.seed: Input should be greater than or equal to 0"),
        (["data.splits=[]"], "data.splits: List should have at least 1 item"),
        (["optim.lr=inf"], "optim.lr: Input should be a finite number"),
        (["optim.lr"], "expected table.key=value, got 'optim.lr'"),
        (["stage.name=1"], "stage is a value, not a table"),
    ],
)
def test_load_names_mistakes(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(recipe, overrides)


def test_load_names_mistakes_in_a_lora(recipe):
    with pytest.raises(ValueError, match=r"unknown key lora\.rnk; did you mean lora\.rank\?"):
        load(recipe, ["lora.rnk=3"])


def test_load_names_unreadable_recipes(tmp_path):
    (tmp_path / "bad.toml").write_text("stage = [")
    for name in ("bad.toml", "absent.toml"):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)


def test_load_takes_renamed_keys_with_a_notice(recipe, caplog):
    video = ["stage=video", "data.num_frames=4", "diffusion.shared_noise=0.5"]
    assert load(recipe, [*video, "diffusion.independent_share=0.25"]).diffusion.independent_noise_prob == 0.25
    assert "diffusion.independent_share is now called diffusion.independent_noise_prob" in caplog.text
    caplog.clear()
    recipe.write_text(RECIPE + "[diffusion]\nindependent_share = 0.5\n")
    assert load(recipe, video).diffusion.independent_noise_prob == 0.5
    assert (
        f"{recipe}: diffusion.independent_share is now called diffusion.independent_noise_prob" in caplog.text
    )
    assert (
        load(recipe, [*video, "diffusion.independent_noise_prob=0.75"]).diffusion.independent_noise_prob
        == 0.75
    )
    recipe.write_text(RECIPE + "[diffusion]\nindependent_share = 0.5\nindependent_noise_prob = 0.5\n")
    with pytest.raises(
        ValueError,
        match=r"independent_share is the old name of diffusion\.independent_noise_prob: leave it out",
    ):
        load(recipe, video)


def test_renamed_keys_point_to_present_ones():
    for old, new in RENAMED_KEYS.items():
        (old_table, old_key), (new_table, new_key) = old.split("."), new.split(".")
        assert old_key not in Config.model_fields[old_table].annotation.model_fields
        assert new_key in Config.model_fields[new_table].annotation.model_fields


def test_every_key_has_a_description():
    for section in (Data, Model, Lora, Diffusion, Loss, Optim, Train):
        for key, field in section.model_fields.items():
            assert field.description and field.description.endswith(".") and "\n" not in field.description, (
                key
            )


def test_every_recipe_loads():
    recipes = sorted(Path(__file__).parent.parent.glob("recipes/**/*.toml"))
    assert {load(recipe).stage for recipe in recipes} == {
        "autoencoder",
        "tiny_autoencoder",
        "image",
        "video",
        "distill",
    }


def test_learning_rate_rises_stays_and_falls(recipe):
    config = load(recipe)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9:80] == [1e-3] * 71
    assert rates[90] == pytest.approx(5e-4)
    assert rates[99] == pytest.approx(5e-5)


RECIPES = [
    path
    for path in sorted((Path(__file__).parents[1] / "recipes").rglob("*.toml"))
    if "autoencoder" not in path.name
]  # which have no clips


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_load_makes_each_baseline_one_override_away(path):
    """A recipe's shift goes with the baseline; what an override says of the shift still contradicts it."""
    for temporal in ("attention", "none", "shift"):
        if temporal == "attention" and load(path).lora:
            with pytest.raises(ValueError, match="are new, and a lora only adds to trained weights"):
                load(path, ["model.temporal=attention"])
            continue
        model = load(path, [f"model.temporal={temporal}"]).model
        assert model.temporal == temporal
        if temporal != "shift":
            defaults = Model(init="x", temporal=temporal)
            assert (model.place, model.forward, model.backward, model.edge) == (
                defaults.place, defaults.forward, defaults.backward, defaults.edge,
            )  # fmt: skip
    with pytest.raises(ValueError, match="edge has no effect on temporal=none: leave it out"):
        load(path, ["model.edge=wrap", "model.temporal=none"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", "codec can't decode"), (b"a = " + b"[" * 5000, "r.toml: "), (b"[data]\npath = ", "r.toml: ")],
)
def test_load_names_a_file_that_is_no_toml(tmp_path, content, message):
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "r.toml")
    assert str(error.value).startswith(f"{tmp_path / 'r.toml'}: ")
