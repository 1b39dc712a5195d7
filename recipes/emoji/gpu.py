"""Train `emoji` on one GPU, away from the data: what `make emoji-gpu` runs.

    python recipes/emoji/gpu.py pack                     # where data/emoji is: data/emoji-small, a copy of it that travels
    python recipes/emoji/gpu.py train                    # on the GPU: composed clips, the last stage from the weights of the package, evaluation
    python recipes/emoji/gpu.py train --fraction 0.01    # the same with a hundredth of the clips and steps, on any machine

data/emoji-small is laid out as data/emoji: the stills as they are, and of each animation without a skin tone the first 16 frames at
8 fps. The measures and the weights go to out/emoji-gpu, the weights in pieces of 15 MB (`cat model.tar.* | tar x`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from compose import FPS, read_animation
from rich.progress import track
from splits import TONES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import run

SOURCE, SMALL = Path("data/emoji"), Path("data/emoji-small")
SIDE = 128
PIECE = 15 * 2**20


def shorten(path: Path) -> None:
    """Write the first frames of an animation, smaller, into `SMALL`."""
    first, *others = (frame.resize((SIDE, SIDE)) for frame in read_animation(path))
    first.save(
        SMALL / "clips" / path.name, save_all=True, append_images=others, duration=1000 // FPS, quality=70, method=4
    )  # fmt: skip


def pack(workers: int) -> None:
    records = [
        json.loads(line) for line in (SOURCE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    plain = [record for record in records if not any(tone in record["file_name"] for tone in TONES)]
    for name in ("clips", "stills", "packages"):
        (SMALL / name).mkdir(parents=True, exist_ok=True)
    names = next((SOURCE / "packages").glob("emojibase-data-*.tgz"))
    with tarfile.open(names) as source, tarfile.open(SMALL / "packages" / names.name, "w:gz") as target:
        member = source.getmember("package/en/data.json")
        target.addfile(member, source.extractfile(member))
    clips = [SOURCE / record["file_name"] for record in plain if record["file_name"].startswith("clips/")]
    for record in plain:
        if record["file_name"].startswith("stills/"):
            shutil.copy(SOURCE / record["file_name"], SMALL / "stills")
    with ProcessPoolExecutor(workers) as pool:
        list(track(pool.map(shorten, clips, chunksize=8), "animations", len(clips)))
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in plain)
    (SMALL / "metadata.jsonl").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in SMALL.rglob("*") if path.is_file())
    print(f"{SMALL}: {len(plain)} files, {size / 1e6:.0f} MB")


def train(fraction: float, workers: int, device: str) -> None:
    """Compose and encode the clips, train the weights of the package further, and measure the model.

    Args:
        fraction: of the clips, steps and prompts. Below 1 batches are those of a CPU.
        workers: processes that compose and decode.
        device: of the networks.
    """
    start = time.monotonic()
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    whole = fraction == 1
    name = "emoji-gpu" if whole else f"emoji-gpu-{fraction:g}"
    data, runs, out = Path("data") / name, Path("runs") / f"{name}-away", Path("out") / name

    def part(num: int) -> int:
        return max(2, round(num * fraction))

    run(f"python recipes/emoji/compose.py {SMALL} {data}/composed --num {part(10000)} --workers {workers}")
    run(f"latent-shift data pack {SMALL} {data}/emoji --size 128 --fps 8 --workers {workers}")
    for pixels in ("emoji", "composed"):
        run(
            f"latent-shift encode {data}/{pixels} {data}/latents-{pixels} --autoencoder emoji --texts emoji --device {device}"
        )
    run(
        f"latent-shift train recipes/emoji/gpu.toml --run {runs} 'data.path={data}/latents-*' "
        f"optim.steps={part(3000)} optim.warmup_steps={part(300)} optim.cooldown_steps={part(1500)} train.validate_every={part(1000)} "
        f"data.loaders={max(1, workers // 2)} data.batch_size={128 if whole else 4} train.compile={str(whole).lower()}"
    )
    evaluations = {
        "emoji": (f"{data}/emoji --protocol emoji", 100),
        "animation": (f"{data}/emoji --protocol own --split val_animation", 30),
        "words": (f"{data}/composed --protocol words", 400),
    }
    for task, (protocol, num) in evaluations.items():
        fewer = "" if whole else f"--num {part(num)}"
        run(
            f"latent-shift eval {protocol} -m {runs}/model {fewer} --device {device} --out {out}/{task} -o {out}/{task}.json --force"
        )
    with tarfile.open(out / "model.tar", "w") as tar:
        tar.add(runs / "model" / "unet", "unet")
    split(out / "model.tar")
    print(f"done in {time.monotonic() - start:.0f} s")


def split(path: Path) -> None:
    """Replace a file by pieces of `PIECE` bytes."""
    for piece in path.parent.glob(f"{path.name}.*"):
        piece.unlink()
    with path.open("rb") as file:
        number = 0
        while block := file.read(PIECE):
            path.with_name(f"{path.name}.{number:02}").write_bytes(block)
            number += 1
    path.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    for name in ("pack", "train"):
        tasks.add_parser(name).add_argument("--workers", type=int, default=os.cpu_count() or 1)
    training = tasks.choices["train"]
    training.add_argument(
        "--fraction", type=float, default=1.0, help="of the clips and steps; 1 also takes a GPU's batches"
    )
    training.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.task == "pack":
        pack(options.workers)
    elif not 0.002 <= options.fraction <= 1:
        parser.error(f"--fraction: expected a number from 0.002 to 1, got {options.fraction}")
    else:
        train(options.fraction, options.workers, options.device)
