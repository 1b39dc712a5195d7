"""Fault tolerance of training: inflict every fault on a real run and report what was lost. `python tests/faults.py 50` prints a table.

A run is the video stage of the smallest model on moving squares in a process of its own: 20 steps, a checkpoint after each. After the
fault the same command is repeated until the run is finished. The weights, averaged weights, optimizer states and logged losses of its
last checkpoint are compared, bit for bit, with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from tiny import enter_process, forkserver, make_media, make_texts, tiny_config

from latent_shift.benchmark.hardware import machine
from latent_shift.config import Config
from latent_shift.data.encode import encode
from latent_shift.data.pack import pack
from latent_shift.files import write_json
from latent_shift.models import sizes
from latent_shift.runtime import quiet_libraries
from latent_shift.training import checkpoint
from latent_shift.training.loop import train

STEPS = 20


def prepare(folder: Path) -> Config:
    """Write the data of the runs and return their settings."""
    make_media(folder / "media")
    pack(folder / "media", folder / "pixels", size=32, fps=8, shard_mb=0.05)
    torch.manual_seed(0)
    sizes.autoencoder("tiny").save_pretrained(folder / "autoencoder")
    make_texts(folder / "texts")
    encode(folder / "pixels", folder / "latents", autoencoder=folder / "autoencoder", texts=folder / "texts")
    settings = {"checkpoint_minutes": 1e-9, "sample_steps": 1, "sample_every": 10, "log_every": 3}
    return tiny_config("video", folder / "latents", steps=STEPS, train=settings)


def start_run(config: Config, run: Path, file_bytes: int | None = None) -> BaseProcess:
    process = forkserver.Process(target=_train, args=(config, run, file_bytes))
    process.start()
    return process


def _train(config: Config, run: Path, file_bytes: int | None) -> None:
    """Run `latent-shift train` with its output in `run.log` and files of at most `file_bytes`."""
    run.parent.mkdir(parents=True, exist_ok=True)
    enter_process(run.with_suffix(".log"), file_bytes)
    try:
        train(config, run)
    except (ValueError, OSError, RuntimeError) as error:  # as the command does
        print(error, flush=True)
        sys.exit(2)


def run_to_end(config: Config, run: Path) -> None:
    process = start_run(config, run)
    process.join()
    assert process.exitcode == 0, run.with_suffix(".log").read_text(encoding="utf-8")[-2000:]


def wait_for_step(run: Path, step: int, process: BaseProcess) -> None:
    """Wait until the run has a checkpoint of `step`."""
    while process.is_alive() and not any(int(path.name[5:]) >= step for path in checkpoint.steps(run)):
        time.sleep(0.002)


def find_differences(run: Path, whole: Path) -> list[str]:
    """Name the parts of a finished run or store that differ from those of an undisturbed one."""
    if (run / "shards").exists():
        names = {
            str(path.relative_to(folder))
            for folder in (run, whole)
            for path in folder.rglob("*")
            if path.suffix in (".npy", ".jsonl")
        }
        return [
            name
            for name in sorted(names)
            if not (run / name).exists() or (run / name).read_bytes() != (whole / name).read_bytes()
        ]
    ours, theirs = checkpoint.steps(run)[-1], checkpoint.steps(whole)[-1]
    files = ["model.safetensors", "average.safetensors"]
    different = [name for name in files if (ours / name).read_bytes() != (theirs / name).read_bytes()]
    a, b = (torch.load(folder / "optimizer.bin", weights_only=False)["state"] for folder in (ours, theirs))
    if any(not torch.equal(a[number][name], b[number][name]) for number in b for name in b[number]):
        different.append("optimizer")
    rows = [
        [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
        for folder in (run, whole)
    ]
    if [(row["step"], row["loss"]) for row in rows[0]] != [(row["step"], row["loss"]) for row in rows[1]]:
        different.append("losses")
    if not (run / "model" / "model_index.json").exists():
        different.append("model")
    return different


def killed_in_the_middle(config: Config, run: Path, kills: int) -> str:
    process = start_run(config, run)
    wait_for_step(run, 10, process)
    process.kill()
    process.join()
    start, before = time.monotonic(), len(checkpoint.steps(run))
    process = start_run(config, run)
    wait_for_step(run, int(checkpoint.steps(run)[-1].name[5:]) + 1, process)
    seconds = time.monotonic() - start
    process.join()
    assert before and process.exitcode == 0
    return f"SIGKILL after 10 of {STEPS} steps; {seconds:.1f} s to the next step"


def killed_at_random_moments(config: Config, run: Path, kills: int) -> str:
    rng, done = np.random.default_rng(0), 0
    while True:
        process = start_run(config, run)
        process.join(float(rng.uniform(0.05, 2.0)) if done < kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            done += 1
            continue
        assert process.exitcode == 0, run.with_suffix(".log").read_text(encoding="utf-8")[-2000:]
        if done >= kills:
            return f"SIGKILL at {done} random moments"
        check_and_delete(run)


def killed_while_it_saves(config: Config, run: Path, kills: int) -> str:
    done = 0
    while done < kills:
        step = int(checkpoint.steps(run)[-1].name[5:]) + 1 if checkpoint.steps(run) else 1
        process = start_run(config, run)
        while process.is_alive() and not list((run / "checkpoints").glob(f".step-{step + 1:08}.partial/*")):
            time.sleep(0.0002)
        if process.is_alive():
            process.kill()
            done += 1
        process.join()
        if process.exitcode != -signal.SIGKILL:  # it finished before a save was observed
            assert process.exitcode == 0, run.with_suffix(".log").read_text(encoding="utf-8")[-2000:]
            check_and_delete(run)
    run_to_end(config, run)
    return f"SIGKILL {done} times during a save"


def check_and_delete(run: Path) -> None:
    """Check a killed run that finished all the same, and delete it so that another one can start."""
    assert not (different := find_differences(run, run.parent / "whole")), different
    shutil.rmtree(run)


def asked_to_stop(config: Config, run: Path, kills: int) -> str:
    _stop(config, run, signal.SIGTERM)
    run_to_end(config, run)
    return "SIGTERM: it saves and exits with 0"


def interrupted(config: Config, run: Path, kills: int) -> str:
    log = _stop(config, run, signal.SIGINT)
    assert "the same command resumes from there" in log
    run_to_end(config, run)
    return "Ctrl-C: it saves and exits with 0"


def _stop(config: Config, run: Path, number: int) -> str:
    """Send a signal to a run after its second step, and return what it printed."""
    process = start_run(config, run)
    wait_for_step(run, 2, process)
    os.kill(process.pid, number)
    process.join()
    log = run.with_suffix(".log").read_text(encoding="utf-8")
    assert process.exitcode == 0, log
    assert not (run / "model").exists(), f"it had ended before the signal came: {log}"
    return log


def full_disk(config: Config, run: Path, kills: int) -> str:
    process = start_run(config, run)
    wait_for_step(run, 5, process)
    process.kill()
    process.join()
    size = (checkpoint.steps(run)[-1] / "model.safetensors").stat().st_size
    for limit in (
        size // 2,
        size + 1000,
    ):  # too small for the weights, or for the optimizer states, which are twice as large
        process = start_run(config, run, limit)
        process.join()
        log = run.with_suffix(".log").read_text(encoding="utf-8")
        assert (
            process.exitcode == 2
            and "could not be saved" in log
            and "is complete, and the same command resumes" in log
        ), log
    assert not list((run / "checkpoints").glob(".step*"))
    run_to_end(config, run)
    return "disk full: an error, the last checkpoint stays, no partial files"


def cut_checkpoint(config: Config, run: Path, kills: int) -> str:
    run_to_end(config, run)
    shutil.rmtree(run / "model")
    for name in ("optimizer.bin", "average.safetensors"):
        newest = checkpoint.steps(run)[-1]
        with (newest / name).open("r+b") as file:
            file.truncate((newest / name).stat().st_size - 1)
        run_to_end(config, run)
        assert f"step-000000{STEPS} is skipped: {name} has" in run.with_suffix(".log").read_text(
            encoding="utf-8"
        )
    return "newest checkpoint truncated: reported and skipped"


def cut_statistics(config: Config, run: Path, kills: int) -> str:
    process = start_run(config, run)
    wait_for_step(run, 8, process)
    process.kill()
    process.join()
    with (run / "stats.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    run_to_end(config, run)
    return "line of stats.jsonl truncated"


def two_in_one_folder(config: Config, run: Path, kills: int) -> str:
    first = start_run(config, run)
    wait_for_step(run, 2, first)
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot finish before the second starts
    second = start_run(config, run)
    second.join()
    os.kill(first.pid, signal.SIGCONT)
    assert second.exitcode == 2 and "another process is writing there" in run.with_suffix(".log").read_text(
        encoding="utf-8"
    )
    first.join()
    return "second process in the same folder: refused"


def other_settings(config: Config, run: Path, kills: int) -> str:
    process = start_run(config, run)
    wait_for_step(run, 2, process)
    process.kill()
    process.join()
    changed = config.model_copy(update={"model": config.model.model_copy(update={"edge": "wrap"})})
    process = start_run(changed, run)
    process.join()
    assert process.exitcode == 2 and "holds a run with another model.edge" in run.with_suffix(
        ".log"
    ).read_text(encoding="utf-8")
    run_to_end(config, run)
    return "resumed with another shift: refused"


def encoding_killed(config: Config, out: Path, kills: int) -> str:
    done, shards = 0, out / "shards"
    while True:
        process = forkserver.Process(target=_encode, args=(Path(config.data.path).parent, out))
        process.start()
        before = len(list(shards.glob("*.npy")))
        while process.is_alive() and len(list(shards.glob("*.npy"))) <= before:
            time.sleep(0.0005)
        if done < min(kills, 3):  # there are four shards
            process.kill()
            done += 1
        process.join()
        if process.exitcode == 0:
            return f"encoding: SIGKILL {done} times, after a shard"


def _encode(folder: Path, out: Path) -> None:
    encode(folder / "pixels", out, autoencoder=folder / "autoencoder", texts=folder / "texts")


FAULTS: list[Callable[[Config, Path, int], str]] = [
    killed_in_the_middle, killed_at_random_moments, killed_while_it_saves, asked_to_stop, interrupted, full_disk, cut_checkpoint, cut_statistics,
    two_in_one_folder, other_settings, encoding_killed,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kills", type=int, nargs="?", default=50, help="kills at random moments")
    parser.add_argument("-o", "--output", type=Path, help="a .json file for the table")
    arguments = parser.parse_args()
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config, runs = prepare(Path(folder)), Path(folder)
        run_to_end(config, runs / "whole")
        print("| fault | lost |\n|---|---|", flush=True)
        for fault in FAULTS:
            done = fault(config, runs / fault.__name__, arguments.kills)
            whole = runs / ("latents" if fault is encoding_killed else "whole")
            rows.append([done, ", ".join(find_differences(runs / fault.__name__, whole)) or "nothing"])
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if arguments.output:
        write_json({**machine(), "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
