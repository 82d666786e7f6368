r"""Where an answer states its result: marks of finality, what comes after them, and what is taken back.

    boxed(r"so \boxed{\frac{1}{2}}")                    # r"\frac{1}{2}"
    first_answer("72\n\nQuestion: How many? Answer: 5")  # "72": what a base model asks itself next is no answer

Three marks count: \boxed{...}, GSM8K's `#### 72` (not a Markdown heading such as `#### Step 3`), and a phrase
(`The answer is`, `答案是`). The verifiers decide what they read there.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from distill.tasks.numbers import REFUSED, REFUSING

TAIL = 20_000  # characters: what is stated is stated at the end
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]")


class Mark(NamedTuple):
    """text[start:end] is marked as final, `content` of it is read. `kind`: box, hash or phrase."""

    kind: str
    start: int
    end: int
    content: str


def last_box(answer: str) -> Mark | None:
    r"""The last whole \boxed{...}, its braces matched; None where there is none."""
    if "box" not in answer:
        return None
    opened: list[tuple[int, int]] = []  # where a box and its content begin, (-1, -1) for any other brace
    best = None
    for match in _BOX_OR_BRACE.finditer(answer):
        if match[0] == "}":
            start, begin = opened.pop() if opened else (-1, -1)
            if begin >= 0 and (best is None or begin > best[1]):
                best = (start, begin, match.start())
        elif match[0][-1] == "{" and match[0] != "\\{":
            opened.append((match.start(), match.end()) if len(match[0]) > 1 else (-1, -1))
    return best and Mark("box", best[0], best[2] + 1, answer[best[1] : best[2]].strip())


_BEFORE_BOX = re.compile(
    REFUSING + r"[\s$(\[\\*]*$|[-−–+^×·<>≤≥≠±/√][\s$\\(\[]*$|[0-9]$|[0-9] ?\$$"
    r"|\\(?:neq?|leq?|geq?|lt|gt|pm|times|cdot|div|sqrt|approx)\s*\{?\s*$|\b(?:at least|at most"
    r"|more than"
    r"|less than|between)\s*\$?$",
    re.IGNORECASE,
)
_AFTER_BOX = re.compile(
    r"[\s$\\)\]*]{0,6}(?:(?:hundred|thousand|million|billion|trillion|lakh|crore|dozen|bn|mn|k)\b"
    r"|[万亿千百‰]|[+×·^]|\\(?:times|cdot|pi|sqrt|pm)"
    r"|(?:or|to)\s+[-$\\(0-9A-Z]|-\s?[0-9]|[?？])|[a-zA-Z0-9(]|[\s$\\)\]*]{0,6}" + REFUSED,
    re.IGNORECASE,
)


def stands(answer: str, box: Mark) -> bool:
    r"""Whether the box says what it holds: not `-\boxed{5}`, `not \boxed{5}`, `\boxed{5} million`, `\boxed{5} or 6`."""
    before = answer[max(0, box.start - 60) : box.start]
    return not (
        _BEFORE_BOX.search(before)
        or SUPPOSED.search(before)
        or _AFTER_BOX.match(answer, box.end)
        or _several_boxes(answer, box)
    )


def percent(answer: str, box: Mark) -> str:
    r"""The percent sign that stands right after a box, `\boxed{50}\%`, or nothing."""
    return (
        r"\%" if re.match(r"[\s$]{0,3}(?:\\?%|percent\b|per cent\b)", answer[box.end : box.end + 12]) else ""
    )


def boxed(answer: str) -> str | None:
    r"""What the last whole \boxed{...} holds, its braces matched; None where there is none."""
    box = last_box(answer)
    return box and box.content


_AND = re.compile(r"[\s$,.]*(?:and|or|,|;|、|和|或|以及|或者)?[\s$]*", re.IGNORECASE)


def _several_boxes(answer: str, box: Mark) -> bool:
    r"""Whether another box stands beside this one, as two answers do: `\boxed{3} and \boxed{4}`."""
    before = answer[max(0, box.start - 400) : box.start]
    other = last_box(before)
    return other is not None and bool(_AND.fullmatch(before, other.end)) and other.content != box.content


_HASH = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)(?:\n\s*([^\n#][^\n]*))?")
_DRESS = str.maketrans("", "", "*_`")
_WORDED = re.compile(r"[\"'(]*(?:[A-Za-z]{2,}|[\u3400-\u9fff])")
_NUMBERED = re.compile(r"\(?([0-9]{1,2})(?:[.)]|\\\.|[:：])\s+\S|([0-9]{1,2})\s+[A-Z][a-z]")


def hash_marks(text: str) -> Iterator[Mark | None]:
    """Every line after #### that is no Markdown heading. None for one that may be either: `#### 5. So it is 5.`

    A heading begins with a word (`#### Step 3`) or with the small number of a list (`#### 2. Compute`).
    """
    for match in _HASH.finditer(text):
        line, end = match[1].translate(_DRESS).strip(), match.end(1)
        if not line and match[2]:
            line, end = match[2].translate(_DRESS).strip(), match.end(2)
        if _WORDED.match(line) or not line:
            continue
        numbered = _NUMBERED.match(line)
        last = not text[end:].strip()
        if numbered and int(numbered[1] or numbered[2]) <= 20 and not (numbered[2] and last):
            if last or line.endswith((".", "!", "。")):
                yield None
            continue
        yield Mark("hash", match.start(), end, line)


PHRASES = 20  # phrases that are looked at, the last ones
_SCOPE = 500  # characters after a phrase in which its result is looked for
PHRASE = re.compile(
    r"(?:\banswers?\b(?:[*_]{0,3} (?:to|for|of|in) [^.:=\n?!]{1,60}?)?[*_\s]{0,4}"
    r"(?::|=|(?:is|was|are|were|will be|would be|must be|should be|equals|comes to|becomes)\b)"
    r"|(?:答案|答)(?:应该|应当|应|就|确实|便)?(?:是|为|為|：|:|=|等于))(?:[ \t]*[:：*_])*[ \t]*",
    re.IGNORECASE,
)
_TITLE = re.compile(r"^[ \t>]*(?:#{1,6}|\*\*|__)[ \t]*([^\n]{0,40}?)(?:\*\*|__)?[ \t]*$", re.MULTILINE)
_HEADED = re.compile(r"\banswers?\b[*_ ]{0,4}$|答案$", re.IGNORECASE)
SUPPOSED = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|unless|whether|imagine|(?:some|people|you|one|many|others)\s"
    r"(?:people |students |may |might |could |would )*(?:say|think|believe|guess|answer|claim|expect)"
    r"|(?:wrong|incorrect|false|naive|tempting|obvious|common|previous|initial|old|earlier|not the"
    r"|no))\b[^.,;:!?\n]*$"
    r"|(?:如果|假设|假如|若|有人|错误的?|不能说|不是)[^，。；：！？\n]*$",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\]*}]|$)|[。！？；]|;(?=\s+[A-Za-z\u4e00-\u9fff])|\n")


def phrase_marks(text: str) -> Iterator[Mark]:
    """What follows `the answer is`, `Answer:`, `答案是`, to the end of its line; not after `if`, `some say`."""
    for match in list(PHRASE.finditer(text))[-PHRASES:]:
        if SUPPOSED.search(text[max(0, match.start() - 80) : match.start()]):
            continue
        start, end = match.end(), text.find("\n", match.end())
        # A heading: what it announces is on the next line.
        if end >= 0 and not text[start:end].strip(" \t*_$"):
            start = _next_line(text, end)
            end = text.find("\n", start)
        end = min(len(text) if end < 0 else end, start + _SCOPE)
        yield Mark("phrase", match.start(), end, text[start:end])
    for match in [m for m in _TITLE.finditer(text) if _HEADED.search(m[1])][-PHRASES:]:
        if not SUPPOSED.search(match[1]):
            start = _next_line(text, match.end())
            end = text.find("\n", start)
            end = min(len(text) if end < 0 else end, start + _SCOPE)
            yield Mark("phrase", match.start(), end, text[start:end])


def _next_line(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


# ---- the second question of a base model ------------------------------------------------------------------

_NEXT = re.compile(
    r"(?m)^[ \t>*#]*(?:(?:Next|New|Another) )?(?:Question|QUESTION|Problem|Q|Exercise|Task|Instruction"
    r"|User|Human|Input"
    r"|Example(?= ?[0-9])|问题|題目|题目|问)[ \t]*[0-9]{0,3}[*_ \t]*(?:[:：]|\.(?= ))"
    r"|\[INST\]|<\|[a-z_]{3,20}\|>|<start_of_turn>|<end_of_turn>"
    r"|(?m)(?:^#+[ \t]*(?:Question|Problem|Exercise|Instruction)\b[^\n]*$)"
    r"|(?<=[.!?。！？0-9)}$*]) +(?:Question|Q|Problem|Human|User"
    r"|问题)[ \t]*[0-9]{0,3}[ \t]*[:：]".replace("|(?m)", "|"),
)  # fmt: skip
_PREAMBLE = re.compile(r"(?i)\b(?:let|sure|here|restate|rewrite|given|first)\b|:\s*$|首先|让我们|我们来")


def first_answer(text: str) -> str:
    """The text up to where another question begins. One that opens the text, or follows a preamble, is restated.

    `<answer>` tags become the phrase that they stand for.
    """
    if "<answer>" in text:
        text = text.replace("<answer>", " answer: ").replace("</answer>", "\n")
    for match in _NEXT.finditer(text):
        head = text[: match.start()]
        if not head.strip():
            continue
        if not re.search(r"[0-9]", head) and len(head) < 300 and _PREAMBLE.search(head):
            continue
        return head
    return text


# ---- taken back -------------------------------------------------------------------------------------------

_RETRACTION = re.compile(
    r"\b(?:wait|hold on|hmm|oops|correction|edit|sorry|apologies|my apologies|actually|scratch that|strike that"
    r"|ignore that|on second thoughts?|my (?:mistake|bad)|no)(?=\s*[,.:;!?—…-])(?!\s-?\d|[-.]\d)"
    r"|\b(?:no,? wait|wait,? (?:no|that|this|it|let|i)|actually (?:it|that|the|this|no|i)|oh no"
    r"|or rather|make that"
    r"|i (?:made|have made) an? (?:mistake|error)|i (?:mean|meant)|i was wrong|i take (?:it|that) back"
    r"|(?:that|this|which)(?:'s| is| was) (?:wrong|incorrect|not (?:right|correct)|a mistake|an error|false)"
    r"|(?:that|this) (?:isn't|wasn't|can't be|cannot be) (?:right|correct))\b"
    r"|不对|不，|等等|等一下|更正|纠正|其实(?!际)|实际上|错了|我错|抱歉|对不起|算错|重新(?:计)?算|应改为|改为",
    re.IGNORECASE,
)  # fmt: skip


# One of these is in every text that takes something back: looking for them is ten times faster than the pattern.
_HINTS = (
    "wait", "hold on", "hmm", "oops", "correction", "edit", "sorry", "apolog", "actually", "scratch", "strike",
    "ignore",
    "second thought", "mistake", "my bad", "no,", "no.", "no:", "no;", "no!", "no?", "no ", "rather", "make that",
    "error", "i mean", "wrong", "back", "incorrect", "right", "correct", "false",
)  # fmt: skip


def last_retraction(text: str) -> re.Match | None:
    """Where something is taken back for the last time: `Wait,`, `that is wrong`, `不对`; None where nothing is."""
    low = text.lower()
    if text.isascii() and not any(hint in low for hint in _HINTS):
        return None
    last = None
    for last in _RETRACTION.finditer(text):  # noqa: B007 - the last one
        pass
    return last


def stated(answer: str) -> str:
    r"""The text that is marked as final: the last \boxed{...}, else the line of the first ####, else all."""
    inside = boxed(answer)
    if inside is not None:
        return inside
    mark = next(filter(None, hash_marks(answer)), None)
    return mark.content if mark else answer
