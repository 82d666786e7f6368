"""The judge: effects over seeds, intervals that keep their promise, verdicts by one rule, factorial contrasts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from distill.bench.verdicts import (
    EQUIVALENT,
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SUPPORTED,
    detectable,
    effect,
    equivalence_p,
    factorial_contrasts,
    fit_curve,
    hypothesis_verdict,
    mean_interval,
    pareto_front,
    verdict_p,
)
from distill.evaluation.stats import holm

VALUES = {
    "a": {0: 0.5, 1: 0.7, 2: 0.9},
    "b": {0: 0.4, 1: 0.5, 2: 0.3, 3: 0.9},
    "once": {0: 2.0, 1: 2.0, 2: 2.0},
}


def test_an_effect_is_taken_within_each_seed_that_all_terms_have():
    found = effect({"a": 1, "b": -1}, VALUES)
    assert found["n"] == 3 and found["per_seed"] == pytest.approx({0: 0.1, 1: 0.2, 2: 0.6})
    assert found["mean"] == pytest.approx(0.3)
    relative = effect({"a": 1, "once": -1}, VALUES, relative_to="once")
    assert relative["per_seed"] == pytest.approx({0: -0.75, 1: -0.65, 2: -0.55})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_interval_and_p_value_are_students(sample):
    found = mean_interval(sample)
    if np.std(sample) < 1e-9:
        return
    expected = reference.ttest_1samp(sample, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found["ci95"] == pytest.approx([low, high], rel=1e-9, abs=1e-9)
    assert found["p_value"] == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300)


def test_few_and_equal_values():
    assert mean_interval([]) == {"mean": None, "ci95": None, "p_value": None}
    assert mean_interval([0.3]) == {"mean": 0.3, "ci95": None, "p_value": None}
    assert mean_interval([0.0, 0.0, 0.0]) == {"mean": 0.0, "ci95": [0.0, 0.0], "p_value": 1.0}


def found(low: float, high: float, n: int = 3) -> dict:
    """An effect whose 95 % interval is that."""
    mean, half = (low + high) / 2, (high - low) / 2
    error = half / reference.t.ppf(0.975, n - 1)
    known = {"estimate": mean, "stderr": error, "freedom": n - 1, "scale": "linear"}
    return {"ci95": [low, high], "n": n, "mean": mean, **known}


def of(sample) -> dict:
    return effect({"a": 1}, {"a": dict(enumerate(sample))})


@pytest.mark.parametrize(
    "interval, expect, margin, verdict",
    [
        ((0.01, 0.2), "greater", 0.0, SUPPORTED),
        ((-0.2, -0.01), "greater", 0.0, NOT_SUPPORTED),
        ((-0.1, 0.2), "greater", 0.0, INCONCLUSIVE),
        ((0.01, 0.2), "greater", 0.05, INCONCLUSIVE),
        ((0.01, 0.04), "greater", 0.05, NOT_SUPPORTED),
        ((-0.2, -0.01), "less", 0.0, SUPPORTED),
        ((-0.2, -0.06), "less", 0.05, SUPPORTED),
        ((0.01, 0.2), "less", 0.0, NOT_SUPPORTED),
        ((-0.01, 0.02), "within", 0.05, EQUIVALENT),
        ((0.06, 0.2), "within", 0.05, NOT_SUPPORTED),
        ((-0.2, -0.06), "within", 0.05, NOT_SUPPORTED),
        ((-0.01, 0.2), "within", 0.05, INCONCLUSIVE),
        ((-0.2, 0.2), "within", 0.05, INCONCLUSIVE),
    ],
)
def test_a_verdict_follows_from_where_the_interval_lies(interval, expect, margin, verdict):
    assert hypothesis_verdict(found(*interval), expect, margin) == verdict
    if verdict == INCONCLUSIVE and expect != "within":  # a small p-value alone decides nothing
        assert hypothesis_verdict(found(*interval), expect, margin, p_value=0.001) == verdict


@pytest.mark.parametrize("expect", ["greater", "less", "within"])
@given(
    sample=st.lists(st.floats(-1, 1), min_size=3, max_size=6).filter(lambda x: max(x) - min(x) > 1e-3),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_the_p_value_of_a_verdict_agrees_with_the_interval(sample, margin, expect):
    margin = margin or (0.2 if expect == "within" else 0.0)
    effect_ = of(sample)
    p_value = verdict_p(effect_, expect, margin)
    if abs(p_value - 0.05) > 1e-9:
        assert (p_value < 0.05) == (hypothesis_verdict(effect_, expect, margin) != INCONCLUSIVE)
    if expect == "greater":  # scipy's own test
        assert p_value == pytest.approx(reference.ttest_1samp(sample, margin).pvalue, rel=1e-6, abs=1e-12)
    assert hypothesis_verdict(effect_, expect, margin, p_value=0.05) == INCONCLUSIVE


def test_a_table_of_nulls_is_rarely_called_in_any_row():
    """Sixty planted false claims, 150 times: a verdict anywhere in one table of twenty, not in every table."""
    rng = np.random.default_rng(1)
    called = alone = 0
    for table in rng.normal(0, 0.03, (150, 60, 5)).tolist():
        effects = [of(row) for row in table]
        corrected = holm([verdict_p(e, "greater") for e in effects])
        called += any(
            hypothesis_verdict(e, "greater", 0.0, p) != INCONCLUSIVE for e, p in zip(effects, corrected)
        )
        alone += any(hypothesis_verdict(e, "greater") != INCONCLUSIVE for e in effects)
    assert called <= 150 * 0.08 and alone >= 150 * 0.9


def test_equivalence_is_two_one_sided_tests_at_their_usual_level():
    """EQUIVALENT just where the 90 % interval lies inside; against scipy's own one-sided tests."""
    rng = np.random.default_rng(2)
    verdicts = set()
    for row in rng.normal(0.0, 0.02, (200, 5)).tolist():
        p = equivalence_p(of(row), 0.03)
        above, below = (
            reference.ttest_1samp(row, bound, alternative=side).pvalue
            for bound, side in ((-0.03, "greater"), (0.03, "less"))
        )
        assert p == pytest.approx(max(above, below), rel=1e-9)
        low, high = reference.ttest_1samp(row, 0).confidence_interval(0.90)
        verdict = hypothesis_verdict(of(row), "within", 0.03)
        assert (verdict == EQUIVALENT) == (low > -0.03 and high < 0.03)
        verdicts.add(verdict)
    assert verdicts == {EQUIVALENT, INCONCLUSIVE}


def test_equivalence_is_rarely_claimed_of_an_effect_at_the_margin():
    rng = np.random.default_rng(3)
    called = [hypothesis_verdict(of(r), "within", 0.03) for r in rng.normal(0.03, 0.02, (4000, 5)).tolist()]
    assert 0.04 < np.mean([v == EQUIVALENT for v in called]) < 0.06


def test_a_claim_of_more_that_finds_nothing_is_equivalent_where_that_was_asked():
    small = found(-0.01, 0.012)
    assert hypothesis_verdict(small, "greater") == INCONCLUSIVE
    p = equivalence_p(small, 0.03)
    assert p < 0.05 and hypothesis_verdict(small, "greater", equivalence_p=p) == EQUIVALENT
    clear = found(0.005, 0.02)  # above 0 and trivial: the hypothesis is what was asked first
    assert hypothesis_verdict(clear, "greater", equivalence_p=equivalence_p(clear, 0.03)) == SUPPORTED
    assert hypothesis_verdict(small, "greater", equivalence_p=0.05) == INCONCLUSIVE


COUNTED = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), min_size=3, max_size=6)


@given(COUNTED)
def test_shares_have_intervals_of_some_width_within_what_is_possible(pairs):
    values = {name: {s: pair[i] / 80 for s, pair in enumerate(pairs)} for i, name in enumerate("ab")}
    counts = {name: {s: (pair[i], 80) for s, pair in enumerate(pairs)} for i, name in enumerate("ab")}
    bound = effect({"a": 1, "b": -1}, values, counts=counts, share=True)
    low, high = bound["ci95"]
    assert -1 <= low < high <= 1 and low <= bound["mean"] <= high and 0 <= bound["p_value"] <= 1
    free = effect({"a": 1, "b": -1}, values)["ci95"]
    assert low <= max(free[0], -1) + 1e-12 and high >= min(free[1], 1) - 1e-12


def test_all_right_against_all_wrong_is_bounded_by_counting():
    """80 of 80 in every seed against 0 of 80: the interval was [100, 100], its p-value 0."""
    values = {"a": dict.fromkeys(range(5), 1.0), "b": dict.fromkeys(range(5), 0.0)}
    counts = {"a": dict.fromkeys(range(5), (80, 80)), "b": dict.fromkeys(range(5), (0, 80))}
    sure = effect({"a": 1, "b": -1}, values, counts=counts, share=True)
    one = 1 - 400 / (400 + reference.norm.ppf(0.975) ** 2)  # Wilson's bound of one arm
    assert sure["ci95"] == pytest.approx([1 - math.sqrt(2) * one, 1.0], rel=1e-6) and sure["bounded"]
    assert 0 < sure["p_value"] < 1e-6
    nothing = effect(
        {"a": 1, "b": -1}, {**values, "a": values["b"]}, counts={**counts, "a": counts["b"]}, share=True
    )
    assert nothing["ci95"][0] < 0 < nothing["ci95"][1] and nothing["p_value"] == 1.0


def test_a_counted_difference_covers_at_the_edge():
    """Both arms near 100 %: 20,000 tables of three seeds of 80; without the bounds most intervals miss or vanish."""
    rng = np.random.default_rng(4)
    hits = rng.binomial(80, (0.995, 0.98), (4000, 3, 2))
    covered = free = 0
    for table in hits.tolist():
        values = {n: {s: row[i] / 80 for s, row in enumerate(table)} for i, n in enumerate("ab")}
        counts = {n: {s: (row[i], 80) for s, row in enumerate(table)} for i, n in enumerate("ab")}
        low, high = effect({"a": 1, "b": -1}, values, counts=counts, share=True)["ci95"]
        covered += low <= 0.015 <= high
        low, high = effect({"a": 1, "b": -1}, values)["ci95"]
        free += low < high
    assert covered > 4000 * 0.94 and free < 4000


@given(st.lists(st.floats(0.001, 0.5), min_size=3, max_size=6))
def test_a_relative_effect_never_falls_below_what_is_possible(shares):
    values = {"a": dict(enumerate(shares)), "b": dict.fromkeys(range(len(shares)), 1.0)}
    ratio = effect({"a": 1, "b": -1}, values, relative_to="b")
    assert -1 < ratio["ci95"][0] <= ratio["mean"] * (1 - 1e-12) <= ratio["ci95"][1] * (1 - 1e-12) + 1e-12
    assert ratio["mean"] == pytest.approx(math.exp(np.mean(np.log(shares))) - 1)


@pytest.mark.parametrize("level", [0.05, 0.05 / 20])
def test_an_effect_of_the_detectable_size_is_found_four_times_in_five(level):
    rng = np.random.default_rng(5)
    seen = detectable(found(-0.05, 0.05, n=5), "greater", level=level)
    sd = found(-0.05, 0.05, n=5)["stderr"] * math.sqrt(5)
    rows = rng.normal(seen, sd, (4000, 5))
    p = reference.ttest_1samp(rows, 0, axis=1).pvalue
    assert np.mean(p < level) == pytest.approx(0.8, abs=0.03)


def test_the_detectable_margin_of_an_equivalence_is_found_four_times_in_five():
    rng = np.random.default_rng(6)
    at = found(-0.05, 0.05, n=5)
    margin = detectable(at, "within")
    rows = rng.normal(0, at["stderr"] * math.sqrt(5), (3000, 5)).tolist()
    # The margin is worked out for a spread that is known; here each table has its own.
    assert np.mean([equivalence_p(of(r), margin) < 0.05 for r in rows]) == pytest.approx(0.8, abs=0.08)


def test_too_few_seeds_decide_nothing():
    assert hypothesis_verdict(found(0.1, 0.2, n=2), "greater") == INCONCLUSIVE
    assert hypothesis_verdict({"ci95": None, "n": 1}, "greater") == INCONCLUSIVE
    with pytest.raises(ValueError, match="not one of"):
        hypothesis_verdict(found(0, 1), "larger")


def test_an_arm_identical_to_its_control_is_inconclusive():
    """The planted false claim at its purest: the very same runs."""
    same = effect({"a": 1, "c": -1}, {**VALUES, "c": VALUES["a"]})
    assert same["mean"] == 0.0
    assert {hypothesis_verdict(same, expect) for expect in ("greater", "less")} == {INCONCLUSIVE}


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_and_equal_arms_are_rarely_called_different(seeds):
    """4,000 grids in which both arms solve a third of 280 problems, plus noise between seeds."""
    rng = np.random.default_rng(seeds)
    truth = 0.02
    difference = (
        rng.normal(truth, 0.03, (4000, seeds))
        + (rng.binomial(280, 0.33, (4000, seeds)) - rng.binomial(280, 0.33, (4000, seeds))) / 280
    )
    intervals = [mean_interval(row)["ci95"] for row in difference.tolist()]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.94 < covered < 0.96
    null = [mean_interval(row)["ci95"] for row in (difference - truth).tolist()]
    verdicts = [hypothesis_verdict(found(*ci, n=seeds), "greater") for ci in null]
    assert np.mean([v == INCONCLUSIVE for v in verdicts]) > 0.94


def test_a_planted_true_claim_gets_the_right_sign():
    rng = np.random.default_rng(0)
    taught, shuffled = rng.normal(0.5, 0.04, 3), rng.normal(0.1, 0.04, 3)
    values = {"taught": dict(enumerate(taught)), "shuffled": dict(enumerate(shuffled))}
    assert hypothesis_verdict(effect({"taught": 1, "shuffled": -1}, values), "greater") == SUPPORTED
    assert hypothesis_verdict(effect({"shuffled": 1, "taught": -1}, values), "greater") == NOT_SUPPORTED


FACTORS = {"distil": ("yes", "no"), "moe": ("moe", "dense"), "lora": ("lora", "full")}


@given(st.lists(st.floats(-10, 10), min_size=7, max_size=7))
def test_factorial_effects_are_recovered(coefficients):
    """A response built of main effects and interactions gives them back, each untouched by the others."""
    names = list(FACTORS)
    pairs = list(itertools.combinations(range(3), 2))
    response = {}
    for cell in itertools.product(*FACTORS.values()):
        x = [1 if level == FACTORS[name][0] else -1 for name, level in zip(names, cell)]
        terms = [coefficients[0], *(coefficients[1 + i] * x[i] / 2 for i in range(3))]
        terms += [coefficients[4 + p] * x[i] * x[j] / 2 for p, (i, j) in enumerate(pairs)]
        response[cell] = math.fsum(terms)
    contrasts = factorial_contrasts(FACTORS)

    def value(name: str) -> float:
        return math.fsum(weight * response[cell] for cell, weight in contrasts[name].items())

    for i, name in enumerate(names):
        assert value(name) == pytest.approx(coefficients[1 + i], abs=1e-9)
    for p, (i, j) in enumerate(pairs):
        assert value(f"{names[i]} x {names[j]}") == pytest.approx(coefficients[4 + p], abs=1e-9)
    on, off = ("yes", "moe", "lora"), ("no", "dense", "full")
    assert value("together") == pytest.approx(response[on] - response[off], abs=1e-9)
    alone = sum(
        response[tuple(on[j] if j == i else off[j] for j in range(3))] - response[off] for i in range(3)
    )
    assert value("synergy") == pytest.approx(response[on] - response[off] - alone, abs=1e-9)


def test_a_curve_through_what_a_logistic_made():
    x = np.geomspace(1e10, 1e13, 12)
    y = 0.1 + 0.8 / (1 + np.exp(-3 * (np.log10(x) - 11.5)))
    fitted = fit_curve(x, y)
    assert fitted["rms"] < 1e-3 and fitted["middle"] == pytest.approx(11.5, abs=0.05)
    assert fitted["top"] == pytest.approx(0.9, abs=0.02)
    assert fit_curve(x[:3], y[:3]) is None


POINTS = st.dictionaries(
    st.text("abcdef", min_size=1), st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1
)


@given(POINTS)
def test_a_front_holds_what_nothing_beats(points):
    def beats(a, b):
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    front = pareto_front(points)
    for name, point in points.items():
        assert (name in front) == (not any(beats(other, point) for other in points.values()))
    costs, quality = zip(*(points[name] for name in front))
    assert list(costs) == sorted(costs) and list(quality) == sorted(quality)
