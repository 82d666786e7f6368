"""Claims judged, and the judge on trial: effects, verdicts in families, planted nulls and doses.

The judge on trial: claims whose truth is known, none of which enters a correction.

    found = judge_controls(section, values, counts, table, seeds)

*Nulls*: halves of the same runs set against each other, so nothing differs and a verdict is a false one. An arm with
six seeds or more is halved by its seeds, another by the test problems of each seed. One in twenty is expected to be
called at 5 %; how many were is told, with the interval that counting allows.
*Doses*: arms of which 10, 25, 100 % of the answers are spoilt. Each must be found worse than the whole one. The
smallest dose that is, and the smallest effect that would be found four times in five, are the grid's *detection
limit*: where a claim is INCONCLUSIVE, that is how small an effect could still be there.

Claims judged: the effect, the verdict in its family, what else a reader must know to believe it.

    row = judge_claim(bench, claim, budget, measured); decide(rows)      # a row of the table; verdicts of all together

One in twenty true nulls passes a test by its own 95 % interval, so a claim is corrected with those of its family
(Holm): the headline claims are one family, the others of a group are one each, and exploratory. `alone` is what
the claim's own interval says. Two questions are asked of a claim of greater or less, each corrected by itself: is
the effect where the hypothesis says, and, if not, is it shown to be trivial (EQUIVALENT). Arms that do not have in
common what the claim says they have get NOT COMPARABLE.

Beside the verdict: `detectable`, the smallest effect that would have been decided four times in five at the family's
first step; `items`, how much of the noise is the choice of test problems; `fixed`, the checkpoints that all seeds
share and the claim speaks of; and the referee's questions: what would falsify it, what differs between the arms.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.bench.claims import EQUAL, Claim, Controls
from distill.bench.grid import Bench, arms_within
from distill.bench.items import Table, item_noise, item_values
from distill.bench.metrics import metric, unit_words
from distill.bench.plan import KNOWN_BEFORE, Task, edges, runs_of
from distill.bench.verdicts import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    SIGNIFICANCE,
    SUPPORTED,
    Counts,
    Values,
    detectable,
    effect,
    equivalence_p,
    hypothesis_verdict,
    verdict_p,
)
from distill.evaluation.stats import holm, wilson_interval
from distill.report.pages import say

BY_SEEDS = 6  # seeds, from which on halves have the three seeds that a verdict needs


def judge_controls(
    section: Controls, values: Values, counts: Counts, table: Table, seeds: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """{"metric", "seed", "unit", "nulls", "called", "called_ci95", "doses", "limit"}; `seeds`: of each arm."""
    nulls = []
    for number in range(section.nulls):
        arms = section.arms or [section.reference]
        arm = arms[number % len(arms)]
        nulls.append(_null(section, number, arm, list(seeds[arm]), values, counts, table))
    called = sum(null["called"] for null in nulls)
    expect = "greater" if metric(section.metric).unit == "%" else "less"
    doses = [_dose(section, arm, share, expect, values, counts) for arm, share in section.doses.items()]
    return {
        "metric": section.metric,
        "seed": section.seed,
        "unit": metric(section.metric).unit,
        "nulls": nulls,
        "called": called,
        "called_ci95": list(wilson_interval(called, len(nulls))) if nulls else None,
        "doses": doses,
        "limit": _limit(doses),
    }


def _null(
    section: Controls, number: int, arm: str, seeds: list[int], values: Values, counts: Counts, table: Table
) -> dict[str, Any]:
    """One claim of no difference. `a` and `b`: the seeds of the halves; empty where problems were halved."""
    rng = np.random.default_rng([section.seed, number])
    term = f"{arm}@{section.metric}"
    share = metric(section.metric).unit == "%"
    halves: dict[str, dict[int, float]] = {"a": {}, "b": {}}
    counted: dict[str, dict[int, tuple[int, int]]] = {"a": {}, "b": {}}
    drawn: dict[str, list[int]] = {"a": [], "b": []}
    if len(seeds) >= BY_SEEDS:
        order = rng.permutation(sorted(seeds)).tolist()
        half = len(order) // 2
        drawn = {"a": order[:half], "b": order[half : 2 * half]}
        for name, own in drawn.items():
            halves[name] = {i: values[term][seed] for i, seed in enumerate(own)}
            counted[name] = {i: counts[term][seed] for i, seed in enumerate(own) if term in counts}
    else:
        for seed in sorted(seeds):
            found = item_values(table, term, seed)
            if found is None or len(found[0]) < 2:
                continue
            order, half = rng.permutation(len(found[0])), len(found[0]) // 2
            for name, own in (("a", order[:half]), ("b", order[half : 2 * half])):
                halves[name][seed] = float(found[1][own].mean())
                counted[name][seed] = (round(float(found[1][own].sum())), half)
    known = counted if all(counted.values()) else {}
    judged = effect({"a": 1, "b": -1}, halves, counts=known, share=share)
    verdict = hypothesis_verdict(judged, "greater")
    return {
        "arm": arm,
        "halves": "seeds" if drawn["a"] else "problems",
        **drawn,
        "effect": judged,
        "verdict": verdict,
        "called": verdict in (SUPPORTED, NOT_SUPPORTED),
    }


def _dose(
    section: Controls, arm: str, share: float, expect: str, values: Values, counts: Counts
) -> dict[str, Any]:
    terms = {f"{section.reference}@{section.metric}": 1.0, f"{arm}@{section.metric}": -1.0}
    known = {term: counts[term] for term in terms if term in counts}
    judged = effect(
        terms, {**{t: {} for t in terms}, **values}, counts=known, share=metric(section.metric).unit == "%"
    )
    return {
        "arm": arm,
        "dose": share,
        "terms": terms,
        "expect": expect,
        "effect": judged,
        "p_value": verdict_p(judged, expect),
        "verdict": hypothesis_verdict(judged, expect),
        "detectable": detectable(judged, expect),
    }


def _limit(doses: list[dict[str, Any]]) -> dict[str, Any]:
    """The smallest dose that was found, larger ones too; the largest of the effects that the doses could detect."""
    found = None
    for dose in sorted(doses, key=lambda d: -d["dose"]):
        if dose["verdict"] != SUPPORTED:
            break
        found = dose["dose"]
    reach = [dose["detectable"] for dose in doses if dose["detectable"] is not None]
    return {"dose": found, "effect": max(reach) if reach else None}


# ==== Claims judged ====

NOT_COMPARABLE = "NOT COMPARABLE"
SAME = (
    0.02  # trained tokens and FLOPs count as equal up to this share: answers differ by a token here and there
)
EQUAL_AFTER = tuple(key for key in EQUAL if key not in KNOWN_BEFORE)


@dataclass(frozen=True)
class Measured:
    """What finished runs have: values and counts by "arm@metric" and seed, single answers, budgets, seconds."""

    tasks: dict[str, Task]
    values: dict[str, dict[int, float]]
    counts: dict[str, dict[int, tuple[int, int]]]
    table: Table
    budgets: dict[str, dict[str, list]]
    seconds: dict[str, float]


def of_seeds(values: Values | Counts, terms: list[str], seeds: list[int]) -> dict[str, dict[int, Any]]:
    """Those of `terms` that are there, in those seeds."""
    return {t: {s: values[t][s] for s in seeds if s in values[t]} for t in terms if t in values}


def judge_claim(
    bench: Bench, claim: Claim, budget: str, measured: Measured, tuning: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One row of the claims table, its `verdict` still without the others'. `tuning`: how rates were chosen."""
    seeds = bench.claim_seeds(claim, budget)
    terms = claim.terms(bench.factorial)
    found = _effect(claim, terms, seeds, measured)
    names = list(dict.fromkeys(term.partition("@")[0] for term in terms))
    own = {name: bench.seeds_of(name, budget) for name in names}
    unequal = [f"{key}: {why}" for key in claim.equal if (why := _differ(key, own, seeds, measured.budgets))]
    unequal += _unmatched(claim, names, seeds, measured.values)
    kept = ("id", "group", "source", "sentence", "hypothesis", "metric", "expect", "margin", "trivial", "why")
    kept += ("relative", "headline", "equal", "matched", "axis", "scope", "registered")
    return {
        **claim.model_dump(include=set(kept)),
        "family": claim.family,
        "unit": claim.unit,
        "terms": terms,
        "seeds": seeds,
        "effect": found,
        "verdict": NOT_COMPARABLE if unequal else INCONCLUSIVE,
        "alone": NOT_COMPARABLE if unequal else _alone(claim, found),
        "p_value": None if unequal else verdict_p(found, claim.expect, claim.margin),
        "p_value_equivalent": None if unequal or not claim.trivial else equivalence_p(found, claim.trivial),
        "means": _means(measured.values, list(terms), seeds),
        "second": _second(claim, bench, seeds, measured),
        "items": _items(found, terms, seeds, measured.table),
        "unequal": unequal,
        "comparable": not unequal,
        "edges": edges(tuning, names),
        "fixed": fixed_checkpoints(bench, names, budget, measured.tasks),
        "differs": differences(bench, names),
        "falsified": falsified(claim),
        "looked": claim.looked or bench.looked,
        "cost": _cost(bench, names, budget, seeds, measured),
    }


def _means(values: Values, terms: list[str], seeds: list[int]) -> dict[str, float]:
    return {t: statistics.fmean(v.values()) for t, v in of_seeds(values, terms, seeds).items() if v}


def _effect(claim: Claim, terms: dict[str, float], seeds: list[int], measured: Measured) -> dict[str, Any]:
    reference = next(t for t, w in terms.items() if w == -1) if claim.relative else None
    values = {**{t: {} for t in terms}, **of_seeds(measured.values, list(terms), seeds)}
    shares = all(metric(t.partition("@")[2]).unit == "%" for t in terms)
    counted = of_seeds(measured.counts, list(terms), seeds)
    return effect(terms, values, reference, counts=counted, share=shares and not claim.relative)


def _alone(claim: Claim, found: dict[str, Any]) -> str:
    trivial = equivalence_p(found, claim.trivial) if claim.trivial else None
    return hypothesis_verdict(found, claim.expect, claim.margin, equivalence_p=trivial)


def _second(claim: Claim, bench: Bench, seeds: list[int], measured: Measured) -> dict[str, Any] | None:
    """The same arms by the claim's second metric; it has no verdict."""
    if not claim.second:
        return None
    terms = claim.terms(bench.factorial, claim.second)
    values = {**{t: {} for t in terms}, **of_seeds(measured.values, list(terms), seeds)}
    share = metric(claim.second).unit == "%"
    found = effect(terms, values, counts=of_seeds(measured.counts, list(terms), seeds), share=share)
    return {"metric": claim.second, "unit": metric(claim.second).unit, "terms": terms, "effect": found}


def _items(found: dict, terms: dict[str, float], seeds: list[int], table: Table) -> dict[str, Any] | None:
    """What the test problems contribute, and `share` of the variance that the seeds show."""
    noise = item_noise(table, terms, seeds)
    if noise is None or not found["stderr"] or found["scale"] == "log":
        return noise
    return {**noise, "share": (noise["stderr"] / found["stderr"]) ** 2}


def _differ(key: str, own: dict[str, list[int]], seeds: list[int], budgets: dict) -> str | None:
    """How the arms' values of a budget key differ, seed by seed; None if they do not. Checkpoints have none."""
    columns = {}
    for arm, there in own.items():
        column = dict(zip(there, budgets[arm][key]))
        if next(iter(column.values())) is not None:
            columns[arm] = [column[seed] for seed in seeds if seed in column]
    for row in zip(*columns.values()):
        low, high = min(row), max(row)
        same = low == high if key not in EQUAL_AFTER else high - low <= SAME * high
        if not same:
            return ", ".join(f"{arm} {value}" for arm, value in zip(columns, row))
    return None


def _unmatched(claim: Claim, arms: list[str], seeds: list[int], values: dict) -> list[str]:
    """What of `matched` the arms' means do not hold."""
    found = []
    for name, most in claim.matched.items():
        means = _means(values, [f"{arm}@{name}" for arm in arms], seeds)
        if means and max(means.values()) - min(means.values()) > most:
            shown = ", ".join(f"{term.partition('@')[0]} {mean:.3f}" for term, mean in means.items())
            found.append(f"{name} should agree to {most:g}: {shown}")
    return found


def _cost(bench: Bench, arms: list[str], budget: str, seeds: list[int], measured: Measured) -> dict[str, Any]:
    known = arms_within(bench, budget)
    runs = {runs_of(bench, arm, seed, known): (arm, seed) for arm in arms for seed in seeds}
    flops = sum(
        measured.values[f"{arm}@train.flops"][seed]
        for run, (arm, seed) in runs.items()
        if not measured.tasks[run].checkpoint
    )
    seconds = math.fsum(measured.seconds.get(r, 0.0) for r in runs)
    return {"runs": len(runs), "seconds": round(seconds, 1), "flops": flops}


def decide(claims: list[dict[str, Any]]) -> None:
    """Verdicts of claims judged together: `verdict` in place of what each would be `alone`, and what else follows."""
    for family in dict.fromkeys(claim["family"] for claim in claims):
        own = [claim for claim in claims if claim["family"] == family]
        tested = sum(claim["p_value"] is not None for claim in own)
        equivalent = holm([claim["p_value_equivalent"] for claim in own])
        for claim, corrected, trivial in zip(own, holm([claim["p_value"] for claim in own]), equivalent):
            claim["p_value_holm"] = corrected
            claim["p_value_equivalent_holm"] = trivial
            level = SIGNIFICANCE / max(1, tested)
            found, expect, margin = claim["effect"], claim["expect"], claim["margin"]
            claim["detectable"] = detectable(found, expect, margin, level) if claim["comparable"] else None
            if claim["comparable"] and corrected is not None:
                claim["verdict"] = hypothesis_verdict(found, expect, margin, corrected, trivial)


# ----------------------------------------------------------------------------------------- what a referee asks


def fixed_checkpoints(bench: Bench, arms: list[str], budget: str, tasks: dict[str, Task]) -> list[str]:
    """Models that the arms of every seed start from, are taught by or are: a claim speaks of these alone."""
    known, found = arms_within(bench, budget), {}
    for arm in arms:
        runs = [tasks[runs_of(bench, arm, seed, known)] for seed in bench.seeds_of(arm, budget)]
        for task in runs:
            teacher = task.recipe.teacher.model if task.recipe.teacher else None
            for model in (task.checkpoint or task.recipe.student.model, teacher):
                if model:
                    found.setdefault((arm, model), []).append(task.seed)
        if known[arm].once:
            found[arm, f"the one run of {arm}"] = [0, 0]
    one = len(bench.seeds_of(arms[0], budget)) == 1
    several = {model for (_, model), seeds in found.items() if len(seeds) > 1 or one}
    root = f"{bench.run_dir}/"
    return sorted(
        model.removeprefix(root).removesuffix("/start").removesuffix("/student") for model in several
    )


def differences(bench: Bench, arms: list[str]) -> list[str]:
    """What the recipes of the arms have not in common, as `key: value (arm); value (arm)`; tuned rates too."""
    known = bench.all_arms()
    settings = {}
    for name in arms:
        arm = known[name]
        shown = ("checkpoint", "start", "teacher", "teachers", "averaged")
        own = {key: getattr(arm, key) for key in shown if getattr(arm, key)}
        settings[name] = {**bench.set, **bench.changes(name), **own}
    keys = dict.fromkeys(key for of in settings.values() for key in of)
    found = []
    for key in keys:
        column = {name: of.get(key, "as the recipe has it") for name, of in settings.items()}
        if len({repr(value) for value in column.values()}) > 1:
            by_value: dict[str, list[str]] = {}
            for name, value in column.items():
                by_value.setdefault(_shown(value), []).append(name)
            found.append(
                f"{key}: " + "; ".join(f"{value} ({', '.join(of)})" for value, of in by_value.items())
            )
    return found


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def falsified(claim: Claim) -> str:
    """What the interval would have to be for the hypothesis to be refuted."""
    return falsified_by(claim.expect, claim.margin, claim.trivial, claim.unit, claim.relative)


def falsified_by(expect: str, margin: float, trivial: float, unit: str, relative: bool) -> str:
    """The same of what a results file keeps of a claim, in the language of the page."""
    size = 100 if unit == "%" else 1

    def amount(value: float) -> str:
        return f"{size * value + 0.0:g} {unit_words(unit, relative)}".rstrip()  # with 0.0: never -0

    if expect == "within":
        return say("a 95 %% interval wholly outside ±%(margin)s", margin=amount(margin))
    if expect == "greater":
        words = say("a 95 %% interval wholly below %(bound)s", bound=amount(margin))
    else:
        words = say("a 95 %% interval wholly above %(bound)s", bound=amount(-margin))
    if trivial:
        words += say(", or two one-sided tests that place the effect within ±%(size)s", size=amount(trivial))
    return words
