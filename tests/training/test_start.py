"""`student.from`: the base is a stage, an ordinary folder that the rest of the run starts from."""

import json

import pytest
import yaml


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
