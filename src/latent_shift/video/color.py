"""Convert HDR and wide-gamut video to SDR in BT.709.

libav's filters for this (zscale, libplacebo) are not in PyAV's wheels. That of swscale takes seconds of set-up for
each file and clips all above SDR white.

Sources: ITU-R BT.2100 (PQ and HLG), BT.2408 (SDR white at 203 cd/m2), BT.1886 (gamma 2.4), SMPTE RP 177
(matrices from chromaticities).

Shapes: H x W pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from latent_shift.video.opening import DecodeError

SDR_WHITE = 203.0
"""Luminance of SDR white in HDR video, in cd/m2 (BT.2408)."""
HLG_PEAK = 1000.0
"""Luminance of the display for which HLG is decoded, in cd/m2; its system gamma is 1.2."""
KNEE = 0.9
"""Linear values up to this fraction of SDR white are unchanged; those above are compressed to below 1."""
_GAMMA = 2.4
_ROWS = 64

# Codes of ITU-T H.273, which libav uses. A 0, 3 or 2 is reserved or unspecified.
_SDR_TRANSFERS = {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15}
_PQ, _HLG = 16, 18
_SDR_PRIMARIES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 22}
"""BT.709 and the primaries of analogue television, which players show as BT.709."""
_CHROMATICITIES = {  # red, green, blue, white
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290)),  # BT.709
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),  # BT.2020
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI-P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),  # Display P3
}


def is_hdr(transfer: int) -> bool:
    """Return whether a transfer characteristic is that of HDR video."""
    return transfer in (_PQ, _HLG)


def source_primaries(primaries: int, transfer: int) -> int | None:
    """Return the primaries from which video is converted, or None if players show it as it is.

    Args:
        primaries, transfer: codes of ITU-T H.273.

    Raises:
        DecodeError: a colour space without a conversion here.
    """
    if transfer not in _SDR_TRANSFERS and not is_hdr(transfer):
        raise DecodeError(
            f"its colours have transfer characteristic {transfer} of H.273; convert it to BT.709"
        )
    if primaries in _SDR_PRIMARIES:
        # HDR video without stated primaries has those of BT.2100
        primaries = 9 if is_hdr(transfer) and primaries in (0, 2, 3) else 1
    elif primaries not in _CHROMATICITIES:
        raise DecodeError(f"its colours have primaries {primaries} of H.273; convert it to BT.709")
    return None if primaries == 1 and not is_hdr(transfer) else primaries


def to_sdr(rgb: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """Convert `(H, W, 3) uint16` signal values to uint8 in BT.709.

    Args:
        rgb: signal values up to 255 * 256, as libav scales them.
        primaries: from `source_primaries`.
        transfer: code of ITU-T H.273.
    """
    curve = _linear_curve(transfer)
    matrix = (np.linalg.inv(_to_xyz(1)) @ _to_xyz(primaries)).astype(np.float32)
    result = np.empty(rgb.shape, np.uint8)
    for start in range(0, len(rgb), _ROWS):  # blocks that fit into the cache, and planes: 4 times as fast
        rows = slice(start, start + _ROWS)
        linear = curve.take(np.moveaxis(rgb[rows], -1, 0), mode="clip")
        if transfer == _HLG:  # from scene to display light
            red, green, blue = linear
            luma = np.float32(0.2627) * red + np.float32(0.6780) * green + np.float32(0.0593) * blue
            linear *= np.float32(HLG_PEAK / SDR_WHITE) * luma ** np.float32(0.2)
        linear = (matrix @ linear.reshape(3, -1)).reshape(linear.shape)
        if is_hdr(transfer):
            linear *= _highlight_gain(np.maximum(np.maximum(linear[0], linear[1]), linear[2]))
        result[rows] = np.moveaxis(linear.clip(0, 1) ** np.float32(1 / _GAMMA) * 255 + 0.5, 0, -1)
    return result


@lru_cache
def _linear_curve(transfer: int) -> np.ndarray:
    """Return the light, relative to SDR white, of each 16-bit signal value; of the scene for HLG."""
    signal = (np.arange(65536) / (255 * 256)).clip(0, 1)
    if transfer == _PQ:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        root = signal ** (1 / m2)
        light = 10000 / SDR_WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    elif transfer == _HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**_GAMMA
    return light.astype(np.float32)


def _highlight_gain(peak: np.ndarray) -> np.ndarray:
    """Return the factor that compresses the largest component of a pixel above `KNEE` to below 1. All components are
    multiplied by it, which keeps the hue."""
    excess = np.maximum(peak - KNEE, 0) / (1 - KNEE)
    return (KNEE + (1 - KNEE) * excess / (1 + excess)) / np.maximum(peak, KNEE)


def _to_xyz(primaries: int) -> np.ndarray:
    """Return the matrix from linear RGB to XYZ; white has Y = 1."""
    red, green, blue, white = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in _CHROMATICITIES[primaries])
    columns = np.stack([red, green, blue], axis=1)
    return columns * np.linalg.solve(columns, white)
