"""Frames to and from files: videos, animations and stills.

Frames are `(F, H, W, 3) uint8` RGB arrays throughout this package. PyAV (libav) reads and writes the video
containers, Pillow the animations and stills; both packages include their codecs.
"""

from latent_shift.video.frame_file import FrameFile, Frames, collect
from latent_shift.video.limits import check_fps
from latent_shift.video.metadata import picture_options, read_metadata
from latent_shift.video.pixels import to_frames, to_masks, to_uint8
from latent_shift.video.reader import (
    IMAGE_SUFFIXES,
    SUFFIXES,
    VIDEO_SUFFIXES,
    iterate,
    load_video,
    read,
)
from latent_shift.video.sheets import captioned_rows, find_cuts, frame_changes, montage, side_by_side
from latent_shift.video.writer import OUTPUT_SUFFIXES, check_output, save_video, write

__all__ = [
    "IMAGE_SUFFIXES",
    "OUTPUT_SUFFIXES",
    "SUFFIXES",
    "VIDEO_SUFFIXES",
    "FrameFile",
    "Frames",
    "captioned_rows",
    "check_fps",
    "check_output",
    "collect",
    "find_cuts",
    "frame_changes",
    "iterate",
    "load_video",
    "montage",
    "picture_options",
    "read",
    "read_metadata",
    "save_video",
    "side_by_side",
    "to_frames",
    "to_masks",
    "to_uint8",
    "write",
]
