"""Statistics against closed forms and independent slow versions, and the coverage of their intervals."""

import numpy as np
import pytest
import scipy.linalg

from latent_shift.evaluation import statistics


def sample_exactly(rng, num: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Samples that have this mean and covariance to rounding."""
    x = rng.standard_normal((num, len(mean)))
    x = x - x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def spread(rng, dims: int) -> np.ndarray:
    root = rng.standard_normal((dims, dims + 3))
    return root @ root.T / dims


def test_frechet_equals_closed_form_of_gaussians():
    rng = np.random.default_rng(0)
    means, deviations = rng.standard_normal((2, 5)), rng.uniform(0.2, 3, (2, 5))
    a, b = (
        sample_exactly(rng, 40, mean, np.diag(deviation**2))
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert statistics.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert statistics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    shared = np.linalg.qr(rng.standard_normal((5, 5)))[0]  # both turned alike: nothing changes
    assert statistics.frechet(a @ shared, b @ shared) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("num", "other", "dims"), [(60, 200, 10), (500, 65, 64)])
def test_frechet_equals_matrix_square_root(num, other, dims):
    rng = np.random.default_rng(1)
    a = rng.standard_normal((num, dims)) @ spread(rng, dims) + rng.standard_normal(dims)
    b = rng.standard_normal((other, dims)) @ spread(rng, dims)
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s_a @ s_b)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s_a + s_b - 2 * root.real)
    assert statistics.frechet(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(expected, rel=1e-4)
    assert statistics.frechet(a, b) == pytest.approx(expected, rel=1e-7)
    assert statistics.frechet(a, b) == pytest.approx(statistics.frechet(b, a))


def test_statistics_refuse_too_few_samples_and_wrong_input():
    rng = np.random.default_rng(0)
    with pytest.raises(
        ValueError, match="8 samples of 8 features: the Frechet distance needs more samples than features"
    ):
        statistics.frechet(rng.standard_normal((8, 8)), rng.standard_normal((20, 8)))
    with pytest.raises(ValueError, match="two sets of the same features"):
        statistics.kernel_estimate(rng.standard_normal((8, 8)), rng.standard_normal((8, 7)))
    with pytest.raises(ValueError, match="three samples"):
        statistics.kernel_estimate(rng.standard_normal((2, 8)), rng.standard_normal((8, 8)))
    # 96 frames are 12 samples.
    with pytest.raises(statistics.MeasureUnavailable, match="12 clips of 20 features"):
        statistics.frechet_estimate(rng.standard_normal((12, 8, 20)), rng.standard_normal((100, 8, 20)))
    with pytest.raises(statistics.MeasureUnavailable, match="5 clips of 5 classes"):
        statistics.inception_score(np.eye(5))
    with pytest.raises(statistics.MeasureUnavailable, match="one clip has no interval"):
        statistics.estimate(np.ones(1))
    with pytest.raises(ValueError, match="finite features"):
        statistics.frechet(np.full((20, 2), np.nan), rng.standard_normal((20, 2)))
    with pytest.raises(ValueError, match="row of probabilities"):
        statistics.inception_score(rng.standard_normal((4, 3)))


def test_kernel_estimate_equals_double_sum():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((7, 4)), rng.standard_normal((5, 4)) + 0.5
    kernel = lambda x, y: (float(x @ y) / 4 + 1) ** 3  # noqa: E731
    within = [
        sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j)
        / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    between = sum(kernel(x, y) for x in a for y in b) / 35
    found = statistics.kernel_estimate(a, b)
    assert found.value == pytest.approx(sum(within) - 2 * between, rel=1e-10)
    assert found.low < found.value < found.high


def test_kernel_estimate_never_pairs_frames_of_one_clip():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((5, 3, 4)), rng.standard_normal((6, 3, 4)) + 0.3
    kernel = lambda x, y: (float(x @ y) / 4 + 1) ** 3  # noqa: E731
    pairs = lambda p, q, apart: np.mean(  # noqa: E731
        [
            kernel(x, y)
            for i, u in enumerate(p)
            for j, w in enumerate(q)
            if not (apart and i == j)
            for x in u
            for y in w
        ]
    )
    found = statistics.kernel_estimate(a, b)
    assert found.value == pytest.approx(
        pairs(a, a, True) + pairs(b, b, True) - 2 * pairs(a, b, False), rel=1e-10
    )
    # Clips whose frames stand still.
    alike = [rng.standard_normal((2, 12, 1, 4)).repeat(8, axis=2) for _ in range(300)]
    alone, together = (
        [statistics.kernel_estimate(*pair.reshape(2, -1, rows, 4), resamples=2).value for pair in alike]
        for rows in (1, 8)
    )
    assert abs(np.mean(together)) < 3 * np.std(together) / np.sqrt(300) < np.mean(alone)


def test_kernel_estimate_subsamples_large_sets():
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((2000, 2, 6)), 1.3 * rng.standard_normal((2000, 2, 6))
    every, some = (
        statistics.kernel_estimate(a, b, resamples=40, max_clips=max_clips) for max_clips in (5000, 400)
    )
    assert every.value != some.value and some.low < every.value < some.high
    assert some.high - some.low > 1.5 * (every.high - every.low)


def test_kernel_estimate_is_unbiased_and_frechet_is_not():
    rng = np.random.default_rng(3)
    pairs = [rng.standard_normal((2, 12, 4)) for _ in range(300)]
    kernels = [statistics.kernel_estimate(a, b, resamples=2).value for a, b in pairs]
    assert abs(np.mean(kernels)) < 3 * np.std(kernels) / np.sqrt(300)
    # The sets of each pair have the same distribution.
    assert min(statistics.frechet(a, b) for a, b in pairs) > 0.1
    frechet, kernel = (
        each(*pairs[0], resamples=10) for each in (statistics.frechet_estimate, statistics.kernel_estimate)
    )
    assert frechet.biased and not kernel.biased


def test_kernel_estimate_never_pairs_clips_of_one_caption():
    """Clips of one caption are similar; pairing them would bias the distance. They are resampled together."""
    rng, kernel = np.random.default_rng(13), lambda x, y: (x @ y.T / 4 + 1) ** 3
    a, b, units = rng.standard_normal((6, 4)), rng.standard_normal((3, 4)), np.array([0, 1, 2, 2, 0, 1])
    apart, others = units[:, None] != units, units[:, None] != np.arange(3)
    expected = (
        kernel(a, a)[apart].mean()
        + kernel(b, b)[~np.eye(3, dtype=bool)].mean()
        - 2 * kernel(a, b)[others].mean()
    )
    found = statistics.kernel_estimate(a, b, cluster_ids=units, other_cluster_ids=np.arange(3), resamples=50)
    assert found.value == pytest.approx(expected, rel=1e-10) and found.samples == 3
    alike, wrong = [], []
    for _ in range(300):
        captions = rng.standard_normal((12, 4))
        x, y = (captions + 0.3 * rng.standard_normal((12, 4)) for _ in range(2))
        alike.append(statistics.kernel_estimate(x, y, other_cluster_ids=np.arange(12), resamples=2).value)
        wrong.append(statistics.kernel_estimate(x, y, resamples=2).value)
    assert abs(np.mean(alike)) < 3 * np.std(alike) / np.sqrt(300) < -np.mean(wrong)
    same = statistics.kernel_estimate(captions, captions, other_cluster_ids=np.arange(12))
    assert same.value == pytest.approx(0, abs=1e-12) and same.high - same.low == pytest.approx(0, abs=1e-12)
    some = statistics.kernel_estimate(
        np.repeat(x, 50, axis=0),
        y,
        cluster_ids=np.repeat(np.arange(12), 50),
        other_cluster_ids=np.arange(12),
        max_clips=100,
    )
    # The mean runs over the sampled clips, not over all of each cluster.
    whole = statistics.kernel_estimate(x, y, other_cluster_ids=np.arange(12))
    assert some.samples == 12 and some.low < whole.value < some.high


def test_inception_score_equals_mean_divergence():
    classes = np.eye(5)[np.arange(20) % 5]
    assert statistics.inception_score(classes).value == pytest.approx(5)
    assert statistics.inception_score(np.full((20, 5), 0.2)).value == pytest.approx(1)
    p = np.random.default_rng(0).dirichlet(np.ones(5), 30)
    expected = np.exp(np.mean([scipy.stats.entropy(row, p.mean(axis=0)) for row in p]))
    found = statistics.inception_score(p)
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high and found.samples == 30
    frames = np.repeat(p[:, None], 4, axis=1)
    together, alone = statistics.inception_score(frames), statistics.inception_score(frames.reshape(-1, 5))
    assert together.value == pytest.approx(expected) and together.samples == 30
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_inception_score_interval_covers_value_of_many_samples():
    rng, held = np.random.default_rng(8), 0
    draw = lambda num: 0.9 * np.eye(6)[rng.integers(6, size=num)] + 0.1 / 6  # noqa: E731
    truth = statistics.inception_score(draw(200_000), resamples=2).value
    for _ in range(100):
        found = statistics.inception_score(draw(80))
        held += found.low <= truth <= found.high
    assert held >= 85


def test_gaussian_and_kernel_in_blocks_equal_whole():
    rng = np.random.default_rng(9)
    features, counts = rng.standard_normal((20, 2, 5)), rng.integers(0, 4, 20)
    mean, root = statistics._gaussian(features, counts, rows=7)
    every = np.repeat(features, counts, axis=0).reshape(-1, 5)
    np.testing.assert_allclose(mean, every.mean(axis=0))
    np.testing.assert_allclose(root.T @ root, np.cov(every, rowvar=False))
    a, b = rng.standard_normal((9, 3, 4)), rng.standard_normal((8, 3, 4))
    whole = ((a.reshape(27, 4) @ b.reshape(24, 4).T / 4 + 1) ** 3).reshape(9, 3, 8, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(statistics._kernel(a, b), whole)


def test_estimate_interval_covers_truth_as_often_as_stated():
    rng, held = np.random.default_rng(4), 0
    for _ in range(200):
        found = statistics.estimate(rng.exponential(size=60), resamples=300)
        held += found.low <= 1 <= found.high
    assert 175 <= held <= 198  # 95 % less what a bootstrap of 60 skewed samples falls short


def test_frechet_estimate_resamples_frames_of_a_clip_together():
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((30, 1, 3)) + 0.01 * rng.standard_normal((30, 8, 3)) for _ in range(2))
    alone, together = (
        statistics.frechet_estimate(a.reshape(240, 3), b.reshape(240, 3)),
        statistics.frechet_estimate(a, b),
    )
    assert alone.value == pytest.approx(together.value)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)  # 30 clips, not 240 samples


def test_estimate_of_median_has_interval():
    found = statistics.estimate(np.arange(101), statistics.median)
    assert found.value == 50
    assert 30 < found.low < 50 < found.high < 70


def test_clusters_are_resampled_together_and_never_paired():
    """Twenty clips of each prompt are worth no more samples than there are prompts."""
    rng = np.random.default_rng(10)
    units, words = np.repeat(np.arange(30), 20), rng.standard_normal((30, 3))
    order = rng.permutation(600)
    units, x = units[order], (words[units] + 0.1 * rng.standard_normal((600, 3)))[order]
    apart, together = statistics.estimate(x[:, 0]), statistics.estimate(x[:, 0], cluster_ids=units)
    assert (apart.samples, together.samples) == (600, 30) and apart.value == together.value
    assert 3 < (together.high - together.low) / (apart.high - apart.low) < 6  # the root of twenty
    other = rng.standard_normal((600, 3))
    for measure in (statistics.frechet_estimate, statistics.kernel_estimate):
        apart, together = measure(x, other, resamples=40), measure(x, other, cluster_ids=units, resamples=40)
        assert together.samples == 30 and together.high - together.low > 1.5 * (apart.high - apart.low), (
            measure
        )
    kernel = (x @ x.T / 3 + 1) ** 3
    between, within = ((x @ other.T / 3 + 1) ** 3).mean(), (other @ other.T / 3 + 1) ** 3
    expected = (
        kernel[units[:, None] != units].mean() + (within.sum() - np.trace(within)) / (600 * 599) - 2 * between
    )
    assert together.value == pytest.approx(expected)
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    apart, together = statistics.inception_score(p), statistics.inception_score(p, cluster_ids=units)
    assert together.value == apart.value and together.high - together.low > 2 * (apart.high - apart.low)


def test_averages_equal_those_of_repeated_clips():
    rng = np.random.default_rng(11)
    x, times = rng.uniform(0.5, 2, 9), rng.integers(0, 3, 9)
    often = np.repeat(x, times)
    assert statistics.mean(x, times) == pytest.approx(often.mean())
    assert statistics.median(x, times) == pytest.approx(np.median(often))
    assert statistics.factor(x, times) == pytest.approx(np.exp(np.abs(np.log(often)).mean()))
    pairs = rng.uniform(size=(9, 2))
    missed, there = np.repeat(pairs, times, axis=0).sum(axis=0)
    assert statistics.r_squared(pairs, times) == pytest.approx(1 - missed / there)


def test_difference_interval_ignores_what_both_sets_share():
    rng, held = np.random.default_rng(12), 0
    for _ in range(100):
        shared = rng.standard_normal(60)
        a, b = shared + 0.1 * rng.standard_normal(60) + 0.05, shared + 0.1 * rng.standard_normal(60)
        found = statistics.difference(a, b, resamples=300)
        held += found.low <= 0.05 <= found.high
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert found.high - found.low < 0.1 < statistics.estimate(a).high - statistics.estimate(a).low
    assert held >= 87
    ratios = statistics.difference(np.exp(a), np.exp(b), statistics.factor)
    assert ratios.value == pytest.approx(np.exp(np.abs(a).mean()) - np.exp(np.abs(b).mean()))
    pairs = rng.uniform(size=(2, 9, 2))
    assert statistics.difference(*pairs, statistics.r_squared).value == pytest.approx(
        np.diff([1 - p[:, 0].sum() / p[:, 1].sum() for p in pairs[::-1]])[0]
    )
