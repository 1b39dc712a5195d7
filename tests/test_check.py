"""Every problem that `check` reports, and clips that only resemble it."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from test_video import counting_clip

from latent_shift import video
from latent_shift.data import check as checks
from latent_shift.data.check import check
from latent_shift.data.pack import pack
from latent_shift.data.store import Store


def clouds(num_frames: int, seed: int, size: int = 64) -> np.ndarray:
    """Return a smooth random image that moves to the right."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 12, 3), np.uint8)).resize(
        (2 * size, size), Image.Resampling.BICUBIC
    )
    return np.stack([np.asarray(image)[:, k : k + size] for k in range(num_frames)])


def problems(folder, clips: dict[str, np.ndarray], *, suffix: str = ".mp4", **options) -> dict[str, str]:
    """Write clips, each with its name as its caption, and return {file name: problem}."""
    rows = []
    for name, frames in clips.items():
        video.write(frames, folder / f"{name}{suffix}", fps=8)
        rows.append({"file_name": f"{name}{suffix}", "text": name})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {problem.file_name: problem.reason for problem in check(folder, **options)[1]}


def test_check_reports_short_static_broken_and_missing_clips(media, tmp_path):
    for name in ("red.webp", "still.png"):
        (tmp_path / name).write_bytes((media / name).read_bytes())
    video.write(counting_clip(8), tmp_path / "short.mp4", fps=8)
    video.write(np.full((20, 32, 32, 3), 9, np.uint8), tmp_path / "frozen.mp4", fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"x")
    names = ["red.webp", "still.png", "short.mp4", "frozen.mp4", "broken.mp4", "gone.mp4"]
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": name}) for name in names)
    )
    counts, found = check(tmp_path, workers=2)
    reasons = {problem.file_name: problem.reason for problem in found}
    outcomes = {problem.file_name: problem.outcome for problem in found}
    assert counts == {"clips": 3, "stills": 1, "skipped": 2, "concepts": 4}
    assert outcomes["short.mp4"] == "kept" and outcomes["broken.mp4"] == "skipped"
    assert reasons["short.mp4"] == "8 frames at 8 fps, expected at least 16"
    assert "static" in reasons["frozen.mp4"]
    assert reasons["broken.mp4"].startswith("cannot be decoded")
    assert set(reasons) == {"short.mp4", "frozen.mp4", "broken.mp4", "gone.mp4"}


def test_check_with_aspects_sees_a_watermark_at_the_side(tmp_path):
    images = {}
    for number in range(24):
        frames = np.concatenate([clouds(1, 2 * number), clouds(1, 2 * number + 1)], axis=2)
        frames[:, 10:40:6, -12:] = 255
        images[f"still{number}"] = frames
    assert problems(tmp_path, images, suffix=".png") == {}
    reason = problems(tmp_path, images, suffix=".png", aspects=32)[str(tmp_path)]
    assert "fixed overlay" in reason and "% from the left" in reason


def test_check_reports_copies_in_another_size_and_encoding(tmp_path):
    one, other = clouds(16, 0), clouds(16, 1)
    large = np.stack(
        [np.asarray(Image.fromarray(frame).resize((160, 160), Image.Resampling.BICUBIC)) for frame in one]
    )
    assert problems(tmp_path, {"one": one, "other": other, "copy": large}) == {
        "copy.mp4": "duplicate of one.mp4"
    }


def test_check_tells_clips_apart_by_colour_and_by_a_detail(tmp_path):
    disc = (np.hypot(*np.mgrid[-32:32, -32:32]) < 25)[None, :, :, None]
    clips = {
        name: np.where(disc, np.array(colour), 255)
        for name, colour in (("red", (200, 60, 60)), ("blue", (60, 90, 200)))
    }
    clips["winks"] = clips["red"].copy()
    clips["winks"][:, 20:26, 20:30] = 0
    fading = 1 - np.arange(16)[:, None, None, None] / 100  # so that no clip is static
    assert (
        problems(tmp_path, {name: (frames * fading).astype(np.uint8) for name, frames in clips.items()}) == {}
    )


def test_check_finds_a_watermark_on_later_clips(tmp_path, monkeypatch):
    """The result does not depend on the order of the clips, although only some of them are searched for a watermark."""
    monkeypatch.setattr(checks, "MAX_OVERLAY_SAMPLES", 50)
    mark = np.zeros((1, 64, 64, 3), bool)
    mark[:, 48:56, 8:40:4] = True
    stills = {
        f"{number:02}": np.where(mark & (number >= 20), 255, clouds(1, number)).astype(np.uint8)
        for number in range(90)
    }
    reasons = problems(tmp_path, stills, suffix=".png")
    assert list(reasons) == [str(tmp_path)] and "fixed overlay" in reasons[str(tmp_path)]


def test_check_distinguishes_cuts_from_fast_motion(tmp_path):
    cut = np.concatenate([clouds(10, 2), clouds(10, 3)])
    fast = np.stack([clouds(1, seed)[0] for seed in range(10, 30)])
    assert problems(tmp_path, {"cut": cut, "fast": fast}) == {"cut.mp4": "scene cut at 1.2 s"}
    pack(tmp_path, tmp_path / "store", size=64, fps=8, split_cuts=True)
    scenes = [(record.file_name, record.num_frames) for record in Store(tmp_path / "store").records]
    assert scenes == [("cut.mp4#0", 10), ("cut.mp4#1", 10), ("fast.mp4", 20)]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_check_locates_a_translucent_watermark(tmp_path, alpha):
    mark = np.zeros((64, 64, 1))
    mark[48:56, 8:40] = np.arange(32)[:, None] // 4 % 2  # bars
    clips = {f"clip{seed}": clouds(16, seed) for seed in range(24)}
    marked = {
        name: (frames * (1 - alpha * mark) + 255 * alpha * mark).astype(np.uint8)
        for name, frames in clips.items()
    }
    reasons = problems(tmp_path, marked)
    if not alpha:
        assert reasons == {}
        return
    ((source, reason),) = reasons.items()
    assert source == str(tmp_path)
    top, bottom, left, right = (int(number) for number in re.findall(r"\d+", reason))
    assert (top, bottom) == pytest.approx((75, 87), abs=3)
    assert (left, right) == pytest.approx((18, 62), abs=6)
