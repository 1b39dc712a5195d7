"""Training on several processes gives the losses of one process that accumulates, sharded or not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import free_port, launch, tiny_config

from latent_shift.recipe import dump
from latent_shift.training import checkpoint
from latent_shift.training.loop import train


def train_in_turn(configs, run, ports):
    """Train by one recipe after the other in the same run, each time with a process group of its own."""
    for config, port in zip(configs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train(config, run)


def train_by_torchrun(config, run):
    """Run `latent-shift train` on two processes of torchrun."""
    recipe = run.with_suffix(".toml")
    recipe.write_text(dump(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = [sys.executable, *torchrun, "latent_shift", "train", str(recipe), "--run", str(run)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr


def read_stats(run):
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(packed, image_model, tmp_path_factory):
    """The statistics and folder of a run of one process with two batches a step."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(settings(packed, image_model, accumulate=2), run)
    return read_stats(run), run


def settings(packed, image_model, *, accumulate, steps=4, **train):
    """Settings with a store of pixels, which the first process encodes while the other waits."""
    data = {"val_splits": ["train"], "image_share": 0.3}
    train = {"sample_every": 4, "validate_every": 2, "val_batches": 2, "sample_steps": 1, **train}
    model = {"init": str(image_model)}
    return tiny_config(
        "video", packed, steps=steps, data=data, model=model, optim={"accumulate": accumulate}, train=train
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "way", ["launched", *(pytest.param(way, marks=pytest.mark.slow) for way in ("torchrun", "sharded"))]
)
def test_train_on_two_processes_equals_one_that_accumulates(way, alone, packed, image_model, tmp_path):
    expected, run_alone = alone
    shard = way == "sharded"
    first, whole = (settings(packed, image_model, accumulate=1, steps=steps, shard=shard) for steps in (2, 4))
    if way == "torchrun":
        launch(train, first, tmp_path / "run")
        train_by_torchrun(whole, tmp_path / "run")
    else:  # the run resumes in the same processes
        launch(train_in_turn, [first, whole], tmp_path / "run", [free_port(), free_port()])
    rows = read_stats(tmp_path / "run")
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "mse", "grad_norm", *(["val_loss"] if "val_loss" in other else [])):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {
        "00000004.png",
        "00000004.webp",
    }
    parts = list(
        (checkpoint.steps(tmp_path / "run")[-1]).rglob("*.distcp")
    )  # one file a process, with weights and optimizer states
    assert len(parts) == (2 if shard else 0)
    a, b = (
        load_file(checkpoint.steps(run)[-1] / "average.safetensors") for run in (tmp_path / "run", run_alone)
    )
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    a, b = (
        load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        for run in (tmp_path / "run", run_alone)
    )
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-3)
