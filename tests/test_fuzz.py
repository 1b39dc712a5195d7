"""Bad input of every kind of fuzz.py, a few of each: no traceback, no hang, no memory, nothing wrong in silence."""

import mmap
import time
from collections import Counter

import fuzz
import pytest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return fuzz.World(tmp_path_factory.mktemp("world"))


NUM = dict.fromkeys(fuzz.KINDS, 25) | {"runs": 4, "prompts": 14, "evaluations": 12}
"""Inputs of each kind, fewer of those that take long: 305 in all, of another seed than those of `make fuzz`."""


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_bad_input_is_refused_or_read_right(kind, world, capsys):
    counts = fuzz.fuzz(world, [kind], NUM[kind], start=1)[kind]
    assert not counts.keys() & set(fuzz.BAD), capsys.readouterr().out
    assert counts.total() == NUM[kind]


def take_memory() -> None:
    """Take pages of their own: the allocator would give those that an earlier test freed."""
    block = mmap.mmap(-1, 2**28)
    block.write(bytes(2**28))
    time.sleep(2)


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (lambda: None, "right"),
        (lambda: fuzz.sys.exit("latent-shift: no"), "refused"),
        (lambda: [][0], "traceback"),
        (lambda: fuzz.os.kill(fuzz.os.getpid(), fuzz.signal.SIGKILL), "traceback"),
        (take_memory, "memory"),
        (lambda: print("oops"), "wrong"),
    ],
)
def test_outcomes_are_told_apart(run, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "GIB", 0.1)
    trial = fuzz.Trial(run, lambda result: result.output.strip())
    assert fuzz.outcome_of(trial, fuzz.run_process(run, tmp_path))[0] == outcome


def test_a_hang_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    result = fuzz.run_process(lambda: fuzz.time.sleep(60), tmp_path)
    assert fuzz.outcome_of(fuzz.Trial([]), result)[0] == "hang"


def test_inputs_follow_from_seed_and_number(world):
    tried = [fuzz.try_input("prompts", number, 0, world)[:2] for number in (3, 3, 4)]
    assert Counter(words.partition(" -- ")[2] for _, words in tried).most_common()[0][1] == 2
