"""Intervals by their exact coverage, tests and estimators against enumeration."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.evaluation.stats import (
    binomial_stderr,
    holm,
    majority_at_k,
    mcnemar_p,
    paired_comparison,
    paired_interval,
    pass_at_k,
    score,
    wilson_interval,
)

EPS = 1e-12


def outcomes(only_a, only_b, n, both=0):
    """Two boolean arrays with the given disagreement."""
    a = np.array([True] * only_a + [False] * only_b + [True] * both + [False] * (n - only_a - only_b - both))
    b = np.array([False] * only_a + [True] * only_b + [True] * both + [False] * (n - only_a - only_b - both))
    return a, b


def log_factorials(n):
    return np.array([math.lgamma(i + 1) for i in range(n + 1)])


# --------------------------------------------------------------------------------------------- one proportion


def wilson_coverage(n, accuracies):
    ends = np.array([wilson_interval(c, n) for c in range(n + 1)])
    logs, c = log_factorials(n), np.arange(n + 1)
    coverage = []
    for p in accuracies:
        chance = np.exp(logs[n] - logs - logs[::-1] + c * np.log(p) + (n - c) * np.log1p(-p))
        coverage.append(chance[(ends[:, 0] <= p) & (p <= ends[:, 1])].sum())
    return np.array(coverage)


@pytest.mark.parametrize("n", [170, 210, 300, 600])
def test_wilson_coverage_is_exact_up_to_whole_numbers(n):
    # Coverage jumps where an interval ends, so its extremes lie just beside the ends.
    ends = np.array([wilson_interval(c, n) for c in range(n + 1)]).ravel()
    beside = np.concatenate([ends - 1e-9, ends + 1e-9])
    middle = wilson_coverage(n, beside[(beside > 0.2) & (beside < 0.8)])
    assert middle.min() > 0.938 and middle.max() < 0.961
    # Towards 0 and 1 few counts are likely, so the jumps are larger.
    wide = wilson_coverage(n, beside[(beside > 0.01) & (beside < 0.99)])
    assert wide.min() > 0.929 and wide.max() < 0.979
    assert wilson_coverage(n, np.linspace(0.01, 0.99, 491)).mean() == pytest.approx(0.95, abs=0.0015)


def test_coverage_by_simulation_agrees_with_the_sum():
    draws = np.random.default_rng(0).binomial(300, 0.37, size=20_000)
    ends = np.array([wilson_interval(c, 300) for c in range(301)])[draws]
    simulated = ((ends[:, 0] <= 0.37) & (ends[:, 1] >= 0.37)).mean()
    assert simulated == pytest.approx(wilson_coverage(300, [0.37])[0], abs=0.005)


def test_wilson_ends_solve_the_score_equation():
    z = 1.959963984540054
    for correct, n in ((3, 10), (0, 25), (25, 25), (171, 300)):
        for p in wilson_interval(correct, n):
            if 0 < p < 1:
                assert abs(correct / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), rel=1e-9)
    assert wilson_interval(0, 25)[0] == 0 and wilson_interval(25, 25)[1] == 1
    # Published example: Newcombe 1998, 81 of 263, 95 %: 0.2553 to 0.3662.
    np.testing.assert_allclose(wilson_interval(81, 263), (0.2553, 0.3662), atol=5e-5)


@given(n=st.integers(1, 700), share=st.floats(0, 1))
def test_wilson_contains_the_estimate_and_mirrors(n, share):
    correct = round(n * share)
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n + EPS and correct / n - EPS <= high <= 1
    mirrored = wilson_interval(n - correct, n)
    np.testing.assert_allclose((low, high), (1 - mirrored[1], 1 - mirrored[0]), atol=1e-12)
    narrow = wilson_interval(correct, n, level=0.8)
    assert low <= narrow[0] + EPS and narrow[1] <= high + EPS


def test_score():
    found = score([True] * 30 + [False] * 70)
    assert found["n"] == 100 and found["accuracy"] == 0.3
    assert found["stderr"] == pytest.approx(math.sqrt(0.3 * 0.7 / 100)) == binomial_stderr(30, 100)
    assert found["ci95"] == list(wilson_interval(30, 100))
    assert score(np.array([1, 0]))["accuracy"] == 0.5
    with pytest.raises(UserError, match="true or false"):
        score([0.5, 1.0])


def test_no_items_is_none_not_nan():
    assert score([]) == {"n": 0, "accuracy": None, "stderr": None, "ci95": None}
    assert paired_comparison([], []) == {
        "n": 0,
        "difference": None,
        "ci95": None,
        "p_value": None,
        "verdict": "INCONCLUSIVE",
    }
    assert (
        wilson_interval(0, 0) is None and binomial_stderr(0, 0) is None and paired_interval(0, 0, 0) is None
    )
    assert pass_at_k(0, 0, 1) is None and majority_at_k([], "x", 1) is None


# ----------------------------------------------------------------------------------------------- paired tests


def likeliest_nuisance(only_a, only_b, n, d):
    """p21 maximising the multinomial likelihood given p12 = p21 + d, on a fine grid."""
    low, high = max(0.0, -d), (1 - d) / 2
    q = np.linspace(low, high, 200_003)[1:-1]
    likelihood = (
        only_a * np.log(q + d)
        + only_b * np.log(q)
        + (n - only_a - only_b) * np.log(np.maximum(1 - 2 * q - d, 1e-300))
    )
    return q[likelihood.argmax()]


@pytest.mark.parametrize("only_a, only_b, n", [(12, 5, 60), (30, 10, 200), (7, 7, 100), (3, 40, 170)])
def test_paired_interval_ends_solve_the_score_equation(only_a, only_b, n):
    for d in paired_interval(only_a, only_b, n):
        q = likeliest_nuisance(only_a, only_b, n, d)
        variance = (2 * q + d - d * d) / n
        assert abs((only_a - only_b) / n - d) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-3)


def test_paired_interval_at_the_edges():
    assert paired_interval(5, 0, 5)[1] == 1.0 and paired_interval(0, 5, 5)[0] == -1.0
    low, high = paired_interval(0, 0, 200)
    assert -0.03 < low < 0 < high < 0.03  # no disagreement is not certainty
    assert low == pytest.approx(-high)


@settings(max_examples=200)
@given(data=st.data(), n=st.integers(1, 700))
def test_paired_interval_contains_the_estimate_and_mirrors(data, n):
    only_a = data.draw(st.integers(0, n))
    only_b = data.draw(st.integers(0, n - only_a))
    low, high = paired_interval(only_a, only_b, n)
    assert -1 <= low <= (only_a - only_b) / n <= high <= 1
    np.testing.assert_allclose(paired_interval(only_b, only_a, n), (-high, -low), atol=1e-9)


def test_interval_excludes_zero_exactly_when_the_score_test_rejects():
    for only_a, only_b in itertools.product(range(0, 40, 3), repeat=2):
        if only_a + only_b:
            low, high = paired_interval(only_a, only_b, 170)
            rejected = abs(only_a - only_b) / math.sqrt(only_a + only_b) > 1.959964
            assert rejected == (not low <= 0 <= high)


@pytest.mark.parametrize(
    "n, p12, p21",
    [(170, 0.02, 0.02), (170, 0.03, 0.01), (170, 0.1, 0.05), (170, 0.3, 0.05), (170, 0.05, 0.0),
     (210, 0.15, 0.05), (210, 0.3, 0.3), (300, 0.05, 0.05), (300, 0.1, 0.1), (300, 0.4, 0.02),
     (600, 0.03, 0.01), (600, 0.2, 0.1)],
)  # fmt: skip
def test_paired_coverage(n, p12, p21):
    """The chance of all (only_a, only_b) whose interval holds the true difference, far tails cut."""
    logs = log_factorials(n)
    covered = total = 0.0
    for b in range(n + 1):
        for c in range(n - b + 1 if p21 else 1):
            log_chance = logs[n] - logs[b] - logs[c] - logs[n - b - c] + b * math.log(p12)
            log_chance += (c * math.log(p21) if c else 0) + (n - b - c) * math.log(1 - p12 - p21)
            if log_chance < -14:
                continue
            total += math.exp(log_chance)
            low, high = paired_interval(b, c, n)
            covered += math.exp(log_chance) * (low <= p12 - p21 <= high)
    assert total > 0.995
    coverage = covered / total
    assert coverage >= 0.94 and coverage <= (0.96 if p21 else 0.97)


def test_mcnemar_is_the_binomial_sum():
    for only_a, only_b in itertools.product(range(9), repeat=2):
        m = only_a + only_b
        sides = [sum(toss) for toss in itertools.product((0, 1), repeat=m)] if m <= 10 else None
        if sides is None:
            continue
        extreme = sum(abs(heads - m / 2) >= abs(only_a - m / 2) for heads in sides)
        assert mcnemar_p(only_a, only_b) == pytest.approx(extreme / 2**m)
    assert mcnemar_p(0, 0) == 1.0 and mcnemar_p(7, 7) == 1.0
    # Larger, against exact fractions.
    exact = 2 * sum(Fraction(math.comb(500, i), 2**500) for i in range(211))
    assert mcnemar_p(290, 210) == pytest.approx(float(exact), rel=1e-12)


def test_verdicts():
    a, b = outcomes(40, 15, 300, both=100)
    won = paired_comparison(a, b)
    assert won["verdict"] == "BETTER" and won["difference"] == pytest.approx(25 / 300) and won["n"] == 300
    assert won["p_value"] == mcnemar_p(40, 15) and won["ci95"] == list(paired_interval(40, 15, 300))
    lost = paired_comparison(b, a)
    assert lost["verdict"] == "WORSE" and lost["p_value"] == won["p_value"]
    assert lost["difference"] == -won["difference"]
    # 4 : 0 excludes 0 from the interval, and yet it is four coins falling alike: p = 0.125.
    a, b = outcomes(4, 0, 200)
    close = paired_comparison(a, b)
    assert close["ci95"][0] > 0 and close["p_value"] == 0.125 and close["verdict"] == "INCONCLUSIVE"
    # The level is part of the rule.
    a, b = outcomes(20, 8, 200)
    assert paired_comparison(a, b)["verdict"] == "BETTER"
    assert paired_comparison(a, b, level=0.99)["verdict"] == "INCONCLUSIVE"


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_a_verdict_implies_an_interval_without_zero(level):
    for disputed in range(1, 120):
        losing = [w for w in range(disputed // 2 + 1) if mcnemar_p(w, disputed - w) < 1 - level]
        for n in (disputed, 200, 5000) if losing else ():
            assert paired_interval(max(losing), disputed - max(losing), n, level)[1] < 0


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_model_is_never_better_than_itself(right):
    found = paired_comparison(right, right)
    assert found["verdict"] == "INCONCLUSIVE" and found["difference"] == 0 and found["p_value"] == 1
    assert found["ci95"][0] < 0 < found["ci95"][1]


def test_equal_models_are_rarely_called_different():
    generator = np.random.default_rng(1)
    for n, accuracy, same in ((170, 0.5, 0.0), (300, 0.8, 0.5), (600, 0.3, 0.9)):
        wrong_calls = 0
        for _ in range(600):
            shared, copied = generator.random(n) < accuracy, generator.random(n) < same
            a, b = (np.where(copied, shared, generator.random(n) < accuracy) for _ in range(2))
            wrong_calls += paired_comparison(a, b)["verdict"] != "INCONCLUSIVE"
        assert wrong_calls / 600 < 0.05


def test_pairs_must_be_pairs():
    with pytest.raises(UserError, match="cannot pair 3 answers with 4"):
        paired_comparison([True] * 3, [True] * 4)
    with pytest.raises(UserError, match="cannot pair 3 answers with 1"):
        paired_comparison([True] * 3, [True])


def test_holm():
    # Hand-made: sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made non-decreasing.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []
    assert holm([None, 0.01, None, 0.2]) == [None, 0.02, None, 0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, level):
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = set()
    for rank, i in enumerate(order):
        if p_values[i] * (len(p_values) - rank) > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


# -------------------------------------------------------------------------------------------- several samples


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(s) for s in itertools.combinations(samples, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_survives_large_numbers():
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)
    assert pass_at_k(200, 3, 1) == pytest.approx(3 / 200)
    for k in (0, 6):
        with pytest.raises(UserError, match=f"k={k}"):
            pass_at_k(5, 1, k)
        with pytest.raises(UserError, match=f"k={k}"):
            majority_at_k(["a"] * 5, "a", k)


@settings(max_examples=150, deadline=None)
@given(answers=st.lists(st.sampled_from(["right", "b", "c", None]), min_size=1, max_size=8), data=st.data())
def test_majority_at_k_is_the_mean_over_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    won = []
    for subset in itertools.combinations(answers, k):
        votes = Counter(answer for answer in subset if answer is not None)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        won.append(("right" in winners) / len(winners) if winners else 0.0)
    assert majority_at_k(answers, "right", k) == pytest.approx(sum(won) / len(won))


def test_majority_of_one_is_accuracy_and_a_clear_majority_wins():
    assert majority_at_k(["7", "7", "8", None], "7", 1) == 0.5
    assert majority_at_k(["7"] * 3 + ["8"] * 2, "7", 5) == 1.0
    assert majority_at_k(["7"] * 40 + ["8"] * 12 + ["9"] * 12, "7", 16) > 0.98
