"""The judge on trial: claims whose truth is known, none of which enters a correction.

    found = judge_controls(section, values, counts, table, seeds)

*Nulls*: halves of the same runs set against each other, so nothing differs and a verdict is a false one. An arm with
six seeds or more is halved by its seeds, another by the test problems of each seed. One in twenty is expected to be
called at 5 %; how many were is told, with the interval that counting allows.
*Doses*: arms of which 10, 25, 100 % of the answers are spoilt. Each must be found worse than the whole one. The
smallest dose that is, and the smallest effect that would be found four times in five, are the grid's *detection
limit*: where a claim is INCONCLUSIVE, that is how small an effect could still be there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.bench.claims import Controls
from distill.bench.items import Table, item_values
from distill.bench.metrics import metric
from distill.bench.verdicts import (
    NOT_SUPPORTED,
    SUPPORTED,
    Counts,
    Values,
    detectable,
    effect,
    hypothesis_verdict,
    verdict_p,
)
from distill.evaluation.stats import wilson_interval

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
