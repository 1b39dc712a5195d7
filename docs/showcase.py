"""Write the clips at the top of README: `python docs/showcase.py`."""

from pathlib import Path

import latent_shift as ls

PROMPTS = (
    "party popper", "spouting whale", "hourglass not done", "hatching chick",
    "rocket", "face with tears of joy", "ghost", "jack-o-lantern",
)  # fmt: skip
FOLDER = Path(__file__).parent / "showcase"


def main() -> None:
    pipe = ls.load("emoji")
    for prompt in PROMPTS:
        clip = pipe(prompt, loop=True, generator=ls.seed(0)).frames[0]
        ls.save_video(clip, FOLDER / f"{prompt.replace(' ', '-')}.webp", fps=8)


if __name__ == "__main__":
    main()
