"""Bad input of every kind, made from good media, data sets, models and runs; fuzz.py tries it."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import string
import sys
import tarfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers import DDIMScheduler
from limited_process import Result, run_process
from PIL import Image
from tiny import make_media, make_texts, tiny_config
from transformers import CLIPTextModel, CLIPTokenizer

from latent_shift import video
from latent_shift.config import Config
from latent_shift.data.encode import encode
from latent_shift.data.pack import pack
from latent_shift.folders import LOCK, MARKER
from latent_shift.models import sizes
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.recipe import dump
from latent_shift.runtime import seed


@dataclass
class Trial:
    """One input.

    Args:
        run: words of a command, or a function.
        wrong: returns what is wrong with a result that ended well, or "".
        report: the command lists problems and exits with 1, as `data check` does; that is a right result.
    """

    run: list[Any] | Callable[[], object]
    wrong: Callable[[Result], str] = lambda result: ""
    report: bool = False


# What the inputs are made of


class World:
    """Good media, data sets, models and runs, of which bad ones are made."""

    def __init__(self, folder: Path):
        self.folder = folder
        make_media(folder / "media")
        pack(folder / "media", folder / "pixels", size=32, fps=8, shard_mb=0.05)
        torch.manual_seed(0)
        make_texts(folder / "texts")
        self.pipe = LatentShiftPipeline(
            sizes.autoencoder("tiny").eval(),
            CLIPTextModel.from_pretrained(folder / "texts" / "text_encoder"),
            CLIPTokenizer.from_pretrained(folder / "texts" / "tokenizer"),
            sizes.unet("tiny", sample_size=4).eval(),
            DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
            latent_shift={"num_frames": 4, "num_inference_steps": 2, "guidance_scale": 3.0},
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.save_pretrained(folder / "model")
        encode(
            folder / "pixels",
            folder / "latents",
            autoencoder=folder / "model" / "vae",
            texts=folder / "texts",
        )
        self.recipe = tiny_config(
            "video", folder / "latents", steps=2, train={"sample_steps": 1, "checkpoint_minutes": 1e-9}
        )
        (folder / "recipe.toml").write_text(dump(self.recipe))
        self._ready("train", folder / "recipe.toml", "--run", folder / "run")
        self._ready(
            "eval",
            folder / "pixels",
            "-m",
            folder / "model",
            "--num",
            2,
            "--num-frames",
            4,
            "--steps",
            1,
            "--out",
            folder / "evals",
        )

    def _ready(self, *words: Any) -> None:
        result = run_process(list(words), self.folder)
        assert result.status == 0, result

    def copy(self, name: str, folder: Path) -> Path:
        """Return a copy of a folder of the world."""
        return Path(shutil.copytree(self.folder / name, folder / name))


TEXTS = (
    "a", "red square", "", " ", "\t\n", "a" * 3000, "ünïcödé 猫 🦊", "\ud83d", "\x00", "a\x00b", "(a:1.3)", "((a))", "(a", "a)", "(:1.2)",
    "(a:)", "(a:nan)", "(a:1e99)", "[a]", "\\(a\\)", "12:30", "16:9", "{a}", "%s", "../..", "-", "--", "a:b:c", "<a>", "\u202eabc", "a\rb",
)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    0.5,
    -0.5,
    1e-30,
    1e30,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63,
    -(2**63),
    10**30,
)
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [None], {"a": []}, [[]], "", "1", *NUMBERS, *TEXTS[:8])


def pick(rng: np.random.Generator, choices: Any) -> Any:
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


def changed_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    """Return a file's content cut, overwritten, repeated or extended at random."""
    data, size = bytearray(content), len(content)
    for _ in range(int(rng.integers(1, 4))):
        where, length = int(rng.integers(size)), int(rng.integers(1, 64))
        match int(rng.integers(7)):
            case 0:
                del data[where:]
            case 1:
                data[where : where + length] = rng.bytes(length)
            case 2:
                data[where : where + length] = bytes(length)
            case 3:
                del data[where : where + length]
            case 4:
                data[where:where] = rng.bytes(length)
            case 5:
                start = int(rng.integers(min(64, size)))  # the header
                data[start : start + 1] = rng.bytes(1)
            case _:
                data += rng.bytes(length)
    return bytes(data)


def changed_json(rng: np.random.Generator, text: str) -> str:
    """Return a JSON text in which one value or key is another, or which is no JSON."""
    if rng.random() < 0.15:
        return pick(
            rng,
            ["", "{", "[]", "null", "3", '"a"', text[: len(text) // 2], "\ufeff" + text, "{}", "[{}]", "NaN"],
        )
    value = json.loads(text)
    spots: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in pairs:
            spots.append((node, key))
            collect(child)

    collect(value)
    if not spots:
        return json.dumps(pick(rng, VALUES))
    node, key = pick(rng, spots)
    if rng.random() < 0.3 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = pick(rng, VALUES)
    return json.dumps(value)


def change_file(rng: np.random.Generator, path: Path) -> None:
    """Remove a file, empty it, or change its content."""
    match int(rng.integers(8)):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(b"")
        case 2:
            path.unlink()
            path.mkdir()
        case _ if path.suffix == ".json":
            path.write_text(changed_json(rng, path.read_text()), encoding="utf-8", errors="surrogatepass")
        case _:
            path.write_bytes(changed_bytes(rng, path.read_bytes()))


def change_some_file(rng: np.random.Generator, folder: Path) -> None:
    """Change one of the files of a folder, but neither its lock nor its marker."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (LOCK, MARKER))
    change_file(rng, pick(rng, sorted(paths)))


def squares(num: int = 12, side: int = 32) -> np.ndarray:
    """A red square that moves on white, as `(F, H, W, 3) uint8`."""
    frames = np.full((num, side, side, 3), 255, np.uint8)
    for k in range(num):
        frames[k, 8:20, k : k + 12] = (255, 0, 0)
    return frames


def no_picture(path: Path) -> str:
    """Return what is wrong with a generated file, or ""."""
    try:
        frames, _ = video.read(path)
    except ValueError as error:
        return f"cannot be read: {error}"
    return "one colour everywhere" if frames.min() == frames.max() else ""


# The kinds of input


def settings(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A recipe with wrong, missing or unknown settings."""
    tables = {
        name: dict(table) if isinstance(table, dict) else table
        for name, table in world.recipe.model_dump().items()
    }
    fields = {
        name: list(field.annotation.model_fields)
        for name, field in Config.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    words = []
    for _ in range(int(rng.integers(1, 4))):
        table = pick(rng, fields)
        key = pick(rng, [*fields[table], "unknown"])
        value = pick(rng, VALUES)
        if rng.random() < 0.5:
            words.append(f"{table}.{key}={value}")
        elif isinstance(tables.get(table), dict):
            tables[table][key] = value
    (folder / "recipe.toml").write_text(_toml(tables), encoding="utf-8", errors="surrogatepass")
    words = [word for word in words if "\x00" not in word]
    return Trial(["train", "recipe.toml", "--run", "run", "--dry-run", *words])


def _toml(tables: dict[str, Any]) -> str:
    lines = [
        f"{name} = {_toml_value(value)}"
        for name, value in tables.items()
        if not isinstance(value, dict) and value is not None
    ]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += [
                f"[{name}]",
                *(f"{key} = {_toml_value(value)}" for key, value in table.items() if value is not None),
            ]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(child)}" for key, child in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return (
        repr(value)
        if isinstance(value, float)
        else json.dumps(value if isinstance(value, (bool, int, str)) else str(value))
    )


OPTIONS = {
    "--guidance": NUMBERS, "--shared-noise": NUMBERS, "--noise-correlation": NUMBERS, "--fps": NUMBERS, "--strength": NUMBERS,
    "--seed": NUMBERS, "--steps": (-1, 0, 1, 2, 3), "--num-frames": (-1, 0, 1, 2, 3, 5), "--size": (-8, 0, 7, 8, 12, 16, 24, 40),
    "--height": (0, 8, 20, 32), "--width": (0, 8, 24), "--chunk": (-1, 0, 1, 2, 9), "--halo": (-1, 0, 1, 9), "--free-init": (0, 1, 2, 3),
    "--negative": TEXTS, "--then": ("1:red", "0:a", "x:a", "99:a", ":", "2", "-1:a", *TEXTS), "--scheduler": ("DDIM", "EulerDiscrete", "", "x", "PNDM"),
    "--image": ("still.png", "absent.png", "note.txt", "."), "--last-image": ("still.png", "note.txt"), "--video": ("clip.mp4", "still.png", "note.txt", "."),
    "--mask": ("still.png", "clip.mp4"), "--lora": ("note.txt", "absent.safetensors"), "--device": ("cpu", "tpu", "", "cuda:99"),
    "-o": ("out.mp4", "out.gif", "out", "out.xyz", "note.txt/out.mp4", ".", "", "a/b/out.png", "out.PNG", "con:1.mp4"),
}  # fmt: skip


def options(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """Options of `generate` that are wrong, extreme or contradict each other."""
    Image.fromarray(squares()[0]).save(folder / "still.png")
    video.write(squares(4), folder / "clip.mp4", fps=8)
    (folder / "note.txt").write_text("mine")
    words: list[Any] = ["generate", "red", "-m", world.folder / "model"]
    chosen = {pick(rng, OPTIONS): None for _ in range(int(rng.integers(1, 5)))}
    for name in chosen:
        words += [name, str(pick(rng, OPTIONS[name]))]
    words += [] if "--steps" in chosen else ["--steps", "1"]
    words += [] if {"--num-frames", "--video"} & chosen.keys() else ["--num-frames", "2"]
    words += ["--loop"] if rng.random() < 0.2 else []
    words = [word for word in words if "\x00" not in str(word)]
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def wrong(result: Result) -> str:
        for path, content in before.items():
            if not path.is_file() or path.read_bytes() != content:
                return f"{path.name} was there before and is changed"
        files = [Path(folder, line) for line in result.output.splitlines() if Path(folder, line).is_file()]
        return "wrote nothing" if not files else no_picture(files[-1])

    return Trial(words, wrong)


def prompts(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """Prompts of words, weights, brackets and letters of all alphabets."""
    letters = string.printable + "()[]:\\" * 8 + "0123456789." * 3 + "äß猫🦊\u200d\u0301"
    pieces = [
        pick(rng, TEXTS)
        if rng.random() < 0.3
        else "".join(pick(rng, letters) for _ in range(int(rng.integers(12))))
        for _ in range(int(rng.integers(1, 6)))
    ]
    text = " ".join(pieces).replace("\x00", "")
    words = ["generate", "-m", world.folder / "model", "--steps", "1", "--num-frames", "1", "-o", "out.png"]
    words += ["--negative", pick(rng, TEXTS).replace("\x00", "")] if rng.random() < 0.3 else []
    return Trial([*words, "--", text], lambda result: no_picture(folder / "out.png"))


def model_json(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A model folder with a changed JSON file."""
    model = world.copy("model", folder)
    path = pick(rng, sorted(model.rglob("*.json")))
    path.write_text(changed_json(rng, path.read_text()), encoding="utf-8", errors="surrogatepass")
    if rng.random() < 0.3:
        return Trial(["models", "show", "model"])
    words = ["generate", "red", "-m", "model", "--steps", "1", "--num-frames", "1", "-o", "out.png"]
    return Trial(words, lambda result: no_picture(folder / "out.png"))


def safetensors(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A weights file that is cut short, missing, or has a changed header."""
    model = world.copy("model", folder)
    path = pick(rng, sorted(model.rglob("*.safetensors")))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    match int(rng.integers(5)):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(content[: int(rng.integers(len(content)))])
        case 2:
            path.write_bytes(rng.bytes(8) + content[8:])
        case 3:
            header = changed_json(rng, content[8 : 8 + length].decode()).encode(errors="surrogatepass")
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        case _:
            header = bytearray(content[8 : 8 + length])
            header[int(rng.integers(length))] = int(rng.integers(256))
            path.write_bytes(content[:8] + header + content[8 + length :])
    if rng.random() < 0.3 and path.exists():
        words = (
            ["models", "show", path]
            if rng.random() < 0.5
            else ["generate", "red", "-m", world.folder / "model", "--lora", path]
        )
        return Trial(
            [
                *words,
                *(["--steps", "1", "--num-frames", "1", "-o", "out.png"] if words[0] == "generate" else []),
            ],
            lambda result: "a damaged file is taken",
        )
    changed = not path.exists() or path.read_bytes() != content
    words = ["generate", "red", "-m", "model", "--steps", "1", "--num-frames", "1", "-o", "out.png"]
    return Trial(
        words,
        lambda result: (
            "a damaged file is taken" if changed and not path.exists() else no_picture(folder / "out.png")
        ),
    )


FILMS = {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "mkv": "libx264", "mov": "mpeg4"}


def films(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A damaged film beside a good one."""
    suffix = pick(rng, FILMS)
    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(suffix, suffix)) as container:
        stream = container.add_stream(FILMS[suffix], rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in squares(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return _damaged_beside_good(folder, f"bad.{suffix}", changed_bytes(rng, file.getvalue()))


def pictures(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A damaged picture or animation beside a good one."""
    suffix = pick(rng, ("png", "jpg", "webp", "gif", "apng"))
    images = [Image.fromarray(frame) for frame in squares(1 if suffix == "jpg" else int(rng.integers(1, 20)))]
    if suffix != "jpg" and rng.random() < 0.3:
        images = [image.convert(pick(rng, ("RGBA", "L", "P"))) for image in images]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(file, format={"jpg": "JPEG", "apng": "PNG"}.get(suffix, suffix.upper()), **more)
    return _damaged_beside_good(folder, f"bad.{suffix}", changed_bytes(rng, file.getvalue()))


def _damaged_beside_good(folder: Path, name: str, content: bytes) -> Trial:
    data = folder / "data"
    data.mkdir()
    video.write(squares(20), data / "good.webp", fps=8)
    (data / name).write_bytes(content)
    for path in list(data.iterdir()):
        path.with_suffix(".txt").write_text("a square")

    def wrong(result: Result) -> str:
        if skipped := [line for line in result.output.splitlines() if line.startswith("good.")]:
            return skipped[0]
        return "" if name in result.output or result.status == 0 else "the damaged file is not named"

    return Trial(["data", "check", "data", "--workers", "1"], wrong, report=True)


def tars(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A shard with damaged bytes, or members of odd names, kinds and order."""
    clip = (world.folder / "media" / "red.webp").read_bytes()
    members = [
        (f"{number}.{suffix}", content)
        for number in range(3)
        for suffix, content in (("webp", clip), ("txt", b"a square"))
    ]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if rng.random() < 0.2:
                info.name = pick(
                    rng,
                    (
                        "../out.webp",
                        "/out.webp",
                        "./" + name,
                        "._" + name,
                        "a/../" + name,
                        "",
                        "\udcff.webp",
                        name * 40,
                        "x.exe",
                    ),
                )
            if rng.random() < 0.1:
                info.type = pick(
                    rng,
                    (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE),
                )
                info.linkname = pick(rng, ("/etc/passwd", "..", name))
            content = changed_bytes(rng, content) if rng.random() < 0.2 else content
            info.size = len(content) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    content = changed_bytes(rng, file.getvalue()) if rng.random() < 0.4 else file.getvalue()
    (folder / "shard.tar").write_bytes(content)

    def wrong(result: Result) -> str:
        return (
            "a member left the shard"
            if "root:" in result.output or (folder.parent / "out.webp").exists()
            else ""
        )

    return Trial(["data", "check", "shard.tar", "--workers", "1"], wrong, report=True)


def tables(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """Captions in tables of any shape: metadata.jsonl, metadata.csv, annotations of MSR-VTT."""
    data = folder / "data"
    data.mkdir()
    for number in range(3):
        shutil.copy(world.folder / "media" / "red.webp", data / f"video{number}.webp")
    rows: list[Any] = [
        {"file_name": f"video{k}.webp", "text": ["a square"], "concept": "a", "split": "train", "loop": True}
        for k in range(3)
    ]
    kind = pick(rng, ("jsonl", "csv", "json"))
    if kind == "json":
        videos = [{"video_id": f"video{k}", "split": "train", "category": 1} for k in range(3)]
        value = {
            "videos": videos,
            "sentences": [{"video_id": f"video{k}", "caption": "a square", "sen_id": k} for k in range(3)],
        }
        (data / "annotations.json").write_text(
            changed_json(rng, json.dumps(value)), encoding="utf-8", errors="surrogatepass"
        )
    elif kind == "jsonl":
        lines = [
            changed_json(rng, json.dumps(row)) if rng.random() < 0.5 else json.dumps(row) for row in rows
        ]
        lines.insert(int(rng.integers(4)), pick(rng, ("", " ", "#", json.dumps(pick(rng, VALUES)))))
        (data / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    else:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(
            pick(
                rng,
                (
                    ["file_name", "text"],
                    ["file_name"],
                    ["text", "file_name", "text"],
                    [],
                    ["\ufefffile_name", "text"],
                ),
            )
        )
        for row in rows:
            writer.writerow(
                [
                    pick(rng, (row["file_name"], *TEXTS)).replace("\ud83d", ""),
                    pick(rng, TEXTS).replace("\ud83d", ""),
                ][: int(rng.integers(3))]
            )
        content = text.getvalue().encode()
        (data / "metadata.csv").write_bytes(changed_bytes(rng, content) if rng.random() < 0.3 else content)
    return Trial(["data", "check", "data", "--workers", "1"], report=True)


def folders(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A folder as people have them: names of every kind, debris, links, empty and special files."""
    data = folder / "data"
    data.mkdir()
    clip = (world.folder / "media" / "red.webp").read_bytes()
    (data / "good.webp").write_bytes(clip)
    (data / "good.txt").write_text("a square")
    stems = (
        "a b",
        "12:30",
        "ü",
        ".hidden",
        "._good",
        "a.b.c",
        "-o",
        "a\nb",
        "x" * 200,
        "$HOME",
        "a'b\"c",
        "Thumbs",
        "caf\udce9",
        "#1",
        "%00",
        "..a",
    )
    for stem in (pick(rng, stems) for _ in range(int(rng.integers(1, 4)))):
        path = data / f"{stem}.{pick(rng, ('webp', 'mp4', 'WEBP', 'wmv', 'heic', 'zip', 'tar', 'db'))}"
        match int(rng.integers(8)):
            case 0:
                path.mkdir(exist_ok=True)
            case 1:
                path.unlink(missing_ok=True)
                os.mkfifo(path)
            case 2:
                path.unlink(missing_ok=True) if path.is_file() else None
                path.symlink_to(
                    pick(rng, (data, folder / "absent", data / "good.webp", "/dev/zero"))
                ) if not path.exists() else None
            case 3:
                path.write_bytes(b"") if not path.is_dir() else None
            case _:
                path.write_bytes(clip) if not (path.is_dir() or path.is_fifo() or path.is_symlink()) else None
        caption = path.with_suffix(".txt")
        if rng.random() < 0.8 and not caption.exists():
            caption.write_bytes(
                pick(
                    rng,
                    (
                        b"a square",
                        b"gr\xfcn",
                        b"",
                        b"\xff\xfea\x00",
                        b"\xef\xbb\xbfa",
                        b"a\x00b",
                        b" \n",
                        b"a\nb",
                    ),
                )
            )

    def wrong(result: Result) -> str:
        skipped = [line for line in result.output.splitlines() if line.startswith("good.webp: ")]
        return "".join(line for line in skipped if not line.endswith("(kept)"))

    return Trial(["data", "check", "data", "--workers", "1"], wrong, report=True)


def stores(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A damaged data set of pixels or latents."""
    name = pick(rng, ("pixels", "latents"))
    store = world.copy(name, folder)
    change_some_file(rng, store)
    if name == "latents" and rng.random() < 0.5:
        words = ["train", world.folder / "recipe.toml", "--run", "run", "data.path=latents", "optim.steps=1"]
        return Trial(words)
    return Trial(
        ["data", "preview", name, "sheet.png", "--rows", "2"], lambda result: no_picture(folder / "sheet.png")
    )


def runs(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A damaged run folder that is resumed."""
    run = world.copy("run", folder)
    for _ in range(int(rng.integers(1, 3))):
        change_some_file(rng, run)
    return Trial(["train", "run", "optim.steps=3"])


def evaluations(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A damaged evaluation that is shown."""
    evals = world.copy("evals", folder)
    change_some_file(rng, evals)
    return Trial(["report", "page", "evals", "--rows", "2"])


def calls(rng: np.random.Generator, world: World, folder: Path) -> Trial:
    """A call of the pipeline with pictures, numbers and generators of any type."""
    frames = squares(4)
    given = (
        frames, frames.astype(np.float32), frames / 255, -frames.astype(float), frames[0], frames[..., 0], list(frames), [Image.fromarray(x) for x in frames],
        Image.fromarray(frames[0]).convert("L"), Image.fromarray(frames[0]).convert("RGBA"), torch.from_numpy(frames), torch.from_numpy(frames).permute(0, 3, 1, 2),
        torch.full((4, 3, 32, 32), float("nan")), np.zeros((0, 32, 32, 3)), [], "clip.mp4", 3, None, np.zeros((4, 32, 32, 2)), frames.astype(bool),
        np.array(["a"]), frames[None], [[Image.fromarray(frames[0])]],
    )  # fmt: skip
    arguments: dict[str, Any] = {
        "prompt": pick(
            rng,
            ("red", ["red"], ["red", "blue"], [], None, 3, {0: "red", 2: "blue"}, {}, "", [""], ["red", 3]),
        ),
        "num_inference_steps": 1,
    }
    for name in {pick(rng, ("image", "last_image", "video", "mask")) for _ in range(int(rng.integers(3)))}:
        arguments[name] = pick(rng, given)
    numbers = (
        "guidance_scale",
        "shared_noise",
        "noise_correlation",
        "strength",
        "eta",
        "num_frames",
        "height",
        "width",
        "chunk",
        "halo",
        "num_videos_per_prompt",
        "clip_skip",
    )
    for name in {pick(rng, numbers) for _ in range(int(rng.integers(3)))}:
        small = name in ("num_frames", "height", "width", "chunk", "num_videos_per_prompt")
        arguments[name] = pick(
            rng, (-1, 0, 1, 2, 8, 32, 2.5, "2", None, True) if small else (*NUMBERS, "1", None)
        )
    if rng.random() < 0.3:
        arguments["generator"] = pick(
            rng, (0, [], [seed(0)], [seed(0), seed(1)], "0", np.random.default_rng(0))
        )
    if rng.random() < 0.3:
        arguments["latents"] = pick(
            rng, (torch.zeros(1), torch.full((1, 4, 4, 4, 4), float("nan")), np.zeros((1, 4, 4, 4, 4)), 3)
        )

    def call() -> None:
        try:
            clips = world.pipe(**arguments).frames
        except (ValueError, TypeError) as error:
            sys.exit(
                f"latent-shift: {error}"
                if isinstance(error, ValueError) or "expected" in str(error)
                else traceback.format_exc()
            )
        if not np.isfinite(np.asarray(clips)).all():
            print("not finite")

    return Trial(call, lambda result: result.output.strip())


KINDS: dict[str, Callable[[np.random.Generator, World, Path], Trial]] = {
    function.__name__: function
    for function in (
        settings,
        options,
        prompts,
        model_json,
        safetensors,
        films,
        pictures,
        tars,
        tables,
        folders,
        stores,
        runs,
        evaluations,
        calls,
    )
}
