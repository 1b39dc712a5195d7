"""Each thing that can be wrong with a clip, done to one; and clips that only look like it."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from test_data import counting_clip

from latent_shift import video
from latent_shift.data.check import check
from latent_shift.data.pack import pack
from latent_shift.data.store import Store


def clouds(num_frames: int, seed: int, size: int = 64) -> np.ndarray:
    """A soft random picture that drifts to the right."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (6, 12, 3), np.uint8)).resize((2 * size, size), Image.Resampling.BICUBIC)
    return np.stack([np.asarray(picture)[:, k : k + size] for k in range(num_frames)])


def problems(folder, **clips) -> dict[str, str]:
    rows = []
    for name, frames in clips.items():
        video.write(frames, folder / f"{name}.mp4", fps=8)
        rows.append({"file_name": f"{name}.mp4", "text": name})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return dict(check(folder, workers=2)[1])


def test_short_static_broken_and_missing(media, tmp_path):
    for name in ("red.webp", "still.png"):
        (tmp_path / name).write_bytes((media / name).read_bytes())
    video.write(counting_clip(8), tmp_path / "short.mp4", fps=8)
    video.write(np.full((20, 32, 32, 3), 9, np.uint8), tmp_path / "frozen.mp4", fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"x")
    names = ["red.webp", "still.png", "short.mp4", "frozen.mp4", "broken.mp4", "gone.mp4"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": name}) for name in names))
    counts, found = check(tmp_path, workers=2)
    reasons = dict(found)
    assert counts == {"clips": 3, "stills": 1, "concepts": 6}
    assert reasons["short.mp4"] == "8 frames at 8 fps, 16 wanted"
    assert "static" in reasons["frozen.mp4"]
    assert reasons["broken.mp4"].startswith("cannot be decoded")
    assert set(reasons) == {"short.mp4", "frozen.mp4", "broken.mp4", "gone.mp4"}


def test_a_mark_at_the_side_is_seen_where_clips_keep_their_shape(tmp_path):
    wide = {}
    for k in range(24):
        frames = np.concatenate([clouds(16, 2 * k), clouds(16, 2 * k + 1)], axis=2)
        frames[:, 10:40:6, -12:] = 255
        wide[f"clip{k}"] = frames
    assert not any("fixed overlay" in reason for reason in problems(tmp_path, **wide).values())
    found = dict(check(tmp_path, aspects=32)[1])
    assert "fixed overlay" in found[str(tmp_path)]
    assert "% from the left" in found[str(tmp_path)]


def test_copies_in_another_size_and_encoding(tmp_path):
    one, other = clouds(16, 0), clouds(16, 1)
    large = np.stack([np.asarray(Image.fromarray(frame).resize((160, 160), Image.Resampling.BICUBIC)) for frame in one])
    assert problems(tmp_path, one=one, other=other, copy=large) == {"copy.mp4": "shows what one.mp4 shows"}


def test_what_differs_in_colour_or_in_a_detail_is_no_copy(tmp_path):
    disc = (np.hypot(*np.mgrid[-32:32, -32:32]) < 25)[None, :, :, None]
    clips = {name: np.where(disc, np.array(colour), 255) for name, colour in (("red", (200, 60, 60)), ("blue", (60, 90, 200)))}
    clips["winks"] = clips["red"].copy()
    clips["winks"][:, 20:26, 20:30] = 0
    drift = np.arange(16)[:, None, None, None]  # a little lighter from frame to frame, so that none is static
    assert problems(tmp_path, **{name: (frames * (1 - drift / 100)).astype(np.uint8) for name, frames in clips.items()}) == {}


def test_a_watermark_on_later_clips_counts(tmp_path):
    """What is found does not depend on the order of the clips."""
    from latent_shift.data.check import check

    mark = np.zeros((1, 64, 64, 3), bool)
    mark[:, 48:56, 8:40:4] = True
    stills = {f"{number:04}": np.where(mark & (number >= 200), 255, clouds(1, number)).astype(np.uint8) for number in range(900)}
    for name, frames in stills.items():
        video.write(frames, tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    found = dict(check(tmp_path)[1])
    assert list(found) == [str(tmp_path)] and "fixed overlay" in found[str(tmp_path)]


def test_cuts_are_told_from_fast_motion(tmp_path):
    cut = np.concatenate([clouds(10, 2), clouds(10, 3)])
    fast = np.stack([clouds(1, seed)[0] for seed in range(10, 30)])
    assert problems(tmp_path, cut=cut, fast=fast) == {"cut.mp4": "a cut to another scene at 1.2 s"}
    pack(tmp_path, tmp_path / "store", size=64, fps=8, split_cuts=True)
    parts = [(record.file_name, record.num_frames) for record in Store(tmp_path / "store").records]
    assert parts == [("cut.mp4#0", 10), ("cut.mp4#1", 10), ("fast.mp4", 20)]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_watermark_is_found_where_it_is(tmp_path, alpha):
    mark = np.zeros((64, 64, 1))
    mark[48:56, 8:40] = np.arange(32)[:, None] // 4 % 2  # bars
    clips = {f"clip{seed}": clouds(16, seed) for seed in range(24)}
    stamped = {name: (frames * (1 - alpha * mark) + 255 * alpha * mark).astype(np.uint8) for name, frames in clips.items()}
    found = problems(tmp_path, **stamped)
    if not alpha:
        assert found == {}
        return
    ((where, reason),) = found.items()
    assert where == str(tmp_path)
    top, bottom, left, right = (int(number) for number in re.findall(r"\d+", reason))
    assert (top, bottom) == pytest.approx((75, 87), abs=3)
    assert (left, right) == pytest.approx((18, 62), abs=6)
