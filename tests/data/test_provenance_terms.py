"""Whose outputs may train a student: where the answer comes from, what it stops, where it travels."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distill.config.data import TeacherSection
from distill.config.recipe import load_recipe
from distill.config.training import StudentSection
from distill.data.cards import student_card
from distill.data.provenance import (
    _table,
    card_metadata,
    decide,
    name_problem,
    require_permission,
    terms_lines,
)
from distill.errors import UserError
from distill.storage import read_json

STUDENT = StudentSection(model="Qwen/Qwen3-0.6B")
ANSWERS = ("yes", "no", "same_provider", "unknown")


def teacher(model: str, base_url: str | None = None, **terms) -> TeacherSection:
    section = {"model": model, "terms": terms}
    if base_url:
        section["endpoint"] = {"base_url": base_url}
    return TeacherSection.model_validate(section)


def folder(tmp_path, card: str | None, name: str = "model") -> str:
    path = tmp_path / name
    path.mkdir()
    if card is not None:
        (path / "README.md").write_text(card)
    return str(path)


# ---- the shipped table -----------------------------------------------------------------------------


def test_every_entry_says_what_where_and_when():
    entries = [*_table()["licenses"].values(), *_table()["teachers"]]
    assert len(entries) > 15
    for entry in entries:
        assert entry["train_other_models"] in ANSWERS, "quoted: YAML reads a bare yes as true"
        assert entry["url"].startswith("https://") and entry["name"] and entry["says"]
        assert entry["read"].year >= 2026
        assert entry["quality"].startswith(("read", "clause quoted", "from memory, check the source"))


@pytest.mark.parametrize(
    "model, answer, allowed",
    [
        ("deepseek-ai/DeepSeek-R1", "yes", True),
        ("Qwen/Qwen3-235B-A22B", "yes", True),
        ("meta-llama/Llama-3.3-70B-Instruct", "yes", True),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "yes", True),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "same_provider", False),
        ("meta-llama/Llama-2-7b-chat-hf", "same_provider", False),
        ("openai/gpt-oss-20b", "yes", True),
        ("nobody/knows-this", "unknown", False),
    ],
)
def test_hub_names(model, answer, allowed):
    found = decide(teacher(model), STUDENT)
    assert (found["answer"], found["allowed"]) == (answer, allowed)
    assert found["notice"] == "not legal advice"


def test_llama_brings_its_naming_rule_and_r1_does_not():
    llama = decide(teacher("meta-llama/Llama-3.1-8B-Instruct"), STUDENT)
    assert any('begins with "Llama"' in c for c in llama["conditions"])
    assert any("Built with Llama" in c for c in llama["conditions"])
    assert "choose 'Llama-tiny'" in name_problem(llama, "tiny")
    assert name_problem(llama, "tiny-Llama"), "it has to stand first"
    assert name_problem(llama, "Llama-tiny") is None and name_problem(llama, "llama3-tiny") is None
    derived = decide(teacher("deepseek-ai/DeepSeek-R1-Distill-Llama-8B"), STUDENT)
    assert name_problem(derived, "tiny") and derived["provider"] == "DeepSeek"
    assert name_problem(decide(teacher("deepseek-ai/DeepSeek-R1"), STUDENT), "tiny") is None
    assert name_problem(None, "tiny") is None


@pytest.mark.parametrize(
    "model, url, answer",
    [
        ("anything", "https://api.openai.com/v1", "no"),
        ("anything", "https://api.anthropic.com/v1", "no"),
        ("gemini-3-pro", "https://generativelanguage.googleapis.com/v1beta/openai", "no"),
        ("deepseek-chat", "https://api.deepseek.com/v1", "yes"),
        ("anything", "https://eu.api.openai.com/v1", "no"),
        # Who only looks like a provider is not taken for it.
        ("anything", "https://api.openai.com.example.org/v1", "unknown"),
        ("anything", "https://notapi.openai.com.evil/v1", "unknown"),
        # Somebody else serves it: their terms are not known, a `no` of the model stays.
        ("Qwen/Qwen3-8B", "https://inference.example.org/v1", "unknown"),
        ("openai/gpt-4o", "https://router.example.org/v1", "no"),
        # Served at home, open weights bring their own licence.
        ("Qwen/Qwen3-8B", "http://localhost:8000/v1", "yes"),
        ("mystery", "http://127.0.0.1:8000/v1", "unknown"),
    ],
)
def test_endpoints(model, url, answer):
    found = decide(teacher(model, url), STUDENT)
    assert found["answer"] == answer and found["allowed"] == (answer == "yes")


# ---- model cards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "card, answer",
    [
        ("---\nlicense: mit\n---\n# x\n", "yes"),
        ("---\nlicense: Apache-2.0\ntags: [a]\n---\n", "yes"),
        ("---\nlicense: llama3.2\n---\n", "yes"),
        ("---\nlicense: llama3\n---\n", "same_provider"),
        ("---\nlicense: [mit, llama3]\n---\n", "same_provider"),
        ("---\nlicense: [mit, secret]\n---\n", "unknown"),
        ("---\nlicense: other\nlicense_name: deepseek\n---\n", "unknown"),
        ("---\ntags: [x]\n---\nlicense: mit\n", "unknown"),
        ("# A card\n\n---\nlicense: mit\n---\n", "unknown"),
        ("no front matter", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_local_folder_is_what_its_card_says(tmp_path, card, answer):
    assert decide(teacher(folder(tmp_path, card)), STUDENT)["answer"] == answer


def test_a_local_folder_is_not_taken_for_a_hub_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert decide(teacher("Qwen/Qwen3-8B"), STUDENT)["answer"] == "unknown"


def test_broken_front_matter_is_said(tmp_path):
    with pytest.raises(UserError, match="front matter is not valid YAML"):
        card_metadata(folder(tmp_path, "---\nlicense: [mit\n---\n"))


@given(st.text(max_size=200))
def test_any_card_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("card")
    (path / "README.md").write_text(text, encoding="utf-8", errors="replace")
    try:
        assert isinstance(card_metadata(str(path)), dict)
    except UserError as error:
        assert "front matter" in str(error)


# ---- what the recipe says ----------------------------------------------------------------------------


def test_the_recipes_words_win_where_nothing_is_known():
    found = decide(
        teacher(
            "nobody/x", train_other_models=True, name="Contract 7", url="https://x.example", read="2026-01-31"
        ),
        STUDENT,
    )
    assert found["allowed"] and found["source"] == "recipe" and found["read"] == "2026-01-31"
    assert found["quality"] == "stated in the recipe"
    assert not decide(teacher("Qwen/Qwen3-8B", train_other_models=False), STUDENT)["allowed"]


def test_a_yes_against_the_table_needs_an_acknowledgement():
    terms = {"train_other_models": "yes", "name": "our contract"}
    found = decide(teacher("x", "https://api.openai.com/v1", **terms), STUDENT)
    assert not found["allowed"] and "OpenAI Services Agreement" in found["reason"]
    found = decide(
        teacher("x", "https://api.openai.com/v1", acknowledged="J. Doe: clause 9", **terms), STUDENT
    )
    assert found["allowed"] and found["acknowledged"] == "J. Doe: clause 9"


@pytest.mark.parametrize("answer", ["yes", "same_provider"])
def test_a_yes_against_a_licence_for_one_provider_needs_an_acknowledgement(answer):
    """The table says of Llama 3: for models of Meta only. A recipe that says more than that is not believed."""
    terms = {"train_other_models": answer, "name": "our reading", "provider": "Meta"}
    found = decide(teacher("meta-llama/Meta-Llama-3-8B-Instruct", **terms), STUDENT)
    assert not found["allowed"] and found["answer"] == answer and found["source"] == "recipe"
    if answer == "yes":
        assert "the recipe says yes, but Meta Llama 3" in found["reason"] and "2026" in found["reason"]
    known = decide(teacher("meta-llama/Meta-Llama-3-8B-Instruct", acknowledged="J. Doe", **terms), STUDENT)
    assert known["allowed"] and known["acknowledged"] == "J. Doe"


def test_a_card_for_one_provider_is_not_overruled_either(tmp_path):
    path = folder(tmp_path, "---\nlicense: llama3\n---\n")
    found = decide(teacher(path, train_other_models="yes", name="mine"), STUDENT)
    assert not found["allowed"] and "the recipe says yes, but" in found["reason"]


@pytest.mark.parametrize(
    "student, allowed",
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("Qwen/Qwen3-0.6B", False),
        ("acme/meta-small", False),
    ],
)
def test_same_provider_looks_at_the_student(student, allowed):
    found = decide(teacher("meta-llama/Meta-Llama-3-8B"), StudentSection(model=student))
    assert found["answer"] == "same_provider" and found["allowed"] == allowed


def test_same_provider_by_organisation_and_by_base_model(tmp_path):
    terms = {"train_other_models": "same_provider", "name": "Acme terms", "provider": "Acme"}
    assert decide(teacher("x", "https://api.acme.example/v1", **terms), StudentSection(model="acme/small"))[
        "allowed"
    ]
    local = folder(tmp_path, "---\nbase_model: acme/small\n---\n")
    assert decide(teacher("nobody/x", **terms), StudentSection(model=local))["allowed"]
    scratch = StudentSection(config={"model_type": "llama"}, adapter="full")
    assert not decide(teacher("nobody/x", **terms), scratch)["allowed"]


# ---- in a run ----------------------------------------------------------------------------------------


def unlicensed(hub: dict, tmp_path) -> str:
    import shutil

    copy = shutil.copytree(hub["qwen3_moe"], tmp_path / "unlicensed")
    (copy / "README.md").unlink()
    return str(copy)


@pytest.mark.parametrize("command", ["run", "generate", "filter", "train"])
def test_unknown_terms_stop_before_anything_is_spent(make_recipe, run_cli, hub, tmp_path, command):
    path, run_dir = make_recipe()
    model = unlicensed(hub, tmp_path)
    code, _, err = run_cli(command, path, "--teacher", model)
    assert code == 2 and "names no licence" in err and "terms.acknowledged" in err
    assert "not legal advice" in err and not run_dir.exists()
    with pytest.raises(UserError, match="names no licence"):
        require_permission(load_recipe(path, [f"teacher.model={model}"]))


def test_dry_run_shows_the_decision(make_recipe, run_cli, hub, tmp_path):
    path, run_dir = make_recipe()
    _, out, _ = run_cli("run", path, "--dry-run", "--teacher", unlicensed(hub, tmp_path))
    assert "# teacher_terms: unknown (its model card names no licence); stops the run" in out
    _, out, _ = run_cli("run", path, "--dry-run")
    assert "# teacher_terms: allowed by MIT License\n" in out and not run_dir.exists()


def test_the_decision_travels_and_a_changed_mind_rebuilds_nothing(make_recipe, run_cli, hub, tmp_path):
    path, run_dir = make_recipe()
    overrides = [
        f"teacher.model={unlicensed(hub, tmp_path)}",
        "teacher.terms.acknowledged=J. Doe, own weights",
    ]
    for command in ("generate", "filter", "train"):
        code, _, err = run_cli(command, path, *overrides)
        assert code == 0, err
    decisions = [
        read_json(run_dir / s / "manifest.json")["terms"] for s in ("generations", "dataset", "student")
    ]
    assert decisions[0]["acknowledged"] == "J. Doe, own weights" and decisions[0]["answer"] == "unknown"
    assert decisions[0] == decisions[1] == decisions[2]
    assert read_json(run_dir / "control" / "manifest.json")["terms"] is None
    for stage in ("dataset", "student"):
        card = (run_dir / stage / "README.md").read_text()
        assert "Acknowledged: J. Doe, own weights" in card and "not legal advice" in card
        assert "license" not in yaml.safe_load(card.split("---\n")[1]), "no licence is invented"
    assert "no model outputs were used" in (run_dir / "control" / "README.md").read_text()
    # Terms decide whether a run may go on, not what it makes.
    overrides[1] = "teacher.terms={train_other_models: yes, name: ours, acknowledged: K. Roe}"
    code, out, err = run_cli("generate", path, *overrides)
    assert code == 0 and out.count("done before") == 2, err


def test_our_own_models_from_scratch_are_mit_and_no_others(make_recipe):
    path, _ = make_recipe()
    counts = {"parameters_trainable": 1, "parameters_total": 1, "steps": 1, "tokens": 1}
    taught = student_card(load_recipe(path), "student", counts, decide(teacher("Qwen/Qwen3-8B"), STUDENT))
    assert "license:" not in taught and "Apache License 2.0 (Qwen3)" in taught
    assert "not recorded" in student_card(load_recipe(path), "student", counts, None)
    own = load_recipe("recipes/base.yaml")
    assert yaml.safe_load(student_card(own, "student", counts).split("---\n")[1])["license"] == "mit"
    foreign = own.model_copy(update={"student": own.student.model_copy(update={"tokenizer": "org/name"})})
    assert "license:" not in student_card(foreign, "student", counts)


def test_the_shipped_pair_may_be_used():
    recipe = load_recipe("recipes/demo.yaml")
    assert (
        require_permission(recipe)["answer"] == "yes" and require_permission(recipe)["source"] == "model card"
    )
    assert require_permission(load_recipe("recipes/base.yaml")) is None
    assert card_metadata("checkpoints/base")["license"] == "mit"
    assert terms_lines(require_permission(recipe))[0].startswith("Terms of the teacher `checkpoints/teacher`")


@pytest.mark.parametrize(
    "terms, said",
    [
        ("{train_other_models: maybe}", "train_other_models"),
        ("{train_other_models: yes}", "add `name`"),
        ("{train_other_models: same_provider, name: x}", "needs `provider`"),
        ("{acknowledged: ' '}", "it is empty"),
        ("{licence: mit}", "unknown key"),
    ],
)
def test_unusable_terms_are_said(make_recipe, terms, said):
    path, _ = make_recipe()
    with pytest.raises(UserError, match=said):
        load_recipe(path, [f"teacher.terms={terms}"])
