"""Run the commands of the recipe scripts, each unless its result exists."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FORMER = "5233889"
"""The last commit with the weights of `emoji` from before words.toml."""


def environment() -> dict[str, str]:
    """Return the variables of a command: programs of this Python's environment come first, and no recipe reads from a hub."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"HF_HUB_OFFLINE": "1", **os.environ, "PATH": path}


def run(command: str, *, result: str | None = None) -> None:
    """Run a command of Python or `latent-shift` in this environment, unless its result exists; exit where it fails."""
    if result is None or not Path(result).exists():
        print(f"$ {command}", flush=True)
        program, *arguments = shlex.split(command)
        module = ["-m", "latent_shift"] if program == "latent-shift" else []
        try:
            subprocess.run([sys.executable, *module, *arguments], check=True, env=environment())
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # the command has said why


def fetch_emoji() -> None:
    """Fetch the emoji data set as data/emoji."""
    run("python recipes/emoji/fetch.py data/emoji", result="data/emoji/metadata.jsonl")


def pack_emoji(size: int = 128) -> None:
    """Fetch the emoji data set and pack it as data/emoji-SIZE, at 8 fps."""
    fetch_emoji()
    run(
        f"latent-shift data pack data/emoji data/emoji-{size} --size {size} --fps 8",
        result=f"data/emoji-{size}/store.json",
    )


def compose_emoji() -> None:
    """Fetch the emoji data set and compose clips of it as data/emoji-composed: 10,000 to train on, and those of protocol words."""
    fetch_emoji()
    run(
        "python recipes/emoji/compose.py data/emoji data/emoji-composed",
        result="data/emoji-composed/store.json",
    )


def compose_words() -> None:
    """Fetch the emoji data set and compose the clips of protocol words alone as data/emoji-words."""
    fetch_emoji()
    run(
        "python recipes/emoji/compose.py data/emoji data/emoji-words --num 0",
        result="data/emoji-words/store.json",
    )


def former_weights() -> str:
    """Return the folder of the weights of `emoji` from before words.toml, taken from the history of this repository."""
    folder = Path("runs/emoji-former")
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        archive, partial = folder.with_suffix(".zip"), folder.with_suffix(".partial")
        command = ["git", "archive", "-o", str(archive), f"{FORMER}:src/latent_shift/weights/emoji"]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"commit {FORMER} holds the former weights: a clone with the whole history is needed")
        shutil.unpack_archive(archive, partial)
        partial.rename(folder)
        archive.unlink()
    return str(folder)
