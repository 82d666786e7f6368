"""Families, planted claims and the referee's words, on made-up runs whose truth is known."""

import numpy as np
import pytest

from distill.bench.claims import Claim, Controls
from distill.bench.items import Items, item_noise
from distill.bench.judge import decide, falsified, judge_controls
from distill.bench.verdicts import effect, equivalence_p, verdict_p


def row(name: str, sample, headline=False, group="G", **claim) -> dict:
    """A claim's row before `decide`, of an effect with these values by seed."""
    section = Claim(
        id=name, group=group, sentence="s", hypothesis="h", metric="accuracy.hard", effect={"a": 1},
        headline=headline, **{"expect": "greater", **claim},
    )  # fmt: skip
    found = effect({"a": 1}, {"a": dict(enumerate(sample))})
    trivial = equivalence_p(found, section.trivial) if section.trivial else None
    return {
        "id": name, "family": section.family, "effect": found, "expect": section.expect, "margin": section.margin,
        "trivial": section.trivial, "comparable": True, "verdict": "INCONCLUSIVE",
        "p_value": verdict_p(found, section.expect, section.margin), "p_value_equivalent": trivial,
    }  # fmt: skip


CLEAR, WEAK = [0.2, 0.21, 0.19, 0.2, 0.22], [0.05, 0.03, 0.06, 0.02, 0.07]


def test_a_claim_is_corrected_with_its_family_alone():
    """One weak headline among many exploratory claims keeps its verdict; among many headlines it loses it."""
    alone = [row("h", WEAK, headline=True), *(row(f"e{i}", WEAK) for i in range(30))]
    decide(alone)
    assert alone[0]["p_value_holm"] == alone[0]["p_value"] and alone[0]["verdict"] == "SUPPORTED"
    assert alone[1]["verdict"] == "INCONCLUSIVE" and alone[1]["p_value_holm"] > 0.05
    crowd = [row("h", WEAK, headline=True), *(row(f"h{i}", WEAK, headline=True) for i in range(30))]
    decide(crowd)
    assert crowd[0]["verdict"] == "INCONCLUSIVE"
    assert crowd[0]["detectable"] > alone[0]["detectable"] > 0
    groups = [row(f"{g}{i}", WEAK, group=g) for g in "abc" for i in range(2)]
    decide(groups)
    assert all(claim["p_value_holm"] == pytest.approx(2 * claim["p_value"]) for claim in groups[:1])


def test_whether_an_effect_is_trivial_is_a_question_of_its_own():
    nothing = [0.001, -0.002, 0.0, 0.002, -0.001]
    rows = [row("t", nothing, trivial=0.03), row("g", CLEAR, trivial=0.03), row("n", nothing)]
    decide(rows)
    assert [claim["verdict"] for claim in rows] == ["EQUIVALENT", "SUPPORTED", "INCONCLUSIVE"]
    assert rows[2]["p_value_equivalent_holm"] is None


def test_what_is_not_comparable_stays_so():
    rows = [{**row("a", CLEAR), "comparable": False, "verdict": "NOT COMPARABLE", "p_value": None}]
    decide(rows)
    assert rows[0]["verdict"] == "NOT COMPARABLE" and rows[0]["detectable"] is None


def grid(truth: dict[str, float], seeds: int, problems: int = 400, rng=None):
    """(values, counts, table) of arms that solve those shares of the same problems."""
    rng = rng or np.random.default_rng(0)
    values, counts, table = {}, {}, {}
    for seed in range(seeds):
        luck = rng.random(problems)  # how hard each problem is: the same for all arms of a seed
        for arm, share in truth.items():
            right = luck < share + rng.normal(0, 0.01)
            none = np.full(problems, np.nan)
            items = Items(np.arange(problems).astype(str), right, none, none, none)
            table.setdefault(arm, {})[seed] = {"hard": items}
            values.setdefault(f"{arm}@accuracy.hard", {})[seed] = float(right.mean())
            counts.setdefault(f"{arm}@accuracy.hard", {})[seed] = items.count
    return values, counts, table


CONTROLS = Controls(
    metric="accuracy.hard", reference="whole", nulls=20, doses={"ten": 0.1, "quarter": 0.25, "all": 1.0}
)
TRUTH = {"whole": 0.6, "ten": 0.598, "quarter": 0.5, "all": 0.05}


@pytest.mark.parametrize("seeds, halves", [(4, "problems"), (10, "seeds")])
def test_nulls_are_rarely_called_and_doses_give_a_limit(seeds, halves):
    values, counts, table = grid(TRUTH, seeds)
    found = judge_controls(CONTROLS, values, counts, table, {arm: range(seeds) for arm in TRUTH})
    assert len(found["nulls"]) == 20 and {null["halves"] for null in found["nulls"]} == {halves}
    assert found["called"] <= 4 and found["called_ci95"][0] <= 0.05 <= found["called_ci95"][1]
    verdicts = {dose["dose"]: dose["verdict"] for dose in found["doses"]}
    assert verdicts[1.0] == verdicts[0.25] == "SUPPORTED" and verdicts[0.1] == "INCONCLUSIVE"
    reach = [dose["detectable"] for dose in found["doses"]]
    assert found["limit"] == {"dose": 0.25, "effect": max(reach)} and 0 < min(reach) < max(reach) < 0.1


@pytest.mark.parametrize("seeds", [4, 10])
def test_halves_of_an_arm_that_is_always_right_differ_by_what_counting_allows(seeds):
    """Equal in every seed: no spread to go by, and yet not known to the last digit."""
    values, counts, table = grid({"whole": 2.0}, seeds, problems=50)
    section = Controls(metric="accuracy.hard", reference="whole", nulls=4)
    for null in judge_controls(section, values, counts, table, {"whole": range(seeds)})["nulls"]:
        low, high = null["effect"]["ci95"]
        assert low < -0.001 and high > 0.001 and not null["called"]


@pytest.mark.parametrize("seeds", [4, 10])
def test_nulls_are_called_as_often_as_they_should_be(seeds):
    """60 grids of 20 nulls each: one in twenty, not none and not a tenth."""
    called = 0
    for number in range(60):
        values, counts, table = grid({"whole": 0.6}, seeds, 100, np.random.default_rng(number))
        section = Controls(metric="accuracy.hard", reference="whole", nulls=20, seed=number)
        called += judge_controls(section, values, counts, table, {"whole": range(seeds)})["called"]
    assert 0.03 < called / 1200 < 0.075


def test_a_dose_that_is_missed_ends_the_limit_even_if_a_smaller_one_was_found():
    values, counts, table = grid({**TRUTH, "ten": 0.3, "quarter": 0.6}, 5)
    found = judge_controls(CONTROLS, values, counts, table, {arm: range(5) for arm in TRUTH})
    assert found["limit"]["dose"] == 1.0


def test_problems_are_paired_and_their_noise_is_that_of_the_differences():
    """Arms that agree on most problems: far less noise than two exams of their own would have."""
    *_, table = grid({"a": 0.6, "b": 0.55}, 5)
    noise = item_noise(table, {"a@accuracy.hard": 1, "b@accuracy.hard": -1}, range(5))
    apart = np.sqrt(2 * 0.6 * 0.4 / 400 / 5)
    assert noise["n"] == 5 * 400 and noise["stderr"] < 0.6 * apart
    shifted = {**table, "b": {s: {"hard": Items(k["hard"].item + "x", *[getattr(k["hard"], f) for f in (
        "right", "tokens", "nats", "nats_tokens")])} for s, k in table["b"].items()}}  # fmt: skip
    assert item_noise(shifted, {"a@accuracy.hard": 1, "b@accuracy.hard": -1}, range(5)) is None
    assert item_noise(table, {"a@loss.train": 1}, range(5)) is None


@pytest.mark.parametrize(
    "expect, more, words",
    [
        ("greater", {}, "a 95 % interval wholly below 0 points"),
        ("less", {"margin": 0.05}, "a 95 % interval wholly above -5 points"),
        ("within", {"margin": 0.05}, "a 95 % interval wholly outside ±5 points"),
        ("greater", {"trivial": 0.03}, "or two one-sided tests that place the effect within ±3 points"),
    ],
)
def test_what_would_falsify_a_claim_is_said(expect, more, words):
    claim = Claim(
        id="c",
        sentence="s",
        hypothesis="h",
        metric="accuracy.hard",
        effect={"a": 1, "b": -1},
        expect=expect,
        **more,
    )
    assert words in falsified(claim)
