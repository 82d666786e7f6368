"""A teacher whose template opens <think>, a student whose does not, and the other way round: the same training set."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from distill.storage import read_json, read_rows

SMALL = (
    "prompts.levels={easy: 14, hard: 7}", "generate.samples=1", "generate.temperature=0", "control.enabled=false",
    "train.steps=2", "train.warmup_steps=0", "evaluate.levels={easy: 5}", "threads=1", "filter.correct_only=true",
)  # fmt: skip


def opening_copy(name: str, folder: Path) -> str:
    """A shipped checkpoint whose template writes the <think> that the model would have written itself."""
    shutil.copytree(ROOT / "checkpoints" / name, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    opened = text.replace("<|assistant|>' }}{% endif %}", "<|assistant|><think>' }}{% endif %}")
    assert opened != text
    template.write_text(opened)
    (folder / "manifest.json").unlink()  # it vouches for the template as it was
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("plain") / "run", "checkpoints/teacher", "checkpoints/base")


def dataset(run: Path, teacher: str, student: str, command: str = "filter") -> list[dict]:
    from distill.commands.cli import main

    words = [str(ROOT / "recipes" / "demo.yaml"), f"run_dir={run}", *SMALL]
    for step in ("generate", command):
        assert main([step, *words, "--teacher", teacher, "--student", student]) == 0
    return list(read_rows(run / "dataset"))


def test_what_a_template_opens_the_student_learns_to_write(tmp_path, plain):
    """Greedy answers are the same with the tag in the prompt, so nothing may differ in what is trained on."""
    teacher = opening_copy("teacher", tmp_path / "teacher")
    rows = dataset(tmp_path / "run", teacher, "checkpoints/base")
    assert rows == plain and len(rows) > 15
    manifest = read_json(tmp_path / "run" / "generations" / "manifest.json")
    assert manifest["opened"] == "<think>" and manifest["counts"]["verdicts"]["correct"] == len(rows)
    answers = list(read_rows(tmp_path / "run" / "generations"))
    assert all(a["text"].count("<think>") == a["text"].count("</think>") == 1 for a in answers)


def test_what_the_students_template_opens_it_is_not_taught_to_write(tmp_path, plain):
    student = opening_copy("base", tmp_path / "base")
    rows = dataset(tmp_path / "run", "checkpoints/teacher", student)
    assert len(rows) == len(plain)
    for row, before in zip(rows, plain):
        assert row["prompt_ids"] + row["completion_ids"] == before["prompt_ids"] + before["completion_ids"]
        assert len(row["prompt_ids"]) == len(before["prompt_ids"]) + 1


def test_an_answer_that_is_still_thinking_is_none(tmp_path):
    """Its text has no tag of its own: the template wrote it. Read as final, cut-off thinking would be an answer."""
    from distill.commands.cli import main

    teacher = opening_copy("teacher", tmp_path / "teacher")
    words = ["--tasks", "hard", "--problems", "3", "--max-new-tokens", "6", "--out", str(tmp_path / "eval")]
    assert main(["evaluate", teacher, *words]) == 0
    rows = list(read_rows(tmp_path / "eval" / "answers"))
    assert all(row["text"].startswith("<think>") and row["answer"] is None for row in rows)
    assert all(row["thinking_tokens"] == row["tokens"] == 6 for row in rows)
