"""Learning rates: which grid is made of them, which is chosen, what is said of an edge, and that claims use it."""

import json

import pytest
from grid_example import written

from distill.bench.grid import load_bench
from distill.bench.plan import BUDGET, apply_rates, choose, edges, plan, rate_name, tuning_bench, tuning_text
from distill.errors import UserError
from distill.storage import write_sealed

RATES = [0.001, 0.01, 0.1]


@pytest.fixture
def path(tmp_path):
    tuning = {
        "seeds": 2,
        "first_seed": 900,
        "metric": "nll.easy",
        "set": {"evaluate.split": "validation", "evaluate.solutions": 5},
        "arms": {"sequence": {"rates": RATES, "serves": ["control"]}, "more": {"rates": RATES}},
        "results": str(tmp_path / "tuned.json"),
    }
    return written(tmp_path, tuning=tuning)


def nll(best: float, seed: int) -> dict[str, dict[int, float]]:
    """Values by "ARM=RATE@metric" of which `best` has the lowest mean for sequence, and the last for more."""
    values = {}
    for rate in RATES:
        values[f"{rate_name('sequence', rate)}@nll.easy"] = {900: 1.0 + (rate != best), 901: 1.2 + seed}
        values[f"{rate_name('more', rate)}@nll.easy"] = {900: 1 / rate, 901: 1 / rate}
    return values


def tuned(bench, best: float = 0.01) -> dict:
    return {"seeds": [900, 901], "arms": choose(bench.tuning, nll(best, 0))}


def test_every_rate_is_a_run_on_seeds_and_problems_of_its_own(path):
    bench, file = load_bench(path)
    tasks = plan(tuning_bench(bench), BUDGET, file)
    runs = {name: t for name, t in tasks.items() if t.kind == "run"}
    tried = {
        f"{arm}={rate:g}-{seed}" for arm in ("sequence", "more") for rate in RATES for seed in (900, 901)
    }
    assert set(runs) == tried | {"sequence-900", "sequence-901"}, "`more` starts from `sequence`"
    for name, run in runs.items():
        if "=" in name:
            assert run.recipe.train.learning_rate == float(name.partition("=")[2].rpartition("-")[0])
            assert run.recipe.evaluate.split == "validation" and run.recipe.seed in (900, 901)
    assert all("tuning" in t.folder.parts for t in tasks.values())


def test_the_best_rate_is_chosen_and_an_edge_is_called_one(path):
    bench, _ = load_bench(path)
    found = tuned(bench)
    assert found["arms"]["sequence"]["chosen"] == 0.01 and not found["arms"]["sequence"]["edge"]
    assert found["arms"]["more"]["chosen"] == 0.1 and found["arms"]["more"]["edge"]
    assert edges(found, ["control", "sequence", "more"]) == ["more"]
    assert edges(tuned(bench, 0.1), ["control", "base"]) == ["control"], (
        "it takes over what is best for sequence"
    )
    assert edges(tuned(bench, min(RATES)), ["sequence", "more"]) == ["sequence", "more"], (
        "the first is one too"
    )
    text = tuning_text(found)
    assert "an edge" in text.splitlines()[1] and "an edge" not in text.splitlines()[0]


def test_a_share_is_best_at_its_highest(path):
    bench, _ = load_bench(path)
    section = bench.tuning.model_copy(
        update={"metric": "accuracy.easy", "arms": {"more": bench.tuning.arms["more"]}}
    )
    values = {f"{rate_name('more', rate)}@accuracy.easy": {900: rate} for rate in RATES}
    assert choose(section, values)["more"]["chosen"] == 0.1


def test_an_arm_may_be_chosen_by_a_metric_of_its_own(path):
    """A control that reads no worked solutions is not judged by them."""
    bench, _ = load_bench(path)
    own = bench.tuning.arms["more"].model_copy(update={"metric": "accuracy.easy"})
    section = bench.tuning.model_copy(update={"arms": {**bench.tuning.arms, "more": own}})
    right = {0.001: 0.1, 0.01: 0.3, 0.1: 0.2}
    values = nll(0.001, 0) | {
        f"{rate_name('more', rate)}@accuracy.easy": {900: share, 901: share} for rate, share in right.items()
    }
    found = choose(section, values)
    assert found["sequence"]["chosen"] == 0.001 and found["sequence"]["metric"] == "nll.easy"
    assert found["more"]["chosen"] == 0.01 and not found["more"]["edge"]
    assert "accuracy.easy: 0.001 10, 0.01 30, 0.1 20" in tuning_text({"arms": found})


def test_a_chosen_rate_is_used_in_every_budget(path, tmp_path):
    bench, file = load_bench(path)
    assert apply_rates(bench) is None
    (tmp_path / "tuned.json").write_text(json.dumps(tuned(bench)))
    assert apply_rates(bench)["arms"]["sequence"]["chosen"] == 0.01
    tasks = plan(bench, "full", file)
    rates = {
        t.arm: t.recipe.train.learning_rate for t in tasks.values() if t.kind == "run" and not t.checkpoint
    }
    assert rates == {"sequence": 0.01, "control": 0.01, "more": 0.1}


@pytest.mark.parametrize("change", ["metric", "seeds", "arms"])
def test_a_choice_made_for_something_else_is_refused(path, tmp_path, change):
    bench, _ = load_bench(path)
    arms = tuned(bench)["arms"]
    change = {
        "metric": {"arms": {**arms, "more": {**arms["more"], "metric": "nll.hard"}}},
        "seeds": {"seeds": [900]},
        "arms": {"arms": {}},
    }[change]
    (tmp_path / "tuned.json").write_text(json.dumps({**tuned(bench), **change}))
    with pytest.raises(UserError, match="--tune"):
        apply_rates(bench)


def test_a_flipped_bit_of_what_was_chosen_is_told(path, tmp_path):
    """Sealed, and where it is an older file without a seal: a choice is worked out of its values again."""
    bench, _ = load_bench(path)
    file, found = tmp_path / "tuned.json", tuned(bench)
    write_sealed(file, found)
    assert apply_rates(bench)["arms"] == found["arms"]
    sound = file.read_bytes()
    for place in range(0, len(sound), 7):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 2]) + sound[place + 1 :])
        try:
            assert apply_rates(bench)["arms"] == found["arms"], place  # white space
        except UserError as error:
            assert "tuned.json" in str(error)
    found["arms"]["sequence"]["chosen"] = 0.1
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match="the rate chosen for sequence is not the best"):
        apply_rates(bench)


def test_fewer_than_three_rates_and_two_choices_for_one_arm_are_refused(tmp_path):
    tuning = {"metric": "nll.easy", "results": "x.json", "arms": {"sequence": {"rates": [0.1, 0.2]}}}
    with pytest.raises(UserError, match=r"rates"):
        load_bench(written(tmp_path, tuning=tuning))
    twice = {"sequence": {"rates": RATES, "serves": ["control"]}, "control": {"rates": RATES}}
    with pytest.raises(UserError, match="two learning rates are chosen for control"):
        load_bench(written(tmp_path, tuning={**tuning, "arms": twice}))
    with pytest.raises(UserError, match="no section `tuning`"):
        tuning_bench(load_bench(written(tmp_path))[0])
