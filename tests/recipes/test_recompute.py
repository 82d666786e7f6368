"""The script that shares nothing with the toolkit gives every number of a real, tiny grid; and of what is committed."""

import ast
import json
from pathlib import Path

import pytest
import recompute
from conftest import ROOT
from grid_example import in_this_process, written

from distill.bench.run import run_bench

MEASURED = {
    # Models as they are for the seeds, and two that train for two steps: runs of a second.
    "arms": {
        "base": {"checkpoint": str(ROOT / "checkpoints" / "base"), "seeds": 6, "probes": "PROBES"},
        "teacher": {"checkpoint": str(ROOT / "checkpoints" / "teacher"), "probes": "PROBES"},
        "worked": {"set": {"teacher": None, "prompts.solutions": True}},
        "longer": {"like": "worked", "set": {"train.steps": 3}},
    },
    "set": {"evaluate.solutions": 5, "evaluate.levels": {"easy": 14}},
    "claims": [
        {
            "id": "gain", "group": "G", "sentence": "s", "hypothesis": "h", "metric": "accuracy.easy", "headline": True,
            "second": "nll.easy", "effect": {"teacher": 1, "base": -1}, "expect": "greater", "trivial": 0.5,
            "equal": [], "axis": "checkpoints",
        },
        {
            "id": "tokens", "group": "G", "sentence": "s", "hypothesis": "h", "metric": "train.tokens",
            "effect": {"longer": 1, "worked": -1}, "expect": "greater", "headline": True, "relative": True,
            "equal": ["prompts"], "axis": "steps",
        },
        {
            "id": "same-loss", "group": "H", "sentence": "s", "hypothesis": "h", "metric": "nll.easy", "margin": 5.0,
            "effect": {"longer": 1, "worked": -1}, "expect": "within", "equal": ["prompts"], "axis": "steps",
        },
        {
            "id": "below", "group": "H", "sentence": "s", "hypothesis": "h", "metric": "accuracy.easy",
            "effect": {"worked": 1, "base": -1}, "expect": "less", "equal": [], "axis": "a checkpoint",
        },
        {
            "id": "unequal", "group": "H", "sentence": "s", "hypothesis": "h", "metric": "accuracy.easy",
            "effect": {"longer": 1, "worked": -1}, "expect": "greater", "equal": ["tokens"],
        },
        {
            "id": "flaw", "group": "I", "sentence": "s", "hypothesis": "h", "metric": "flaw.even",
            "effect": {"teacher": 1, "base": -1}, "expect": "greater", "equal": [], "axis": "checkpoints",
        },
    ],
    "facts": [
        {
            "id": "flops", "sentence": "s", "statement": "t", "because": "b", "metric": "cost.flops_per_token",
            "effect": {"base": 1, "teacher": -1}, "relative": True,
        }
    ],
    "evidence": [{"sentence": "s", "evidence": "e", "ends": "there"}],
    "controls": {
        "metric": "accuracy.easy", "reference": "base", "doses": {"worked": 1.0}, "nulls": 4,
        "arms": ["base", "worked"],
    },
    "curves": [],
    "budgets": {"small": {"seeds": 3}},
    "first_seed": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recompute")
    probes = [
        {
            "probe_id": f"p{i}",
            "flaw": "even",
            "kind": "regex",
            "pattern": "[02468]$",
            "prompt": f"What is 4{i} + 1{i}?",
        }
        for i in range(6)
    ]
    (folder / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    path = Path(written(folder, **MEASURED))
    text = path.read_text().replace("PROBES", str(folder / "probes.jsonl"))
    path.write_text(text.replace(f"  teacher.model: {ROOT / 'checkpoints' / 'teacher'}\n", ""))
    with in_this_process():
        results = run_bench(str(path), jobs=1, say=lambda line: None)
    return folder / "grid", results


def test_every_number_of_a_grid_is_worked_out_again(grid):
    folder, _ = grid
    results = json.loads((folder / "results.json").read_text())
    answers = recompute.read_answers(folder / "items.parquet")
    checks = recompute.recompute(results, answers)
    assert not checks.wrong and checks.done > 300
    seeds = {seed for _, seed, _ in answers}
    assert seeds == set(range(40, 46)) and {c["effect"]["n"] for c in results["claims"]} == {3}


@pytest.mark.parametrize(
    "where",
    [
        ("claims", 0, "effect", "mean"),
        ("claims", 0, "effect", "ci95"),
        ("claims", 1, "p_value_holm"),
        ("claims", 2, "detectable"),
        ("claims", 3, "verdict"),
        ("claims", 0, "second", "effect", "mean"),
        ("claims", 0, "items", "stderr"),
        ("arms", "base", "metrics", "accuracy.easy", "values", "41"),
        ("controls", "called"),
        ("controls", "nulls", 1, "effect", "mean"),
        ("controls", "doses", 0, "detectable"),
        ("facts", 0, "mean"),
    ],
    ids=lambda where: ".".join(map(str, where)),
)
def test_a_number_that_was_changed_is_found(grid, where):
    folder, results = grid
    results = json.loads(json.dumps(results))
    at = results
    for key in where[:-1]:
        at = at[key]
    old = at[where[-1]]
    changed = {list: lambda: [old[0] - 0.01, old[1]], str: lambda: f"{old}!"}
    at[where[-1]] = changed.get(type(old), lambda: old + 0.01)()
    checks = recompute.recompute(results, recompute.read_answers(folder / "items.parquet"))
    assert checks.wrong


def test_the_results_say_what_a_referee_asks(grid):
    _, results = grid
    rows = {claim["id"]: claim for claim in results["claims"]}
    gain = rows["gain"]
    assert gain["family"] == "headline" and rows["below"]["family"] == "exploratory: H"
    assert any(line.startswith("checkpoint: ") for line in gain["differs"])
    assert rows["tokens"]["differs"] == ["train.steps: 2 (worked); 3 (longer)"] or rows["tokens"][
        "differs"
    ] == ["train.steps: 3 (longer); 2 (worked)"]
    assert gain["falsified"].startswith("a 95 % interval wholly below 0 points, or two one-sided")
    assert any("checkpoints/base" in name for name in gain["fixed"])
    assert any("checkpoints/teacher" in name for name in gain["fixed"])
    assert rows["unequal"]["verdict"] == "NOT COMPARABLE"
    assert gain["items"]["n"] == 3 * 14 and len(results["arms"]["base"]["metrics"]["nll.easy"]["values"]) == 6
    assert {null["halves"] for null in results["controls"]["nulls"]} == {"seeds", "problems"}
    low, high = gain["effect"]["ci95"]
    assert -1 <= low < high <= 1
    assert results["registration"] == {"checked": False, "claims": 0}


def test_the_script_shares_nothing_with_the_toolkit():
    tree = ast.parse((ROOT / "recipes" / "recompute.py").read_text())
    names = {a.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {
        "argparse",
        "collections",
        "json",
        "math",
        "numpy",
        "pathlib",
        "pyarrow",
        "scipy",
        "statistics",
    }


@pytest.mark.parametrize(
    "name, least", [("claims-small", 1000), ("claims-full", 1000), ("language-small", 300)]
)
def test_what_is_committed_is_worked_out_again(name, least):
    file = ROOT / "recipes" / "results" / f"{name}.json"
    results = json.loads(file.read_text())
    checks = recompute.recompute(results, recompute.read_answers(file.with_name(f"{name}-items.parquet")))
    assert not checks.wrong and checks.done > least
