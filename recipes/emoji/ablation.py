"""Compare the shift at the size of `emoji` with the paper's baseline (Latent-VDM: attention and convolution in time) and with nothing.

    python recipes/emoji/ablation.py

The video stage runs three times from the image model of build.py, 1,000 steps each, with the paper's edges and noise; nothing else
differs. Writes docs/results/ablation-training.json and ablation.json. A trained model is not trained again.

The results in docs/results/archive come from runs with `optim.ema=0.999`, which averages the weights of all 1,000 steps; 0.994
averages those of about the last 170.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from build import prepare_data, train_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import run

# Clips of 8 frames, twice as many a step: this shift has no positional table, so what it learns does not depend on the length.
SHORT_CLIPS = (
    "optim.cooldown_steps=0 data.num_frames=8 data.batch_size=8 data.window=random data.image_share=0.4 diffusion.timestep_shift=3.0 "
    "diffusion.motion_weight=1.0 optim.lr=8e-4"
)
TEMPORAL = ("shift", "none", "attention")
PAPER = (
    "model.edge=zero diffusion.shared_noise=0.0 diffusion.noise_correlation=0.0 train.sample_shared_noise=0.0 "
    'train.sample_noise_correlation=0.0 \'data.val_splits=["val_combo", "val_animation"]\''
)

if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    prepare_data()
    train_image()
    for temporal in TEMPORAL:
        settings = f"{SHORT_CLIPS} {PAPER} optim.steps=1000 optim.ema=0.994 model.temporal={temporal}"
        run(
            f"latent-shift train recipes/emoji/video.toml --run runs/{temporal} {settings}",
            result=f"runs/{temporal}/model/model_index.json",
        )
    folders = " ".join(f"runs/{temporal}" for temporal in TEMPORAL)
    models = " ".join(f"-m {temporal}=runs/{temporal}/model" for temporal in TEMPORAL)
    run(f"latent-shift bench runs {folders} -o docs/results/ablation-training.json --force")
    run(
        f"latent-shift eval data/emoji-128 {models} --num 100 --out evals/ablation -o docs/results/ablation.json --force"
    )
