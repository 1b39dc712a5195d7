"""Rank ideas for a better shift: small models, some seeds each, and the loss at each noise level.

    python recipes/compare/run.py                       # every idea, three seeds of 180 steps
    python recipes/compare/run.py cheapest attention    # these alone
    python recipes/compare/run.py --full cheapest       # 600 steps, as in compare.py
    python recipes/compare/run.py --seeds 1             # the first seed alone
    python recipes/compare/run.py --network pixart      # a small transformer, PixArt's or Sana's, and its own ideas

Every model starts from one image model, for a U-Net that of compare.py, and sees the same clips, noise and timesteps. Writes
docs/results/ideas.json (ideas-full.json, ideas-pixart.json, ...) with what was measured before; that is not measured again, unless
settings or the image model have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import run
from compare import encode_latents

from latent_shift.data.latents import LatentStore
from latent_shift.evaluation.denoising import held_out_losses
from latent_shift.evaluation.features import digest
from latent_shift.files import write_json
from latent_shift.models.loading import open_network
from latent_shift.pipelines.loading import load
from latent_shift.shift import has_temporal_layers, inflate, shift_of

# Settings that differ from video.toml.
CHEAPEST = "model.edge=hold model.channels=cheapest"
UNET_IDEAS = {
    "shift": "",
    "hold": "model.edge=hold",
    "none": "model.temporal=none",
    "attention": "model.temporal=attention",
    "distances-zero": "model.rule=recipes.compare.rules:distances",
    "cheapest": CHEAPEST,
    "cheapest-distances": f"{CHEAPEST} model.rule=recipes.compare.rules:distances",
    "cheapest-mean": f"{CHEAPEST} model.rule=recipes.compare.rules:third_mean",
    "cheapest-quarter-mean": f"{CHEAPEST} model.rule=recipes.compare.rules:quarter_mean",
    "cheapest-sixth-mean": f"{CHEAPEST} model.rule=latent_shift.rules:neighbors_and_mean",
    "cheapest-eighth-mean": f"{CHEAPEST} model.rule=recipes.compare.rules:eighth_mean",
    "cheapest-blend": f"{CHEAPEST} model.rule=recipes.compare.rules:blend",
    "both-sixth": f"{CHEAPEST} model.place=both model.forward=0.1667 model.backward=0.1667",
    "both-sixth-mean": f"{CHEAPEST} model.place=both model.rule=latent_shift.rules:neighbors_and_mean",
    "both-sixth-mean-lr-2": f"{CHEAPEST} model.place=both model.rule=latent_shift.rules:neighbors_and_mean optim.shift_lr_scale=2",
}
TRANSFORMER_IDEAS = {
    "none": "model.temporal=none",
    "attention": "model.temporal=attention",
    "kv": "model.edge=hold model.place=kv",
    "attn": "model.edge=hold model.place=attn",
    "ffn": "model.edge=hold model.place=ffn",
    "both": "model.edge=hold model.place=both",
    "attn-distances": "model.edge=hold model.place=attn model.rule=recipes.compare.rules:distances",
    "kv-cheapest": f"{CHEAPEST} model.place=kv",
    "attn-sixth-mean": f"{CHEAPEST} model.place=attn model.rule=latent_shift.rules:neighbors_and_mean",
    "ffn-sixth-mean": f"{CHEAPEST} model.place=ffn model.rule=latent_shift.rules:neighbors_and_mean",
    "both-sixth-mean": f"{CHEAPEST} model.place=both model.rule=latent_shift.rules:neighbors_and_mean",
}
IDEAS = {"unet": UNET_IDEAS, "pixart": TRANSFORMER_IDEAS, "sana": TRANSFORMER_IDEAS}
FLOW = "diffusion.prediction=flow_prediction diffusion.zero_terminal_snr=false"
SHORT = "optim.steps=180 optim.warmup_steps=20 optim.cooldown_steps=60 optim.ema=0.97 train.validate_every=60 train.compile=false"
NUM_CLIPS, NUM_FRAMES = 96, 8


def image_model(network: str) -> str:
    """Return the folder of the image model that the ideas start from; a transformer is trained first."""
    if network == "unet":
        return "recipes/compare/image-model"
    folder = f"runs/ideas-{network}/image"
    run(
        f"latent-shift train recipes/compare/transformer-image.toml --run {folder} model.size={network}",
        result=f"{folder}/model/model_index.json",
    )
    return f"{folder}/model"


def measure(unet: ModelMixin, scheduler: SchedulerMixin, store: LatentStore) -> dict[str, float]:
    """Return the loss on held-out clips by timestep."""
    return held_out_losses(
        unet, DDPMScheduler.from_config(scheduler.config), store, splits=("val_combo", "val_animation"), num_clips=NUM_CLIPS,
        num_frames=NUM_FRAMES,
    )  # fmt: skip


def rows_of(rows: dict[str, dict], common: dict[str, str]) -> dict[str, dict]:
    """Return those rows, by idea and seed, whose training and image model are `common`: others cannot be compared with them."""
    comparable = {
        idea: {seed: row for seed, row in seeds.items() if common.items() <= row.items()}
        for idea, seeds in rows.items()
    }
    return {idea: seeds for idea, seeds in comparable.items() if seeds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ideas", nargs="*", metavar="idea", help="default: all")
    parser.add_argument("--network", choices=IDEAS, default="unet")
    parser.add_argument("--full", action="store_true", help="600 steps instead of 180")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds: expected 1 or more")
    ideas = IDEAS[options.network]
    if unknown := set(options.ideas) - set(ideas):
        parser.error(f"unknown {', '.join(sorted(unknown))}; expected some of {', '.join(ideas)}")
    encode_latents()
    init = image_model(options.network)
    name = (
        "ideas"
        + ("-full" if options.full else "")
        + (f"-{options.network}" if options.network != "unet" else "")
    )
    training = [
        f"model.init={init}",
        *([] if options.network == "unet" else [FLOW]),
        *([] if options.full else [SHORT]),
    ]
    common = {"training": " ".join(training), "image_model": digest(Path(init, "unet"))}
    result = Path("docs/results") / f"{name}.json"
    rows = rows_of(json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}, common)
    store = LatentStore("data/compare-latents")
    for idea in options.ideas or ideas:
        for seed in range(options.seeds):
            settings = {"settings": ideas[idea], **common}
            if settings.items() <= rows.get(idea, {}).get(str(seed), {}).items():
                continue
            # With other settings it is another run.
            number = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
            folder = f"runs/{name}/{idea}-seed-{seed}-{number}"
            run(
                f"latent-shift train recipes/compare/video.toml --run {folder} {ideas[idea]} {common['training']} train.seed={seed}",
                result=f"{folder}/model/model_index.json",
            )
            pipe = load(f"{folder}/model", device="cpu")
            losses = measure(pipe.unet, pipe.scheduler, store)
            row: dict = {**settings, "loss": losses}
            if seed == 0 and not has_temporal_layers(pipe.unet):
                start = open_network(Path(init, "unet"), UNet2DConditionModel, dtype=torch.float32).eval()
                row["loss_before_training"] = measure(
                    inflate(start, shift_of(pipe.unet)), pipe.scheduler, store
                )
            rows.setdefault(idea, {})[str(seed)] = row
            write_json(rows, result)
            print(idea, seed, {step: round(loss, 4) for step, loss in losses.items()}, flush=True)


if __name__ == "__main__":
    main()
