"""Worker processes: one that dies costs its own call, and nothing waits for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from latent_shift.data.decode import Clip, decode_records
from latent_shift.data.records import Problem, Record
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
    with Workers(answer, 1, seconds=2) as pool:  # on a busy machine a process is started in half a second
        slow, fast = pool.submit("sleep"), pool.submit("a")
        with pytest.raises(WorkerDied, match=r"took longer than 2 s"):
            slow.result()
        assert len(fast.result()) == 1_000_000


def test_workers_end_with_the_block():
    with Workers(answer, 2) as pool:
        processes = list(pool._all)
        pool.submit("sleep")
    assert not any(process.is_alive() for process in processes)


class NotPicklable(Exception):
    """An exception that can be pickled but not unpickled, as those of many libraries."""

    def __init__(self, code: int, text: str):
        super().__init__(text)


def raise_not_picklable(word: str) -> str:
    if word == "bad":
        raise NotPicklable(1, word)
    return word


def test_workers_survive_answers_that_cannot_be_unpickled():
    with Workers(raise_not_picklable, 1) as pool:
        bad, good = pool.submit("bad"), pool.submit("good")
        with pytest.raises(TypeError, match="__init__"):
            bad.result()
        assert good.result() == "good"
        with pytest.raises(AttributeError, match="pickle"):
            pool.submit(lambda: 0).result()
        assert pool.submit("good").result() == "good"


def kill_at_bad(record: Record, media: Path) -> Clip:
    if "bad" in record.file_name:
        os.kill(os.getpid(), signal.SIGKILL)
    return Clip(np.zeros((1, 16, 16, 3), np.uint8), ())


def test_decode_records_names_the_file_at_which_a_worker_dies():
    records = [(Record(name, (name,), name), Path(name)) for name in ("a", "bad1", "b", "bad2", "c")]
    clips = dict(decode_records(records, kill_at_bad, workers=2))
    reason = "cannot be decoded: the worker process was ended by SIGKILL, perhaps because the memory was full"
    problems = {record.file_name: clip for record, clip in clips.items() if isinstance(clip, Problem)}
    assert problems == {name: Problem(name, reason) for name in ("bad1", "bad2")}
    assert len(clips) == 5


def test_workers_that_cannot_start_end_the_work(tmp_path):
    """A script without a guard runs again in each process, where it may not start others."""
    (tmp_path / "script.py").write_text(
        "from latent_shift.data.workers import Workers\n"
        "with Workers(len, 1) as pool:\n    pool.submit('a').result()\n"
    )
    result = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "RuntimeError: the worker process ended with exit status 1 while it started; "
        'pass workers=1, or work in a script file below `if __name__ == "__main__":`'
    )


def test_workers_that_start_leave_interrupts_to_their_parent():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with Workers(answer, 3) as pool:
        for process in pool._all:
            os.kill(process.pid, signal.SIGINT)
        assert {pool.submit(word).result()[0] for word in "abc"} == set("abc")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
