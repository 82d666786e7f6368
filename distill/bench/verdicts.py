"""From runs to a verdict: effects with intervals over seeds, and one rule that says what they support.

    values = {"student": {0: 0.81, 1: 0.79, 2: 0.84}, "control": {0: 0.22, 1: 0.25, 2: 0.21}}    # arm: seed: metric
    found = effect({"student": 1, "control": -1}, values)       # mean, ci95, p_value, per_seed
    judge(found, "greater")                                     # SUPPORTED, as the only claim

Seeds are the unit: a seed draws its own prompts, teacher samples, held-out problems, adapter start and order of
rows, and all arms of a seed share them, so an effect is a contrast taken within each seed and its uncertainty
is how much it varies between seeds: Student's t interval (1908), n - 1 degrees of freedom. With 3 seeds that
interval is wide (4.3 standard errors); it is what three runs can say. An arm trained once enters every seed
with the same value, and the interval then says nothing about training it again.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "SUPPORTED", "NOT SUPPORTED", "INCONCLUSIVE"
FEWEST_SEEDS = 3


# Chance of a wrong verdict: of one claim by its interval, of any in a file after Holm's correction.
SIGNIFICANCE = 0.05
EXPECTATIONS = ("greater", "less", "within")

Values = Mapping[str, Mapping[int, float]]  # term: seed: value


def effect(
    weights: Mapping[str, float], values: Values, relative_to: str | None = None, level: float = 0.95
) -> dict[str, Any]:
    """The contrast sum(weight * value) within each seed, and its mean over seeds with a t interval.

    `relative_to`: divide each seed's contrast by that term's value (relative loss error). Only seeds that every
    term has count. Keys: n, per_seed {seed: value}, mean, ci95 [low, high], p_value (two-sided, of mean 0);
    with one seed the last two are None, with none the mean too.
    """
    terms = [*weights, *([relative_to] if relative_to else [])]
    seeds = sorted(set.intersection(*(set(values[term]) for term in terms)))
    per_seed = {}
    for seed in seeds:
        total = math.fsum(weight * values[term][seed] for term, weight in weights.items())
        per_seed[seed] = total / values[relative_to][seed] if relative_to else total
    return {"n": len(seeds), "per_seed": per_seed, **mean_interval(list(per_seed.values()), level)}


def mean_interval(sample: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """mean, ci95 and p_value of a sample by Student's t. Equal values have an interval of no width."""
    if not sample:
        return {"mean": None, "ci95": None, "p_value": None}
    mean = statistics.fmean(sample)
    if len(sample) == 1:
        return {"mean": mean, "ci95": None, "p_value": None}
    from scipy.stats import t  # only here: half a second of imports

    error = statistics.stdev(sample) / math.sqrt(len(sample))
    half = float(t.ppf((1 + level) / 2, len(sample) - 1)) * error
    if error == 0:
        p_value = 1.0 if mean == 0 else 0.0
    else:
        p_value = float(2 * t.sf(abs(mean) / error, len(sample) - 1))
    return {"mean": mean, "ci95": [mean - half, mean + half], "p_value": p_value}


def hypothesis_verdict(
    found: Mapping[str, Any], expect: str, margin: float = 0.0, p_value: float | None = None
) -> str:
    """The verdict on a hypothesis written down before the run.

    greater: the effect is above `margin`; less: below -`margin`; within: between -`margin` and `margin`.
    SUPPORTED if the whole interval lies where the hypothesis says, NOT SUPPORTED if the whole of it lies
    elsewhere, INCONCLUSIVE otherwise, and always with fewer than three seeds: two runs can agree by accident.
    Of several claims judged together each also needs its corrected `p_value` (Holm's of `verdict_p`) below 0.05.
    """
    if expect not in EXPECTATIONS:
        raise ValueError(f"expect is {expect!r}, not one of {EXPECTATIONS}")
    if (
        found["ci95"] is None
        or found["n"] < FEWEST_SEEDS
        or (p_value is not None and p_value >= SIGNIFICANCE)
    ):
        return INCONCLUSIVE
    low, high = found["ci95"]
    if expect == "less":
        low, high = -high, -low
    if expect == "within":
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
    else:
        inside, outside = low > margin, high < margin
    if inside == outside:  # neither; both cannot be
        return INCONCLUSIVE
    return SUPPORTED if inside else NOT_SUPPORTED


def verdict_p(found: Mapping[str, Any], expect: str, margin: float = 0.0) -> float | None:
    """The p-value of the verdict that an effect points to: below 0.05 just where its 95 % interval alone decides.

    greater, less: two-sided, of an effect of `margin`. within: twice the larger of both one-sided tests (Schuirmann
    1987) where the mean lies inside, and two-sided of the nearer bound where it lies outside. None with fewer
    than three seeds.
    """
    if found["ci95"] is None or found["n"] < FEWEST_SEEDS:
        return None
    low, high = found["ci95"]
    mean, half = (low + high) / 2, (high - low) / 2
    mean = -mean if expect == "less" else mean
    distance = margin - abs(mean) if expect == "within" else mean - margin
    if half == 0:
        return 0.0 if distance else 1.0
    from scipy.stats import t

    freedom = found["n"] - 1
    error = half / float(t.ppf(1 - SIGNIFICANCE / 2, freedom))
    return min(1.0, float(2 * t.sf(abs(distance) / error, freedom)))


def factorial_contrasts(factors: Mapping[str, Sequence[str]]) -> dict[str, dict[tuple[str, ...], float]]:
    """Effects of a two-level factorial design: {name: {cell: weight}}; the first level of a factor is "on".

    `a` is the main effect: mean of the cells with a on minus mean of those without. `a x b` is their
    interaction: half the difference between the effect of a with b on and with b off (Box, Hunter & Hunter
    2005, chapter 5). `together` is the cell with everything on minus the one with everything off, and `synergy`
    what of it is left after the effects that each factor has alone, from the all-off cell, are taken away.
    """
    from itertools import combinations, product

    names = list(factors)
    cells = list(product(*factors.values()))

    def sign(cell: tuple[str, ...], factor: int) -> int:
        return 1 if cell[factor] == factors[names[factor]][0] else -1

    share = 2 / len(cells)
    found = {name: {c: share * sign(c, i) for c in cells} for i, name in enumerate(names)}
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        found[f"{a} x {b}"] = {c: share * sign(c, i) * sign(c, j) for c in cells}
    on = tuple(levels[0] for levels in factors.values())
    off = tuple(levels[1] for levels in factors.values())
    found["together"] = {on: 1.0, off: -1.0}
    alone = [tuple(on[j] if j == i else off[j] for j in range(len(names))) for i in range(len(names))]
    found["synergy"] = {on: 1.0, off: len(names) - 1.0} | dict.fromkeys(alone, -1.0)
    return found


def fit_curve(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Least squares of y = low + (top - low) / (1 + exp(-slope (log10 x - middle))): accuracy against compute.

    A logistic in the logarithm of compute: flat at first, a rise, a ceiling. Keys: low, top, slope, middle,
    rms (root mean squared residual). None where it does not fit: fewer than five points, or no convergence.
    """
    if len(x) < 5:
        return None
    import numpy as np
    from scipy.optimize import curve_fit

    logs, values = np.log10(np.asarray(x, float)), np.asarray(y, float)

    def curve(z, low, top, slope, middle):
        return low + (top - low) / (1 + np.exp(-slope * (z - middle)))

    start = [values.min(), values.max(), 3.0, float(np.median(logs))]
    bounds = ([-0.1, -0.1, 0.1, logs.min() - 2], [1.1, 1.1, 50.0, logs.max() + 2])
    try:
        fitted, _ = curve_fit(curve, logs, values, p0=np.clip(start, *bounds), bounds=bounds, max_nfev=20_000)
    except (RuntimeError, ValueError):
        return None
    rms = float(np.sqrt(np.mean((curve(logs, *fitted) - values) ** 2)))
    return {**dict(zip(("low", "top", "slope", "middle"), map(float, fitted))), "rms": rms}


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (cost, quality) that no other beats: cheaper and at least as good, or better and no dearer.

    From the cheapest on. Means alone decide; whether two neighbours really differ is a claim's business.
    """
    front = []
    for name, (cost, quality) in points.items():
        others = (other for key, other in points.items() if key != name)
        if not any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in others):
            front.append(name)
    return sorted(front, key=lambda name: points[name])
