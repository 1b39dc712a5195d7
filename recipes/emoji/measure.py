"""Measure and show the embedded model `emoji`.

python recipes/emoji/measure.py table    # docs/results/emoji.json: the measures of the README's table
python recipes/emoji/measure.py sheet    # docs/emoji-sheet.png and emoji.gif: a clip for each line of prompts.txt
python recipes/emoji/measure.py modes    # the pictures of docs/usage.md, by its own commands
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from build import prepare_data, run


def table() -> None:
    prepare_data()
    run("latent-shift eval data/emoji-128 --protocol emoji --compile -o docs/results/emoji.json")


def sheet() -> None:
    run("latent-shift sheet recipes/emoji/prompts.txt docs/emoji-sheet.png docs/emoji.gif")


def modes(page: str = "docs/usage.md") -> None:
    """Run the commands and the Python blocks of a page, in order, with output in docs/modes instead of out."""
    text = Path(page).read_text(encoding="utf-8").replace("out/", "docs/modes/")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            subprocess.run([sys.executable, "-"], input=block, text=True, check=True)
        else:
            commands = "\n".join(line for line in block.splitlines() if line.startswith("latent-shift"))
            subprocess.run(["sh", "-ec", commands], env={**os.environ, "PATH": path}, check=True)


if __name__ == "__main__":
    {"table": table, "sheet": sheet, "modes": modes}[sys.argv[1]](*sys.argv[2:])
