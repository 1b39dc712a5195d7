"""Distances between two sets of features, scores of one set and averages over clips, each with a 95 %
bootstrap interval.

N, M clips of two sets, G rows of features a clip (one a frame, or a single one), D features, K classes. The
bootstrap is clustered: it resamples the rows of a clip together, and so the clips of one cluster, such as
those of several captions of one video. All computation is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class MeasureUnavailable(ValueError):
    """One measure cannot be computed here: too few clips, missing weights or a missing package. Others still
    can."""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % bootstrap interval.

    Attributes:
        value, low, high: the statistic and its interval.
        samples: independent samples behind it; of two sets, the smaller number.
        resamples: bootstrap resamples.
        biased: whether the statistic grows as samples get fewer. Its interval then covers other sets of the
            same size, not larger ones.
    """

    value: float
    low: float
    high: float
    samples: int
    resamples: int
    biased: bool = False


def frechet(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Compute the squared Frechet distance of the Gaussians fitted to two sets (Heusel et al. 2017, equation
    6).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with means m and covariances S.

    With S = R'R, where R is the triangular factor of a QR decomposition of the centred features, the trace of
    (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b'. This avoids the root of a nearly singular
    matrix.

    Args:
        a_ND, b_MD: `(N, D)` and `(M, D)`, or `(N, G, D)` and `(M, H, D)` with G or H rows a clip.

    Raises:
        ValueError: different dimensions, features that are not finite, or no more samples than features: the
            distance would be mostly bias.
    """
    a, b = _as_rows(a_ND, b_MD)
    _check_sample_size(len(a), len(b), a)
    return _frechet(a, b, np.ones(len(a)), np.ones(len(b)))


def frechet_estimate(
    a_NGD: np.ndarray, b_MGD: np.ndarray, *, cluster_ids: np.ndarray | None = None, resamples: int = 40
) -> Estimate:
    """Compute `frechet` with its interval, the value plus and minus 1.96 standard deviations of the
    resampled distances.

    A resample repeats samples, which raises every resampled distance; only their spread is used. The
    estimate is `biased`.

    Args:
        a_NGD, b_MGD: as in `frechet`.
        cluster_ids: `(N,)`, the independent sample that each clip of `a` belongs to. None: each is its own;
            those of `b` always are.
        resamples: bootstrap resamples of both sets.
    """
    a, b = _as_rows(a_NGD, b_MGD)
    num_a, weights_a = _bootstrap_weights(len(a), resamples, cluster_ids)
    num_b, weights_b = _bootstrap_weights(len(b), resamples, seed=1)
    _check_sample_size(num_a, num_b, a)
    value = _frechet(a, b, np.ones(len(a)), np.ones(len(b)))
    resampled = [_frechet(a, b, *weights) for weights in zip(weights_a, weights_b, strict=True)]
    return _normal_interval(value, resampled, min(num_a, num_b), biased=True)


def _check_sample_size(num_a: int, num_b: int, features_NGD: np.ndarray) -> None:
    dims, noun = features_NGD.shape[2], "clips" if features_NGD.shape[1] > 1 else "samples"
    if (fewer := min(num_a, num_b)) <= dims:
        raise MeasureUnavailable(
            f"{fewer} {noun} of {dims} features: the Frechet distance needs more {noun} than features, fewer give mostly bias"
        )


def _frechet(a_NGD: np.ndarray, b_MGD: np.ndarray, weights_N: np.ndarray, weights_M: np.ndarray) -> float:
    (m_a, r_a), (m_b, r_b) = _gaussian(a_NGD, weights_N), _gaussian(b_MGD, weights_M)
    roots = np.linalg.svd(r_a @ r_b.T, compute_uv=False).sum()
    return float(np.square(m_a - m_b).sum() + np.square(r_a).sum() + np.square(r_b).sum() - 2 * roots)


def _gaussian(
    features_NGD: np.ndarray, weights_N: np.ndarray, *, rows: int = 8192
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean `(D,)` and the triangular factor R `(D, D)` of the covariance R'R of weighted samples.

    It works on `rows` rows at a time, because a copy of all frames of a large set would take gigabytes.
    """
    step = 1 + rows // features_NGD.shape[1]
    parts = [slice(start, start + step) for start in range(0, len(features_NGD), step)]
    total = weights_N.sum() * features_NGD.shape[1]
    mean_D = sum(weights_N[part] @ features_NGD[part].sum(axis=1, dtype=np.float64) for part in parts) / total
    triangle = np.zeros((0, len(mean_D)))
    for part in parts:
        centred = np.sqrt(weights_N[part])[:, None, None] * (features_NGD[part] - mean_D)
        triangle = np.asarray(
            np.linalg.qr(np.concatenate([triangle, centred.reshape(-1, len(mean_D))]), mode="r")
        )
    return mean_D, triangle / np.sqrt(total - 1)


def kernel_estimate(
    a_NGD: np.ndarray,
    b_MGD: np.ndarray,
    *,
    cluster_ids: np.ndarray | None = None,
    other_cluster_ids: np.ndarray | None = None,
    resamples: int = 1000,
    max_clips: int = 5000,
) -> Estimate:
    """Compute the squared maximum mean discrepancy under the kernel (x'y / D + 1)^3, unbiased at any number
    of samples (Binkowski et al. 2018, section 4: KID; on video features KVD, Unterthiner et al. 2018).

    Clips of one cluster are never paired: no frame with another of its clip and, where both sets share
    captions, no generated clip with the real one of its caption (Gretton et al. 2012, lemma 6: only the two
    members of a pair must be independent).

    Args:
        a_NGD, b_MGD: as in `frechet`.
        cluster_ids: `(N,)`, the independent sample that each clip of `a` belongs to. None: each is its own.
        other_cluster_ids: `(M,)`, the same for `b`; equal ids in both sets are one cluster. None: each is
            its own, none in `a`.
        resamples: bootstrap resamples of both sets; clusters that both share are resampled together.
        max_clips: clips taken of each set, at random: the cost grows with their square.

    Raises:
        ValueError: different dimensions, features that are not finite, or fewer than three samples, which
            have no interval.
    """
    a, b = _as_rows(a_NGD, b_MGD)
    rng = np.random.default_rng(0)
    subset_a, subset_b = (np.sort(rng.permutation(len(features))[:max_clips]) for features in (a, b))
    ids_a = (np.arange(len(a)) if cluster_ids is None else np.asarray(cluster_ids))[subset_a]
    ids_b = (
        subset_b + ids_a.max(initial=-1) + 1
        if other_cluster_ids is None
        else np.asarray(other_cluster_ids)[subset_b]
    )
    a, b = a[subset_a], b[subset_b]
    ids = _consecutive_ids(len(a) + len(b), np.concatenate([ids_a, ids_b]))
    ids_a, ids_b = ids[: len(a)], ids[len(a) :]
    if (fewer := min(len(np.unique(ids_a)), len(np.unique(ids_b)))) < 3:
        raise MeasureUnavailable("the kernel distance needs three samples or more of each set")
    within_a, within_b = _mean_kernel(a, ids_a, a, ids_a), _mean_kernel(b, ids_b, b, ids_b)
    between = _mean_kernel(a, ids_a, b, ids_b)

    def mmd(u_N: np.ndarray, w_M: np.ndarray) -> float:
        return within_a(u_N, u_N) + within_b(w_M, w_M) - 2 * between(u_N, w_M)

    weights: Iterable[Sequence[np.ndarray]]
    if other_cluster_ids is None:
        weights_a = _bootstrap_weights(len(a), resamples, ids_a)[1]
        weights_b = _bootstrap_weights(len(b), resamples, ids_b, seed=1)[1]
        weights = zip(weights_a, weights_b, strict=True)
    else:
        weights = (np.split(both, [len(a)]) for both in _bootstrap_weights(len(ids), resamples, ids)[1])
    resampled = np.array([mmd(*pair) for pair in weights])
    return _percentile_interval(
        mmd(np.ones(len(a)), np.ones(len(b))), resampled[np.isfinite(resampled)], fewer
    )


def _mean_kernel(
    a_NGD: np.ndarray, ids_N: np.ndarray, b_MGD: np.ndarray, ids_M: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return the kernel's mean over all pairs from two clusters as a function of the weights; NaN without
    such pairs."""
    kernel, num_clusters = _kernel(a_NGD, b_MGD), 1 + max(ids_N.max(), ids_M.max())
    kernel[ids_N[:, None] == ids_M] = 0

    def weighted_mean(u_N: np.ndarray, w_M: np.ndarray) -> float:
        pairs = u_N.sum() * w_M.sum() - np.bincount(ids_N, u_N, num_clusters) @ np.bincount(
            ids_M, w_M, num_clusters
        )
        return float(u_N @ kernel @ w_M / pairs) if pairs else np.nan

    return weighted_mean


def _kernel(a_NGD: np.ndarray, b_MGD: np.ndarray) -> np.ndarray:
    """Return `(N, M)`, the kernel's mean over the pairs of a row of each clip of `a` and of `b`, computed in
    blocks."""
    num, size, dims = b_MGD.shape
    rows = 1 + 2**24 // (num * size * size)
    other = b_MGD.reshape(-1, dims).astype(np.float64).T
    parts = [a_NGD[start : start + rows].astype(np.float64) for start in range(0, len(a_NGD), rows)]
    kernels = (
        ((part.reshape(-1, dims) @ other / dims + 1) ** 3).reshape(len(part), -1, num, size) for part in parts
    )
    return np.concatenate([kernel.mean(axis=(1, 3)) for kernel in kernels])


def inception_score(
    probabilities_NGK: np.ndarray, *, cluster_ids: np.ndarray | None = None, resamples: int = 100
) -> Estimate:
    """Compute the inception score, exp of the mean divergence of each row's classes from the classes of all
    (Salimans et al. 2016), over all clips at once, without splits.

    Resamples contain duplicates, which lowers their score. The interval is therefore the value of all clips,
    plus and minus 1.96 standard deviations of the resampled scores.

    Args:
        probabilities_NGK: `(N, K)`, or `(N, G, K)` with G rows a clip.
        cluster_ids: `(N,)`, the independent sample that each clip belongs to. None: each is its own.
        resamples: bootstrap resamples.

    Raises:
        ValueError: rows that are no probabilities, or no more samples than classes.
    """
    p = probabilities_NGK if probabilities_NGK.ndim == 3 else probabilities_NGK[:, None]
    # All that the score needs of a clip: its mean probabilities and its mean sum of p log p.
    class_means, negative_entropies = [], []
    for start in range(0, len(p), 256):
        part = p[start : start + 256].astype(np.float64)
        if (part < 0).any() or not np.allclose(part.sum(axis=2), 1, atol=1e-3):
            raise ValueError("the inception score expects a row of probabilities a sample")
        class_means.append(part.mean(axis=1))
        negative_entropies.append(_p_log_p(part).mean(axis=1))
    means_NK, negative_entropies_N = np.concatenate(class_means), np.concatenate(negative_entropies)
    num, weights = _bootstrap_weights(len(p), resamples, cluster_ids)
    if num <= p.shape[2]:
        raise MeasureUnavailable(
            f"{num} clips of {p.shape[2]} classes: the inception score needs more clips than classes"
        )

    def score(weights_N: np.ndarray) -> float:
        return float(np.exp(mean(negative_entropies_N, weights_N) - _p_log_p(mean(means_NK, weights_N))))

    return _normal_interval(score(np.ones(len(p))), [score(weights_N) for weights_N in weights], num)


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return (p * np.log(np.maximum(p, 1e-30))).sum(axis=-1)


def mean(values_N: np.ndarray, weights_N: np.ndarray) -> Any:
    """Return the weighted mean of `(N,)`, or of each column of `(N, K)`."""
    return weights_N @ values_N / weights_N.sum()


def factor(ratios_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Return the typical factor between ratios and 1, in either direction: exp of the weighted mean of
    |log|."""
    return float(np.exp(mean(np.abs(np.log(ratios_N)), weights_N)))


def median(values_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Return the weighted median; weights are whole-number counts."""
    return float(np.median(np.repeat(values_N, weights_N.astype(int))))


def r_squared(residual_and_total_N2: np.ndarray, weights_N: np.ndarray) -> float:
    """Return R^2 = 1 - residual / total, with both sums of squares taken over all clips."""
    residual, total = weights_N @ residual_and_total_N2
    return float(1 - residual / max(total, 1e-12))


def mean_of_known(values_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Return the weighted mean of the values that are not NaN."""
    known = ~np.isnan(values_N)
    weights = weights_N[known]
    return float(np.average(values_N[known], weights=weights if weights.sum() else None))


AVERAGES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mean": mean, "factor": factor, "median": median, "r_squared": r_squared, "mean_of_known": mean_of_known,
}  # fmt: skip
"""Averages by the names that records give them."""


def estimate(
    values_N: np.ndarray,
    average: Callable[[np.ndarray, np.ndarray], float] = mean,
    *,
    cluster_ids: np.ndarray | None = None,
    resamples: int = 1000,
) -> Estimate:
    """Average a value of each clip, with its percentile interval.

    Args:
        values_N: `(N,)`, or `(N, ...)` where the average takes it.
        average: a function of values and weights `(N,)`, one of `AVERAGES`.
        cluster_ids: `(N,)`, the independent sample that each clip belongs to. None: each is its own.
        resamples: bootstrap resamples.

    Raises:
        ValueError: a single sample.
    """
    values = np.asarray(values_N, np.float64)
    num, weights = _bootstrap_weights(len(values), resamples, cluster_ids)
    if num < 2:
        raise MeasureUnavailable("one clip has no interval: expected two or more")
    resampled = [average(values, weights_N) for weights_N in weights]
    return _percentile_interval(average(values, np.ones(len(values))), resampled, num)


def difference(
    values_N: np.ndarray,
    others_N: np.ndarray,
    average: Callable[[np.ndarray, np.ndarray], float] = mean,
    *,
    cluster_ids: np.ndarray | None = None,
    resamples: int = 1000,
) -> Estimate:
    """Subtract the average of `others_N` from that of `values_N`, with its interval by a paired bootstrap.

    Both are values of the same clips of two systems and are resampled together, so that what they share does
    not widen the interval. Arguments as in `estimate`.
    """
    pairs = np.stack([np.asarray(values, np.float64) for values in (values_N, others_N)], axis=1)
    return estimate(
        pairs,
        lambda pair, w: average(pair[:, 0], w) - average(pair[:, 1], w),
        cluster_ids=cluster_ids,
        resamples=resamples,
    )


def _consecutive_ids(num: int, cluster_ids: np.ndarray | None) -> np.ndarray:
    return np.arange(num) if cluster_ids is None else np.unique(cluster_ids, return_inverse=True)[1]


def _bootstrap_weights(
    num: int, resamples: int, cluster_ids: np.ndarray | None = None, *, seed: int = 0
) -> tuple[int, Iterator[np.ndarray]]:
    """Return the number of clusters and, for each resample of them, how often each of `num` clips counts."""
    rng, ids = np.random.default_rng(seed), _consecutive_ids(num, cluster_ids)
    num = int(ids.max(initial=-1)) + 1
    return num, (
        rng.multinomial(num, np.full(num, 1 / num))[ids].astype(np.float64) for _ in range(resamples)
    )


def _percentile_interval(value: float, resampled, samples: int) -> Estimate:
    """Return the interval that holds 95 % of the resampled values, for a statistic without bias."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high), samples, len(resampled))


def _normal_interval(value: float, resampled, samples: int, *, biased: bool = False) -> Estimate:
    """Return the value +- 1.96 standard deviations of the resampled ones, for a statistic that repeated
    samples shift."""
    margin = 1.96 * float(np.std(resampled, ddof=1))
    return Estimate(
        float(value), float(value) - margin, float(value) + margin, samples, len(resampled), biased
    )


def _as_rows(a_NGD: np.ndarray, b_MGD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both sets as `(N, G, D)`; raise ValueError unless they have the same features and are finite."""
    a, b = (features[:, None] if features.ndim == 2 else features for features in (a_NGD, b_MGD))
    if a.ndim != 3 or b.ndim != 3 or a.shape[2] != b.shape[2]:
        raise ValueError(f"expected two sets of the same features, got {a_NGD.shape} and {b_MGD.shape}")
    for features in (a, b):
        if not all(
            np.isfinite(features[start : start + 256]).all() for start in range(0, len(features), 256)
        ):
            raise ValueError("expected finite features, got NaN or infinity")
    return a, b
