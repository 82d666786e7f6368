"""Scores from answer rows: sampled answers are grouped by problem, and every way to fail is counted."""

import itertools

import numpy as np
import pytest

from distill.evaluation.answers import (
    by_problem,
    compare,
    forgetting,
    problem_interval,
    right,
    summarise,
    thinking_tokens,
)
from distill.evaluation.stats import wilson_interval
from distill.tasks.verify import final_answer


def sampled(*problems: str, level: str = "hard") -> list[dict]:
    """Rows of problems written as strings: c correct, a letter a wrong answer, t truncated, n no answer."""
    rows = []
    for problem in problems:
        for index, mark in enumerate(problem):
            verdict = {"c": "correct", "t": "truncated", "n": "no_answer"}.get(mark, "wrong")
            final = mark if verdict in ("correct", "wrong") else None
            rows.append(
                {"sample_idx": index, "verdict": verdict, "final": final, "level": level, "tokens": 10}
                | {"thinking_tokens": 6}
            )
    return rows


def test_pass_and_majority_are_means_over_subsets_of_each_problem():
    problems = ["ccxy", "xxyc", "cccc", "xtnc"]
    found = summarise(sampled(*problems))
    assert found["n"] == 4 and found["samples"] == 4 and found["interval"] == "bootstrap over problems"
    for k in (1, 2, 4):
        passed, elected = [], []
        for problem in problems:
            subsets = list(itertools.combinations(problem, k))
            passed.append(np.mean(["c" in subset for subset in subsets]))
            won = []
            for subset in subsets:
                votes = [mark for mark in subset if mark not in "tn"]
                top = max((votes.count(v) for v in votes), default=0)
                winners = {v for v in votes if votes.count(v) == top}
                won.append(("c" in winners) / len(winners) if winners else 0)
            elected.append(np.mean(won))
        assert found["pass_at_k"][str(k)] == pytest.approx(np.mean(passed))
        assert found["majority_at_k"][str(k)] == pytest.approx(np.mean(elected))
    assert set(found["pass_at_k"]) == set(found["majority_at_k_ci95"]) == {"1", "2", "4"}
    assert found["accuracy"] == found["pass_at_k"]["1"] == pytest.approx(8 / 16)
    shares = [0.5, 0.25, 1.0, 0.25]
    assert found["stderr"] == pytest.approx(np.std(shares, ddof=1) / 2)
    assert found["truncated"] == 1 and found["no_answer"] == 1 and found["unparsed"] == 1


def test_k_are_powers_of_two_up_to_the_samples():
    assert list(summarise(sampled("ccx", "cxx"))["pass_at_k"]) == ["1", "2"]
    assert list(summarise(sampled("c", "x"))["pass_at_k"]) == ["1"]


def test_right_answers_in_several_spellings_are_one_vote():
    rows = sampled("ccxx")
    for row, spelling in zip(rows, ("0.5", "1/2", "7", "8")):
        row["final"] = spelling
    assert summarise(rows)["majority_at_k"]["4"] == 1.0


def test_the_interval_has_problems_as_its_unit():
    """Each problem copied four times as samples says nothing new: the interval is that of one answer each."""
    marks = "c" * 60 + "x" * 40
    copied = summarise(sampled(*(4 * m for m in marks)))
    single = summarise(sampled(*marks))
    assert single["interval"] == "wilson"
    widths = [found["ci95"][1] - found["ci95"][0] for found in (copied, single)]
    assert widths[0] == pytest.approx(widths[1], rel=0.08)
    assert copied["stderr"] == pytest.approx(single["stderr"], rel=0.01)


def test_no_doubt_is_never_no_width():
    assert problem_interval([1.0] * 50) == list(wilson_interval(50, 50))
    assert problem_interval([0.0] * 50) == list(wilson_interval(0, 50))
    assert problem_interval([]) is None


def test_lengths_and_groups():
    rows = sampled("cx", "xx")
    assert [len(g) for g in by_problem(rows)] == [2, 2] and right(rows) == [1, 0]
    found = summarise(rows)
    assert (found["mean_tokens"], found["mean_thinking_tokens"], found["mean_answer_tokens"]) == (10, 6, 4)
    assert summarise([])["accuracy"] is None


def test_sampled_models_are_compared_over_problems():
    a = sampled(*["xxxx"] * 30, *["cxxx"] * 30)
    b = sampled(*["ccxx"] * 30, *["cxxx"] * 30)
    (found,) = compare({"a": a, "b": b})
    assert found["difference"] == pytest.approx(0.25) and found["verdict"] == "BETTER" and found["n"] == 60
    assert found["test"].startswith("sign flips") and found["p_value"] == pytest.approx(2**-29)
    assert found["ci95"] == found["bootstrap_ci95"]
    low, high = found["ci95"]
    assert 0.15 < low < 0.25 < high < 0.35, "of shares of right answers, as the difference is"
    (same,) = compare({"a": a, "same": a})
    assert same["verdict"] == "INCONCLUSIVE" and same["difference"] == 0 and same["p_value"] == 1


def test_the_level_is_part_of_the_verdict():
    a = sampled(*"c" * 30, *"x" * 37)
    b = sampled(*"c" * 37, *"x" * 30)
    assert compare({"a": a, "b": b})[0]["verdict"] == "BETTER"  # 7 : 0, p = 0.016
    strict = compare({"a": a, "b": b}, level=0.99)[0]
    assert strict["verdict"] == "INCONCLUSIVE" and strict["level"] == 0.99 and strict["ci95"][0] > 0
    assert (strict["correction"], strict["family_size"]) == ("holm", 1)


def test_an_equal_model_is_inconclusive_at_least_95_percent_of_the_time():
    rng, wrong_calls = np.random.default_rng(5), 0
    for _ in range(300):
        chance = rng.beta(0.5, 0.5, size=60)
        models = [
            sampled(*("".join("c" if u < p else "x" for u in rng.random(2)) for p in chance))
            for _ in range(2)
        ]
        wrong_calls += compare(dict(zip("ab", models)))[0]["verdict"] != "INCONCLUSIVE"
    assert wrong_calls / 300 <= 0.05


def test_forgetting_looks_at_what_the_base_solved():
    base = sampled(*"cccccxxx", level="easy") + sampled(*"cxxx")
    student = sampled(*"ccxxccxx", level="easy") + sampled(*"cccx")
    found = forgetting({"base": base, "student": student}, "base")
    assert found["base"] == "base" and set(found["models"]) == {"student"}
    easy, hard, both = (found["models"]["student"][task] for task in ("easy", "hard", "all"))
    assert (easy["n"], easy["kept"], easy["gained"]) == (5, 0.6, pytest.approx(1 / 3))
    assert easy["ci95"] == list(wilson_interval(3, 5))
    assert (hard["n"], hard["kept"], hard["gained"]) == (1, 1.0, pytest.approx(2 / 3))
    assert (both["n"], both["kept"], both["gained_n"]) == (6, pytest.approx(4 / 6), 6)
    nothing = forgetting({"base": sampled(*"xx"), "student": sampled(*"cx")}, "base")["models"]["student"][
        "hard"
    ]
    assert (
        nothing["n"] == 0 and nothing["kept"] is None and nothing["ci95"] is None and nothing["gained"] == 0.5
    )


def test_forgetting_of_sampled_answers():
    base, student = sampled("cx", "cc", "xx"), sampled("cc", "cx", "cx")
    found = forgetting({"base": base, "student": student}, "base")["models"]["student"]["hard"]
    assert found["n"] == 2 and found["kept"] == 0.75 and found["gained"] == 0.5


@pytest.mark.parametrize(
    "verifier, text, expected",
    [
        ("numeric", "<think>3</think> it is 2.50", "2.5"),
        ("numeric", "#### 1,234", "1234"),
        ("numeric", "no idea", None),
        ("choice", "the answer is (B)", "B"),
        ("choice", "i do not know", None),
        ("exact", "<think>a</think>  4   2 ", "4 2"),
        ("math", r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("exact", "<think>still thinking", None),
    ],
)
def test_final_answer_is_one_spelling(verifier, text, expected):
    assert final_answer(verifier, text) == expected


def test_thinking_tokens_end_with_the_tag():
    from distill.tasks.problems import build_tokenizer

    tokenizer = build_tokenizer()
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    thought, answer = encode("<think>1+2=3</think>"), encode("3<|end|>")
    text = tokenizer.decode(thought + answer, skip_special_tokens=True)
    assert thinking_tokens(tokenizer, [], thought + answer, text) == len(thought)
    assert thinking_tokens(tokenizer, [], answer, "3") == 0
    cut = thought[:-1]
    assert thinking_tokens(tokenizer, [], cut, tokenizer.decode(cut)) == len(cut)
    # A template may have opened the thought in the prompt.
    assert thinking_tokens(tokenizer, encode("<|assistant|><think>"), encode("1+2"), "1+2") == 3
    assert thinking_tokens(tokenizer, encode("<think></think>"), encode("1+2"), "1+2") == 0
