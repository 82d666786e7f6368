"""The right answer to a typed question of the embedded families: by a rule, no model.

    solve("What is 2381 + 4410?")       # Known(family="addition", answer="6791", level="hard", split="train")
    solve("Why is the sky blue?")       # None: no rule knows

Where problems are drawn (distill/tasks.py) the answer comes with the question. Whoever types one brings the
question alone, so it is read back here: the families' own wordings, any letter case, with or without the full
stop, and bare arithmetic (`12 * 7`). The sizes need not be those of a level; a right answer is right.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from distill.tasks import _COUNTED, _DIGITS, _REVERSED, _SORTED, split_of

LONGEST = 400  # characters of a question that are read; the rules are exact at any length, people are not


@dataclass(frozen=True)
class Known:
    """What a rule knows about a question.

    `level` is that of problems of this size, None for a size that no level has. `split`: where this content
    belongs (distill.tasks.split_of); what is not in "train" was never shown to a student or teacher.
    """

    family: str
    answer: str
    level: str | None
    split: str


def solve(question: str) -> Known | None:
    """The right answer where `question` is one of the embedded families', else None. Never an exception."""
    text = " ".join(question.split()).rstrip(" .?!=").lower()
    for family, pattern, rule in _RULES if len(question) <= LONGEST else ():
        if (match := pattern.fullmatch(text)) and (found := rule(*match.groups())):
            answer, content, level = found
            return Known(family, answer, level, split_of(family, content))
    return None


Found = tuple[str, str, str | None]  # answer, content as distill.tasks writes it, level


def _level(sizes: dict[str, int], *given: int) -> str | None:
    return next((level for level, size in sizes.items() if set(given) == {size}), None)


def _add(a: str, b: str) -> Found:
    low, high = sorted((int(a), int(b)))
    return str(low + high), f"{low}+{high}", _level(_DIGITS, len(str(low)), len(str(high)))


def _subtract(a: str, b: str) -> Found:
    a, b = int(a), int(b)
    return str(a - b), f"{a}-{b}", _level(_DIGITS, len(str(a)), len(str(b))) if a >= b else None


def _subtract_from(b: str, a: str) -> Found:
    return _subtract(a, b)


def _multiply(a: str, b: str) -> Found:
    # The one-digit factor stands last where problems are drawn.
    b, a = sorted((int(a), int(b)))
    return str(a * b), f"{a}*{b}", _level(_DIGITS, len(str(a))) if 2 <= b <= 9 else None


def _remainder(a: str, m: str) -> Found | None:
    a, m = int(a), int(m)
    if m == 0:
        return None
    return str(a % m), f"{a}%{m}", _level(_DIGITS, len(str(a))) if 3 <= m <= 9 else None


def _sort(digits: str) -> Found:
    return "".join(sorted(digits)), digits, _level(_SORTED, len(digits))


def _reverse(text: str) -> Found:
    letters = text.split()
    return " ".join(reversed(letters)), " ".join(letters), _level(_REVERSED, len(letters))


def _count(wanted: str, text: str) -> Found:
    letters = text.split()
    level = _level(_COUNTED, len(letters)) if {wanted, *letters} <= set("abcde") else None
    return str(letters.count(wanted)), f"{wanted}:{' '.join(letters)}", level


def _rule(family: str, wordings: str, rule: Callable[..., Found | None]):
    return family, re.compile(wordings), rule


_INT, _LETTERS, _IS = r"([0-9]+)", r"([a-z](?: [a-z])*)", "(?:what is )?"
_RULES = [
    _rule("addition", rf"{_IS}{_INT} ?\+ ?{_INT}", _add),
    _rule("addition", rf"add {_INT} and {_INT}", _add),
    _rule("subtraction", rf"{_IS}{_INT} ?[-−–] ?{_INT}", _subtract),
    _rule("subtraction", rf"subtract {_INT} from {_INT}", _subtract_from),
    _rule("multiplication", rf"{_IS}{_INT} ?[*×·x] ?{_INT}", _multiply),
    _rule("multiplication", rf"multiply {_INT} by {_INT}", _multiply),
    _rule("modulo", rf"what is the remainder of {_INT} divided by {_INT}", _remainder),
    _rule("modulo", rf"{_IS}{_INT} ?(?:modulo|mod|%) ?{_INT}", _remainder),
    _rule("sorting", rf"sort the digits {_INT} in ascending order", _sort),
    _rule("sorting", rf"put the digits {_INT} in order", _sort),
    _rule("reversing", rf"reverse the letters {_LETTERS}", _reverse),
    _rule("reversing", rf"write in reverse order: ?{_LETTERS}", _reverse),
    _rule("counting", rf"how many times does ([a-z]) appear in {_LETTERS}", _count),
    _rule("counting", rf"count the letter ([a-z]) in {_LETTERS}", _count),
]
