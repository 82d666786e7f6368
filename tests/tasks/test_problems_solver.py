"""The rules that answer typed questions agree with the generators of the problems, and admit what they do not know."""

import pytest

from distill.tasks.problems import FAMILIES, LEVELS, SPLITS, Known, sample_problems, solve


@pytest.mark.parametrize("split", SPLITS)
def test_every_drawn_problem_is_read_back(split):
    problems = sample_problems(split, dict.fromkeys(LEVELS, 210), seed=5)
    assert {p.family for p in problems} == set(FAMILIES) and len({p.prompt_id for p in problems}) > 500
    for p in problems:
        assert solve(p.question) == Known(p.family, p.answer, p.level, p.split), p.question


@pytest.mark.parametrize(
    ("typed", "answer", "level"),
    [
        ("  what is 7+5 ", "12", None),
        ("12 × 7 =", "84", "easy"),
        ("7 * 12", "84", "easy"),
        ("What is 5 - 9?", "-4", None),
        ("ADD 123456789 AND 1", "123456790", None),
        ("17 mod 5", "2", "easy"),
        ("Reverse the letters Q W E", "e w q", None),
        ("Count the letter z in a b c", "0", None),
    ],
)
def test_as_people_type(typed, answer, level):
    assert (solve(typed).answer, solve(typed).level) == (answer, level)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "Why is the sky blue?",
        "What is 7 modulo 0?",
        "What is 1 + 2 + 3?",
        "Sort the digits abc",
        "1 +" + "1" * 400,
    ],
)
def test_what_no_rule_knows(typed):
    assert solve(typed) is None


def test_order_does_not_matter_to_the_split():
    assert solve("What is 2381 + 4410?") == solve("Add 4410 and 2381.")
    assert solve("What is 23 * 7?") == solve("7 x 23")
