"""What the clips of one system are measured by, beside the real ones: every number a record that says what it was taken with.

What is found of a clip is a row that is kept, be it features or numbers; a record is an estimate from the rows of all.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latent_shift.evaluation import clip_metrics, denoising, features, statistics
from latent_shift.evaluation.features import Clip, Extractor
from latent_shift.evaluation.protocols import Protocol
from latent_shift.evaluation.statistics import Estimate, Unmeasurable, frechet_estimate, inception_score, kernel_estimate
from latent_shift.evaluation.systems import System
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline

OF_FEATURES: dict[str, tuple[str, dict[str, bool], Callable[..., Estimate]]] = {  # measure -> whose features, how asked for, what of them
    "fvd": ("i3d", {}, frechet_estimate), "kvd": ("i3d", {}, kernel_estimate),
    "fvd-videomae": ("videomae", {}, frechet_estimate), "kvd-videomae": ("videomae", {}, kernel_estimate),
    "fid": ("inception", {}, frechet_estimate), "kid": ("inception", {}, kernel_estimate),
    "is": ("c3d", {}, inception_score), "is-frames": ("inception", {"probabilities": True}, inception_score),
    "fd-efficientnet-lite0": ("efficientnet", {}, frechet_estimate), "kd-efficientnet-lite0": ("efficientnet", {}, kernel_estimate),
    "kd-efficientnet-lite0-motion": ("efficientnet", {"motion": True}, kernel_estimate),
}  # fmt: skip


@dataclass
class Weights:
    """Networks to measure with: kind -> path, kinds as in `extractors.WHERE`."""

    paths: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def told(cls, given: Sequence[str], *, device: str = "cpu") -> Weights:
        """Of KIND=PATH each; raises ValueError for what is none."""
        paths: dict[str, str] = dict(each.partition("=")[::2] for each in given)
        if wrong := [each for each in given if not each.partition("=")[2] or each.partition("=")[0] not in features.GIVEN]:
            raise ValueError(f"--weights {', '.join(wrong)}: expected {', '.join(f'{kind}=PATH' for kind in features.GIVEN)}")
        return cls(paths, device)

    def open(self, kind: str, **options: bool) -> Any:
        """The extractor of a kind, or None where its weights were not given."""
        key = kind + "".join(options)
        if key not in self._open:
            if kind == "efficientnet":
                given = features.has_efficientnet()
                self._open[key] = features.efficientnet(device=self.device, **options) if given else None
            else:
                path, make = self.paths.get(kind), Clip if kind == "clip" else getattr(features, kind)
                self._open[key] = make(path, device=self.device, **options) if path else None
        return self._open[key]

    def of_distances(self) -> list[Extractor]:
        """All extractors at hand whose features have distances."""
        asked = [(kind, options) for kind, options, estimate in OF_FEATURES.values() if estimate is kernel_estimate]
        return [extractor for kind, options in asked if (extractor := self.open(kind, **options))]

    def check(self, measures: Sequence[str]) -> None:
        """Open all that were given, in every way in which they are asked: what is wrong is told before the work, not after. Raises
        ValueError for one that none of `measures` asks for, too."""
        asked = {"clip" if name == "clipsim" else OF_FEATURES[name][0] for name in measures if name == "clipsim" or name in OF_FEATURES}
        if idle := sorted(self.paths.keys() - asked):
            expected = ", ".join(each for each in features.GIVEN if each in asked) or "none"
            raise ValueError(f"--weights {', '.join(idle)}: nothing here is measured by it; expected {expected}")
        for kind, options, _ in OF_FEATURES.values():
            if kind in self.paths:
                self.open(kind, **options)
        if "clip" in self.paths:
            self.open("clip")


@dataclass
class Measuring:
    """One system's clips beside the real ones. Each measure is a row of a table or a method, and gives its records.

    Attributes:
        system, protocol: what drew, and what was drawn.
        clips: clip k as it was drawn.
        out, folder: of the evaluation and, in it, of the system: where the rows are kept.
        weights: networks to measure with.
        noise: as in `evaluate`.
        values: of each drawn clip, by the measures that are an average of them: what two systems are told apart by.
    """

    system: System
    protocol: Protocol
    clips: Callable[[int], np.ndarray]
    out: Path
    folder: Path
    weights: Weights
    noise: tuple[float, float] | None
    values: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def made_at(self) -> list[int]:
        return list(self.clips(0).shape[1:3])

    def all(self) -> dict[str, Any]:
        records, skipped = [], {}
        for measure in self.protocol.measures:
            try:
                records += self.measure(measure)
            except Unmeasurable as error:  # weights not at hand, too few samples, clips that it does not take
                skipped[measure] = str(error)
        return {"made_at": self.made_at, "records": records, "skipped": skipped}

    def of_real_clips(self) -> None:
        """Take the features of the real clips that will be asked for."""
        for name in self.protocol.measures:
            kind, options, estimate = OF_FEATURES.get(name, ("", {}, None))
            if kind and estimate is not inception_score and (extractor := self.weights.open(kind, **options)):
                with contextlib.suppress(Unmeasurable):  # told where the measure is
                    self.features(extractor, real=True)

    def measure(self, name: str) -> list[dict[str, Any]]:
        if name in clip_metrics.CLIP_MEASURES:
            return self.of_each_clip(name)
        if name not in OF_FEATURES:
            return getattr(self, name)()
        kind, options, estimate = OF_FEATURES[name]
        extractor = self._weights(kind, **options)
        made, units = self.features(extractor), {"units_N": self.units}
        if estimate is inception_score:
            return [self.record(name, estimate(made, **units), extractor)]
        if estimate is kernel_estimate and self.protocol.matched:
            units["units_M"] = np.arange(self.protocol.num_real)
        return [self.record(name, estimate(made, self.features(extractor, real=True), **units), extractor, real=True)]

    def of_each_clip(self, name: str) -> list[dict[str, Any]]:
        """A measure that needs no weights, of the drawn clips and of the real ones: what moves a frame, so of frames that last as long."""
        if self.system.fps != self.protocol.fps:
            raise Unmeasurable(f"the real clips have {self.protocol.fps:g} frames a second, these {self.system.fps:g}")
        made, real = self.temporal(name), self.temporal(name, real=True)
        theirs = {"clips": len(real), "seeds": None, "fps": self.protocol.fps, "made_at": None}
        of_real = self.record(name + "_real", statistics.estimate(real), real=True) | theirs
        return [self.estimated(name, made), of_real]

    def motion_error(self) -> list[dict[str, Any]]:
        """How far the motion energy is from that of the real clip of the same caption, as a factor."""
        made, real = self.temporal("motion_energy"), self.temporal("motion_energy", real=True)
        return [self.estimated("motion_error", (made + 0.1) / (real[self.units] + 0.1), statistics.factor, real=True)]

    def retrieval(self) -> list[dict[str, Any]]:
        """How often the nearest real clip, by the mean features of its frames, is that of the clip's own caption."""
        extractor = self._weights("efficientnet")
        made, real = (self.features(extractor, real=each).mean(axis=1) for each in (False, True))
        ranks = clip_metrics.retrieval_ranks(
            *(each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in (made, real))
        )
        found = [
            self.estimated("retrieval_top1", ranks == 1, extractor=extractor, real=True),
            self.estimated("retrieval_median_rank", ranks, statistics.median, extractor=extractor, real=True),
        ]
        if self.protocol.num_real > 5:  # else all are
            found.insert(1, self.estimated("retrieval_top5", ranks <= 5, extractor=extractor, real=True))
        return found

    def clipsim(self) -> list[dict[str, Any]]:
        """The similarity of frames and words (extractors.py)."""
        network, prompts = self._weights("clip"), self.protocol.prompts
        take = lambda numbers: np.concatenate([network(self.clip(k)[None], [prompts[k]]) for k in numbers])  # noqa: E731
        return [self.estimated("clipsim", self.kept(f"clipsim-{network.sha256[:12]}", take, len(prompts)), extractor=network)]

    def denoising(self) -> list[dict[str, Any]]:
        """What a model of ours sees of the real clips through its noise (probing.py)."""
        pipe, protocol = self._ours(), self.protocol
        told = self.noise or (pipe.call_defaults["shared_noise"], pipe.call_defaults["noise_correlation"])

        def take(numbers: range) -> np.ndarray:
            seen = [denoising.denoising(pipe, self.real(self.units[k]), protocol.prompts[k], noise=told, number=k) for k in numbers]
            return np.stack([np.concatenate([errors, np.ravel(list(motions.values()))]) for errors, motions in seen])

        rows = self.kept(f"denoising-{told[0]:g}-{told[1]:g}", take, len(protocol.prompts))
        errors, motions = rows[:, : protocol.num_frames], rows[:, protocol.num_frames :].reshape(len(rows), -1, 3)
        records = [
            self.estimated("denoising_error", errors.mean(axis=1), real=True),
            self.estimated("denoising_error_of_end_frames", errors[:, [0, -1]].mean(axis=1), real=True),
        ]
        for level, timestep in enumerate(denoising.timesteps(pipe)):
            for name, missed in (("", 0), ("_frame_by_frame", 1)):
                missed_and_there = motions[:, level][:, [missed, 2]]
                records.append(self.estimated(f"motion_seen_at_{timestep}{name}", missed_and_there, statistics.found, real=True))
        return [record | {"noise": list(told)} for record in records]

    def reconstruction(self) -> list[dict[str, Any]]:
        """PSNR through the autoencoder of a held-out frame of each concept that has one, of 200 at most; where nothing is held out, of any."""
        store, vae = self.protocol.store, self._ours().vae
        assert store is not None
        splits = tuple(sorted(store.splits - {"train"})) or ("train",)
        take = lambda numbers: denoising.reconstruction(vae, store, splits=splits, num=len(numbers))  # noqa: E731
        concepts = np.unique(store.index[store.select(splits=splits)]["concept"])
        values = self.kept("reconstruction", take, num := min(200, len(concepts)))
        if np.isinf(values).any():
            raise Unmeasurable("its autoencoder keeps frames as they are")
        record = self.record("reconstruction_psnr_db", statistics.estimate(values), real=True)
        return [record | {"clips": num, "seeds": None, "reference": {**record["reference"], "splits": list(splits), "clips": num}}]

    def _ours(self) -> LatentShiftPipeline:
        pipe = self.system.pipe
        if type(pipe) is not LatentShiftPipeline or pipe.unet.config.sample_size * pipe.vae_scale_factor != self.protocol.size[0]:
            raise Unmeasurable("is asked of models of this package at the protocol's size alone")
        return pipe

    @functools.cached_property
    def units(self) -> np.ndarray:
        return np.array(self.protocol.of)

    def clip(self, k: int) -> np.ndarray:
        """Clip k at the protocol's size."""
        return _sized(self.clips(k), self.protocol.size)

    def real(self, k: int) -> np.ndarray:
        """Real clip k, likewise."""
        return _sized(self.protocol.real(k), self.protocol.size)

    def features(self, extractor: Extractor, *, real: bool = False) -> np.ndarray:
        """`(N, G, D)` of the drawn or of all real clips."""
        clip, num = (self.real, self.protocol.num_real) if real else (self.clip, len(self.protocol.prompts))
        some = lambda numbers: extractor(np.stack([clip(k) for k in numbers]))  # noqa: E731
        take = lambda numbers: np.concatenate([some(numbers[n : n + 8]) for n in range(0, len(numbers), 8)])  # noqa: E731
        return self.kept(f"{extractor.name}-{extractor.sha256[:12]}", take, num, real=real)

    def temporal(self, name: str, *, real: bool = False) -> np.ndarray:
        """`(N,)`: a measure that needs no weights, of the drawn clips or of as many real ones. All are taken at once: each clip is read
        once."""
        able = {each: _able(each, self.protocol.num_frames) for each in clip_metrics.CLIP_MEASURES}
        if able[name]:
            raise Unmeasurable(able[name])
        names = [each for each in able if not able[each]]
        clip, num = (self.real if real else self.clip), len(self.protocol.prompts)
        take = lambda numbers: np.array([[clip_metrics.CLIP_MEASURES[each](frames) for each in names] for frames in map(clip, numbers)])  # noqa: E731
        rows = self.kept(f"temporal-{len(names)}", take, min(num, self.protocol.num_real) if real else num, real=real)
        return rows[:, names.index(name)]

    def kept(self, name: str, take: Callable[[range], np.ndarray], num: int, *, real: bool = False) -> np.ndarray:
        """`(num, ...)`: what `take` finds of clips, a row each. It is taken once and kept, 256 clips at a time."""
        path = (self.out / "real" if real else self.folder) / f"{name}.npy"
        if not path.exists():
            (parts := path.with_suffix(".parts")).mkdir(parents=True, exist_ok=True)
            files = {range(start, min(start + 256, num)): parts / f"{start:06}.npy" for start in range(0, num, 256)}
            for numbers, file in files.items():
                if not file.exists():
                    with (partial := file.with_name(f".{file.name}")).open("wb") as opened:
                        np.save(opened, take(numbers))
                    os.replace(partial, file)
            first = np.load(next(iter(files.values())), mmap_mode="r")
            whole = np.lib.format.open_memmap(parts / "whole", mode="w+", dtype=first.dtype, shape=(num, *first.shape[1:]))
            for numbers, file in files.items():
                whole[numbers.start : numbers.stop] = np.load(file)
            whole.flush()
            os.replace(parts / "whole", path)
            shutil.rmtree(parts)
        return np.load(path, mmap_mode="r")

    def estimated(
        self, measure: str, values: np.ndarray, average: Callable[..., float] = statistics.mean, *, extractor: Extractor | Clip | None = None,
        real: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """The record of an average over the drawn clips."""
        self.values[measure] = values
        found = self.record(measure, statistics.estimate(values, average, units_N=self.units), extractor, real=real)
        return found | {"average": average.__name__}

    def record(self, measure: str, estimate: Estimate, extractor: Extractor | Clip | None = None, *, real: bool = False) -> dict[str, Any]:
        return {
            "measure": measure, **asdict(estimate), "system": self.system.name, "protocol": self.protocol.name,
            "complete": self.protocol.told["complete"], "clips": len(self.protocol.prompts), "seeds": self.protocol.told["seeds"],
            "num_frames": self.protocol.num_frames, "fps": self.system.fps, "made_at": self.made_at,
            "measured_at": list(self.protocol.size), "extractor": extractor.record() if extractor else None,
            "reference": {**self.protocol.reference, "fps": self.protocol.fps} if real else None,
        }  # fmt: skip

    def _weights(self, kind: str, **options: bool) -> Any:
        network = self.weights.open(kind, **options)
        if network is None:
            raise Unmeasurable(features.missing(kind))
        return network


def _sized(clip: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The central square of a clip at a size."""
    side = min(clip.shape[1:3])
    top, left = ((length - side) // 2 for length in clip.shape[1:3])
    square = clip[:, top : top + side, left : left + side]
    if square.shape[1:3] == size:
        return square
    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in square])


def _able(name: str, num_frames: int) -> str:
    """Why a measure that needs no weights cannot be taken of clips of so many frames; "" where it can."""
    if num_frames < (least := clip_metrics.LEAST_FRAMES.get(name, 2)):
        return f"is of clips of {least} frames or more, these have {num_frames}"
    return "" if name != "warping_error" or find_spec("cv2") else "needs optical flow: pip install 'latent-shift-video[eval]'"
