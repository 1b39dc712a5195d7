"""Print a SHA-256 of what every sampling mode, every training stage and a small evaluation produce.

Run it before and after a change that must not alter any result, on the same machine:

    python tests/fingerprint.py > before.txt
    python tests/fingerprint.py | diff before.txt -

It uses the public functions and the command alone, so it runs on any layout of the package.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "536870912",
}  # fmt: skip

import numpy as np
import torch
from PIL import Image

import latent_shift as ls

SEEDS = (0, 1, 2)
TEXT = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


def sha256(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def modes() -> None:
    """Pixels of three seeds in every mode."""
    pipe = ls.load("emoji", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    print("mode distilled", sha256(pipe("fire", num_frames=6, generator=ls.seed(0)).frames), flush=True)
    pipe = ls.load("emoji@20", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    image, video = rng.random((128, 128, 3), np.float32), rng.random((6, 128, 128, 3), np.float32)
    mask = np.zeros((128, 128), np.float32)
    mask[:, 64:] = 1
    calls = {
        "text": {},
        "image alone": {"num_frames": 1},
        "negative prompt, weights": {"prompt": "a (red:1.4) heart", "negative_prompt": "blue"},
        "prompt travel": {"prompt": {0: "fire", 5: "a red heart"}},
        "two prompts": {"prompt": ["fire", "rocket"], "num_videos_per_prompt": 2},
        "no guidance": {"guidance_scale": 1.0},
        "independent noise": {"shared_noise": 0.0, "noise_correlation": 0.0},
        "loop": {"loop": True},
        "image": {"image": image},
        "image and last image": {"image": image, "last_image": image[::-1]},
        "image with strength": {"image": image, "strength": 0.5},
        "video": {"video": video, "num_frames": None},
        "inpainting": {"video": video, "mask": mask, "num_frames": None},
        "exact chunks": {"num_frames": 8, "chunk": 3, "halo": 2},
        "chunks of a loop": {"num_frames": 8, "chunk": 3, "halo": 2, "loop": True},
        "whole clip by chunk": {"chunk": 2},
    }
    for name, options in calls.items():
        for seed in SEEDS:
            arguments = {
                "prompt": "fire",
                "num_frames": 6,
                "num_inference_steps": 3,
                "generator": ls.seed(seed),
                **options,
            }
            print("mode", name, seed, sha256(pipe(**arguments).frames), flush=True)
    pipe.enable_free_init(num_iters=2)
    print(
        "mode FreeInit",
        sha256(pipe("fire", num_frames=6, num_inference_steps=3, generator=ls.seed(0)).frames),
    )
    pipe.disable_free_init()
    for name in (
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
    ):
        import diffusers

        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        print(
            "scheduler",
            name,
            sha256(pipe("fire", num_frames=6, num_inference_steps=3, generator=ls.seed(0)).frames),
        )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    ls.inflate(pipe.unet, ls.Shift(backward=0, edge="hold"))
    for seed in SEEDS:
        streamed = np.stack(
            list(pipe.stream("fire", num_frames=4, num_inference_steps=3, generator=ls.seed(seed)))
        )
        print("mode stream", seed, sha256(streamed), flush=True)


def command(*words: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "latent_shift", *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )


def media(folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for number, (name, colour) in enumerate(TEXT.items()):
        frames = np.full((20, 128, 128, 3), 255, np.uint8)
        for k in range(20):
            frames[k, 32 : 64 + number, 4 * k : 4 * k + 32] = colour
        first, *others = map(Image.fromarray, frames)
        first.save(
            folder / f"{name}.webp", save_all=True, append_images=others, duration=125, loop=0, lossless=True
        )
        rows.append({"file_name": f"{name}.webp", "text": [f"a {name} square", name], "concept": name})
    first.save(folder / "still.png")
    rows.append({"file_name": "still.png", "text": "a still square", "concept": "still", "split": "held_out"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def training(folder: Path) -> None:
    """Losses of ten steps of every stage, and the weights that come out."""
    command("data", "pack", media(folder / "media"), folder / "packed", "--size", 128, "--workers", 1)
    command("encode", folder / "packed", folder / "latents", "--autoencoder", "emoji", "--texts", "emoji")
    for path in sorted((folder / "latents" / "shards").glob("*.npy")):
        print("encode", path.stem, sha256(np.load(path)))
    common = "optim.steps=10 optim.lr=1e-3 optim.warmup_steps=2 train.precision=no train.log_every=1 train.sample_every=10".split()  # noqa: SIM905
    few = "train.sample_steps=2 "
    stages = {
        "autoencoder": ("autoencoder", "packed", "model.size=tiny data.batch_size=4 data.crop=64"),
        "image": ("image", "latents", few + "model.size=small data.batch_size=4 diffusion.min_snr=5.0"),
        "video": (
            "video",
            "latents",
            few + "model.size=small data.batch_size=2 data.num_frames=4 data.image_share=0.3 diffusion.prediction=v_prediction "
            "diffusion.zero_terminal_snr=true diffusion.shared_noise=0.5 diffusion.noise_correlation=0.5 diffusion.motion_weight=2.0 "
            "model.edge=hold optim.accumulate=2",
        ),
        "attention": ("video", "latents", few + "model.size=small data.batch_size=2 data.num_frames=4 model.temporal=attention"),
        "lora": ("video", "latents", few + "model.init=emoji@20 data.batch_size=1 data.num_frames=4 lora.rank=2 model.edge=hold "
                 "diffusion.prediction=v_prediction diffusion.zero_terminal_snr=true"),
    }  # fmt: skip
    for name, (stage, data, settings) in stages.items():
        (folder / f"{name}.toml").write_text(f'stage = "{stage}"\n')
        command(
            "train",
            folder / f"{name}.toml",
            "--run",
            folder / name,
            f"data.path={folder / data}",
            *common,
            *settings.split(),
        )
        for row in map(json.loads, (folder / name / "stats.jsonl").read_text().splitlines()):
            print(
                "train",
                name,
                row["step"],
                *(f"{key}={row[key]!r}" for key in ("loss", "grad_norm", "lr")),
                flush=True,
            )
        for path in sorted((folder / name / "model").rglob("*.safetensors")):
            print(
                "train", name, path.relative_to(folder / name), hashlib.sha256(tensors(path)).hexdigest()[:16]
            )
        for path in sorted((folder / name / "samples").glob("*.png")):
            print("train", name, path.name, sha256(np.asarray(Image.open(path))))


def tensors(path: Path) -> bytes:
    from safetensors.torch import load_file

    return b"".join(
        name.encode() + tensor.view(torch.uint8).numpy().tobytes()
        for name, tensor in sorted(load_file(path).items())
    )


def evaluation(folder: Path) -> None:
    """Records of three clips of the embedded model."""
    command(
        "eval", folder / "packed", "--protocol", "own", "--num", 3, "--num-frames", 4, "--steps", 2, "--out", folder / "evals",
        "-o", folder / "results.json",
    )  # fmt: skip
    (result,) = json.loads((folder / "results.json").read_text())
    for record in result["records"]:
        print("eval", record["measure"], *(repr(record[key]) for key in ("value", "low", "high", "samples")))
    for measure in result["skipped"]:
        print("eval skipped", measure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    modes()
    with tempfile.TemporaryDirectory() as name:
        training(Path(name))
        evaluation(Path(name))
