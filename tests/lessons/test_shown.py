"""Answers in a notebook: what the engine found, in one piece of HTML; and the finished demo that lesson 0 opens."""

import json
import re

from conftest import ROOT

from distill.lessons.shown import answer, players, show
from distill.report.pages import visible
from distill.storage import read_json

DEMO = "recipes/workshop/demo"
QUESTION = "What is 7235 + 8131?"


def data_of(text: str) -> dict:
    return json.loads(re.search(r"<script type='application/json'>(.*?)</script>", text)[1])


def test_the_stored_demo_answers_and_an_expert_can_be_dropped():
    playground = players(DEMO)
    assert list(playground.players) == ["base", "student", "teacher"]
    asked = answer(playground, QUESTION)
    verdicts = {name: one.verdict for name, one in asked.answers.items()}
    assert verdicts == {"base": "wrong", "student": "correct", "teacher": "correct"}

    shown = show(asked, playground, "en")
    data = data_of(shown)
    student, teacher = data["models"][1:]
    assert [t["t"] for t in student["tokens"]] == [visible(t.text) for t in asked.answers["student"].tokens]
    assert student["final"] == "15366" and student["tokens"][3]["teacher"] and student["tokens"][3]["dense"]
    layer, chosen, gone = teacher["tokens"][3]["experts"][0]
    assert (
        layer == "layer 1" and len(chosen) == 2 and abs(sum(w for _, w in chosen) - 1) < 0.01 and gone == []
    )
    assert "<think>" not in shown  # what models write never becomes a tag
    assert "右" not in shown and "学生" in show(asked, playground, "zh")

    expert = chosen[0][0]
    again = answer(playground, QUESTION, drop={playground.routed[0].routers[0].name: [expert]})
    dropped = data_of(show(again, playground, "en"))["models"][2]
    assert "without layer 1 expert" in dropped["change"]
    for token in dropped["tokens"]:
        _, used, lost = token["experts"][0]
        assert lost == [expert] and expert not in [e for e, _ in used]


def test_the_stored_demo_is_small_and_its_numbers_are_its_own():
    folder = ROOT / DEMO
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 400_000
    found = read_json(folder / "results.json")
    assert set(found["models"]) == {"base", "control", "student", "teacher"}
    for level, one in found[
        "stored"
    ].items():  # bfloat16 instead of float32: another file, nearly the same score
        assert abs(one["accuracy"] - found["models"]["student"][level]["accuracy"]) < 0.02
        assert one["n"] == found["models"]["student"][level]["n"]
