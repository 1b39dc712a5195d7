"""Run a command or a function in a forked process with limits of time and memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from latent_shift.cli.main import main as command

CPU_SECONDS, SECONDS, GIB = 30, 120, 2.0
"""Computing time, time by the clock (for other work on the machine), and memory above what the process starts with."""


class Result(NamedTuple):
    """What a process did: its exit status, what it printed, and why it was stopped, if it was."""

    status: int
    output: str
    errors: str
    stopped: str = ""


def run_process(run: list[Any] | Callable[[], object], folder: Path) -> Result:
    """Run a command or a function in a forked process, in a folder, with limits of time and memory."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            _run_child(run, folder, output.fileno(), errors.fileno())
        stopped, status = _watch(process)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Result(status, *texts, stopped)


def _run_child(run: list[Any] | Callable[[], object], folder: Path, output: int, errors: int) -> None:
    """Run in the forked process, which ends here."""
    status = 1
    try:
        os.setpgrp()
        torch.set_num_threads(
            1
        )  # the threads of the parent are not in a fork, and OpenMP would wait for them
        used = int(time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, used + CPU_SECONDS + 1))
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", errors="replace", closefd=False) for number in (1, 2)
        )
        if callable(run):
            run()
        else:
            sys.argv = ["latent-shift", *map(str, run)]
            command()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(process: int) -> tuple[str, int]:
    """Wait for a process; kill it if it takes too long or too much memory. Return why, and its status."""
    page = os.sysconf("SC_PAGE_SIZE")
    began, first = time.monotonic(), None
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "hang" if code == -signal.SIGXCPU else "", code
        try:
            memory = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * page / 2**30
        except (FileNotFoundError, ProcessLookupError, IndexError):
            memory = 0.0
        first = memory if first is None else first
        stopped = "hang" if time.monotonic() - began > SECONDS else "memory" if memory > first + GIB else ""
        if stopped:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return stopped, -signal.SIGKILL
        time.sleep(0.005)
