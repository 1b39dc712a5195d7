"""Evaluating a system: its clips are drawn once and kept, features are taken once and kept, and every number is a record that says what
it was taken with.

    evals/NAME/
      protocol.json, prompts.json   what is drawn, and the real clips beside it
      real/EXTRACTOR.npy            features of the real clips; while they are taken, EXTRACTOR.parts/
      SYSTEM/system.json            the system's settings
      SYSTEM/clips/000042.png       clip 42, its frames side by side (lossless)
      SYSTEM/stills/000003.png      of the first eight words one frame, by models of this package
      SYSTEM/EXTRACTOR.npy          features of its clips
      SYSTEM/results.json           the records

What stops it costs the batch at hand, or the features of some hundred clips: the same call goes on. Of several processes (torchrun)
that see one folder each draws its share, and the first measures.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latent_shift import distances, extractors, metrics, probing, video, zoo
from latent_shift.distances import Estimate, Unmeasurable
from latent_shift.extractors import Clip, Extractor
from latent_shift.generation import ClipGeneration
from latent_shift.pipeline import LatentShiftPipeline
from latent_shift.protocols import Protocol, same
from latent_shift.store import write
from latent_shift.systems import System

Progress = Callable[[int, int], None]
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


def evaluate(
    system: System, protocol: Protocol, out: Path, *, weights: Weights | None = None, noise: tuple[float, float] | None = None,
    batch_size: int = 5, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Draw what is missing of a protocol's clips and measure them all.

    Args:
        system: what draws.
        protocol: what is drawn.
        out: the folder of the evaluation; each system has a folder in it.
        weights: networks to measure with; what needs others is skipped, and told so.
        noise: shared noise and its correlation through which models of ours are shown real clips; None: that with which they draw.
        batch_size: clips drawn at once.
        progress: called with (clips drawn, clips that were missing), of this process.

    Returns:
        The system, the protocol, `records`, one a measure, and `skipped`, measure -> why.

    Raises:
        ValueError: the folder was begun with another protocol or other settings, the clips are not of the protocol's length or rate, or
            the system's name is that of the real clips' folder.
    """
    if _safe(system.name) == "real":
        raise ValueError("a system cannot be called real: expected another name for it")
    if protocol.matched and system.fps != protocol.fps:
        raise ValueError(f"{system.name} makes {system.fps:g} frames a second, the real clips have {protocol.fps:g}")
    weights, folder = weights or Weights(), out / _safe(system.name)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    settings = {"system": system.name, "title": system.title, "parameters": system.parameters, "fps": system.fps, **system.settings}
    for told, path in ((protocol.told, out / "protocol.json"), (settings, folder / "system.json")):
        same(told, path)
        if rank == 0:
            write(path, json.dumps(told, indent=1))
    if rank == 0:
        write(out / "prompts.json", json.dumps(protocol.prompts, ensure_ascii=False))
        with torch.compiler.set_stance("force_eager"):  # other graphs than the clips', each asked for a few times
            draw_stills(system, protocol, folder / "stills")
    draw(system, protocol, folder, rank=rank, world=world, batch_size=batch_size, progress=progress)
    if rank:
        return {}
    while not all((folder / "clips" / f"{k:06}.png").exists() for k in range(len(protocol.prompts))):
        time.sleep(1)  # the others draw; one that fails takes this process with it (torchrun)
    clips = Drawn(folder / "clips", len(protocol.prompts), protocol.num_frames)
    with torch.compiler.set_stance("force_eager"):
        found = Measuring(system, protocol, clips, out, folder, weights, noise).all()
    result = {"system": settings, "protocol": protocol.told, **found}
    write(folder / "results.json", json.dumps(result, indent=1))
    return result


def draw(
    system: System,
    protocol: Protocol,
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 5,
    progress: Progress | None = None,
) -> None:
    """Draw the clips that are not there, of several processes every `world`-th."""
    numbers = [k for k in range(rank, len(protocol.prompts), world) if not (folder / "clips" / f"{k:06}.png").exists()]
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        made = system.generate([protocol.prompts[k] for k in batch], batch)
        if made.shape[1] != protocol.num_frames:
            raise ValueError(
                f"{system.name} makes clips of {made.shape[1]} frames, protocol {protocol.name} is of {protocol.num_frames} frames"
            )
        for k, clip in zip(batch, made, strict=True):
            partial = folder / "clips" / f".{k:06}.png"
            video.write(clip, partial)
            os.replace(partial, folder / "clips" / f"{k:06}.png")
        if progress:
            progress(start + len(batch), len(numbers))


def draw_stills(system: System, protocol: Protocol, folder: Path, *, num: int = 8) -> None:
    """One frame for each of the first words: what is left of the image model. Of models of this package alone, with the clip's seed."""
    if not isinstance(system.pipe, ClipGeneration):
        return
    options = {key: value for key, value in system.settings.items() if key in ("num_inference_steps", "guidance_scale", "height", "width")}
    for k, prompt in enumerate(protocol.prompts[:num]):
        if not (path := folder / f"{k:06}.png").exists():
            made = system.pipe(prompt, num_frames=1, generator=zoo.seed(k), return_dict=False, **options)[0][0]
            video.write(zoo.to_uint8(made), path)


class Drawn:
    """The kept clips of a system: `drawn[k]` is `(F, H, W, 3) uint8`."""

    def __init__(self, folder: Path, num: int, num_frames: int):
        self.folder, self.num, self.num_frames = folder, num, num_frames

    def __len__(self) -> int:
        return self.num

    def __call__(self, k: int) -> np.ndarray:
        strip = np.asarray(Image.open(self.folder / f"{k:06}.png"))
        return np.stack(np.split(strip, self.num_frames, axis=1))


class Measuring:
    """One system's clips beside the real ones. Each measure is a method or a row of a table below, and gives its records."""

    def __init__(
        self, system: System, protocol: Protocol, clips: Drawn, out: Path, folder: Path, weights: Weights, noise: tuple[float, float] | None
    ):
        self.system, self.protocol, self.clips, self.out, self.folder = system, protocol, clips, out, folder
        self.weights, self.noise = weights, noise
        self.made_at = list(clips(0).shape[1:3])

    def all(self) -> dict[str, Any]:
        records, skipped = [], {}
        for measure in self.protocol.measures:
            try:
                records += self.measure(measure)
            except Unmeasurable as error:  # weights not at hand, too few samples, clips that it does not take
                skipped[measure] = str(error)
        return {"records": records, "skipped": skipped}

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
        for clip, num in ((self.clip, len(self.clips)), (self.real, self.num_real)):
            rows = [{name: measure(frames) for name, measure in measures.items()} for frames in map(clip, range(num))]
            found.append({name: np.array([row[name] for row in rows]) for name in measures})
        return found

    def retrieval(self) -> list[dict[str, Any]]:
        """How often the nearest real clip, by the mean features of its frames, is that of the clip's own caption."""
        extractor = self._weights("efficientnet")
        made, real = (
            self.features(extractor, real=each).reshape(len(self.clips), self.protocol.num_frames, -1).mean(axis=1)
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
        num = min(200, 20 * len(self.clips))
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
        return min(self.protocol.num_real, len(self.clips))

    def features(self, extractor: Extractor, *, real: bool = False) -> np.ndarray:
        size = self.protocol.size
        path = (self.out / "real" if real else self.folder) / f"{extractor.name}-{extractor.sha256[:12]}-{size[0]}x{size[1]}.npy"
        if not path.exists():
            clip, num = (self.real, self.protocol.num_real) if real else (self.clip, len(self.clips))
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
            "complete": self.protocol.told["complete"], "clips": len(self.clips), "seeds": self.protocol.told["seeds"],
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


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "system"


def table_of(results: list[dict[str, Any]]) -> tuple[list[str], list[str], list[list[dict[str, Any] | None]]]:
    """What a table of results holds: systems and "real clips", measures, and for each measure the records.

    Raises:
        ValueError: results that cannot stand beside each other: of different protocols, clips, sizes, extractors or noise.
    """
    for result in results[1:]:
        for key in ("protocol", "clips", "num_frames", "prompts_sha256", "reference", "size"):
            if result["protocol"][key] != results[0]["protocol"][key]:
                raise ValueError(f"results of different {key} cannot stand in one table: {result['system']['system']}")
    values = [{record["measure"]: record for record in result["records"]} for result in results]
    names = list(dict.fromkeys(name for each in values for name in each))
    for name in names:
        for key, told in (("extractor", "with different weights"), ("noise", "through different noise")):
            taken = {json.dumps(each[name].get(key)) for each in values if name in each}
            if len(taken) > 1:
                raise ValueError(f"{name} was taken {told}: {', '.join(sorted(taken))}")
    shown = [name for name in names if not name.endswith("_real")]
    cells = [
        [*(each.get(name) for each in values), next((each[name + "_real"] for each in values if name + "_real" in each), None)]
        for name in shown
    ]
    return [*(result["system"]["system"] for result in results), "real clips"], shown, cells


def table(results: list[dict[str, Any]]) -> str:
    """`table_of` as Markdown, under a line that says what the numbers are of."""
    head, names, cells = table_of(results)
    rows = [["measure", *head], ["---"] * (len(head) + 1), *([name, *map(_shown, row)] for name, row in zip(names, cells, strict=True))]
    told = results[0]["protocol"]
    part = "" if told["complete"] else ", a part of the protocol"
    line = f"protocol {told['protocol']}: {told['clips']} clips of {told['num_frames']} frames{part}; in brackets 95 % by bootstrap"
    return line + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _shown(record: dict[str, Any] | None) -> str:
    return "" if record is None else f"{record['value']:.4g} ({record['low']:.4g} to {record['high']:.4g})"
