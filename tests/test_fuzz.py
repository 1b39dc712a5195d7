"""Bad input of every kind of bad_inputs.py, a few of each: no traceback, no hang, no memory, nothing wrong in silence."""

import mmap
import os
import signal
import sys
import time
from collections import Counter

import fuzz
import limited_process
import pytest
from bad_inputs import KINDS, Trial, World
from limited_process import run_process


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


NUM = dict.fromkeys(KINDS, 26) | {
    "runs": 2,
    "prompts": 12,
    "evaluations": 10,
    "model_json": 16,
    "options": 16,
    "calls": 36,
}
"""Inputs of each kind, fewer of those that take long: 300 in all, of another seed than those of `make fuzz`."""


def test_numbers_of_inputs_add_up():
    assert sum(NUM.values()) == 300


@pytest.mark.parametrize("kind", KINDS)
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
        (lambda: sys.exit("latent-shift: no"), "refused"),
        (lambda: [][0], "traceback"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "traceback"),
        (take_memory, "memory"),
        (lambda: print("oops"), "wrong"),
    ],
)
def test_outcomes_are_told_apart(run, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(limited_process, "GIB", 0.1)
    trial = Trial(run, lambda result: result.output.strip())
    assert fuzz.outcome_of(trial, run_process(run, tmp_path))[0] == outcome


def test_a_hang_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(limited_process, "SECONDS", 0.2)
    result = run_process(lambda: time.sleep(60), tmp_path)
    assert fuzz.outcome_of(Trial([]), result)[0] == "hang"


def test_inputs_follow_from_seed_and_number(world):
    tried = [fuzz.try_input("prompts", number, 0, world)[:2] for number in (3, 3, 4)]
    assert Counter(words.partition(" -- ")[2] for _, words in tried).most_common()[0][1] == 2
