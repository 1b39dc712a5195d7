"""Compare the shift at the size of `emoji` with the paper's baseline (Latent-VDM: attention and convolution in time) and with nothing.

    python recipes/emoji/ablation.py

The video stage runs three times from the image model of build.py, 1,000 steps each, with the paper's edges and noise; nothing else
differs. Writes docs/results/archive/ablation-training.json and ablation.json. A trained model is not trained again.
"""

from __future__ import annotations

from build import SHORT_CLIPS, run

TEMPORAL = ("shift", "none", "attention")
PAPER = (
    "model.edge=zero diffusion.shared_noise=0.0 diffusion.noise_correlation=0.0 train.sample_shared_noise=0.0 "
    'train.sample_noise_correlation=0.0 \'data.val_splits=["val_combo", "val_concept"]\''
)

if __name__ == "__main__":
    run("python recipes/emoji/build.py", result="runs/emoji-image/model/model_index.json")
    for temporal in TEMPORAL:
        settings = f"{SHORT_CLIPS} {PAPER} optim.steps=1000 optim.ema=0.994 model.temporal={temporal}"
        run(
            f"latent-shift train recipes/emoji/video.toml --run runs/{temporal} {settings}",
            result=f"runs/{temporal}/model/model_index.json",
        )
    folders = " ".join(f"runs/{temporal}" for temporal in TEMPORAL)
    models = " ".join(f"-m {temporal}=runs/{temporal}/model" for temporal in TEMPORAL)
    run(f"latent-shift bench runs {folders} -o docs/results/archive/ablation-training.json")
    run(
        f"latent-shift eval data/emoji-128 {models} --num 100 --out evals/ablation -o docs/results/archive/ablation.json"
    )
