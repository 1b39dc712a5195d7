"""The table of measures: everything that is measured of a system's clips, one row a measure.

To add a measure, add a row to `MEASURES` and, where none of the functions here fits, a function that returns
its records. Results, the report and the tables of the documentation take names, labels and directions from
the row.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from latent_shift.evaluation import clip_metrics, denoising, detection, features, statistics
from latent_shift.evaluation.adherence import prompt_adherence, recognition
from latent_shift.evaluation.comparison import Comparison
from latent_shift.evaluation.features import Extractor, Weights
from latent_shift.evaluation.records import Record
from latent_shift.evaluation.statistics import (
    Estimate,
    MeasureUnavailable,
    frechet_estimate,
    inception_score,
    kernel_estimate,
)
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline

HIGHER, LOWER, REAL = "higher", "lower", "real"
"""Directions of improvement: higher values, lower values, or values close to that of real clips."""
CAPTIONS = ("own", "emoji")
MSRVTT = ("msrvtt-mav", "msrvtt-lavie")
PUBLIC = ("ucf101", *MSRVTT)
PACKAGES = {"cv2": "OpenCV (optical flow)"}
"""Modules of optional packages, by what messages call them."""
CACHED_SCORES = ("motion_energy", "flicker", "persistence", "coherence", "warping_error", "loop_gap")
"""The scores whose cache has no hash in its name, as in evaluations by version 0.1.0."""


class Label(NamedTuple):
    """The label of a record in tables, its direction of improvement ("": none), and its definition."""

    text: str
    better: str
    definition: str


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        name: in protocols, and in results where the measure is skipped.
        compute: returns the records of the measure, from the clips and this row.
        labels: record name to label; `{timestep}` in a record's name and in its label's text stands for a
            number. Definitions hold for all timesteps.
        protocols: the protocols that take it. (): none, it is for `latent-shift bench measures` alone.
        network: kind of the network that it needs, one of `features.SOURCES`; "": none.
        options: of the network.
        package: module of the extra `eval` that it needs, one of `PACKAGES`; "": none.
        min_frames: the least frames a clip.
        score: of one clip, for measures of single clips.
        statistic: of the features of a set, or of two sets.
    """

    name: str
    compute: Callable[[Comparison, Measure], list[Record]]
    labels: dict[str, Label]
    protocols: tuple[str, ...] = CAPTIONS
    network: str = ""
    options: dict[str, bool] = field(default_factory=dict)
    package: str = ""
    min_frames: int = 1
    score: Callable[[np.ndarray], float] | None = None
    statistic: Callable[..., Estimate] | None = None

    def check(self, num_frames: int) -> None:
        """Raise MeasureUnavailable where clips have too few frames or a package is missing."""
        if num_frames < self.min_frames:
            raise MeasureUnavailable(
                f"needs clips of {self.min_frames} frames or more, these have {num_frames}"
            )
        if self.package and not find_spec(self.package):
            raise MeasureUnavailable(
                f"needs {PACKAGES[self.package]}: pip install 'latent-shift-video[eval]'"
            )


def measure_all(comparison: Comparison) -> tuple[list[Record], dict[str, str]]:
    """Compute every measure of the protocol; return the records, and for each measure that was skipped the
    reason."""
    records: list[Record] = []
    skipped: dict[str, str] = {}
    for name in comparison.protocol.measures:
        try:
            records += compute(comparison, name)
        except MeasureUnavailable as error:
            skipped[name] = str(error)
    return records, skipped


def compute(comparison: Comparison, name: str) -> list[Record]:
    """Compute one measure; raise MeasureUnavailable where it cannot be."""
    measure = MEASURES[name]
    measure.check(comparison.protocol.num_frames)
    return measure.compute(comparison, measure)


def prepare_real_features(comparison: Comparison) -> None:
    """Extract the features of the real clips that the protocol's distances need."""
    for name in comparison.protocol.measures:
        if (measure := MEASURES[name]).compute is distance:
            with contextlib.suppress(MeasureUnavailable):  # `measure_all` reports it
                comparison.features(_network(comparison, measure), real=True)


def check_weights(weights: Weights, names: Sequence[str]) -> None:
    """Open every network whose weights were given, so that wrong files are refused before any clip is
    generated.

    Raises:
        ValueError: a file that is another network, or weights that none of the measures uses.
    """
    measures = [MEASURES[name] for name in names]
    kinds = {measure.network for measure in measures}
    if unused := sorted(weights.paths.keys() - kinds):
        expected = ", ".join(kind for kind in features.PATH_KINDS if kind in kinds) or "none"
        raise ValueError(f"--weights {', '.join(unused)}: no measure here uses it; expected {expected}")
    for measure in measures:
        if measure.network in weights.paths:
            weights.open(measure.network, **measure.options)


def open_distances(weights: Weights) -> list[tuple[Measure, Extractor]]:
    """Return every distance whose network is at hand, with its network."""
    distances = []
    for name in DISTANCES:
        with contextlib.suppress(MeasureUnavailable):
            distances.append((MEASURES[name], weights.open(MEASURES[name].network, **MEASURES[name].options)))
    return distances


def names_for(protocol: str) -> tuple[str, ...]:
    """Return the names of a protocol's measures, in the order of the table."""
    return tuple(name for name, measure in MEASURES.items() if protocol in measure.protocols)


def label_of(record: str) -> Label:
    """Return the label of a record by its name; "_real" at the end makes no difference."""
    record = record.removesuffix("_real")
    for measure in MEASURES.values():
        for pattern, label in measure.labels.items():
            match = re.fullmatch(
                re.escape(pattern).replace(re.escape("{timestep}"), r"(?P<timestep>\d+)"), record
            )
            if match:
                return label._replace(text=label.text.format(**match.groupdict()))
    return Label(record.replace("_", " "), "", "")  # of another version


def per_clip(comparison: Comparison, measure: Measure) -> list[Record]:
    """Average a score over the generated and over the real clips, which must have the same frame rate."""
    system, protocol = comparison.system, comparison.protocol
    if system.fps != protocol.fps:
        raise MeasureUnavailable(
            f"the real clips have {protocol.fps:g} frames a second, these {system.fps:g}"
        )
    generated, real = clip_scores(comparison, measure.name), clip_scores(comparison, measure.name, real=True)
    of_real = comparison.record(f"{measure.name}_real", statistics.estimate(real), real=True)
    of_real = replace(of_real, clips=len(real), seeds=None, fps=protocol.fps, native_size=None)
    return [comparison.mean_record(measure.name, generated), of_real]


def clip_scores(comparison: Comparison, name: str, *, real: bool = False) -> np.ndarray:
    """Return the score `(N,)` of each generated clip, or of as many real ones.

    All scores are computed together, so that each clip is read once. Their names are part of the cache's
    name: the columns of another set have another meaning.
    """
    scores = {}
    for measure in MEASURES.values():
        if measure.score:
            with contextlib.suppress(MeasureUnavailable):
                measure.check(comparison.protocol.num_frames)
                scores[measure.name] = measure.score
    load, num = comparison.clip, len(comparison.protocol.prompts)
    if real:
        load, num = comparison.real_clip, min(num, comparison.protocol.num_real)

    def score(numbers: range) -> np.ndarray:
        return np.array([[function(clip) for function in scores.values()] for clip in map(load, numbers)])

    cache = f"temporal-{len(scores)}"
    if tuple(scores) != CACHED_SCORES:
        cache += f"-{hashlib.sha256(','.join(scores).encode()).hexdigest()[:8]}"
    rows = comparison.cached_rows(cache, score, num, real=real)
    return rows[:, list(scores).index(name)]


def distance(comparison: Comparison, measure: Measure) -> list[Record]:
    """Compute a distance between the features of the generated and of the real clips."""
    assert measure.statistic is not None
    extractor = _network(comparison, measure)
    clusters = {"cluster_ids": comparison.cluster_ids}
    if measure.statistic is kernel_estimate and comparison.protocol.matched:
        clusters["other_cluster_ids"] = np.arange(comparison.protocol.num_real)
    generated, real = comparison.features(extractor), comparison.features(extractor, real=True)
    return [
        comparison.record(measure.name, measure.statistic(generated, real, **clusters), extractor, real=True)
    ]


def class_score(comparison: Comparison, measure: Measure) -> list[Record]:
    """Compute the inception score of the generated clips."""
    extractor = _network(comparison, measure)
    estimate = inception_score(comparison.features(extractor), cluster_ids=comparison.cluster_ids)
    return [comparison.record(measure.name, estimate, extractor)]


def motion_error(comparison: Comparison, measure: Measure) -> list[Record]:
    """Compare the motion energy of each clip with that of the real clip of its caption; 0.1 grey levels are
    added to both, so that still clips have a ratio.
    """
    generated, real = (
        clip_scores(comparison, "motion_energy"),
        clip_scores(comparison, "motion_energy", real=True),
    )
    ratios = (generated + 0.1) / (real[comparison.cluster_ids] + 0.1)
    return [comparison.mean_record(measure.name, ratios, statistics.factor, real=True)]


def retrieval(comparison: Comparison, measure: Measure) -> list[Record]:
    """Rank the real clip of each generated clip's caption among all real clips, by the mean features of
    their frames."""
    extractor = _network(comparison, measure)
    generated, real = (comparison.features(extractor, real=real).mean(axis=1) for real in (False, True))
    ranks = clip_metrics.retrieval_ranks(generated, real)
    options = {"extractor": extractor, "real": True}
    records = [comparison.mean_record("retrieval_top1", ranks == 1, **options)]
    if comparison.protocol.num_real > 5:  # of five or fewer, all are in the first five
        records.append(comparison.mean_record("retrieval_top5", ranks <= 5, **options))
    return [*records, comparison.mean_record("retrieval_median_rank", ranks, statistics.median, **options)]


def clipsim(comparison: Comparison, measure: Measure) -> list[Record]:
    """Average the similarity of frames and prompt over the generated clips."""
    network, prompts = _network(comparison, measure), comparison.protocol.prompts

    def similarity(numbers: range) -> np.ndarray:
        return np.concatenate([network(comparison.clip(k)[None], [prompts[k]]) for k in numbers])

    values = comparison.cached_rows(f"clipsim-{network.sha256[:12]}", similarity, len(prompts))
    return [comparison.mean_record(measure.name, values, extractor=network)]


def denoising_of_real_clips(comparison: Comparison, measure: Measure) -> list[Record]:
    """Measure how well a model of this package predicts real clips under noise (denoising.py)."""
    pipe, protocol = _own_pipeline(comparison), comparison.protocol
    if pipe.call_defaults["distilled_steps"]:
        raise MeasureUnavailable(
            "a distilled model predicts ends of its phases, not clean clips; measure its teacher"
        )
    noise = comparison.noise or (pipe.call_defaults["shared_noise"], pipe.call_defaults["noise_correlation"])

    def denoise(numbers: range) -> np.ndarray:
        rows = []
        for k in numbers:
            clip = comparison.real_clip(comparison.cluster_ids[k])
            errors, motions = denoising.denoising(pipe, clip, protocol.prompts[k], noise=noise, number=k)
            rows.append(np.concatenate([errors, np.ravel(list(motions.values()))]))
        return np.stack(rows)

    rows = comparison.cached_rows(f"denoising-{noise[0]:g}-{noise[1]:g}", denoise, len(protocol.prompts))
    errors, motions = rows[:, : protocol.num_frames], rows[:, protocol.num_frames :].reshape(len(rows), -1, 3)
    records = [
        comparison.mean_record("denoising_error", errors.mean(axis=1), real=True),
        comparison.mean_record("denoising_error_of_end_frames", errors[:, [0, -1]].mean(axis=1), real=True),
    ]
    for level, timestep in enumerate(denoising.timesteps(pipe.scheduler)):
        for name, residual in (("", 0), ("_frame_by_frame", 1)):
            residual_and_total = motions[:, level][:, [residual, 2]]
            records.append(
                comparison.mean_record(
                    f"motion_seen_at_{timestep}{name}", residual_and_total, statistics.r_squared, real=True
                )
            )
    return [replace(record, noise=list(noise)) for record in records]


def reconstruction(comparison: Comparison, measure: Measure) -> list[Record]:
    """Compute the PSNR through the autoencoder of one held-out frame of each concept that has one, at most
    200 of them; where nothing is held out, of any frame of the concept.
    """
    store, vae = comparison.protocol.store, _own_pipeline(comparison).vae
    assert store is not None
    splits = tuple(sorted(store.splits - {"train"})) or ("train",)
    num = min(200, len(np.unique(store.index[store.select(splits=splits)]["concept"])))

    def psnr(numbers: range) -> np.ndarray:
        return denoising.reconstruction(vae, store, splits=splits, num=len(numbers))

    values = comparison.cached_rows("reconstruction", psnr, num)
    if np.isinf(values).any():
        raise MeasureUnavailable("its autoencoder returns frames unchanged")
    record = comparison.record("reconstruction_psnr_db", statistics.estimate(values), real=True)
    return [
        replace(
            record,
            clips=num,
            seeds=None,
            reference={**(record.reference or {}), "splits": list(splits), "clips": num},
        )
    ]


def _network(comparison: Comparison, measure: Measure) -> Any:
    return comparison.weights.open(measure.network, **measure.options)


def _own_pipeline(comparison: Comparison) -> LatentShiftPipeline:
    pipe = comparison.system.pipe
    own = type(pipe) is LatentShiftPipeline
    if not own or pipe.unet.config.sample_size != comparison.protocol.size[0] / pipe.vae_scale_factor:
        raise MeasureUnavailable("is defined for models of this package at the protocol's size only")
    return pipe


def _score(
    name: str,
    score: Callable[[np.ndarray], float],
    text: str,
    definition: str,
    *,
    min_frames: int = 2,
    package: str = "",
) -> Measure:
    """Return the row of a score of single clips."""
    labels, protocols = {name: Label(text, REAL, definition)}, (*CAPTIONS, "classes", *PUBLIC)
    return Measure(name, per_clip, labels, protocols, package=package, min_frames=min_frames, score=score)


def _distance(
    name: str,
    statistic: Callable[..., Estimate],
    network: str,
    text: str,
    definition: str,
    *,
    protocols: tuple[str, ...] = CAPTIONS,
    motion: bool = False,
) -> Measure:
    """Return the row of a distance between features; `motion` is that of `features.efficientnet`."""
    labels, options = {name: Label(text, LOWER, definition)}, {"motion": True} if motion else {}
    return Measure(
        name,
        distance,
        labels,
        protocols,
        network,
        options,
        min_frames=2 if motion else 1,
        statistic=statistic,
    )


_MOTION = "R² of the motion in real clips (deviation of latents from their mean over time) predicted under noise of timestep t"

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        _distance(
            "kd-efficientnet-lite0", kernel_estimate, "efficientnet", "kernel distance of frames",
            "unbiased kernel distance (MMD) of frames' EfficientNet-lite0 features",
        ),
        _distance(
            "kd-efficientnet-lite0-motion", kernel_estimate, "efficientnet", "kernel distance of motion",
            "kernel distance of clips' mean EfficientNet-lite0 features and their mean change between frames",
            motion=True,
        ),
        Measure(
            "retrieval", retrieval, network="efficientnet", labels={
                "retrieval_top1": Label(
                    "caption retrieval, top 1", HIGHER,
                    "fraction of clips whose nearest real clip, in EfficientNet-lite0 features, has their caption",
                ),
                "retrieval_top5": Label(
                    "caption retrieval, top 5", HIGHER,
                    "fraction of clips with the real clip of their caption among the five nearest",
                ),
                "retrieval_median_rank": Label(
                    "caption retrieval, median rank", LOWER,
                    "median rank of the real clip of the same caption among all real clips",
                ),
            },
        ),
        Measure(
            "adherence", prompt_adherence, protocols=("words",), min_frames=4, labels={
                f"adherence_{kind}{suffix}": Label(f"{kind} as prompted{text}", better, definition)
                for kind in detection.KINDS
                for suffix, text, better, definition in (
                    ("", "", HIGHER, f"fraction of clips with the {kind} that their prompts ask for, from pixels"),
                    ("_chance", ", chance", "", f"the same for a prompt drawn at random from those that ask for a {kind}"),
                )
            },
        ),
        Measure(
            "recognition", recognition, protocols=("words",), network="efficientnet", labels={
                "adherence_thing": Label(
                    "thing recognised", HIGHER,
                    "fraction of clips whose thing, cut out, has its own real clip among the five most similar of 100",
                ),
                "adherence_company": Label("both things recognised", HIGHER, "the same of clips of two things, where both must be"),
            },
        ),
        Measure(
            "motion_error", motion_error, protocols=(*CAPTIONS, "classes"), min_frames=2, labels={
                "motion_error": Label(
                    "motion error, factor", LOWER,
                    "typical factor between the motion energy of a clip and that of the real clip of its caption",
                ),
            },
        ),
        _score(
            "motion_energy", clip_metrics.motion_energy, "motion energy, grey levels",
            "mean absolute change of a pixel from frame to frame, in grey levels (0 to 255)",
        ),
        _score(
            "flicker", clip_metrics.flicker, "flicker, grey levels",
            "mean absolute second difference of a pixel over time: small for steady motion, large for jitter", min_frames=3,
        ),
        _score(
            "persistence", clip_metrics.persistence, "persistence",
            "change over four frames divided by the change over one: 1 where frames vary around one image", min_frames=3,
        ),
        _score(
            "coherence", clip_metrics.coherence, "coherence",
            "correlation of the pixels of successive frames: 1 where nothing changes",
        ),
        _score(
            "warping_error", clip_metrics.warping_error, "warping error, grey levels",
            "difference between a frame and the previous one warped along the optical flow", package="cv2",
        ),
        _score(
            "loop_gap", clip_metrics.loop_gap, "loop gap, steps",
            "change from the last frame to the first divided by the mean change between frames: 1 where a loop closes", min_frames=3,
        ),
        Measure(
            "denoising", denoising_of_real_clips, labels={
                "denoising_error": Label(
                    "denoising error", LOWER,
                    "mean squared error of the model's prediction for real clips under noise, over four timesteps",
                ),
                "denoising_error_of_end_frames": Label(
                    "denoising error, boundary frames", LOWER, "denoising error of the first and the last frame alone"
                ),
                "motion_seen_at_{timestep}": Label(
                    "motion R² at t = {timestep}", HIGHER, f"{_MOTION}, from all frames together"
                ),
                "motion_seen_at_{timestep}_frame_by_frame": Label(
                    "per-frame motion R² at t = {timestep}", "", f"{_MOTION}, from each frame alone"
                ),
            },
        ),
        Measure(
            "reconstruction", reconstruction, labels={
                "reconstruction_psnr_db": Label(
                    "reconstruction PSNR, dB", HIGHER, "PSNR of held-out frames through the autoencoder"
                ),
            },
        ),
        Measure(
            "clipsim", clipsim, protocols=(*CAPTIONS, *MSRVTT), network="clip",
            labels={"clipsim": Label("CLIPSIM", HIGHER, "mean cosine similarity of frames and prompt in CLIP")},
        ),
        _distance(
            "kvd-videomae", kernel_estimate, "videomae", "KVD, VideoMAE", "kernel distance of VideoMAE features",
            protocols=(*CAPTIONS, *PUBLIC),
        ),
        _distance(
            "fd-efficientnet-lite0", frechet_estimate, "efficientnet", "Frechet distance of frames",
            "Frechet distance of frames' EfficientNet-lite0 features",
        ),
        _distance(
            "fd-efficientnet-lite0-motion", frechet_estimate, "efficientnet", "Frechet distance of motion",
            "Frechet distance of clips' mean EfficientNet-lite0 features and their mean change between frames",
            protocols=(), motion=True,
        ),
        _distance(
            "fvd-videomae", frechet_estimate, "videomae", "FVD, VideoMAE", "Frechet distance of VideoMAE features",
            protocols=(*CAPTIONS, *PUBLIC),
        ),
        _distance(
            "fvd", frechet_estimate, "i3d", "FVD", "Frechet distance of I3D's logits of 16 frames", protocols=(*CAPTIONS, *PUBLIC),
        ),
        _distance(
            "kvd", kernel_estimate, "i3d", "KVD", "kernel distance of I3D's logits of 16 frames", protocols=(*CAPTIONS, *PUBLIC),
        ),
        _distance(
            "fid", frechet_estimate, "inception", "FID", "Frechet distance of frames' Inception-v3 features",
            protocols=(*CAPTIONS, *MSRVTT),
        ),
        _distance(
            "kid", kernel_estimate, "inception", "KID", "kernel distance of frames' Inception-v3 features",
            protocols=(*CAPTIONS, *MSRVTT),
        ),
        Measure(
            "is-frames", class_score, protocols=(*CAPTIONS, *MSRVTT), network="inception", options={"probabilities": True},
            labels={"is-frames": Label("inception score of frames", HIGHER, "inception score of frames, Inception-v3")},
        ),
        Measure(
            "is", class_score, protocols=("ucf101",), network="c3d",
            labels={"is": Label("inception score", HIGHER, "inception score of clips, C3D fine-tuned on UCF-101")},
        ),
    )
}  # fmt: skip
DISTANCES = tuple(name for name, measure in MEASURES.items() if measure.compute is distance)
