r"""Verifiers: is this completion right? Rules only, no model, and never an exception on garbage.

A completion is free text that may hold its reasoning in <think> tags. `extract_answer` takes the final
answer out of it, a verifier compares that with the reference, `judge` gives the one verdict that the
filter and the evaluation both use.

    judge("exact", "<think>7+8=15</think>15", "15", finish_reason="stop")  # -> "correct"
    judge("numeric", "so 3 * 24 = 72\n#### 72", "72")                      # \boxed{72} too
    judge("choice", "(A) is wrong. Answer: B", "B")
    judge("math", r"\boxed{\frac{2}{4}}", "0.5")                           # needs the extra `math`
    judge(r"regex:(?i)\bparis\b", "It is Paris.", "")                      # a recipe's `pattern`
"""

import atexit
import importlib.util
import json
import math
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path

import regex

from distill.errors import RunError, UserError

VERDICTS = ("correct", "wrong", "no_answer", "truncated", "error")
REGEX_CHARACTERS = 10_000  # the end of an answer that a recipe's pattern is matched against
REGEX_SECONDS = 1.0  # a pattern that backtracks longer has not matched
_TAIL = 20_000  # what is stated is stated at the end
_MATH_TAIL = 2_000  # of a text with nothing marked as final
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+])?"  # a sign, not the minus of `7-3`
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?(?:\s*/\s*\d+(?![\d/]))?"
)
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]")


# A letter with no letter, digit, hyphen or apostrophe on either side; CJK text has no spaces around one.
_LETTER = (
    r"(?<![^\W\u3040-\u30ff\u3400-\u9fff])(?<![-'’.°])([A-Z])(?![^\W\u3040-\u30ff\u3400-\u9fff])(?![-'’.]\w)"
)
_LEAD = r"(?:[\s:=]*(?i:option|choice))?(?:[\s:=*_$\"“'(\[【]|\\boxed\{|\\text\{)*"
_IS = r"(?:\s+(?i:is|would be|must be))?"
_ANSWER = re.compile(r"(?:\b(?i:answer)" + _IS + "|答案[是为為]?)" + _LEAD + _LETTER)
_OPTION = re.compile(r"(?:\b(?i:choice|option)" + _IS + "|[選选][项項擇择]?)" + _LEAD + _LETTER)
_BRACKETED = re.compile(r"[(\[【]\s*([A-Z])\s*[)\]】]")
_LISTED = re.compile(r"(?m)^[ \t*_]*([A-Z])(?:[.):](?!\w)|[ \t]*$)")
_ALONE = re.compile(_LETTER + r"(?!(?<=[AI])\s+[a-z])")  # "A dog" and "I think" choose nothing


def extract_answer(text: str) -> str | None:
    """The final answer: what follows the last `</think>`, else the whole text; None where that is empty.

    Text with an opened and never closed <think> has no final answer: it was still thinking.
    """
    _head, closed, tail = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    answer = (tail if closed else text).strip()
    return answer or None


def boxed(answer: str) -> str | None:
    r"""What the last whole \boxed{...} holds, its braces matched; None where there is none."""
    opened: list[int] = []  # where the content of a box begins, -1 for any other brace
    best = (-1, "")
    for match in _BOX_OR_BRACE.finditer(answer):
        if match[0] == "}":
            begin = opened.pop() if opened else -1
            best = max(best, (begin, answer[begin : match.start()]))
        elif match[0][-1] == "{" and match[0] != "\\{":
            opened.append(match.end() if len(match[0]) > 1 else -1)
    return best[1].strip() if best[0] >= 0 else None


def stated(answer: str) -> str:
    r"""What the text marks as final: the last \boxed{...}, else the line after the last ####, else all."""
    inside = boxed(answer)
    if inside is not None:
        return inside
    _, marked, after = answer.rpartition("####")
    return after.strip().partition("\n")[0] if marked else answer


def exact(answer: str, reference: str) -> bool:
    """Equal after collapsing white space."""
    return " ".join(answer.split()) == " ".join(reference.split())


def numeric(answer: str, reference: str) -> bool:
    r"""The number stated last equals the last number of the reference: whole numbers exactly, others to 1e-6.

    Thousands separators are ignored, `1/2` and `\frac{1}{2}` are fractions. \boxed{...} must hold one number
    and no root; a number that is an exponent is none. A reference without a number never matches.
    """
    found, wanted = _last_number(answer[-_TAIL:]), _last_number(reference)
    if found is None or wanted is None:
        return False
    if isinstance(found, int) and isinstance(wanted, int):
        return found == wanted
    return math.isfinite(float(found)) and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)


def _last_number(text: str) -> int | float | None:
    inside = boxed(text)
    text = stated(text) if inside is None else inside
    text = text.replace("−", "-").replace("{,}", ",").replace("\\,", "")
    text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?", " ", text)
    found = list(_NUMBER.finditer(text))
    if not found or (inside is not None and (len(found) > 1 or "sqrt" in text or "\\pi" in text)):
        return None
    if re.search(r"(?:[\^_√]|\\sqrt)\{?\s*$", text[: found[-1].start()]):
        return None
    return _value(re.sub(r"[,\s]", "", found[-1][0]))


def _value(literal: str) -> int | float | None:
    if len(literal) > 300:  # beyond any float
        return None
    numerator, _, denominator = literal.partition("/")
    if denominator:
        return float(numerator) / float(denominator) if float(denominator) else None
    return int(literal) if literal.lstrip("+-").isdecimal() else float(literal)


def letter(text: str) -> str | None:
    r"""The letter A to Z that an answer chooses, the first of these that there is, its last occurrence:

    \boxed{B}; `Answer: B`, `the answer is (B)`, 答案：B; `option B`, 选B; `(B)`; `B.`, `B)` or `B` beginning
    a line; a capital that stands alone. Never a letter of a word; of the last kind no article or pronoun.
    """
    text = unicodedata.normalize("NFKC", text[-_TAIL:])
    inside = boxed(text)
    if inside is not None:
        text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", inside)
    alone = text.strip(" \t\r\n.()[]*_$:\"'")
    if len(alone) == 1:
        return alone.upper() if alone.isascii() and alone.isalpha() else None
    for rule in (_ANSWER, _OPTION, _BRACKETED, _LISTED, _ALONE):
        if found := rule.findall(text):
            return found[-1]
    return None


def choice(answer: str, reference: str) -> bool:
    """The answer chooses the letter of the reference (see `letter`)."""
    wanted = letter(reference)
    return wanted is not None and letter(answer) == wanted


def check_pattern(pattern: str) -> None:
    """Raises ValueError if a recipe's pattern is not a regular expression."""
    try:
        regex.compile(pattern.replace("{answer}", "x"))
    except regex.error as error:
        raise ValueError(f"`pattern` is not a regular expression: {error}") from None


def matches(answer: str, reference: str) -> bool:
    """The pattern `reference` is found in the last REGEX_CHARACTERS of the answer within REGEX_SECONDS."""
    try:
        return regex.search(reference, answer[-REGEX_CHARACTERS:], timeout=REGEX_SECONDS) is not None
    except (regex.error, TimeoutError):
        return False


def math_equal(answer: str, reference: str) -> bool:
    r"""Equal as mathematics by the package math-verify: `\frac{1}{2}` and 0.5, `x+1` and `1+x`, intervals.

    Runs in a process of its own that ends after some seconds, whatever it is computing (distill.tasks.math_worker).
    Raises UserError where the package is not installed.
    """
    require_package("math")
    found, wanted = stated(answer[-_TAIL:]), stated(reference).strip().strip("$")
    if not any(map(str.isalnum, found)) or not wanted:
        return False
    if exact(found, wanted):
        return True
    # A stated answer is an expression; otherwise the package looks for one where a text ends.
    given = f"${found.strip('$')}$" if found != answer[-_TAIL:] else found[-_MATH_TAIL:]
    return _WORKER.ask(given, f"${wanted}$")


class _MathWorker:
    """The process behind `math_equal`: started on first use, started again after it ended itself."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, answer: str, reference: str) -> bool:
        with self._lock:
            try:
                process = self._process or self._start()
                process.stdin.write(json.dumps([answer, reference]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if not reply:  # it ran out of time or memory over this answer
                self.stop()
            return reply == "1\n"

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self._process = process
        if process.stdout.readline() != "ready\n":
            self.stop()
            raise RunError("verifier 'math' does not start: `python -c 'import math_verify'` shows why")
        return process

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


_WORKER = _MathWorker()
atexit.register(_WORKER.stop)


def final_answer(verifier: str, text: str) -> str | None:
    """What the verifier compares, in one spelling, so that equal answers can be counted; None if there is none.

    numeric: the number (2.50 and 2.5 are one); choice: the letter; math and regex: what is stated as final.
    """
    answer = extract_answer(text)
    if answer is None:
        return None
    name = verifier.partition(":")[0]
    if name == "numeric":
        number = _last_number(answer[-_TAIL:])
        return None if number is None else str(number) if isinstance(number, int) else f"{number:.9g}"
    if name == "choice":
        return letter(answer)
    return " ".join((answer if name == "exact" else stated(answer)).split())


VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "exact": exact,
    "numeric": numeric,
    "choice": choice,
    "regex": matches,
    "math": math_equal,
}


def require_package(verifier: str) -> None:
    """Raises UserError where a verifier's package is not there. Called before anything is spent."""
    if verifier == "math" and importlib.util.find_spec("math_verify") is None:
        raise UserError("verifier 'math' needs an extra: pip install 'distill-demo[math]', or use numeric")


def judge(
    verifier: str, text: str, reference: str, finish_reason: str = "stop", error: str | None = None
) -> str:
    """One of VERDICTS. A truncated completion is `truncated` even if its text would happen to match.

    `verifier` is a name of VERIFIERS, or `regex:PATTERN`, where `{answer}` stands for the reference, escaped.
    """
    if error:
        return "error"
    if finish_reason == "length":
        return "truncated"
    answer = extract_answer(text)
    if answer is None:
        return "no_answer"
    name, _, pattern = verifier.partition(":")
    if pattern:
        reference = pattern.replace("{answer}", regex.escape(reference))
    return "correct" if VERIFIERS[name](answer, reference) else "wrong"
