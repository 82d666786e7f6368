"""Verifiers: is this completion right? Rules only, no model, and never an exception on garbage.

A completion is free text that may hold its reasoning in <think> tags. `extract_answer` takes the final
answer out of it, a verifier compares that with the reference, `judge` gives the one verdict that the
filter and the evaluation both use.

    judge("exact", "<think>7+8=15</think>15", "15", finish_reason="stop")  # -> "correct"
"""

import math
import re
from collections.abc import Callable

VERDICTS = ("correct", "wrong", "no_answer", "truncated", "error")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")


def extract_answer(text: str) -> str | None:
    """The final answer: what follows the last `</think>`, else the whole text; None where that is empty.

    Text with an opened and never closed <think> has no final answer: it was still thinking.
    """
    head, closed, tail = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    answer = (tail if closed else text).strip()
    return answer or None


def exact(answer: str, reference: str) -> bool:
    """Equal after collapsing white space."""
    return " ".join(answer.split()) == " ".join(reference.split())


def numeric(answer: str, reference: str) -> bool:
    """The last number in the answer equals the last number in the reference (relative 1e-6).

    Thousands separators are ignored. A reference without a number never matches.
    """
    found, wanted = _NUMBER.findall(answer), _NUMBER.findall(reference)
    if not found or not wanted:
        return False
    a, b = (float(numbers[-1].replace(",", "")) for numbers in (found, wanted))
    return math.isfinite(a) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


VERIFIERS: dict[str, Callable[[str, str], bool]] = {"exact": exact, "numeric": numeric}


def judge(
    verifier: str, text: str, reference: str, finish_reason: str = "stop", error: str | None = None
) -> str:
    """One of VERDICTS. A truncated completion is `truncated` even if its text would happen to match."""
    if error:
        return "error"
    if finish_reason == "length":
        return "truncated"
    answer = extract_answer(text)
    if answer is None:
        return "no_answer"
    return "correct" if VERIFIERS[verifier](answer, reference) else "wrong"
