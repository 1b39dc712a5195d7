"""Videos as phones, cameras, editors and broadcasters store them, read as a good player shows them."""

import io
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_video import counting_clip

from latent_shift import video
from latent_shift.video import color, films, limits

BARS = [(255, 255, 255), (128, 128, 128), (200, 0, 0), (0, 200, 0), (0, 0, 200)]


def bars(height: int = 64, width: int = 160) -> np.ndarray:
    """Return an image of five vertical bars."""
    return np.repeat(np.array(BARS, np.uint8), width // 5, axis=0)[None].repeat(height, 0)


def bar_colours(frames: np.ndarray) -> np.ndarray:
    width = frames.shape[2] // 5
    return frames[-1, frames.shape[1] // 2, width // 2 :: width].astype(int)


def encode(
    path: Path,
    frames,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    source: str = "rgb24",
    rate: int = 25,
    times=None,
    marks=None,
    options=None,
    aspect=None,
    convert=None,
) -> Path:
    """Write a video with PyAV alone.

    Args:
        path: output file.
        frames: arrays in the format `source`, or frames.
        times: time of each frame in units of 1 / rate.
        marks: colour attributes of the codec context and of the frames.
        convert: arguments of libav's scale filter between the array and `pix_fmt`.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.pix_fmt = pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in (marks or {}).items():
            setattr(stream.codec_context, name, value)
        for index, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=source)
            if convert:
                graph = films.build_graph(frame, ("scale", convert), ("format", pix_fmt))
                graph.push(frame)
                frame = graph.vpull()
            if not index:
                stream.width, stream.height = frame.width, frame.height
            for name, value in (marks or {}).items():
                setattr(frame, name, value)
            frame.pts, frame.time_base = times[index] if times else index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_read_h264_in_avi_has_the_times_of_decoding(tmp_path):
    """AVI has no times of showing: with B-frames those that libav makes up are wrong."""
    path = encode(tmp_path / "a.avi", counting_clip(25).repeat(3, 0), options={"bf": "3"})
    frames, rate = video.read(path)
    assert (len(frames), rate) == (75, pytest.approx(25))
    frames, _ = video.read(path, fps=5)
    assert [round(frame.mean() / 10) for frame in frames] == [k * 5 // 3 for k in range(15)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_read_keeps_the_times_of_variable_rate(tmp_path, name):
    times = [0, 1, 2, 3, 30, 31, 45, 46]
    options = {"bf": "0"} if name == "a.avi" else {}
    path = encode(tmp_path / name, counting_clip(8), times=times, options=options)
    frames, _ = video.read(path, fps=25)
    shown = [max(k for k, time in enumerate(times) if time <= position) for position in range(47)]
    assert [round(frame.mean() / 10) for frame in frames] == shown


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.wmv", "wmv2"), ("a.ts", "libx264")],
)
def test_read_takes_a_video_that_starts_late(tmp_path, name, codec):
    """In recordings with sound: in some containers the length counts from 0, so that the file looks truncated."""
    path = encode(tmp_path / name, counting_clip(8), codec, times=[k + 100 for k in range(8)])
    frames, rate = video.read(path)
    assert (len(frames), rate) == (8, pytest.approx(25))


def test_read_takes_a_recording_of_television_from_its_first_key_frame(tmp_path):
    path = encode(tmp_path / "a.ts", counting_clip(24), options={"g": "12", "bf": "2", "sc_threshold": "0"})
    for name, skipped in (("b.ts", 4), ("c.ts", 13)):
        with av.open(str(path)) as whole, av.open(str(tmp_path / name), "w") as cut:
            stream = cut.add_stream_from_template(whole.streams.video[0])
            for index, packet in enumerate(whole.demux(video=0)):
                if packet.dts is not None and index >= skipped:
                    packet.stream = stream
                    cut.mux(packet)
    assert [round(frame.mean() / 10) for frame in video.read(tmp_path / "b.ts")[0]] == list(range(12, 24))
    with pytest.raises(ValueError, match=r"c.ts: cannot be decoded"):
        video.read(tmp_path / "c.ts")


@pytest.mark.parametrize("bf", [0, 3])
def test_read_keeps_to_the_edit_list(tmp_path, bf):
    """Phones cut videos by an edit list alone."""
    path = encode(tmp_path / "a.mp4", counting_clip(20), options={"bf": str(bf)})
    body = bytearray(path.read_bytes())
    start = body.index(b"elst") + 12
    _, delay = struct.unpack(">Ii", body[start : start + 8])
    body[start : start + 8] = struct.pack(">Ii", 400, delay + 5 * 512)  # 0.4 s from frame 5 on
    path.write_bytes(body)
    assert [round(frame.mean() / 10) for frame in video.read(path)[0]] == list(range(5, 15))


def with_box(path: Path, *parents: bytes, box: bytes) -> Path:
    """Add a box to the last one in `parents`, or replace the box of its kind there, in an MP4 with the header last."""
    body = bytearray(path.read_bytes())
    start, sizes = 0, []
    for parent in parents:
        start = body.index(parent, start)
        sizes.append(start - 4)
    end = sizes[-1] + int.from_bytes(body[sizes[-1] : sizes[-1] + 4], "big")
    old = body.find(box[4:8], start, end) - 4
    length = int.from_bytes(body[old : old + 4], "big") if old > 0 else 0
    place = old if old > 0 else end
    body[place : place + length] = box
    for position in sizes:
        size = int.from_bytes(body[position : position + 4], "big") + len(box) - length
        body[position : position + 4] = size.to_bytes(4, "big")
    path.write_bytes(body)
    return path


SAMPLE_ENTRY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([(400, 4, 1), (200, 0, 1)], [4, 5, 6, 7, 0, 1]),
        ([(500, -1, 1), (800, 0, 1)], list(range(8))),
        ([(400, 0, 2)], "plays a part at 2 times the speed"),
        ([(800, 0, 0.5)], "plays a part at 0.5 times the speed"),
        ([(800, 0, 0)], "plays a part at 0 times the speed"),
        ([(200, 0, 1), (500, -1, 1), (200, 2, 1)], "has a pause after its first part"),
        ([(500, -1, 1)], "shows no part of it"),
    ],
)
def test_read_follows_the_edit_list_or_names_what_it_cannot(tmp_path, version, edits, expected):
    path = encode(tmp_path / "a.mp4", counting_clip(8), rate=10, options={"bf": "0", "g": "1"})
    with av.open(str(path)) as container:
        ticks = round(0.1 / container.streams[0].time_base)
    entries = [
        struct.pack(">Qqi" if version else ">Iii", time, max(frame * ticks, -1), round(rate * 65536))
        for time, frame, rate in edits
    ]
    elst = box(b"elst", bytes([version, 0, 0, 0]), struct.pack(">I", len(edits)), *entries)
    with_box(path, b"moov", b"trak", b"edts", box=elst)
    if isinstance(expected, str):
        with pytest.raises(
            ValueError, match=f"a.mp4: cannot be decoded: its edit list {expected}; export it"
        ):
            video.read(path)
    else:
        assert [round(frame.mean() / 10) for frame in video.read(path)[0]] == expected


@pytest.mark.parametrize(
    ("numbers", "rows", "columns"),
    [
        ((32, 1, 16, 1, 0, 1, 0, 1), slice(24, 40), slice(64, 96)),
        ((81, 2, 15, 1, -15, 2, 9, 2), slice(29, 44), slice(52, 93)),
        ((160, 1, 66, 1, 0, 1, 0, 1), slice(None), slice(None)),
    ],
)
def test_read_crops_to_the_clean_aperture(tmp_path, numbers, rows, columns):
    image = bars()
    image[30:] = 255 - image[30:]
    path = encode(tmp_path / "a.mp4", [image] * 2, "libx264rgb", pix_fmt="rgb24", options={"qp": "0"})
    with_box(path, *SAMPLE_ENTRY, b"avc1", box=box(b"clap", struct.pack(">4IiIiI", *numbers)))
    assert np.array_equal(video.read(path)[0][1], image[rows, columns])


def test_read_takes_the_shape_of_the_pixels_beside_a_clean_aperture(tmp_path):
    for aspect, width in ((None, 32), (Fraction(3, 2), 48)):
        path = encode(tmp_path / "a.mp4", [bars()] * 2, aspect=aspect)
        body = bytearray(path.read_bytes())
        start = body.index(b"tkhd") + 80
        body[start : start + 8] = struct.pack(">2I", 32 << 16, 16 << 16)  # of what is shown
        path.write_bytes(body)
        clap = struct.pack(">4IiIiI", 32, 1, 16, 1, 0, 1, 0, 1)
        with_box(path, *SAMPLE_ENTRY, b"avc1", box=box(b"clap", clap))
        assert video.read(path)[0].shape == (2, 16, width, 3)


def test_read_refuses_a_clean_aperture_outside(tmp_path):
    path = encode(tmp_path / "a.mp4", [bars()] * 2)
    with_box(
        path, *SAMPLE_ENTRY, b"avc1", box=box(b"clap", struct.pack(">4IiIiI", 32, 1, 16, 1, 200, 1, 0, 1))
    )
    with pytest.raises(ValueError, match=r"its clean aperture \(clap\) is outside its 160x64 pixels"):
        video.read(path)
    with_box(path, *SAMPLE_ENTRY, b"avc1", box=box(b"clap", bytes(32)))
    with pytest.raises(ValueError, match="the box clap in its header is damaged"):
        video.read(path)


@pytest.mark.parametrize(("profile", "compatibility", "right"), [(5, 0, False), (10, 0, False), (8, 4, True)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_read_refuses_dolby_vision_without_a_usual_picture(tmp_path, suffix, profile, compatibility, right):
    """Its colours are in a space of its own, which libav shows in green and violet."""
    path = encode(tmp_path / "a.mp4", counting_clip(3))
    numbers = struct.pack(">2BHB", 1, 0, profile << 9 | 5, compatibility << 4)
    kind = b"dvcC" if profile <= 7 else b"dvvC"
    with_box(path, *SAMPLE_ENTRY, b"avc1", box=box(kind, numbers, bytes(19)))
    if suffix == "mkv":
        with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as copy:
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    copy.mux(packet)
        path = tmp_path / "b.mkv"
    if right:
        assert len(video.read(path)[0]) == 3
    else:
        with pytest.raises(
            ValueError, match=f"Dolby Vision profile {profile}, .*; convert it to HDR10 or SDR"
        ):
            video.read(path)


def display_to_signal(rgb, transfer: int) -> np.ndarray:
    """Return the PQ or HLG signal in BT.2020 of an SDR colour whose white is at 203 cd/m2, after BT.2100."""
    linear = (np.asarray(rgb, float) / 255) ** 2.4
    wide = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]) @ linear
    if transfer == 16:
        powered = (wide * 203 / 10000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * powered) / (1 + 18.6875 * powered)) ** 78.84375
    display = wide * 0.203
    scene = display * max(float(display @ [0.2627, 0.6780, 0.0593]), 1e-9) ** (-0.2 / 1.2)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


def hdr_video(path: Path, colours, transfer: int) -> Path:
    """Write bars of SDR colours as 10-bit HDR video."""
    planes = np.zeros((3, len(colours)), int)
    for index, colour in enumerate(colours):
        red, green, blue = display_to_signal(colour, transfer)
        luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
        planes[:, index] = (
            round(876 * luma + 64),
            round(896 * (blue - luma) / 1.8814 + 512),
            round(896 * (red - luma) / 1.4746 + 512),
        )
    frame = av.VideoFrame(32 * len(colours), 64, "yuv420p10le")
    for plane, row, step in zip(frame.planes, planes, (32, 16, 16), strict=True):
        data = np.zeros((plane.height, plane.line_size // 2), "<u2")
        data[:, : step * len(colours)] = np.repeat(row, step)
        plane.update(data.tobytes())
    name = {16: "smpte2084", 18: "arib-std-b67"}[transfer]
    options = {"x264-params": f"colorprim=bt2020:transfer={name}:colormatrix=bt2020nc", "qp": "1"}
    marks = {"color_primaries": 9, "color_trc": transfer, "colorspace": 9, "color_range": 1}
    return encode(path, [frame] * 3, pix_fmt="yuv420p10le", marks=marks, options=options)


@pytest.mark.parametrize("transfer", [16, 18])
def test_read_tone_maps_hdr_to_the_colours_of_sdr(tmp_path, transfer):
    frames, _ = video.read(hdr_video(tmp_path / "phone.mov", BARS, transfer))
    assert np.abs(bar_colours(frames) - BARS).max() <= 14
    assert np.abs(bar_colours(frames) - BARS).mean() <= 3


def test_to_sdr_compresses_highlights_and_keeps_hues():
    """Luminances up to 10,000 cd/m2 stay below white and never fall; those below SDR white are exact."""
    signal = np.linspace(0, 1, 512)
    grey = color.to_sdr((signal * 65280).round().astype(np.uint16)[None, :, None].repeat(3, -1), 9, 16)[0]
    assert np.ptp(grey.astype(int), axis=-1).max() <= 1
    assert (np.diff(grey[:, 0].astype(int)) >= 0).all()
    root = signal ** (1 / 78.84375)
    relative = (
        ((root - 0.8359375).clip(0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125) * 10000 / 203
    )
    below = relative <= 0.9
    assert np.abs(grey[below, 0] - 255 * relative[below] ** (1 / 2.4)).max() <= 1
    assert 244 <= grey[np.argmin(np.abs(relative - 1)), 0] <= 252
    assert 252 <= grey[np.argmin(np.abs(relative - 2)), 0] < 255
    bright = display_to_signal((255, 128, 0), 16) * 1.1
    red, green, blue = color.to_sdr((bright.clip(0, 1) * 65280).astype(np.uint16)[None, None], 9, 16)[0, 0]
    assert red > 240 > green > 110 > 60 > blue


def test_read_converts_wide_gamut(tmp_path):
    """A colour in Display P3 is more saturated than the same numbers in BT.709."""
    marks = {"color_primaries": 12, "color_trc": 1, "colorspace": 1, "color_range": 1}
    image = np.full((32, 32, 3), (180, 100, 100), np.uint8)
    path = encode(
        tmp_path / "a.mp4", [image] * 2, marks=marks, options={"qp": "1"}, convert="out_color_matrix=bt709"
    )
    # P3 -> XYZ -> BT.709, computed with the matrices of CSS Color 4
    p3 = np.array(
        [[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869], [0, 0.0451134, 1.0439444]]
    )
    back = np.array([[3.2409699, -1.5373832, -0.4986108], [-0.9692436, 1.8759675, 0.0415551], [0.0556301, -0.2039770, 1.0569715]])  # fmt: skip
    expected = 255 * (back @ p3 @ (image[0, 0] / 255) ** 2.4).clip(0, 1) ** (1 / 2.4)
    assert expected[0] > 186 and expected[1] < 99
    np.testing.assert_allclose(video.read(path)[0][0, 16, 16], expected, atol=3)


@pytest.mark.parametrize(
    ("height", "convert", "marks"),
    [
        (64, "out_color_matrix=bt601", {}),
        (720, "out_color_matrix=bt709", {}),
        (64, "out_color_matrix=bt709", {"colorspace": 1}),
        (720, "out_color_matrix=bt601", {"colorspace": 6}),
        (64, "out_color_matrix=bt601:out_range=full", {"color_range": 2}),
        (64, "out_color_matrix=bt2020", {"colorspace": 9}),
    ],
)
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv422p10le", "yuv444p10le"])
def test_read_uses_matrix_and_range(tmp_path, height, convert, marks, pix_fmt):
    """Unmarked video is BT.601 in standard and BT.709 in high definition, as players take it."""
    path = encode(
        tmp_path / "a.mp4",
        [bars(height)] * 2,
        pix_fmt=pix_fmt,
        convert=convert,
        marks=marks,
        options={"qp": "1", "preset": "ultrafast"},
    )
    assert np.abs(bar_colours(video.read(path)[0]) - BARS).max() <= 3


def test_read_refuses_colours_that_it_cannot_convert(tmp_path):
    for params, name in (
        ("colormatrix=ictcp", "matrix 14"),
        ("transfer=log100", "transfer characteristic 9"),
        ("colorprim=smpte428:colormatrix=bt709", "primaries 10"),
    ):
        path = encode(tmp_path / "a.mp4", [bars()] * 2, options={"x264-params": params})
        with pytest.raises(
            ValueError, match=f"a.mp4: .*its colours have {name} of H.273; convert it to BT.709"
        ):
            video.read(path)


def test_read_grey_video_with_limited_range(tmp_path):
    ramp = np.linspace(16, 235, 64).round().astype(np.uint8)[None].repeat(64, 0)
    path = encode(tmp_path / "a.mp4", [ramp] * 2, pix_fmt="gray", source="gray", options={"qp": "1"})
    frames, _ = video.read(path)
    assert np.abs(frames[0, 32, :, 0].astype(int) - np.linspace(0, 255, 64)).max() <= 3


@pytest.mark.parametrize(("aspect", "size"), [((16, 11), (240, 465)), ((8, 9), (240, 284))])
def test_read_shows_square_pixels(tmp_path, aspect, size):
    rows, columns = np.mgrid[:240, :320]
    width = 320 * aspect[0] / aspect[1]
    disc = np.hypot((columns + 0.5) * width / 320 - width / 2, rows + 0.5 - 120) < 80
    image = (disc[..., None] * 255).astype(np.uint8).repeat(3, -1)
    frames, _ = video.read(encode(tmp_path / "dvd.mp4", [image] * 2, aspect=Fraction(*aspect)))
    assert frames.shape[1:3] == size
    inside = frames[0, ..., 0] > 128
    assert inside.any(0).sum() == pytest.approx(160, abs=2)
    assert inside.any(1).sum() == pytest.approx(160, abs=2)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mkv", "ffv1", "yuva420p"),
    ],
)
def test_read_shows_the_background_behind_transparent_video(tmp_path, name, codec, pix_fmt):
    rgba = np.zeros((4, 32, 32, 4), np.uint8)
    rgba[:, 8:24, 8:24] = (0, 0, 255, 255)
    path = encode(tmp_path / name, rgba, codec, pix_fmt=pix_fmt, source="rgba", rate=10)
    for background in ((255, 255, 255), (0, 255, 0)):
        frames, _ = video.read(path, background=background)
        assert len(frames) == 4
        assert np.abs(frames[-1, 0, 31].astype(int) - background).max() <= 3
        assert np.abs(frames[-1, 16, 16].astype(int) - (0, 0, 255)).max() <= 6


def test_read_converts_transparent_hdr(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint16)
    pixels[8:24, 8:24, 3] = 65535
    pixels[8:24, 8:24, :3] = (display_to_signal((200, 0, 0), 16) * 65280).round()
    marks = {"color_primaries": 9, "color_trc": 16, "colorspace": 9, "color_range": 1}
    path = encode(
        tmp_path / "a.mov", [pixels] * 2, "prores_ks", pix_fmt="yuva444p10le", source="rgba64le", marks=marks,
        convert="out_color_matrix=bt2020:out_range=tv",
    )  # fmt: skip
    frame = video.read(path, background=(0, 255, 0))[0][0].astype(int)
    assert np.abs(frame[0, 0] - (0, 255, 0)).max() <= 3
    assert np.abs(frame[16, 16] - (200, 0, 0)).max() <= 14


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_read_turns_and_mirrors_as_the_track_header_says(tmp_path, turns, mirrored):
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, 32:] = 255  # white at the top right
    path = video.write(image[None].repeat(3, 0), tmp_path / "a.mp4")
    # rows of the matrix are where x and y go to
    x, y = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns], [(0, 1), (-1, 0), (0, -1), (1, 0)][turns]
    if mirrored:
        x = (-x[0], -x[1])
    body = bytearray(path.read_bytes())
    start = body.index(b"tkhd") + 44
    body[start : start + 36] = struct.pack(
        ">9i", x[0] << 16, x[1] << 16, 0, y[0] << 16, y[1] << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(body)
    expected = np.rot90(image[:, ::-1] if mirrored else image, -turns)
    frames, _ = video.read(path)
    assert frames.shape[1:] == expected.shape
    assert np.abs(frames[0].astype(int) - expected).mean() < 6


def film_of(picture: bytes, path: Path, codec: str, pix_fmt: str) -> Path:
    """Write a film whose three frames are a file of a picture of 64x32 pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, pix_fmt
        for index in range(3):
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 10)
            container.mux(packet)
    return path


@pytest.mark.parametrize("mode", ["P", "RGB"])
@pytest.mark.parametrize("suffix", ["mov", "avi"])
def test_read_shows_the_background_behind_transparent_colours_of_a_film(tmp_path, suffix, mode):
    """In a palette, alpha is no component of the pixels."""
    picture = Image.new("P", (64, 32), 0)
    picture.putpalette([200, 0, 0, 0, 200, 0])
    picture.paste(1, (32, 0, 64, 32))
    content = io.BytesIO()
    transparent = bytes([0, 255]) if mode == "P" else (200, 0, 0)
    picture.convert(mode).save(content, "PNG", transparency=transparent)
    path = film_of(content.getvalue(), tmp_path / f"a.{suffix}", "png", "rgb24")
    frames, _ = video.read(path, background=(0, 0, 250))
    assert frames.shape == (3, 32, 64, 3)
    assert frames[:, 16, [0, 40]].tolist() == [[[0, 0, 250], [0, 200, 0]]] * 3


@pytest.mark.parametrize(("codec", "name"), [("msrle", "a.avi"), ("smc", "a.mov"), ("rawvideo", "b.avi")])
def test_read_shows_opaque_palettes(tmp_path, codec, name):
    palette = np.full((256, 4), (255, 200, 0, 0), np.uint8)
    frames = [
        av.VideoFrame.from_ndarray((np.zeros((32, 32), np.uint8), palette), format="pal8") for _ in range(3)
    ]
    path = encode(tmp_path / name, frames, codec, pix_fmt="pal8")
    assert video.read(path)[0][-1, 0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_read_takes_motion_jpeg_with_exif(tmp_path, orientation, turns):
    """PyAV does not know this kind of side data and raises an error for all."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, 32:] = 255
    exif, jpeg = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(image).save(jpeg, "JPEG", exif=exif)
    frames, _ = video.read(film_of(jpeg.getvalue(), tmp_path / "a.avi", "mjpeg", "yuvj420p"))
    expected = np.rot90(image, turns)
    assert frames.shape == (3, *expected.shape)
    assert np.abs(frames[0].astype(int) - expected).mean() < 6


def test_read_deinterlaces(tmp_path):
    """A square moves by a pixel a field: the comb between the fields goes, and no frame is lost."""
    frames = []
    for k in range(12):
        fields = np.zeros((2, 64, 64, 3), np.uint8)
        for field, moment in enumerate((2 * k, 2 * k + 1)):
            fields[field, 16:48, moment : moment + 20] = 255
        fields[0, 1::2] = fields[1, 1::2]
        frames.append(fields[0])
    path = encode(tmp_path / "a.mp4", frames, options={"x264-params": "tff=1"})
    read, rate = video.read(path)
    assert (len(read), rate) == (12, pytest.approx(25))
    grey = read.mean(-1)
    comb = np.abs(grey[:, 17:47] - (grey[:, 16:46] + grey[:, 18:48]) / 2).mean(axis=(1, 2))
    assert comb.max() < 2 < np.abs(np.diff(frames[5][16:48].mean(-1), axis=0)).mean()
    left = [int(np.flatnonzero(frame[32] > 128)[0]) for frame in grey]
    assert left == pytest.approx([2 * k for k in range(12)], abs=1)


def test_read_scales_a_size_that_changes_and_refuses_other_proportions(tmp_path):
    """Screen and WebRTC recordings change their size; a transport stream is joined by appending."""
    parts = {}
    for height, width in ((64, 96), (32, 48), (96, 64)):
        parts[height] = encode(
            tmp_path / f"{height}.ts", [bars(height, width - width % 5).repeat(2, 1)[:, :width]] * 5
        ).read_bytes()
    (tmp_path / "smaller.ts").write_bytes(parts[64] + parts[32])
    (tmp_path / "turned.ts").write_bytes(parts[64] + parts[96])
    assert video.read(tmp_path / "smaller.ts")[0].shape == (10, 64, 96, 3)
    with pytest.raises(ValueError, match=r"turned.ts: .*the proportions change from 96x64 to 64x96 pixels"):
        video.read(tmp_path / "turned.ts")


def test_read_takes_the_video_and_not_its_cover(tmp_path):
    """libav lists a cover first if the metadata come before the tracks, as iTunes writes them."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        main = container.add_stream("libx264", rate=10)
        main.width = main.height = 32
        main.pix_fmt = "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(cover.encode(None))
        for frame in counting_clip(5):
            container.mux(main.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(main.encode(None))
    body = path.read_bytes()
    moov = body.index(b"moov") - 4
    size = int.from_bytes(body[moov : moov + 4], "big")
    boxes, start = [], moov + 8
    while start < moov + size:
        end = start + int.from_bytes(body[start : start + 4], "big")
        boxes.append(body[start:end])
        start = end
    boxes.sort(key=lambda box: box[4:8] == b"trak")
    path.write_bytes(body[: moov + 8] + b"".join(boxes) + body[moov + size :])
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "h264"]
    assert video.read(path)[0].shape == (5, 32, 32, 3)


HOSTILE = {
    "concat": b"ffconcat version 1.0\nfile private.mp4\n",
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nprivate.mp4\n#EXT-X-ENDLIST\n",
    "session": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 45678 RTP/AVP 96\r\n",
    "dash": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
    "text": b"hello",
    "empty": b"",
}


@pytest.mark.parametrize("suffix", [".mp4", ".png", ""])
@pytest.mark.parametrize("kind", HOSTILE)
def test_read_opens_only_what_is_handed_over(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.chdir(tmp_path)
    video.write(counting_clip(3), "private.mp4")
    path = Path(f"{kind}{suffix}")
    path.write_bytes(HOSTILE[kind])
    for content in (None, HOSTILE[kind]):
        with pytest.raises(
            ValueError, match=f"{kind}.*: not a video or picture of a known format|: cannot be decoded"
        ):
            video.read(path, content=content)


def test_read_refuses_pipes_folders_and_addresses(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    for name in ("pipe.mp4", "folder.mp4", "/dev/zero"):
        with pytest.raises(ValueError, match=f"{name}: not a regular file"):
            video.read(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        video.read("http://127.0.0.1/a.mp4")


def test_read_decides_by_content_and_takes_any_name(tmp_path):
    for name, suffix in (
        ("12:30.txt", ".mp4"),
        ("a.mp4", ".png"),
        ("b.png", ".webm"),
        ("caf\udce9", ".webp"),
    ):
        path = video.write(counting_clip(4), tmp_path / f"x{suffix}").rename(tmp_path / name)
        assert len(video.read(path)[0]) == (1 if suffix == ".png" else 4)


def test_read_refuses_a_heic_picture(tmp_path):
    """Of its tiles libav would show the first."""
    body = bytearray(video.write(counting_clip(3), tmp_path / "a.mp4").read_bytes())
    body[8:12] = b"heic"
    (tmp_path / "a.heic").write_bytes(body)
    with pytest.raises(
        ValueError, match=r"a.heic: .*a picture of the kind 'heic', which is not supported; convert it"
    ):
        video.read(tmp_path / "a.heic")


def test_read_limits_the_seconds_of_a_frame(tmp_path):
    """Ten changed bytes of an AVI let a frame last for 68 years."""
    body = bytearray(encode(tmp_path / "a.avi", counting_clip(8), "mpeg4").read_bytes())
    start = body.find(b"strh") + 28
    body[start : start + 8] = struct.pack("<II", 0x7FFFFFFF, 1)
    (tmp_path / "a.avi").write_bytes(body)
    with pytest.raises(
        ValueError, match=r"a.avi: .*frame 1 is on screen for 2147483647 s; expected at most 60 s"
    ):
        video.read(tmp_path / "a.avi", fps=8)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_read_limits_pixels_time_and_bytes(tmp_path, monkeypatch, suffix):
    path = video.write(counting_clip(4, 64), tmp_path / f"a{suffix}")
    for name, value, message in (
        ("MAX_PIXELS", 1000, "frames of 64x64 pixels; expected at most 1000 pixels"),
        ("BASE_SECONDS", -1.0, "takes too long"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, value)
            with pytest.raises(ValueError, match=message):
                video.read(path)
    monkeypatch.setattr("latent_shift.video.reader.MAX_BYTES", 2 * 64 * 64 * 3)
    with pytest.raises(ValueError, match=f"a{suffix}: its frames take more than .* GiB; pass a smaller size"):
        video.read(path)
    assert len(list(video.iterate(path))) == 4


def test_read_does_not_count_the_time_of_the_consumer(tmp_path, monkeypatch):
    path = video.write(counting_clip(6), tmp_path / "a.mp4", fps=10)
    now = [0.0]
    monkeypatch.setattr("latent_shift.video.limits.time.monotonic", lambda: now[0])
    monkeypatch.setattr("latent_shift.video.reader.monotonic", lambda: now[0])
    frames = video.iterate(path)
    for _ in range(6):
        next(frames)
        now[0] += 3600
    assert list(frames) == []


def test_collect_keeps_long_clips_in_a_file(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (12, 8, 6, 3), np.uint8)
    assert isinstance(video.collect(iter(frames), tmp_path / "new"), np.ndarray)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("latent_shift.video.frame_file.MAX_MEMORY_BYTES", 5 * frames[0].nbytes)
    flushed = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: flushed.append(os.fstat(number).st_size))
        collected = video.collect(iter(frames), tmp_path / "new")
    assert isinstance(collected, video.FrameFile)
    assert flushed == [collected.path.stat().st_size]
    assert collected.shape == frames.shape
    assert np.array_equal(np.load(collected.path), frames)
    assert np.array_equal(collected[3:9:2], frames[3:9:2])
    assert np.array_equal(collected[np.array([0, 7, -1])], frames[[0, 7, -1]])
    assert np.array_equal(collected[5], frames[5])
    np.testing.assert_array_equal(video.frame_changes(collected), video.frame_changes(frames))


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return (8 + len(body)).to_bytes(4, "big") + kind + body


def test_read_refuses_more_samples_than_bytes():
    """libav's index would take 36 bytes for each."""
    run = box(b"moof", box(b"traf", box(b"trun", bytes(4), (10**8).to_bytes(4, "big"), bytes(4))))
    table = box(
        b"moov",
        box(
            b"trak",
            box(
                b"mdia",
                box(b"minf", box(b"stbl", box(b"stsz", bytes(4), b"\0\0\0\1", (10**8).to_bytes(4, "big")))),
            ),
        ),
    )
    for name, content in (("trun", run), ("stsz", table)):
        content = box(b"ftyp", b"isom", bytes(4)) + content
        with pytest.raises(
            ValueError, match=f"a.mp4: .*announces 100000000 samples in {name}, but has {len(content)} bytes"
        ):
            video.read("a.mp4", content=content)


def test_read_refuses_boxes_in_boxes_without_end():
    content = b""
    for _ in range(3000):
        content = box(b"moov", content)
    with pytest.raises(ValueError, match=r"a.mp4: cannot be decoded: not a video"):
        video.read("a.mp4", content=content)


@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi", "flv", "mp4"])
def test_read_names_half_a_film_with_sound(suffix):
    """The length in the header is that of the longer stream."""
    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(suffix, suffix)) as container:
        codec = {"webm": "libvpx", "avi": "mpeg4", "flv": "flv1"}.get(suffix, "libx264")
        pictures = container.add_stream(codec, rate=25)
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        sound = container.add_stream(
            {"webm": "opus", "flv": "aac", "mp4": "aac"}.get(suffix, "mp2"),
            rate=44100 if suffix == "flv" else 48000,
        )
        rng = np.random.default_rng(0)
        for k in range(100):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (64, 64, 3), np.uint8), format="rgb24")
            frame.pts = k
            container.mux(pictures.encode(frame))
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 3840), np.int16), format="s16", layout="stereo")
            wave.rate, wave.pts = 48000, 1920 * k
            container.mux(sound.encode(wave))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    content = file.getvalue()
    assert len(video.read(f"a.{suffix}", content=content)[0]) == 100
    with pytest.raises(ValueError, match=rf"a.{suffix}: cannot be decoded"):
        video.read(f"a.{suffix}", content=content[: len(content) // 2])
