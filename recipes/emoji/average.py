"""Average the U-Nets of a model and of the model it was trained from: `python recipes/emoji/average.py MODEL INIT OUT --share 0.75`.

A model that is trained further on other data forgets some of what it knew. Between the weights before and after lie some that know
most of both (Wortsman et al. 2022, Robust fine-tuning of zero-shot models, https://arxiv.org/abs/2109.01903).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

FILE = "unet/diffusion_pytorch_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a diffusers folder")
    parser.add_argument("init", type=Path, help="the folder that it was trained from")
    parser.add_argument(
        "out", type=Path, help="a copy of MODEL with the averaged weights; replaced if it exists"
    )
    parser.add_argument("--share", type=float, required=True, help="of MODEL in the average, from 0 to 1")
    args = parser.parse_args()
    if not 0 <= args.share <= 1:
        parser.error(f"--share: expected a number from 0 to 1, got {args.share}")
    if args.out.exists() and not (args.out / "model_index.json").is_file():
        parser.error(f"{args.out} exists and is no model; expected a folder to make or a model to replace")
    if any(folder.resolve().is_relative_to(args.out.resolve()) for folder in (args.model, args.init)):
        parser.error(f"{args.out} holds MODEL or INIT; expected another folder")
    after, before = load_file(args.model / FILE), load_file(args.init / FILE)
    average = {
        name: before[name].float().lerp(weight.float(), args.share).to(weight.dtype)
        for name, weight in after.items()
    }
    partial = args.out.with_name(f"{args.out.name}.partial")
    shutil.copytree(args.model, partial, dirs_exist_ok=True)
    save_file(average, partial / FILE, {"format": "pt"})
    if args.out.exists():
        shutil.rmtree(args.out)
    partial.rename(args.out)


if __name__ == "__main__":
    main()
