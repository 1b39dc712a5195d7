"""Worker processes: one that dies costs its own call, and nothing waits for it."""

import os
import signal
import time

import numpy as np
import pytest

from latent_shift import video
from latent_shift.data import decode
from latent_shift.data.pack import pack
from latent_shift.data.records import Problem
from latent_shift.data.workers import WorkerDied, Workers


def answer(word: str) -> object:
    """Do what a word says in the worker process."""
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "sleep":
        time.sleep(1000)
    if word == "raise":
        raise ValueError("raised")
    return word * 1_000_000


def test_workers_survive_calls_that_end_their_process():
    words = ["a", "die", "b", "raise", "die", "die", "c", "d"]
    results = []
    with Workers(answer, 2) as pool:
        for future in [pool.submit(word) for word in words]:
            try:
                results.append(future.result()[0])
            except (WorkerDied, ValueError) as error:
                results.append(str(error))
    killed = "the worker process was ended by SIGKILL, perhaps because the memory was full"
    assert results == ["a", killed, "b", "raised", killed, killed, "c", "d"]


def test_workers_end_calls_that_take_too_long():
    with Workers(answer, 1, seconds=0.5) as pool:
        slow, fast = pool.submit("sleep"), pool.submit("a")
        with pytest.raises(WorkerDied, match=r"took longer than 0\.5 s"):
            slow.result()
        assert len(fast.result()) == 1_000_000


def test_workers_end_with_the_block():
    with Workers(answer, 2) as pool:
        processes = list(pool._all)
        pool.submit("sleep")
    assert not any(process.is_alive() for process in processes)


def kill_at_bad(path, **options):
    if "bad" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return np.full((20, 16, 16, 3), 9, np.uint8), 8.0


def test_pack_skips_the_file_at_which_a_worker_dies(tmp_path, monkeypatch):
    for name in ("a", "bad1", "b", "bad2", "c"):
        video.write(np.full((2, 16, 16, 3), 9, np.uint8), tmp_path / f"{name}.webp")
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.setattr(decode.video, "read", kill_at_bad)  # the workers are forked
    problems = pack(tmp_path, tmp_path / "store", size=16, fps=8, workers=2)
    reason = "cannot be decoded: the worker process was ended by SIGKILL, perhaps because the memory was full"
    assert [problem for problem in problems if problem.outcome == "skipped"] == [
        Problem("bad1.webp", reason),
        Problem("bad2.webp", reason),
    ]
