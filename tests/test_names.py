"""The names of what a model was trained on: written, searched, and printed for prompts that are far from all of them."""

import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from latent_shift.cli.main import app
from latent_shift.models.loading import open_text_encoder, open_tokenizer
from latent_shift.models.names import FILE, embedder, parts, read_names, write_names
from latent_shift.pipelines import catalog

runner = CliRunner()


def test_parts_of_a_prompt_are_its_short_runs_of_words():
    assert parts("a sly fox") == ["a sly fox", "sly", "fox", "a sly", "sly fox"]
    assert parts("two red foxes on a blue background")[:3] == ["foxes on a", "foxes", "foxes on"]
    assert parts("an orange") == ["an orange", "orange"]
    assert parts("of the") == ["of the"]
    assert parts("puppies") == ["puppies", "puppy"]
    assert parts("glass bus") == ["glass bus", "glass", "bus"]
    assert parts("") == [""]
    assert "dog’s tail" in parts("the dog’s tail, (wagging:1.3)")
    assert max(len(part.split()) for part in parts("a lazy dog sleeps under trees")[1:]) == 4


def test_names_are_found_by_word_and_by_meaning(tmp_path):
    assert read_names(tmp_path) is None
    rows = np.eye(3, dtype=np.float32)
    write_names(tmp_path, ["snake", "Snail", "sea lion’s"], rows, 0.75)
    names = read_names(tmp_path)
    assert (names.names, names.threshold) == (("snake", "Snail", "sea lion’s"), 0.75)
    assert names.search("sna") == ["Snail", "snake"]
    assert names.search("") == ["Snail", "sea lion’s", "snake"]
    meaning = {
        "slow snails": (0.6, 0.8, 0),
        "slow snail": (0.6, 0, 0.8),
        "slow": (0, 0, 1),
        "snails": (0, 0.9, 0.43),
        "snail": (0, 1, 0),
    }
    nearest = names.nearest("slow snails", lambda texts: np.array([meaning[text] for text in texts]), num=2)
    assert nearest == [("Snail", 1.0), ("sea lion’s", 1.0)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no tensors"),
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"threshold", b"thresh_ld")),
        lambda path: write_names(path.parent, ["one"], np.eye(2), 0.5),
    ],
)
def test_damaged_names_are_one_line(tmp_path, damage):
    write_names(tmp_path, ["one", "two"], np.eye(2), 0.5)
    damage(tmp_path / FILE)
    with pytest.raises(ValueError, match=FILE):
        read_names(tmp_path)


def test_embeddings_do_not_depend_on_the_batch(video_model):
    tokenizer, encoder = (
        open_tokenizer(video_model / "tokenizer"),
        open_text_encoder(video_model / "text_encoder"),
    )
    texts = ["red", "a longer text with more words", "blue"]
    embed = embedder(tokenizer, encoder)
    rows = embed(texts)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rows, np.concatenate([embed([text]) for text in texts]), atol=1e-4)


def test_generate_and_show_tell_what_a_model_knows(video_model, tmp_path):
    model = shutil.copytree(video_model, tmp_path / "model")
    embed = embedder(open_tokenizer(model / "tokenizer"), open_text_encoder(model / "text_encoder"))
    show = ["models", "show", str(model), "--names"]
    result = runner.invoke(app, show)
    assert "has no list of names (names.safetensors)" in str(result.exception)
    names = ["red", "dark blue", "green"]
    # So near to one another are all texts of an untrained encoder: only the very name is known.
    write_names(model, names, embed(names), 1 - 1e-6)
    assert runner.invoke(app, show).stdout == "dark blue\ngreen\nred\n"
    assert runner.invoke(app, [*show[:3], "BLUE", "--names"]).stdout == "dark blue\n"
    assert "pink: in none of the 3 names" in str(runner.invoke(app, [*show[:3], "pink", "--names"]).exception)
    assert "searched for with --names" in str(runner.invoke(app, [*show[:3], "pink"]).exception)
    generate = [
        "--model",
        str(model),
        "--num-frames",
        "1",
        "--steps",
        "1",
        "-o",
        str(tmp_path / "a.png"),
        "--force",
    ]
    assert "is far from" not in runner.invoke(app, ["generate", "red", *generate]).stderr
    far = runner.invoke(app, ["generate", "something else", *generate]).stderr
    assert far.count("'something else' is far from all that") == 1
    assert all(name in far for name in names)
    # A clip needs no names.
    write_names(model, names, np.eye(3), 0.5)
    result = runner.invoke(app, ["generate", "red", *generate])
    assert result.exit_code == 0 and "its embeddings have 3 numbers" in result.stderr
    (model / FILE).write_bytes(b"damaged")
    result = runner.invoke(app, ["generate", "red", *generate])
    assert result.exit_code == 0 and "expected the names of a model" in result.stderr


def test_the_embedded_model_carries_its_names():
    known = read_names(catalog.folder("emoji"))
    assert len(known.names) == len(set(known.names)) > 1500
    assert {"dragon", "panda", "pizza", "car", "puppy"} < set(known.names)
    folder = catalog.folder("emoji")
    embed = embedder(open_tokenizer(folder / "tokenizer"), open_text_encoder(folder / "text_encoder"))
    for prompt, is_known in (
        ("a spinning pizza", True),
        ("two kittens on a red background", True),
        ("stock market crash", False),
        ("a green blorptangle", False),
        ("two red staplers on a blue background", False),
    ):
        assert (known.nearest(prompt, embed)[0][1] >= known.threshold) is is_known, prompt
