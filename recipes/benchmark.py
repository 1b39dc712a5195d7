"""Measure speed and memory: the JSON of docs/results that docs/tables.py turns into tables.

    python recipes/benchmark.py            # all but gpu, hours on two cores
    python recipes/benchmark.py peers      # those whose name is given

`gpu` needs a GPU, and takes some minutes of it. `measures` fetches and packs the emoji data first, `training-comparison` needs
`recipes/compare/compare.py seeds` before. Run it from the root of a clone on an otherwise idle machine.
"""

from __future__ import annotations

import argparse

from commands import pack_emoji, run

BENCHMARKS = {
    "bench": "bench",
    "commands": "bench commands",
    "bench-emoji": "bench -m emoji --rounds 20",
    "peers": "bench peers",
    "memory": "bench memory",
    "sweep": "bench sweep --plots docs/results",
    "measures": "bench measures data/emoji-128 --num 164",
    "training": "bench training --rounds 12",
    "training-comparison": "bench training -m runs/compare/none/model --rounds 12",
    "encode": "bench encode",
    "engines": "bench engines --steps 4 --steps 2 --steps 1 --rounds 3",
    "engines-teacher": "bench engines -m emoji@20 --steps 20 --steps 8 --steps 4 --steps 2 --steps 1 --rounds 1",
    "gpu": "bench gpu",
    "index": "bench index --clips 10000000",
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=["all", *BENCHMARKS], default="all")
    names = parser.parse_args().names
    for name in [name for name in BENCHMARKS if name != "gpu"] if "all" in names else names:
        if name == "measures":
            pack_emoji()
        run(f"latent-shift {BENCHMARKS[name]} -o docs/results/{name}.json --force")
