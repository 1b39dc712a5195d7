"""Protocols: which words are drawn, how often, and which real clips stand beside them. What was drawn is measured by evaluation.py.

A result names its protocol, for numbers of two protocols cannot be compared: of MSR-VTT there are two in use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_shift import __version__, video
from latent_shift.data import readers
from latent_shift.data.store import Store, open_pixel_store

SOURCES = {
    "own": "a clip of the plainest caption of each concept of a packed data set, beside the real clip of that caption",
    "emoji": "the same of the set of recipes/emoji: 100 concepts, 16 frames of 128x128 at 8 fps",
    "classes": "four clips of each of eight concepts of a packed data set",
    "ucf101": "100 clips of one sentence for each of the 101 classes; IS on C3D, FVD against the train videos (TGANv2, Make-A-Video)",
    "msrvtt-mav": "a clip of each of the 59,794 captions of the test videos (Make-A-Video)",
    "msrvtt-lavie": "a clip of one caption of each of the 2,990 test videos, CLIPSIM (LaVie)",
}


@dataclass(frozen=True)
class Protocol:
    """What is to be drawn and what it is compared with.

    Attributes:
        name: as in `SOURCES`.
        prompts: the words of clip k, which is drawn with seed k.
        of: what clip k is of. Clips of one caption, or of one video's captions, are no samples apart (distances.py).
        whole: how many drawn clips all of the protocol are.
        num_frames: that clips must have.
        size: (height, width) at which all clips are measured, drawn and real; of those of another shape the central square.
        fps: of the real clips.
        reference: what the real clips are: their number and one hash of them.
        num_real: of real clips.
        real: clip n `(F, H, W, 3) uint8`; where `matched`, that of all clips k with `of[k]` n, else in an order of chance.
        measures: names of measuring.py's.
        whole_real: how many real clips all of the protocol are. None: as many as there are.
        store: the packed data set they come from, if they do.
    """

    name: str
    prompts: list[str]
    of: list[int]
    whole: int
    num_frames: int
    size: tuple[int, int]
    fps: float
    reference: dict[str, object]
    num_real: int
    real: Callable[[int], np.ndarray]
    measures: tuple[str, ...]
    matched: bool = False
    whole_real: int | None = None
    store: Store | None = None

    @property
    def rate(self) -> float | None:
        """Frames a second that drawn clips must have. None: any; published numbers of UCF-101 are of models of every rate."""
        return None if self.name == "ucf101" else self.fps

    @property
    def told(self) -> dict[str, object]:
        """What a result says of it."""
        return {
            "protocol": self.name, "source": SOURCES[self.name], "latent_shift": __version__, "clips": len(self.prompts),
            "complete": len(self.prompts) >= self.whole and self.num_real == (self.whole_real or self.num_real), "seeds": f"0..{len(self.prompts) - 1}",
            "prompts_sha256": _digest(self.prompts), "num_frames": self.num_frames,
            "size": list(self.size), "fps": self.fps, "reference": self.reference,
        }  # fmt: skip


SQUARE = (256, 256)
"""Of public sets: the size of the paper's clips, and of those it is compared with."""
TEMPORAL = ("motion_energy", "flicker", "persistence", "coherence", "warping_error", "loop_gap")
OF_CAPTIONS = (
    "kd-efficientnet-lite0", "kd-efficientnet-lite0-motion", "retrieval", "motion_error", *TEMPORAL, "denoising", "reconstruction",
    "clipsim", "kvd-videomae", "fd-efficientnet-lite0", "fvd-videomae", "fvd", "kvd", "fid", "kid", "is-frames",
)  # fmt: skip
CAPTIONED: dict[str, tuple[int, int, tuple[str, ...]]] = {  # protocol of captions -> how many, clips of each, measures
    "own": (100, 1, OF_CAPTIONS),
    "emoji": (100, 1, OF_CAPTIONS),
    "classes": (8, 4, ("motion_error", *TEMPORAL)),
}  # fmt: skip
EMOJI_CAPTIONS = "28e9dfda1867f4feb7762642be0036ac503bd66f6b512f4d4574f3c5d0977af0"
"""Of all captions of protocol emoji, in order: numbers of it are of these and no others."""


def open_protocol(
    name: str, data: str | Path, *, num: int | None = None, num_frames: int | None = None, splits: tuple[str, ...] | None = None
) -> Protocol:
    """A protocol on data as it lies on people's disks.

    Args:
        name: of `SOURCES`.
        data: a packed data set (own, emoji), a folder of UCF-101 or of MSR-VTT.
        num: clips to draw, the first of the protocol's (of "classes": concepts); a result says that they are not all. None: all (of
            "own" 100 at most).
        num_frames: of the clips; "own" and "classes" leave it open (None: 16).
        splits: of "own": where captions come from. None: train.

    Raises:
        ValueError: an unknown protocol, other data, more clips than there are, or an option that the protocol fixes.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown protocol {name!r}; expected one of {', '.join(SOURCES)}")
    if name not in ("own", "classes") and (num_frames or 16) != 16:
        raise ValueError(f"protocol {name} is of clips of 16 frames, got {num_frames}; expected protocol own, whose results say theirs")
    if name != "own" and splits:
        raise ValueError(f"protocol {name} has its splits; expected protocol own to choose others")
    if name in CAPTIONED:
        return _captions(name, open_pixel_store(data), num, num_frames or 16, splits or ("train",))
    return (_ucf101 if name == "ucf101" else _msrvtt)(name, Path(data), num)


def _captions(name: str, store: Store, num: int | None, num_frames: int, splits: tuple[str, ...]) -> Protocol:
    side = store.info["size"]
    candidates = [
        index for index in store.select(splits=splits, num_frames=num_frames).tolist() if store.frame_shape(index) == (side, side, 3)
    ]
    plainest: dict[str, int] = {}  # the record with the shortest caption of each concept: no skin tone, no variant
    for index in sorted(candidates, key=lambda index: len(store.records[index].texts[0])):
        plainest.setdefault(store.records[index].concept, index)
    usual, times, measures = CAPTIONED[name]
    usual = usual if name == "emoji" else min(usual, len(plainest))
    wanted = _asked(num, None) or max(1, usual)
    if len(plainest) < wanted:
        raise ValueError(f"{len(plainest)} concepts of {', '.join(splits)} have clips of {num_frames} frames, {wanted} asked for")
    if name == "emoji" and (side, store.info["fps"]) != (128, 8):
        raise ValueError(f"protocol emoji is of 128 pixels at 8 fps, {store.folder} holds {side} at {store.info['fps']:g}")
    chosen = np.random.default_rng(0).permutation(sorted(plainest.values())).tolist()
    if name == "emoji" and _digest(store.records[index].texts[0] for index in chosen[:usual]) != EMOJI_CAPTIONS:
        raise ValueError(
            f"{store.folder} holds other captions than the set of recipes/emoji: expected protocol own for others (`make data/emoji-128/store.json` makes that set)"
        )
    of = list(range(wanted)) * times
    whole = _digest(sorted(store.shapes))  # shards are named by their pixels
    return Protocol(
        name, [store.records[chosen[n]].texts[0] for n in of], of, usual * times, num_frames, (side, side), store.info["fps"],
        {"data": "packed data set", "splits": list(splits), "clips": wanted, "sha256": whole}, wanted,
        lambda n: store.window(chosen[n], 0, num_frames), measures, matched=True, store=store,
    )  # fmt: skip


def _ucf101(name: str, folder: Path, num: int | None) -> Protocol:
    sentences = list(readers.ucf101_sentences().values())
    prompts = (sentences * 100)[: _asked(num, 10_100)]  # class by class in turn: the first so many are of all classes
    records, files = _files(folder, "train", "UCF-101")
    if not list(folder.rglob("trainlist01.txt")):
        raise ValueError(f"{folder}: has no trainlist01.txt: expected ucfTrainTestlist beside the videos, which says what is train")
    return Protocol(
        name, prompts, list(range(len(prompts))), 10_100, 16, SQUARE, 25, _told(folder, records, "UCF-101, train, the first 16 frames"),
        len(files), lambda k: _clip(files[k]), ("is", "fvd", "kvd", "fvd-videomae", "kvd-videomae", *TEMPORAL), whole_real=9_537,
    )  # fmt: skip


def _msrvtt(name: str, folder: Path, num: int | None) -> Protocol:
    records, files = _files(folder, "test", "MSR-VTT")
    if name == "msrvtt-lavie":
        rng = np.random.default_rng(0)
        captions = [(video, record.texts[int(rng.integers(len(record.texts)))]) for video, record in enumerate(records)]
    else:  # the first of every video, then the second: the first so many are of all videos
        captions = [
            (video, record.texts[turn])
            for turn in range(max(len(record.texts) for record in records))
            for video, record in enumerate(records)
            if turn < len(record.texts)
        ]
    drawn = captions[: _asked(num, len(captions))]
    whole = len(captions) if len(records) == 2_990 else 20 * 2_990  # papers count 59,794 captions of the test videos, files may hold others
    return Protocol(
        name, [text for _, text in drawn], [video for video, _ in drawn], whole, 16, SQUARE, 8,
        _told(folder, records, "MSR-VTT, test, the first 16 frames at 8 fps"), len(files), lambda n: _clip(files[n], fps=8),
        ("clipsim", "fid", "kid", "is-frames", "fvd", "kvd", "fvd-videomae", "kvd-videomae", *TEMPORAL), whole_real=2_990,
    )  # fmt: skip


def _asked(num: int | None, whole: int | None) -> int | None:
    if num is not None and (num < 1 or (whole is not None and num > whole)):
        raise ValueError(f"the protocol has {whole} clips, {num} asked for" if whole else f"expected one clip or more, {num} asked for")
    return num if num is not None else whole


def _files(folder: Path, split: str, kind: str) -> tuple[list[readers.Record], list[Path]]:
    found = [(record, media) for record, media in readers.read(folder) if record.split == split and isinstance(media, Path)]
    known = all(("v_" in media.name) == (kind == "UCF-101") for _, media in found)
    if not found or not known:
        raise ValueError(f"{folder}: expected {kind} with videos of split {split}")
    mixed = np.random.default_rng(0).permutation(len(found)).tolist()  # the first so many are of all classes
    return [record for record, _ in found], [found[k][1] for k in mixed]


def _told(folder: Path, records: list[readers.Record], name: str) -> dict[str, object]:
    listed = (f"{record.file_name} {(folder / record.file_name).stat().st_size}" for record in records)
    return {"data": name, "clips": len(records), "sha256_of_names_and_sizes": _digest(listed)}


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _clip(path: Path, *, fps: float | None = None, num_frames: int = 16) -> np.ndarray:
    """The first frames of a real video, its largest centred square; raises ValueError for a shorter one."""
    frames, _ = video.read(path, fps=fps, num_frames=num_frames)
    if len(frames) < num_frames:
        raise ValueError(f"{path}: {len(frames)} frames, {num_frames} wanted")
    side = min(frames.shape[1:3])
    top, left = ((length - side) // 2 for length in frames.shape[1:3])
    return frames[:, top : top + side, left : left + side]


def same(told: dict[str, object], path: Path) -> None:
    """Raise ValueError unless the folder of an evaluation that was begun has the same protocol."""
    if path.exists() and (before := json.loads(path.read_text())) != json.loads(json.dumps(told)):
        different = [key for key in told if json.loads(json.dumps(told[key])) != before.get(key)]
        raise ValueError(f"{path.parent} was begun with another {', '.join(different)}: expected the same, or another folder (--out)")
