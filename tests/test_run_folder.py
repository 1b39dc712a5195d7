"""The folder of a run: whose files are in it, and how a run ends well or badly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_config

from latent_shift.folders import MARKER, read_kind
from latent_shift.pipelines.diagnosis import NotFiniteError
from latent_shift.recipe import dump
from latent_shift.training import checkpoint, checks, stages
from latent_shift.training.loop import train

EVERY_STEP = {"checkpoint_minutes": 1e-9, "keep_checkpoints": 1}


def config(latents, steps=2, **train_settings):
    return tiny_config("video", latents, steps=steps, train={**EVERY_STEP, **train_settings})


def rows_of(run):
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def test_train_says_what_to_do_with_checkpoints_without_settings(latents, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000009").mkdir(parents=True)
    (tmp_path / "run" / "stats.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(
        ValueError, match=r"run: holds checkpoints but no config.toml, .*; choose another folder with --run"
    ):
        train(config(latents), tmp_path / "run", force=True)


def test_train_refuses_a_folder_of_somebody(latents, tmp_path):
    """A project with names that a run has, too."""
    project = tmp_path / "project"
    files = {
        "config.toml": "# mine",
        "model/model_index.json": "{}",
        "stats.jsonl": '{"step": 9}',
        "checkpoints/step-00000009/x": "",
    }
    for name, text in files.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    with pytest.raises(
        ValueError, match=r"project: holds checkpoints, which latent-shift did not write there"
    ):
        train(config(latents), project)
    assert {
        str(path.relative_to(project)): path.read_text() for path in project.rglob("*") if path.is_file()
    } == files
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "config.toml").write_text(dump(config(latents)))  # a recipe that only looks like a run
    with pytest.raises(
        ValueError, match=r"recipes: holds config.toml, which latent-shift did not write there"
    ):
        train(config(latents), recipes)


def test_train_goes_on_in_a_folder_from_before_the_marker(latents, tmp_path):
    train(config(latents), tmp_path / "run")
    (tmp_path / "run" / MARKER).unlink()
    train(config(latents, steps=3), tmp_path / "run")
    assert read_kind(tmp_path / "run") == checkpoint.KIND
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]


def test_train_deletes_only_checkpoints_that_it_named(latents, tmp_path):
    """A copy, a note and a file beside the checkpoints stay, and the run does not resume from them."""
    run = tmp_path / "run"
    train(config(latents), run)
    theirs = ["step-before-change", "step-2", ".step-old.partial", "step-00000001-copy"]
    for name in theirs:
        shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / name)
    (run / "checkpoints" / "step-00000009").write_text("a file")
    (run / "model" / "README.md").write_text("mine")
    train(config(latents, steps=4), run)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {*theirs, "step-00000009", "step-00000004"}
    assert (run / "model" / "README.md").read_text() == "mine"
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4]


def test_steps_are_ordered_by_number(tmp_path):
    for name in ("step-100000000", "step-99999999", "step-00000003"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint.steps(tmp_path)] == [
        "step-00000003",
        "step-99999999",
        "step-100000000",
    ]


def test_train_stops_on_ctrl_c_as_on_sigterm(latents, tmp_path, caplog):
    interrupt = lambda row: os.kill(os.getpid(), signal.SIGINT) if row["step"] == 2 else None  # noqa: E731
    before = signal.getsignal(signal.SIGINT)
    run = tmp_path / "run"
    assert train(config(latents, steps=4, checkpoint_minutes=5.0), run, report=interrupt) == run
    assert signal.getsignal(signal.SIGINT) is before
    assert [folder.name for folder in checkpoint.steps(run)] == ["step-00000002"] and not (
        run / "model"
    ).exists()
    assert "interrupted: the run is saved after this step; once more ends it at once" in caplog.text
    assert train(config(latents, steps=4), run) == run / "model"
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4]


def test_train_ends_at_once_on_a_second_ctrl_c(latents, tmp_path):
    def interrupt(row):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.01)

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(config(latents, steps=4, checkpoint_minutes=5.0), run, report=interrupt)
    assert not checkpoint.steps(run)
    assert train(config(latents, steps=2), run) == run / "model"


@pytest.fixture
def spoil(monkeypatch):
    """Make the batches of these steps NaN."""
    draw = stages.DenoiserStage.draw_batch

    def spoil(numbers):
        count = iter(range(1000))

        def draw_damaged(*args, **options):
            first, *rest = draw(*args, **options)
            return (first * torch.nan if next(count) in numbers else first, *rest)

        monkeypatch.setattr(stages.DenoiserStage, "draw_batch", draw_damaged)

    return spoil


def test_train_that_learned_nothing_ends_with_an_error(latents, tmp_path, spoil):
    """Also when it is tried again, and when every process took some of the steps."""
    spoil(range(1000))
    message = (
        r"run: no gradient was finite in any of the 4 steps, so nothing was learned; try a smaller optim\.lr"
    )
    stop = lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 2 else None  # noqa: E731
    assert train(config(latents, steps=4, log_every=2), tmp_path / "run", report=stop) == tmp_path / "run"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            train(config(latents, steps=4, log_every=2), tmp_path / "run")
        assert not (tmp_path / "run" / "model").exists()


def test_train_keeps_a_model_without_checkpoints(latents, tmp_path):
    """The checkpoints were deleted to save space; the model is what is left of the run."""
    train(config(latents), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    model = tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = model.read_bytes()
    with pytest.raises(ValueError, match="run: holds a model, but no checkpoint to go on from"):
        train(config(latents), tmp_path / "run")
    assert model.read_bytes() == before and len(rows_of(tmp_path / "run")) == 2
    train(config(latents, steps=1), tmp_path / "run", force=True)
    assert model.read_bytes() != before


def test_train_goes_on_after_a_sample_that_overflows(latents, tmp_path, monkeypatch, caplog):
    def overflow(*arguments, **options):
        raise NotFiniteError("the sampled latents are NaN or infinite")

    monkeypatch.setattr(stages.LatentShiftPipeline, "__call__", overflow)
    assert train(config(latents, sample_every=1), tmp_path / "run") == tmp_path / "run" / "model"
    assert "the sampled latents are NaN" in caplog.text and "no sample of" in caplog.text


def test_config_of_a_run_holds_no_signature():
    secret = tiny_config("video", "https://me:password@host/{0..3}.tar?sig=1")
    assert checkpoint.without_secrets(secret).data.path == "https://host/{0..3}.tar"


def test_an_address_with_another_signature_is_the_same_data(tmp_path):
    for signature in ("1", "2"):
        config = tiny_config("video", f"https://me:password@host/{{0..3}}.tar?sig={signature}")
        (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
        checks.check_same_run(config, tmp_path) if signature == "2" else checkpoint.write_config(
            config, tmp_path
        )


def test_train_exports_a_run_whose_last_steps_were_skipped(latents, tmp_path, spoil):
    spoil({2, 3})
    assert train(config(latents, steps=4), tmp_path / "run") == tmp_path / "run" / "model"
    assert [row["skipped"] for row in rows_of(tmp_path / "run")] == [0, 0, 1, 1]


def test_export_that_fails_leaves_the_model_whole(latents, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(config(latents), run)
    before = {path: path.read_bytes() for path in (run / "model").rglob("*") if path.is_file()}
    export = stages.DenoiserStage.export

    def fill_the_disk(self, folder, weights):
        export(self, folder, weights)
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(stages.DenoiserStage, "export", fill_the_disk)
    with pytest.raises(
        OSError,
        match=r"the model could not be written \(No space left on device\); the last checkpoint is complete",
    ):
        train(config(latents, steps=3), run)
    assert {path: path.read_bytes() for path in (run / "model").rglob("*") if path.is_file()} == before
    assert not (run / ".model.partial").exists()
    monkeypatch.setattr(stages.DenoiserStage, "export", export)
    train(config(latents, steps=3), run)
    assert any(path.read_bytes() != content for path, content in before.items())


def test_command_ends_with_130_and_one_line_on_ctrl_c(tmp_path):
    """A first Ctrl-C while the libraries are imported or a model is loaded."""
    words = [
        sys.executable,
        "-m",
        "latent_shift",
        "generate",
        "red",
        "-n",
        "99",
        "-o",
        str(tmp_path / "a.mp4"),
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors.splitlines()[-1]) == (130, "latent-shift: interrupted")
    assert "Traceback" not in errors


def test_settings_of_a_run_that_has_ended_are_refused_and_its_comments_stay(latents, tmp_path):
    train(tiny_config("image", latents, steps=2), tmp_path)
    recipe = tmp_path / "config.toml"
    recipe.write_text(f"# my notes\n{recipe.read_text()}")
    train(tiny_config("image", latents, steps=2), tmp_path)  # exports it again
    optim = {"steps": 2, "lr": 0.5, "warmup_steps": 1}
    with pytest.raises(ValueError, match=r"has ended, so another optim\.lr would have no effect"):
        train(tiny_config("image", latents, optim=optim), tmp_path)
    assert recipe.read_text().startswith("# my notes\n")
    train(tiny_config("image", latents, steps=2, train={"sample_guidance": 4.0}), tmp_path)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["latent_shift"]["guidance_scale"] == 4
    train(tiny_config("image", latents, optim={**optim, "steps": 3}), tmp_path)
