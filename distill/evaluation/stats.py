"""Statistics of counted answers: intervals, paired comparisons, repeated sampling, grouped observations.

    score([True, False, True])            # n 3, accuracy 0.667, stderr 0.272, ci95 [0.208, 0.939]
    paired_comparison(student, control)   # n, difference, ci95, p_value, verdict on the student

Everything is closed-form or exact, so nothing here has a seed. Coverage of the 95 % intervals for n = 170 to
600, by summing over every possible outcome (tests/evaluation/test_stats.py does it again):
- one accuracy, Wilson: 93.9 to 96.0 % at every true accuracy between 20 and 80 %, 92.9 to 97.8 % between 1
  and 99 %, 95.0 to 95.1 % on average. Counts are whole numbers: no interval covers 95 % everywhere.
- a paired difference, Tango: 94.5 to 96.8 % with 2 to 60 % of the items in dispute, 95.1 % on average. There
  the percentile bootstrap covered 92.2 to 94.9 % (simulated) and the textbook (Wald) interval 91.9 to 96.5.

With no items at all the values are None (null in JSON), never NaN, and the verdict is INCONCLUSIVE.

Observations come in groups: several answers to one problem, many tokens of one answer. Answers to the same problem,
and tokens of the same answer, are not independent; counting them as if they were makes every interval too narrow.
Here the group is the unit: whole problems are drawn again, whole answers vary.

    bootstrap_interval([0.25, 1.0, 0.5, ...], seed=0)      # mean of per-problem values, 95 %
    sign_flip_p([3, 0, -1, 4, ...])                         # paired test on per-problem differences
    ratio([12.1, 3.4], [80, 40])                            # nats per token of two answers: 0.129, its error

Coverage of the 95 % interval for paired differences of right and wrong, n = 170 to 600, 0 to 60 % of the problems
in dispute: 95.1 % on average over 24 settings, 94.5 % or more in 21 of them, 90.8 % in the worst (n = 170, 7
problems in dispute; Tango's interval in distill/evaluation/stats.py holds 94.5 % there). The simulation runs again
in tests/evaluation/test_stats_clustered.py.

Shapes: P problems or G groups, R resamples.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from distill.errors import UserError


def _quantile(level: float) -> float:
    """z with P(|N(0, 1)| < z) = level."""
    return NormalDist().inv_cdf((1 + level) / 2)


def _as_bool(outcomes: Sequence[bool] | np.ndarray) -> np.ndarray:
    values = np.asarray(outcomes)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise UserError(
            "outcomes must be one list of true or false, one per item; score partial credit elsewhere"
        )
    return values.astype(bool)


# --------------------------------------------------------------------------------------------- one proportion


def wilson_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float] | None:
    """Wilson's score interval for a proportion (JASA 22, 1927): the p that a z-test would not reject."""
    if n == 0:
        return None
    z2 = _quantile(level) ** 2
    centre = (correct + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (correct * (n - correct) / n + z2 / 4)) / (n + z2)
    # Rounding must not push the ends past the possible.
    return max(0.0, centre - half), min(1.0, centre + half)


def binomial_stderr(correct: int, n: int) -> float | None:
    """sqrt(p (1 - p) / n). It is 0 at 0/n and n/n, where only the interval tells what is not known."""
    return math.sqrt(correct * (n - correct) / n) / n if n else None


def score(outcomes: Sequence[bool] | np.ndarray) -> dict[str, Any]:
    """n, accuracy (0 to 1), stderr and ci95 = [low, high] (Wilson) of one model on n items."""
    right = _as_bool(outcomes)
    n, correct = right.size, int(right.sum())
    interval = wilson_interval(correct, n)
    return {
        "n": n,
        "accuracy": correct / n if n else None,
        "stderr": binomial_stderr(correct, n),
        "ci95": list(interval) if interval else None,
    }


# --------------------------------------------------------------------------------- two models, the same items


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test: a fair coin for each item that exactly one of the two got right.

    P(a split at least as uneven as only_a : only_b), at most 1 (McNemar 1947, with binomial probabilities).
    """
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def paired_interval(only_a: int, only_b: int, n: int, level: float = 0.95) -> tuple[float, float] | None:
    """Tango's score interval for accuracy(a) - accuracy(b) on the same n items (Stat. Med. 17, 1998).

    The differences d at which |z(d)| stays within the normal quantile, where z(d) is the observed difference
    minus d over its standard deviation with the nuisance probability at its maximum likelihood given d.
    """
    if n == 0:
        return None
    limit, observed = _quantile(level), (only_a - only_b) / n

    def z(d: float) -> float:
        b = (2 * n - only_a + only_b) * d - only_a - only_b
        nuisance = (math.sqrt(b * b + 8 * n * only_b * d * (1 - d)) - b) / (4 * n)
        variance = (2 * nuisance + d * (1 - d)) / n
        return (observed - d) / math.sqrt(variance) if variance > 0 else 0.0

    def boundary(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(z(middle)) <= limit else (inside, middle)
        return inside

    return boundary(observed, -1.0), boundary(observed, 1.0)


def paired_comparison(
    a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray, level: float = 0.95
) -> dict[str, Any]:
    """Is model a better than model b, both judged on the same items in the same order?

    -> n; difference = accuracy(a) - accuracy(b); ci95 = [low, high] (`paired_interval` at `level`); p_value
    (`mcnemar_p`); verdict on a. One rule: BETTER or WORSE, by the sign of the difference, if p_value <
    1 - level, else INCONCLUSIVE. The exact test is the stricter of the two, so a verdict also means that the
    interval excludes 0 (the reverse need not hold), and equal models are called different in less than
    1 - level of all experiments, whatever n. Raises UserError if a and b have different lengths.
    """
    a, b = _as_bool(a), _as_bool(b)
    if a.size != b.size:
        raise UserError(f"cannot pair {a.size} answers with {b.size}: evaluate both models on the same items")
    n, only_a, only_b = a.size, int((a & ~b).sum()), int((b & ~a).sum())
    interval = paired_interval(only_a, only_b, n, level)
    if interval is None:
        return {"n": 0, "difference": None, "ci95": None, "p_value": None, "verdict": "INCONCLUSIVE"}
    p_value = mcnemar_p(only_a, only_b)
    verdict = "INCONCLUSIVE"
    if p_value < 1 - level:
        verdict = "BETTER" if only_a > only_b else "WORSE"
    difference = (only_a - only_b) / n
    return {"n": n, "difference": difference, "ci95": list(interval), "p_value": p_value, "verdict": verdict}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979): adjusted p-values in the given order, None where none was given.

    Calling those below 0.05 significant keeps the chance of any false call in the family below 5 %.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


# ------------------------------------------------------------------------------- several samples of one item


def pass_at_k(n: int, c: int, k: int) -> float | None:
    """Chance that k of n samples, c of them correct, contain a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1), exact in integers; average it
    over items. None if there are no samples. Raises UserError if k is below 1 or above n.
    """
    if n == 0:
        return None
    _check_k(n, k)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(answers: Sequence[Hashable | None], reference: Hashable, k: int) -> float | None:
    """Chance that a vote among k of the given samples elects `reference`: mean over all subsets of size k.

    `answers` are normalised final answers; None abstains. Ties are broken at random; if all k abstain the
    vote is lost. Majority voting is self-consistency (arXiv 2203.11171); taking every subset instead of the
    first k removes the luck of the draw, as in pass_at_k. None without samples. UserError as in pass_at_k.
    """
    n = len(answers)
    if n == 0:
        return None
    _check_k(n, k)
    votes = Counter(answers)
    abstained, right = votes.pop(None, 0), votes.pop(reference, 0)
    won = 0.0
    for top in range(1, min(right, k) + 1):
        # ways[size, ties]: choices of `size` other samples, no answer above `top` votes and `ties` level.
        ways = {(size, 0): math.comb(abstained, size) for size in range(min(abstained, k - top) + 1)}
        for count in votes.values():
            grown: Counter[tuple[int, int]] = Counter()
            for (size, ties), number in ways.items():
                for taken in range(min(count, top, k - top - size) + 1):
                    grown[size + taken, ties + (taken == top)] += number * math.comb(count, taken)
            ways = grown
        elected = sum(number / (ties + 1) for (size, ties), number in ways.items() if size == k - top)
        won += math.comb(right, top) * elected
    return won / math.comb(n, k)


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise UserError(
            f"k={k} needs at least {max(k, 1)} samples per item and there are {n}; lower k or draw more"
        )


RESAMPLES = 4000  # a percentile's own noise is then a tenth of the interval's half width, or less


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> list[float] | None:
    """[low, high] for the mean of P independent values: percentiles of the means of R resamples of size P.

    The percentiles are those of the expanded percentile interval (Hesterberg, arXiv 1411.5279), which stands
    a little further out, as Student's t does. Equal values have an interval of no width: they say nothing of
    what else there is. None below two values.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        return None
    means = _resampled_means(values, seed, resamples)
    alpha = _expanded(values.size, level)
    low, high = np.quantile(means, [alpha, 1 - alpha])
    return [float(low), float(high)]


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """[R]. There are few distinct values, so how often each is drawn is one multinomial number."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(values.size, counts / values.size, size=resamples)
    return drawn @ distinct / values.size


def _expanded(n: int, level: float) -> float:
    """The percentile to take instead of (1 - level) / 2: Phi(-t sqrt(n / (n - 1))), t with n - 1 degrees.

    The t quantile by its Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), exact to 1 % from n = 6 on.
    """
    z, d = NormalDist().inv_cdf((1 + level) / 2), n - 1
    t = z + (z**3 + z) / (4 * d) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
    return NormalDist().cdf(-t * math.sqrt(n / d))


def mean_stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean of P independent values, s / sqrt(P); None below two."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None


def sign_flip_p(differences: Sequence[int]) -> float:
    """Two-sided paired test on P whole-number differences: P(|sum of +-d_i| >= |sum of d_i|), signs fair coins.

    If neither model is better, each problem's difference is as likely to have either sign (Fisher's
    randomisation test, 1935). Exact: the distribution of the sum is built up problem by problem. With
    differences of -1, 0 and 1 it is McNemar's exact test.
    """
    sizes = [abs(int(d)) for d in differences if d]
    observed, reach = abs(int(sum(differences))), sum(sizes)
    chance = np.zeros(2 * reach + 1)  # of the sum s at index reach + s
    chance[reach] = 1.0
    for size in sizes:
        moved = np.zeros_like(chance)
        moved[size:] += chance[:-size] / 2
        moved[:-size] += chance[size:] / 2
        chance = moved
    tail = chance[: reach - observed + 1].sum() + chance[reach + observed :].sum()
    return min(1.0, float(tail)) if observed else 1.0


def ratio(
    sums: Sequence[float], counts: Sequence[float], level: float = 0.95
) -> tuple[float | None, float | None, list[float] | None]:
    """(estimate, stderr, [low, high]) of sum(sums) / sum(counts) over G groups, with groups as the unit.

    sums[g] is the total over the counts[g] observations of group g. The linearised variance of a ratio,
    G / (G - 1) sum_g (sums_g - r counts_g)^2 / (sum counts)^2 (Cochran, Sampling Techniques, 1977, section
    6.4; the sandwich estimator of a mean with clusters), and the normal quantile. Without observations all
    are None, with one group the estimate alone.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    total, groups = counts.sum(), int((counts > 0).sum())
    if not total:
        return None, None, None
    estimate = float(sums.sum() / total)
    if groups < 2:
        return estimate, None, None
    residual = sums - estimate * counts
    stderr = float(math.sqrt(groups / (groups - 1) * (residual**2).sum()) / total)
    half = NormalDist().inv_cdf((1 + level) / 2) * stderr
    return estimate, stderr, [estimate - half, estimate + half]
