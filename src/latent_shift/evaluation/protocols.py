"""Protocols: the prompts of an evaluation, the number of clips of each, and the real clips that they are
compared with.

A result names its protocol, because numbers of different protocols cannot be compared: two are in use for
MSR-VTT alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from latent_shift import __version__, video
from latent_shift.data import readers
from latent_shift.data.store import Store, open_pixel_store
from latent_shift.evaluation import detection
from latent_shift.evaluation.comparison import central_square
from latent_shift.evaluation.measures import names_for
from latent_shift.files import read_json_object

PROTOCOLS = {
    "own": "a clip of the plainest caption of each concept of a packed data set, beside the real clip of that caption",
    "emoji": "the same of the set of recipes/emoji: 100 concepts, 16 frames of 128x128 at 8 fps",
    "words": "400 clips of held-out combinations of recipes/emoji, some more than once: a thing and its motion, colour or number, or two things",
    "classes": "four clips of each of eight concepts of a packed data set",
    "ucf101": "100 clips of one sentence for each of the 101 classes; IS on C3D, FVD against the train videos (TGANv2, Make-A-Video)",
    "msrvtt-mav": "a clip of each of the 59,794 captions of the test videos (Make-A-Video)",
    "msrvtt-lavie": "a clip of one caption of each of the 2,990 test videos, CLIPSIM (LaVie)",
}


@dataclass(frozen=True)
class Protocol:
    """Prompts and real clips of an evaluation.

    Attributes:
        name: one of `PROTOCOLS`.
        prompts: prompt k belongs to clip k, which is generated with seed k.
        cluster_ids: which independent sample clip k belongs to: clips of one caption, or of the captions of
            one video, are one sample.
        full_num_clips: generated clips of the complete protocol.
        num_frames: frames a clip.
        size: (height, width) at which generated and real clips are measured, after cropping to their central
            square.
        fps: of the real clips.
        reference: description of the real clips: their number and a hash.
        num_real: number of real clips.
        real: returns real clip n, `(F, H, W, 3) uint8`; where `matched`, that of all clips k with
            `cluster_ids[k] == n`, otherwise in random order.
        measures: names of `measures.MEASURES`.
        matched: whether each prompt has a real clip of its own.
        full_num_real: real clips of the complete protocol. None: as many as there are.
        store: the packed data set that the real clips come from, if any.
        labels: what each prompt asks for, by name, for measures of adherence; [] where that is not known.
    """

    name: str
    prompts: list[str]
    cluster_ids: list[int]
    full_num_clips: int
    num_frames: int
    size: tuple[int, int]
    fps: float
    reference: dict[str, object]
    num_real: int
    real: Callable[[int], np.ndarray]
    measures: tuple[str, ...]
    matched: bool = False
    full_num_real: int | None = None
    store: Store | None = None
    labels: list[dict[str, str]] = field(default_factory=list)

    @property
    def required_fps(self) -> float | None:
        """The frame rate that generated clips must have. None: any, as for published numbers on UCF-101."""
        return None if self.name == "ucf101" else self.fps

    @property
    def metadata(self) -> dict[str, object]:
        """The description of the protocol in results."""
        all_real = self.num_real == (self.full_num_real or self.num_real)
        return {
            "protocol": self.name, "source": PROTOCOLS[self.name], "latent_shift": __version__, "clips": len(self.prompts),
            "complete": len(self.prompts) >= self.full_num_clips and all_real, "seeds": f"0..{len(self.prompts) - 1}",
            "prompts_sha256": _digest(self.prompts), "num_frames": self.num_frames, "size": list(self.size), "fps": self.fps,
            "reference": self.reference,
        }  # fmt: skip


PUBLIC_SIZE = (256, 256)
"""Size at which clips of public sets are measured: that of the paper's clips and of those that it compares
with."""
CAPTION_PROTOCOLS = {"own": (100, 1), "emoji": (100, 1), "classes": (8, 4)}
"""Protocols of a packed data set: number of captions, and clips of each."""
FULL_WORDS = 400
"""Clips of protocol words."""
EMOJI_CAPTIONS = Path(__file__).parents[1] / "assets" / "emoji_captions.txt"
"""Captions of protocol emoji, in order; its numbers hold for these alone."""


def open_protocol(
    name: str,
    data: str | Path,
    *,
    num: int | None = None,
    num_frames: int | None = None,
    splits: tuple[str, ...] | None = None,
) -> Protocol:
    """Open a protocol on a data set.

    Args:
        name: one of `PROTOCOLS`.
        data: a packed data set (own, emoji, words, classes), or a folder of UCF-101 or MSR-VTT as published.
        num: number of clips to use, from the first ("classes": concepts); results then say that they are
            incomplete. None: all ("own": at most 100).
        num_frames: frames a clip, for "own" and "classes". None: 16.
        splits: splits whose captions "own" uses. None: train.

    Raises:
        ValueError: an unknown protocol, other data, `num` larger than the data set, or an option that the
            protocol fixes.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; expected one of {', '.join(PROTOCOLS)}")
    if name not in ("own", "classes") and (num_frames or 16) != 16:
        raise ValueError(
            f"protocol {name} has clips of 16 frames, got num_frames={num_frames}; use protocol own for other lengths"
        )
    if name != "own" and splits:
        raise ValueError(f"protocol {name} has fixed splits; use protocol own to choose them")
    if name == "words":
        return _words(open_pixel_store(data), num)
    if name in CAPTION_PROTOCOLS:
        return _captions(name, open_pixel_store(data), num, num_frames or 16, splits or ("train",))
    return (_ucf101 if name == "ucf101" else _msrvtt)(name, Path(data), num)


def _captions(name: str, store: Store, num: int | None, num_frames: int, splits: tuple[str, ...]) -> Protocol:
    """Open a protocol of captions of a packed data set, each with its real clip."""
    side, fps = store.info["size"], store.info["fps"]
    candidates = [
        index
        for index in store.select(splits=splits, num_frames=num_frames).tolist()
        if store.frame_shape(index) == (side, side, 3)
    ]
    plainest: dict[str, int] = {}  # concept -> its record with the shortest caption: no skin tone, no variant
    for index in sorted(candidates, key=lambda index: len(store.records[index].texts[0])):
        plainest.setdefault(store.records[index].concept, index)
    full_num, clips_a_caption = CAPTION_PROTOCOLS[name]
    if name != "emoji":
        full_num = min(full_num, len(plainest))
    num_captions = _check_num(num, full_num if name == "emoji" else None) or max(1, full_num)
    if len(plainest) < num_captions:
        raise ValueError(
            f"{len(plainest)} concepts of {', '.join(splits)} have clips of {num_frames} frames, {num_captions} are needed"
        )
    if name == "emoji":
        indices = _emoji_records(store, sorted(plainest.values()))
    else:
        indices = np.random.default_rng(0).permutation(sorted(plainest.values())).tolist()
    cluster_ids = list(range(num_captions)) * clips_a_caption
    return Protocol(
        name=name,
        prompts=[store.records[indices[n]].texts[0] for n in cluster_ids],
        cluster_ids=cluster_ids,
        full_num_clips=full_num * clips_a_caption,
        num_frames=num_frames,
        size=(side, side),
        fps=fps,
        reference={
            "data": "packed data set", "splits": list(splits), "clips": num_captions,
            "sha256": _digest(sorted(store.shapes)),  # shards are named by the hash of their pixels
        },
        num_real=num_captions,
        real=lambda n: store.window(indices[n], 0, num_frames),
        measures=names_for(name),
        matched=True,
        store=store,
    )  # fmt: skip


def _words(store: Store, num: int | None) -> Protocol:
    """Open a protocol of held-out combinations, each with its real clip and with labels of what it asks for."""
    held_out = store.select(splits=("val_words",), num_frames=16).tolist()
    labelled = [index for index in held_out if store.records[index].labels][:FULL_WORDS]
    if len(labelled) < (num or 1):
        raise ValueError(
            f"{store.folder}: has {len(labelled)} labelled clips of split val_words, {num or 1} are needed; "
            "recipes/emoji/compose.py makes them"
        )
    num_prompts = _check_num(num, len(labelled)) or len(labelled)
    records = [store.records[index] for index in labelled[:num_prompts]]
    for record in records:
        detection.check_labels(record.labels, f"{store.folder}: {record.file_name}")
    side = store.info["size"]
    return Protocol(
        name="words",
        prompts=[record.texts[0] for record in records],
        cluster_ids=list(range(num_prompts)),
        full_num_clips=FULL_WORDS,
        num_frames=16,
        size=(side, side),
        fps=store.info["fps"],
        reference={
            "data": "packed data set", "splits": ["val_words"], "clips": num_prompts,
            "sha256": _digest_of_clips(store, labelled[:num_prompts]),  # shards hold clips of other splits, too
            "labels_sha256": _digest([json.dumps(record.labels, sort_keys=True) for record in records]),
        },
        num_real=num_prompts,
        real=lambda n: store.window(labelled[n], 0, 16),
        measures=names_for("words"),
        matched=True,
        store=store,
        labels=[record.labels for record in records],
    )  # fmt: skip


def _emoji_records(store: Store, indices: list[int]) -> list[int]:
    """Return the records of the captions of protocol emoji, in order; raise ValueError unless all are there."""
    side, fps = store.info["size"], store.info["fps"]
    if (side, fps) != (128, 8):
        raise ValueError(
            f"protocol emoji needs clips of 128 pixels at 8 fps, {store.folder} holds {side} at {fps:g}"
        )
    by_caption = {store.records[index].texts[0]: index for index in indices}
    captions = EMOJI_CAPTIONS.read_text(encoding="utf-8").splitlines()
    if missing := [caption for caption in captions if caption not in by_caption]:
        raise ValueError(
            f"{store.folder} has no clip of {missing[0]!r}, which protocol emoji needs; use protocol own, or pack the set of recipes/emoji"
        )
    return [by_caption[caption] for caption in captions]


def _ucf101(name: str, folder: Path, num: int | None) -> Protocol:
    """Open UCF-101: one sentence a class, the train videos as real clips."""
    sentences = list(readers.ucf101_sentences().values())
    # In turns over the classes, so that the first clips cover all of them.
    prompts = (sentences * 100)[: _check_num(num, 10_100)]
    records, files = _read_videos(folder, "train", "UCF-101")
    if not list(folder.rglob("trainlist01.txt")):
        raise ValueError(
            f"{folder}: has no trainlist01.txt; expected ucfTrainTestlist, which names the train videos, beside the videos"
        )
    return Protocol(
        name=name,
        prompts=prompts,
        cluster_ids=list(range(len(prompts))),
        full_num_clips=10_100,
        num_frames=16,
        size=PUBLIC_SIZE,
        fps=25,
        reference=_reference(folder, records, "UCF-101, train, the first 16 frames"),
        num_real=len(files),
        real=lambda n: _first_frames(files[n]),
        measures=names_for(name),
        full_num_real=9_537,
    )


def _msrvtt(name: str, folder: Path, num: int | None) -> Protocol:
    """Open MSR-VTT: all captions of the test videos, or a random one of each."""
    records, files = _read_videos(folder, "test", "MSR-VTT")
    if name == "msrvtt-lavie":
        rng = np.random.default_rng(0)
        captions = [
            (video, record.texts[int(rng.integers(len(record.texts)))])
            for video, record in enumerate(records)
        ]
    else:
        # In turns over the videos, so that the first clips cover all of them.
        captions = [
            (video, record.texts[turn])
            for turn in range(max(len(record.texts) for record in records))
            for video, record in enumerate(records)
            if turn < len(record.texts)
        ]
    subset = captions[: _check_num(num, len(captions))]
    return Protocol(
        name=name,
        prompts=[text for _, text in subset],
        cluster_ids=[video for video, _ in subset],
        # Papers count 59,794 captions of the test videos, files may hold others.
        full_num_clips=len(captions) if len(records) == 2_990 else 20 * 2_990,
        num_frames=16,
        size=PUBLIC_SIZE,
        fps=8,
        reference=_reference(folder, records, "MSR-VTT, test, the first 16 frames at 8 fps"),
        num_real=len(files),
        real=lambda n: _first_frames(files[n], fps=8),
        measures=names_for(name),
        full_num_real=2_990,
    )


def _check_num(num: int | None, full: int | None) -> int | None:
    """Return the number of clips to generate; raise ValueError where it is out of range."""
    if num is not None and (num < 1 or (full is not None and num > full)):
        raise ValueError(
            f"num={num} is out of range; expected 1 to {full}"
            if full
            else f"num={num} is out of range; expected 1 or more"
        )
    return num if num is not None else full


def _read_videos(folder: Path, split: str, kind: str) -> tuple[list[readers.Record], list[Path]]:
    """Return the records of a split, and its files in random order, so that the first ones cover all
    classes."""
    videos = [
        (record, media)
        for record, media in readers.read(folder)
        if record.split == split and isinstance(media, Path)
    ]
    right_kind = all(("v_" in media.name) == (kind == "UCF-101") for _, media in videos)
    if not videos or not right_kind:
        raise ValueError(f"{folder}: expected {kind} with videos of split {split}")
    order = np.random.default_rng(0).permutation(len(videos)).tolist()
    return [record for record, _ in videos], [videos[k][1] for k in order]


def _reference(folder: Path, records: list[readers.Record], name: str) -> dict[str, object]:
    names_and_sizes = (
        f"{record.file_name} {(folder / record.file_name).stat().st_size}" for record in records
    )
    return {"data": name, "clips": len(records), "sha256_of_names_and_sizes": _digest(names_and_sizes)}


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_of_clips(store: Store, indices: Iterable[int]) -> str:
    digest = hashlib.sha256()
    for index in indices:
        digest.update(store.window(index, 0, 16).tobytes())
    return digest.hexdigest()


def _first_frames(path: Path, *, fps: float | None = None, num_frames: int = 16) -> np.ndarray:
    """Return the central square of the first frames of a video; raise ValueError for a shorter one."""
    frames, _ = video.read(path, fps=fps, num_frames=num_frames)
    if len(frames) < num_frames:
        raise ValueError(f"{path}: has {len(frames)} frames, the protocol needs {num_frames}")
    return central_square(frames)


def check_unchanged(metadata: dict[str, object], path: Path) -> None:
    """Raise ValueError where a file of an evaluation on disk holds other metadata; titles may differ."""
    if not path.exists():
        return
    before, metadata = read_json_object(path), json.loads(json.dumps(metadata))
    keys = dict.fromkeys([*metadata, *before])
    if changes := [key for key in keys if key != "title" and metadata.get(key) != before.get(key)]:
        raise ValueError(
            f"{path.parent} holds an evaluation with another {', '.join(changes)}; use the same or another folder (--out)"
        )
