"""Recipes: every problem at once, each with its fix; every shipped recipe is valid."""

import pytest
from conftest import ROOT

from distill.config.recipe import Recipe, load_recipe
from distill.errors import UserError

# A grid of arms is checked in tests/bench/test_run.py.
SHIPPED = sorted(p for p in (ROOT / "recipes").glob("*.yaml") if "\narms:" not in p.read_text())


def test_every_shipped_recipe_parses():
    assert len(SHIPPED) == 15, "count the shipped recipes here, so that none goes unparsed"
    for path in SHIPPED:
        assert isinstance(load_recipe(str(path)), Recipe)


def problems_of(tmp_path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), list(overrides))
    return caught.value.problems


GOOD = "run_dir: x\nteacher: {model: t}\nstudent: {model: s}\n"


def test_all_problems_at_once_each_with_the_nearest_name(tmp_path):
    text = (
        GOOD
        + "train: {stepz: 3, learning_rate: fast, precision: int4}\ngenerat: {}\nprompts: {levels: {esay: 3}}\n"
    )
    found = problems_of(tmp_path, text)
    joined = "\n".join(found)
    assert len(found) == 5
    assert "did you mean 'steps'" in joined
    assert "did you mean 'generate'" in joined
    assert "train.learning_rate" in joined and "'fast'" in joined
    assert "train.precision" in joined and "bf16" in joined
    assert "did you mean 'easy'" in joined


@pytest.mark.parametrize(
    "text, said",
    [
        ("student: {model: s}\nteacher: {model: t}\n", "'run_dir' is missing"),
        ("run_dir: x\nstudent: {model: s}\n", "give either `teacher`"),
        ("run_dir: x\nteacher: {model: t}\nstudent: {}\n", "exactly one of `model`"),
        (
            "run_dir: x\nteacher: {model: t}\nstudent: {config: {hidden_size: 3}, adapter: full}\n",
            "model_type",
        ),
        ("run_dir: x\nteacher: {model: t}\nstudent: {config: {model_type: llama}}\n", "adapter: full"),
        (GOOD + "train: {steps: 5, warmup_steps: 5}\n", "warmup_steps (5) must be below steps (5)"),
        (GOOD + "train: {objectives: [{name: foward_kl}]}\n", "did you mean forward_kl"),
        (GOOD + "train: {objectives: [{name: forward_kl, temprature: 2}]}\n", "did you mean 'temperature'"),
        (
            GOOD + "train: {objectives: [{name: forward_kl, temperature: -1}]}\n",
            "temperature must be above 0",
        ),
        (GOOD + "train: {objectives: []}\n", "at least 1"),
        ("just text", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_each_mistake_is_named(tmp_path, text, said):
    joined = "\n".join(problems_of(tmp_path, text))
    assert said.replace("'temperature'", "temperature") in joined.replace("'temperature'", "temperature")


def test_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + "train: {objectives: [{name: cross_entropy}, {name: forward_kl}]}\n")
    changes = ["train.steps=7", "train.warmup_steps=0", "prompts.families=[addition]"]
    recipe = load_recipe(str(path), [*changes, "train.objectives.1.temperature=2", "student.lora.rank=4"])
    assert (recipe.train.steps, recipe.student.lora.rank, recipe.prompts.families) == (7, 4, ["addition"])
    assert recipe.train.objectives[1].options == {"temperature": 2, "temperature_squared": False}
    assert "unknown key 'train.nope'" in problems_of(tmp_path, GOOD, "train.nope=1")[0]
    assert "written key.sub=value" in problems_of(tmp_path, GOOD, "steps")[0]


def test_missing_recipe_lists_the_shipped_ones():
    with pytest.raises(UserError, match=r"demo\.yaml"):
        load_recipe("recipes/dmo.yaml")
