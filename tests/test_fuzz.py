"""Bad input of every kind of bad_inputs.py, a few of each: no traceback, no hang, no memory, nothing wrong in silence."""

import io
import mmap
import os
import signal
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import fuzz
import limited_process
import pytest
from bad_inputs import KINDS, Trial, World
from limited_process import run_process
from tiny import forkserver


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A small process to fork the tries from: this one may hold gigabytes by now, and a fork copies their page tables."""
    with forkserver.Pool(1, make_world, (tmp_path_factory.mktemp("world"),)) as pool:
        yield pool


def make_world(folder: Path) -> None:
    global world
    world = World(folder)


def try_kind(kind: str, num: int) -> tuple[Counter[str], str]:
    """Return the outcomes of a kind's inputs, and what is printed of the bad ones."""
    with redirect_stdout(io.StringIO()) as output:
        counts = fuzz.fuzz(world, [kind], num, start=1)[kind]
    return counts, output.getvalue()


def try_prompt(number: int) -> str:
    return fuzz.try_input("prompts", number, 0, world)[1]


NUM = dict.fromkeys(KINDS, 9) | {
    "runs": 1,
    "prompts": 4,
    "evaluations": 3,
    "model_json": 5,
    "options": 5,
    "calls": 10,
}
"""Inputs of each kind, fewer of those that take long: 100 in all, of another seed than those of `make fuzz`."""


def test_numbers_of_inputs_add_up():
    assert sum(NUM.values()) == 100


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused_or_read_right(kind, pool):
    counts, output = pool.apply(try_kind, (kind, NUM[kind]))
    assert not counts.keys() & set(fuzz.BAD), output
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


def test_inputs_follow_from_seed_and_number(pool):
    words = pool.map(try_prompt, (3, 3, 4))
    assert Counter(word.partition(" -- ")[2] for word in words).most_common()[0][1] == 2
