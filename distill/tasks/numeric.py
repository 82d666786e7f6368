r"""The verifier `numeric`: which number an answer states as its result, and when two numbers are equal.

    stated_number("48/2 = 24, and 48 + 24 = 72\n#### 72").value   # Fraction(72)
    stated_number("Answer: 4. Wait, 5.").value                    # Fraction(5): what is taken back does not count
    stated_number("It is 3 or 4.")                                # None: no number is stated
    equal(a, b)                                                    # exactly; 0.3333333 is 1/3

The rules are in docs/data.md, with examples that a test reads. Where the reading is not clear there is no number.
"""

import re
from fractions import Fraction

from distill.tasks.numbers import Item, Number, items, spelled, tidy
from distill.tasks.statements import (
    PHRASE,
    SENTENCE_END,
    TAIL,
    Mark,
    first_answer,
    hash_marks,
    last_box,
    last_retraction,
    percent,
    phrase_marks,
    stands,
)

# Characters after `#### 72` in which it can still be taken back; what comes later is another text.
_NEARBY = 100
_DIGITS = 6  # significant digits, at least, of a decimal that is taken for a fraction


def stated_number(answer: str) -> Number | None:
    """The number that the answer states as its result; None where it states none, or not clearly one."""
    if re.fullmatch(r"-?[0-9]{1,300}", answer):  # as most references are
        return Number(Fraction(answer))
    text = first_answer(tidy(answer[-TAIL:]))
    hashes = list(hash_marks(text))
    mark = next((m for m in hashes if m and _first(m.content) != ()), None)
    if mark and "box" not in text and last_retraction(text) is None:
        return _first(mark.content) or None
    if mark:
        text = text[: mark.end] + text[mark.end :][:_NEARBY] if _taken_back(text, mark) else text[: mark.end]
    back = last_retraction(text)
    if back is None or not re.search(r"[0-9]", text[: back.start()]):
        return _marked(text, hashes)
    head, tail = text[: back.start()], text[back.end() :]
    if _marks(tail):
        return _marked(tail, [])
    if _marks(head):
        return _only(tail)
    return _last(tail) if re.search(r"[0-9]", tail) else None


def _taken_back(text: str, mark: Mark) -> bool:
    return last_retraction(text[mark.end : mark.end + _NEARBY]) is not None


def _marks(text: str) -> list[Mark]:
    """Boxes, lines and phrases that mark something, by their place."""
    box = last_box(text)
    found = [box] if box else []
    found += [m for m in hash_marks(text) if m and _first(m.content) != ()][:1]
    found += [
        m for m in phrase_marks(text) if _first(m.content) != () and not (box and m.start < box.start < m.end)
    ]
    return sorted(found, key=lambda m: m.start)


def _marked(text: str, hashes: list[Mark | None]) -> Number | None:
    marks = _marks(text)
    if not marks:
        # A heading of doubt at the end (`#### 5. That is it.`) says nothing and lets nothing else be said.
        return None if None in hashes else _last(text)
    last, box = marks[-1], next((m for m in marks if m.kind == "box"), None)
    if last.kind == "box":
        return _boxed(last.content + percent(text, last)) if stands(text, last) else None
    found = _first(last.content) or None
    if last.kind == "hash":
        return found
    if box:
        inside = _boxed(box.content + percent(text, box)) if stands(text, box) else None
        return inside if inside and (not _tight(last.content) or same(found, inside)) else None
    others = [_first(m.content) for m in marks[:-1] if _tight(m.content)]
    if any(other and not same(other, found) for other in others) and not _concluding(text, last):
        return None
    return found


def same(one: Number | None, other: Number | None) -> bool:
    return one is not None and other is not None and one.value == other.value


_CONCLUDES = re.compile(
    r"(?:\b(?:so|therefore|thus|hence|final|finally|but|however|overall|in total|then)\b|因此|所以|最终"
    r"|最后|故|综上)[^\n]{0,60}$",
    re.IGNORECASE,
)


def _concluding(text: str, mark: Mark) -> bool:
    before = text[max(0, mark.start - 80) : mark.start]
    return bool(_CONCLUDES.search(SENTENCE_END.split(before)[-1] if before else ""))


def _boxed(inside: str) -> Number | None:
    """The one number that a box holds, a unit beside it; no calculation, list or name."""
    found = items(spelled(inside))
    numbers = {i.number and i.number.value for i in found if not i.operand}
    if len(numbers) != 1 or any(i.operand or i.refused for i in found):
        return None
    return found[0].number


_TIGHT = re.compile(
    r"[\s$*({\[\"'“≈~:=_\ue000]*(?:(?:about|approximately|approx\.?|around|roughly|exactly|simply|just"
    r"|equal to|that"
    r"|therefore|thus|now|indeed|clearly|约|大约|大概|约为|共|[a-zA-Z] ?=)[\s$*({:]*){0,2}[-+]?[\s$]*",
    re.IGNORECASE,
)


def _tight(content: str) -> bool:
    """Whether the number follows its mark at once, rather than after some words."""
    text = "= " + spelled(content)
    found = items(text)
    return bool(found) and bool(_TIGHT.fullmatch(text[: found[0].start]))


def _first(content: str) -> Number | tuple | None:
    """The number that begins what is marked; None where it is unclear, () where no number stands there.

    `48 + 24 = 72` begins with a calculation and states its result. After words (`Answer: for 3 days, 42`) the
    rule is that of a sentence.
    """
    # A value is due here: `- 5` is a number, and `5. It` is no entry of a list.
    text = "= " + spelled(content)
    found = [i for i in items(text) if not i.refused]
    if not found:
        return ()
    end = SENTENCE_END.search(text, found[0].end)
    sentence = text[: end.start()] if end else text
    found = [i for i in found if i.end <= len(sentence)] or found[:1]
    first = found[0]
    if not _TIGHT.fullmatch(text[: first.start]):
        return _sentence(sentence, found)
    if first.operand:
        return _result(sentence, found)
    rest = sentence[first.end :]
    if _TURNS.match(rest) and any(not same(i.number, first.number) for i in found[1:]):
        return None  # `was 5, but it is 6`, `5 -> 6`
    follows = next(
        (i for i in found[1:] if re.fullmatch(r"[\s$]*=[\s$(]*-?", text[first.end : i.start])), None
    )
    if follows and not follows.operand and not same(follows.number, first.number):
        return None
    return first.number


_TURNS = re.compile(r"[\s,)]*(?:\([^()]*\)[\s,]*)?(?:but|however|yet|no|->|→|=>|-->|但|而)", re.IGNORECASE)


def _last(text: str) -> Number | None:
    """Nothing is marked: the number of the last sentence that has one."""
    text = spelled(text)
    spots = [0, *(m.end() for m in SENTENCE_END.finditer(text)), len(text)]
    for start, end in zip(spots[-2::-1], spots[:0:-1]):
        here = [i for i in items(text, start, end) if not i.refused]
        if here:
            supposed = PHRASE.search(text, start, end)  # `if the answer were 5`, `the wrong answer is 5`
            return None if supposed else _sentence(text[:end], here)
    return None


_GIVES = re.compile(
    r"(?:[=≈:：→⇒]|\b(?:is|are|was|were|be|equals?|equal to|gives?|gets?|got|yields?|makes?|totals?|total of"
    r"|leaves?|left with|have"
    r"|has|had|needs?|costs?|earns?|becomes?)\b|[是为為得有]|等于|一共|总共|共)\s*"
    r"(?:(?:about|approximately|approx\.?|around|roughly|exactly|only|just|a total of|约"
    r"|大约)\s*)?[\s$(*]*[-+]?\s*$",
    re.IGNORECASE,
)


# `Let x = 5`, `if it is 5`, `maybe 5`: nothing is stated.
_UNSURE = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|let(?!'s| us (?:see|check|add|sum|find))|could|might"
    r"|may|maybe|perhaps|possibly)\b"
    r"[^.,;:!?\n]*$|(?:如果|假设|假如|若|设|可能|也许|或许)[^，。；：！？\n]*$",
    re.IGNORECASE,
)


def _sentence(text: str, found: list[Item]) -> Number | None:
    """The one number of a sentence, else the last if it stands after `=` or a verb (`48 + 24 = 72`, `is 72`)."""
    values = {i.number and i.number.value for i in found}
    last = found[-1]
    if _UNSURE.search(text[max(0, last.start - 80) : last.start]):
        return None
    if len(values) == 1 and not any(i.operand for i in found):
        return last.number
    if re.search(r"[0-9][A-Za-z](?:\^?[0-9²³])?\s*=[\s$]*-?$", text[max(0, last.start - 20) : last.start]):
        return None  # `2x = 10` states no x
    if last.operand or not _GIVES.search(text[max(0, last.start - 60) : last.start]):
        return None
    return last.number


def _result(text: str, found: list[Item]) -> Number | None:
    """What a calculation comes to: the last number after `=`."""
    for item in reversed(found):
        if re.search(r"[=≈][\s$(]*-?\s*$", text[: item.start][-30:]):
            return None if item.operand else item.number
    return None


def _only(text: str) -> Number | None:
    """After a marked result was taken back: the only number that follows, or none."""
    found = [i for i in items(spelled(text)) if not i.refused]
    values = {i.number and i.number.value for i in found}
    return found[0].number if len(values) == 1 and not any(i.operand for i in found) else None


# ---- equal ------------------------------------------------------------------------------------------------


def equal(one: Number, other: Number) -> bool:
    """Exactly, as rationals. One tolerance: a decimal of 6 digits or more that is a fraction rounded or cut.

    A percent sign is a unit like `$`: 50 % is 50 and never 0.5. Below 1 %, where a share may be meant, both or
    neither must have it.
    """
    if (one.unit == "%") != (other.unit == "%") and abs(one.value) < 1:
        return False
    if one.value == other.value:
        return True
    for decimal, fraction in ((one, other), (other, one)):
        if decimal.places and fraction.places is None and _endless(fraction.value):
            return _rounded(decimal, fraction.value)
    return False


def _endless(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest > 1


def _rounded(decimal: Number, fraction: Fraction) -> bool:
    scaled = abs(decimal.value) * 10**decimal.places
    if len(str(int(scaled))) < _DIGITS or (decimal.value < 0) != (fraction < 0):
        return False
    exact = abs(fraction) * 10**decimal.places
    return scaled in (int(exact), int(exact + Fraction(1, 2)))


def spelling(number: Number) -> str:
    """One text for equal numbers: 2.50 and 2.5 are both `2.5`; a fraction without end is `1/3`."""
    value = number.value
    if value.denominator == 1:
        return str(value.numerator)
    if _endless(value):
        return str(value)
    places = 0
    while (value * 10**places).denominator > 1:
        places += 1
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return ("-" if value < 0 else "") + digits[:-places] + "." + digits[-places:]
