"""How long a budget takes: held against the two grids that were measured, arms, tasks and seconds."""

import json
import subprocess

import pytest
import yaml
from conftest import ROOT

from distill.bench.claims import History
from distill.bench.grid import Bench, load_bench
from distill.bench.plan import forecast, known_results, plan
from distill.bench.run import describe_plan


@pytest.mark.parametrize("budget", ["small", "full"])
def test_the_first_registration_would_have_been_foreseen(budget):
    """Its file as it was measured: 4,596 and 9,268 seconds of work, 37 and 85 minutes on the wall."""
    if not History(ROOT).available:
        pytest.skip("no whole history here: a shallow clone, or no checkout")
    shown = subprocess.run(
        ["git", "-C", str(ROOT), "show", "d5c644a:recipes/claims.yaml"],
        capture_output=True,
        text=True,
        check=True,
    )
    bench = Bench.model_validate({**yaml.safe_load(shown.stdout), "claims": []})
    kept = ["git", "-C", str(ROOT), "show", f"fe7c0d3:recipes/results/claims-{budget}.json"]
    results = json.loads(subprocess.run(kept, capture_output=True, text=True, check=True).stdout)
    tasks = plan(bench, budget, ROOT / "recipes" / "claims.yaml")
    found = forecast(bench, tasks, results)
    assert len(tasks) == results["tasks"] and found["guessed"] == []
    assert found["work_minutes"] == pytest.approx(results["seconds"]["work"] / 60, rel=0.2)
    assert found["wall_minutes"] == pytest.approx(results["seconds"]["wall"] / 60, rel=0.2)


def test_seconds_of_arms_that_were_measured_are_taken_as_they_are():
    bench, file = load_bench(str(ROOT / "recipes" / "claims.yaml"))
    results, name = known_results("recipes/claims.yaml")
    tasks = plan(bench, "small", file)
    exact = dict.fromkeys([*bench.all_arms(), "answers", "rows"], 10.0)
    arms = {
        arm: {"metrics": {"train.steps": {"mean": bench_steps(tasks, arm)}}, "budget": {}} for arm in exact
    }
    found = forecast(bench, tasks, {"arm_seconds": exact, "arms": arms})
    assert (
        found["work_minutes"] == pytest.approx(len(tasks) * 10 / 60, rel=0.01) and name == "claims-full.json"
    )
    alone = forecast(bench, tasks, {"arm_seconds": exact, "arms": arms}, jobs=1)
    assert alone["wall_minutes"] > 1.9 * found["wall_minutes"]
    assert forecast(bench, tasks, results)["guessed"] == []
    known = {arm: found for arm, found in results["arms"].items() if arm != "scratch"}
    assert forecast(bench, plan(bench, "full", file), {**results, "arms": known})["guessed"] == ["scratch"], (
        "an arm that nobody has measured is named"
    )


@pytest.mark.parametrize("name, budget", [("claims_language", "small"), ("claims_combination", "full")])
def test_every_shipped_grid_that_was_measured_has_a_forecast(name, budget):
    """Of its own results: what was measured takes that long."""
    found = describe_plan(str(ROOT / "recipes" / f"{name}.yaml"), budget)["forecast"]
    results, file = known_results(f"recipes/{name}.yaml")
    assert found["from"] == f"recipes/results/{file}" and found["guessed"] == []
    assert found["work_minutes"] == pytest.approx(results["seconds"]["work"] / 60, rel=0.1)


def test_arms_that_nobody_measured_take_what_trained_ones_take():
    """And not 60 times that."""
    file = str(ROOT / "recipes" / "claims_language.yaml")
    found, whole = describe_plan(file, "small"), describe_plan(file, "full")
    results, _ = known_results("recipes/claims_language.yaml")
    share = whole["runs"] / len(
        [run for arm in results["arms"].values() for run in arm["metrics"]["parameters.total"]["values"]]
    )
    measured = found["forecast"]["work_minutes"]
    assert measured < whole["forecast"]["work_minutes"] < 1.5 * share * measured
    assert whole["forecast"]["guessed"]


def bench_steps(tasks: dict, arm: str) -> float:
    return next((t.recipe.train.steps for t in tasks.values() if t.arm == arm), 1.0)
