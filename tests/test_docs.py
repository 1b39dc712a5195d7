"""Every command and every example of the README runs, with two steps and the tiny size where it would train."""

import itertools
import re
import runpy
import shlex
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

import latent_shift as ls
from latent_shift.cli import main
from latent_shift.data.pack import pack

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
QUICK = {
    "train": ["optim.steps=2", "optim.warmup_steps=1", "optim.cooldown_steps=0", "train.precision=no", "data.batch_size=2"],
    "eval": ["--steps", "1"],
}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def quick(words: list[str]) -> list[str]:
    """A command of a page with the settings that make it quick."""
    if words[:2] == ["data", "check"]:
        return [*words, "--frames", "4"]
    if words[0] == "train" and "finetune" in words[1]:
        return [*words, *QUICK["train"], "data.num_frames=4", "optim.accumulate=1", "train.sample_steps=1"]
    if words[0] == "train":
        stage = (["data.crop=32", "model.size=tiny"] if "autoencoder" in words[1] else []) + (
            ["data.num_frames=4"] if "video" in words[1] else []
        )
        return [*words, *stage, *QUICK["train"]]
    if words[0] == "eval":
        return [*words, "--num", "2", *QUICK["eval"]]
    if words[0] == "generate":
        given = "--num-frames" in words or "--then" in words or "--video" in words  # the page's own number
        return [*words, "--steps", "3" if "--strength" in words else "1", *([] if given else ["--num-frames", "3"])]
    return words


@pytest.mark.parametrize(
    ("name", "least"),
    [("README.md", 10), ("docs/modes.md", 12), ("docs/checkpoints.md", 3), ("docs/training.md", 7), ("docs/evaluation.md", 2)],
)
def test_every_command(name, least, media, image_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    shutil.copytree(media, "my-videos")
    shutil.copytree(image_model, "my-checkpoint")
    (tmp_path / "docs" / "modes").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "modes" / "mask.png", "docs/modes")
    if name == "docs/evaluation.md":
        pack(media, "data/mine", size=128, fps=8)
        shutil.copytree(ROOT / "src" / "latent_shift" / "weights" / "emoji", "runs/emoji-mine/model")
    commands = [
        line for block in blocks("bash", (ROOT / name).read_text()) for line in block.splitlines() if line.startswith("latent-shift")
    ]
    assert len(commands) >= least
    for line in commands:
        words = quick(shlex.split(line, comments=True)[1:])
        result = CliRunner().invoke(main.app, words, catch_exceptions=False)
        assert result.exit_code == 0, (line, result.output)
        outputs = [word for flag, word in itertools.pairwise(words) if flag == "-o"]
        assert all((tmp_path / output).exists() for output in outputs), line
    if name == "README.md":
        assert np.asarray(Image.open("rocket.png")).shape == (128, 128, 3)
        assert {path.name for path in tmp_path.glob("*.*")} >= {"heart.mp4", "fire.gif", "preview.png", "rocket.png", "a-red-heart.mp4"}


@pytest.mark.parametrize("name", ["docs/modes.md", "docs/checkpoints.md"])
def test_every_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = ls.load

    def one_step(*args):
        pipe = load(*args)
        pipe.call_defaults["num_inference_steps"] = 1
        return pipe

    monkeypatch.setattr(ls, "load", one_step, raising=False)
    examples = blocks("python", (ROOT / name).read_text())
    assert examples
    for example in examples:
        exec(example, {})


def test_the_pipeline_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = ls.load

    def quick(*args):
        pipe = load(*args)
        pipe.call_defaults["num_inference_steps"] = 1
        return pipe

    monkeypatch.setattr(ls, "load", quick, raising=False)
    names: dict = {}
    exec(blocks("python")[0], names)
    assert (tmp_path / "rocket.mp4").exists()
    assert names["clip"].shape == names["flag"].shape == (16, 128, 128, 3)
    assert names["image"].shape == (1, 128, 128, 3)


def test_the_method_example(video_model):
    example = blocks("python")[1].replace('"any/stable-diffusion"', repr(str(video_model)))
    names: dict = {}
    with torch.no_grad():
        exec(example, names)
    assert names["epsilon"].shape == (32, 4, 64, 64)
    assert ls.shift_of(names["unet"]) is None


@pytest.mark.parametrize("name", ["README.md", "docs/evaluation.md"])
def test_tables_are_of_the_results(name):
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    assert name in tables["PAGES"]
    assert tables["with_tables"](name) == (ROOT / name).read_text(), "make tables"


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/modes.md",
        "docs/checkpoints.md",
        "docs/training.md",
        "docs/scale.md",
        "docs/evaluation.md",
        "src/latent_shift/weights/emoji/README.md",
    ],
)
def test_links_lead_somewhere(name):
    page = ROOT / name
    targets = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert all((page.parent / target).exists() for target in targets), targets


def test_the_embedded_model_is_whole(monkeypatch):
    """At most 100 MB, half precision, loaded without a network, and its frames are pictures."""

    def no_network(*_):
        raise AssertionError("the embedded model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = ROOT / "src" / "latent_shift" / "weights" / "emoji"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 100e6
    for weights in folder.rglob("*.safetensors"):
        with safe_open(weights, "pt") as file:
            assert {str(file.get_tensor(key).dtype) for key in file.keys()} <= {"torch.float16", "torch.int64"}  # noqa: SIM118
    assert not re.search(r'_path": "/', "".join(path.read_text() for path in folder.rglob("*config.json")))  # no path of who made it
    pipe = ls.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    clip = pipe("red heart", generator=ls.seed(0), num_inference_steps=8).frames[0]
    again = pipe("red heart", generator=ls.seed(0), num_inference_steps=8).frames[0]
    assert np.array_equal(clip, again)
    middle = clip[:, 40:88, 40:88].mean(axis=(0, 1, 2))
    corners = clip[:, :8, :8].mean()
    assert corners > 0.9  # white around it
    assert middle[0] > middle[1] + 0.3  # and red
    assert middle[0] > middle[2] + 0.3
