"""Files in and out, folders, stores: what is read is what was there, and what is broken is named."""

import json
import struct

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latent_shift import video
from latent_shift.data.latents import LatentStore
from latent_shift.data.pack import pack, preview
from latent_shift.data.store import Store


def counting_clip(num_frames: int, size: int = 32) -> np.ndarray:
    """Frame k is grey level 10 k."""
    return np.repeat(np.arange(num_frames, dtype=np.uint8) * 10, size * size * 3).reshape(num_frames, size, size, 3)


def levels(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_what_is_written_is_read(tmp_path, suffix):
    frames = counting_clip(20)
    path = video.write(frames, tmp_path / "new" / f"clip{suffix}", fps=10)
    read, fps = video.read(path)
    assert read.shape == frames.shape
    assert fps == pytest.approx(10)
    assert np.abs(read.astype(int) - frames).max() <= 3
    if suffix == ".webp":
        assert np.array_equal(read, frames)


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
@pytest.mark.parametrize(
    ("fps", "expected"), [(5, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]), (20, [k // 2 for k in range(40)]), (4, [0, 2, 5, 7, 10, 12, 15, 17])]
)
def test_frames_are_those_on_screen_at_the_new_rate(tmp_path, suffix, fps, expected):
    path = video.write(counting_clip(20), tmp_path / f"clip{suffix}", fps=10)
    read, rate = video.read(path, fps=fps)
    # At 4 fps frame 1 is at 0.25 s: in the middle of frame 2 (0.2-0.3 s); slot k shows the first frame that starts there.
    on_screen = [int(k / fps * 10 + 1e-6) for k in range(len(expected))]
    assert expected == on_screen
    assert levels(read) == on_screen
    assert rate == fps


@pytest.mark.parametrize("fps", [None, 5, 20, 4, 3])
def test_the_first_frames_are_those_of_the_whole_and_no_more_is_decoded(tmp_path, monkeypatch, fps):
    path = video.write(counting_clip(20), tmp_path / "clip.mp4", fps=10)
    whole, rate = video.read(path, fps=fps)
    decode, decoded = video._decode_video, []
    monkeypatch.setattr(video, "_decode_video", lambda file: (decoded.append(0) or each for each in decode(file)))
    for num_frames in range(1, 44):
        decoded.clear()
        first, of = video.read(path, fps=fps, num_frames=num_frames)
        assert np.array_equal(first, whole[:num_frames]) and of == pytest.approx(rate)
        seconds = num_frames / (fps or 10)
        assert len(decoded) == min(max(2, np.ceil(seconds * 10 - 1e-6)), 20)


def test_an_mp4_plays_in_browsers(tmp_path):
    path = video.write(counting_clip(5, size=33), tmp_path / "odd.mp4", fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (34, 34)
        assert stream.frames == 5
        assert stream.average_rate == 8
    body = path.read_bytes()
    assert body.index(b"moov") < body.index(b"mdat")  # the index comes first: playback starts before the file has arrived


def test_a_png_is_a_strip(tmp_path):
    path = video.write(counting_clip(3), tmp_path / "strip.png")
    with Image.open(path) as strip:
        assert strip.size == (96, 32)
    frames, fps = video.read(path)
    assert frames.shape == (1, 32, 96, 3)
    assert fps == 0


def test_transparent_pixels_show_the_background_and_crops_are_centred(tmp_path):
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (10, 0, 30, 40))
    image.save(tmp_path / "a.png")
    frames, _ = video.read(tmp_path / "a.png", size=40)
    assert frames.shape == (1, 40, 40, 3)
    assert (frames[0, :, :18] == (255, 0, 0)).all()
    assert (frames[0, :, 22:] == (255, 255, 255)).all()
    assert (video.read(tmp_path / "a.png", background=(0, 255, 0))[0][0, :, 50] == (0, 255, 0)).all()


def test_broken_files_are_named_with_the_reason(tmp_path):
    video.write(counting_clip(20), tmp_path / "cut.webp")
    (tmp_path / "cut.webp").write_bytes((tmp_path / "cut.webp").read_bytes()[:200])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "notes.doc").write_text("?")
    for name in ("cut.webp", "text.mp4", "notes.doc", "absent.mp4"):
        with pytest.raises(ValueError, match=name):
            video.read(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected \(F, H, W, 3\) uint8"):
        video.write(np.zeros((3, 8, 8)), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"expected one of \.mp4"):
        video.write(counting_clip(2), tmp_path / "a.mpg")
    with pytest.raises(ValueError, match="fps must be above 0"):
        video.write(counting_clip(2), tmp_path / "a.mp4", fps=0)


@pytest.mark.parametrize("suffix", sorted(video.SUFFIXES))
def test_a_file_cut_anywhere_is_read_or_refused_with_a_reason(tmp_path, suffix):
    frames = np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), np.uint8)
    whole = tmp_path / f"whole{suffix}"
    if suffix in video.VIDEO_SUFFIXES:
        made = video.write(frames, tmp_path / ("made.webm" if suffix in (".webm", ".mkv") else "made.mp4"))
        made.rename(whole)  # FFmpeg looks inside
    else:
        images = [Image.fromarray(frame) for frame in frames]
        options = {} if suffix in (".jpg", ".jpeg") else {"save_all": True, "append_images": images[1:], "duration": 100}
        images[0].save(whole, format={".jpg": "jpeg", ".apng": "png"}.get(suffix), **options)
    body = whole.read_bytes()
    part = tmp_path / f"part{suffix}"
    refused = 0
    for length in np.linspace(0, len(body) - 1, 40).astype(int):
        part.write_bytes(body[:length])
        try:
            assert len(video.read(part)[0]) <= 6
        except ValueError as error:
            refused += part.name in str(error)
    assert refused >= 10


def test_a_gif_keeps_its_time(tmp_path):
    """Delays are whole centiseconds: what is rounded off one frame goes to the next. A delay of none is a tenth of a second."""
    for fps in (8, 24, 50):
        read, rate = video.read(video.write(counting_clip(24), tmp_path / "a.gif", fps=fps))
        assert len(read) == 24
        assert rate == pytest.approx(fps, rel=0.01)
    images = [Image.fromarray(frame) for frame in counting_clip(12)]
    images[0].save(tmp_path / "fast.gif", save_all=True, append_images=images[1:], duration=0)
    assert video.read(tmp_path / "fast.gif", fps=8)[0].shape[0] == 10
    with pytest.raises(ValueError, match="at most 50 frames a second, got 60"):
        video.write(counting_clip(2), tmp_path / "a.gif", fps=60)


def test_frames_are_upright(tmp_path):
    """A photograph with an orientation tag, a video with a rotated track header: as a telephone held upright writes them."""
    sideways = np.zeros((1, 32, 64, 3), np.uint8)
    sideways[:, :, 32:] = 255  # the right half is white; turned a quarter clockwise that is the lower half
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(sideways[0]).save(tmp_path / "a.png", exif=exif)
    path = video.write(sideways.repeat(4, 0), tmp_path / "a.mp4")
    body = bytearray(path.read_bytes())
    start = body.index(b"tkhd") + 44
    body[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(body)
    for name in ("a.png", "a.mp4"):
        frames, _ = video.read(tmp_path / name)
        assert frames.shape[1:] == (64, 32, 3)
        assert frames[:, :30].mean() < 5, name
        assert frames[:, 34:].mean() > 250, name


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_video_cut_short_is_refused(tmp_path, suffix):
    """It may decode without an error (it depends on the threads that decode); then only its header tells that something is missing."""
    whole = video.write(np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8), tmp_path / f"whole{suffix}")
    assert len(video.read(whole)[0]) == 24
    part = tmp_path / f"part{suffix}"
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"part.*: (cut short: [0-9.]+ s of 3\.0 s can be decoded|cannot be decoded after \d+ frames)"):
        video.read(part)


def test_captions_keep_their_letters_and_empty_ones_are_none(tmp_path):
    video.write(counting_clip(16), tmp_path / "a.mp4")
    rows = [{"file_name": "a.mp4", "text": "one\u2028line"}, {"file_name": "a.mp4", "text": ["", "a"]}, {"file_name": "a.mp4", "text": " "}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert pack(tmp_path, tmp_path / "store", size=16, fps=8) == [("a.mp4", "no caption")]
    assert sorted(record.texts for record in Store(tmp_path / "store").records) == [("a",), ("one\u2028line",)]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.mp4", "text": "a"}\n')
    with pytest.raises(ValueError, match=r"none of 1 files can be used; the first: gone.mp4: .*no such file"):
        pack(tmp_path, tmp_path / "other", size=16, fps=8)


def test_packing_leaves_broken_files_out_and_says_so(media, tmp_path):
    (tmp_path / "red.webp").write_bytes((media / "red.webp").read_bytes())
    (tmp_path / "broken.mp4").write_bytes(b"x")
    names = ["red.webp", "broken.mp4", "gone.mp4"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": name}) for name in names))
    left_out = pack(tmp_path, tmp_path / "store", size=16, fps=8)
    assert [name for name, _ in left_out] == ["broken.mp4", "gone.mp4"]
    assert [record.file_name for record in Store(tmp_path / "store").records] == ["red.webp"]  # nothing takes their place


def test_a_preview_shows_clips_and_names_them(packed):
    sheet, captions = preview(Store(packed), rows=3, columns=5)
    assert sheet.shape == (3 * (32 + 14), 5 * 32 + 4 * 2, 3)
    assert set(captions) <= {text for record in Store(packed).records for text in record.texts}
    sheet, captions = preview(Store(packed), rows=6, columns=4, num_frames=11, stride=2)
    long = [record for record in Store(packed).records if record.split == "train" and (record.num_frames >= 21 or record.loop)]
    assert sheet.shape[0] == 6 * (32 + 14) and 0 < len(long) < len(Store(packed).records)
    assert set(captions) <= {f"{text}, 4 fps" for record in long for text in record.texts}
    with pytest.raises(ValueError, match="no record to train on"):
        preview(Store(packed), splits=("nowhere",))
    every, second = (Store(packed).draw_pixels(np.random.default_rng(1), 0, 4, stride=stride) for stride in (1, 2))
    assert np.array_equal(every[[0, 2]], second[:2])


def test_a_preview_of_latents_shows_what_they_decode_to(packed, latents, autoencoder):
    frames = LatentStore(latents).draw_pixels(np.random.default_rng(0), 0, 3, stride=2)
    rng, pixels = np.random.default_rng(0), Store(packed)
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        seen = torch.from_numpy(pixels.draw_window(rng, 0, 3, stride=2)).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = vae.encode(seen).latent_dist
        sampled = posterior.mean + posterior.std * torch.from_numpy(rng.standard_normal(posterior.mean.shape, np.float32))
        expected = ((vae.decode(sampled).sample.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(frames - expected).max() < 3 < expected.std()
    captions = preview(LatentStore(latents), rows=4, columns=4, stride=2)[1]
    assert all(caption.endswith(", 4 fps") for caption in captions)
