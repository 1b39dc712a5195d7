"""Evaluating a system: its clips are drawn once and kept, so is what is found of them (measuring.py), and results stand in tables.

    evals/NAME/
      protocol.json, prompts.json   what is drawn, and the real clips beside it
      real/clips/000007.png         of the first eight words the real clip, where each has one of its own
      real/NAME.npy                 what is found of each real clip: features, numbers; while it is taken, NAME.parts/
      SYSTEM/system.json            the system's settings
      SYSTEM/clips/000042.png       clip 42, its frames side by side (lossless)
      SYSTEM/stills/000003.png      of the first eight words one frame, by models of this package
      SYSTEM/NAME.npy               what is found of each of its clips
      SYSTEM/values.npz             of each of its clips, by measures that are an average of them; and which clips are one sample
      SYSTEM/results.json           the records

What stops it costs the batch at hand, or what is being found of 256 clips: the same call goes on. Of several processes (torchrun)
that see one folder each draws its share, and the first measures.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latent_shift import runtime, video
from latent_shift.evaluation import statistics
from latent_shift.evaluation.measures import Measuring, Weights
from latent_shift.evaluation.protocols import Protocol, same
from latent_shift.evaluation.systems import System
from latent_shift.files import write_text
from latent_shift.pipelines.clip_pipeline import ClipPipeline
from latent_shift.runtime import seed
from latent_shift.video import to_uint8

Progress = Callable[[int, int], None]


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
            the system's name is that of the real clips' folder; or a real clip cannot be read, told before anything is drawn where
            features are taken of all of them.
    """
    if folder_name(system.name) == "real":
        raise ValueError("a system cannot be called real: expected another name for it")
    if protocol.rate not in (None, system.fps):
        raise ValueError(f"{system.name} makes {system.fps:g} frames a second, the real clips have {protocol.fps:g}")
    weights, folder = weights or Weights(), out / folder_name(system.name)
    rank, world = runtime.rank(), runtime.world_size()
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    settings = {"system": system.name, "title": system.title, "parameters": system.parameters, "fps": system.fps, **system.settings}
    for told, path in ((protocol.told, out / "protocol.json"), (settings, folder / "system.json")):
        same(told, path)
        if rank == 0:
            write_text(path, json.dumps(told, indent=1))
    if rank == 0:
        write_text(out / "prompts.json", json.dumps(protocol.prompts, ensure_ascii=False))
        with torch.compiler.set_stance("force_eager"):  # other graphs than the clips', each asked for a few times
            draw_stills(system, protocol, folder / "stills")
    clips = Drawn(folder / "clips", protocol.num_frames)
    measuring = Measuring(system, protocol, clips, out, folder, weights, noise)
    if rank == 0:
        measuring.of_real_clips()  # before anything is drawn, for one of them may be no good
        keep_real(measuring, out / "real" / "clips")
    draw(system, protocol, folder, rank=rank, world=world, batch_size=batch_size, progress=progress)
    if rank:
        return {}
    while not all((folder / "clips" / f"{k:06}.png").exists() for k in range(len(protocol.prompts))):
        time.sleep(1)  # the others draw; one that fails takes this process with it (torchrun)
    with torch.compiler.set_stance("force_eager"):
        found = measuring.all()
    np.savez(folder / "values.npz", **measuring.values, units=measuring.units)  # type: ignore[arg-type]
    result = {"system": settings, "protocol": protocol.told, **found}
    write_text(folder / "results.json", json.dumps(result, indent=1, allow_nan=False))
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
            _keep(clip, folder / "clips" / f"{k:06}.png")
        if progress:
            progress(start + len(batch), len(numbers))


def draw_stills(system: System, protocol: Protocol, folder: Path, *, num: int = 8) -> None:
    """One frame for each of the first words: what is left of the image model. Of models of this package alone, with the clip's seed."""
    if not isinstance(system.pipe, ClipPipeline):
        return
    options = {key: value for key, value in system.settings.items() if key in ("num_inference_steps", "guidance_scale", "height", "width")}
    for k, prompt in enumerate(protocol.prompts[:num]):
        if not (path := folder / f"{k:06}.png").exists():
            made = system.pipe(prompt, num_frames=1, generator=seed(k), return_dict=False, **options)[0][0]
            _keep(to_uint8(made), path)


def keep_real(measuring: Measuring, folder: Path, *, num: int = 8) -> None:
    """The real clips of the first words, to be looked at beside those that are drawn."""
    if not measuring.protocol.matched:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for k, number in enumerate(measuring.protocol.of[:num]):
        if not (path := folder / f"{k:06}.png").exists():
            _keep(measuring.real(number), path)


def _keep(clip: np.ndarray, path: Path) -> None:
    """Whole or not at all."""
    video.write(clip, partial := path.with_name(f".{path.name}"))
    os.replace(partial, path)


class Drawn:
    """The kept clips of a system: `drawn[k]` is `(F, H, W, 3) uint8`."""

    def __init__(self, folder: Path, num_frames: int):
        self.folder, self.num_frames = folder, num_frames

    def __call__(self, k: int) -> np.ndarray:
        strip = np.asarray(Image.open(self.folder / f"{k:06}.png"))
        return np.stack(np.split(strip, self.num_frames, axis=1))


def compared(results: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The results of one evaluation, where records that are averages of clips have `more`: by how much a system's is more than the first
    one's, of the same clips, with an interval of its own. What two systems differ by is surer than either, for words, seeds and noise are
    the same."""
    first, *others = [np.load(out / folder_name(each["system"]["system"]) / "values.npz") for each in results]
    found = results[:1]
    for result, ours in zip(results[1:], others, strict=True):
        records = []
        for record in result["records"]:
            if (name := record["measure"]) in ours and name in first:
                more = statistics.difference(ours[name], first[name], getattr(statistics, record["average"]), units_N=ours["units"])
                record = {**record, "more": {"than": results[0]["system"]["system"], **asdict(more)}}
            records.append(record)
        found.append({**result, "records": records})
    return found


def folder_name(name: str) -> str:
    """That of a system, in the folder of an evaluation."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "system"
