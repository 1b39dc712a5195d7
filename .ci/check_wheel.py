"""Build the wheel, check what is in it, install it in a fresh environment outside the repository, and run it there.

    python .ci/check_wheel.py [--constraint constraints.txt]

Standard library only: CI calls it before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_MB = 95  # package indexes refuse files above 100 MB
NEEDED = (
    "latent_shift/shift.py",
    "latent_shift/report/report.html",
    "latent_shift/serve/static/index.html",
    "latent_shift/serve/static/app.js",
    "latent_shift/weights/emoji/preview.safetensors",
    "latent_shift/assets/clip_merges.txt.gz",
    "latent_shift/assets/ucf101.txt",
    "latent_shift/weights/emoji/model_index.json",
    "latent_shift/weights/emoji/unet/diffusion_pytorch_model.safetensors",
    "latent_shift/weights/emoji/vae/diffusion_pytorch_model.safetensors",
    "latent_shift/weights/emoji/student.safetensors",
    "latent_shift/weights/emoji/tiny_vae/diffusion_pytorch_model.safetensors",
    "latent_shift/weights/emoji/text_encoder/model.safetensors",
    "latent_shift/weights/pixels/config.json",
    "latent_shift/weights/pixels/diffusion_pytorch_model.safetensors",
)
ALONE = """
import importlib, pkgutil, latent_shift
assert "site-packages" in latent_shift.__file__, latent_shift.__file__
names = [module.name for module in pkgutil.walk_packages(latent_shift.__path__, "latent_shift.") if not module.name.endswith("__main__")]
extra = {"fastapi", "starlette", "uvicorn", "prometheus_client"}
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (name.startswith("latent_shift.serve.") and error.name.partition(".")[0] in extra):
            raise
print(len(names), "modules import with the core dependencies, those of the server with its extra")
"""


def build(folder: Path) -> Path:
    """Build the wheel in `folder`."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_content(wheel: Path) -> None:
    """Exit unless the wheel holds the package, its weights and nothing else, in less than `MAX_MB`."""
    size_mb = wheel.stat().st_size / 1e6
    names = zipfile.ZipFile(wheel).namelist()
    problems = [f"lacks {name}" for name in NEEDED if name not in names]
    problems += [
        f"holds {name}"
        for name in names
        if name.split("/")[0] != "latent_shift" and ".dist-info/" not in name
    ]
    problems += [
        f"holds {name}" for name in names if "/tests/" in name or "/docs/" in name or name.endswith(".pyc")
    ]
    if size_mb >= MAX_MB:
        problems.append(f"takes {size_mb:.1f} MB, expected less than {MAX_MB}")
    if problems:
        sys.exit(f"{wheel.name}: " + "; ".join(problems))
    print(f"{wheel.name}: {size_mb:.1f} MB, {len(names)} files")


def run_installed(wheel: Path, folder: Path, constraint: str | None) -> None:
    """Install the wheel in a fresh environment and use it from a folder without a source tree."""
    venv.create(folder / "environment", with_pip=True)
    programs = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
    python, command = str(programs / "python"), str(programs / "latent-shift")
    constraints = ["-c", str(Path(constraint).resolve())] if constraint else []
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *constraints, str(wheel)],
        check=True,
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    clip = folder / "panda.mp4"
    for words in (
        [python, "-c", ALONE],
        [command, "models", "show", "emoji"],
        [command, "generate", "a dancing panda", "--steps", "2", "-o", str(clip)],
        [python, "-m", "pip", "list", "--format", "json"],
    ):
        result = subprocess.run(
            words, check=True, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True
        )
        if words[-1] != "json":
            print(result.stdout.rstrip())
    assert clip.stat().st_size > 1000
    versions = {package["name"]: package["version"] for package in json.loads(result.stdout)}
    print(
        "ran with", ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", "transformers"))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constraint", help="a constraints file for pip")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        wheel = build(Path(name))
        check_content(wheel)
        run_installed(wheel, Path(name), options.constraint)
