"""From runs to a verdict: effects with intervals over seeds, and one rule that says what they support.

    values = {"student": {0: 0.81, 1: 0.79, 2: 0.84}, "control": {0: 0.22, 1: 0.25, 2: 0.21}}    # arm: seed: metric
    found = effect({"student": 1, "control": -1}, values)       # mean, ci95, p_value, per_seed
    hypothesis_verdict(found, "greater")                        # SUPPORTED, as the only claim

Seeds are the unit: a seed draws its own prompts, teacher samples, held-out problems, adapter start and order of
rows, and all arms of a seed share them, so an effect is a contrast taken within each seed and its uncertainty
is how much it varies between seeds: Student's t interval (1908), n - 1 degrees of freedom. With 3 seeds that
interval is wide (4.3 standard errors); it is what three runs can say. An arm trained once enters every seed
with the same value, and the interval then says nothing about training it again.

Two kinds of numbers need more than that. *Shares of counted problems* (`counts`): seeds that agree by chance, or
that all solve everything, have an interval of no width, or one beyond 100 %. There the standard error is at least what
counting allows (Agresti and Caffo 2000: one right and one wrong answer added to each arm), the interval at least the
one of Wilson's bounds put together (MOVER, Zou and Donner 2008), and neither leaves what is possible.
*Relative effects* are ratios of positive numbers: they are averaged as logarithms, so none lies below -100 %.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.stats import wilson_interval

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "SUPPORTED", "NOT SUPPORTED", "INCONCLUSIVE"
EQUIVALENT = "EQUIVALENT"
FEWEST_SEEDS = 3


# Chance of a wrong verdict: of one claim by its interval, of any in a family after Holm's correction.
SIGNIFICANCE = 0.05
POWER = 0.8  # chance with which an effect of the size called detectable is found
EXPECTATIONS = ("greater", "less", "within")

Values = Mapping[str, Mapping[int, float]]  # term: seed: value
Counts = Mapping[str, Mapping[int, tuple[int, int]]]  # term: seed: (right, of so many)


def effect(
    weights: Mapping[str, float],
    values: Values,
    relative_to: str | None = None,
    level: float = 0.95,
    counts: Counts | None = None,
    share: bool = False,
) -> dict[str, Any]:
    """The contrast sum(weight * value) within each seed, and its mean over seeds with a t interval.

    `relative_to`: the term to divide by; of two terms of weight 1 and -1 the share by which the first differs, its
    mean the geometric one. Only seeds that every term has count. `share`: the values are shares, 0 to 1, and
    `counts` what was counted for those terms that have it. Keys: n, per_seed {seed: value}, mean, ci95 [low, high],
    p_value (two-sided, of no effect), `scale` (linear or log: on which of them `estimate`, its `stderr` and
    `freedom` are) and `bounded` (the interval is what counting allows); with one seed all but per_seed, mean and
    n are None, with none the mean too.
    """
    terms = [*weights, *([relative_to] if relative_to else [])]
    seeds = sorted(set.intersection(*(set(values[term]) for term in terms)))
    per_seed = {}
    for seed in seeds:
        total = math.fsum(weight * values[term][seed] for term, weight in weights.items())
        per_seed[seed] = total / values[relative_to][seed] if relative_to else total
    sample = list(per_seed.values())
    logs = bool(relative_to) and all(value > -1 for value in sample)  # a ratio of 0 has no logarithm
    found = _interval([math.log1p(value) for value in sample] if logs else sample, level)
    found |= {"scale": "log" if logs else "linear", "bounded": False}
    if logs and found["mean"] is not None:
        found["mean"] = math.expm1(found["mean"])
        found["ci95"] = found["ci95"] and [math.expm1(bound) for bound in found["ci95"]]
    elif share and found["ci95"] is not None:
        _bound(found, weights, counts or {}, seeds, level)
    return {"n": len(seeds), "per_seed": per_seed, **found}


def _interval(sample: Sequence[float], level: float) -> dict[str, Any]:
    """`mean_interval` and what it is made of."""
    n = len(sample)
    error = statistics.stdev(sample) / math.sqrt(n) if n > 1 else None
    mean = statistics.fmean(sample) if sample else None
    known = {"estimate": mean, "stderr": error, "freedom": n - 1 if n > 1 else None}
    return {**mean_interval(sample, level), **known}


def _bound(found: dict, weights: Mapping[str, float], counts: Counts, seeds: list[int], level: float) -> None:
    """Hold an effect of shares to what counting allows and to what is possible. Changes `found`.

    Only where Student's interval has no width or leaves the possible: elsewhere the seeds show what problems and
    training make an effect vary, paired as they are, and bounds that know of no pairs would be far too wide.
    """
    low, high = found["ci95"]
    least, most = (math.fsum(w for w in weights.values() if sign * w > 0) for sign in (-1, 1))
    if low < high and least <= low and high <= most:
        return
    if all(term in counts for term in weights):
        below = above = variance = 0.0
        for term, weight in weights.items():
            right, of = (sum(column) for column in zip(*(counts[term][seed] for seed in seeds)))
            bounds, share = wilson_interval(right, of, level), right / of
            down, up = ((share - bounds[0]), (bounds[1] - share))[:: 1 if weight > 0 else -1]
            below, above = below + (weight * down) ** 2, above + (weight * up) ** 2
            adjusted = (right + 1) / (of + 2)
            variance += weight**2 * adjusted * (1 - adjusted) / (of + 2)
        found["bounded"] = True
        found["stderr"] = max(found["stderr"], math.sqrt(variance))
        half = _t_quantile((1 + level) / 2, found["freedom"]) * found["stderr"]
        low = min(low, found["mean"] - half, found["mean"] - math.sqrt(below))
        high = max(high, found["mean"] + half, found["mean"] + math.sqrt(above))
        found["p_value"] = _two_sided(found, 0.0)
    found["ci95"] = [max(low, least), min(high, most)]


def mean_interval(sample: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """mean, ci95 and p_value of a sample by Student's t. Equal values have an interval of no width."""
    if not sample:
        return {"mean": None, "ci95": None, "p_value": None}
    mean = statistics.fmean(sample)
    if len(sample) == 1:
        return {"mean": mean, "ci95": None, "p_value": None}
    error = statistics.stdev(sample) / math.sqrt(len(sample))
    half = _t_quantile((1 + level) / 2, len(sample) - 1) * error
    p_value = _two_sided({"estimate": mean, "stderr": error, "freedom": len(sample) - 1}, 0.0)
    return {"mean": mean, "ci95": [mean - half, mean + half], "p_value": p_value}


def _t_quantile(share: float, freedom: int) -> float:
    # Only here and below: an import. What scipy.stats.t calls, without its half a second of imports and a
    # hundred times the work a number.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


def _two_sided(found: Mapping[str, Any], bound: float) -> float:
    """p of an effect of `bound`, on the scale of `estimate`."""
    return min(1.0, 2 * min(_one_sided(found, bound, 1), _one_sided(found, bound, -1)))


def _one_sided(found: Mapping[str, Any], bound: float, side: int) -> float:
    """p of an effect at or below `bound` (side 1: it is above), or at or above it (side -1: it is below)."""
    distance = side * (found["estimate"] - bound)
    if found["stderr"] == 0:
        return 0.5 if distance == 0 else 0.0 if distance > 0 else 1.0
    from scipy.special import stdtr

    return float(stdtr(found["freedom"], -distance / found["stderr"]))


def _on_scale(found: Mapping[str, Any], value: float) -> float:
    return math.log1p(value) if found["scale"] == "log" else value


def hypothesis_verdict(
    found: Mapping[str, Any],
    expect: str,
    margin: float = 0.0,
    p_value: float | None = None,
    equivalence_p: float | None = None,
) -> str:
    """The verdict on a hypothesis written down before the run.

    greater: the effect is above `margin`; less: below -`margin`. SUPPORTED if the whole 95 % interval lies where the
    hypothesis says, NOT SUPPORTED if the whole of it lies elsewhere. within: EQUIVALENT if two one-sided tests at
    5 % place the effect between -`margin` and `margin` (Schuirmann 1987; its 90 % interval lies inside), NOT
    SUPPORTED if the whole 95 % interval lies outside. A claim of greater or less that neither decides is EQUIVALENT
    where `equivalence_p`, of the same tests at its trivial size, is below 0.05. INCONCLUSIVE otherwise, and always
    with fewer than three seeds: two runs can agree by accident.
    `p_value`: of several claims judged together, that of `verdict_p` after their correction; else its own.
    """
    if expect not in EXPECTATIONS:
        raise ValueError(f"expect is {expect!r}, not one of {EXPECTATIONS}")
    if found["ci95"] is None or found["n"] < FEWEST_SEEDS:
        return INCONCLUSIVE
    if p_value is None:
        p_value = verdict_p(found, expect, margin)
    low, high = found["ci95"]
    mean = found["mean"]
    if expect == "less":
        low, high, mean = -high, -low, -mean
    if p_value < SIGNIFICANCE:
        if expect == "within" and -margin < mean < margin:
            return EQUIVALENT
        if expect == "within" and (low > margin or high < -margin):
            return NOT_SUPPORTED
        if expect != "within" and (low > margin or high < margin):
            return SUPPORTED if low > margin else NOT_SUPPORTED
    if equivalence_p is not None and equivalence_p < SIGNIFICANCE:
        return EQUIVALENT
    return INCONCLUSIVE


def verdict_p(found: Mapping[str, Any], expect: str, margin: float = 0.0) -> float | None:
    """The p-value of the verdict that an effect points to.

    greater, less: two-sided, of an effect of `margin`. within: of the two one-sided tests where the mean lies
    inside, and two-sided of the nearer bound where it lies outside. None with fewer than three seeds.
    """
    if found["ci95"] is None or found["n"] < FEWEST_SEEDS:
        return None
    if expect == "within":
        if -margin < found["mean"] < margin:
            return equivalence_p(found, margin)
        return _two_sided(found, _on_scale(found, math.copysign(margin, found["mean"])))
    return _two_sided(found, _on_scale(found, -margin if expect == "less" else margin))


def equivalence_p(found: Mapping[str, Any], margin: float) -> float | None:
    """p of two one-sided tests (TOST) that the effect lies between -`margin` and `margin`; None below three seeds."""
    if found["ci95"] is None or found["n"] < FEWEST_SEEDS:
        return None
    above = _one_sided(found, _on_scale(found, -margin), 1)
    return max(above, _one_sided(found, _on_scale(found, margin), -1))


def detectable(
    found: Mapping[str, Any], expect: str, margin: float = 0.0, level: float = SIGNIFICANCE
) -> float | None:
    """The smallest effect that would have been decided with a chance of 80 %, given how much the seeds vary.

    `level`: that of the first step of a correction, as 0.05 / claims. greater and less: the size of an effect, beyond
    `margin` (noncentral t). within: the smallest margin inside which no effect at all would have been found
    EQUIVALENT. In the effect's unit; None below three seeds.
    """
    if found["ci95"] is None or found["n"] < FEWEST_SEEDS:
        return None
    error, freedom = found["stderr"], found["freedom"]
    if expect == "within":
        reach = error * (_t_quantile(1 - level, freedom) + _t_quantile((1 + POWER) / 2, freedom))
        return math.expm1(reach) if found["scale"] == "log" else reach
    from scipy.optimize import brentq
    from scipy.stats import nct

    critical = _t_quantile(1 - level / 2, freedom)
    shift = float(brentq(lambda at: nct.sf(critical, freedom, at) - POWER, 0.0, 10 * critical + 20))
    reach = _on_scale(found, margin) + shift * error
    return math.expm1(reach) if found["scale"] == "log" else reach


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
