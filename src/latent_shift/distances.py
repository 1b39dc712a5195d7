"""Distances of two sets of features and scores of one, each with the interval in which the bootstrap sees it.

Whose features they are says extractors.py; a distance is called FID, FVD, ... only where they are the ones that have that name.

N, M samples of two sets, D features, K classes. All computation is in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class Unmeasurable(ValueError):
    """These clips, or what is at hand, do not allow a measure; others may be taken all the same."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval by bootstrap, from so many independent samples (of two sets, the fewer)."""

    value: float
    low: float
    high: float
    samples: int
    resamples: int


def frechet(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al.
    2017, equation 6).

    With S = R'R, R the triangle of a QR decomposition of the centred features, the trace of (S_a S_b)^(1/2) is the sum of the singular
    values of R_a R_b': no root of a nearly singular matrix is taken.

    Raises:
        ValueError: other dimensions, what is not finite, or no more samples than dimensions, of which the distance is mostly bias.
    """
    _check(a_ND, b_MD)
    return _frechet(a_ND, b_MD, [np.ones(size) for size in _samples(a_ND, b_MD, 1)], 1)


def frechet_estimate(a_ND: np.ndarray, b_MD: np.ndarray, *, groups: int = 1, resamples: int = 40) -> Estimate:
    """`frechet` with its interval, the value and 1.96 deviations of the resampled ones: a resample repeats samples, which makes each of
    them larger, so only their spread counts.

    Args:
        groups: successive rows that belong together, the frames of a clip: one sample, drawn together.
        resamples: of the bootstrap, from both sets.
    """
    _check(a_ND, b_MD)
    sizes, rng = _samples(a_ND, b_MD, groups), np.random.default_rng(0)
    value = _frechet(a_ND, b_MD, [np.ones(size) for size in sizes], groups)
    counts = ([rng.multinomial(size, np.full(size, 1 / size)) for size in sizes] for _ in range(resamples))
    return _around(value, [_frechet(a_ND, b_MD, each, groups) for each in counts], min(sizes))


def _samples(a_ND: np.ndarray, b_MD: np.ndarray, groups: int) -> list[int]:
    """How many independent samples the two sets hold."""
    sizes, dims = [len(features) // groups for features in (a_ND, b_MD)], a_ND.shape[1]
    if min(sizes) <= dims:
        of = "clips" if groups > 1 else "samples"
        raise Unmeasurable(f"{min(sizes)} {of} of {dims} features: the Frechet distance needs more than features, else it is mostly bias")
    return sizes


def _frechet(a_ND: np.ndarray, b_MD: np.ndarray, counts: list[np.ndarray], groups: int) -> float:
    (m_a, r_a), (m_b, r_b) = (_gaussian(*each, groups) for each in zip((a_ND, b_MD), counts, strict=True))
    roots = np.linalg.svd(r_a @ r_b.T, compute_uv=False).sum()
    return float(np.square(m_a - m_b).sum() + np.square(r_a).sum() + np.square(r_b).sum() - 2 * roots)


def _gaussian(features_ND: np.ndarray, counts: np.ndarray, groups: int, *, rows: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """The mean `(D,)` and the triangle R `(D, D)` of the covariance R'R of rows that count as often as their group; some rows at once,
    for of all frames of a large set a copy would be gigabytes."""
    weights_N = np.repeat(counts, groups).astype(np.float64)
    parts = [slice(start, start + rows) for start in range(0, len(weights_N), rows)]
    mean_D = sum(weights_N[part] @ features_ND[part].astype(np.float64) for part in parts) / weights_N.sum()
    triangle = np.zeros((0, len(mean_D)))
    for part in parts:
        centred = np.sqrt(weights_N[part])[:, None] * (features_ND[part] - mean_D)
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, centred]), mode="r"))
    return mean_D, triangle / np.sqrt(weights_N.sum() - 1)


def kernel_estimate(a_ND: np.ndarray, b_MD: np.ndarray, *, groups: int = 1, resamples: int = 1000, most: int = 5000) -> Estimate:
    """Squared maximum mean discrepancy under the kernel (x'y / D + 1)^3, without bias at any number of samples (Binkowski et al. 2018,
    section 4: KID; of video features KVD, Unterthiner et al. 2018). A sample is never paired with itself, nor a frame with one of its own
    clip, which is like it.

    Args:
        groups: successive rows that belong together, the frames of a clip, and are drawn together.
        resamples: of the bootstrap, from both sets.
        most: groups taken of each set, at random; the kernel of all against all grows with their square.

    Raises:
        ValueError: other dimensions, what is not finite, or fewer than two samples.
    """
    _check(a_ND, b_MD)
    rng = np.random.default_rng(0)
    a, b = (_some(features.reshape(-1, groups, features.shape[1]), most, rng) for features in (a_ND, b_MD))
    if min(len(a), len(b)) < 2:
        raise Unmeasurable("the kernel distance needs two samples or more of each set")
    within_a, within_b, between = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    np.fill_diagonal(within_a, 0)
    np.fill_diagonal(within_b, 0)

    def mmd(u_N: np.ndarray, w_M: np.ndarray) -> float:
        """With each group as often as `u` and `w` say."""
        pairs_a, pairs_b = (each.sum() ** 2 - np.square(each).sum() for each in (u_N, w_M))
        return u_N @ within_a @ u_N / pairs_a + w_M @ within_b @ w_M / pairs_b - 2 * u_N @ between @ w_M / (u_N.sum() * w_M.sum())

    draws = [[rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64) for n in (len(a), len(b))] for _ in range(resamples)]
    draws = [[u, w] for u, w in draws if np.count_nonzero(u) > 1 and np.count_nonzero(w) > 1]  # of a few samples it may be one alone
    return _between(mmd(np.ones(len(a)), np.ones(len(b))), [mmd(*each) for each in draws], min(len(a), len(b)))


def _some(groups: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return groups if len(groups) <= most else groups[np.sort(rng.choice(len(groups), most, replace=False))]


def _kernel(a_NGD: np.ndarray, b_MGD: np.ndarray) -> np.ndarray:
    """`(N, M)`: the kernel's mean over the pairs of a group of `a` with one of `b`, some rows at once."""
    num, size, dims = b_MGD.shape
    rows = 1 + 2**24 // (num * size * size)
    other = b_MGD.reshape(-1, dims).astype(np.float64).T
    parts = [a_NGD[start : start + rows].astype(np.float64) for start in range(0, len(a_NGD), rows)]
    kernels = (((part.reshape(-1, dims) @ other / dims + 1) ** 3).reshape(len(part), -1, num, size) for part in parts)
    return np.concatenate([kernel.mean(axis=(1, 3)) for kernel in kernels])


def inception_score(probabilities_NK: np.ndarray, *, groups: int = 1, resamples: int = 100) -> Estimate:
    """exp of the mean divergence of each sample's classes from the classes of all (Salimans et al. 2016), of all samples at once, without
    splits. The interval is the value and 1.96 deviations of the resampled scores, which repeat samples and are lower.

    Args:
        groups: successive rows that belong together, the frames of a clip: one sample, drawn together.
        resamples: of the bootstrap.

    Raises:
        ValueError: rows that are no probabilities, or no more samples than classes.
    """
    p = probabilities_NK.astype(np.float64)
    if p.ndim != 2 or (p < 0).any() or not np.allclose(p.sum(axis=1), 1, atol=1e-3):
        raise ValueError("the inception score expects a row of probabilities a sample")
    clips = p.reshape(-1, groups, p.shape[1])
    if len(clips) <= p.shape[1]:
        raise Unmeasurable(f"{len(clips)} clips of {p.shape[1]} classes: the inception score needs more than classes")

    def score(clips: np.ndarray) -> float:
        p = clips.reshape(-1, clips.shape[-1])
        share = p.mean(axis=0)
        return float(np.exp((p * np.log((p + 1e-30) / (share + 1e-30))).sum(axis=1).mean()))

    rng = np.random.default_rng(0)
    return _around(score(clips), [score(clips[rng.integers(len(clips), size=len(clips))]) for _ in range(resamples)], len(clips))


def mean_estimate(values_N: np.ndarray, *, average: Callable[..., np.ndarray] = np.mean, resamples: int = 1000) -> Estimate:
    """The mean of a measure of each sample, or another `average` that takes an axis; raises ValueError for one sample alone."""
    values = np.asarray(values_N, np.float64)
    if len(values) < 2:
        raise Unmeasurable("one clip has no interval: expected two or more")
    rng = np.random.default_rng(0)
    drawn = average(values[rng.integers(len(values), size=(resamples, len(values)))], axis=1)
    return _between(float(average(values, axis=0)), drawn, len(values))


def _between(value: float, resampled, samples: int) -> Estimate:
    """Where 95 % of the resampled values lie: of an estimate without bias."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high), samples, len(resampled))


def _around(value: float, resampled, samples: int) -> Estimate:
    """As far from the value as the resampled ones are from each other: of an estimate that repeated samples move."""
    spread = 1.96 * float(np.std(resampled, ddof=1))
    return Estimate(float(value), float(value) - spread, float(value) + spread, samples, len(resampled))


def _check(a_ND: np.ndarray, b_MD: np.ndarray) -> None:
    if a_ND.ndim != 2 or b_MD.ndim != 2 or a_ND.shape[1] != b_MD.shape[1]:
        raise ValueError(f"expected two sets of the same features, got {a_ND.shape} and {b_MD.shape}")
    if not (np.isfinite(a_ND).all() and np.isfinite(b_MD).all()):
        raise ValueError("features that are not finite: expected numbers")
