"""Videos, animations and stills, written and read."""

import struct

import av
import numpy as np
import pytest
from PIL import Image, features

from latent_shift import video
from latent_shift.video import films


def counting_clip(num_frames: int, size: int = 32) -> np.ndarray:
    """Return a clip whose frame k has grey level 10 k."""
    return np.repeat(np.arange(num_frames, dtype=np.uint8) * 10, size * size * 3).reshape(
        num_frames, size, size, 3
    )


def levels(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_write_and_read_return_the_same_frames(tmp_path, suffix):
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
    ("fps", "expected"),
    [
        (5, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (20, [k // 2 for k in range(40)]),
        (4, [0, 2, 5, 7, 10, 12, 15, 17]),
    ],
)
def test_read_resamples_to_the_frames_on_screen(tmp_path, suffix, fps, expected):
    path = video.write(counting_clip(20), tmp_path / f"clip{suffix}", fps=10)
    read, rate = video.read(path, fps=fps)
    # At 4 fps frame 1 is at 0.25 s: in the middle of frame 2 (0.2-0.3 s); slot k shows the first frame that starts there.
    on_screen = [int(k / fps * 10 + 1e-6) for k in range(len(expected))]
    assert expected == on_screen
    assert levels(read) == on_screen
    assert rate == fps


@pytest.mark.parametrize("fps", [None, 5, 20, 4, 3])
def test_read_num_frames_returns_the_first_frames_and_decodes_no_more(tmp_path, monkeypatch, fps):
    path = video.write(counting_clip(20), tmp_path / "clip.mp4", fps=10)
    frames, rate = video.read(path, fps=fps)
    decoded = []
    decode = films.decode
    monkeypatch.setattr(
        films,
        "decode",
        lambda *arguments, **options: (
            decoded.append(image) or image for image in decode(*arguments, **options)
        ),
    )
    for num_frames in range(1, 44):
        decoded.clear()
        first, first_rate = video.read(path, fps=fps, num_frames=num_frames)
        assert np.array_equal(first, frames[:num_frames])
        assert first_rate == pytest.approx(rate)
        seconds = num_frames / (fps or 10)
        assert len(decoded) == min(max(2, np.ceil(seconds * 10 - 1e-6)), 20)


def test_write_mp4_plays_in_browsers(tmp_path):
    path = video.write(counting_clip(5, size=33), tmp_path / "odd.mp4", fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (34, 34)
        assert stream.frames == 5
        assert stream.average_rate == 8
    body = path.read_bytes()
    assert body.index(b"moov") < body.index(
        b"mdat"
    )  # the index comes first: playback starts before the file has arrived


def test_write_png_is_a_strip(tmp_path):
    path = video.write(counting_clip(3), tmp_path / "strip.png")
    with Image.open(path) as strip:
        assert strip.size == (96, 32)
    frames, fps = video.read(path)
    assert frames.shape == (1, 32, 96, 3)
    assert fps == 0


def test_read_composites_on_the_background_and_crops_the_centre(tmp_path):
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (10, 0, 30, 40))
    image.save(tmp_path / "a.png")
    frames, _ = video.read(tmp_path / "a.png", size=40)
    assert frames.shape == (1, 40, 40, 3)
    assert (frames[0, :, :18] == (255, 0, 0)).all()
    assert (frames[0, :, 22:] == (255, 255, 255)).all()
    assert (video.read(tmp_path / "a.png", background=(0, 255, 0))[0][0, :, 50] == (0, 255, 0)).all()


def test_read_and_write_errors_name_the_file_and_the_reason(tmp_path):
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
def test_read_refuses_truncated_files_with_a_reason(tmp_path, suffix):
    frames = np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), np.uint8)
    if suffix in video.VIDEO_SUFFIXES:
        path = video.write(frames, tmp_path / ("clip.webm" if suffix in (".webm", ".mkv") else "clip.mp4"))
    else:
        if suffix == ".avif" and not features.check("avif"):
            pytest.skip("AVIF needs Pillow 11.3")
        path = tmp_path / f"clip{suffix}"
        images = [Image.fromarray(frame) for frame in frames]
        options = (
            {}
            if suffix in (".jpg", ".jpeg")
            else {"save_all": True, "append_images": images[1:], "duration": 100}
        )
        images[0].save(path, format={".jpg": "jpeg", ".apng": "png"}.get(suffix), **options)
    content = path.read_bytes()
    truncated = tmp_path / f"truncated{suffix}"  # FFmpeg detects the container by its content
    num_refused = 0
    for length in np.linspace(0, len(content) - 1, 20).astype(int):
        truncated.write_bytes(content[:length])
        try:
            assert len(video.read(truncated)[0]) <= 6
        except ValueError as error:
            num_refused += truncated.name in str(error)
    assert num_refused >= 5


def test_captioned_rows_gives_captions_a_width_that_can_be_read():
    sheet = video.captioned_rows([np.zeros((2, 16, 16, 3), np.uint8)], ["a few words"], columns=1)
    assert sheet.shape == (14 + 16, 128, 3)
    assert (sheet[14:, 16:] == 255).all()


def test_write_gif_keeps_the_duration(tmp_path):
    """A GIF counts in hundredths of a second; a frame without a duration is shown for a tenth of a second."""
    for fps in (8, 24, 50):
        read, rate = video.read(video.write(counting_clip(24), tmp_path / "a.gif", fps=fps))
        assert len(read) == 24
        assert rate == pytest.approx(fps, rel=0.01)
    images = [Image.fromarray(frame) for frame in counting_clip(12)]
    images[0].save(tmp_path / "fast.gif", save_all=True, append_images=images[1:], duration=0)
    assert video.read(tmp_path / "fast.gif", fps=8)[0].shape[0] == 10
    with pytest.raises(ValueError, match=r"a \.gif shows at most 50 frames a second, got 60"):
        video.write(counting_clip(2), tmp_path / "a.gif", fps=60)


def test_read_turns_frames_upright(tmp_path):
    """A phone held upright writes a photo with an orientation tag and a video with a rotation in the track header."""
    sideways = np.zeros((1, 32, 64, 3), np.uint8)
    sideways[:, :, 32:] = 255  # the right half is white; rotated by 90 degrees clockwise it is the lower half
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
def test_read_refuses_a_video_that_is_shorter_than_its_header_says(tmp_path, suffix):
    """Depending on the number of decoding threads, such a file decodes without an error."""
    frames = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8)
    path = video.write(frames, tmp_path / f"clip{suffix}")
    assert len(video.read(path)[0]) == 24
    truncated = tmp_path / f"truncated{suffix}"
    truncated.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError,
        match=r": (truncated: [0-9.]+ s of 3\.0 s can be decoded|cannot be decoded after \d+ frames)",
    ):
        video.read(truncated)
