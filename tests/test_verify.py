"""Verifiers: right where they should be, and unshakeable on garbage."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.verify import VERDICTS, VERIFIERS, extract_answer, judge


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
    ],
)
def test_verifiers(verifier, answer, reference, right):
    assert VERIFIERS[verifier](answer, reference) is right


def test_truncated_and_failed_rows_are_never_right_or_wrong():
    assert judge("exact", "42", "42", finish_reason="length") == "truncated"
    assert judge("exact", "42", "42", error="non-finite logits") == "error"
    assert judge("exact", "<think>42", "42") == "no_answer"


def test_garbage_is_never_correct():
    """10,000 random strings, tags and digits and control characters among them."""
    rng = random.Random(0)
    pieces = [
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
            verdict = judge(verifier, text, "31415926")
            assert verdict in VERDICTS and verdict != "correct", repr(text)


@given(st.text(), st.text())
def test_no_exception_on_any_text(text, reference):
    for verifier in VERIFIERS:
        assert judge(verifier, text, reference) in VERDICTS
