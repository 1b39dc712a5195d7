"""Write the names that `emoji` was trained on into its folder, and measure from where on a prompt is far from them.

    python recipes/emoji/names.py data/emoji data/emoji-words

A prompt is far if no part of it is as near to a name as 90 % of the synonyms are (wordings.SYNONYMS), each left out of the names in
turn. How often other words are called far is measured on the captions of held-out combinations, whose things are known, on the keywords
of known things, and on the names of what was held out whole. Writes names.safetensors into the folder of the model, and
docs/results/names.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from compose import open_things

from latent_shift.data.store import Store
from latent_shift.files import write_json
from latent_shift.models.loading import open_text_encoder, open_tokenizer
from latent_shift.models.names import Names, embedder, write_names
from latent_shift.pipelines import catalog

KNOWN = 0.9  # fraction of the synonyms that are not called far


def keywords(record: dict) -> list[str]:
    """Return the keywords in a record of fetch.py: what follows the name in the caption "NAME, KEYWORD, KEYWORD"; words for a motion
    are in another caption."""
    name, *others = record["text"]
    if record["split"] != "train" or "skin tone" in name:
        return []
    texts = (text.removeprefix(f"{name}, ") for text in others if text.startswith(f"{name}, "))
    keywords = (
        text.split(", ") for text in texts if not text.startswith(("moving", "changing size", "almost still"))
    )
    return next(keywords, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="written by fetch.py")
    parser.add_argument("composed", type=Path, help="written by compose.py")
    args = parser.parse_args()
    model = catalog.folder("emoji")
    embed = embedder(open_tokenizer(model / "tokenizer"), open_text_encoder(model / "text_encoder").float())
    things, _ = open_things(args.folder)
    names = list(dict.fromkeys(name for thing in things.values() for name in thing.names))
    known = Names(tuple(names), embed(names), 0.0)

    def similarities(prompts: list[str]) -> np.ndarray:
        return np.array([known.nearest(prompt, embed, num=1)[0][1] for prompt in prompts])

    synonyms = [names.index(name) for thing in things.values() for name in thing.names[1:]]
    without = [np.delete(known.embeddings, index, axis=0) @ known.embeddings[index] for index in synonyms]
    threshold = float(np.quantile([similarity.max() for similarity in without], 1 - KNOWN))
    text = (args.folder / "metadata.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    unknown = sorted({record["text"][0] for record in records if record["split"] == "val_concept"})
    others = {
        "captions_of_held_out_combinations": [
            record.texts[0] for record in Store(args.composed).records if record.split == "val_words"
        ],
        "keywords_of_known_things": sorted(
            {word for record in records for word in keywords(record)} - set(names)
        ),
        "names_of_unknown_things": unknown,
        "names_of_unknown_things_on_a_blue_background": [f"{name} on a blue background" for name in unknown],
    }
    result = {"names": len(names), "threshold": threshold} | {
        kind: {"number": len(prompts), "called_far": float((similarities(prompts) < threshold).mean())}
        for kind, prompts in others.items()
    }
    write_names(model, names, known.embeddings, threshold)
    write_json(result, Path("docs/results/names.json"))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
