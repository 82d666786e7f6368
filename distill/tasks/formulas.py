r"""The verifier `math`: which formula an answer states, and when two formulas are equal (package math-verify).

    stated_formula(r"so $x+1$")                    # "x+1"
    equal(r"\frac{2}{4}", "0.5")                   # True

The package is generous: to it `50\%`, `50^\circ`, `[50]`, `\{50\}`, `7 = 50`, `50'` and `50_2` are all 50, `F` is `f`,
and 0.0000001 is 0.0000002. So what is written around two formulas is compared here first, two plain numbers are
compared as the verifier `numeric` reads them, decimals go to the package as fractions, and it has to parse
the whole of a formula.
"""

import atexit
import json
import re
import subprocess
import sys
import threading

from distill.errors import RunError
from distill.tasks import numeric
from distill.tasks.numbers import REFUSED, REFUSING, items, spelled, tidy
from distill.tasks.statements import (
    SENTENCE_END,
    SUPPOSED,
    TAIL,
    first_answer,
    hash_marks,
    last_box,
    last_retraction,
    percent,
    phrase_marks,
    stands,
)
from distill.workers import math_worker

LONGEST = 2_000  # characters of a formula that is compared

# ---- which formula ----------------------------------------------------------------------------------------

_DELIMITED = re.compile(
    r"\$\$([^$]{1,2000})\$\$|(?<![\\\w])\$([^$\n]{1,2000}?)(?<!\\)\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]",
    re.DOTALL,
)
_AND = re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or|和|或)\s*", re.IGNORECASE)
_REFUSED_BEFORE = re.compile(
    REFUSING
    + r"[\s$(]*$|(?:at least|at most|more than|less than|between|from|up to|above|below|至少|至多|大于"
    r"|小于)\s*$",
    re.IGNORECASE,
)
_REFUSED_AFTER = re.compile(REFUSED + r"|\s*[?？]", re.IGNORECASE)
_BEYOND = re.compile(
    r"\s*(?:(\\?%|percent\b|per cent\b)|(?:hundred|thousand|million|billion|trillion|lakh|crore|dozen"
    r"|degrees?|k|bn|mn)\b|[°‰百千万亿]"
    r"|th\b|or more|or less|to \$)",
    re.IGNORECASE,
)
_DRESS = " \t\r\n*_`\"'.。!,;:："
_WORDY = re.compile(r"(?<!\\)(?<![A-Za-z\\])(?!(?:sin|cos|tan|log|ln|sqrt|pi|exp|frac|inf)\b)[A-Za-z]{3,}")


def stated_formula(answer: str) -> str | None:
    """What the answer states as its result, as LaTeX or as the words that stand there; None where it states nothing."""
    text = first_answer(answer[-TAIL:])
    back = last_retraction(text)
    if back and re.search(r"[0-9$\\]", text[: back.start()]):
        tail = text[back.end() :]
        found = _marked(tail)
        if found is None:
            found = _only(tail) if _marked(text[: back.start()]) is not None else _last(tail)
    else:
        found = _marked(text)
        found = _last(text) if found is None else found
    return found or None


def _marked(text: str) -> str | None:
    """The formula that is marked as final; "" where it is not clearly one, None where nothing is marked."""
    line = next(filter(None, hash_marks(text)), None)
    text = text[: line.end] if line else text
    box = last_box(text)
    if box and (not line or line.start < box.start):
        return box.content + percent(text, box) if stands(text, box) else ""
    phrases = list(phrase_marks(text))
    if line:
        return _of_line(line.content) or ""
    found = [f for f in (_of_line(p.content) for p in phrases) if f]
    if box:
        return (
            box.content if not found or " ".join(found[-1].split()) == " ".join(box.content.split()) else ""
        )
    return found[-1] if found else ("" if phrases else None)


def _of_line(content: str) -> str | None:
    """The formula of a marked line: its first one in delimiters, else a number, else all of it."""
    if _REFUSED_BEFORE.search(content[: len(content) - len(content.lstrip(_DRESS))]):
        return None
    found = _delimited(content)
    if found:
        start, formula = found[0]
        return formula if not re.search(r"[0-9]", _DELIMITED.sub("", content[:start])) else None
    if re.match(rf"\s*(?:{REFUSING})", content, re.IGNORECASE):
        return None
    whole = content.strip(_DRESS)
    if not _WORDY.search(whole):
        return None if _REFUSED_BEFORE.match(content) else whole
    number = numeric.stated_number(": " + content)
    if number:
        return numeric.spelling(number) + (number.unit and {"%": r"\%", "°": r"^\circ"}[number.unit])
    return whole if not re.search(r"[0-9]", whole) else None


def _delimited(text: str) -> list[tuple[int, str]]:
    """(where, formula) in $...$ and its like, those that are refused left out, neighbours joined by commas."""
    found: list[tuple[int, str]] = []
    end, refused = -1, False
    for match in _DELIMITED.finditer(text):
        formula = next(filter(None, match.groups())).strip(" .,;")
        before = text[max(0, match.start() - 60) : match.start()]
        beside = bool(found) and end >= 0 and not refused and _AND.fullmatch(text[end : match.start()])
        refused = bool(
            _REFUSED_BEFORE.search(before)
            or SUPPOSED.search(before)
            or _REFUSED_AFTER.match(text, match.end())
        )
        end = match.end()
        beyond = _BEYOND.match(text, end)
        if refused or not formula or (beyond and not beyond[1]) or re.search(r"[-−–+]$", before):
            refused = True  # `-$5$`, `$5$ million`: another number, and not clearly one
            continue
        formula += r"\%" if beyond else ""
        if beside:
            found[-1] = (found[-1][0], f"{found[-1][1]}, {formula}")
        else:
            found.append((match.start(), formula))
    return found


def _last(text: str) -> str | None:
    """Nothing is marked: the last formula in delimiters, else the text where it is one, else its number."""
    found = [formula for _, formula in _delimited(text)]
    telling = [f for f in found if not re.fullmatch(r"\\?[A-Za-z]+", f)] or found[:1]
    if found:
        return telling[-1]
    if _DELIMITED.search(text):
        return None
    whole = text.strip(_DRESS)
    if len(whole) <= 40 and "\n" not in whole and not re.search(r"[0-9]|[.!?]\s", whole):
        return whole  # words; equal to the same words alone
    if (
        len(whole) <= 200
        and "\n" not in whole
        and not _WORDY.search(whole)
        and not SENTENCE_END.search(whole)
    ):
        return None if re.match(rf"\s*(?:{REFUSING})", whole, re.IGNORECASE) else whole
    number = numeric.stated_number(text)
    return numeric.spelling(number) + ({"%": r"\%", "°": r"^\circ"}.get(number.unit, "")) if number else None


def _only(text: str) -> str | None:
    found = {formula for _, formula in _delimited(text)}
    if found:
        return found.pop() if len(found) == 1 else None
    number = numeric.stated_number(text) if len({i.number for i in items(spelled(tidy(text)))}) == 1 else None
    return numeric.spelling(number) if number else None


# ---- equal ------------------------------------------------------------------------------------------------

_CHARACTERS = {
    "½": r"\frac{1}{2}", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "∞": r"\infty ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
    "√": r"\sqrt ",
    "%": r"\%", "≈": r"\approx ", "…": r"\ldots ", "′": "'",
}  # fmt: skip
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_TEXT = re.compile(
    r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|operatorname)\s*\{([^{}]*)\}((?:\^\{?[23]\}?)?)"
)
_UNIT = re.compile(r"(?!(?:[kKMBT]|st|nd|rd|th)(?:[ ^]|$))[A-Za-z][A-Za-z/ .^{}0-9-]*")
_RELATION = re.compile(
    r"[=<>]|\\(?:neq?|leq?|geq?|leqslant|geqslant|lt|gt|approx|sim|simeq|equiv|cong|in|notin|to|mid"
    r"|subset)(?![a-z])"
)
_UNKNOWN = re.compile(r"\s*([a-z](?:_\{?\w\}?)?|[a-z]\([a-z]\))\s*=(?!=)\s*([^=]+)")
_NO_UNIT = re.compile(
    r"\b(?:not|no|or|and|is|are|if|only|mod|wrong|incorrect|hundred|thousand|million|billion|trillion"
    r"|lakh|crore|dozen|than"
    r"|least|most|more|less|about|over|under|half|base|when|for|to)\b|[\u3400-\u9fff]",
    re.IGNORECASE,
)  # fmt: skip


def equal(answer: str, reference: str) -> bool:
    """Whether two formulas are equal as mathematics; asks the worker only where plain rules do not decide."""
    answer, reference = _one_spelling(answer), _one_spelling(reference)
    if not reference or not any(map(str.isalnum, answer)):
        return False
    if answer == reference:
        return True
    if max(len(answer), len(reference)) > LONGEST:
        return False
    words = [_worded(side) for side in (answer, reference)]
    if all(words) and "\\" in answer + reference:
        return words[0] == words[1]
    sides = _without_unknowns(answer, reference)
    sides = sides and _without_words(*sides)
    if not sides or _notation(sides[0]) != _notation(sides[1]):
        return False
    one, other = (numeric.stated_number(rf"\boxed{{{side}}}") for side in sides)
    if one and other:
        if (one.unit == "°") != (other.unit == "°"):
            return False
        return numeric.equal(
            *(n._replace(value=n.value / 100, unit="") if n.unit == "%" else n for n in (one, other))
        )
    return _WORKER.ask(*(f"${_exact(side)}$" for side in sides))


def _one_spelling(formula: str) -> str:
    formula = tidy(formula)
    formula = re.sub("\ue000([0-9]+)/([0-9]+)\ue001", r"\\frac{\1}{\2}", formula)
    formula = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda m: f"^{{{m[0].translate(_SUPER)}}}", formula)
    formula = re.sub(r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\!|\\\$|\$|\\boxed\b", "", formula)
    formula = re.sub(r"\.{3,}", r"\\ldots", formula)
    formula = re.sub(
        r"\\(?:text|mathbf|mathrm|textbf|boldsymbol|bm)\s*\{\s*(-?[0-9][0-9.,/]*)\s*\}", r"\1", formula
    )
    formula = re.sub(r"\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}", ", ", formula)
    formula = re.sub(r"(?<!\\)\\ ", " ", formula)
    formula = re.sub(r"(?<!\\)%", r"\\%", formula)
    formula = "".join(_CHARACTERS.get(c, c) if c != "%" else c for c in formula)
    formula = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", formula)
    formula = formula.replace("{,}", ",").replace("{-}", "-")
    formula = re.sub(r"(?<=[0-9])(?:\\[,;: ]|~)(?=[0-9]{3}(?![0-9]))", ",", formula)
    formula = re.sub(r"\\(?:text|mathrm)\s*\{\s*(?:percent|per cent)\s*\}|\bpercent\b", r"\\%", formula)
    formula = re.sub(
        r"\\(?:text|mathrm)\s*\{\s*degrees?\s*\}|\bdegrees?\b|\^\s*\{\s*\\circ\s*\}|\\degree\b",
        r"^\\circ",
        formula,
    )
    return " ".join(formula.split()).rstrip(" .")


def _worded(formula: str) -> str | None:
    r"""The words of a formula that is nothing else, `\text{(C)}` and `C`; None for any other."""
    match = re.fullmatch(
        r"(?:\\(?:text|mathrm|mbox|textrm|textbf|mathbf)\s*\{([^{}\\]*)\}|([A-Za-z][A-Za-z ]*))\.?", formula
    )
    words = match and " ".join((match[1] or match[2] or "").strip(" ().").split())
    return words if not words or len(words) == 1 else words.casefold()


def _without_unknowns(answer: str, reference: str) -> tuple[str, str] | None:
    """`x = 5` is 5: one lower-case letter, the unknown. Any other relation stands on both sides or on none."""
    related = [bool(_RELATION.search(side)) for side in (answer, reference)]
    if related[0] == related[1]:
        return answer, reference
    sides = [answer, reference]
    for i in (0, 1):
        if related[i]:
            parts = re.split(
                r"(?:,|;|\bor\b|\band\b|\\text\s*\{\s*(?:or|and)\s*\})\s*(?=[a-z](?:_\S)?\s*=)", sides[i]
            )
            found = [_UNKNOWN.fullmatch(part.strip(" ,")) for part in parts]
            if not all(found) or len({m[1] for m in found}) > 1 or any(_RELATION.search(m[2]) for m in found):
                return None
            sides[i] = ", ".join(m[2].strip() for m in found)
    return sides[0], sides[1]


def _without_words(answer: str, reference: str) -> tuple[str, str] | None:
    """Units left out: `5\\text{ cm}` is 5, and not `5\\text{ m}`. Other words are the same on both sides."""
    words = [
        " ".join(" ".join(m[1] + m[2] for m in _TEXT.finditer(side)).replace(".", "").split())
        for side in (answer, reference)
    ]
    bare = [_TEXT.sub(" ", side).strip() for side in (answer, reference)]
    if words[0] == words[1]:
        return (
            (answer, reference)
            if words[0] and not all(bare)
            else (bare[0], bare[1])
            if words[0]
            else (answer, reference)
        )
    if all(words) or not all(bare):
        return None
    given = answer if words[0] else reference
    ends = _TEXT.sub("\0", given).rstrip(" .").endswith("\0")
    unit = words[0] or words[1]
    known = _UNIT.fullmatch(unit) and len(unit.split()) <= 3 and not _NO_UNIT.search(unit)
    return (bare[0], bare[1]) if ends and known else None


def _notation(formula: str) -> tuple:
    """What the package overlooks and two equal formulas share: brackets, degrees, primes, bases, ratios, case."""
    bare = re.sub(r"\\([{}|])", r"<\1>", formula)
    inner = bare.strip()
    pair = (inner[:3] if inner[:1] == "<" else inner[:1]) + (inner[-3:] if inner[-1:] == ">" else inner[-1:])
    listed = "," in re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", bare)
    brackets = pair if pair in ("()", "[]", "(]", "[)", "<{><}>") else ""
    if not listed and brackets == "()":
        brackets = ""
    if listed and brackets == "<{><}>":
        brackets = ""
    letters = re.sub(r"\\[A-Za-z]+", " ", _TEXT.sub(" ", formula))
    return (
        brackets,
        "\\circ" in formula,
        formula.count("'") + formula.count("\\prime"),
        sorted(re.findall(r"[0-9]_\{?([0-9]+)", formula)),
        ":" in formula,
        bool(re.search(r"\\[lc]?dots|\.\.\.|\\overline|\\dot\b", formula)),
        bool(re.search(r"\\(?:approx|not|neg|lnot|[bp]?mod|pod)(?![a-z])|(?<![a-z])not(?![a-z])", formula)),
        bool(re.search(r"(?:[-+*/^=<>]|\\(?:cdot|times|div))$", formula)),
        {c for c in letters if c.isalpha() and c.isascii() and c.isupper()},
    )


def _exact(formula: str) -> str:
    """Decimals and percents as fractions of whole numbers: the package compares floats to six places."""
    formula = (
        re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))(?<![(\[][0-9],)", "", formula)
        if "(" not in formula
        else formula
    )
    formula = re.sub(
        r"(?<![0-9.])([0-9]*)\.([0-9]{1,40})(?![0-9.])",
        lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}",
        formula,
    )
    return re.sub(r"(\\frac\{[0-9]+\}\{[0-9]+\}|[0-9]+)\s*\\%", r"\\frac{\1}{100}", formula)


class _MathWorker:
    """The process behind `equal`: started on first use, started again after it ended."""

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
            if not reply:  # it is gone, whatever ended it
                self.stop()
            return reply == "1\n"

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-P", math_worker.__file__]
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
