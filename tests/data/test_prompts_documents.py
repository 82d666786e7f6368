"""Documents as training rows: every token trained on once, and both arms on the same rows."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

TEXT = "The ship left the harbour at nine. Nobody waved, and the gulls had something better to do. " * 4


@pytest.fixture
def recipe(make_recipe, tmp_path):
    path, run = make_recipe(teacher="llama", student="llama")
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in (TEXT, "A short one, of a few words.")))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "Who left?", "answer": "ship"}\n')
    with open(path) as file:
        data = yaml.safe_load(file)
    data["prompts"] = {"documents": True, "source": str(source), "window": 24, "verifier": "contains"}
    data["train"]["objectives"] = [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.5}]
    data["evaluate"] = {
        "source": str(questions), "text": [str(source), "python-docs"], "text_window": 64, "max_new_tokens": 4,
        "speed": False,
    }  # fmt: skip
    with open(path, "w") as file:
        yaml.safe_dump(data, file)
    return path, run


def rows_of(folder):
    return [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def test_a_run_on_documents(recipe, run_cli, monkeypatch, hub):
    from distill.evaluation import evaluate
    from distill.models.load import load_tokenizer

    monkeypatch.setattr(
        evaluate, "documents", lambda path: ["x y z. " * 30 if path == "python-docs" else TEXT]
    )
    path, run = recipe
    code, said, told = run_cli("run", path)
    assert code == 0, told
    assert not (run / "generations").exists()
    tokenizer = load_tokenizer(hub["llama"])
    rows = rows_of(run / "dataset")
    assert rows == rows_of(run / "dataset" / "control")
    first = [row for row in rows if row["prompt_id"] == "document-00000"]
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    trained = [token for row in first for token in row["completion_ids"]]
    assert trained == whole[: len(trained)] and len(whole) - len(trained) < 8
    assert first[0]["prompt_ids"] == [tokenizer.eos_token_id]  # no BOS in this tokenizer
    assert [row["prompt_ids"] for row in first[1:]] == [[row["completion_ids"][-1]] for row in first[:-1]]
    assert all(len(row["prompt_ids"]) + len(row["completion_ids"]) <= 24 for row in rows)

    student, control = (
        json.loads((run / arm / "manifest.json").read_text()) for arm in ("student", "control")
    )
    assert student["counts"]["tokens"] == control["counts"]["tokens"]
    assert [o["name"] for o in control["config"]["train"]["objectives"]] == ["cross_entropy"]
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    for text in ("text.jsonl", "python-docs"):
        teacher, close = (metrics["models"][m]["text"][text] for m in ("teacher", "student"))
        assert "teacher" not in teacher
        assert close["teacher"]["tokens"] == close["tokens"] and close["teacher"]["forward_kl"] > 0
        # The base is the teacher here: nothing lies between a model and itself.
        assert metrics["models"]["base"]["text"][text]["teacher"]["forward_kl"] == pytest.approx(0, abs=1e-6)
        assert metrics["models"]["base"]["text"][text]["teacher"]["top1_agreement"] == 1
    assert "text: python-docs" in said and "KL from the teacher" in said
    assert "plain text" in (run / "student" / "README.md").read_text()
    code, said, _ = run_cli("provenance", str(run))
    assert code == 0, said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("prompts.source=tasks", "needs a `source` of plain text"),
        ("prompts.documents=false", "has no column"),
        ("train.on_policy.fraction=0.5", "so many tokens of a window; set it"),
        ("train.on_policy={fraction: 0.5, context: 24}", "a window has 24 tokens"),
        ("train.on_policy={fraction: 0.5, context: 8, skip_truncated: true}", "leave out one of it and"),
        ("train.on_policy={fraction: 0.5, context: 8, max_new_tokens: 600}", "exceed the 512 of"),
        ("prompts.source=nowhere.txt", "no such file"),
        ("prompts.window=1000", "the student reads 512 tokens at most"),
    ],
)
def test_what_needs_questions_is_refused(recipe, run_cli, change, says):
    code, _, told = run_cli("run", recipe[0], change)
    assert code == 2 and says in told


def test_on_policy_the_student_goes_on_from_the_beginning_of_a_window(recipe, run_cli):
    """No text ends, which is no alarm; the same rows whatever wrote the rest of them."""
    path, run = recipe
    section = "{fraction: 1.0, context: 8, max_new_tokens: 16, buffer_steps: 2}"
    code, _, told = run_cli("run", path, f"train.on_policy={section}", "evaluate.text=[]")
    assert code == 0, told
    kept = json.loads((run / "student" / "manifest.json").read_text())["counts"]
    assert kept["tokens_sampled"] > 0
    logged = [json.loads(line) for line in (run / "student" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["on_policy"]["truncated"] > 0.5 for line in logged if "on_policy" in line)
    control = json.loads((run / "control" / "manifest.json").read_text())["counts"]
    assert control["tokens_sampled"] == 0


def test_context_is_for_plain_text(make_recipe, run_cli):
    path, _ = make_recipe()
    section = "train.on_policy={fraction: 0.5, context: 8}"
    code, _, told = run_cli("train", path, section, "train.objectives=[{name: reverse_kl}]")
    assert code == 2 and "leave it out" in told
