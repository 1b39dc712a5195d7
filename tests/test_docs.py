"""Commands, examples, links, tables and generated parts of README, docs/ and the model card.

Commands and examples run with a tiny model in the place of `emoji` and few steps; one test uses the embedded model itself.
"""

import itertools
import json
import re
import runpy
import shlex
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import tomlkit
import torch
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import latent_shift as ls
from latent_shift.cli import main, train
from latent_shift.data.pack import pack
from latent_shift.files import sha256
from latent_shift.models.autoencoder import TINY
from latent_shift.pipelines import catalog, loading

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "src" / "latent_shift" / "weights" / "emoji"
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        ROOT / "README.md",
        EMOJI / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs").glob("results/**/*.md"),
    ]
)
README = (ROOT / "README.md").read_text()
TRAIN = [
    "optim.steps=2",
    "optim.warmup_steps=1",
    "optim.cooldown_steps=0",
    "train.precision=no",
    "data.batch_size=2",
]
STAGES = {  # a word of the recipe's name -> settings that make its run quick
    "finetune": ["data.num_frames=4", "optim.accumulate=1", "train.sample_steps=1"],
    "autoencoder": ["data.crop=32", "model.size=tiny"],
    "image": ["model.size=tiny", "train.sample_steps=1"],
    "video": ["data.num_frames=4", "train.sample_steps=1"],
    "distill": ["data.num_frames=4"],
}


def code_blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def quick(words: list[str]) -> list[str]:
    """Return a command of a page with the settings that make it quick."""
    if words[:2] == ["data", "check"]:
        return [*words, "--frames", "4"]
    if words[0] == "train":
        (settings,) = [settings for name, settings in STAGES.items() if name in Path(words[1]).stem]
        return [*words, *settings, *TRAIN]
    if words[0] == "eval":
        return [*words, "--num", "2", "--steps", "1"]
    if words[0] == "generate":
        number_of_frames = [] if {"--num-frames", "--then", "--video"} & set(words) else ["--num-frames", "3"]
        return [*words, "--steps", "4" if "--strength" in words else "1", *number_of_frames]
    return words


@pytest.fixture
def tiny_emoji(video_model, tmp_path, monkeypatch):
    """Put a tiny model with the settings of `emoji` in its place, and a student of it."""
    folder = tmp_path / "weights" / "emoji"
    shutil.copytree(video_model, folder)
    shutil.copytree(EMOJI / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    settings = json.loads((EMOJI / "model_index.json").read_text())["latent_shift"]
    (folder / "model_index.json").write_text(json.dumps({**index, "latent_shift": settings}))
    with safe_open(EMOJI / catalog.STUDENT, "pt") as file:
        metadata = file.metadata()
    channels = json.loads((folder / "unet" / "config.json").read_text())["block_out_channels"][0]
    lora = {"A": torch.zeros(2, 4, 3, 3), "B": torch.zeros(channels, 2, 1, 1)}
    save_file(
        {f"unet.conv_in.lora_{name}.weight": weight for name, weight in lora.items()},
        folder / catalog.STUDENT,
        metadata,
    )
    monkeypatch.setattr(sys.modules[loading.folder.__module__], "WEIGHTS", folder.parent)
    return folder


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("README.md", 5),
        ("docs/usage.md", 12),
        ("docs/checkpoints.md", 3),
        ("docs/training.md", 12),
        ("docs/evaluation.md", 2),
    ],
)
def test_commands_run(name, least, media, image_model, tiny_emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # An estimate takes as long as the short trainings here; test_finetune.py has it.
    monkeypatch.setattr(train, "_print_estimate", lambda *_: None)
    shutil.copytree(ROOT / "recipes", "recipes")
    shutil.copytree(media, "my-videos")
    shutil.copytree(image_model, "my-checkpoint")
    (tmp_path / "docs" / "modes").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "modes" / "mask.png", "docs/modes")
    if name == "docs/evaluation.md":
        pack(media, "data/mine", size=32, fps=8)
        shutil.copytree(tiny_emoji, "runs/emoji-mine/model")
    blocks = code_blocks("bash", (ROOT / name).read_text())
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("latent-shift")]
    assert len(commands) >= least
    for line in commands:
        words = quick(shlex.split(re.sub(r"--size \d+", "--size 32", line), comments=True)[1:])
        result = CliRunner().invoke(main.app, words, catch_exceptions=False)
        assert result.exit_code == 0, (line, result.output)
        outputs = [word for flag, word in itertools.pairwise(words) if flag == "-o"]
        assert all((tmp_path / output).exists() for output in outputs), line
    if name == "README.md":
        assert Image.open("rocket.png").size == (32, 32)


@pytest.mark.parametrize("name", ["README.md", "docs/usage.md", "docs/checkpoints.md", "docs/api.md"])
def test_examples_run(name, tiny_emoji, video_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load_with_one_step(*args):
        pipe = loading.load(*args)
        pipe.call_defaults["num_inference_steps"] = 1
        return pipe

    monkeypatch.setattr(ls, "load", load_with_one_step, raising=False)
    examples = code_blocks("python", (ROOT / name).read_text())
    assert examples
    here = {'"any/stable-diffusion"': repr(str(video_model)), "4, 64, 64": "4, 8, 8", "77, 768": "77, 32"}
    for example in examples:
        if "any/pixart" in example:  # tests/test_transformers.py runs it
            continue
        for text, replacement in here.items():
            example = example.replace(text, replacement)
        names = {"x": torch.randn(2 * 3, 9, 4, 4), "F": 3, "torch": torch, "ls": ls}
        with torch.no_grad():
            exec(example, names)
        if "y" in names:  # the method as pseudo-code
            x = names["x"].flatten(0, 1)
            assert torch.equal(names["y"], ls.temporal_shift(x, 3, ls.Shift()))
        if "epsilon" in names:
            assert names["epsilon"].shape == (32, 4, 8, 8)
            assert ls.shift_of(names["unet"]) is None
        if "longer" in names:
            assert (tmp_path / "rocket.mp4").exists()
            assert [len(names[clip]) for clip in ("image", "longer")] == [1, 32]


def command_lines(page: str) -> list[str]:
    """Return the `latent-shift` commands of a page, in code blocks and in the text."""
    blocks = "\n".join(re.findall(r"```(?:bash|text)\n(.*?)```", page, re.DOTALL))
    inline = re.findall(r"`(latent-shift [^`]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    return [line.strip() for line in blocks.splitlines() if line.strip().startswith("latent-shift ")] + inline


@pytest.mark.parametrize("name", PAGES)
def test_command_names_and_options_exist(name):
    whole = typer.main.get_command(main.app)
    for line in command_lines((ROOT / name).read_text()):
        words = shlex.split(line.partition(" && ")[0].replace("[", "").replace("]", ""), comments=True)[1:]
        command = whole
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        is_group = hasattr(command, "commands") and not command.invoke_without_command
        assert not is_group or not words or words[0].startswith("-"), f"{line}: no command {words[0]}"
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= options, line


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_and_scripts_exist(name):
    page = (ROOT / name).read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page, re.MULTILINE)) <= targets
    assert all((ROOT / script).exists() for script in re.findall(r"python ([\w/]+\.py)", page))
    assert all(
        (ROOT / path).exists() for path in re.findall(r"`((?:recipes|tests|docs)/[\w./-]+\.\w+)`", page)
    )
    assert all((ROOT / "tests" / test).exists() for test in re.findall(r"`(test_\w+\.py)`", page))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


def test_pages_named_in_code_and_recipes_exist():
    sources = [
        path
        for folder in ("src", "recipes")
        for suffix in ("py", "toml")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    named = {
        page for path in sources for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert {page for page in named if not (ROOT / page).exists()} == set()


def test_showcase_has_a_captioned_clip_for_each_prompt():
    prompts = runpy.run_path(str(ROOT / "docs" / "showcase.py"))["PROMPTS"]
    assert re.findall(r"!\[([^]]+)\]\(docs/showcase/", README) == list(prompts)
    for prompt in prompts:
        with Image.open(ROOT / "docs" / "showcase" / f"{prompt.replace(' ', '-')}.webp") as clip:
            assert (clip.size, clip.n_frames) == ((128, 128), 16)


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_settings_page_matches_config():
    script = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    assert script["settings_page"]() == (ROOT / "docs" / "settings.md").read_text(), "python docs/settings.py"


def test_tables_match_results():
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    assert set(tables["PAGES"]) == {
        "README.md",
        "docs/engines.md",
        "docs/evaluation.md",
        "docs/reliability.md",
        "docs/results.md",
        "docs/results/archive/index.md",
        "docs/serving.md",
    }
    for name in tables["PAGES"]:
        assert tables["with_tables"](name) == (ROOT / name).read_text(), "python docs/tables.py"


def test_architecture_page_matches_tree_and_layers():
    tree, layers = code_blocks("text", (ROOT / "docs" / "architecture.md").read_text())
    package = ROOT / "src" / "latent_shift"
    named = re.findall(r"[├└]── ([\w.]+)", tree)
    assert {name for name in named if not (package / name).exists()} == set()
    present = {
        path.name
        for path in package.iterdir()
        if (path.is_dir() or path.suffix == ".py") and not path.name.startswith("__")
    }
    assert present == set(named)
    contracts = tomlkit.parse((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert layers.split("\n")[:-1] == list(contracts[0]["layers"])


def test_site_builds_without_warnings(tmp_path, monkeypatch):
    for module in ("mkdocs", "mkdocstrings", "material"):
        pytest.importorskip(module)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"model-card"}
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} >= pages
    documented = set(
        re.findall(r'id="latent_shift\.([\w.]+)"', (tmp_path / "api" / "index.html").read_text())
    )
    assert documented >= {"temporal_shift", "LatentShiftPipeline.__call__", "LatentShiftPipeline.stream"}
    assert {name.rpartition(".")[2] for name in documented} >= set(ls.__all__)


TOKENIZER = "da0e79933b9ed51798a3ae27893d3c5fa4a201126cef75586296df9b4d2c62a0"


def test_embedded_model_is_complete(monkeypatch):
    """At most 100 MB, and 3.2 MB for the student and the tiny decoder; half precision, loaded without a network, and its frames are
    pictures."""

    def no_network(*_):
        raise AssertionError("the embedded model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    sizes = {path: path.stat().st_size for path in EMOJI.rglob("*") if path.is_file()}
    added = [path for path in sizes if path.name == catalog.STUDENT or path.parent.name == TINY]
    assert sum(sizes.values()) - sum(sizes[path] for path in added) <= 100e6
    assert sum(sizes[path] for path in added) <= 3.2e6
    for weights in EMOJI.rglob("*.safetensors"):
        with safe_open(weights, "pt") as file:
            dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert dtypes <= {torch.float16, torch.int64}
    assert not re.search(
        r'_path": "/', "".join(path.read_text() for path in EMOJI.rglob("*config.json"))
    )  # no path of who made it
    # The published vocabulary: one word renamed in it is a word that nobody misses for long.
    assert sha256(EMOJI / "tokenizer" / "tokenizer.json") == TOKENIZER
    pipe = ls.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    first, second = (
        pipe("rocket", num_frames=2, generator=ls.seed(0), num_inference_steps=2).frames[0] for _ in range(2)
    )
    assert np.array_equal(first, second)
    clip = pipe("red heart", num_frames=8, generator=ls.seed(0)).frames[0]
    middle = clip[:, 40:88, 40:88].mean(axis=(0, 1, 2))
    corners = clip[:, :8, :8].mean()
    assert corners > 0.9  # white around it
    assert middle[0] > middle[1] + 0.3  # and red
    assert middle[0] > middle[2] + 0.3
