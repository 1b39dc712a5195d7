"""Decode the frames of a video with libav, as a player shows them.

Only the containers in `FORMATS` are opened, recognized by content, and only from the file itself: no playlist,
no device and no address.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import lru_cache, partial
from itertools import dropwhile
from typing import Any

import av
import av.filter
import numpy as np
from PIL import Image

from latent_shift.video.color import is_hdr, source_primaries, to_sdr
from latent_shift.video.headers import Track, check_dolby_vision, read_header
from latent_shift.video.limits import MAX_PIXELS, LimitedFile, TimeLimit, check_size
from latent_shift.video.opening import DecodeError, items, library_errors

FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf")
"""Names of the demuxers of libav that may be used. "mov" is also MP4 and 3GP, "matroska" also WebM."""
_LENGTH_FROM_ZERO = ("matroska,webm", "asf")
"""Containers whose length counts from 0, and not from the first frame, to the end."""
_LENGTH_MEASURED = ("mpegts", "mpeg")
"""Containers without a length: libav gives that of the packets, of which the first may be no key frame."""
_PICTURE_BRANDS = {"heic", "heix", "heim", "heis", "mif1", "msf1", "hevc", "hevx", "avif", "avis"}
_FULL_RANGE = 2
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
"""Code of ITU-T H.273 -> name in libav's scale filter."""
_VIDEO_CODECS = {"h264", "hevc", "vp9", "av1"}
"""Codecs whose grey frames have limited range unless they say otherwise."""
_FAST_FORMATS = {"yuv420p", "yuvj420p", "yuva420p"}
_PIXEL_FORMATS = {
    (False, False): "rgb24",
    (True, False): "rgba",
    (False, True): "gbrp16le",
    (True, True): "gbrap16le",
}
"""(alpha, 16 bits) -> pixel format. libav's packed formats of 16 bits have wrong colours in some versions."""
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def decode(
    file: LimitedFile, limit: TimeLimit, *, background: tuple[int, int, int]
) -> Iterator[tuple[Callable[[], Image.Image], float]]:
    """Yield, for each frame, a function that returns it as an upright RGB image with square pixels, and the
    seconds that it is on screen.

    Raises:
        DecodeError: no video, frames that cannot be shown right, or a truncated file. Truncated files may
            decode without an error of the decoder, so the decoded time is compared with the header.
    """
    container, tracks = open_container(file)
    with container:
        stream = _main_stream(container)
        track = tracks.get(stream.id, Track())
        check_dolby_vision(track.dolby_vision)
        _check_edits(track)
        if stream.width and stream.height:  # without a key frame there is no size
            check_size(stream.width, stream.height)
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        converter = FrameConverter(container, stream, track, background)
        default_duration = 1 / float(stream.average_rate or 25)
        decoded_seconds = 0.0
        packets = _PacketReader(container, stream)
        frames = _decode_packets(packets, stream, limit)
        durations = _with_durations(frames, default_duration, from_dts=container.format.name == "avi")
        for frame, duration in _deinterlace(durations):
            decoded_seconds += duration
            yield partial(converter, frame), duration
        if container.format.name in _LENGTH_MEASURED:
            return
        packets.check_complete()
        if stream.duration and stream.time_base:
            header_seconds = float(stream.duration * stream.time_base)
            if container.format.name in _LENGTH_FROM_ZERO and stream.start_time:
                header_seconds -= float(stream.start_time * stream.time_base)
            if decoded_seconds < 0.9 * header_seconds - 2 * default_duration:
                raise DecodeError(
                    f"truncated: {decoded_seconds:.1f} s of {header_seconds:.1f} s can be decoded"
                )


def open_container(file: LimitedFile) -> tuple[av.container.InputContainer, dict[int, Track]]:
    """Open a container of one of `FORMATS`, and return it with the tracks of `read_header`.

    Raises:
        DecodeError: a picture, or another kind of file.
    """
    tracks = read_header(file)
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    with library_errors():
        try:
            container = av.open(file, "r", options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            raise DecodeError(f"not a video or picture of a known format ({error.strerror})") from error
    brand = container.metadata.get("major_brand", "").strip()
    if brand in _PICTURE_BRANDS:
        container.close()
        raise DecodeError(
            f"a picture of the kind {brand!r}, which is not supported; convert it to JPEG or PNG"
        )
    return container, tracks


def _main_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Return the default video stream, or else the first, that is not a cover picture or thumbnails."""
    pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise DecodeError("no video, only a cover picture" if container.streams.video else "no video stream")
    stream = max(streams, key=lambda stream: bool(stream.disposition & av.stream.Disposition.default))
    if stream.codec_context is None:
        raise DecodeError("its video has an unknown codec")
    return stream


def _check_edits(track: Track) -> None:
    """Raise DecodeError for an edit list that libav does not follow: it plays at rate 1, without pauses."""
    parts = list(dropwhile(lambda edit: edit[0] < 0, track.edits))
    if track.edits and not parts:
        raise DecodeError("its edit list shows no part of it; export it anew")
    for time, rate in parts:
        if time < 0:
            raise DecodeError("its edit list has a pause after its first part; export it anew")
        if rate != 1:
            raise DecodeError(f"its edit list plays a part at {rate:g} times the speed; export it anew")


class _PacketReader:
    """Iterate over the packets of one stream, and follow those of all to tell how much of the file is there."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream):
        self.container, self.stream = container, stream
        self.end_seconds = 0.0

    def __iter__(self) -> Iterator[av.Packet]:
        for packet in items(self.container.demux()):
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None and packet.time_base is not None:
                end = float((time + (packet.duration or 0)) * packet.time_base)
                self.end_seconds = max(self.end_seconds, end)
            if packet.stream.index == self.stream.index:  # those that flush have no `stream_index`
                yield packet

    def check_complete(self) -> None:
        """Raise DecodeError if the packets end before the length in the header of the container."""
        container = self.container
        start = (
            0.0 if container.format.name in _LENGTH_FROM_ZERO else (container.start_time or 0) / av.time_base
        )
        seconds, read = (container.duration or 0) / av.time_base, self.end_seconds - start
        if read < 0.9 * seconds - 0.1:
            raise DecodeError(f"truncated: {read:.1f} s of {seconds:.1f} s are there")


def _decode_packets(
    packets: _PacketReader, stream: av.VideoStream, limit: TimeLimit
) -> Iterator[av.VideoFrame]:
    # libav's own decoders of VP8 and VP9 skip the alpha channel
    alpha_decoder = (
        _ALPHA_DECODERS.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
    )
    decoder: Any = av.CodecContext.create(alpha_decoder, "r") if alpha_decoder else stream.codec_context
    for packet in packets:
        limit.check()
        if not packet.size and packet.dts is not None:
            continue  # AVI: the frame before stays on screen
        with library_errors():
            frames = decoder.decode(packet if packet.size else None)
        for frame in frames:
            check_size(frame.width, frame.height)
            if frame.is_corrupt:
                raise DecodeError("a frame is damaged")
            if frame.time_base is None or alpha_decoder:
                frame.time_base = stream.time_base
            yield frame


def _with_durations(
    frames: Iterable[av.VideoFrame], default_duration: float, *, from_dts: bool
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yield each frame with the seconds until the next.

    Args:
        frames: in the order in which they are shown.
        default_duration: of the last frame, and of frames without time, in seconds.
        from_dts: use the times of decoding. AVI has no others: those of showing are made up, wrongly with
            B-frames.
    """
    previous: av.VideoFrame | None = None
    previous_time: float | None = None
    for frame in frames:
        time = _to_seconds(frame.dts if from_dts else frame.pts, frame)
        if previous is not None:
            if time is None or previous_time is None:
                yield previous, default_duration
            else:
                yield previous, max(time - previous_time, 0.0)
        previous, previous_time = frame, time
    if previous is not None:
        yield previous, _to_seconds(previous.duration, previous) or default_duration


def _to_seconds(ticks: int | None, frame: av.VideoFrame) -> float | None:
    return None if ticks is None or frame.time_base is None else float(ticks * frame.time_base)


def _deinterlace(frames: Iterable[tuple[av.VideoFrame, float]]) -> Iterator[tuple[av.VideoFrame, float]]:
    """Replace interlaced frames by progressive ones of the same rate; progressive frames stay as they are."""
    graph = shape = None
    waiting: deque[tuple[av.VideoFrame, float]] = deque()  # in the filter, which looks one frame ahead
    for frame, duration in frames:
        if graph is not None and (frame.width, frame.height, frame.format.name) != shape:
            yield from _filter(graph, None, waiting)
            graph = None
        # the filter needs 3 x 4 pixels
        if graph is None and (not frame.interlaced_frame or min(frame.width, frame.height) < 4):
            yield frame, duration
            continue
        if graph is None:
            shape = (frame.width, frame.height, frame.format.name)
            with library_errors():
                graph = build_graph(frame, ("bwdif", "mode=send_frame:deint=interlaced"))
        waiting.append((frame, duration))
        frame.pts, frame.time_base = len(waiting), Fraction(1, 25)
        yield from _filter(graph, frame, waiting)
    if graph is not None:
        yield from _filter(graph, None, waiting)


def _filter(
    graph: av.filter.Graph, frame: av.VideoFrame | None, waiting: deque[tuple[av.VideoFrame, float]]
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yield the frames that a filter has ready after one more frame, or after the last if there is none."""
    with library_errors():
        graph.push(frame)
    while waiting:
        with library_errors():
            try:
                result = graph.vpull()
            except (BlockingIOError, EOFError):
                return
        yield result, waiting.popleft()[1]


def build_graph(frame: av.VideoFrame, *filters: tuple[str, str]) -> av.filter.Graph:
    """Return a graph that applies filters, each with its arguments, to frames like `frame`."""
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
        )
    ]
    nodes += [graph.add(name, arguments) for name, arguments in filters]
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    return graph


class FrameConverter:
    """Convert the frames of one stream to upright RGB images with square pixels in SDR, all of the size of
    the first.

    Args:
        container, stream, track: of the frames.
        background: RGB colour behind transparent pixels.

    Raises (on a call):
        DecodeError: colours, proportions or an orientation that cannot be shown right.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        stream: av.VideoStream,
        track: Track,
        background: tuple[int, int, int],
    ):
        self.pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        self.aperture = track.aperture
        if self.aperture and not track.has_pixel_aspect and track.size == self.aperture[:2]:
            self.pixel_aspect = Fraction(1)  # libav takes the size of the track for that of whole frames
        self.codec_context = stream.codec_context
        self.coded_aspect: Fraction | None = None
        self.background = background
        self.codec = stream.codec_context.name
        # 32-bit AVI leaves the fourth byte empty
        self.ignores_alpha = container.format.name == "avi" and self.codec == "rawvideo"
        self.first_size: tuple[int, int] | None = None
        self.crop: tuple[int, int, int, int] | None = None
        self._graph = lru_cache(1)(_scale_graph)

    def __call__(self, frame: av.VideoFrame) -> Image.Image:
        width, height = self._displayed_size(frame)
        has_alpha = not self.ignores_alpha and (
            frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
        )
        matrix, full_range = self._matrix(frame), self._has_full_range(frame)
        primaries = source_primaries(frame.color_primaries, frame.color_trc)
        pixel_format = _PIXEL_FORMATS[has_alpha, primaries is not None]
        shape = (frame.width, frame.height, frame.format.name)
        frame.pts, frame.time_base = None, Fraction(1, 25)
        with library_errors():
            graph = self._graph(shape, width, height, matrix, full_range, pixel_format, self.crop)
            graph.push(frame)
            pixels: Any = graph.vpull().to_ndarray()
        if primaries is not None:
            rgb = to_sdr(pixels[..., :3], primaries, frame.color_trc)
            pixels = np.concatenate([rgb, (pixels[..., 3:] >> 8).astype(np.uint8)], axis=-1)
        image = Image.fromarray(pixels)
        if frame.format.name.startswith("gray") and not full_range:  # the filter takes grey for full range
            image = image.point(
                [round((level - 16) * 255 / 219) for level in range(256)] * len(image.getbands())
            )
        if has_alpha:
            backdrop = Image.new("RGBA", image.size, (*self.background, 255))
            image = Image.alpha_composite(backdrop, image).convert("RGB")
        return _turn_upright(image, frame)

    def _displayed_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Return the size of what is shown of the first frame, with square pixels."""
        size = (frame.width, frame.height)
        coded_aspect = self.codec_context.sample_aspect_ratio or Fraction(1)
        if self.coded_aspect not in (None, coded_aspect):
            raise DecodeError(
                f"the shape of the pixels changes from {self.coded_aspect} to {coded_aspect}; cut it there"
            )
        self.coded_aspect = coded_aspect
        if self.first_size is None:
            if not Fraction(1, 8) <= self.pixel_aspect <= 8:
                raise DecodeError(f"its pixels are {self.pixel_aspect} times as wide as high")
            self.first_size = size
            if self.aperture is not None:
                self.crop = _aperture_box(self.aperture, *size)
        elif size != self.first_size and self.crop is not None:
            raise DecodeError("its frames are cropped (clap), and their size changes; cut it there")
        elif size != self.first_size:
            first_aspect, aspect = self.first_size[0] / self.first_size[1], size[0] / size[1]
            if not 0.97 < aspect / first_aspect < 1.03:
                raise DecodeError(
                    f"the proportions change from {self.first_size[0]}x{self.first_size[1]} to {size[0]}x{size[1]} "
                    "pixels; cut it there"
                )
        shown_width, height = self.first_size if self.crop is None else self.crop[:2]
        width = max(1, round(shown_width * self.pixel_aspect))
        check_size(width, height)
        return width, height

    def _matrix(self, frame: av.VideoFrame) -> str:
        """Return the matrix between YCbCr and RGB. Players take unmarked video for BT.601, or BT.709 in HD."""
        if frame.colorspace in _MATRICES:
            return _MATRICES[frame.colorspace]
        if frame.format.is_rgb:
            return "bt601"  # no effect
        if frame.colorspace not in (0, 2, 3):
            raise DecodeError(f"its colours have matrix {frame.colorspace} of H.273; convert it to BT.709")
        if is_hdr(frame.color_trc) or frame.color_primaries == 9:
            return "bt2020"
        return "bt709" if frame.width >= 1280 or frame.height > 576 else "bt601"

    def _has_full_range(self, frame: av.VideoFrame) -> bool:
        if frame.color_range in (1, _FULL_RANGE):
            return frame.color_range == _FULL_RANGE
        name = frame.format.name
        return (
            frame.format.is_rgb
            or name.startswith("yuvj")
            or (name.startswith("gray") and self.codec not in _VIDEO_CODECS)
        )


def _aperture_box(
    aperture: tuple[Fraction, Fraction, Fraction, Fraction], width: int, height: int
) -> tuple[int, int, int, int] | None:
    """Return width, height, left and top of a clean aperture in whole pixels of a frame, or None if it is all."""
    aperture_width, aperture_height, right, down = aperture
    lefts = [(width - aperture_width) / 2 + right, (width + aperture_width) / 2 + right]
    tops = [(height - aperture_height) / 2 + down, (height + aperture_height) / 2 + down]
    left, end = (min(max(round(edge), 0), width) for edge in lefts)
    top, bottom = (min(max(round(edge), 0), height) for edge in tops)
    if left >= end or top >= bottom:
        raise DecodeError(f"its clean aperture (clap) is outside its {width}x{height} pixels")
    box = (end - left, bottom - top, left, top)
    return None if box == (width, height, 0, 0) else box


def _scale_graph(
    shape: tuple[int, int, str],
    width: int,
    height: int,
    matrix: str,
    full_range: bool,
    pixel_format: str,
    crop: tuple[int, int, int, int] | None,
) -> av.filter.Graph:
    frame = av.VideoFrame(*shape)
    if crop is not None:  # after the conversion, which has one colour a pixel
        shown_size, (width, height) = (width, height), shape[:2]
    in_range = "full" if full_range else "tv"
    # To packed 8 bits, "bilinear" alone is exact only for the formats of most videos; white would lack 2 levels.
    is_fast = (frame.width, frame.height) == (width, height) and frame.format.name in _FAST_FORMATS
    flags = "bilinear" if is_fast or "16" in pixel_format else "bilinear+accurate_rnd+full_chroma_int"
    arguments = f"{width}:{height}:in_color_matrix={matrix}:in_range={in_range}:out_range=full:flags={flags}"
    filters = [("scale", arguments), ("format", pixel_format)]
    if crop is not None:
        filters += [
            ("crop", "{}:{}:{}:{}".format(*crop)),
            ("scale", "{}:{}:flags=bilinear".format(*shown_size)),
        ]
        filters.append(("format", pixel_format))
    return build_graph(frame, *filters)


_ROTATIONS = {
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
}


def _turn_upright(image: Image.Image, frame: av.VideoFrame) -> Image.Image:
    """Apply the display matrix: of its 16.16 numbers, `a b / c d` map (x, y) to (ax + cy, bx + dy)."""
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except (
        ValueError
    ):  # PyAV cannot list Exif or the data of 3D video; the rotation does not tell mirrored ones
        return image.transpose(_ROTATIONS[frame.rotation]) if frame.rotation in _ROTATIONS else image
    if data is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if a and d and not b and not c:
        horizontal, vertical = a, d
    elif b and c and not a and not d:
        image, horizontal, vertical = image.transpose(Image.Transpose.TRANSPOSE), c, b
    else:
        raise DecodeError("it is to be shown at an angle other than 90, 180 or 270 degrees")
    if horizontal < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if vertical < 0 else image
