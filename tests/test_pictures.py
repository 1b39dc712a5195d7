"""Stills and animations as phones, cameras and editors store them, read as a browser shows them."""

import io
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features
from PIL.PngImagePlugin import PngInfo
from test_films import display_to_signal

from latent_shift import video
from latent_shift.video import limits, pictures


def corner_image(height: int = 24, width: int = 40) -> np.ndarray:
    """Return an image that is white at the top right, so that every orientation differs."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, width // 2 :] = 255
    return image


def test_read_takes_the_first_picture_of_a_phone_photo(tmp_path):
    """Other pictures of a JPEG (MPO) are previews, depths and gains, of any size."""
    photo, gain = Image.new("RGB", (48, 32), "red"), Image.new("RGB", (16, 24), "blue")
    photo.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[gain])
    frames, rate = video.read(tmp_path / "x.jpg")
    assert (frames.shape, rate) == ((1, 32, 48, 3), 0.0)
    assert np.abs(frames[0, 0, 0].astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_turns_and_mirrors_as_exif_says(tmp_path, suffix, orientation):
    upright = corner_image()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a{suffix}", exif=exif)
    frames, _ = video.read(tmp_path / f"a{suffix}")
    assert frames.shape == (1, *upright.shape)
    assert np.abs(frames[0].astype(int) - upright).mean() < 5


def test_read_16_bit_grey(tmp_path):
    """Pillow alone clips 16-bit grey to white."""
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    frames, _ = video.read(tmp_path / "a.png")
    assert np.array_equal(frames[0, 0], np.arange(256)[:, None].repeat(3, 1))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "CMYK", "RGBa", "La", "F", "I", "YCbCr"]
)
def test_to_rgb_takes_every_mode(mode):
    grey = Image.fromarray(np.where(corner_image()[..., 0], 255, 0).astype(np.uint8))
    image = {
        "I;16": lambda: Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "I": lambda: Image.fromarray(np.asarray(grey).astype(np.int32) * 257),
        "PA": lambda: grey.convert("LA").convert("PA"),
        "RGBa": lambda: grey.convert("RGBA").convert("RGBa"),
        "La": lambda: grey.convert("LA").convert("La"),
    }.get(mode, lambda: grey.convert(mode))()
    assert image.mode == mode
    rgb = pictures.to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(int) - corner_image()).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_read_shows_the_background_behind_a_transparent_colour(tmp_path, mode):
    image = Image.fromarray(np.array([[0, 200]], np.uint8).repeat(8, 0).repeat(8, 1)).convert(mode)
    transparent = {"L": 0, "RGB": (0, 0, 0), "P": image.getpixel((0, 0))}[mode]
    image.save(tmp_path / "a.png", transparency=transparent)
    frames, _ = video.read(tmp_path / "a.png", background=(0, 255, 0))
    assert frames[0, 0, 0].tolist() == [0, 255, 0]
    assert frames[0, 0, 15].tolist() == [200, 200, 200]


def test_read_16_bit_grey_with_a_transparent_value(tmp_path):
    values = np.array([[1000, 40000]], np.uint16).repeat(8, 0).repeat(8, 1)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    frames, _ = video.read(tmp_path / "a.png", background=(0, 255, 0))
    assert frames[0, 0, 0].tolist() == [0, 255, 0]
    assert frames[0, 0, 15].tolist() == [156, 156, 156]


def profile(swap: bool) -> bytes:
    """Return an sRGB profile; with red and blue exchanged, under another name."""
    body = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if not swap:
        return body
    body = body.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")
    return body.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(
        b"sRGB built-in", b"swap built-in"
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_read_converts_colours_by_their_icc_profile(tmp_path, mode):
    image = Image.new("RGB", (8, 8), (220, 30, 60)).convert(mode)
    for name, body, expected in (
        ("none", None, (220, 30, 60)),
        ("srgb", profile(False), (220, 30, 60)),
        ("swapped", profile(True), (60, 30, 220)),
        ("damaged", b"no profile", (220, 30, 60)),
    ):
        image.save(tmp_path / f"{name}.png", icc_profile=body)
        assert np.abs(video.read(tmp_path / f"{name}.png")[0][0, 4, 4].astype(int) - expected).max() <= 3, (
            name
        )


def test_read_skips_the_default_image_of_an_animated_png(tmp_path):
    """It is for programs that cannot show animations."""
    default, *frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    default.save(tmp_path / "a.png", save_all=True, append_images=frames, default_image=True, duration=200)
    read, rate = video.read(tmp_path / "a.png")
    assert (len(read), rate) == (2, 5.0)
    assert read[:, 0, 0].tolist() == [[0, 128, 0], [0, 0, 255]]


def png_bytes(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of chunks, each a kind and its content."""
    body = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        body += struct.pack(">I", len(content)) + kind + content
        body += struct.pack(">I", zlib.crc32(kind + content))
    return body


def pixel_bytes(pixels: np.ndarray) -> bytes:
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))


@pytest.mark.parametrize(("depth", "value"), [(1, 1), (2, 1), (4, 9), (8, 200)])
def test_read_grey_of_few_bits_with_a_transparent_value(depth, value):
    """Pillow compares the value at the depth of the file with pixels of 8 bits."""
    levels = np.array([0, value, 2**depth - 1, 0] * 2)
    bits = "".join(format(level, f"0{depth}b") for level in levels)
    pixels = np.frombuffer(int(bits, 2).to_bytes(depth, "big"), np.uint8)[None]
    content = png_bytes(
        struct.pack(">2I5B", 8, 1, depth, 0, 0, 0, 0), (b"tRNS", struct.pack(">H", value)), (b"IDAT", pixel_bytes(pixels))
    )  # fmt: skip
    frames, _ = video.read("a.png", content=content, background=(0, 250, 0))
    grey = (levels * 255 // (2**depth - 1))[:, None].repeat(3, 1)
    assert np.array_equal(frames[0, 0], np.where(levels[:, None] == value, (0, 250, 0), grey))


def test_read_16_bit_colours_with_a_transparent_one():
    pixels = np.array([[(1000, 2000, 3000), (40000, 30000, 20000)]], ">u2")
    content = png_bytes(
        struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0), (b"tRNS", struct.pack(">3H", 1000, 2000, 3000)),
        (b"IDAT", pixel_bytes(pixels)),
    )  # fmt: skip
    frames, _ = video.read("a.png", content=content, background=(0, 250, 0))
    assert np.abs(frames[0, 0].astype(int) - [(0, 250, 0), (156, 117, 78)]).max() <= 1


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [b"eXIf", b"iTXt"])
def test_read_turns_an_animated_png_as_its_exif_or_xmp_says(kind, place):
    """Also where it follows the frames."""
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'
    orientation = [(kind, exif.tobytes()[6:] if kind == b"eXIf" else xmp)]
    control, data = struct.pack(">5I2H2B", 0, 40, 24, 0, 0, 1, 10, 0, 0), pixel_bytes(corner_image())
    chunks = [
        (b"acTL", struct.pack(">2I", 2, 0)), (b"fcTL", control), (b"IDAT", data),
        (b"fcTL", b"\0\0\0\1" + control[4:]), (b"fdAT", b"\0\0\0\2" + data),
    ]  # fmt: skip
    chunks = orientation + chunks if place == "before" else chunks + orientation
    frames, rate = video.read(
        "a.png", content=png_bytes(struct.pack(">2I5B", 40, 24, 8, 2, 0, 0, 0), *chunks)
    )
    assert (len(frames), rate) == (2, 10)
    assert np.array_equal(frames[1], np.rot90(corner_image(), -1))


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "PNG", "JPEG", "GIF"])
@pytest.mark.parametrize("fraction", [0.5, 0.97])
def test_read_says_that_a_cut_picture_is_cut(kind, fraction):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    file = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    image.save(
        file, kind, **({} if kind == "JPEG" else {"save_all": True, "append_images": [image.rotate(90)]})
    )
    content = file.getvalue()[: int(fraction * file.tell())]
    with pytest.raises(ValueError, match=r"a.bin: cannot be decoded.*truncated"):
        video.read("a.bin", content=content)


def test_read_prints_no_warnings_of_pillow():
    """Two values of an orientation: the first counts."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">3HI2H", 1, 0x112, 3, 2, 6, 3) + bytes(4)
    file = io.BytesIO()
    Image.fromarray(corner_image()).save(file, "JPEG", exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert video.read("a.jpg", content=file.getvalue())[0].shape == (1, 40, 24, 3)
    assert not caught


def random_boxes(rng, count: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Return `(top, left, height, width)` of the part of each frame; the first may be smaller than the canvas."""
    boxes = []
    for _ in range(count):
        rows, columns = rng.integers(1, 8, 2)
        boxes.append((rng.integers(height - rows + 1), rng.integers(width - columns + 1), rows, columns))
    return [tuple(map(int, box)) for box in boxes]


BACKGROUND = (1, 250, 3)


def composed(height: int, width: int, parts) -> np.ndarray:
    """Return the frames of an animation as the formats define them, in floats.

    Args:
        parts: top, left, RGBA pixels, whether they are blended, and the disposal: 1 clears, 2 restores.
    """
    canvas, frames = np.zeros((height, width, 4)), []
    for top, left, rgba, blends, disposal in parts:
        before = canvas.copy()
        region = canvas[top : top + rgba.shape[0], left : left + rgba.shape[1]]
        if blends:
            alpha, below = rgba[..., 3:] / 255, region[..., 3:] / 255 * (1 - rgba[..., 3:] / 255)
            color = (rgba[..., :3] * alpha + region[..., :3] * below) / np.maximum(alpha + below, 1e-9)
            rgba = np.concatenate([color, 255 * (alpha + below)], axis=-1)
        region[:] = rgba
        alpha = canvas[..., 3:] / 255
        frames.append(canvas[..., :3] * alpha + np.array(BACKGROUND) * (1 - alpha))
        if disposal == 1:
            region[:] = 0
        elif disposal == 2:
            canvas = before
    return np.stack(frames)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_read_composes_animated_png(mode, seed):
    rng = np.random.default_rng(seed)
    colors = np.concatenate([rng.integers(0, 256, (256, 3)), rng.choice([0, 128, 255], (256, 1))], axis=-1)
    chunks, parts, sequence = [(b"acTL", struct.pack(">2I", 6, 0))], [], iter(range(99))
    if mode == "P":
        chunks += [
            (b"PLTE", colors[:, :3].astype(np.uint8).tobytes()),
            (b"tRNS", colors[:, 3].astype(np.uint8).tobytes()),
        ]
    for index, (top, left, rows, columns) in enumerate([(0, 0, 10, 12), *random_boxes(rng, 5, 10, 12)]):
        blends, disposal = rng.integers(2), rng.integers(3)
        indices = rng.integers(0, 256, (rows, columns), np.uint8)
        rgba = colors[indices]
        if mode == "LA":
            rgba = rgba[..., [0, 0, 0, 3]]
        pixels = {"RGBA": rgba, "LA": rgba[..., 2:], "P": indices}[mode].astype(np.uint8)
        control = struct.pack(">5I2H2B", next(sequence), columns, rows, left, top, 1, 0, disposal, blends)
        chunks.append((b"fcTL", control))
        data = pixel_bytes(pixels)
        chunks.append((b"fdAT", struct.pack(">I", next(sequence)) + data) if index else (b"IDAT", data))
        parts.append((top, left, rgba, blends, disposal))
    kind = {"RGBA": 6, "LA": 4, "P": 3}[mode]
    content = png_bytes(struct.pack(">2I5B", 12, 10, 8, kind, 0, 0, 0), *chunks)
    frames, rate = video.read("a.png", content=content, background=BACKGROUND)
    assert rate == pytest.approx(100)  # a delay of 1 / 0 is 0.01 s
    np.testing.assert_allclose(frames, composed(10, 12, parts), atol=2)


def gif_pixels(indices: np.ndarray) -> bytes:
    """Return LZW data of 8 colours without compression: a code to clear the table before it grows."""
    codes = [code for start in range(0, indices.size, 6) for code in (8, *indices.ravel()[start : start + 6])]
    number = sum(int(code) << 4 * position for position, code in enumerate([*codes, 9]))
    data = number.to_bytes(len(codes) // 2 + 1, "little")
    blocks = [data[start : start + 255] for start in range(0, len(data), 255)]
    return b"\3" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


@pytest.mark.parametrize("seed", range(12))
def test_read_composes_gif(seed):
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 256, (8, 3))
    body, parts = (
        b"GIF89a" + struct.pack("<2H3B", 12, 10, 0x82, seed % 8, 0) + bytes(shared.ravel().tolist()),
        [],
    )
    for top, left, rows, columns in random_boxes(rng, 6, 10, 12):
        indices, disposal = rng.integers(0, 8, (rows, columns)), rng.integers(4)
        transparent = rng.choice([-1, rng.integers(8)])
        colors = rng.choice([shared, rng.integers(0, 256, (8, 3))])
        body += b"!\xf9\4" + struct.pack("<BHBx", disposal << 2 | (transparent >= 0), 10, max(transparent, 0))
        body += b"," + struct.pack("<4HB", left, top, columns, rows, 0x82) + bytes(colors.ravel().tolist())
        body += gif_pixels(indices)
        alpha = np.where(indices == transparent, 0, 255)[..., None]
        parts.append(
            (top, left, np.concatenate([colors[indices], alpha], axis=-1), True, max(0, disposal - 1))
        )
    for content in (body, body + b";"):  # some programs leave out the trailer
        frames, rate = video.read("a.gif", content=content, background=BACKGROUND)
        assert rate == pytest.approx(10)
        assert np.array_equal(frames, composed(10, 12, parts))


def test_read_limits_pictures(tmp_path, monkeypatch):
    Image.new("1", (13000, 13000)).save(tmp_path / "a.png")
    Image.new("L", (40, 40)).save(tmp_path / "phone.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=r"a.png: .*frames of 13000x13000 pixels; expected at most 134217728"
        ):
            video.read(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # above it, Pillow warns
        assert video.read(tmp_path / "phone.png")[0].shape == (1, 40, 40, 3)
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=[16777215] * 2)
    with pytest.raises(
        ValueError, match=r"a.webp: .*frame 1 is on screen for 16777 s; expected at most 60 s"
    ):
        video.read(tmp_path / "a.webp", fps=8)
    assert len(video.read(tmp_path / "a.webp")[0]) == 2


def test_read_limits_texts_in_png(tmp_path):
    """A text of 20 MB that takes 20 kB."""
    info = PngInfo()
    info.add_text("Comment", "a" * 20_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert (tmp_path / "a.png").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"a.png: cannot be decoded: Decompressed data too large"):
        video.read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".jpg", ".mp4", ".webm", ".avif"])
def test_read_answers_damaged_files_with_frames_or_a_value_error(tmp_path, suffix):
    """Bytes at random places are changed; a wrong picture cannot be told, but nothing else is raised."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    if suffix in video.OUTPUT_SUFFIXES:
        body = video.write(frames, tmp_path / f"a{suffix}").read_bytes()
    else:
        buffer = io.BytesIO()
        try:
            Image.fromarray(frames[0]).save(buffer, format={".jpg": "JPEG", ".avif": "AVIF"}[suffix])
        except KeyError:
            pytest.skip("this Pillow has no AVIF")
        body = buffer.getvalue()
    for _ in range(60):
        damaged = bytearray(body)
        for place in rng.integers(0, len(body), 4):
            damaged[place] = rng.integers(256)
        try:
            read, _ = video.read("a.bin", content=bytes(damaged), fps=8, num_frames=8)
            assert read.dtype == np.uint8 and read.ndim == 4
        except ValueError as error:
            assert str(error).startswith("a.bin: ")  # noqa: PT017


def test_limits_are_those_of_the_documentation():
    assert (limits.MAX_PIXELS, limits.MAX_FRAME_SECONDS, limits.MAX_BYTES) == (2**27, 60, 2**34)


def linear_profile() -> bytes:
    """Return the profile "Linear sRGB built-in": that of linear light, under a name with sRGB in it."""
    body = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    start = body.index(b"para\0\0\0\0\0\3") + 12  # the curve y = (a x + b) ** g, or c x below d
    return body[:start] + struct.pack(">5i", 1 << 16, 1 << 16, 0, 1 << 16, 0) + body[start + 20 :]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_read_decides_by_the_colours_of_a_profile_and_not_by_its_name(tmp_path, mode):
    Image.new("RGB", (8, 8), (128, 20, 0)).convert(mode).save(
        tmp_path / "a.png", icc_profile=linear_profile()
    )
    linear = np.array([128, 20, 0]) / 255
    expected = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(video.read(tmp_path / "a.png")[0][0, 4, 4], expected, atol=1)


def grey_profile() -> bytes:
    """Return a profile of grey in linear light."""
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = {
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH2x", 1, 256),
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + bytes(83),
    }
    table, body = struct.pack(">I", 3), b""
    for name, content in tags.items():
        table += name + struct.pack(">2I", 168 + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s12x4s28x", 168 + len(body), b"", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp"
    )
    return (head + white).ljust(128, b"\0") + table + body


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGB"])
def test_read_converts_colours_beside_transparency(tmp_path, mode):
    """A transparent colour is one of the file, not one after its profile; Pillow loses the alpha channel of grey."""
    image = Image.new("RGB", (8, 8), (128, 128, 128))
    image.paste((9, 9, 9), (0, 0, 4, 8))
    transparency = {"LA": None, "L": 9, "I;16": 9 * 257, "RGB": (9, 9, 9)}[mode]
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    elif mode == "LA":
        image = Image.merge(
            "LA", (image.convert("L"), image.convert("L").point(lambda level: 255 * (level > 9)))
        )
    options = {} if transparency is None else {"transparency": transparency}
    profile = linear_profile() if mode == "RGB" else grey_profile()
    image.convert(mode).save(tmp_path / "a.png", icc_profile=profile, **options)
    frame = video.read(tmp_path / "a.png", background=(0, 250, 0))[0][0]
    assert frame[0, 0].tolist() == [0, 250, 0]
    assert np.abs(frame[0, 7].astype(int) - 188).max() <= 1


def test_read_converts_colours_by_the_codes_or_gamma_of_a_png():
    """Screenshots in HDR and wide gamut have codes of H.273; renderings in linear light have a gamma."""
    header, data = (
        struct.pack(">2I5B", 2, 2, 8, 2, 0, 0, 0),
        pixel_bytes(np.full((2, 2, 3), (180, 100, 100), np.uint8)),
    )
    for chunk, expected in (
        ((b"gAMA", struct.pack(">I", 45455)), (180, 100, 100)),
        ((b"gAMA", struct.pack(">I", 100000)), (218, 168, 168)),
        ((b"cICP", bytes([1, 13, 0, 1])), (180, 100, 100)),
        ((b"cICP", bytes([12, 13, 0, 1])), (191, 94, 97)),
    ):
        frames, _ = video.read("a.png", content=png_bytes(header, chunk, (b"IDAT", data)))
        np.testing.assert_allclose(frames[0, 0, 0], expected, atol=2)
    signal = (255 * display_to_signal((200, 120, 40), 16)).round().astype(np.uint8)
    content = png_bytes(
        header, (b"cICP", bytes([9, 16, 0, 1])), (b"IDAT", pixel_bytes(np.broadcast_to(signal, (2, 2, 3))))
    )
    np.testing.assert_allclose(video.read("a.png", content=content)[0][0, 0, 0], (200, 120, 40), atol=8)
    with pytest.raises(ValueError, match=r"a.png: .*transfer characteristic 8 of H.273"):
        video.read("a.png", content=png_bytes(header, (b"cICP", bytes([1, 8, 0, 1])), (b"IDAT", data)))


def test_read_converts_hdr_and_profiles_of_avif(tmp_path):
    """Pillow takes the colours of every AVIF for those of sRGB."""
    if not features.check("avif"):
        pytest.skip("AVIF needs Pillow 11.3")
    path = tmp_path / "a.avif"
    signal = (255 * display_to_signal((200, 120, 40), 16)).round().astype(np.uint8)
    options = {"quality": 100, "subsampling": "4:4:4"}
    Image.fromarray(np.broadcast_to(signal, (16, 16, 3)).copy()).save(path, **options)
    body = bytearray(path.read_bytes())
    start = body.index(b"colrnclx") + 8
    body[start : start + 4] = struct.pack(">2H", 9, 16)
    frame = video.read("a.avif", content=bytes(body))[0][0]
    np.testing.assert_allclose(frame[8, 8], (200, 120, 40), atol=10)
    Image.new("RGB", (16, 16), (128, 128, 128)).save(path, icc_profile=linear_profile(), **options)
    np.testing.assert_allclose(video.read(path)[0][0, 8, 8], 188, atol=2)


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.jpg"])
def test_read_refuses_pictures_of_many_bytes_before_it_reads_them(tmp_path, name):
    """Pillow reads a WebP and AVIF as a whole; such a file with holes takes no space on the disk."""
    path = tmp_path / name
    Image.new("RGB", (8, 8)).save(path)
    with path.open("r+b") as file:
        file.truncate(3 * 2**30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=f"{name}: cannot be decoded: a picture of 3.0 GiB; expected at most 1 GiB"
    ):
        video.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**19  # KiB


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_read_does_not_take_an_error_of_ours_for_a_bad_file(tmp_path, monkeypatch, name):
    path = video.write(np.zeros((3, 16, 16, 3), np.uint8), tmp_path / name)
    monkeypatch.setattr("latent_shift.video.reader._crop_and_resize", lambda image, size: image[0])
    with pytest.raises(TypeError, match="not subscriptable"):
        video.read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"fps": 0}, "fps must be above 0 and finite, got 0"),
        ({"fps": -3}, "got -3; None keeps every frame"),
        ({"fps": float("nan")}, "got nan"),
        ({"fps": float("inf")}, "got inf"),
        ({"size": 0}, r"size must be a number of pixels above 0 or a list of \(height, width\), got 0"),
        ({"size": []}, r"got \[\]"),
        ({"size": [(8, -8)]}, r"got \[\(8, -8\)\]"),
        ({"size": 100_000}, "frames of 100000x100000 pixels; expected at most 134217728"),
    ],
)
def test_read_checks_its_arguments(tmp_path, options, message):
    path = video.write(np.zeros((3, 16, 16, 3), np.uint8), tmp_path / "a.gif")
    for function in (video.read, video.iterate):  # at the call, before the first frame
        with pytest.raises(ValueError, match=message):
            function(path, **options)
