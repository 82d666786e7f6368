"""`distill init`: the recipe it writes is a recipe, passes the doctor, and its comments tell the truth."""

import re

import pytest
import yaml

from distill.commands.scaffold import entries
from distill.config.recipe import Recipe, load_recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_passes_the_doctor_and_names_every_key(here, run_cli):
    code, out, _ = run_cli("init", "mine")
    assert code == 0 and "mine.yaml" in out and "distill doctor mine.yaml" in out
    text = (here / "mine.yaml").read_text()
    recipe = load_recipe("mine.yaml")
    assert recipe.run_dir == "checkpoints/mine" and recipe.teacher.model == "checkpoints/teacher"
    code, out, _ = run_cli("doctor", "mine.yaml")
    assert code == 0 and " 0 WARN, 0 FAIL" in out
    for path, _, own in entries():
        for entry in own:
            name = entry.key.rpartition(".")[2]
            assert re.search(rf"^\s*(# )?{name}:.*  # \S", text, re.M), f"{path}: {name} is not explained"
    with pytest.raises(SystemExit):
        run_cli("init")


def test_uncommenting_a_key_changes_nothing(here, run_cli):
    """What stands behind a # is the default: with all of them active the recipe is the same one."""
    run_cli("init", "mine")
    text = (here / "mine.yaml").read_text()
    # A server has an address, a model to make a student from a name, and what a teacher is told words, that have no
    # default.
    kept = (
        ("  # endpoint:", "  # terms:"),
        ("  # from:", "  # config: null  "),
        ("    # context:  ", "    # remember_gb:"),
    )
    for first, behind in kept:
        start = text.index(first)
        text = text[:start] + text[text.index(behind, start) :]
    active = re.sub(r"^(\s*)# (\w+:)", r"\1\2", text.partition("\n\n")[2], flags=re.M)
    assert active.count("# ") < text.count("\n") + 40  # only explanations are left
    assert Recipe.model_validate(yaml.safe_load(active)) == load_recipe("mine.yaml")


def test_init_for_a_pair_of_ones_own(here, run_cli, hub):
    """Nothing is overwritten; objectives and lengths are what this pair can do."""
    pair = ["--teacher", hub["qwen3_moe"], "--student", hub["llama"]]
    assert run_cli("init", "own.yaml", *pair)[0] == 0
    recipe = load_recipe("own.yaml")
    assert [o.name for o in recipe.train.objectives] == ["cross_entropy", "forward_kl"]
    assert recipe.generate.max_new_tokens == 256 and recipe.train.learning_rate == 2e-4
    code, out, _ = run_cli("doctor", "own.yaml")
    assert code == 0, out
    before = (here / "own.yaml").read_text()
    code, _, err = run_cli("init", "own", *pair)
    assert code == 2 and "there already" in err and (here / "own.yaml").read_text() == before
    run_cli("init", "text", "--teacher", hub["other_vocabulary"], "--student", hub["llama"])
    assert [o.name for o in load_recipe("text.yaml").train.objectives] == ["cross_entropy"]
    code, _, err = run_cli("init", "wrong", "--teacher", "./nowhere")
    assert code == 2 and "nowhere" in err and not (here / "wrong.yaml").exists()
    assert run_cli("init", "no/folder")[0] == 2
