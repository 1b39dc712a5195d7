"""Hooks of `mkdocs build`: README.md becomes the home page and the model card a page, so each exists once."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
MODEL_CARD = "src/latent_shift/weights/emoji/README.md"
PAGES = {"index.md": "README.md", "model-card.md": MODEL_CARD}
LINKS = {  # as the files in the repository link to each other -> as the pages of the site do
    "](docs/": "](",
    "](../../../../docs/": "](",
    "](../README.md": "](index.md",
    f"]({MODEL_CARD}": "](model-card.md",
    f"](../{MODEL_CARD}": "](model-card.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose source lies outside docs/."""
    for uri, source in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace links between files by links between pages."""
    for link, page_link in LINKS.items():
        markdown = markdown.replace(link, page_link)
    return markdown
