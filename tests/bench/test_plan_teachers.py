"""Arms that are taught by several other arms, or start from the mean of their weights: what is made before what."""

import pytest
import yaml

from distill.bench.claims import texts
from distill.bench.grid import load_bench
from distill.bench.plan import plan
from distill.errors import UserError

BENCH = {
    "title": "t", "run_dir": "runs", "recipe": "recipes/specialists.yaml", "budgets": {"small": {"seeds": 2}},
    "arms": {
        "sums": {"set": {"generate.by_tag": False, "train.teachers": {}, "train.on_policy": {}}},
        "lists": {"like": "sums", "set": {"prompts.families": ["sorting"]}},
        "merged": {"teachers": {"addition": "sums", "sorting": "lists"}},
        "mean": {"teachers": {"addition": "sums", "sorting": "lists"}, "averaged": True, "checkpoint": "student.from",
                 "set": {"evaluate.speed": False}},
    },
    "claims": [{"id": "c", "group": "g", "source": "s", "sentence": "s", "hypothesis": "h", "metric": "accuracy.hard",
                "effect": {"merged": 1, "mean": -1}, "expect": "greater", "equal": [], "axis": "a"}],
}  # fmt: skip


def planned(tmp_path, change=lambda data: None):
    data = yaml.safe_load(yaml.safe_dump(BENCH))
    change(data)
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(data))
    return plan(*_ordered(load_bench(str(path))))


def _ordered(loaded):
    bench, file = loaded
    return bench, "small", file


def test_specialists_come_first_each_of_its_own_seed(tmp_path):
    tasks = planned(tmp_path)
    merged, mean = tasks["merged-1"], tasks["mean-1"]
    assert merged.recipe.train.teachers.models == {
        "addition": "runs/sums-1/student", "sorting": "runs/lists-1/student",
    }  # fmt: skip
    answers = tasks[tasks[next(n for n in merged.needs if n.startswith("rows-"))].needs[0]]
    assert answers.kind == "answers" and set(answers.needs) == {"sums-1", "lists-1"}, "they write its rows"
    assert {"sums-1", "lists-1"} <= set(merged.needs)
    (base,) = [tasks[n] for n in mean.needs if tasks[n].kind == "base"]
    assert base.recipe.student.made_from.model == "runs/sums-1/student"
    assert base.recipe.student.made_from.average == ("runs/lists-1/student",)
    assert set(base.needs) == {"sums-1", "lists-1"} and mean.checkpoint == base.recipe.student.model


def test_the_same_recipe_again_has_seeds_of_its_own(tmp_path):
    tasks = planned(tmp_path, lambda data: data["arms"]["sums"].update(seed_offset=50))
    assert [tasks[f"{arm}-{seed}"].recipe.seed for arm in ("sums", "lists") for seed in (0, 1)] == [
        50,
        51,
        0,
        1,
    ]


def test_the_student_of_one_arm_teaches_another(tmp_path):
    def taught(data):
        data["arms"]["merged"] = {"teacher": "sums", "set": {"generate.by_tag": False, "train.teachers": {}}}

    made = planned(tmp_path, taught)["merged-1"]
    assert made.recipe.teacher.model == "runs/sums-1/student" and "sums-1" in made.needs


def test_a_specialist_belongs_to_the_text_of_a_claim(tmp_path):
    def of(change):
        data = yaml.safe_load(yaml.safe_dump(BENCH))
        change(data)
        return texts(yaml.safe_dump(data))["c"]

    plain = of(lambda data: None)
    assert plain != of(lambda data: data["arms"]["lists"]["set"].update({"train.steps": 3}))
    assert plain != of(lambda data: data["arms"]["merged"]["teachers"].update(addition="lists"))
    assert plain == of(lambda data: data["arms"].update(other={"set": {"train.steps": 3}}))


def test_teachers_that_are_no_arms_are_refused(tmp_path):
    with pytest.raises(UserError, match="arm merged: teachers names no arm: 'sumz'; did you mean 'sums'"):
        planned(tmp_path, lambda data: data["arms"]["merged"]["teachers"].update(addition="sumz"))
