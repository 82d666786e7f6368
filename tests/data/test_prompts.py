"""Where questions come from: published schemas, templates that execute nothing, one line per mistake."""

import json

import pytest
import yaml
from conftest import ROOT

from distill.config.data import Prompts
from distill.config.evaluation import Evaluate
from distill.config.recipe import load_prompts, load_recipe
from distill.data.prompts import file_prompts, held_out, make_prompts, named_problems, task_prompts
from distill.errors import UserError
from distill.storage import read_rows
from distill.tasks.corpus import PRESETS, check_template, render

# One row each, with the field names exactly as published.
PUBLISHED = {
    "gsm8k": {
        "question": "Natalia sold 48 clips in April and half as many in May. How many altogether?",
        "answer": "In May she sold 48/2 = <<48/2=24>>24.\nTogether 48+24 = <<48+24=72>>1,072.\n#### 1,072",
    },
    "math500": {
        "problem": "What is $\\frac{1}{4}+\\frac{1}{4}$?", "solution": "... $\\boxed{\\frac{1}{2}}$",
        "answer": "\\frac{1}{2}", "subject": "Prealgebra", "level": 1, "unique_id": "test/prealgebra/1.json",
    },
    "aime": {
        "id": 60, "problem": "Find the remainder.", "solution": "...", "answer": "025",
        "url": "https://example.org", "year": "2024",
    },
    "gpqa": {
        "Question": "Which particle is neutral?\n", "Correct Answer": "neutron\n",
        "Incorrect Answer 1": "proton",
        "Incorrect Answer 2": "electron", "Incorrect Answer 3": "positron", "High-level domain": "Physics",
        "Subdomain": "Physics (general)", "Record ID": "rec1",
    },
    "mmlu": {
        "question": "2 + 2?", "subject": "elementary_mathematics",
        "choices": ["3", "4", "5", "6"], "answer": 1,
    },
    "ceval": {
        "id": 0, "question": "中国的首都是____", "A": "上海", "B": "北京", "C": "广州", "D": "深圳",
        "answer": "B", "explanation": "",
    },
}  # fmt: skip
REFERENCES = {"gsm8k": "1072", "math500": "\\frac{1}{2}", "aime": "025", "mmlu": "B", "ceval": "B"}


@pytest.fixture
def write(tmp_path):
    def to_file(*rows: dict, name: str = "data.jsonl") -> str:
        from datasets import Dataset

        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
        elif name.endswith(".parquet"):
            Dataset.from_list(list(rows)).to_parquet(path)
        else:
            Dataset.from_list(list(rows)).to_csv(path, index=False)
        return str(path)

    return to_file


def test_every_preset_is_tested():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_presets_read_the_published_columns(write, name, form):
    path = write(PUBLISHED[name], name=f"data.{form}")
    (row,) = file_prompts(path, Prompts(preset=name, source=path), "train")
    text = row["messages"][-1]["content"]
    assert row["verifier"] == PRESETS[name].verifier and row["level"] == name and row["split"] == "train"
    if name in REFERENCES:
        assert row["answer"] == REFERENCES[name]
    own = (
        PUBLISHED[name].get("question") or PUBLISHED[name].get("problem") or "Which particle is neutral?"
    ).strip()
    assert text.startswith(own) and row["question"] == own
    if PRESETS[name].verifier in ("math", "numeric") and name != "gsm8k":
        assert text.endswith("\\boxed{}."), "doubled braces of a template are braces"


def test_multiple_choice_is_lettered_and_the_letter_is_right(write):
    rows = [{**PUBLISHED["gpqa"], "Question": f"Question {i}?"} for i in range(40)]
    path = write(*rows, name="gpqa.csv")
    first = file_prompts(path, Prompts(preset="gpqa", source=path), "test")
    letters = [row["answer"] for row in first]
    for row in first:
        lines = dict(
            line.split(". ", 1) for line in row["messages"][0]["content"].splitlines() if line[1:3] == ". "
        )
        assert sorted(lines.values()) == ["electron", "neutron", "positron", "proton"]
        assert lines[row["answer"]] == "neutron" and row["family"] == "Physics"
    assert set(letters) == set("ABCD"), "choices are shuffled"
    again = file_prompts(write(*rows[::-1], name="other.csv"), Prompts(preset="gpqa", source="x.csv"), "test")
    assert [row["answer"] for row in again] == letters[::-1], (
        "by the row's content: not its place, file or a seed"
    )
    (mmlu,) = file_prompts(write(PUBLISHED["mmlu"]), Prompts(preset="mmlu", source="x"), "test")
    assert "A. 3\nB. 4\nC. 5\nD. 6" in mmlu["messages"][0]["content"]


@pytest.mark.parametrize(
    "name, change, problem",
    [
        ("gsm8k", {"answer": "72"}, "row 1 has no '####' line"),
        ("mmlu", {"answer": 4}, "which is none of its 4 choices"),
        ("mmlu", {"answer": -1}, "which is none of its 4 choices"),
        ("mmlu", {"answer": "1"}, "which is none of its 4 choices"),  # in quotes it is a text, no index
        ("mmlu", {"answer": True}, "which is none of its 4 choices"),
        ("mmlu", {"choices": "['3', '4']"}, "not a list"),
        ("gsm8k", {"answer": ["#### 4"]}, "row 1 has a list in 'answer'"),
        ("gsm8k", {"question": ["a", "b"]}, "row 1 has a list in 'question'"),
        ("math500", {"subject": {"a": 1}}, "row 1 has an object in 'family'"),
        ("ceval", {"answer": ""}, "row 1 has an empty 'answer'"),
        ("ceval", {"answer": "E"}, "not A, B, C or D"),
        ("gpqa", {"Incorrect Answer 3": None}, "row 1 has an empty 'Incorrect Answer 3'"),
    ],
)
def test_rows_that_break_the_published_form_are_named(write, name, change, problem):
    path = write({**PUBLISHED[name], **change})
    with pytest.raises(UserError, match=problem):
        file_prompts(path, Prompts(preset=name, source=path), "train")


def test_answers_of_a_preset_are_the_text_of_the_file(tmp_path):
    """A column of `025` is one of whole numbers for a reader that infers types, and choices may be numbers."""
    path = tmp_path / "aime.csv"
    path.write_text("problem,answer\nFind it.,025\nFind it again.,1e3\n")
    rows = file_prompts(str(path), Prompts(preset="aime", source=str(path)), "test")
    assert [row["answer"] for row in rows] == ["025", "1e3"]
    path = tmp_path / "ceval.csv"
    path.write_text("question,A,B,C,D,answer\nWhich?,01,2.50,true,NA,D\n")
    (row,) = file_prompts(str(path), Prompts(preset="ceval", source=str(path)), "test")
    assert row["answer"] == "D" and row["choices"] == ["01", "2.50", "true", "NA"]
    assert "A. 01\nB. 2.50\nC. true\nD. NA" in row["messages"][0]["content"]
    path = tmp_path / "mmlu.jsonl"
    path.write_text('{"question": "Which?", "choices": [1.0, 2.50, true, "NA"], "answer": 1}')
    (row,) = file_prompts(str(path), Prompts(preset="mmlu", source=str(path)), "test")
    assert row["answer"] == "B" and row["choices"] == ["1.0", "2.50", "true", "NA"]


def test_another_schema_is_refused_with_what_is_there(write):
    path = write({"prompt": "x", "answer": "y"})
    with pytest.raises(
        UserError, match="not of the form 'mmlu': no column question, choices; it has: prompt, answer"
    ):
        file_prompts(path, Prompts(preset="mmlu", source=path), "train")


def test_a_template_of_columns(write):
    path = write({"q": "Which {city}?", "options": ["Rome", "Oslo"], "key": "B", "n": 3})
    section = Prompts(
        source=path,
        template="{{{n}}} {q}\n{options}",
        answer_column="key",
        verifier="choice",
        system="Be brief.",
    )
    (row,) = file_prompts(path, section, "train")
    assert row["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{3} Which {city}?\nA. Rome\nB. Oslo"},
    ]
    assert row["answer"] == "B" and row["question"] == "3\nWhich {city}?\nA. Rome\nB. Oslo"


@pytest.mark.parametrize(
    "template, problem",
    [
        (
            "{question.__class__}",
            "names '{question.__class__}'; a field is the name of a column, one of: question, n",
        ),
        ("{question!r}", "names '{question!r}'"),
        ("{question:>10}", "names '{question:>10}'"),
        ("{n[0]}", "names '{n\\[0\\]}'"),
        ("{0}", "names '{0}'"),
        ("{}", "names '{}'"),
        ("{qestion}", "one of: question, n"),
        ("{question} }", "a lone '}'; write '}}'"),
        ("{question", "a lone '{'"),
        ("just words", "names no column"),
    ],
)
def test_a_template_is_column_names_and_nothing_else(template, problem):
    with pytest.raises(UserError, match=problem.replace("{", r"\{").replace("}", r"\}").replace("!", "!")):
        check_template(template, ["question", "n"])


def test_nothing_in_a_value_is_put_in_again():
    assert render("{a}{b}", {"a": "{b}", "b": "{{x}}"}) == "{b}{{x}}"
    with pytest.raises(ValueError, match="text, numbers and lists"):
        render("{a}", {"a": {"nested": 1}})


def test_a_choice_reference_must_be_a_letter(write):
    path = write({"prompt": "x", "answer": "Rome"})
    with pytest.raises(UserError, match="row 1 has the answer 'Rome'"):
        file_prompts(path, Prompts(source=path, verifier="choice"), "train")


def test_the_pattern_of_a_recipe_travels_in_the_verifier(write):
    path = write({"prompt": "x", "answer": "a.b"})
    (row,) = file_prompts(path, Prompts(source=path, verifier="regex", pattern="^{answer}$"), "train")
    assert (row["verifier"], row["answer"]) == ("regex:^{answer}$", "a.b")
    for bad in ({"verifier": "regex"}, {"pattern": "x"}, {"verifier": "regex", "pattern": "(a"}):
        with pytest.raises(ValueError, match="pattern"):
            Prompts(**bad)


# ---- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub_calls(monkeypatch):
    from datasets import Dataset

    calls = []

    def load_dataset(name, config, split, revision):
        calls.append((name, config, split, revision))
        return Dataset.from_list([PUBLISHED["gsm8k"]] * 3)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


def test_a_hub_dataset_with_config_split_and_revision(hub_calls):
    section = Prompts(source="hub:org/name@abc", config="c", split="s", prompt_column="question", limit=2)
    assert len(file_prompts(section.source, section, "train")) == 2
    assert hub_calls == [("org/name", "c", "s", "abc")]


def test_a_preset_brings_source_splits_and_verifier(hub_calls, tmp_path):
    """Training on gsm8k is measured on gsm8k's test split, unless the recipe says otherwise."""
    base = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump({**base, "prompts": {"preset": "gsm8k"}, "run_dir": str(tmp_path / "run")})
    )
    recipe = load_recipe(str(path))
    assert recipe.prompts.source == recipe.evaluate.source == "hub:openai/gsm8k"
    assert (recipe.prompts.split, recipe.evaluate.split, recipe.prompts.verifier) == (
        "train",
        "test",
        "numeric",
    )
    make_prompts(recipe)
    held_out(recipe.evaluate, recipe.prompts, 0)
    assert hub_calls == [("openai/gsm8k", "main", "train", None), ("openai/gsm8k", "main", "test", None)]
    assert len(list(read_rows(tmp_path / "run" / "prompts"))) == 3
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude={"train"})))
    assert load_recipe(str(resolved)).prompts == recipe.prompts, "a resolved recipe means the same"

    other = load_recipe(str(path), ["evaluate.preset=aime"])
    assert (other.evaluate.source, other.evaluate.split) == ("hub:HuggingFaceH4/aime_2024", "train")
    for overrides, problem in (
        (["prompts.preset=math500"], "no training split"),
        (["evaluate.preset=ceval"], "one config per subject"),
        (["prompts.preset=gsm9k"], "'gsm8k'"),
    ):
        with pytest.raises(UserError, match=problem):
            load_recipe(str(path), overrides)


def test_offline_is_one_clear_line():
    with pytest.raises(UserError) as caught:
        file_prompts("hub:openai/gsm8k", Prompts(preset="gsm8k"), "train")
    (line,) = caught.value.problems
    assert "hub:openai/gsm8k" in line and "config main, split train" in line and "local .jsonl" in line
    assert "\n" not in line and len(line) < 500


# ---- held-out problems -----------------------------------------------------------------------------


def test_held_out_files_are_read_like_the_prompts_or_by_their_own_preset(write):
    gsm8k = write(PUBLISHED["gsm8k"], PUBLISHED["gsm8k"], name="g.jsonl")
    aime = write(PUBLISHED["aime"], name="a.jsonl")
    prompts = Prompts(preset="gsm8k", source=gsm8k, limit=1, system="S")
    (one, two) = held_out(Evaluate(source=gsm8k), prompts, 0)
    assert one["answer"] == two["answer"] == "1072" and one["split"] == "test"
    assert len(held_out(Evaluate(source=gsm8k, limit=1), prompts, 0)) == 1
    (row,) = held_out(Evaluate(source=aime, preset="aime"), prompts, 0)
    assert row["answer"] == "025" and row["messages"][0] == {"role": "system", "content": "S"}


def test_named_problems_of_the_command_line(write, hub_calls):
    path = write(PUBLISHED["gsm8k"], name="mine.v2.jsonl")
    assert named_problems(f"gsm8k:{path}", Prompts())[0]["level"] == "gsm8k"
    section = load_prompts(["prompts.prompt_column=question", "prompts.verifier=numeric"])
    (row,) = named_problems(path, section)
    assert (row["level"], row["verifier"]) == ("mine.v2", "numeric")
    assert len(named_problems("gsm8k", load_prompts(["prompts.limit=2"]))) == 2
    assert named_problems("hub:org/set", section)[0]["level"] == "set"
    assert hub_calls == [("openai/gsm8k", "main", "test", None), ("org/set", None, "test", None)]
    with pytest.raises(UserError, match="one config per subject"):
        named_problems("ceval", Prompts())
    with pytest.raises(UserError, match="did you mean 'verifier'"):
        load_prompts(["prompts.verifer=numeric"])


def test_checkpoints_are_evaluated_on_a_file_with_a_template(write, run_cli, hub, tmp_path):
    path = write({"q": "2 + 2?", "a": "4"}, {"q": "3 + 3?", "a": "6"}, name="sums.jsonl")
    keys = ["prompts.template='{q} ='", "prompts.answer_column=a", "prompts.verifier=numeric"]
    out = tmp_path / "out"
    code, _, err = run_cli(
        "evaluate", hub["llama"], "--tasks", path, *keys, "--max-new-tokens", "3", "--out", out
    )
    assert code == 0, err
    rows = list(read_rows(out / "answers"))
    assert [(r["prompt"], r["reference"], r["level"]) for r in rows] == [
        ("2 + 2? =", "4", "sums"), ("3 + 3? =", "6", "sums"),
    ]  # fmt: skip
    code, _, err = run_cli("evaluate", hub["llama"], "--tasks", "easy", keys[0])
    assert code == 2 and "name one with --tasks" in err


def test_solutions_of_a_file_are_its_completions(write):
    """Training without a teacher on somebody's texts: in the train split alone, and never empty."""
    path = write({"prompt": "2 + 2?", "answer": "4", "worked": "<think>2+2=4</think>4"})
    section = Prompts(source=path, solutions=True, solution_column="worked")
    (row,) = file_prompts(path, section, "train")
    assert row["solution"] == "<think>2+2=4</think>4" and row["completion"] is None
    assert file_prompts(path, section, "test")[0]["solution"] is None
    with pytest.raises(UserError, match="solution_column to one of: prompt, answer, worked"):
        file_prompts(path, section.model_copy(update={"solution_column": "steps"}), "train")
    empty = write({"prompt": "2 + 2?", "answer": "4", "worked": ""}, name="empty.jsonl")
    with pytest.raises(UserError, match="row 1 has an empty 'worked'"):
        file_prompts(empty, section, "train")
    for half in ({"solutions": True}, {"solution_column": "worked"}):
        with pytest.raises(ValueError, match="give both or neither"):
            Prompts(source=path, **half)


def test_repeated_problems_are_rows_of_their_own_and_solutions_come_where_asked():
    """A family with few problems: without `distinct` they repeat, and every row keeps a name of its own."""
    levels = {"easy": 1500}
    rows = task_prompts("train", levels, Prompts(families=["addition"], distinct=False), 0)
    ids, asked = (
        {row[key] if key == "prompt_id" else str(row[key]) for row in rows}
        for key in ("prompt_id", "messages")
    )
    assert len(ids) == len(rows) == 1500 > len(asked)
    distinct = task_prompts("train", levels, Prompts(families=["addition"], distinct=True), 0)
    assert len({str(row["messages"]) for row in distinct}) == len(distinct)
    assert {row["solution"] for row in rows} == {None}
    assert all(row["solution"] for row in task_prompts("train", {"easy": 7}, Prompts(solutions=True), 0))
