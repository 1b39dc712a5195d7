"""Distances of two sets of features and scores of one, each with the interval in which the bootstrap sees it.

Whose features they are says extractors.py; a distance is called FID, FVD, ... only where they are the ones that have that name.

N, M clips of two sets, G rows of each (its frames, or one), D features, K classes. What belongs together is drawn together: the rows of a
clip, and clips of one unit, such as those of several captions of one video. All computation is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class Unmeasurable(ValueError):
    """These clips, or what is at hand, do not allow a measure; others may be taken all the same."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval by bootstrap, from so many independent samples (of two sets, the fewer). Where `biased`, the number is
    larger the fewer samples there are, and its interval says where other samples of as many would bring it, not what more of them would."""

    value: float
    low: float
    high: float
    samples: int
    resamples: int
    biased: bool = False


def frechet(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al.
    2017, equation 6).

    With S = R'R, R the triangle of a QR decomposition of the centred features, the trace of (S_a S_b)^(1/2) is the sum of the singular
    values of R_a R_b': no root of a nearly singular matrix is taken.

    Args:
        a_ND, b_MD: `(N, D)`, `(M, D)`; or `(N, G, D)`, `(M, H, D)`, G or H rows of each.

    Raises:
        ValueError: other dimensions, what is not finite, or no more samples than dimensions, of which the distance is mostly bias.
    """
    a, b = _checked(a_ND, b_MD)
    _enough(len(a), len(b), a)
    return _frechet(a, b, np.ones(len(a)), np.ones(len(b)))


def frechet_estimate(a_NGD: np.ndarray, b_MGD: np.ndarray, *, units_N: np.ndarray | None = None, resamples: int = 40) -> Estimate:
    """`frechet` with its interval, the value and 1.96 deviations of the resampled ones: a resample repeats samples, which makes each of
    them larger, so only their spread counts. It is `biased`.

    Args:
        units_N: which independent sample each of `a` belongs to. None: each is one; those of `b` always.
        resamples: of the bootstrap, from both sets.
    """
    a, b = _checked(a_NGD, b_MGD)
    (num, draws), (other, others) = _bootstrap(len(a), resamples, units_N), _bootstrap(len(b), resamples, seed=1)
    _enough(num, other, a)
    value = _frechet(a, b, np.ones(len(a)), np.ones(len(b)))
    return _around(value, [_frechet(a, b, *each) for each in zip(draws, others, strict=True)], min(num, other), biased=True)


def _enough(num: int, other: int, features_NGD: np.ndarray) -> None:
    dims, of = features_NGD.shape[2], "clips" if features_NGD.shape[1] > 1 else "samples"
    if (fewer := min(num, other)) <= dims:
        raise Unmeasurable(f"{fewer} {of} of {dims} features: the Frechet distance needs more than features, else it is mostly bias")


def _frechet(a_NGD: np.ndarray, b_MGD: np.ndarray, weights_N: np.ndarray, weights_M: np.ndarray) -> float:
    (m_a, r_a), (m_b, r_b) = _gaussian(a_NGD, weights_N), _gaussian(b_MGD, weights_M)
    roots = np.linalg.svd(r_a @ r_b.T, compute_uv=False).sum()
    return float(np.square(m_a - m_b).sum() + np.square(r_a).sum() + np.square(r_b).sum() - 2 * roots)


def _gaussian(features_NGD: np.ndarray, weights_N: np.ndarray, *, rows: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """The mean `(D,)` and the triangle R `(D, D)` of the covariance R'R of rows that count as often as their sample; some at once, for of
    all frames of a large set a copy would be gigabytes."""
    step = 1 + rows // features_NGD.shape[1]
    parts = [slice(start, start + step) for start in range(0, len(features_NGD), step)]
    total = weights_N.sum() * features_NGD.shape[1]
    mean_D = sum(weights_N[part] @ features_NGD[part].sum(axis=1, dtype=np.float64) for part in parts) / total
    triangle = np.zeros((0, len(mean_D)))
    for part in parts:
        centred = np.sqrt(weights_N[part])[:, None, None] * (features_NGD[part] - mean_D)
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, centred.reshape(-1, len(mean_D))]), mode="r"))
    return mean_D, triangle / np.sqrt(total - 1)


def kernel_estimate(
    a_NGD: np.ndarray, b_MGD: np.ndarray, *, units_N: np.ndarray | None = None, units_M: np.ndarray | None = None, resamples: int = 1000,
    most: int = 5000,
) -> Estimate:  # fmt: skip
    """Squared maximum mean discrepancy under the kernel (x'y / D + 1)^3, without bias at any number of samples (Binkowski et al. 2018,
    section 4: KID; of video features KVD, Unterthiner et al. 2018). Nothing is paired with what belongs to the same unit, which is like
    it: no frame with another of its clip and, where both sets are of the same captions, no drawn clip with the real one of its caption
    (Gretton et al. 2012, lemma 6, of as many x as y: pairs need only have nothing to do with each other, what x and y of one have in
    common does not bias it).

    Args:
        a_NGD, b_MGD: as in `frechet`.
        units_N: which independent sample each of `a` belongs to. None: each is one.
        units_M: the same of `b`, whose units are those of `a` where they have one number. None: each is one of its own.
        resamples: of the bootstrap, from both sets; of units of both, which are drawn once for both.
        most: clips taken of each set, at random; the kernel of all against all grows with their square.

    Raises:
        ValueError: other dimensions, what is not finite, or fewer than three samples, which have no interval.
    """
    a, b = _checked(a_NGD, b_MGD)
    rng = np.random.default_rng(0)
    chosen, others = (np.sort(rng.permutation(len(each))[:most]) for each in (a, b))
    units_a = (np.arange(len(a)) if units_N is None else np.asarray(units_N))[chosen]
    units_b = others + units_a.max(initial=-1) + 1 if units_M is None else np.asarray(units_M)[others]
    a, b, units = a[chosen], b[others], _units(len(chosen) + len(others), np.concatenate([units_a, units_b]))
    units_a, units_b = units[: len(a)], units[len(a) :]
    if (fewer := min(len(np.unique(units_a)), len(np.unique(units_b)))) < 3:
        raise Unmeasurable("the kernel distance needs three samples or more of each set")
    within_a, within_b, between = _paired(a, units_a, a, units_a), _paired(b, units_b, b, units_b), _paired(a, units_a, b, units_b)

    def mmd(u_N: np.ndarray, w_M: np.ndarray) -> float:
        return within_a(u_N, u_N) + within_b(w_M, w_M) - 2 * between(u_N, w_M)

    draws: Iterable[Sequence[np.ndarray]]
    if units_M is None:
        draws = zip(_bootstrap(len(a), resamples, units_a)[1], _bootstrap(len(b), resamples, units_b, seed=1)[1], strict=True)
    else:
        draws = (np.split(each, [len(a)]) for each in _bootstrap(len(units), resamples, units)[1])
    drawn = np.array([mmd(*each) for each in draws])
    return _between(mmd(np.ones(len(a)), np.ones(len(b))), drawn[np.isfinite(drawn)], fewer)


def _paired(a_NGD: np.ndarray, units_N: np.ndarray, b_MGD: np.ndarray, units_M: np.ndarray) -> Callable[[np.ndarray, np.ndarray], float]:
    """The kernel's mean over all pairs of two units, as a function of how often each of `a` and of `b` counts; NaN where there are none."""
    kernel, many = _kernel(a_NGD, b_MGD), 1 + max(units_N.max(), units_M.max())
    kernel[units_N[:, None] == units_M] = 0

    def weighted(u_N: np.ndarray, w_M: np.ndarray) -> float:
        pairs = u_N.sum() * w_M.sum() - np.bincount(units_N, u_N, many) @ np.bincount(units_M, w_M, many)
        return float(u_N @ kernel @ w_M / pairs) if pairs else np.nan

    return weighted


def _kernel(a_NGD: np.ndarray, b_MGD: np.ndarray) -> np.ndarray:
    """`(N, M)`: the kernel's mean over the pairs of a row of one of `a` with a row of one of `b`, some rows at once."""
    num, size, dims = b_MGD.shape
    rows = 1 + 2**24 // (num * size * size)
    other = b_MGD.reshape(-1, dims).astype(np.float64).T
    parts = [a_NGD[start : start + rows].astype(np.float64) for start in range(0, len(a_NGD), rows)]
    kernels = (((part.reshape(-1, dims) @ other / dims + 1) ** 3).reshape(len(part), -1, num, size) for part in parts)
    return np.concatenate([kernel.mean(axis=(1, 3)) for kernel in kernels])


def inception_score(probabilities_NGK: np.ndarray, *, units_N: np.ndarray | None = None, resamples: int = 100) -> Estimate:
    """exp of the mean divergence of each row's classes from the classes of all (Salimans et al. 2016), of all at once, without splits.
    The interval is the value and 1.96 deviations of the resampled scores, which repeat samples and are lower.

    Args:
        probabilities_NGK: `(N, K)`, or `(N, G, K)`, G rows of each.
        units_N: which independent sample each belongs to. None: each is one.
        resamples: of the bootstrap.

    Raises:
        ValueError: rows that are no probabilities, or no more samples than classes.
    """
    p = probabilities_NGK if probabilities_NGK.ndim == 3 else probabilities_NGK[:, None]
    shares, certainties = [], []  # of each clip all that the score needs: its mean probabilities, and its mean sum of p log p
    for start in range(0, len(p), 256):
        part = p[start : start + 256].astype(np.float64)
        if (part < 0).any() or not np.allclose(part.sum(axis=2), 1, atol=1e-3):
            raise ValueError("the inception score expects a row of probabilities a sample")
        shares.append(part.mean(axis=1))
        certainties.append(_p_log_p(part).mean(axis=1))
    shares_NK, certainties_N = np.concatenate(shares), np.concatenate(certainties)
    num, draws = _bootstrap(len(p), resamples, units_N)
    if num <= p.shape[2]:
        raise Unmeasurable(f"{num} clips of {p.shape[2]} classes: the inception score needs more than classes")

    def score(weights_N: np.ndarray) -> float:
        return float(np.exp(mean(certainties_N, weights_N) - _p_log_p(mean(shares_NK, weights_N))))

    return _around(score(np.ones(len(p))), [score(each) for each in draws], num)


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return (p * np.log(np.maximum(p, 1e-30))).sum(axis=-1)


def mean(values_N: np.ndarray, weights_N: np.ndarray) -> Any:
    """Of `(N,)` a number, of `(N, K)` one of each column."""
    return weights_N @ values_N / weights_N.sum()


def factor(ratios_N: np.ndarray, weights_N: np.ndarray) -> float:
    """How far ratios are from 1, up or down: exp of the mean |log|."""
    return float(np.exp(mean(np.abs(np.log(ratios_N)), weights_N)))


def median(values_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Of `(N,)`, each as often as its weight, a whole number."""
    return float(np.median(np.repeat(values_N, weights_N.astype(int))))


def found(missed_and_there_N2: np.ndarray, weights_N: np.ndarray) -> float:
    """1 - what is missed by what is there, of all together: R^2."""
    missed, there = weights_N @ missed_and_there_N2
    return float(1 - missed / max(there, 1e-12))


def estimate(
    values_N: np.ndarray, average: Callable[[np.ndarray, np.ndarray], float] = mean, *, units_N: np.ndarray | None = None,
    resamples: int = 1000,
) -> Estimate:  # fmt: skip
    """An average of a measure of each clip, which counts each as often as its weight says.

    Args:
        values_N: `(N,)`, or `(N, ...)` where the average takes it.
        average: of values and weights `(N,)`: `mean`, `median`, `factor`, `found`.
        units_N: which independent sample each belongs to. None: each is one.
        resamples: of the bootstrap.

    Raises:
        ValueError: one sample alone.
    """
    values = np.asarray(values_N, np.float64)
    num, draws = _bootstrap(len(values), resamples, units_N)
    if num < 2:
        raise Unmeasurable("one clip has no interval: expected two or more")
    return _between(average(values, np.ones(len(values))), [average(values, each) for each in draws], num)


def difference(
    values_N: np.ndarray, others_N: np.ndarray, average: Callable[[np.ndarray, np.ndarray], float] = mean, *,
    units_N: np.ndarray | None = None, resamples: int = 1000,
) -> Estimate:  # fmt: skip
    """How much more an average is of one set than of another that was taken of the same clips: both are drawn alike, so that what they
    share does not widen the interval (a paired bootstrap)."""
    values = np.stack([np.asarray(each, np.float64) for each in (values_N, others_N)], axis=1)
    return estimate(values, lambda pair, w: average(pair[:, 0], w) - average(pair[:, 1], w), units_N=units_N, resamples=resamples)


def _units(num: int, units_N: np.ndarray | None) -> np.ndarray:
    return np.arange(num) if units_N is None else np.unique(units_N, return_inverse=True)[1]


def _bootstrap(num: int, resamples: int, units_N: np.ndarray | None = None, *, seed: int = 0) -> tuple[int, Iterator[np.ndarray]]:
    """How many units there are, and how often each of `num` clips counts where as many units are drawn, again and again."""
    rng, units = np.random.default_rng(seed), _units(num, units_N)
    many = int(units.max(initial=-1)) + 1
    return many, (rng.multinomial(many, np.full(many, 1 / many))[units].astype(np.float64) for _ in range(resamples))


def _between(value: float, resampled, samples: int) -> Estimate:
    """Where 95 % of the resampled values lie: of an estimate without bias."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high), samples, len(resampled))


def _around(value: float, resampled, samples: int, *, biased: bool = False) -> Estimate:
    """As far from the value as the resampled ones are from each other: of an estimate that repeated samples move."""
    spread = 1.96 * float(np.std(resampled, ddof=1))
    return Estimate(float(value), float(value) - spread, float(value) + spread, samples, len(resampled), biased)


def _checked(a_NGD: np.ndarray, b_MGD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = (each[:, None] if each.ndim == 2 else each for each in (a_NGD, b_MGD))
    if a.ndim != 3 or b.ndim != 3 or a.shape[2] != b.shape[2]:
        raise ValueError(f"expected two sets of the same features, got {a_NGD.shape} and {b_MGD.shape}")
    if not all(np.isfinite(each[start : start + 256]).all() for each in (a, b) for start in range(0, len(each), 256)):
        raise ValueError("features that are not finite: expected numbers")
    return a, b
