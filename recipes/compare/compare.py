"""Compare the parts of the shift, both baselines and no shift, with small models (6 M parameters) on the emoji data.

    python recipes/compare/compare.py            # train, measure, write the page
    python recipes/compare/compare.py seeds      # train and measure three seeds each of the systems of SEEDS
    python recipes/compare/compare.py image      # train the common image model anew, and delete what was trained from the old one
    python recipes/compare/compare.py page       # only write docs/page from what was measured

Every model starts from one image model and takes equally many steps; Video Diffusion Models, in pixels, gets as many multiplications.
A trained model is not trained again. Run it from the root of a clone, in an environment made by `make setup`.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import pack_emoji, run

# Settings that differ from recipes/compare/video.toml.
VARIANTS = {
    "shift": "",
    "shift-seed-1": "train.seed=1",
    "quarter": "model.forward=0.25 model.backward=0.25",
    "eighth": "model.forward=0.125 model.backward=0.125",
    "conv2": "model.place=conv2",
    "end": "model.place=end",
    "hold": "model.edge=hold",
    "wrap": "model.edge=wrap",
    "no-stills": "data.image_share=0.0",
    "half-stills": "data.image_share=0.5",
    "none": "model.temporal=none",
    "attention": "model.temporal=attention",
}
# What won among the ideas of run.py (docs/method.md, "A better shift").
MIXED = "model.edge=hold model.place=both model.channels=cheapest model.rule=latent_shift.rules:neighbors_and_mean"
# About as many steps with attention take as long as 600 with MIXED: `latent-shift bench training -m runs/compare/none/model`
# (docs/results.md says how exactly).
EQUAL_TIME_STEPS = 515
# Trainings that differ in the random numbers alone: `latent-shift report` and docs/tables.py show them as one system by their names.
SEEDS = {
    name if seed == 0 else f"{name}-seed-{seed}": f"{settings} train.seed={seed}".lstrip()
    for name, settings in {
        **{name: VARIANTS[name] for name in ("shift", "hold", "attention", "none")},
        "mixed": MIXED,
        "attention-equal-time": f"{VARIANTS['attention']} optim.steps={EQUAL_TIME_STEPS}",
    }.items()
    for seed in range(3)
}
MEASURED_ALIKE = "--num 60 --num-frames 8 --noise 0 0 --compile"
NOTE = (
    "shift, attention (the baseline Latent-VDM) and none are small models, trained for 600 steps from one image model; vdm (Video "
    "Diffusion Models, in pixels) was trained with as many multiplications as shift. shift was trained with several seeds: where single "
    "parts of the shift are changed, a difference no larger than the range over the seeds of shift means nothing. no-stills "
    "and half-stills spent none and half of their steps on single frames instead of one in five. emoji is emoji@20, the teacher of the package's model: larger, "
    "trained for hours and on a GPU, and sampling from noise that is correlated between frames; it shows what the shift can reach, not what "
    "holding its edges is worth."
)


def encode_latents() -> None:
    pack_emoji()
    run(
        "latent-shift encode data/emoji-128 data/compare-latents --autoencoder emoji --texts emoji --workers 2",
        result="data/compare-latents/store.json",
    )


def encode_pixels() -> None:
    pack_emoji(64)
    run(
        "latent-shift encode data/emoji-64 data/compare-pixels --autoencoder pixels --texts emoji --workers 2",
        result="data/compare-pixels/store.json",
    )


def train_image_model() -> None:
    """Train recipes/compare/image-model anew; models trained from the old one are deleted."""
    run("latent-shift train recipes/compare/image.toml --run runs/compare/image")
    for part in ("unet", "scheduler"):
        shutil.copytree(
            f"runs/compare/image/model/{part}", f"recipes/compare/image-model/{part}", dirs_exist_ok=True
        )
    shutil.copy("runs/compare/image/model/model_index.json", "recipes/compare/image-model")
    for name in ("image", *VARIANTS, *SEEDS):
        shutil.rmtree(f"runs/compare/{name}", ignore_errors=True)
    for folder in (
        "evals/parts-of-the-shift",
        "evals/systems",
        "evals/seeds",
        "runs/ideas",
        "runs/ideas-full",
    ):
        shutil.rmtree(folder, ignore_errors=True)


def train(variants: Mapping[str, str]) -> None:
    """Train the models of these names and settings."""
    for name, settings in variants.items():
        run(
            f"latent-shift train recipes/compare/video.toml --run runs/compare/{name} {settings}",
            result=f"runs/compare/{name}/model/model_index.json",
        )


def train_vdm() -> None:
    """Train Video Diffusion Models in pixels."""
    result = "runs/compare/vdm/model/model_index.json"
    run("latent-shift train recipes/compare/vdm-image.toml --run runs/compare/vdm-image", result=result)
    run("latent-shift train recipes/compare/vdm.toml --run runs/compare/vdm", result=result)


def measure(names: Iterable[str], out: str, result: str, further_runs: Iterable[str] = ()) -> None:
    """Evaluate the named models, and tabulate their training runs and further ones."""
    folders = " ".join(f"runs/compare/{name}" for name in (*names, *further_runs))
    run(f"latent-shift bench runs {folders} -o docs/results/{result}-training.json --force")
    models = " ".join(f"-m {name}=runs/compare/{name}/model" for name in names)
    run(
        f"latent-shift eval data/emoji-128 {MEASURED_ALIKE} --out {out} {models} -o docs/results/{result}.json --force"
    )


def measure_all() -> None:
    """Measure the variants; the baselines beside `emoji`; and `emoji` as a classifier."""
    measure(VARIANTS, "evals/parts-of-the-shift", "compare", ["vdm"])
    for name in ("shift", "attention", "none", "real"):  # the same clips; they are not generated twice
        shutil.copytree(f"evals/parts-of-the-shift/{name}", f"evals/systems/{name}", dirs_exist_ok=True)
    models = " ".join(
        f"-m {name}=runs/compare/{name}/model" for name in ("shift", "attention", "none", "vdm")
    )
    run(
        f"latent-shift eval data/emoji-128 {MEASURED_ALIKE} --out evals/systems {models} -m emoji=emoji@20 -o docs/results/systems.json --force"
    )
    run("latent-shift eval data/emoji-128 --protocol classes -m emoji=emoji@20 --out evals/classes")


def write_page() -> None:
    """Write docs/page, and a picture of it by Chromium where that is installed."""
    run(
        "latent-shift bench sweep -o docs/results/sweep.json --plots docs/results --force",
        result="docs/results/sweep.json",
    )
    columns = "--show shift --show attention --show none --show vdm --show emoji"
    tables = "--ablation evals/parts-of-the-shift --training docs/results/compare-training.json --classes evals/classes"
    plots = "--sweep docs/results/sweep.json --sweep docs/results/sweep-h200.json"
    run(f"latent-shift report docs/page evals/systems {columns} {tables} {plots} --note {shlex.quote(NOTE)}")
    if shutil.which("chromium") is None:
        print("docs/page.png: not written, because there is no chromium")
        return
    chromium = "chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=4000 --window-size=1100,1500"
    subprocess.run(
        [*chromium.split(), "--screenshot=docs/page.png", Path("docs/page/index.html").resolve().as_uri()],
        check=True,
    )
    run(
        "python -c \"from PIL import Image; page = Image.open('docs/page.png'); page.convert('RGB').quantize(128).save(page.filename, optimize=True)\""
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=["all", "seeds", "image", "page"], default="all")
    task = parser.parse_args().task
    if task != "page":
        encode_latents()
    if task == "image":
        train_image_model()
    if task == "seeds":
        train(SEEDS)
        measure(SEEDS, "evals/seeds", "seeds")
    if task == "all":
        encode_pixels()
        train(VARIANTS)
        train_vdm()
        measure_all()
    if task in ("all", "page"):
        write_page()
