"""Quizzes score themselves and say why; the certificate counts what was done, lesson by lesson."""

import re

import pytest

from distill.errors import UserError
from distill.lessons import lesson as lessons
from distill.lessons.lesson import certificate, questions, quiz


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv(lessons.FOLDER, str(tmp_path))
    lessons.EXPECTED.clear()
    lessons.EXERCISES.clear()
    yield tmp_path
    lessons.NOW.update(lesson=None, language="en")


def test_a_quiz_scores_itself(capsys):
    right = {n: one["right"] for n, one in enumerate(questions()[1], 1)}
    quiz(1, right)
    assert capsys.readouterr().out.splitlines()[-1] == "quiz: 3 of 3"
    other = {"a": "b", "b": "c", "c": "a"}
    quiz(1, {1: other[right[1]], 2: f" {right[2].upper()} ", 3: ""})
    first, second, third, score = capsys.readouterr().out.splitlines()
    assert "no. " in first and questions()[1][0]["en"]["why"] in first  # why, but not the letter
    assert "right. " in second and "not answered" in third and score == "quiz: 1 of 3"
    lessons.NOW["language"] = "zh"
    quiz(1, right)
    assert "小测：3 题答对 3 题" in capsys.readouterr().out
    with pytest.raises(UserError, match="there are questions for"):
        quiz(99, {})


def test_the_certificate_counts_what_was_done(folder):
    lessons.NOW["lesson"] = 2
    lessons.expect("in", 1, 0, 2)
    lessons.expect("out", 3, 0, 2)
    lessons.EXERCISES.update({"2.1": True, "2.2": False, "2.3": True})
    quiz(2, {n: one["right"] for n, one in enumerate(questions()[2], 1)})
    page = certificate("Ada <b>").read_text()
    assert "Ada &lt;b&gt; has done 1 of" in page and "http" not in page
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)[1:]]
    assert len(rows) == len(questions())
    assert {row[0]: row[1:] for row in rows}["2"] == ["1 / 2", "2 / 3", "3 / 3"]
    assert {row[0]: row[1:] for row in rows}["1"] == ["not done", "", ""]
    assert "已完成" in certificate("Ada", "zh").read_text()


def test_another_lessons_quiz_leaves_its_record_alone(folder):
    lessons.NOW["lesson"] = 2
    quiz(1, {})
    assert not list(folder.rglob("account.json"))
