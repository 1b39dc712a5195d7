"""Measure and show the embedded model `emoji`.

python recipes/emoji/measure.py table    # docs/results/emoji.json, emoji-animation.json: the measures of the README's table
python recipes/emoji/measure.py steps    # docs/results/steps-*.json: the same in fewer sampling steps
python recipes/emoji/measure.py words    # docs/results/emoji-words.json and docs/words: does it do what the words ask for
python recipes/emoji/measure.py sheet    # docs/emoji-sheet.png and emoji.gif: a clip for each line of prompts.txt
python recipes/emoji/measure.py modes    # the pictures of docs/usage.md, by its own commands
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import compose_words, environment, former_weights, pack_emoji, run


def table() -> None:
    pack_emoji()
    models = f"-m emoji -m emoji@20 -m former={former_weights()}"
    run(
        f"latent-shift eval data/emoji-128 --protocol emoji {models} --dtype auto -o docs/results/emoji.json --force"
    )
    run(
        f"latent-shift eval data/emoji-128 --split val_animation --out evals/animation {models} --dtype auto "
        "-o docs/results/emoji-animation.json --force"
    )


def steps() -> None:
    pack_emoji()
    for num in (1, 2, 4, 8):
        models = "-m emoji -m emoji@20" if num < 4 else "-m emoji@20"  # 4 steps of emoji are in the table
        run(
            f"latent-shift eval data/emoji-128 --protocol emoji {models} --steps {num} --dtype auto --out evals/steps-{num} "
            f"-o docs/results/steps-{num}.json --force"
        )


def words() -> None:
    compose_words()
    evaluate = "latent-shift eval data/emoji-words --protocol words --dtype auto"
    run(f"{evaluate} -m emoji -o docs/results/emoji-words.json --force")
    run("latent-shift report docs/words evals/words --show emoji --rows 16 --title 'emoji and words' --force")
    models = f"-m emoji@20 -m former={former_weights()}"
    run(f"{evaluate} {models} --out evals/words-teacher -o docs/results/emoji-words-teacher.json --force")


def sheet() -> None:
    run("latent-shift sheet recipes/emoji/prompts.txt docs/emoji-sheet.png docs/emoji.gif --force")


def modes() -> None:
    """Run the commands and the Python blocks of docs/usage.md, in order, with output in docs/modes instead of out."""
    page = Path("docs/usage.md").read_text(encoding="utf-8").replace("out/", "docs/modes/")
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language == "python":
            subprocess.run([sys.executable, "-c", block], check=True, env=environment())
        else:
            lines = [line for line in block.splitlines() if line.startswith("latent-shift generate")]
            commands = "\n".join(f"{line} --force" for line in lines)
            subprocess.run(["sh", "-ec", commands], check=True, env=environment())


if __name__ == "__main__":
    tasks = {"table": table, "steps": steps, "words": words, "sheet": sheet, "modes": modes}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=tasks)
    tasks[parser.parse_args().task]()
