r"""Verifiers: is this completion right? Rules only, no model, and never an exception on garbage.

How large a regular expression becomes when it is compiled, before anything compiles it.

`a{999999999}` is eleven characters, and took a compiler 8 GB until the system stopped it. Repeats multiply where they
are nested, and a compiler writes them out. So their counts are read first, and a pattern beyond a limit is refused:

    check_size(r"\d{4}-\d{2}")          # fine
    check_size(r"(a{1000}){1000}")      # ValueError: 1,000,000 parts

What is read is what `re` and `regex` share: escapes, classes, groups, `{n}`, `{n,}`, `{n,m}`. Anything else counts as
one part a character, so the estimate is never far below what a compiler makes of it.

A completion is free text that may hold its reasoning in <think> tags. `extract_answer` takes the final
answer out of it, a verifier reads what the answer states and compares that with the reference, `judge` gives the
one verdict that the filter and the evaluation both use. A wrong answer that passes is worse than a right one that is
refused, so where a verifier cannot tell what is stated, the verdict is `no_answer`. The rules: docs/data.md.

    judge("exact", "<think>7+8=15</think>15", "15", finish_reason="stop")  # -> "correct"
    judge("numeric", "so 3 * 24 = 72\n#### 72", "72")                      # \boxed{72} too
    judge("choice", "(A) is wrong. Answer: B", "B")
    judge("math", r"\boxed{\frac{2}{4}}", "0.5")                           # needs the extra `math`
    judge(r"regex:(?i)\bparis\b", "It is Paris.", "")                      # a recipe's `pattern`
"""

import importlib.util
import re
import unicodedata
from collections.abc import Callable

import regex

from distill.errors import UserError
from distill.tasks import formulas
from distill.tasks import numeric as numbers_stated
from distill.tasks.choices import letter
from distill.tasks.numbers import INVISIBLE
from distill.tasks.statements import boxed, stated

MOST_PARTS = 20_000
MOST_CHARACTERS = 10_000
MOST_GROUPS = 200  # opened in each other: compilers go down with them
_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def check_size(pattern: str) -> None:
    """Raises ValueError where the pattern is too long, too deep, or too large once its repeats are written out."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"has {len(pattern):,} characters; at most {MOST_CHARACTERS:,}")
    parts = written_out(pattern)
    if parts > MOST_PARTS:
        about = f"{parts:,}" if parts < 10**15 else "more than 10^15"
        raise ValueError(
            f"repeats itself into {about} parts; lower its {{counts}}, at most {MOST_PARTS:,} in all"
        )


def written_out(pattern: str) -> int:
    """Parts of a pattern with every `{n,m}` written out m times. Raises ValueError for groups too deep."""
    sizes = [0]  # of the groups that are open, the pattern itself first
    last = 0  # of the part that a count would repeat
    position = 0
    while position < len(pattern):
        character = pattern[position]
        repeat = _REPEAT.match(pattern, position) if character == "{" else None
        if repeat and (repeat[1] or repeat[2]):
            count = max(int(number[:30]) for number in repeat.groups() if number)
            sizes[-1] += last * max(count - 1, 0)
            last *= max(count, 1)
            position = repeat.end()
            continue
        if character == "(":
            sizes.append(0)
            if len(sizes) > MOST_GROUPS:
                raise ValueError(f"opens more than {MOST_GROUPS} groups in each other; write it flatter")
            last, position = 0, position + 1
            continue
        if character == ")" and len(sizes) > 1:
            last = sizes.pop() + 1
            sizes[-1] += last
            position += 1
            continue
        position = _after_part(pattern, position)
        last = 1
        sizes[-1] += 1
    return sum(sizes)


def _after_part(pattern: str, position: int) -> int:
    """Where the escape, the class or the character that begins here ends."""
    if pattern[position] == "\\":
        return position + 2
    if pattern[position] != "[":
        return position + 1
    position += 2 if pattern[position + 1 : position + 2] == "^" else 1
    if pattern[position : position + 1] == "]":  # the first one is a member
        position += 1
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1


# ==== Verifiers ====

__all__ = [
    "VERDICTS", "VERIFIERS", "boxed", "check_pattern", "choice", "chosen_option", "contains", "exact",
    "extract_answer", "final_answer", "judge", "letter", "matches", "math_equal", "numeric", "require_package",
    "stated",
]  # fmt: skip
VERDICTS = ("correct", "wrong", "no_answer", "truncated", "error")
REGEX_CHARACTERS = 10_000  # the end of an answer that a recipe's pattern is matched against
REGEX_SECONDS = 0.5  # a pattern that backtracks longer has not matched


def extract_answer(text: str, *, opened: bool = False) -> str | None:
    """The final answer: what follows the last `</think>`, else the whole text; None where that is empty.

    Text with an opened and never closed <think> has no final answer: it was still thinking. `opened`: the
    prompt itself ended in <think> (templates of DeepSeek-R1 and others), so the text begins inside it.
    """
    _head, closed, tail = text.rpartition("</think>")
    if "<think>" in tail or (opened and not closed):
        return None
    answer = tail.strip()
    return answer or None


# ---- exact ------------------------------------------------------------------------------------------------

_FOLDED = (
    "<wide>", "<narrow>", "<noBreak>", "<compat>", "<small>", "<vertical>",
    "<initial>", "<medial>", "<final>", "<isolated>",
)  # fmt: skip


def _plain(text: str) -> str:
    """White space collapsed, invisible characters left out, Unicode by NFC and, where the meaning stays, NFKC.

    Folded are forms of the same character: full and half width, ligatures, presentation forms, odd spaces.
    Not folded are those that NFKC would make into another text: `2³` (23), `1½` (11/2), `①` (1), `ℝ` (R).
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", "".join(map(_fold, text.translate(INVISIBLE))))
    return " ".join(text.split())


def _fold(c: str) -> str:
    kind = unicodedata.decomposition(c).partition(" ")[0] if c >= "\xa0" else ""
    if kind not in _FOLDED:
        return c
    folded = unicodedata.normalize("NFKC", c)
    digits = any(map(str.isdigit, folded)) and kind not in ("<wide>", "<narrow>")
    return c if digits else folded


def exact(answer: str, reference: str) -> bool:
    """Equal, but for white space, invisible characters and the width of characters (`_plain`)."""
    return _plain(answer) == _plain(reference)


# ---- numeric, choice, regex, math -------------------------------------------------------------------------


def numeric(answer: str, reference: str) -> bool:
    r"""The number that the answer states equals that of the reference, exactly (distill/tasks/numeric.py).

    `#### 42`, `\boxed{42}`, `the answer is 42`, else the number of the last sentence. Only a fraction without end
    (1/3) equals a decimal that rounds it to 6 digits or more. Units and thousands marks are left out.
    """
    found = numbers_stated.stated_number(answer)
    return found is not None and _same_number(found, reference)


def _same_number(found: numbers_stated.Number, reference: str) -> bool:
    wanted = numbers_stated.stated_number(reference)
    return wanted is not None and numbers_stated.equal(found, wanted)


def choice(answer: str, reference: str) -> bool:
    """The answer chooses the letter of the reference (see `letter`)."""
    found = letter(answer)
    return found is not None and _same_letter(found, reference)


def _same_letter(found: str, reference: str) -> bool:
    return found == letter(reference)


def contains(answer: str, reference: str) -> bool:
    """The reference stands in the answer as whole words, whatever the case, and not behind a negation.

    For short references in free sentences ("It is Paris." and Paris). "not Paris", "isn't Paris" and "never Paris" are
    refused; what else a sentence takes back ("Paris? No") is not understood: ask for the answer alone where it matters.
    """
    wanted = _plain(reference).casefold()
    if not wanted:
        return False
    pattern = rf"(?<!\w)(?<!\bnot )(?<!n't )(?<!\bnever ){regex.escape(wanted)}(?!\w)"
    text = _plain(answer).casefold().replace("’", "'")
    found = regex.search(pattern, text) is not None
    return found and not regex.search(rf"(\bnot|n't|\bnever) {regex.escape(wanted)}(?!\w)", text)


def chosen_option(answer: str, options: list[str]) -> str | None:
    """The letter of the one option whose words the answer states; None for none and for several.

    An option within another one that is stated too ("Paris" in "Paris, Texas") is not stated by itself.
    """
    said = [(i, _plain(option).casefold()) for i, option in enumerate(options) if contains(answer, option)]
    whole = [i for i, text in said if not any(text != other and text in other for _, other in said)]
    return chr(ord("A") + whole[0]) if len(whole) == 1 else None


def check_pattern(pattern: str) -> None:
    """Raises ValueError if a recipe's pattern is not a regular expression."""
    try:
        check_size(pattern.replace("{answer}", "x"))
        regex.compile(pattern.replace("{answer}", "x"))
    except ValueError as error:
        raise ValueError(f"`pattern` {error}") from None
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"`pattern` is not a regular expression: {error}; correct it") from None


def matches(answer: str, reference: str) -> bool:
    """The pattern `reference` is found in the last REGEX_CHARACTERS of the answer within REGEX_SECONDS."""
    try:
        return regex.search(reference, answer[-REGEX_CHARACTERS:], timeout=REGEX_SECONDS) is not None
    except (regex.error, TimeoutError):
        return False


def math_equal(answer: str, reference: str) -> bool:
    r"""Equal as mathematics by the package math-verify: `\frac{1}{2}` and 0.5, `x+1` and `1+x`, intervals.

    The formula is what the answer states (distill/tasks/formulas.py). The package runs in a process of its own that
    ends after a second, whatever it is computing (distill/workers/math_worker.py). UserError where it is missing.
    """
    found = formulas.stated_formula(answer)
    return found is not None and _same_formula(found, reference)


def _same_formula(found: str, reference: str) -> bool:
    require_package("math")
    return formulas.equal(found, _wanted(reference))


def _wanted(reference: str) -> str:
    """The formula of a reference: what it marks as final, else all of it."""
    return stated(reference).strip().strip("$")


VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "exact": exact,
    "contains": contains,
    "numeric": numeric,
    "choice": choice,
    "regex": matches,
    "math": math_equal,
}
# What a verifier reads in an answer, None being no_answer, and how it compares that with the reference: `judge` reads
# once. `exact` and `regex` take any text as it is.
_READ: dict[str, Callable[[str], object | None]] = {
    "numeric": numbers_stated.stated_number,
    "choice": letter,
    "math": formulas.stated_formula,
}
_SAME: dict[str, Callable[..., bool]] = {
    "numeric": _same_number,
    "choice": _same_letter,
    "math": _same_formula,
}


def final_answer(verifier: str, text: str, *, opened: bool = False) -> str | None:
    """What the verifier compares, in one spelling, so that equal answers can be counted; None if there is none.

    numeric: the number (2.50 and 2.5 are one); choice: the letter; math: the formula; regex: what is marked as final.
    """
    answer = extract_answer(text, opened=opened)
    if answer is None:
        return None
    name = verifier.partition(":")[0]
    if name in _READ:
        found = _READ[name](answer)
        if found is None:
            return None
        return numbers_stated.spelling(found) if name == "numeric" else " ".join(str(found).split())
    return _plain(answer) if name == "exact" else " ".join(stated(answer).split())


def require_package(verifier: str) -> None:
    """Raises UserError where a verifier's package is not there. Called before anything is spent."""
    if verifier == "math" and importlib.util.find_spec("math_verify") is None:
        raise UserError("verifier 'math' needs an extra: pip install 'distill-demo[math]', or use numeric")


def judge(
    verifier: str,
    text: str,
    reference: str,
    finish_reason: str = "stop",
    error: str | None = None,
    *,
    opened: bool = False,
    options: list[str] | None = None,
) -> str:
    """One of VERDICTS. A truncated completion is `truncated` even if its text would happen to match.

    `no_answer`: nothing follows the thinking, or nothing that this verifier can read with certainty: no number,
    no letter, no formula. `verifier` is a name of VERIFIERS, or `regex:PATTERN`, where `{answer}` stands for
    the reference, escaped. `opened`: as in `extract_answer`. `options`: of a choice, their words; an answer without a
    letter that states one of them chooses it.
    """
    if error:
        return "error"
    if finish_reason == "length":
        return "truncated"
    answer = extract_answer(text, opened=opened)
    if answer is None:
        return "no_answer"
    name, _, pattern = verifier.partition(":")
    if pattern:
        reference = pattern.replace("{answer}", regex.escape(reference))
    if name not in _READ:
        return "correct" if VERIFIERS[name](answer, reference) else "wrong"
    found = _READ[name](answer)
    if found is None and name == "choice" and options:
        found = chosen_option(answer, options)
    if found is None:
        return "no_answer"
    return "correct" if _SAME[name](found, reference) else "wrong"
