"""Fault tolerance of commands: a full disk, Ctrl-C, kills, two processes. `python tests/command_faults.py` prints a table.

Each command runs in a process of its own on the smallest model and three clips. After the fault the same command is repeated, and its
files are compared, byte for byte, with those of an undisturbed run. No fault ends with a traceback, and none leaves files that are not
whole under the names of results.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch
from test_modes import sd
from tiny import enter_process, forkserver, make_media, make_texts

from latent_shift.benchmark.hardware import machine
from latent_shift.cli.main import INTERRUPTED, main
from latent_shift.data.pack import pack
from latent_shift.files import write_json
from latent_shift.folders import LOCK, MARKER
from latent_shift.models import sizes
from latent_shift.runtime import quiet_libraries


@dataclass(frozen=True)
class Command:
    """A command whose words name inputs by absolute paths and its output by a path in the folder it runs in."""

    words: list[str]
    output: str
    first: Command | None = None  # runs once before, beside the inputs


def prepare(folder: Path) -> dict[str, Command]:
    """Write the inputs of the commands, and return the commands by name."""
    make_media(folder / "media")
    pack(folder / "media", folder / "pixels", size=32, fps=8, shard_mb=0.05)
    torch.manual_seed(0)
    sizes.autoencoder("tiny").save_pretrained(folder / "autoencoder")
    make_texts(folder / "texts")
    sd(folder / "texts").save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("red\nblue\n")
    media, pixels, texts, model, prompts = (
        str(folder / name) for name in ("media", "pixels", "texts", "model", "prompts.txt")
    )
    encoders = ["--autoencoder", str(folder / "autoencoder"), "--texts", texts]
    generate = ["generate", "red", "-m", model, "--num-frames", "24", "--device", "cpu"]
    evaluate = [
        "eval",
        pixels,
        "-m",
        f"a={model}",
        "--num",
        "2",
        "--num-frames",
        "4",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    evaluation = Command([*evaluate, "--out", str(folder / "evaluation")], str(folder / "evaluation"))
    return {
        "generate": Command([*generate, "-o", "clip.png"], "clip.png"),
        "sheet": Command(["sheet", prompts, "sheet.png", "-m", model, "--device", "cpu"], "sheet.png"),
        "pack": Command(["data", "pack", media, "out", "--size", "32", "--workers", "2"], "out"),
        "encode": Command(["encode", pixels, "out", *encoders, "--workers", "2"], "out"),
        "eval": Command([*evaluate, "--out", "out"], "out"),
        "report": Command(["report", "out", str(folder / "evaluation"), "--rows", "2"], "out", evaluation),
    }  # fmt: skip


def start(words: list[str], folder: Path, file_bytes: int | None = None) -> BaseProcess:
    """Start a command in a folder, with its output in `log` beside it and files of at most `file_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    process = forkserver.Process(target=_run, args=(words, folder, file_bytes))
    process.start()
    return process


def _run(words: list[str], folder: Path, file_bytes: int | None) -> None:
    os.chdir(folder)
    enter_process(folder.with_suffix(".log"), file_bytes)
    sys.argv = ["latent-shift", *words]
    main()


def run_alone(words: list[str], folder: Path) -> float:
    """Run a command to its end; return the seconds."""
    begin = time.monotonic()
    process = start(words, folder)
    process.join()
    assert process.exitcode == 0, read_log(folder)
    return time.monotonic() - begin


def read_log(folder: Path) -> str:
    log = folder.with_suffix(".log").read_text(encoding="utf-8")
    assert "Traceback" not in log, log
    return log


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, without its marker and lock, by their paths."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, LOCK)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def find_differences(folder: Path, whole: Path) -> list[str]:
    """Name the files that differ from those of an undisturbed run."""
    ours, theirs = contents(folder), contents(whole)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def check_nothing_half(command: Command, folder: Path, whole: Path) -> None:
    """Check that a file of one name is there whole or not at all, and that no partial file is left."""
    assert not [name for name in contents(folder) if ".partial" in name]
    if command.output in contents(whole):  # a file
        assert contents(folder).get(command.output) in (None, contents(whole)[command.output])


def full_disk(command: Command, folder: Path, whole: Path, seconds: float) -> str:
    largest = max(len(content) for content in contents(whole).values())
    process = start(command.words, folder, max(2048, largest // 2))
    process.join()
    assert process.exitcode == 1, read_log(folder)
    assert read_log(folder).splitlines()[-1].startswith("latent-shift: ")
    check_nothing_half(command, folder, whole)
    return "disk full: one line, exit status 1"


def interrupted(command: Command, folder: Path, whole: Path, seconds: float) -> str:
    process = start(command.words, folder)
    process.join(seconds / 2)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode in (0, INTERRUPTED), (process.exitcode, read_log(folder))
    assert process.exitcode == 0 or read_log(folder).splitlines()[-1] == "latent-shift: interrupted"
    check_nothing_half(command, folder, whole)
    return f"Ctrl-C: one line, exit status {INTERRUPTED}"


def killed(command: Command, folder: Path, whole: Path, seconds: float) -> str:
    process = start(command.words, folder)
    process.join(seconds / 2)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    for name in [name for name in contents(folder) if ".partial" in name]:  # no one was left to delete them
        (folder / name).unlink()
    check_nothing_half(command, folder, whole)
    return "SIGKILL"


def worker_killed(command: Command, folder: Path, whole: Path, seconds: float) -> str:
    process = start(command.words, folder)
    workers: list[psutil.Process] = []
    while process.is_alive() and not workers:
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        time.sleep(0.05)
    if workers:
        workers[-1].kill()
    process.join(120)
    assert process.exitcode in (0, 1), (process.exitcode, read_log(folder))
    read_log(folder)
    return "SIGKILL of a worker: no hang, no traceback"


def two_processes(command: Command, folder: Path, whole: Path, seconds: float) -> str:
    first = start(command.words, folder)
    while first.is_alive() and not (folder / command.output / MARKER).exists():
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGSTOP)
    second = start(command.words, folder)
    second.join()
    os.killpg(first.pid, signal.SIGCONT)
    first.join()
    assert (first.exitcode, second.exitcode) == (0, 1), read_log(folder)
    assert "another process is writing there" in read_log(folder)
    return "second process in the same folder: refused"


FAULTS: list[Callable[[Command, Path, Path, float], str]] = [
    full_disk,
    interrupted,
    killed,
    worker_killed,
    two_processes,
]


CASES = [
    (name, fault)
    for name in ("generate", "sheet", "pack", "encode", "eval", "report")
    for fault in FAULTS
    if (fault is not worker_killed or name in ("pack", "encode"))
    and (fault is not two_processes or name not in ("generate", "sheet"))
]
"""Commands with the faults that can happen to them: some have workers, some write a folder."""


def inflict(fault: Callable, command: Command, folder: Path) -> tuple[str, list[str]]:
    """Inflict a fault on a command in a new folder and repeat the command; return what was done and what differs."""
    if command.first and not Path(command.first.output).exists():
        run_alone(command.first.words, Path(command.first.output).parent)
    whole = folder / "whole"
    seconds = run_alone(command.words, whole)
    done = fault(command, folder / "fault", whole, seconds)
    run_alone(command.words, folder / "fault")
    return done, find_differences(folder / "fault", whole)


def run_all() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="a .json file for the table")
    arguments = parser.parse_args()
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        commands = prepare(Path(folder))
        print("| command | fault | lost |\n|---|---|---|", flush=True)
        for name, fault in CASES:
            done, lost = inflict(fault, commands[name], Path(folder) / f"{name}-{fault.__name__}")
            rows.append([f"`{name}`", done, ", ".join(lost) or "nothing"])
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if arguments.output:
        write_json({**machine(), "rows": rows}, arguments.output)


if __name__ == "__main__":
    run_all()
