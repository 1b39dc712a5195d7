"""Measure speed and memory: the JSON of docs/results that docs/tables.py turns into tables.

    python recipes/benchmark.py            # all, hours on two cores
    python recipes/benchmark.py peers      # those whose name is given

It needs data/emoji-128 (recipes/emoji/build.py) for `measures`. Run it from the root of a clone on an otherwise idle machine.
"""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = {
    "bench": "bench --commands",
    "bench-emoji": "bench -m emoji --rounds 20",
    "peers": "bench peers",
    "memory": "bench memory",
    "sweep": "bench sweep --plots docs/results",
    "measures": "bench measures data/emoji-128 --num 164",
    "training": "bench training",
    "encode": "bench encode",
    "index": "bench index --clips 10000000",
}

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHMARKS:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "latent_shift",
                *BENCHMARKS[name].split(),
                "-o",
                f"docs/results/{name}.json",
            ],
            check=True,
        )
