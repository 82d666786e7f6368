"""Intervals over groups: against enumeration, against hand-made sums, and by their coverage."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.evaluation.stats import bootstrap_interval, mcnemar_p, mean_stderr, ratio, sign_flip_p


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flips_are_the_sum_over_all_signs(differences):
    sums = [
        sum(s * d for s, d in zip(signs, differences))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    expected = np.mean([abs(s) >= abs(sum(differences)) for s in sums])
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_sign_flips_of_single_answers_are_mcnemar():
    for up, down in ((0, 0), (5, 0), (12, 3), (40, 41), (200, 150)):
        differences = [1] * up + [-1] * down + [0] * 30
        assert sign_flip_p(differences) == pytest.approx(mcnemar_p(up, down), rel=1e-9)


def test_bootstrap_draws_whole_groups():
    """Against the plain procedure, resample by resample."""
    values = np.random.default_rng(3).choice([0, 0.25, 0.5, 1.0], size=80)
    rng = np.random.default_rng(4)
    means = [values[rng.integers(0, 80, 80)].mean() for _ in range(20_000)]
    low, high = bootstrap_interval(values)
    np.testing.assert_allclose((low, high), np.quantile(means, [0.0239, 0.9761]), atol=0.01)
    assert (
        bootstrap_interval(values) == bootstrap_interval(values[::-1]) != bootstrap_interval(values, seed=1)
    )
    assert bootstrap_interval([0.5]) is None and bootstrap_interval([0.5, 0.5, 0.5]) == [0.5, 0.5]
    narrow, wide = (bootstrap_interval(values, level=level) for level in (0.8, 0.99))
    assert wide[0] < low < narrow[0] < narrow[1] < high < wide[1]


def test_paired_bootstrap_covers_95_percent_on_average():
    """Right and wrong on the same problems, and shares of four answers; 12 settings of 250 experiments each."""
    rng, coverage = np.random.default_rng(0), []
    for n in (170, 300, 600):
        for p12, p21 in ((0.02, 0.02), (0.1, 0.05), (0.3, 0.3), (0.3, 0.05)):
            draws = rng.multinomial(n, [p12, p21, 1 - p12 - p21], size=250)
            ends = [
                bootstrap_interval(np.repeat([1.0, -1.0, 0.0], counts), seed=i, resamples=800)
                for i, counts in enumerate(draws)
            ]
            coverage.append(
                np.mean([low <= p12 - p21 + 1e-12 and high >= p12 - p21 - 1e-12 for low, high in ends])
            )
    assert 0.94 <= np.mean(coverage) <= 0.96
    assert min(coverage) > 0.91


def test_sampled_accuracy_covers_95_percent_where_counting_answers_does_not():
    """Problems differ in difficulty, so four answers to each are far from independent."""
    rng, covered, naive = np.random.default_rng(1), 0, 0
    for experiment in range(500):
        chance = rng.beta(0.4, 0.4, size=200)  # mean 0.5: problems are mostly solved or mostly not
        share = rng.binomial(4, chance) / 4
        low, high = bootstrap_interval(share, seed=experiment, resamples=1000)
        covered += low <= 0.5 <= high
        half = 1.96 * np.sqrt(share.mean() * (1 - share.mean()) / 800)
        naive += abs(share.mean() - 0.5) <= half
    assert 0.93 <= covered / 500 <= 0.97
    assert naive / 500 < 0.8


def test_ratio_by_hand():
    """Two answers of 2 and 3 tokens with totals 1 and 3: 4/5, residuals -0.6 and 0.6."""
    estimate, stderr, (low, high) = ratio([1.0, 3.0], [2, 3])
    assert estimate == pytest.approx(0.8)
    assert stderr == pytest.approx(np.sqrt(2 * (0.36 + 0.36)) / 5)
    assert (low + high) / 2 == pytest.approx(0.8) and high - low == pytest.approx(2 * 1.959964 * stderr)
    assert ratio([], []) == (None, None, None) and ratio([2.0, 0.0], [4, 0]) == (0.5, None, None)
    # Equal sizes: the standard error of a mean of group means.
    assert ratio([1, 2, 6], [2, 2, 2])[1] == pytest.approx(mean_stderr([0.5, 1, 3]))


def test_ratio_covers_where_tokens_of_an_answer_are_alike():
    rng, covered, naive = np.random.default_rng(2), 0, 0
    for _ in range(600):
        sizes = rng.integers(5, 40, size=120)
        level = rng.normal(1.0, 0.5, size=120)
        sums = level * sizes
        _, _stderr, (low, high) = ratio(sums, sizes)
        covered += low <= 1.0 <= high
        naive += abs(sums.sum() / sizes.sum() - 1) <= 1.96 * 0.5 / np.sqrt(sizes.sum())
    assert 0.92 <= covered / 600 <= 0.97
    assert naive / 600 < 0.6
