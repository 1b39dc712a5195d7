"""What the clips of one system are measured by, beside the real ones: every number a record that says what it was taken with."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latent_shift import distances, extractors, metrics, probing
from latent_shift.distances import Estimate, Unmeasurable
from latent_shift.extractors import Clip, Extractor
from latent_shift.pipeline import LatentShiftPipeline
from latent_shift.protocols import Protocol
from latent_shift.systems import System

EXTRACTORS: dict[str, tuple[str, dict[str, bool]]] = {  # measure -> whose features it is of, and how they are asked for
    "fvd": ("i3d", {}), "kvd": ("i3d", {}), "fvd-videomae": ("videomae", {}), "kvd-videomae": ("videomae", {}),
    "fid": ("inception", {}), "kid": ("inception", {}), "is": ("c3d", {}), "is-frames": ("inception", {"probabilities": True}),
    "fd-efficientnet-lite0": ("efficientnet", {}), "kd-efficientnet-lite0": ("efficientnet", {}),
    "kd-efficientnet-lite0-motion": ("efficientnet", {"motion": True}),
}  # fmt: skip


@dataclass
class Weights:
    """Networks to measure with: kind -> path, kinds as in `extractors.WHERE`."""

    paths: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def open(self, name: str, **options: bool) -> Any:
        """The extractor of a name, or None where its weights were not given."""
        key = name + "".join(options)
        if key not in self._open:
            if name == "efficientnet":
                self._open[key] = extractors.efficientnet(**options) if extractors.has_efficientnet() else None
            else:
                path, make = self.paths.get(name), Clip if name == "clip" else getattr(extractors, name)
                self._open[key] = make(path, device=self.device, **options) if path else None
        return self._open[key]


@dataclass
class Measuring:
    """One system's clips beside the real ones. Each measure is a method or a row of a table above, and gives its records.

    Attributes:
        system, protocol: what drew, and what was drawn.
        clips: clip k as it was drawn.
        out, folder: of the evaluation and, in it, of the system: where features are kept.
        weights: networks to measure with.
        noise: as in `evaluate`.
    """

    system: System
    protocol: Protocol
    clips: Callable[[int], np.ndarray]
    out: Path
    folder: Path
    weights: Weights
    noise: tuple[float, float] | None

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
        return {"records": records, "skipped": skipped}

    def of_real_clips(self) -> None:
        """Take the features of the real clips that will be asked for."""
        for name in self.protocol.measures:
            kind, options = EXTRACTORS.get(name, ("", {}))
            if kind and not name.startswith("is") and (extractor := self.weights.open(kind, **options)):
                with contextlib.suppress(Unmeasurable):  # told where the measure is
                    self.features(extractor, real=True)

    def measure(self, name: str) -> list[dict[str, Any]]:
        if name in metrics.CLIP_MEASURES or name == "motion_error":
            return self.temporal(name)
        if name in ("retrieval", "denoising", "reconstruction"):
            return getattr(self, name)()
        if name == "clipsim":
            network = self._weights("clip")
            values = np.concatenate([network(self.clip(k)[None], [prompt]) for k, prompt in enumerate(self.protocol.prompts)])
            return [self.record(name, distances.mean_estimate(values), network)]
        extractor = self._extractor(name)
        groups = self.protocol.num_frames if extractor.of == "frame" else 1
        if name in ("is", "is-frames"):
            return [self.record(name, distances.inception_score(self.features(extractor), groups=groups), extractor)]
        estimate = distances.kernel_estimate if name.startswith(("kd", "kvd", "kid")) else distances.frechet_estimate
        made, real = self.features(extractor), self.features(extractor, real=True)
        return [self.record(name, estimate(made, real, groups=groups), extractor, real=True)]

    def temporal(self, name: str) -> list[dict[str, Any]]:
        """A measure that needs no weights, of the drawn clips and of the real ones."""
        if name == "warping_error" and not find_spec("cv2"):
            raise Unmeasurable("needs optical flow: pip install 'latent-shift-video[eval]'")
        made, real = (each["motion_energy" if name == "motion_error" else name] for each in self._of_each_clip)
        if name == "motion_error":  # as a factor: exp of the mean |log ratio| to the real clip of the same caption
            ratios = np.abs(np.log((made + 0.1) / (real + 0.1)))
            return [self.record(name, distances.mean_estimate(ratios, average=lambda x, axis: np.exp(np.mean(x, axis=axis))), real=True)]
        theirs = {"clips": len(real), "seeds": None, "fps": self.protocol.fps, "made_at": None}
        of_real = self.record(name + "_real", distances.mean_estimate(real), real=True) | theirs
        return [self.record(name, distances.mean_estimate(made)), of_real]

    @functools.cached_property
    def _of_each_clip(self) -> list[dict[str, np.ndarray]]:
        """The measures that need no weights, of every drawn clip and of every real one, each of which is read once."""
        measures = {name: measure for name, measure in metrics.CLIP_MEASURES.items() if name != "warping_error" or find_spec("cv2")}
        found = []
        for clip, num in ((self.clip, len(self.protocol.prompts)), (self.real, self.num_real)):
            rows = [{name: measure(frames) for name, measure in measures.items()} for frames in map(clip, range(num))]
            found.append({name: np.array([row[name] for row in rows]) for name in measures})
        return found

    def retrieval(self) -> list[dict[str, Any]]:
        """How often the nearest real clip, by the mean features of its frames, is that of the clip's own caption."""
        extractor = self._weights("efficientnet")
        made, real = (
            self.features(extractor, real=each).reshape(len(self.protocol.prompts), self.protocol.num_frames, -1).mean(axis=1)
            for each in (False, True)
        )
        ranks = metrics.retrieval_ranks(*(each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in (made, real)))
        return [
            self.record("retrieval_top1", distances.mean_estimate(ranks == 1), extractor, real=True),
            self.record("retrieval_top5", distances.mean_estimate(ranks <= 5), extractor, real=True),
            self.record("retrieval_median_rank", distances.mean_estimate(ranks, average=np.median), extractor, real=True),
        ]

    def denoising(self) -> list[dict[str, Any]]:
        """What a model of ours sees of the real clips through its noise (probing.py)."""
        pipe, protocol = self._ours(), self.protocol
        told = self.noise or (pipe.call_defaults["shared_noise"], pipe.call_defaults["noise_correlation"])
        found = [probing.denoising(pipe, self.real(k), prompt, noise=told, number=k) for k, prompt in enumerate(protocol.prompts)]
        errors = np.array([errors for errors, _ in found])
        with_noise = lambda name, estimate: self.record(name, estimate, real=True) | {"noise": list(told)}  # noqa: E731
        records = [
            with_noise("denoising_error", distances.mean_estimate(errors.mean(axis=1))),
            with_noise("denoising_error_of_end_frames", distances.mean_estimate(errors[:, [0, -1]].mean(axis=1))),
        ]
        share = lambda x, axis: 1 - x.sum(axis)[..., 0] / np.maximum(x.sum(axis)[..., 1], 1e-12)  # noqa: E731
        for timestep in found[0][1]:
            motions = [seen[timestep] for _, seen in found]
            together, alone = (np.array([(each[which], each.there) for each in motions]) for which in (0, 1))
            records += [
                with_noise(f"motion_seen_at_{timestep}", distances.mean_estimate(together, average=share)),
                with_noise(f"motion_seen_at_{timestep}_frame_by_frame", distances.mean_estimate(alone, average=share)),
            ]
        return records

    def reconstruction(self) -> list[dict[str, Any]]:
        """PSNR of 200 frames through the autoencoder, held out where there are such; of few clips of fewer."""
        store = self.protocol.store
        assert store is not None
        splits = tuple(sorted(store.splits - {"train"})) or ("train",)
        num = min(200, 20 * len(self.protocol.prompts))
        values = probing.reconstruction(self._ours().vae, store, splits=splits, num=num)
        return [self.record("reconstruction_psnr_db", distances.mean_estimate(values), real=True) | {"frames": num, "splits": list(splits)}]

    def _ours(self) -> LatentShiftPipeline:
        pipe = self.system.pipe
        if type(pipe) is not LatentShiftPipeline or pipe.unet.config.sample_size * pipe.vae_scale_factor != self.protocol.size[0]:
            raise Unmeasurable("is asked of models of this package at the protocol's size alone")
        return pipe

    def clip(self, k: int) -> np.ndarray:
        """Clip k at the protocol's size."""
        return _sized(self.clips(k), self.protocol.size)

    def real(self, k: int) -> np.ndarray:
        """Real clip k, likewise."""
        return _sized(self.protocol.real(k), self.protocol.size)

    @property
    def num_real(self) -> int:
        """As many real clips as drawn ones where each is measured by itself."""
        return min(self.protocol.num_real, len(self.protocol.prompts))

    def features(self, extractor: Extractor, *, real: bool = False) -> np.ndarray:
        size = self.protocol.size
        path = (self.out / "real" if real else self.folder) / f"{extractor.name}-{extractor.sha256[:12]}-{size[0]}x{size[1]}.npy"
        if not path.exists():
            clip, num = (self.real, self.protocol.num_real) if real else (self.clip, len(self.protocol.prompts))
            (parts := path.with_suffix(".parts")).mkdir(parents=True, exist_ok=True)
            for start in range(0, num, 256):
                if not (part := parts / f"{start:06}.npy").exists():
                    numbers = range(start, min(start + 256, num))
                    _save(
                        part,
                        np.concatenate([extractor(np.stack([clip(k) for k in numbers[n : n + 8]])) for n in range(0, len(numbers), 8)]),
                    )
            _save(path, np.concatenate([np.load(part) for part in sorted(parts.glob("[0-9]*.npy"))]))
            shutil.rmtree(parts)
        return np.load(path, mmap_mode="r")

    def record(self, measure: str, estimate: Estimate, extractor: Extractor | Clip | None = None, *, real: bool = False) -> dict[str, Any]:
        return {
            "measure": measure, **asdict(estimate), "system": self.system.name, "protocol": self.protocol.name,
            "complete": self.protocol.told["complete"], "clips": len(self.protocol.prompts), "seeds": self.protocol.told["seeds"],
            "num_frames": self.protocol.num_frames, "fps": self.system.fps, "made_at": self.made_at,
            "measured_at": list(self.protocol.size), "extractor": extractor.record() if extractor else None,
            "reference": {**self.protocol.reference, "fps": self.protocol.fps} if real else None,
        }  # fmt: skip

    def _extractor(self, name: str) -> Extractor:
        kind, options = EXTRACTORS[name]
        return self._weights(kind, **options)

    def _weights(self, kind: str, **options: bool) -> Any:
        network = self.weights.open(kind, **options)
        if network is None:
            raise Unmeasurable(extractors.missing(kind))
        return network


def _sized(clip: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The central square of a clip at a size."""
    side = min(clip.shape[1:3])
    top, left = ((length - side) // 2 for length in clip.shape[1:3])
    square = clip[:, top : top + side, left : left + side]
    if square.shape[1:3] == size:
        return square
    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in square])


def _save(path: Path, array: np.ndarray) -> None:
    """Whole or not at all."""
    with (partial := path.with_name(f".{path.name}")).open("wb") as file:
        np.save(file, array)
    os.replace(partial, path)
