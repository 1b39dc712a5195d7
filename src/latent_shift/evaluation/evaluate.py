"""Evaluating a system: generate and save its clips, cache features and values of each clip, write the
records.

    evals/NAME/
      protocol.json, prompts.json   the protocol and its prompts
      real/clips/000007.png         the real clips of the first eight prompts, where each prompt has its own
      real/NAME.npy                 features or values of each real clip; NAME.parts/ while they are computed
      SYSTEM/system.json            the system's settings
      SYSTEM/clips/000042.png       clip 42, its frames side by side (lossless)
      SYSTEM/stills/000003.png      a single frame for the first eight prompts, by models of this package
      SYSTEM/NAME.npy               features or values of each generated clip
      SYSTEM/values.npz             values of each clip for measures that are averages; `units` says which
                                    clips are one sample
      SYSTEM/results.json           the records

An interruption costs the current batch, or the rows of 256 clips; the same call resumes. Of several processes
(torchrun) that see one folder, each generates its share of the clips and the first one measures.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_shift import folders, runtime, video
from latent_shift.evaluation import statistics
from latent_shift.evaluation.comparison import Comparison
from latent_shift.evaluation.features import Weights
from latent_shift.evaluation.measures import measure_all, prepare_real_features
from latent_shift.evaluation.protocols import Protocol, check_unchanged
from latent_shift.evaluation.records import Record, read_records
from latent_shift.evaluation.systems import System
from latent_shift.files import atomic_path, read_arrays, read_json, write_text
from latent_shift.models.prompt_syntax import escape_prompt
from latent_shift.pipelines.clip_pipeline import ClipPipeline
from latent_shift.runtime import seed
from latent_shift.video import to_uint8

Progress = Callable[[int, int], None]

KIND = "an evaluation"
"""What the marker of an evaluation's folder says."""


def evaluate(
    system: System,
    protocol: Protocol,
    out: Path,
    *,
    weights: Weights | None = None,
    noise: tuple[float, float] | None = None,
    batch_size: int = 5,
    progress: Progress | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Generate the clips of a protocol that are missing and measure all of them.

    Args:
        system: the system to evaluate.
        protocol: prompts, real clips and measures.
        out: folder of the evaluation; each system has a folder in it.
        weights: networks to measure with; measures that need others are skipped.
        noise: (shared noise, noise correlation) under which models of this package are shown real clips.
            None: that of their sampling.
        batch_size: clips generated at once.
        progress: called with (clips generated, clips that were missing) of this process.
        force: write into a folder that holds something else.

    Returns:
        What results.json holds: the system, the protocol, `records`, and `skipped`, measure to reason. Empty
        where another process measures.

    Raises:
        ValueError: the folder holds something else, another protocol or other settings, or another process
            writes there; the clips have another length or
            rate than the protocol's, the system's name is "real", or a real clip cannot be read.
    """
    with _lock_folder(out, force=force):
        return _evaluate(
            system, protocol, out, weights=weights or Weights(), noise=noise, batch_size=batch_size, progress=progress
        )  # fmt: skip


def check_folder(out: Path, *, force: bool = False) -> None:
    """Raise ValueError if the folder `out` holds anything but an evaluation."""
    folders.check_own(out, KIND, force=force, is_own=_is_evaluation)


def _is_evaluation(folder: Path) -> bool:
    """Recognise an evaluation from before folders were marked."""
    try:
        return "protocol" in read_json(folder / "protocol.json")
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def _lock_folder(out: Path, *, force: bool) -> Iterator[None]:
    """Take the folder for the first process; the others wait until it has (torchrun ends them if it fails)."""
    if runtime.rank() == 0:
        with folders.output_folder(out, KIND, force=force, is_own=_is_evaluation):
            yield
        return
    while folders.read_kind(out) != KIND:
        time.sleep(0.2)
    yield


def _evaluate(
    system: System, protocol: Protocol, out: Path, *, weights: Weights, noise: tuple[float, float] | None, batch_size: int,
    progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    folder = out / folder_name(system.name)
    settings = open_folder(system, protocol, out)
    clips = SavedClips(folder / "clips", protocol.num_frames)
    comparison = Comparison(system, protocol, clips, out, folder, weights, noise)
    if runtime.rank() == 0:
        # A graph for one frame would be compiled for a few calls.
        with torch.compiler.set_stance("force_eager"):
            generate_stills(system, protocol, folder / "stills")
        prepare_reference(comparison)
    generate_clips(
        system,
        protocol,
        folder,
        rank=runtime.rank(),
        world_size=runtime.world_size(),
        batch_size=batch_size,
        progress=progress,
    )
    if runtime.rank() != 0:
        return {}
    _wait_for_clips(folder / "clips", len(protocol.prompts))
    with torch.compiler.set_stance("force_eager"):
        records, skipped = measure_all(comparison)
    with atomic_path(folder / "values.npz", suffix=".npz") as partial:
        np.savez(partial, **comparison.values, units=comparison.cluster_ids)  # type: ignore[arg-type]
    result = {
        "system": settings, "protocol": protocol.metadata, "made_at": comparison.native_size,
        "records": [record.to_json() for record in records], "skipped": skipped,
    }  # fmt: skip
    write_text(folder / "results.json", json.dumps(result, indent=1, allow_nan=False))
    return result


def open_folder(system: System, protocol: Protocol, out: Path) -> dict[str, Any]:
    """Create the folders of an evaluation and of a system, or check their protocol and settings.

    Returns:
        The system's settings, as system.json holds them.

    Raises:
        ValueError: as in `evaluate`.
    """
    folder = out / folder_name(system.name)
    if folder.name == "real":
        raise ValueError(
            "a system cannot be called real, the name of the folder of real clips; give it another name"
        )
    if protocol.required_fps not in (None, system.fps):
        raise ValueError(
            f"{system.name} generates {system.fps:g} frames a second, the real clips have {protocol.fps:g}"
        )
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    settings = {
        "system": system.name,
        "title": system.title,
        "parameters": system.parameters,
        "fps": system.fps,
        **system.settings,
    }
    for metadata, path in ((protocol.metadata, out / "protocol.json"), (settings, folder / "system.json")):
        check_unchanged(metadata, path)
        if runtime.rank() == 0:
            write_text(path, json.dumps(metadata, indent=1))
    if runtime.rank() == 0:
        write_text(out / "prompts.json", json.dumps(protocol.prompts, ensure_ascii=False))
    return settings


def prepare_reference(comparison: Comparison, *, num: int = 16) -> None:
    """Extract the features of the real clips that will be compared with, and save the real clips of the
    first `num` prompts.

    This comes before any clip is generated, because a real clip may be unreadable.
    """
    prepare_real_features(comparison)
    if not comparison.protocol.matched:
        return
    folder = comparison.out / "real" / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    for k, number in enumerate(comparison.protocol.cluster_ids[:num]):
        if not (path := folder / f"{k:06}.png").exists():
            video.write(comparison.real_clip(number), path)


def generate_clips(
    system: System,
    protocol: Protocol,
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 5,
    progress: Progress | None = None,
) -> None:
    """Generate the clips that are missing, clip k with seed k; process `rank` takes every `world_size`-th
    clip."""
    numbers = range(rank, len(protocol.prompts), world_size)
    missing = [k for k in numbers if not (folder / "clips" / f"{k:06}.png").exists()]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        clips = system.generate([protocol.prompts[k] for k in batch], batch)
        if clips.shape[1] != protocol.num_frames:
            raise ValueError(
                f"{system.name} generates clips of {clips.shape[1]} frames, protocol {protocol.name} has {protocol.num_frames}"
            )
        for k, clip in zip(batch, clips, strict=True):
            video.write(clip, folder / "clips" / f"{k:06}.png")
        if progress:
            progress(start + len(batch), len(missing))


def generate_stills(system: System, protocol: Protocol, folder: Path, *, num: int = 16) -> None:
    """Generate a single frame for each of the first `num` prompts, with models of this package: their image
    model."""
    if not isinstance(system.pipe, ClipPipeline):
        return
    options = {
        key: value
        for key, value in system.settings.items()
        if key in ("num_inference_steps", "guidance_scale", "height", "width")
    }
    for k, prompt in enumerate(protocol.prompts[:num]):
        if not (path := folder / f"{k:06}.png").exists():
            prompt = escape_prompt(prompt)
            still = system.pipe(prompt, num_frames=1, generator=seed(k), return_dict=False, **options)[0][0]
            video.write(to_uint8(still), path)


def _wait_for_clips(folder: Path, num: int) -> None:
    """Wait until all processes have generated their clips; if one of them fails, torchrun ends this process
    too."""
    while not all((folder / f"{k:06}.png").exists() for k in range(num)):
        time.sleep(1)


class SavedClips:
    """The saved clips of a system: `clips(k)` is `(F, H, W, 3) uint8`."""

    def __init__(self, folder: Path, num_frames: int):
        self.folder, self.num_frames = folder, num_frames

    def __call__(self, k: int) -> np.ndarray:
        path = self.folder / f"{k:06}.png"
        try:
            return np.stack(np.split(video.load_video(path)[0], self.num_frames, axis=1))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"{path}: expected a row of {self.num_frames} frames; {error}: delete it to have it generated again"
            ) from error


def add_paired_differences(results: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Add to records that are averages their paired differences from the first system on the same clips, as
    `more`.

    Prompts, seeds and noise are the same for all systems, so a difference has a narrower interval than
    either value.

    Args:
        results: of the systems of one evaluation.
        out: its folder.
    """
    first, *others = [
        read_arrays(out / folder_name(result["system"]["system"]) / "values.npz") for result in results
    ]
    first_name = results[0]["system"]["system"]

    def with_difference(record: Record, values: Any) -> Record:
        if record.average is None or record.measure not in values or record.measure not in first:
            return record
        average = statistics.AVERAGES[record.average]
        more = statistics.difference(
            values[record.measure], first[record.measure], average, cluster_ids=values["units"]
        )
        return replace(record, more={"than": first_name, **asdict(more)})

    output = results[:1]
    for result, values in zip(results[1:], others, strict=True):
        records = [with_difference(record, values).to_json() for record in read_records(result).values()]
        output.append({**result, "records": records})
    return output


def folder_name(name: str) -> str:
    """Return the name of a system's folder in an evaluation."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "system"
