"""Bad input of every kind: run the command on it and count what happens.

    make fuzz                                              # 10,000 inputs; writes docs/results/fuzz.json
    python tests/fuzz.py --num 600 --seed 7 --only films
    python tests/fuzz.py --only films --first 118 --num 1  # one of them again, with all that the command says

Input number k of a kind follows from the seed and k alone (bad_inputs.py). Each runs in a process of its own, forked from this one
after the imports, within the limits of limited_process.py. Outcomes: right; refused, in one line that says why; traceback; hang;
memory; wrong: it ended well although its result is not what the input asks for.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from bad_inputs import KINDS, Trial, World
from limited_process import Result, run_process

from latent_shift.benchmark.hardware import machine
from latent_shift.cli.terminal import Progress
from latent_shift.files import markdown_table, write_json
from latent_shift.runtime import quiet_libraries

OUTCOMES = ("right", "refused", "traceback", "hang", "memory", "wrong")
BAD = OUTCOMES[2:]


def outcome_of(trial: Trial, result: Result) -> tuple[str, str]:
    """Return the outcome of an input and what was said."""
    said = [line for line in result.errors.splitlines() if line.strip()]
    last = said[-1] if said else ""
    if result.stopped:
        return result.stopped, last
    if "Traceback (most recent call last)" in result.errors or result.status < 0 or result.status > 2:
        return "traceback", last or f"exit status {result.status}"
    if result.status == 0 or (trial.report and result.status == 1 and not last.startswith("latent-shift: ")):
        wrong = trial.wrong(result)
        return ("wrong", wrong) if wrong else ("right", "")
    return ("refused", last) if last else ("traceback", "exit status 1 without a word")


def try_input(kind: str, number: int, start: int, world: World) -> tuple[str, str, Result]:
    """Make input `number` of a kind, run it, and return its outcome, what was said, and the result."""
    rng = np.random.default_rng([start, list(KINDS).index(kind), number])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trial = KINDS[kind](rng, world, Path(folder))
        result = run_process(trial.run, Path(folder))
        outcome, said = outcome_of(trial, result)
        words = "a call" if callable(trial.run) else " ".join(map(str, trial.run))
        return outcome, f"{said}  [{words}]", result


def fuzz(
    world: World,
    kinds: list[str],
    num: int,
    *,
    start: int = 0,
    first: int = 0,
    workers: int = 1,
    show: Sequence[str] = BAD,
) -> dict[str, Counter[str]]:
    """Try `num` inputs of the kinds in turn, print those with an outcome in `show`, and return how often each outcome came."""
    rounds = ((kind, number) for number in itertools.count(first) for kind in kinds)
    # A run that is resumed takes ten times as long as other inputs.
    inputs = list(
        itertools.islice((item for item in rounds if item[0] != "runs" or item[1] % 4 == first % 4), num)
    )
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    with ThreadPoolExecutor(workers) as pool, Progress("bad inputs") as progress:
        tried = pool.map(lambda item: try_input(*item, start, world), inputs)
        for done, ((kind, number), (outcome, said, result)) in enumerate(
            zip(inputs, tried, strict=True), start=1
        ):
            counts[kind][outcome] += 1
            said = said.encode(errors="backslashreplace").decode()
            if outcome in show:
                print(f"{outcome}: --only {kind} --first {number} --seed {start}: {said}", flush=True)
            if num == 1:
                print(result.output, result.errors, outcome, said, sep="\n")
            progress(done, num)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=10_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--show", nargs="*", choices=OUTCOMES, default=BAD, help="outcomes whose inputs are printed"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("-o", "--output", type=Path, help="a .json file for the numbers of the table")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        counts = fuzz(
            world,
            arguments.only,
            arguments.num,
            start=arguments.seed,
            first=arguments.first,
            workers=arguments.workers,
            show=arguments.show,
        )
    total = sum(counts.values(), Counter())
    rows = [
        [kind, str(count.total()), *(str(count[outcome]) for outcome in OUTCOMES)]
        for kind, count in [*counts.items(), ("all", total)]
    ]
    print(markdown_table(["input", "tried", *OUTCOMES], rows))
    if arguments.output:
        outcomes = {kind: {outcome: count[outcome] for outcome in OUTCOMES} for kind, count in counts.items()}
        write_json({**machine(), "seed": arguments.seed, "outcomes": outcomes}, arguments.output)
    sys.exit(any(total[outcome] for outcome in BAD))


if __name__ == "__main__":
    main()
