"""One system's clips beside the real ones, with features and values of each clip cached on disk, and their
records."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latent_shift.evaluation import statistics
from latent_shift.evaluation.features import Clip, Extractor, Weights
from latent_shift.evaluation.records import Record
from latent_shift.evaluation.statistics import Estimate
from latent_shift.evaluation.systems import System
from latent_shift.files import open_array, write_array, write_array_blocks

if TYPE_CHECKING:
    from latent_shift.evaluation.protocols import Protocol

CLIPS_A_PART = 256
"""Clips whose rows are written at once: the most that an interruption costs."""


@dataclass
class Comparison:
    """The clips of one system and the real clips of a protocol, at the protocol's size.

    Attributes:
        system, protocol: the system, and what it generated.
        clips: returns generated clip k, `(F, H, W, 3) uint8`, at its own size.
        out, folder: of the evaluation and, in it, of the system; they hold the cached rows.
        weights: networks to measure with.
        noise: (shared noise, noise correlation) under which models of this package are shown real clips;
            None: that of their sampling.
        values: measure to a value of each generated clip, for measures that are averages: two systems are
            compared by them.
    """

    system: System
    protocol: Protocol
    clips: Callable[[int], np.ndarray]
    out: Path
    folder: Path
    weights: Weights
    noise: tuple[float, float] | None = None
    values: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def native_size(self) -> list[int]:
        """(height, width) of the generated clips."""
        return list(self.clips(0).shape[1:3])

    @functools.cached_property
    def cluster_ids(self) -> np.ndarray:
        """`(N,)`, which independent sample each generated clip belongs to."""
        return np.array(self.protocol.cluster_ids)

    def clip(self, k: int) -> np.ndarray:
        """Return generated clip k at the protocol's size."""
        return _crop_and_resize(self.clips(k), self.protocol.size)

    def real_clip(self, k: int) -> np.ndarray:
        """Return real clip k at the protocol's size."""
        return _crop_and_resize(self.protocol.real(k), self.protocol.size)

    def features(self, extractor: Extractor, *, real: bool = False) -> np.ndarray:
        """Return the features `(N, G, D)` of the generated or of all real clips."""
        load, num = (
            (self.real_clip, self.protocol.num_real) if real else (self.clip, len(self.protocol.prompts))
        )

        def extract(numbers: range) -> np.ndarray:
            batches = [numbers[start : start + 8] for start in range(0, len(numbers), 8)]
            return np.concatenate([extractor(np.stack([load(k) for k in batch])) for batch in batches])

        return self.cached_rows(f"{extractor.name}-{extractor.sha256[:12]}", extract, num, real=real)

    def cached_rows(
        self, name: str, compute: Callable[[range], np.ndarray], num: int, *, real: bool = False
    ) -> np.ndarray:
        """Compute a row of each clip once, `CLIPS_A_PART` clips at a time, and read it from disk afterwards.

        Args:
            name: of the file that holds the rows.
            compute: returns the rows of a range of clips.
            num: number of clips.
            real: whether the rows belong to the real clips, which all systems share.

        Returns:
            `(num, ...)`.
        """
        path = (self.out / "real" if real else self.folder) / f"{name}.npy"
        if not path.exists():
            (parts := path.with_suffix(".parts")).mkdir(parents=True, exist_ok=True)
            starts = range(0, num, CLIPS_A_PART)
            files = {
                range(start, min(start + CLIPS_A_PART, num)): parts / f"{start:06}.npy" for start in starts
            }
            for numbers, file in files.items():
                if not file.exists():
                    write_array(file, compute(numbers))
            _concatenate(files, path, num)
            shutil.rmtree(parts)
        rows = open_array(path)
        if len(rows) != num:
            raise ValueError(
                f"{path}: has {len(rows)} rows, expected {num}: delete it to have it computed again"
            )
        return rows

    def record(
        self,
        measure: str,
        estimate: Estimate,
        extractor: Extractor | Clip | None = None,
        *,
        real: bool = False,
    ) -> Record:
        """Return the record of an estimate; `real` says that real clips were compared with."""
        metadata = self.protocol.metadata
        return Record(
            measure=measure,
            **asdict(estimate),
            system=self.system.name,
            protocol=self.protocol.name,
            complete=bool(metadata["complete"]),
            clips=len(self.protocol.prompts),
            seeds=str(metadata["seeds"]),
            num_frames=self.protocol.num_frames,
            fps=self.system.fps,
            native_size=self.native_size,
            measured_at=list(self.protocol.size),
            extractor=extractor.record() if extractor else None,
            reference={**self.protocol.reference, "fps": self.protocol.fps} if real else None,
        )

    def mean_record(
        self,
        measure: str,
        values: np.ndarray,
        average: Callable[[Any, np.ndarray], float] = statistics.mean,
        *,
        extractor: Extractor | Clip | None = None,
        real: bool = False,
    ) -> Record:
        """Return the record of an average over the generated clips; keep their values for paired
        differences."""
        self.values[measure] = values
        estimate = statistics.estimate(values, average, cluster_ids=self.cluster_ids)
        return replace(self.record(measure, estimate, extractor, real=real), average=average.__name__)


def _concatenate(files: dict[range, Path], path: Path, num: int) -> None:
    """Join parts into one file, one part at a time: all rows together may be larger than memory."""
    first = open_array(next(iter(files.values())))
    row_shape = first.shape[1:]
    parts = (open_array(file, first.dtype, (len(numbers), *row_shape)) for numbers, file in files.items())
    write_array_blocks(path, parts, first.dtype, (num, *row_shape))


def central_square(clip: np.ndarray) -> np.ndarray:
    """Crop a clip `(F, H, W, 3)` to its largest central square."""
    side = min(clip.shape[1:3])
    top, left = ((length - side) // 2 for length in clip.shape[1:3])
    return clip[:, top : top + side, left : left + side]


def _crop_and_resize(clip: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the central square of a clip at a size."""
    square = central_square(clip)
    if square.shape[1:3] == size:
        return square
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in square]
    )
