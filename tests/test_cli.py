"""The command as a person uses it: every verb, its files, its errors."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from tiny import tiny_config
from typer.testing import CliRunner

from latent_shift import recipe, runtime, video
from latent_shift.benchmark import timing
from latent_shift.cli import evaluate, main
from latent_shift.data.store import Store
from latent_shift.recipe import dump

runner = CliRunner()
ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"


def run(*words) -> str:
    result = runner.invoke(main.app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_alone(*words) -> tuple[str, set[str]]:
    """Run the command in a process of its own; return its output, and which of the slow libraries it imported."""
    script = (
        "import sys\nfrom latent_shift.cli.main import main\ntry:\n    main()\nfinally:\n"
        "    print('imported', *({'torch', 'diffusers', 'transformers'} & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True)
    *messages, imported = result.stderr.splitlines()
    return result.stdout + "\n".join(messages), {*imported.split()[1:]}


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["--help"], "generate"),
        (["models"], "emoji"),
        (["models", "show", "emoji"], "22.7 M parameters"),
        (["models", "show", "emjoi"], "did you mean 'emoji'"),
        (["train", RECIPES / "emoji" / "video.toml", "--dry-run"], 'edge = "hold"'),
        (["train", RECIPES / "emoji" / "video.toml", "optim.steps=none"], "optim.steps"),
        (["train", "absent.toml"], "absent.toml: no such file"),
        (["generate", "x", "-m", "emjoi"], "did you mean 'emoji'"),
        (["generate", "a", "panda"], 'put the prompt in quotes: latent-shift generate "a panda"'),
        (["generate", "x", "--image", "absent.png"], "does not exist"),
        (["generate", "x", "-o", "clip.avi"], "expected one of .mp4"),
    ],
)
def test_command_answers_without_slow_imports(words, output):
    printed, imported = run_alone(*words)
    assert output in printed
    assert not imported


def test_main_sets_passive_waiting_unless_the_user_chose(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latent-shift", "models"])
    for variable in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.setenv(variable, "")  # restored afterwards
        monkeypatch.delenv(variable)
    with pytest.raises(SystemExit):
        main.main()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["KMP_BLOCKTIME"]) == ("PASSIVE", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("KMP_BLOCKTIME")
    with pytest.raises(SystemExit):
        main.main()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "KMP_BLOCKTIME" not in os.environ


def parse(words: list[str]) -> None:
    """Parse a command without running it."""
    command = typer.main.get_command(main.app)
    context = command.make_context("latent-shift", list(words))
    while hasattr(command, "commands"):
        rest = (
            [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        )
        if not rest:
            return
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    if context.command.name == "train":
        recipe.load(ROOT / context.params["recipe"], context.params["overrides"])


@pytest.mark.parametrize(
    "script", ["emoji/build.py", "emoji/ablation.py", "compare/compare.py", "benchmark.py"]
)
def test_recipe_scripts_run_commands_that_exist(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str((RECIPES / script).parent))
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands.append(words))
    for name in ("copytree", "copy", "rmtree"):
        monkeypatch.setattr(shutil, name, lambda *_, **__: None)
    monkeypatch.setattr(Path, "touch", lambda _: None)
    arguments = {"emoji/build.py": ["--gpu"]}.get(script, [])
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(RECIPES / script), run_name="__main__")
    ours = [words[3:] for words in commands if "latent_shift" in words]
    assert len(ours) >= 5
    for words in ours:
        parse(words)


def test_generate_writes_every_format_and_the_same_bytes_again(video_model, tmp_path):
    outputs = [tmp_path / f"clip{suffix}" for suffix in video.OUTPUT_SUFFIXES]
    words = ["generate", "a red square", "-m", video_model, "--steps", 2, "--seed", 3]
    printed = run(*words, *(word for path in outputs for word in ("-o", path)))
    assert printed.split() == [str(path) for path in outputs]
    for path in outputs[:2]:
        frames, fps = video.read(path)
        assert frames.shape == (4, 32, 32, 3)
        assert fps == 8
    again = tmp_path / "again.png"
    run(*words, "-o", again)
    assert again.read_bytes() == outputs[-1].read_bytes()


def test_generate_uses_every_option(video_model, tmp_path):
    def pixels(*options) -> bytes:
        path = tmp_path / "out.png"
        run("generate", "a red square", "-m", video_model, "--steps", 2, "-o", path, *options)
        return path.read_bytes()

    plain = pixels()
    for options in (
        ("--seed", 1),
        ("--steps", 3),
        ("--guidance", 9),
        ("--negative", "blue"),
        ("--num-frames", 3),
        ("--size", 64),
        ("--loop",),
    ):
        assert pixels(*options) != plain, options
    path = tmp_path / "slow.mp4"
    run(
        "generate", "a red square", "-m", video_model, "--steps", 1, "-o", path, "--fps", 4, "--device", "cpu"
    )
    assert video.read(path)[1] == 4


def test_generate_writes_an_image_for_one_frame_and_warns_of_truncation(
    video_model, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    printed = run("generate", "a red square " * 9, "-m", video_model, "--steps", 1, "--num-frames", 1)
    assert "truncated" in caplog.text
    assert video.read(printed.strip().splitlines()[-1])[0].shape == (1, 32, 32, 3)


@pytest.mark.parametrize("units", [True, False])
def test_commands_warn_of_slow_bf16(units, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "has_bf16_units", lambda: units)
    with pytest.raises(ValueError, match="absent"):
        run("eval", "absent", "--dtype", "bfloat16", "--device", "cpu")
    assert ("no units for bf16 and computes many times slower" in caplog.text) != units
    dtype = evaluate._parse_dtype("auto", "cpu")
    assert dtype == evaluate._parse_dtype("bfloat16" if units else "float32", "cpu")


@pytest.mark.slow  # its fast twins are the commands of docs/training.md (test_docs.py)
def test_command_leads_from_media_to_evaluation(media, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "3 clips, 1 stills, 0 skipped, 3 concepts, 0 with problems" in run("data", "check", media)
    assert "4 records, 61 frames, 0 skipped" in run(
        "data", "pack", media, "pixels", "--size", 32, "--workers", 1
    )
    shown = run("data", "preview", "pixels", "preview.png", "--rows", 2, "--columns", 4).splitlines()
    assert (
        shown[2] == "2 of 4 clips"
        and len(shown) == 4
        and {*shown[:2]} <= {text for record in Store("pixels").records for text in record.texts}
    )
    recipe = tmp_path / "set" / "autoencoder.toml"
    recipe.parent.mkdir()
    recipe.write_text(dump(tiny_config("autoencoder", "pixels", steps=2)))
    assert run("train", recipe, "--dry-run", "optim.lr=0.5").count("lr = 0.5") == 1
    assert run("train", recipe).splitlines()[-1] == "runs/set-autoencoder/model"
    assert "61 frames" in run(
        "encode", "pixels", "latents", "--autoencoder", "runs/set-autoencoder/model", "--texts", texts
    )
    recipe.with_name("video.toml").write_text(dump(tiny_config("video", "latents", steps=1)))
    run("train", recipe.with_name("video.toml"), "--run", "runs/v")
    # A run folder is its own recipe: the run goes on, with more steps.
    assert run("train", "runs/v", "optim.steps=2").splitlines()[-1] == "runs/v/model"
    assert [
        json.loads(line)["step"] for line in (tmp_path / "runs/v/stats.jsonl").read_text().splitlines()
    ] == [1, 2]
    table = run(
        "eval",
        "pixels",
        "-m",
        "a=runs/v/model",
        "-m",
        "b=runs/v/model",
        "--num",
        2,
        "--steps",
        1,
        "-o",
        "eval.json",
    )
    first, second = json.loads((tmp_path / "eval.json").read_text())
    assert [record["value"] for record in first["records"]] == [
        record["value"] for record in second["records"]
    ]
    assert (first["protocol"]["clips"], first["system"]["num_inference_steps"]) == (2, 1)
    (energy,) = [record["value"] for record in first["records"] if record["measure"] == "motion_energy"]
    assert f"| motion_energy | {energy:.4g} (" in table
    # Both systems share one line.
    assert (
        table.count("\nno clipsim: needs a folder of transformers' CLIPModel")
        == table.count("no clipsim")
        == 1
    )
    for option, message in (
        ("i3d=gone.pt", "gone.pt: no such file"),
        ("i4d=x", "--weights i4d=x: expected i3d=PATH"),
        ("i3d", "--weights i3d: expected i3d=PATH, c3d=PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            run("eval", "pixels", "-m", "a=runs/v/model", "--num", 2, "--steps", 1, "--weights", option)
    with pytest.raises(ValueError, match="--noise: protocol classes has no denoising measures"):
        run("eval", "pixels", "-m", "a=runs/v/model", "--protocol", "classes", "--num", 2, "--noise", 0, 0)
    with pytest.raises(ValueError, match="--model: two systems have one folder"):  # before data is read
        run("eval", "absent", "-m", "a b=runs/v/model", "-m", "a-b=runs/v/model", "--num", 2)
    (tmp_path / "prompts.txt").write_text("# two prompts\na red square\nblue\n")
    run(
        "sheet",
        "prompts.txt",
        "sheet.png",
        "sheet.webp",
        "-m",
        "runs/v/model",
        "--steps",
        1,
        "--device",
        "cpu",
    )
    assert video.read("sheet.png")[0].shape == (1, 2 * (32 + 14), 4 * 32 + 3 * 2, 3)
    assert video.read("sheet.webp")[0].shape == (4, 32, 2 * 32 + 2, 3)


@pytest.mark.parametrize(
    "words",
    [
        "eval pixels --batch-size 0", "eval pixels --num-frames 1", "generate red --steps 0", "generate red --free-init 1", "generate red --shared-noise 2",
        "generate red --strength 1.5", "generate red --chunk 0", "sheet a.txt a.png --columns 0", "data pack media pixels --aspects 1",
        "encode pixels latents --autoencoder emoji --texts emoji --stride 0", "bench index --clips 0", "bench encode --shards 0",
        "generate red --num-frames -1", "generate red --fps 0", "data pack media pixels --workers 0", "data pack media pixels --size -1",
        "data preview pixels a.png --rows 0", "encode pixels latents --autoencoder emoji --texts emoji --workers 0", "bench --rounds 0",
        "bench sweep --frames 0",
    ],
)  # fmt: skip
def test_options_refuse_numbers_out_of_range(words):
    result = runner.invoke(main.app, words.split())
    assert (result.exit_code, f"Invalid value for '{words.split()[-2]}'" in result.output) == (2, True), (
        result.output
    )


def test_help_shows_flags_without_values():
    page = runner.invoke(main.app, ["generate", "--help"]).output
    assert "--loop " in page and "<bool>" not in page and "BOOLEAN" not in page


def test_generate_modes_differ(video_model, media, tmp_path, monkeypatch):
    """Each option gives another clip than none."""
    monkeypatch.chdir(tmp_path)
    run("generate", "red", "-m", video_model, "-o", "still.png", "--num-frames", 1, "--steps", 1)
    half = np.zeros((1, 32, 32, 3), np.uint8)
    half[:, :, :16] = 255
    video.write(half, "half.png")
    seen = {}
    for name, options in {
        "plain": [], "weighed": [], "image": ["--image", "still.png"], "between": ["--image", "still.png", "--last-image", media / "still.png"],
        "video": ["--video", media / "red.webp", "--num-frames", 4], "mask": ["--video", media / "red.webp", "--num-frames", 4, "--mask", "half.png"],
        "strength": ["--video", media / "red.webp", "--num-frames", 4, "--strength", 0.9], "then": ["--then", "3:blue"], "loop": ["--loop"],
        "shared": ["--shared-noise", 0.9], "correlated": ["--noise-correlation", 0.9], "free": ["--free-init", 2],
        "scheduler": ["--scheduler", "EulerAncestralDiscrete"],
        "chunk": ["--num-frames", 9, "--chunk", 2, "--halo", 1], "long": ["--num-frames", 9],
    }.items():  # fmt: skip
        words = "a (red:1.6) square" if name == "weighed" else "a red square"
        run(
            "generate",
            words,
            "-m",
            video_model,
            "-o",
            f"{name}.webp",
            "--steps",
            3,
            "--device",
            "cpu",
            *options,
        )
        seen[name] = video.read(f"{name}.webp")[0]
    assert seen["chunk"].shape == seen["long"].shape == (9, 32, 32, 3)
    names = [name for name in seen if name not in ("chunk", "long")]
    assert all(seen[name].shape == (4, 32, 32, 3) for name in names)
    same = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :] if np.array_equal(seen[a], seen[b])]
    assert not same
    assert not np.array_equal(seen["chunk"], seen["long"])


def test_bench_prints_and_writes_its_result(video_model, tmp_path):
    result = json.loads(
        run("bench", "--frames", 4, "--size", 8, "--rounds", 2, "-o", tmp_path / "bench.json")
    )
    assert result == json.loads((tmp_path / "bench.json").read_text())
    assert result["frame by frame"]["ratio"] == 1
    assert result["with the shift"]["seconds"] > 0
    assert result["parameters"] > 30e6
    assert "emoji" in run("models")
    own = json.loads(run("bench", "-m", video_model, "--rounds", 1, "--frames", 2))
    assert (own["latents"], own["text_length"], own["model"]) == (4, 20, str(video_model))
    assert own["parameters"] < 1e6


def test_bench_commands_times_commands_of_the_model(video_model, monkeypatch):
    started = []

    def in_this_process(words, **_):
        assert words[1:3] == ["-m", "latent_shift"]
        started.append(words[3:])
        run(*words[3:])

    monkeypatch.setattr(timing.subprocess, "run", in_this_process)
    seconds = json.loads(run("bench", "commands", "-m", video_model, "--rounds", 1))["seconds"]
    assert list(seconds) == [
        "latent-shift --help", "latent-shift models", f"latent-shift models show {video_model}", "latent-shift generate --steps 1",
        "latent-shift generate",
    ]  # fmt: skip
    assert ["-m", str(video_model), "--device", "cpu", "--steps", "1"] == started[3][2:8]
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "x", "-m", "emjoi"], "did you mean 'emoji'"),
        (["train", "absent.toml"], "absent.toml"),
        (["data", "check", "absent"], "absent: no such folder"),
        (
            ["bench", "--rounds", "3", "-m", "emoji", "peers"],
            "bench peers: its options come after it, not before it: --rounds, --model",
        ),
        (["data", "preview", "absent", "a.png"], "not a packed data set"),
        (["data", "preview", "absent", "a.jpeg"], "a.jpeg: expected one of .mp4"),
        (["generate", "x", "-o", "clip.avi"], "expected one of .mp4"),
        (["generate", "x", "-o", "clip.gif", "--fps", "60"], "a .gif shows at most 50 frames a second"),
        (["generate", "x", "-o", "clip.png", "--fps", "4"], "--fps has no effect"),
        (["generate", "x", "--loop", "--num-frames", "1"], "loop has no effect on one frame"),
        (["generate", "x", "--then", "lion"], "--then: expected FRAME:PROMPT"),
        (["generate", "x", "--halo", "2"], "halo has no effect without chunk"),
        (["generate", "x", "--scheduler", "DDMI"], "unknown scheduler 'DDMI'; did you mean"),
        (["generate", "x", "--negative", "y", "--guidance", "1"], "negative_prompt has no effect"),
        (["generate", "x", "--device", "cuda:99"], "cuda"),
        (["generate", "x", "--device", "foo"], "device 'foo': expected cpu, cuda, cuda:1 or mps"),
        (
            ["eval", "absent", "--dtype", "float8"],
            "--dtype: expected float32, float16, bfloat16 or auto, got 'float8'",
        ),
        (["encode", "x", "y", "--autoencoder", "emojy", "--texts", "emoji"], "did you mean 'emoji'"),
        (["sheet", __file__, "sheet.jpg"], "expected one of .mp4"),
    ],
)
def test_main_prints_an_error_as_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latent-shift", *words])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_module_prints_an_error_without_traceback():
    result = subprocess.run(
        [sys.executable, "-m", "latent_shift", "train", "absent.toml"], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "absent.toml" in result.stderr
    assert "Traceback" not in result.stderr
