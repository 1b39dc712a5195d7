"""Write recipes/emoji/unseen.json: sampling weights of the concepts that the model from before words.toml has never seen.

    python recipes/emoji/unseen.py

One concept in twenty was held out of it, snake and airplane among them. Sampled as often as the others, such a concept comes up too
seldom to be learned in the steps that a CPU can do; the others are known and need rehearsal only.
"""

from __future__ import annotations

import json
from pathlib import Path

from splits import is_unseen

from latent_shift.data.store import Store

WEIGHT = 8


def main() -> None:
    concepts = {record.concept for record in Store("data/emoji-*latents").records if record.split == "train"}
    unseen = sorted(concept for concept in concepts if is_unseen(concept.removesuffix(" composed")))
    text = json.dumps(dict.fromkeys(unseen, WEIGHT), indent=1) + "\n"
    Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
