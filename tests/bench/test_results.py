"""Claims judged together: verdicts by the corrected p-value, and what arms must share to be compared."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.bench.claims import Fact
from distill.bench.items import items_of
from distill.bench.judge import _differ, decide
from distill.bench.results import _fact, _wall
from distill.bench.verdicts import effect, verdict_p


def claim(sample: list[float], comparable: bool = True) -> dict:
    found = effect({"arm": 1.0}, {"arm": dict(enumerate(sample))})
    p_value = verdict_p(found, "greater") if comparable else None
    return {
        "family": "headline", "p_value_equivalent": None, "effect": found,
        "expect": "greater", "margin": 0.0, "p_value": p_value, "comparable": comparable,
        "verdict": "INCONCLUSIVE" if comparable else "NOT COMPARABLE",
    }  # fmt: skip


# Student's t of (1, 2, 3) / s is 3.46 whatever s is: with two degrees of freedom p = 0.0742; of (4, 5, 6) 8.66, 0.0131.
WEAK, STRONG = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]


def test_a_claim_that_stands_alone_does_not_stand_among_many():
    alone = [claim(STRONG)]
    decide(alone)
    assert alone[0]["p_value"] == alone[0]["p_value_holm"] == pytest.approx(0.0131, abs=1e-4)
    assert alone[0]["verdict"] == "SUPPORTED"
    many = [claim(STRONG), *(claim(WEAK) for _ in range(3))]
    decide(many)
    assert many[0]["p_value"] == pytest.approx(0.0131, abs=1e-4)
    assert many[0]["p_value_holm"] == pytest.approx(4 * 0.013072, abs=1e-4)
    assert [c["verdict"] for c in many] == ["INCONCLUSIVE"] * 4


def test_what_is_not_comparable_is_in_no_family():
    three = [claim(STRONG), claim(STRONG, comparable=False), claim([9.0, 10.0, 11.0])]
    decide(three)
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

    def differ(key, arms):
        return _differ(key, {arm: [0, 1][: len(budgets[arm][key])] for arm in arms}, [0, 1], budgets)

    assert differ("steps", ["a", "b"]) == "a 5, b 6"
    assert differ("tokens", ["a", "b"]) is None
    assert differ("tokens", ["a", "c"]) == "a 2000, c 2100"
    assert differ("prompts", ["a", "c"]) == "a y, c z"
    assert differ("prompts", ["a", "b", "checkpoint"]) is None


def test_a_fact_is_a_mean_with_its_least_and_most_of_the_seeds():
    """Relative ones are shares of the arm that is taken away, seed by seed."""
    values = {"new@train.seconds": {0: 3.0, 1: 8.0, 2: 5.0}, "old@train.seconds": {0: 2.0, 1: 4.0}}
    known = {"id": "f", "sentence": "s", "statement": "t", "because": "b", "metric": "train.seconds",
             "effect": {"new": 1, "old": -1}}  # fmt: skip
    plain, share = (_fact(Fact(**known, relative=relative), values) for relative in (False, True))
    assert (plain["mean"], plain["range"]) == (2.5, [1.0, 4.0])
    assert (share["mean"], share["range"], share["unit"]) == (0.75, [0.5, 1.0], "%")


def test_the_first_sample_of_a_problem_is_its_item(tmp_path):
    """Several answers to a problem are no several problems, and a teacher's beside them are not the run's."""
    verdicts = {
        ("b", 0): "correct",
        ("b", 1): "wrong",
        ("a", 0): "wrong",
        ("a", 1): "correct",
        ("a", 2): "correct",
    }
    shared = {"level": "easy", "solution_nats": 1.5, "solution_tokens": 3}
    rows = [
        {"model": model, "prompt_id": problem, "sample_idx": sample, "tokens": 10 + sample, **shared}
        | {"verdict": verdict if model == "student" else "correct"}
        for model in ("teacher", "student")
        for (problem, sample), verdict in verdicts.items()
    ]
    folder = tmp_path / "eval" / "answers"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    (items,) = items_of(tmp_path).values()
    assert (
        items.item.tolist() == ["a", "b"] and items.right.tolist() == [False, True] and items.count == (1, 2)
    )
    assert items.tokens.tolist() == [10, 10] and items.nats.tolist() == [1.5, 1.5]


def test_a_budgets_clock_has_that_of_the_smaller_ones_it_took_over():
    bench, clock = (
        SimpleNamespace(budgets=["small", "full", "wide"]),
        {"wall": {"small": 10.0, "full": 5.0, "wide": 1.0}},
    )
    assert [_wall(bench, name, clock) for name in bench.budgets] == [10.0, 15.0, 16.0]
    assert _wall(bench, "full", {"wall": {"full": 5.0}}) == 5.0
