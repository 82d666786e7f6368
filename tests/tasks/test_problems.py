"""The embedded tasks: answers are right, splits are disjoint by content, seeds fix everything."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.tasks.problems import FAMILIES, LEVELS, SPLITS, sample_problem, sample_problems, split_of
from distill.tasks.verify import judge


def solve(family: str, question: str) -> str:
    """The answer by other means: reads the question as a person would, knows nothing of the generator."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if family == "addition":
        return str(sum(numbers))
    if family == "subtraction":
        return str(max(numbers) - min(numbers))
    if family == "multiplication":
        return str(numbers[0] * numbers[1])
    if family == "modulo":
        return str(numbers[0] % numbers[1])
    if family == "sorting":
        return "".join(sorted(re.search(r"\d+", question).group()))
    letters = re.findall(r"\b[a-z]\b", question)
    if family == "reversing":
        return " ".join(reversed(letters))
    # "does a appear in a b ..." and "the letter a in a b ...": the first single letter is the wanted one.
    wanted, *listed = letters
    return str(listed.count(wanted))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_right(family, level):
    rng = random.Random(7)
    for _ in range(60):
        problem = sample_problem(family, level, "train", rng)
        assert problem.answer == solve(family, problem.question), problem.question
        assert judge("exact", problem.solution, problem.answer) == "correct"


STEP = re.compile(r"^(\d)([+*-])(\d)([+-])?(\d)?=(\d)(\d)$")


@pytest.mark.parametrize("family", ["addition", "subtraction", "multiplication", "modulo"])
def test_every_arithmetic_step_is_true(family):
    rng = random.Random(3)
    for _ in range(100):
        problem = sample_problem(family, "hard", "train", rng)
        for step in problem.steps.split():
            if family == "modulo":
                dividend, modulus, rest = map(int, re.match(r"(\d+)%(\d)=(\d)$", step).groups())
                assert dividend % modulus == rest
            else:
                left, right = step.split("=")
                value = eval(left, {"__builtins__": {}})  # digits and + - * only, made by us
                borrow, digit = int(right[0]), int(right[1])
                assert value == (digit - 10 * borrow if family == "subtraction" else int(right)), step


def test_splits_are_disjoint_by_content():
    """No problem of the test split, in any wording, with any seed, is a training problem."""
    contents: dict[str, set] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(3):
            for p in sample_problems(split, dict.fromkeys(LEVELS, 700), seed):
                numbers = re.findall(r"\d+|\b[a-z]\b", p.question)
                # The content as a reader sees it: for sums without order, as 3 + 4 and 4 + 3 are one problem.
                key = tuple(sorted(numbers)) if p.family == "addition" else tuple(numbers)
                if p.family == "subtraction":
                    key = tuple(sorted(map(int, numbers)))
                contents[split].add((p.family, key))
    assert not contents["train"] & contents["test"]
    assert not contents["train"] & contents["validation"]
    assert not contents["validation"] & contents["test"]
    assert all(len(found) > 1000 for found in contents.values())


def test_split_shares():
    shares = [split_of("addition", f"{i}+{j}") for i in range(100) for j in range(i, 100)]
    assert 0.78 < shares.count("train") / len(shares) < 0.82
    assert 0.13 < shares.count("test") / len(shares) < 0.17


def test_seed_fixes_everything_and_ids_name_content():
    counts = dict.fromkeys(LEVELS, 50)
    first, again, other = (sample_problems("train", counts, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    by_id = {p.prompt_id: p for p in first}
    assert len(by_id) == len(first)
    for p in other:
        assert by_id.get(p.prompt_id, p).question == p.question


def test_even_over_families_and_levels():
    found = sample_problems("test", {"easy": 70, "hard": 140}, seed=0)
    for family in FAMILIES:
        assert sum(p.family == family and p.level == "easy" for p in found) == 10
        assert sum(p.family == family and p.level == "hard" for p in found) == 20


def test_an_exhausted_cell_gives_what_it_has():
    """Two-digit by one-digit products: 720 problems in two wordings; asking for 5,000 must end."""
    found = sample_problems("test", {"easy": 5000}, seed=0, families=["multiplication"])
    assert 100 < len(found) < 400
    assert len({p.prompt_id for p in found}) == len(found)


@given(
    st.integers(0, 2**32), st.sampled_from(list(FAMILIES)), st.sampled_from(LEVELS), st.sampled_from(SPLITS)
)
def test_any_problem_is_short_and_in_its_split(seed, family, level, split):
    problem = sample_problem(family, level, split, random.Random(seed))
    assert problem.split == split
    assert len(problem.question) < 80 and len(problem.steps) < 80
