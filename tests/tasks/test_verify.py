"""Verifiers: right where they should be, and unshakeable on garbage."""

import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.tasks import verify
from distill.tasks.verify import VERDICTS, VERIFIERS, boxed, extract_answer, judge, letter, require_package


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>1+1=02</think>2", "2"),
        ("<think>a</think> b a \n", "b a"),
        ("<think>x</think>1<think>y</think>2", "2"),
        ("42", "42"),
        ("<think>still thinking 42", None),
        ("<think>done</think>", None),
        ("   ", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "verifier, answer, reference, right",
    [
        ("exact", "b  a", "b a", True),
        ("exact", "042", "42", False),
        ("exact", "42.", "42", False),
        ("numeric", "The answer is 1,234.", "1234", True),
        ("numeric", "so 42.0", "42", True),
        ("numeric", "7", "42", False),
        ("numeric", "no number", "42", False),
        ("numeric", "42", "no number", False),
        ("numeric", "1e999", "42", False),
        ("numeric", "#### 42", "42", True),
        ("numeric", "#### 42\nLet me also say 7.", "42", True),
        ("numeric", "first \\boxed{41}, no: \\boxed{42}. That took 3 steps.", "42", True),
        ("numeric", "\\boxed{1{,}234}", "1,234", True),
        ("numeric", "\\boxed{\\frac{1}{2}}", "0.5", True),
        ("numeric", "\\boxed{\\frac{1}{2}}", "2", False),
        ("numeric", "\\boxed{-\\frac{1}{2}}", "0.5", False),
        ("numeric", "1/2", "2", False),
        ("numeric", "1/0", "0", False),
        ("numeric", "\\boxed{42\\text{ cm}^2}", "42", True),
        ("numeric", "\\boxed{3\\sqrt{2}}", "2", False),
        ("numeric", "\\boxed{(1, 2)}", "2", False),
        ("numeric", "(1,2)", "12", False),
        ("numeric", "10^5", "5", False),
        ("numeric", "10^{5}", "5", False),
        ("numeric", "10000001", "10000000", False),
        ("numeric", "7-3", "-3", False),
        ("numeric", "it is −3", "-3", True),
        ("numeric", "0.3333333", "1/3", True),
        ("numeric", ".5", "5", False),
        ("numeric", "025", "25", True),
        ("choice", "Answer: B", "B", True),
        ("choice", "(B)", "B", True),
        ("choice", "Better safe. Answer: C", "B", False),
        ("choice", "Because", "B", False),
        ("choice", "anything", "anything", False),
        ("regex", "It is Paris.", r"(?i)\bparis\b", True),
        ("regex", "It is Rome.", r"(?i)\bparis\b", False),
        ("regex", "anything", "(unclosed", False),
        ("math", r"\boxed{\frac{2}{4}}", "0.5", True),
        ("math", r"so $x+1$", "1+x", True),
        ("math", r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("math", r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        ("math", r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
        ("math", r"\boxed{43}", "42", False),
        ("math", "no idea", "42", False),
        ("math", r"\boxed{}", "", False),
    ],
)
def test_verifiers(verifier, answer, reference, right):
    assert VERIFIERS[verifier](answer, reference) is right


def test_truncated_and_failed_rows_are_never_right_or_wrong():
    assert judge("exact", "42", "42", finish_reason="length") == "truncated"
    assert judge("exact", "42", "42", error="non-finite logits") == "error"
    assert judge("exact", "<think>42", "42") == "no_answer"


@pytest.mark.parametrize(
    "text, chosen",
    [
        ("B", "B"),
        ("b", "B"),
        (" (c). ", "C"),
        ("**D**", "D"),
        ("The answer is B.", "B"),
        ("The correct answer is **(B)** because A is wrong.", "B"),
        ("answer: option C", "C"),
        ("I considered A and D. Final answer: $\\boxed{C}$", "C"),
        ("\\boxed{\\text{B}}, and not A", "B"),
        ("\\boxed{D. 4 apples}", "D"),
        ("The answer is not B, so it must be C", "C"),
        ("答案：B", "B"),
        ("所以答案是B。选项A错误", "B"),
        ("故选Ｂ", "B"),
        ("（C）", "C"),
        ("(A) is too small and (C) fits", "C"),
        ("B. because it is larger", "B"),
        ("B) 4", "B"),
        ("it is B, I think", "B"),
        ("A dog ate it", None),
        ("I think so", None),
        ("ABBA, BB and CD", None),
        ("Because", None),
        ("vitamin B-12 and B's", None),
        ("25 °C", None),
        ("x_B", None),
        ("", None),
        ("42", None),
        ("Answer: Because of C", "C"),
    ],
)
def test_the_letter_that_an_answer_chooses(text, chosen):
    assert letter(text) == chosen


@given(st.text(alphabet="abcXYZ 09é", max_size=8), st.text(alphabet="abcXYZ 09é", max_size=8))
def test_no_letter_from_inside_a_word(before, after):
    """A capital with a letter or digit on either side is never chosen."""
    if before[-1:].strip() or after[:1].strip():
        assert letter(f"{before}Q{after}") != "Q"


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"} \boxed{3}", "3"),
        (r"{\boxed{4}", "4"),
        (r"boxed{5}", None),
        (r"\boxed{", None),
        ("", None),
    ],
)
def test_boxed(text, inside):
    assert boxed(text) == inside


def test_the_pattern_of_a_recipe_with_the_reference_escaped():
    assert judge("regex:^{answer}$", "a.b", "a.b") == "correct"
    assert judge("regex:^{answer}$", "axb", "a.b") == "wrong", "a reference is text, not a pattern"
    assert judge(r"regex:^\d{3}$", "123", "") == "correct"


def test_a_pattern_that_backtracks_without_end_is_stopped():
    start = time.perf_counter()
    assert judge("regex:(a+)+$", "a" * 5000 + "!", "") == "wrong"
    assert time.perf_counter() - start < 10 * verify.REGEX_SECONDS


def test_mathematics_without_end_is_stopped_and_the_next_answer_is_judged():
    """A power tower runs for ever inside one C call; the process that computes it ends itself."""
    start = time.perf_counter()
    assert judge("math", r"\boxed{9^{9^{9^{9}}}}", "4") == "wrong"
    assert time.perf_counter() - start < 60
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(judge("math", r"\boxed{2/4}", "0.5"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["correct"] * 3, "also from threads, where signals cannot be caught"


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"distill-demo\[math\]"):
        require_package("math")
    require_package("numeric")


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 3000, "{" * 20000, "answer" + " " * 20000, "A " * 10000, "9" * 20000, "1/" * 10000,
     "1,111" * 4000, "^{" * 10000, "\n" * 20000, "答案" * 9000],
)  # fmt: skip
def test_long_garbage_takes_no_time(text):
    for verifier in ("numeric", "choice"):
        start = time.process_time()
        assert judge(verifier, text, {"numeric": "5", "choice": "Q"}[verifier]) in ("wrong", "no_answer")
        assert time.process_time() - start < 0.5


def test_garbage_is_never_correct():
    """10,000 random strings, tags, digits, letters, LaTeX and control characters among them."""
    rng = random.Random(0)
    references = {
        "choice": "R",
        "math": "31415926",
        "numeric": "31415926",
        "exact": "31415926",
        "regex": "31415926",
    }
    pieces = [
        "A",
        "q",
        "Answer:",
        "(",
        "B)",
        "\\boxed{",
        "}",
        "\\frac{1}{",
        "$",
        "####",
        "^{",
        "sqrt",
        "\\",
        "<think>",
        "</think>",
        "-",
        ".",
        ",",
        "e",
        "\x00",
        "\ud800",
        "é",
        "٣",
        "∞",
        "nan",
        "inf",
        " ",
        "\n",
        "9",
    ]
    for _ in range(10_000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        for verifier in VERIFIERS:
            verdict = judge(verifier, text, references[verifier])
            assert verdict in VERDICTS and verdict != "correct", repr(text)


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text())
def test_no_exception_on_any_text(text, reference):
    for verifier in VERIFIERS:
        assert judge(verifier, text, reference) in VERDICTS
