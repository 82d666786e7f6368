"""`student.from`: the base is a stage, an ordinary folder that the rest of the run starts from."""

import json

import pytest
import yaml

from distill.config.recipe import load_recipe
from distill.errors import UserError
from distill.models.load import load_config
from distill.training.arms import make_base, planned_base


@pytest.fixture
def recipe(make_recipe):
    path, run = make_recipe(teacher="llama", student="llama")
    with open(path) as file:
        data = yaml.safe_load(file)
    data["filter"]["finish_reasons"] = ["stop", "length"]  # a tiny teacher never ends
    model = data["student"].pop("model")
    data["student"] = {"from": {"model": model, "layers": 1}, "adapter": "full"}
    with open(path, "w") as file:
        yaml.safe_dump(data, file)
    return path, run


def test_a_run_starts_from_the_base_that_it_makes(recipe, run_cli):
    path, run = recipe
    code, said, told = run_cli("run", path)
    assert code == 0, told
    assert "1 layers of" in said
    manifest = json.loads((run / "base" / "manifest.json").read_text())
    assert manifest["layers"] == [0]
    assert manifest["counts"]["parameters"] < manifest["counts"]["parameters_before"]
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert (
        metrics["models"]["base"]["model"]["layers"] == metrics["models"]["student"]["model"]["layers"] == 1
    )
    assert metrics["models"]["teacher"]["model"]["layers"] == 2
    card = (run / "base" / "README.md").read_text()
    assert "license: mit" in card and f"{manifest['counts']['parameters']:,} after" in card
    code, said, told = run_cli("run", str(run / "recipe.yaml"))  # as resolved, and all of it done before
    assert code == 0 and "base: done before" in said and "student: done before" in said, told
    code, said, _ = run_cli("provenance", str(run))
    assert code == 0 and "whole" in said


def test_doctor_and_dry_run_make_nothing(recipe, run_cli):
    path, run = recipe
    code, said, told = run_cli("doctor", path)
    assert code == 0, said + told
    code, said, told = run_cli("train", path, "--dry-run")
    assert code == 0 and "student_parameters" in said, told
    assert not run.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("student.from.layers=3", "the model has 2 layers"),
        ("student.from.layers=[1,0]", "in rising order"),
        ("student.from.lairs=3", "did you mean 'layers'"),
        ("student.model=elsewhere/model", "give one of `model` and `from`"),
        ("student.from.model=nowhere", "is not a folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(recipe, run_cli, change, says):
    path, run = recipe
    code, _, told = run_cli("run", path, change)
    assert code == 2 and says in told and not run.exists()


def test_a_choice_by_activation_reads_the_recipes_prompts(make_recipe, run_cli):
    """Half of the experts: planned, made, known again, and another base where the prompts are others."""
    path, run = make_recipe(teacher="qwen3_moe", student="qwen3_moe")
    with open(path) as file:
        data = yaml.safe_load(file)
    model = data["student"].pop("model")
    calibration = {"rows": 4, "max_new_tokens": 4}
    data["student"] = {
        "from": {"model": model, "experts": {"drop": 0.5}, "calibration": calibration}, "adapter": "full",
    }  # fmt: skip
    data["train"]["steps"] = 2
    with open(path, "w") as file:
        yaml.safe_dump(data, file)
    code, said, told = run_cli("doctor", path)
    assert code == 0 and "2 layers of 2 routed experts, 2 per token" in said, said + told
    recipe = load_recipe(path)
    with planned_base(recipe) as planned:
        config = load_config(planned.student.model)
    manifest = make_base(recipe)
    assert config.num_experts == load_config(str(run / "base")).num_experts == 2
    assert manifest["did"] == ["2 of 4 experts a layer (reap)"] and len(manifest["experts"]["experts"]) == 2
    assert "experts of model.layers.0.mlp" in (run / "base" / "README.md").read_text()
    assert make_base(recipe) == manifest  # done before
    with pytest.raises(UserError, match=r"prompts\.levels"):
        make_base(load_recipe(path, ["prompts.levels={easy: 5}"]))
    plain = load_recipe(path, ["student.from={model: x, layers: 1}"])
    assert set(plain.base_identity) == {"from"} and set(recipe.base_identity) == {"from", "prompts", "seed"}
