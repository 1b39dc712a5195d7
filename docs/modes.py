"""Run the commands and examples of docs/usage.md, which writes the pictures in docs/modes: `python docs/modes.py`."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    page = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL):
        commands = [shlex.split(line)[1:] for line in block.splitlines()] if language == "bash" else []
        for arguments in commands:
            subprocess.run([sys.executable, "-m", "latent_shift", *arguments], cwd=ROOT, check=True)
        if language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
