"""The recipes: downloads resume and are checked; captions and splits are as documented; a task runs the commands it needs and no others."""

import base64
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fetch
import numpy as np
import pytest
import torch
import typer
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from latent_shift import recipe, video
from latent_shift.cli.main import app
from latent_shift.evaluation.tables import find_seeds
from latent_shift.recipe import load
from latent_shift.training import checks, prepare

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"

BODY = np.random.default_rng(0).bytes(100_000)
SHA = base64.b64encode(hashlib.sha512(BODY).digest()).decode()


@pytest.fixture
def registry():
    """A local server of one file and its ranges; yields its address and a list of the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            requests.append((self.path, start))
            if start >= len(BODY):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(BODY) - start))
            self.end_headers()
            self.wfile.write(BODY[start : 50_000 if "breaks" in self.path and not start else None])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", requests
    server.shutdown()
    server.server_close()


def test_download_resumes_and_is_checked(registry, tmp_path):
    address, requests = registry
    (tmp_path / "pack-1.0.0.part").write_bytes(BODY[:40_000])
    with Progress(disable=True) as progress:
        path = fetch.download("@scope/pack", "1.0.0", SHA, tmp_path, address, progress)
        assert path.read_bytes() == BODY
        assert requests == [("/@scope/pack/-/pack-1.0.0.tgz", 40_000)]
        fetch.download("@scope/pack", "1.0.0", SHA, tmp_path, address, progress)
        assert len(requests) == 1  # a complete file is not downloaded again
        (tmp_path / "other-1.0.0.part").write_bytes(b"x" * 40_000)
        with pytest.raises(ValueError, match=r"other 1\.0\.0: the download does not match its sha512"):
            fetch.download("other", "1.0.0", SHA, tmp_path, address, progress)
    assert not (tmp_path / "other-1.0.0.part").exists()


def test_download_survives_a_broken_connection(registry, tmp_path):
    address, requests = registry
    with Progress(disable=True) as progress:
        with pytest.raises(ValueError, match="the connection broke after 50000 of 100000 bytes"):
            fetch.download("breaks", "1.0.0", SHA, tmp_path, address, progress)
        assert fetch.download("breaks", "1.0.0", SHA, tmp_path, address, progress).read_bytes() == BODY
        assert [start for _, start in requests] == [0, 50_000]
        # Killed between the last byte and the check: there is no range left to request.
        (tmp_path / "complete-1.0.0.part").write_bytes(BODY)
        assert fetch.download("complete", "1.0.0", SHA, tmp_path, address, progress).read_bytes() == BODY


def test_names_give_variants_one_concept(tmp_path):
    entries = [
        {
            "label": "waving hand",
            "hexcode": "1F44B",
            "tags": ["bye"],
            "group": 0,
            "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}],
        }
    ]
    body = json.dumps(entries).encode()
    with tarfile.open(tmp_path / "data.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/en/data.json")
        member.size = len(body)
        tar.addfile(member, io.BytesIO(body))
    table = fetch.names(tmp_path / "data.tgz")
    assert table["1f44b"] == {
        "label": "waving hand", "base": "waving hand", "other_names": [], "tags": ["bye"], "concept": "1f44b", "group": 0,
    }  # fmt: skip
    assert table["1f44b-1f3ff"]["label"] == "waving hand, dark skin tone"
    assert table["1f44b-1f3ff"]["concept"] == "1f44b"
    assert fetch.key("0023-FE0F-20E3") == "0023-20e3"


def test_captions_are_labels_and_keywords():
    assert fetch.captions("cat", [], [], "1f408") == ["cat", "a cat", "cat emoji"]
    assert fetch.captions("automobile", ["car"], [], "1f697")[-1] == "a car"
    assert fetch.captions("ATM sign", [], [], "1f3e7")[1] == "an ATM sign"
    assert (
        fetch.captions("hand, dark skin tone", ["hand"], ["wave"], "1f44b-1f3ff")[-1]
        == "hand, dark skin tone emoji"
    )
    texts = fetch.captions("cat", [], ["pet", "feline", "cat", "animal", "kitty", "meow"], "1f408")
    assert texts[0] == "cat"
    assert texts == fetch.captions("cat", [], ["pet", "feline", "cat", "animal", "kitty", "meow"], "1f408")
    assert sorted(word for word in texts[3].split(", ")[1:] + texts[4].split()) == [
        "animal",
        "feline",
        "kitty",
        "meow",
        "pet",
    ]


def test_motion_describes_what_the_frames_show(tmp_path):
    def clip(place, side=lambda k: 16):
        frames = np.full((16, 64, 64, 3), 255, np.uint8)
        for k in range(16):
            top, left = place(k)
            frames[k, top : top + side(k), left : left + side(k)] = 60
        return frames

    assert fetch.motion(clip(lambda k: (20 + k, 20))) == ["moving up and down"]
    assert fetch.motion(clip(lambda k: (20, 20 + k))) == ["moving side to side"]
    assert fetch.motion(clip(lambda k: (24 - k // 2, 24 - k // 2), lambda k: 16 + k // 2 * 2)) == [
        "changing size"
    ]
    assert fetch.motion(clip(lambda k: (20, 20))) == ["almost still"]
    path = video.write(clip(lambda k: (20, 20 + min(k, 16 - k))), tmp_path / "clips" / "1f408.webp")
    name = {"label": "cat", "base": "cat", "other_names": [], "tags": [], "concept": "1f408", "group": 3}
    record = fetch.describe((path, name, "1f408"))
    assert record["loop"] is True
    assert record["text"] == ["cat", "a cat", "cat emoji", "cat, moving side to side"]
    path.write_bytes(b"broken")
    assert fetch.describe((path, name, "1f408"))[0] == "1f408.webp"


def check_command(words: list[str]) -> None:
    """Fail for a script that does not exist, an option that its command does not have, and settings that a recipe does not take."""
    if words[0] != sys.executable:
        return
    program, *rest = words[1:]
    if program != "-m":
        assert (ROOT / program).exists() or program == "-c", words
        return
    if rest[0] != "latent_shift":
        return
    command, rest = typer.main.get_command(app), rest[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        name = rest.pop(0)
        command = command.commands[name]
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {word for word in rest if word.startswith("-")} <= known, words
    if name == "train":
        settings = [word for word in rest if "=" in word]
        recipe.load(ROOT / rest[0], [word for word in settings if not word.startswith("model.init=runs")])


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Return a function that runs a recipe script in an empty folder; it returns the commands, which do nothing."""
    monkeypatch.chdir(tmp_path)
    Path("runs/emoji-former").mkdir(parents=True)  # else taken from the history of the repository
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("copytree", "copy", "rmtree"):
        monkeypatch.setattr(shutil, name, lambda *_, **__: None)

    def run(script: str, *arguments: str) -> list[str]:
        commands = []

        def add(words, *, check, env=None):
            assert env is None or env["HF_HUB_OFFLINE"] == "1"
            check_command(words)
            commands.append(" ".join(words))

        monkeypatch.setattr(subprocess, "run", add)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.syspath_prepend(str((RECIPES / script).parent))
        runpy.run_path(str(RECIPES / script), run_name="__main__")
        return commands

    return run


def test_ablation_trains_no_published_model(run_script):
    commands = run_script("emoji/ablation.py")
    trainings = [command for command in commands if "emoji/video.toml" in command]
    assert [command.rpartition("model.temporal=")[2] for command in trainings] == [
        "shift",
        "none",
        "attention",
    ]
    assert all("model.edge=zero" in command and "optim.steps=1000" in command for command in trainings)
    assert not any("weights" in command or "words.toml" in command for command in commands)
    assert [command.split(" -o ")[1] for command in commands[-2:]] == [
        "docs/results/ablation-training.json --force", "docs/results/ablation.json --force"
    ]  # fmt: skip


def test_measuring_prepares_the_frames_alone(run_script):
    for commands in (run_script("emoji/measure.py", "table"), run_script("benchmark.py", "measures")):
        fetch_command, pack_command, measure_command, *_ = commands
        assert fetch_command.endswith("fetch.py data/emoji")
        assert "data pack data/emoji data/emoji-128 --size 128" in pack_command
        assert "data/emoji-128" in measure_command
    for task, results in {
        "steps": "steps-2.json",
        "words": "emoji-words.json",
        "sheet": "emoji-sheet.png",
    }.items():
        assert any(results in command for command in run_script("emoji/measure.py", task))
    (command,) = run_script("benchmark.py", "peers")
    assert command.endswith("bench peers -o docs/results/peers.json --force")


def test_every_variant_of_motion_differs(monkeypatch):
    for folder in (RECIPES, RECIPES / "emoji"):
        monkeypatch.syspath_prepend(str(folder))
    motion = runpy.run_path(str(RECIPES / "emoji" / "motion.py"))
    configs = {
        name: load(RECIPES / "emoji" / "video.toml", settings.split())
        for name, settings in motion["VARIANTS"].items()
    }
    assert len({config.model_dump_json() for config in configs.values()}) == len(configs)
    model = configs["zero"].model
    assert (model.place, model.channels, model.rule) == ("conv1", "first", None)


def test_ideas_of_another_image_model_are_measured_again(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "compare"))
    rows_of = runpy.run_path(str(RECIPES / "compare" / "run.py"))["rows_of"]
    common = {"training": "optim.steps=2", "image_model": "new"}
    old = {**common, "image_model": "old"}
    rows = {"a": {"0": {"settings": "x", **common}, "1": {"settings": "x", **old}}, "b": {"0": old}}
    assert rows_of(rows, common) == {"a": {"0": {"settings": "x", **common}}}


def test_emoji_is_built_of_real_and_composed_clips(run_script):
    for arguments, last in (((), "words"), (("--gpu",), "gpu")):
        commands = "\n".join(run_script("emoji/build.py", *arguments))
        order = [
            "emoji/fetch.py",
            "emoji/compose.py",
            "autoencoder.toml",
            "emoji-composed-latents",
            "image.toml",
            "video.toml",
            f"emoji/{last}.toml",
            *(["runs/emoji-average --share"] if last == "words" else []),
            "emoji/distill.toml",
            "emoji/names.py",
        ]
        places = [commands.index(word) for word in order]
        assert places == sorted(places)
    commands = "\n".join(run_script("emoji/build.py", "--former"))
    assert (
        "words.toml --run runs/emoji-words-from-former model.init=runs/emoji-former data.concept_weights="
        in commands
    )
    assert "--autoencoder runs/emoji-former --texts runs/emoji-former" in commands
    assert "image.toml" not in commands


def test_weights_are_averaged(tmp_path, monkeypatch):
    for name, value in (("before", 1.0), ("after", 3.0)):
        (tmp_path / name / "unet").mkdir(parents=True)
        weights = {"a": torch.full((2,), value, dtype=torch.float16)}
        save_file(weights, tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
    words = ["average.py", *(str(tmp_path / name) for name in ("after", "before", "out")), "--share", "0.75"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(RECIPES / "emoji" / "average.py"), run_name="__main__")
    (weight,) = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").values()
    assert weight.dtype == torch.float16
    assert weight.tolist() == [2.5, 2.5]


@pytest.mark.parametrize(
    ("out", "message"),
    [("", "holds MODEL or INIT"), ("before", "holds MODEL or INIT"), ("mine", "is no model")],
)
def test_an_average_replaces_no_other_folder(out, message, tmp_path, monkeypatch, capsys):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    words = ["average.py", *(str(tmp_path / name) for name in ("after", "before", out)), "--share", "0.75"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPES / "emoji" / "average.py"), run_name="__main__")
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"before", "after", "mine", "model_index.json"}


def test_a_short_animation_travels_to_the_gpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "emoji"))
    gpu = runpy.run_path(str(RECIPES / "emoji" / "gpu.py"))
    monkeypatch.chdir(tmp_path)
    Path("data/emoji-small/clips").mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (72, 8, 8, 3), np.uint8).repeat(32, 1).repeat(32, 2)
    video.write(frames, Path("1f600.webp"), fps=24)
    gpu["shorten"](Path("1f600.webp"))
    small, fps = video.read(Path("data/emoji-small/clips/1f600.webp"), fps=8)
    assert (small.shape, fps) == ((16, 128, 128, 3), 8)
    whole, _ = video.read(Path("1f600.webp"), fps=8, size=128)
    assert np.abs(small.astype(int) - whole[:16]).mean() < 12
    path = tmp_path / "model.tar"
    path.write_bytes(bytes(range(256)) * 100)
    gpu["split"].__globals__["PIECE"] = 10_000
    gpu["split"](path)
    pieces = sorted(tmp_path.glob("model.tar.*"))
    assert [piece.stat().st_size for piece in pieces] == [10_000, 10_000, 5_600]
    assert b"".join(piece.read_bytes() for piece in pieces) == bytes(range(256)) * 100


def test_compare_image_and_seeds_encode_no_pixels(run_script):
    for task in ("image", "seeds"):
        commands = run_script("compare/compare.py", task)
        assert not any("compare-pixels" in command for command in commands)
        assert any("data/compare-latents --autoencoder emoji" in command for command in commands)


def test_compare_seeds_trains_and_measures_three_of_each_system(run_script):
    *trainings, tabulate, evaluate = (
        command for command in run_script("compare/compare.py", "seeds") if "runs/compare/" in command
    )
    trained = dict(command.partition("--run runs/compare/")[2].split(" ", 1) for command in trainings)
    assert (
        trained["hold"] == "model.edge=hold train.seed=0"
        and trained["hold-seed-2"] == "model.edge=hold train.seed=2"
    )
    assert "model.place=both model.channels=cheapest" in trained["mixed"]
    assert trained["shift"] == "train.seed=0" and trained["shift-seed-1"] == "train.seed=1"
    assert trained["attention-equal-time"] == "model.temporal=attention optim.steps=515 train.seed=0"
    systems = ("shift", "hold", "attention", "none", "mixed", "attention-equal-time")
    seeds = {name: [f"{name}-seed-1", f"{name}-seed-2"] for name in systems}
    assert find_seeds(list(trained)) == seeds  # the tables and the page group them by name
    assert all(
        f"-m {name}=runs/compare/{name}/model" in evaluate and f"runs/compare/{name} " in tabulate
        for name in trained
    )
    assert "docs/results/seeds-training.json" in tabulate and "docs/results/seeds.json" in evaluate


@pytest.mark.parametrize("program", [None, "chromium"])
def test_compare_page_takes_a_picture_where_chromium_is(program, run_script, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: program)
    commands = run_script("compare/compare.py", "page")
    assert any("--screenshot" in command for command in commands) == bool(program)
    assert ("there is no chromium" in capsys.readouterr().out) != bool(program)


@pytest.mark.parametrize("script", ["compare/compare.py", "emoji/measure.py", "benchmark.py"])
def test_unknown_tasks_are_errors(script, run_script, capsys):
    with pytest.raises(SystemExit) as error:
        run_script(script, "pgae")
    assert error.value.code == 2
    assert "invalid choice: 'pgae'" in capsys.readouterr().err


def test_commands_use_the_programs_of_this_environment(monkeypatch):
    commands = runpy.run_path(str(RECIPES / "commands.py"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    environment = commands["environment"]()
    assert environment["HF_HUB_OFFLINE"] == "0"  # the user's choice
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_the_comparisons_image_model_can_be_trained_from(tmp_path):
    """It is a U-Net and its schedule alone: the store of latents has the rest."""
    recipe = load(RECIPES / "compare" / "video.toml")
    start = RECIPES.parent / str(recipe.model.init)
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": str(start)})})
    assert prepare._diffusers_folder(moved, tmp_path) == start
    checks.check_start(moved, start)
