r"""The verifier `choice`: which letter an answer chooses, or none where that is not clear.

    letter("The answer is B, not A")     # "B"
    letter("应该是B，而不是A")              # "B"
    letter("It is A or B")               # None: never a guess

Letters count where they stand alone, capital anywhere, lower case where a letter is due (`answer: b`, `(b)`).
Those that are refused (`not G`, `A is wrong`), supposed (`if A`) or asked for (`A?`) do not count. Then the first
of these that there is decides: \boxed{...}, a statement (`the answer is B`), a letter at the head of the text or
alone on its line, the only letter left. Two letters at one rank are no answer. docs/data.md has examples.
"""

import re
from typing import NamedTuple

from distill.tasks.numbers import REFUSED, REFUSING, tidy
from distill.tasks.statements import TAIL, first_answer, last_box, last_retraction, stands

_CIRCLED = {0x24B6 + i: chr(65 + i) for i in range(26)} | {0x24D0 + i: chr(97 + i) for i in range(26)}
MOST = 200  # letters of an answer that are looked at, the last ones
_WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff]"  # CJK text has no spaces around a letter
_ALONE = re.compile(
    rf"(?<!{_WORD})(?<![-'’.°\\_^+=/&|∠])([A-Za-z])(?!{_WORD})(?![-'’./^+&]\w|[_^+(|∩∪]|\s*[=<>]| \+)"
)
# "A dog", "B cells" and "I think" choose nothing; "A because" does.
_NOUN = re.compile(
    r"[ \t]+(?!(?:because|since|as|is|was|and|or|but|not|rather|instead|for|which|with|due|given|would"
    r"|seems|looks|must|should"
    r"|can|could|cannot|if|while|whereas|it|that|there|here|has|does|fits|works|best|in|at|by|on|then"
    r"|also|after|when|where|so"
    r"|hence|thus|based|though|although|among|isn|doesn|won|fails|cannot|only|may|might|alone|itself"
    r"|both|nor|are|were|too|the)\b"
    r")[a-z]"
)
_INITIAL = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|[A-Z])\. ?$")
_I_AM = re.compile(r"\s+(?!is\b|and\b|or\b|because\b|as\b|since\b)[a-z']|'|’")
_DUE = re.compile(  # a lower-case letter is one of the choices here
    r"(?:\b(?:answer|choice|option|choose|select|pick)\b(?:\s+(?:is|was|would be|must be|should be))?"
    r"|答案(?:是|为)?|选项?|[是为])"
    r"[\s:：=*_$\"“'(\[【]*$|[(\[【]\s*$|(?:^|\n)[\s*_]*$",
    re.IGNORECASE,
)
_LOWER_END = re.compile(
    r"\s*(?:$|[)\]】.,;:!*_\"'”\n，。；：]|(?:because|since|is correct|is right)\b|[\u3400-\u9fff])"
)
_LETTERS = r"(?:[(\[]?[A-Za-z][)\]]?(?:\s*(?:/|,?\s*\b(?:and|or|nor)\b|和|或|与|、)\s*)+)*[(\[]?"
_REFUSES = re.compile(
    REFUSING
    + r"(?:(?:both|either|option|choice|choose|choosing|select|selecting|pick|picking|go(?:ing)? with"
    r"|sure|certain|about"
    r"|选项?)\s*)*[ \t(\[*_\"'“]*" + _LETTERS + r"[ \t(\[*_\"'“]*$"
    r"|(?:\b(?:excludes?|excluding|eliminat(?:e|es|ed|ing)|rul(?:e|es|ed|ing) out|reject(?:s|ed|ing)?"
    r"|discard(?:s|ed|ing)?"
    r"|cross(?:es|ed|ing)? out)\b|排除)(?:[ \t]*(?:options?|choices?"
    r"|选项))?[ \t:(\[*_\"'“]*(?:[(\[]?[A-Za-z][)\]]?(?:\s*(?:/|,|"
    r"\band\b|\bor\b|和|或|与|、)\s*)+)*[(\[]?$"
    r"|(?:\b(?:neither|nor|wrong|incorrect|avoid|without|no|against|(?:anything|all|everything|any) but"
    r"|other than|besides|apart from|except(?: for)?)\b|不选|不能选|不应选|不应该选|不该选|不要选"
    r"|不可选|别选|勿选|否定|不选择"
    r"|而不选|不是选项?|除了?)(?:[ \t]*(?:option|choice|out|for|is|are|both|answer|choices|options|选项"
    r"|项)\b){0,3}"
    r"[ \t:(\[*_\"'“]*" + _LETTERS + r"$",
    re.IGNORECASE,
)  # fmt: skip
_GROUP = (  # `A and B are wrong`, `A, B are wrong`; but in `B, A is wrong` only A is
    r"[)\]】*_\"'”.]*(?:(?:\s*(?:,|/|and|or|nor|、|和|与|及"
    r"|或)+\s*[(\[]?[A-Za-z]\b[)\]]?){1,8}(?=\s*(?:are|were|both|all|都|均|全))"
    r"|(?:\s*(?:/|\band\b|\bor\b|\bnor\b|、|和|与|及|或)\s*[(\[]?[A-Za-z]\b[)\]]?)*)"
)
_IS_REFUSED = re.compile(
    _GROUP + r"\s*(?:[:：—-]\s*)?(?:both|all|都|均|全|也|项|选项|这个选项|选择|alone|itself)*\s*(?:" + REFUSED
    + r"|\s*(?:is|are|was|were|can be|could be|gets)\s+(?:both |all |also |clearly |the |a "
    r"|an )?(?:\w+ly )?(?:not|out\b|eliminated|excluded|ruled|rejected"
    r"|wrong|incorrect|inconsistent|irrelevant|off\b|worse)|\s*(?:doesn't|does not|do not|don't|fails?"
    r"|contradicts?)\b"
    r"|[:：]?\s*(?:wrong|incorrect|false|no\b|too\b|not\b|✗|❌|×)|(?:可以)?(?:被)?(?:排除|不符|不合"
    r"|不成立|不行|错|非)|不(?!选|是|要选)|是不|以?外|[^.!?。！？\n]{0,60}[?？])",
    re.IGNORECASE,
)  # fmt: skip
_SO_IS = re.compile(r"\b(?:so is|neither is|nor is|as is)\s+[(\[]?$", re.IGNORECASE)
_DOUBTFUL = re.compile(
    r"(?:\b(?:if|suppose|supposing|assume|assuming|unless|whether|might|could|may be|maybe|perhaps"
    r"|possibly|consider"
    r"|considered|considering|some (?:people )?(?:say|think|choose|pick)|people (?:say|think|choose"
    r"|pick)|at first|first thought|initially"
    r"|(?:you|one|many|others) (?:might|may|could|would)|tempting|wrong answer|incorrect answer|between)\b"
    r"|如果|假设|假如|可能|也许|或许|有人|考虑|本来|原以为|起初)[^,.;:!?，。；：！？\n]*$",
    re.IGNORECASE,
)  # fmt: skip
_LEAD = r"(?:\s*(?:option|choice|letter|choose|选项?|項|项))?[\s:：=*_$\"“'(\[【】–—-]*$"
_STATES = re.compile(
    r"(?:\banswer\b(?:[*_]{0,3} (?:to|for) [^.:=\n?!]{1,60}?)?[*_\s]{0,4}(?:is|was|would be|must be"
    r"|should be|will be|[:=])?"
    r"(?:\s+(?:therefore|thus|clearly|definitely|simply|most likely|probably|indeed|hence))?"
    r"|答案(?:应该|应当|应|就|确实|便)?(?:是|为|為)?"
    r"|\b(?:choose|chose|select|pick|go with|going with|choosing|selecting|picking|choice|option"
    r"|selection)(?:\s+(?:is|would be|must be|should be))?"
    r"|[故应應就所以当]?[選选][擇择项項]?(?!项)(?:是|为)?)" + _LEAD,
    re.IGNORECASE,
)  # fmt: skip
_ANSWERS = re.compile(r"\banswers?\b|答案|\bfinal\b", re.IGNORECASE)
_IS_STATED = re.compile(
    r"[)\]】*_\"'”]*(?:\s*选?项)?\s*(?:(?:is|must be|should be|would be|looks|seems)\s+(?:clearly "
    r"|definitely |indeed |therefore |thus |also )?"
    r"(?:the\s+)?(?:only\s+|most\s+)?(?:correct|right|true|best|answer|accurate|suitable|appropriate)"
    r"|(?:是)?(?:正确|对的|最佳|答案)|符合|成立)",
    re.IGNORECASE,
)  # fmt: skip
_IS = re.compile(
    r"(?:\b(?:it|that|this|so|be|is|'s|’s|must be|should be|think|say|guess|believe|probably|definitely"
    r"|clearly|of|with|hence"
    r"|therefore|thus|but|so|then|actually|instead)\b|[是为選选])[\s,:*_$\"“'(\[【]*$",
    re.IGNORECASE,
)
_HEAD = re.compile(r"\s*[*_$\"“'(\[【]*$")
_HEAD_END = re.compile(
    r"[*_\"'”]*(?:\s*$|\s*\n|[)\].:：、】。](?![A-Za-z0-9])|\s*[,，—–]|\s+-\s|\s+(?:because|since|as|is"
    r"|for|due|given)\b|\s*[(（])"
)
_LINE_END = re.compile(r"[)\]】.*_\"'”$]*[ \t]*(?:\n|$)")
_OTHER = re.compile(
    r"[)\]】*_$\"'”]*\s*(?:(,|，|、)|/|&|\band\b|\bor\b|和|或者?|与|及|还是)\s*(?:maybe |perhaps "
    r"|possibly |option |也许|可能)?[(\[【*_]*([A-Za-z])(?!\w)",
    re.IGNORECASE,
)


class _Mention(NamedTuple):
    """A letter that counts. `rank`: 1 the answer is, 2 chosen or called right, 3 alone or at the head, 4 others."""

    letter: str
    start: int
    end: int
    rank: int


def letter(text: str) -> str | None:
    """The letter A to Z that an answer chooses; None where it chooses none, or not clearly one."""
    text = text[-TAIL:]
    text = re.sub(r"^\s*A:\s*(?=\(?[A-Za-z]\)?\W*$)", "", first_answer(tidy(text).translate(_CIRCLED)))
    box = last_box(text)
    if box:
        back = last_retraction(text[box.end :])
        if back:
            return _settled(text[box.end + back.end() :])
        return _boxed(box.content) if stands(text, box) else None
    alone = text.strip(" \t\r\n.()[]*_$:\"'“”")
    if len(alone) == 1:
        return alone.upper() if alone.isascii() and alone.isalpha() else None
    back = last_retraction(text)
    if back and _ALONE.search(text[: back.start()]):
        return _settled(text[back.end() :])
    return _settled(text)


def _boxed(inside: str) -> str | None:
    inside = re.sub(r"\\(?:text|mathrm|textbf|mathbf|textsf|boldsymbol)\s*\{([^{}]*)\}", r"\1", inside)
    alone = inside.strip(" \t\r\n.()[]*_$:\"'{}")
    if len(alone) == 1:
        return alone.upper() if alone.isascii() and alone.isalpha() else None
    return _settled(inside)


def _settled(text: str) -> str | None:
    """The letter that the best rank agrees on."""
    found = _mentions(text)
    for rank in (1, 2, 3, 4):
        here = [m for m in found if m.rank == rank]
        if not here:
            continue
        chosen = {m.letter for m in here}
        if len(chosen) == 1:
            return chosen.pop()
        # Several: the last one, where the text says that it concludes.
        return here[-1].letter if rank <= 2 and _concludes(text, here[-1]) else None
    return None


_CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|final|finally|but|however|overall|in conclusion)\b|因此|所以|最终"
    r"|最后|故|综上|但",
    re.IGNORECASE,
)


def _concludes(text: str, mention: _Mention) -> bool:
    before = text[max(0, mention.start - 80) : mention.start]
    return bool(_CONCLUDES.search(re.split(r"[.!?。！？\n]", before)[-1]))


def _mentions(text: str) -> list[_Mention]:
    found = []
    single = _one_list(text)
    for match in list(_ALONE.finditer(text))[-MOST:]:
        start, end = match.span()
        before, after = text[max(0, start - 120) : start], text[end : end + 80]
        if not _is_letter(match[1], before, after, single) or _is_refused(before, after):
            continue
        rank = _rank(before, after, start == len(before), single)
        if rank:
            found.append(_Mention(match[1].upper(), start, end, rank))
            other = _OTHER.match(after)
            if other and _is_pair(other, after):
                found.append(_Mention(other[2].upper(), end + other.start(2), end + other.end(2), rank))
    return found


def _is_pair(other: re.Match, after: str) -> bool:
    """Two letters side by side answer nothing; `B, A is wrong` and `B and A dog` have one."""
    rest = after[other.end() :]
    if _IS_REFUSED.match(rest) or (other[2] == "A" and _NOUN.match(rest)) or other[2].islower():
        return False
    return not other[1] or bool(re.match(r"[)\]】*_]*\s*(?:[.,;，。；]|$|\n|and\b|or\b|和|或)", rest))


def _is_letter(letter: str, before: str, after: str, single: bool) -> bool:
    if single and letter in "AQ" and after[:1] in (":", "：") and not before.rpartition("\n")[2].strip():
        return False  # how answers and questions begin
    if _NOUN.match(after) or _INITIAL.search(before) or re.match(r"\. [A-Z]\. ?\w", after):
        return False
    if letter == "I" and _I_AM.match(after):
        return False
    if letter.islower():
        return bool(_DUE.search(before) and _LOWER_END.match(after))
    return True


def _is_refused(before: str, after: str) -> bool:
    if _REFUSES.search(before) or _IS_REFUSED.match(after) or _SO_IS.search(before):
        return True
    return bool(_DOUBTFUL.search(before))


_LABEL = re.compile(
    r"^[ \t*_(\[-]*([A-Za-z])(?:[.):：、](?![A-Za-z0-9])|[)\]]?[*_]*[ \t]*$)"
    r"|(?<=[\s,;])[(\[]?([A-Za-z])[):：](?=\s)",
    re.MULTILINE,
)


def _one_list(text: str) -> bool:
    """Whether at most one letter stands as a label (`B.`, `(B)`), as in an answer; a list of choices has several."""
    labels = set()
    for match in _LABEL.finditer(text):
        if not _IS_REFUSED.match(text, match.end(1) if match[1] else match.end(2)):
            labels.add(match[1] or match[2])
    return len(labels) <= 1


def _rank(before: str, after: str, first: bool, single: bool) -> int | None:
    if match := _STATES.search(before):
        stated = _ANSWERS.search(match[0])
        return 1 if stated else 2
    if _IS_STATED.match(after):
        return 2
    line = before.rpartition("\n")[2]
    opening = _HEAD.fullmatch(line) is not None
    if opening and single and (not before.strip(" \n*_$\"'([") and first and _HEAD_END.match(after)):
        return 3
    if opening and single and (_LINE_END.match(after) or re.match(r"[*_]*[.)](?!\w)", after)):
        return 3
    if re.search(r"[(\[【]\s*$", before) and re.match(r"\s*[)\]】]", after):
        return 4 if not re.search(r"\w[(\[]$", before) else None
    if _IS.search(before):
        return 4
    # After a word that is no name for things: "vitamin C" and "point B" choose nothing.
    return 4 if re.search(r"(?:^|[,.;:!?，。；：！？\n\u3400-\u9fff])[\s*_\"'“(\[]*$", before) else None
