"""Measure what a network of the size of `emoji` needs to obey words for motions: which edge, which shift, and how many steps.

    python recipes/emoji/motion.py            # every variant
    python recipes/emoji/motion.py zero hold  # these alone

Ten things in each of the motions of compose.py are learned in 500 steps (one variant: 2,000), once for each of VARIANTS, from the weights of before
words.toml; nothing else differs. Then clips of these things are denoised with the right caption, and with that of another motion of
the same thing: how much larger the error of what changes from frame to frame is with the other caption says how much the network goes
by the words. At pure noise (t = 999) only a network that can tell which frame is the first has something to go by. And clips are
generated from captions it was trained on: how many show the motion they ask for. Writes docs/results/motion-words.json. A trained
model is not trained again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import compose
import numpy as np
import torch
from diffusers import DDPMScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import fetch_emoji, former_weights, run

from latent_shift.data.latents import LatentStore
from latent_shift.data.records import Record
from latent_shift.data.store_writer import PIXELS, StoreWriter, store_folder
from latent_shift.diffusion import training_target
from latent_shift.evaluation.detection import detected, requested
from latent_shift.files import write_json
from latent_shift.pipelines.loading import load
from latent_shift.runtime import seed
from latent_shift.shift import frames
from latent_shift.video.pixels import to_uint8

DATA, RESULT = Path("data/motion"), Path("docs/results/motion-words.json")
THINGS = (
    "pizza",
    "rocket",
    "cat face",
    "red heart",
    "automobile",
    "snake",
    "ghost",
    "star",
    "banana",
    "frog",
)
CLIPS_OF_EACH = 3
MIXED = "model.place=both model.channels=cheapest model.rule=latent_shift.rules:neighbors_and_mean"
FAR = MIXED.replace("latent_shift.rules:neighbors_and_mean", "recipes.compare.rules:near_and_far")
VARIANTS = {
    "hold": "model.edge=hold",
    "hold-2000-steps": "model.edge=hold optim.steps=2000",
    "zero": "model.edge=zero",
    "distances-zero": "model.edge=zero model.rule=recipes.compare.rules:distances",
    "mixed-hold": f"model.edge=hold {MIXED}",
    "mixed-zero": f"model.edge=zero {MIXED}",
    "near-and-far-hold": f"model.edge=hold {FAR}",
    "near-and-far-zero": f"model.edge=zero {FAR}",
}
SETTINGS = (
    "data.path=data/motion-latents data.batch_size=4 data.num_frames=16 data.window=first data.image_share=0.1 data.val_splits=[] "
    "diffusion.shared_noise=0.0 diffusion.independent_noise_prob=0.5 diffusion.timestep_shift=2.0 "
    "optim.lr=5e-4 optim.steps=500 optim.warmup_steps=50 optim.cooldown_steps=0 optim.ema=0.98 "
    "train.validate_every=500 train.sample_every=100000"
)
TIMESTEPS = (999, 950, 900, 800, 650)
CALL = {"num_inference_steps": 20, "guidance_scale": 2.0, "shared_noise": 0.0, "noise_correlation": 0.7}


def compose_motions() -> None:
    """Compose the clips as DATA."""
    emoji = Path("data/emoji")
    things, _ = compose.open_things(emoji)
    cutouts = compose.Cutouts(emoji, things)
    codes = [code for code, thing in things.items() if thing.names[0] in THINGS]
    with store_folder(DATA, PIXELS, source=str(emoji)) as (out, stale):
        writer = StoreWriter(out)
        for number, (code, motion) in enumerate((code, motion) for code in codes for motion in compose.VERBS):
            for turn in range(CLIPS_OF_EACH):
                rng = np.random.default_rng([number, turn])
                scene = compose.Scene(things=(code,), motion=motion)
                record = Record(
                    f"train/{code}/{motion}/{turn}", compose.captions(scene, things, rng), f"{code} {motion}", "train",
                    labels=compose.labels(scene),
                )  # fmt: skip
                writer.add(record, compose.render(scene, cutouts, rng))
        writer.close(stale=stale, dtype="uint8", fps=compose.FPS, size=compose.SIDE, source=str(emoji))


def start() -> str:
    """Return a copy of the former weights that counts as an image model, so that training may shift other channels."""
    path = Path("runs/motion/start")
    if not path.exists():
        partial = path.with_suffix(".partial")
        shutil.copytree(former_weights(), partial, dirs_exist_ok=True)
        index = json.loads((partial / "model_index.json").read_text(encoding="utf-8"))
        write_json({**index, "latent_shift": {}}, partial / "model_index.json")
        partial.rename(path)
    return str(path)


@torch.no_grad()
def effect_of_words(model: str) -> dict[str, dict[str, float]]:
    """Return, by timestep, the error with the right caption and how much larger it is with another."""
    store, pipe = LatentStore("data/motion-latents"), load(model, device="cpu")
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    by_motion = {
        (record.labels["thing"], record.labels["motion"]): index for index, record in enumerate(store.records)
    }
    motions = list(compose.VERBS)
    errors = {timestep: np.zeros(2) for timestep in TIMESTEPS}
    for (thing, motion), index in by_motion.items():
        other = motions[(motions.index(motion) + len(motions) // 2) % len(motions)]
        captions = [store.records[number].texts[0] for number in (index, by_motion[thing, other])]
        text = torch.from_numpy(store.embed(captions)).repeat_interleave(16, dim=0)
        latents = torch.from_numpy(store.window(index, 0, 16)[:, 0].astype(np.float32))
        for timestep in TIMESTEPS:
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
            t = torch.tensor([timestep])
            with frames(pipe.unet, 16):
                noisy = schedule.add_noise(latents, noise, t)
                output = pipe.unet(torch.cat([noisy, noisy]), t, text).sample
            error = output.unflatten(0, (2, 16)) - training_target(schedule, latents, noise, t)
            changing = error - error.mean(dim=1, keepdim=True)
            errors[timestep] += changing.square().mean(dim=(1, 2, 3, 4)).numpy() / len(by_motion)
    return {
        str(timestep): {
            "error": round(right, 4),
            "other_caption_percent": round(100 * (other / right - 1), 2),
        }
        for timestep, (right, other) in errors.items()
    }


def obeyed(model: str) -> float:
    """Return the fraction of clips that show the motion of their caption, of every third pair of a thing and a motion."""
    store, pipe = LatentStore("data/motion-latents"), load(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    shown = []
    for index in range(0, len(store.records), 3 * CLIPS_OF_EACH):
        record = store.records[index]
        clip = pipe(record.texts[0], generator=seed(index), **CALL).frames[0]
        shown.append(detected(to_uint8(clip))["motion"] == requested(record.labels)["motion"])
    return float(np.mean(shown))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", metavar="variant", help="default: all")
    variants = parser.parse_args().variants or list(VARIANTS)
    if unknown := sorted(set(variants) - set(VARIANTS)):
        parser.error(f"no variant {unknown[0]!r}: there are {', '.join(VARIANTS)}")
    fetch_emoji()
    if not (DATA / "store.json").exists():
        compose_motions()
    run(
        "latent-shift encode data/motion data/motion-latents --autoencoder emoji --texts emoji",
        result="data/motion-latents/store.json",
    )
    rows = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name in variants:
        settings = VARIANTS[name]
        run(
            f"latent-shift train recipes/emoji/video.toml --run runs/motion/{name} model.init={start()} {SETTINGS} {settings}",
            result=f"runs/motion/{name}/model/model_index.json",
        )
        model = f"runs/motion/{name}/model"
        rows[name] = {"settings": settings, "obeyed": obeyed(model), "timesteps": effect_of_words(model)}
        write_json(rows, RESULT)
        print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
