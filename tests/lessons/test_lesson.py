"""A lesson while it runs: ranges and exercises are kept and told, in two languages, whatever the learner wrote."""

import pytest

from distill.errors import UserError
from distill.lessons import lesson as lessons


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv(lessons.BUDGET, raising=False)
    lessons.EXPECTED.clear()
    lessons.EXERCISES.clear()
    lessons.NOW.update(lesson=None, language="en")
    yield
    lessons.NOW.update(lesson=None, language="en")


def test_ranges_are_kept_and_printed(monkeypatch, capsys):
    lessons.expect("inside", 0.5, 0, 1, without=2)
    lessons.expect("outside", 2, 0, 1)
    monkeypatch.setenv(lessons.BUDGET, "short")
    lessons.expect("says nothing", 2, 0, 1)
    lessons.expect("its own range", 2, 0, 1, short=(1, 3))
    found = [(e.met, e.checked, e.without) for e in lessons.EXPECTED]
    assert found == [(True, True, 2), (False, True, None), (False, False, None), (True, True, None)]
    first, second, third, _ = capsys.readouterr().out.splitlines()
    assert first == "inside: 0.5   (expected 0 to 1: ok; if it did not work: 2)"
    assert "OUTSIDE" in second and "short budget" in third
    lessons.NOW["language"] = "zh"
    lessons.expect("inside", 0.5, 0, 1, short=True)
    assert "预期 0 到 1：符合" in capsys.readouterr().out
    monkeypatch.setenv(lessons.BUDGET, "tiny")
    with pytest.raises(UserError, match="use full"):
        lessons.short_budget()


# Module level, as in a notebook: the tests of exercises look at the names they use.
untouched = ...


def stub(x): ...


def written(x):
    return x * x


def inner(x):
    return x + 1


def test_an_exercise_that_was_not_begun_says_what_to_do(capsys):
    cases = {
        "variable": (lambda: untouched > 2, "to do"),
        "function": (lambda: stub(3) == 9, "to do"),
        "in a generator": (lambda: all(stub(x) == x for x in range(3)), "to do"),
        "wrong": (lambda: written(3) == 8, "not yet right"),
        "raises": (lambda: written("three") == 9, "stopped with TypeError"),
        "right": (lambda: written(3) == inner(8), "solved"),
    }
    for name, (test, said) in cases.items():
        lessons.exercise(name, test, "square it")
        line = capsys.readouterr().out
        assert said in line and ("square it" in line) == (name != "right")
    assert {name: name == "right" for name in cases} == lessons.EXERCISES


def test_a_lesson_in_an_unknown_language_is_refused():
    with pytest.raises(UserError, match="one of en, zh"):
        lessons.begin(1, "fr")
