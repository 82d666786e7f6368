"""Claims judged together: verdicts by the corrected p-value, and what arms must share to be compared."""

import pytest

from distill.bench.results import _decide, _differ
from distill.bench.verdicts import mean_interval, verdict_p


def claim(sample: list[float], comparable: bool = True) -> dict:
    effect = {"n": len(sample), **mean_interval(sample)}
    p_value = verdict_p(effect, "greater") if comparable else None
    return {
        "effect": effect, "expect": "greater", "margin": 0.0, "p_value": p_value, "comparable": comparable,
        "verdict": "INCONCLUSIVE" if comparable else "NOT COMPARABLE",
    }  # fmt: skip


# Student's t of (1, 2, 3) / s is 3.46 whatever s is: with two degrees of freedom p = 0.0742; of (4, 5, 6) 8.66, 0.0131.
WEAK, STRONG = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]


def test_a_claim_that_stands_alone_does_not_stand_among_many():
    alone = [claim(STRONG)]
    _decide(alone)
    assert alone[0]["p_value"] == alone[0]["p_value_holm"] == pytest.approx(0.0131, abs=1e-4)
    assert alone[0]["verdict"] == "SUPPORTED"
    many = [claim(STRONG), *(claim(WEAK) for _ in range(3))]
    _decide(many)
    assert many[0]["p_value"] == pytest.approx(0.0131, abs=1e-4)
    assert many[0]["p_value_holm"] == pytest.approx(4 * 0.013072, abs=1e-4)
    assert [c["verdict"] for c in many] == ["INCONCLUSIVE"] * 4


def test_what_is_not_comparable_is_in_no_family():
    three = [claim(STRONG), claim(STRONG, comparable=False), claim([9.0, 10.0, 11.0])]
    _decide(three)
    assert [c["verdict"] for c in three] == ["SUPPORTED", "NOT COMPARABLE", "SUPPORTED"]
    assert three[1]["p_value_holm"] is None
    assert three[0]["p_value_holm"] == pytest.approx(0.0131, abs=1e-4), "the larger of two is multiplied by 1"
    assert three[2]["p_value_holm"] == pytest.approx(2 * three[2]["p_value"])


def test_arms_share_what_a_claim_says_they_do():
    """Steps and prompts exactly, tokens and FLOPs to 2 %, seed by seed; a checkpoint has none of them."""
    budgets = {
        "a": {"steps": [5, 5], "tokens": [1000, 2000], "prompts": ["x", "y"]},
        "b": {"steps": [5, 6], "tokens": [1019, 2000], "prompts": ["x", "y"]},
        "c": {"steps": [5, 5], "tokens": [1000, 2100], "prompts": ["x", "z"]},
        "checkpoint": {"steps": [None], "tokens": [None], "prompts": [None]},
    }
    assert _differ("steps", ["a", "b"], budgets) == "a 5, b 6"
    assert _differ("tokens", ["a", "b"], budgets) is None
    assert _differ("tokens", ["a", "c"], budgets) == "a 2000, c 2100"
    assert _differ("prompts", ["a", "c"], budgets) == "a y, c z"
    assert _differ("prompts", ["a", "b", "checkpoint"], budgets) is None
