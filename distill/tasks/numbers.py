r"""Numbers as people and models write them: read exactly, or not at all.

    tidy("１，２３４")                        # "1,234": full-width forms, dashes, odd spaces in one spelling
    items(spelled(r"-\$1,234.50"))          # one Item, its number Fraction(-2469, 2)
    items(spelled("between 3 and 5"))       # two Items without a number: a range states none

An *item* is a place where digits stand. It has a number where the reading is clear, and none where it is not
(`1,5`, `3:4`, `7-3`, `12/05/2024`, `5x`, `2³`, `at least 5`). Labels (`Step 3`, `[1]`, `x_2`, `5th`) are no items.
The rules are those of docs/data.md; values are exact rationals, so that 2000001.00 is not 2000000.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

LONGEST = 300  # digits of a number that is read
MOST = 200  # numbers of one sentence


class Number(NamedTuple):
    """`value` as written, percent sign aside. `places`: digits after the point of a plain decimal, else None.

    `unit`: "%" or "°" where one follows.
    """

    value: Fraction
    places: int | None = None
    unit: str = ""


class Item(NamedTuple):
    """Digits at text[start:end]. `number` None: unclear. `operand`: part of a calculation. `refused`: "not 5"."""

    start: int
    end: int
    number: Number | None
    operand: bool = False
    refused: bool = False


# ---- one spelling of characters ---------------------------------------------------------------------------

_INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff"
_INVISIBLE += "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xFE00, 0xFE10))))
INVISIBLE = dict.fromkeys(map(ord, _INVISIBLE))  # for str.translate
_SPELLING: dict[int, str | None] = {
    **INVISIBLE,
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"), " "),
    **dict.fromkeys(map(ord, "\u2044\u2215"), "/"),
    **dict.fromkeys(map(ord, "’‘＇"), "'"),
    ord("，"): "，",  # a comma of Chinese prose stays one, but for the thousands mark of full-width digits
    ord("：") : ":",
    ord("￥"): "¥",
}  # fmt: skip
_WIDE_THOUSANDS = re.compile("(?<=[０-９])[，,](?=[０-９]{3})")
_FRACTION = "\ue000{}/{}\ue001"  # how a fraction stands in a spelled text; private characters


def tidy(text: str) -> str:
    """The text with one spelling for digits, signs, spaces and punctuation, invisible characters left out."""
    if text.isascii():
        return text
    text = _WIDE_THOUSANDS.sub(",", text.replace("\ue000", " ").replace("\ue001", " ")).translate(_SPELLING)
    return "".join(map(_one_spelling, text)) if not text.isascii() else text


def _one_spelling(c: str) -> str:
    if c < "\u00b2":
        return c
    if c.isdecimal():
        return str(unicodedata.decimal(c))
    if unicodedata.decomposition(c).startswith("<fraction>"):
        part = Fraction(unicodedata.numeric(c)).limit_denominator(10)
        return _FRACTION.format(part.numerator, part.denominator)
    return c


_PLAIN = (
    (re.compile(r"<<[^<>\n]{0,200}>>"), ""),  # the calculator marks of GSM8K
    (re.compile(r"~~[^~\n]{0,200}~~|<(s|del|strike)>[^<\n]{0,200}</\1>"), " "),
    (re.compile(r"</?[a-zA-Z]{1,12}>"), " "),
    (re.compile(r"\*\*(?![0-9])|(?<![0-9)}\]])\*\*|`|(?<!_)__(?!_)"), ""),
    (re.compile(r"(?<![\w*)}\]\\])([*_])(?=[^\s*_])([^*_\n]{1,60})(?<=[^\s*_])\1(?!\w)"), r"\2"),
    (re.compile(r"百分之\s*([0-9][0-9.]*)"), r"\1%"),
    (re.compile(r"(?<![0-9.,/])([0-9]{1,9})\s*分之\s*([0-9]{1,9})(?![0-9.,/])"), "\ue000\\2/\\1\ue001"),
)
_SIGNED_CURRENCY = re.compile(
    r"([-+]?) ?(?:\b(?:US|HK|NT|CA|AU|NZ|SG|[ACSR]))?[$€£¥₹₩₽₪₫₦฿] ?([-+]?)"
    r"|([-+] ?)?\b(?:USD|EUR|GBP|INR|CNY|RMB|JPY|HKD|CAD|AUD|CHF|Rs\.?|Tk\.?) ?(?=-?[0-9.])"
)
_LATEX = (
    (re.compile(r",?(?:\\!)+,?"), lambda m: "," if "," in m[0] else ""),
    (re.compile(r"\\(?:[,;: ]|thinspace\b|enspace\b)|~(?=[0-9])"), " "),
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:quad|qquad|newline|[()\[\]])"), "  "),
    (re.compile(r"\\(?:approx|simeq)(?![a-z])"), "≈"),
    (re.compile(r"\\(?:neq?|not\s*=)(?![a-z])"), "≠"),
    (re.compile(r"\\(?:leq?|leqslant|lt)(?![a-z])"), "≤"),
    (re.compile(r"\\(?:geq?|geqslant|gt)(?![a-z])"), "≥"),
    (re.compile(r"\\(?:times)(?![a-z])"), "×"),
    (re.compile(r"\\(?:cdot)(?![a-z])"), "·"),
    (re.compile(r"\\div(?![a-z])"), "÷"),
    (re.compile(r"\\(?:pm|mp)(?![a-z])"), "±"),
    (re.compile(r"\\(?:ldots|dots|cdots)(?![a-z])"), "…"),
    (re.compile(r"\\(?:implies|Rightarrow|rightarrow|to|therefore)(?![a-z])"), " = "),
    (re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![a-z])|\\textdegree"), "°"),
    (re.compile(r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|textit|emph|bf|bm|boldsymbol|operatorname)"
                r"\s*\{([^{}]*)\}(?:\^\{?[23]\}?)?"), r" \1 "),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
)  # fmt: skip
_PART = r"\s*(?:\{\s*(-?\s*[0-9][0-9,.]{0,80}|-?\s*\.[0-9]{1,80})\s*\}|([0-9]))"
_FRAC = re.compile(r"\\frac" + _PART + _PART)


def spelled(text: str) -> str:
    r"""A tidy text without dress: LaTeX commands, Markdown, currency signs; `\frac12` is one private mark."""
    for pattern, instead in _PLAIN:
        text = pattern.sub(instead, text)
    if "{" in text:
        text = text.replace("{,}", ",").replace("{-}", "-")
    if "\\" in text:
        text = text.replace("\\$", "$").replace("\\%", "%").replace("\\_", "_")
        for pattern, instead in _LATEX:
            text = pattern.sub(instead, text)
        text = _FRAC.sub(_as_fraction, text)
    return _SIGNED_CURRENCY.sub(_sign_alone, text)


def _sign_alone(match: re.Match) -> str:
    sign = (match[1] or "") + (match[2] or "") + (match[3] or "").strip()
    return sign if match[1] or match[3] else " " + sign


def _as_fraction(match: re.Match) -> str:
    top, bottom = (literal((match[i] or match[i + 1]).replace(" ", "").lstrip("-")) for i in (1, 3))
    if top is None or bottom is None or not bottom.value:
        return match[0]
    whole = top.value / bottom.value
    minus = ("-" in (match[1] or "")) != ("-" in (match[3] or ""))
    # The numerator of `\frac{2}{4}` may be larger than the denominator: reduced, but never made mixed.
    return ("-" if minus else "") + _FRACTION.format(whole.numerator, whole.denominator)


# ---- one literal ------------------------------------------------------------------------------------------

_GROUPED = re.compile(r"[1-9][0-9]{0,2}(?:([,'_ ])[0-9]{3})(?:\1[0-9]{3})*(\.[0-9]+)?")
_INDIAN = re.compile(r"[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(\.[0-9]+)?")
_SIMPLE = re.compile(r"[0-9]*(?:\.([0-9]+))?|[0-9]+\.")


def literal(digits: str) -> Number | None:
    """The unsigned number that such characters are by one reading alone; None for `1,5`, `1.2.3`, `1,2345`."""
    if len(digits) > LONGEST:
        return None
    if match := _SIMPLE.fullmatch(digits):
        return Number(Fraction(digits), len(match[1])) if match[1] else Number(Fraction(digits))
    if match := _GROUPED.fullmatch(digits):
        places = len(match[2]) - 1 if match[2] else None
    elif match := _INDIAN.fullmatch(digits):
        places = len(match[1]) - 1 if match[1] else None
    else:
        return None
    return Number(Fraction(re.sub(r"[,'_ ]", "", digits)), places)


# ---- numbers in a text ------------------------------------------------------------------------------------

_BODY = re.compile(
    r"(?P<spaced>(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3})+(?:\.[0-9]+)?(?![0-9])(?![.,'][0-9])(?! ?[0-9/]))"
    r"|(?P<digits>(?:[0-9]+|(?<![.0-9])\.[0-9]+)(?:[.,'_][0-9]+)*)"
    r"|(?P<fraction>\ue000([0-9]+)/([0-9]+)\ue001)"
    r"|(?P<other>\\(?:frac|sqrt|binom|pi|infty|overline|dot)(?![a-z])|[√π∞¼-¾⅐-⅞↉])"
)
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_POWER = (
    r"(?:(?:\^|\*\*)\s?\{?\s?([-+]?)\s?([0-9]{1,3})(?:\s?\})?|([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3}))(?![0-9⁰¹²³⁴⁵⁶⁷⁸⁹])"
)
_TEN_TO = re.compile(_POWER)
_TIMES_TEN = re.compile(r"\s{0,2}[×*x·X]\s{0,2}10" + _POWER)
_E_NOTATION = re.compile(r"[eE]([-+]?[0-9]{1,3})(?![0-9A-Za-z]|\.[0-9])")
_OVER = re.compile(r" ?/ ?([0-9]+(?:\.[0-9]+)?)(?![0-9/:]|[.,][0-9])")
_MIXED = re.compile(
    r" ?又? ?\ue000([0-9]+)/([0-9]+)\ue001|(?: ?又 ?| )([0-9]{1,9}) ?/ ?([0-9]{1,9})(?![0-9/:]|[.,][0-9])"
)
_MAGNITUDE = re.compile(
    r"(?: {0,3}|-)(hundred|thousand|million|billion|trillion|lakh|crore)s?(?![A-Za-z])"
    r"| ?(百(?!分)|千(?![克米瓦卡赫])|万|萬|亿|億)",
    re.IGNORECASE,
)
_TIMES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5,
    "crore": 10**7, "百": 10**2, "千": 10**3, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
_UNIT = re.compile(
    r" {0,2}(%|°(?:[CFK](?![A-Za-z]))?)| {1,2}(?:(percent(?:age)?|per cent|pct)(?![a-zA-Z]))"
    r"|\s?(个?百分点)",
    re.IGNORECASE,
)


def items(text: str, start: int = 0, end: int | None = None) -> list[Item]:
    """Everywhere that digits stand in text[start:end] of a spelled text, labels aside, in order.

    More than MOST of them state nothing: all are unclear then.
    """
    found: list[Item] = []
    at = start
    for body in _BODY.finditer(text, start, len(text) if end is None else end):
        if body.start() < at:  # inside what the last one took: the denominator, the exponent
            continue
        number, at = _read(text, body)
        before, after = text[max(0, body.start() - 60) : body.start()], text[at : at + 60]
        item = _in_context(Item(body.start(), at, number), before, after, body)
        if item is not None:
            found.append(item)
        if len(found) > MOST:
            return [i._replace(number=None) for i in found]
    return _joined(text, found)


def _read(text: str, body: re.Match) -> tuple[Number | None, int]:
    """(the unsigned number that begins here, where it ends)."""
    end = body.end()
    if body["other"]:
        return None, end
    if body["fraction"]:
        number: Number | None = Number(Fraction(int(body[4]), int(body[5]))) if body[5].strip("0") else None
        return _with_unit(text, number, end)
    digits = body[0]
    number = literal(digits)
    if number is None:
        return None, end
    if (power := _TEN_TO.match(text, end)) and digits == "10":
        return _with_unit(text, Number(_ten_to(power)), power.end())
    if power := _TIMES_TEN.match(text, end):
        return _with_unit(text, Number(number.value * _ten_to(power)), power.end())
    if power := _E_NOTATION.match(text, end):
        return _with_unit(text, Number(number.value * Fraction(10) ** int(power[1])), power.end())
    if (part := _MIXED.match(text, end)) and number.value.denominator == 1 and number.places is None:
        top, bottom = (int(part[1]), int(part[2])) if part[1] else (int(part[3]), int(part[4]))
        proper = 0 < top < bottom
        return _with_unit(text, Number(number.value + Fraction(top, bottom)) if proper else None, part.end())
    if over := _OVER.match(text, end):
        below = literal(over[1])
        whole = below is not None and below.value and len(over[1]) <= LONGEST
        return _with_unit(text, Number(number.value / below.value) if whole else None, over.end())
    times = 1
    while word := _MAGNITUDE.match(text, end):
        times *= _TIMES[(word[1] or word[2]).lower()]
        end = word.end()
        number = number._replace(value=number.value * _TIMES[(word[1] or word[2]).lower()], places=None)
        if times > 10**18:
            return None, end
    return _with_unit(text, number, end)


def _ten_to(power: re.Match) -> Fraction:
    sign, digits, high = power.groups()[-3:]
    return Fraction(10) ** int(high.translate(_SUPER) if high else sign + digits)


def _with_unit(text: str, number: Number | None, end: int) -> tuple[Number | None, int]:
    if unit := _UNIT.match(text, end):
        return number and number._replace(unit="°" if (unit[1] or "").startswith("°") else "%"), unit.end()
    return number, end


# ---- what stands beside a number --------------------------------------------------------------------------

_CJK = "\u3040-\u30ff\u3400-\u9fff"
_LABEL = re.compile(
    r"(?:\b(?:step|part|case|stage|phase|method|approach|option|question|problem|example|figure|fig\."
    r"|table|equation"
    r"|eq\.|page|chapter|section|line|row|no\.|number|rule|lemma|theorem|exercise|version|day|week"
    r"|level|footnote"
    r"|item|round|note|appendix)\s*|[#@№第]\s?|\[\^?)\(?$",
    re.IGNORECASE,
)  # fmt: skip
_MONTH = (
    r"\b(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?"
    r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_MONTH_BEFORE, _MONTH_AFTER = re.compile(_MONTH + r"\s*$"), re.compile(r"\s+(?:of )?" + _MONTH)
_BOUND = re.compile(
    r"(?:[<>≤≥±]=?|\b(?:at (?:least|most)|(?:more|less|fewer|greater|larger|smaller|higher|lower|bigger) than"
    r"(?: or equal to)?|up to|under|above|below|over|past|exceed(?:s|ing)?|between|from|nearly|almost"
    r"|minimum of"
    r"|maximum of|within|mod(?:ulo)?|half(?: of)?|per|times|twice|double|triple|thrice"
    r"|(?:square|cube|root|sum|product|difference|factorial|multiples?|third|quarter) of)"
    r"|(?:至少|至多|最多|最少|超过|大于|小于|不到|不足|多于|少于|低于|高于|将近|介于)(?:需要|需|要|有"
    r"|为|是|得)?"
    r"|除以|加上|减去|乘以|分之|[加减乘半])\s*[-(]*$",
    re.IGNORECASE,
)  # fmt: skip
_LINK = (
    r"(?:(?:think|believe|say|suppose|that|to|be|been|equal|equals|it|it's|is|are|was|the|an?|final|correct"
    r"|right|answer|result|sum|total|value|exactly|just|simply|only|as|much|many|actually|really|=|,)[ \t]+)*"
)
REFUSING = (
    r"(?:(?:\bnot\b|n't\b|n’t\b|\bnever\b|\bcannot\b|\bnor\b|\bneither\b|\bdoubt\b|\bunlikely\b)\s*" + _LINK
    + r"|≠\s*|!=\s*|\b(?:rather than|instead of|except|excluding|as opposed to|unlike|other than"
    r"|besides|apart from"
    r"|(?:anything|everything|all|any) but|no)\s+"
    r"|(?:不是|并不是|并非|而非|不等于|不为|不应该是|不可能是|不会是|不应是|绝非)\s*)"
)  # fmt: skip
_REFUSED_BEFORE = re.compile(REFUSING + r"[-+(\s]*$", re.IGNORECASE)
REFUSED = (
    r"\s*(?:(?:is|are|was|were|seems?|looks?|would be|must be)\s+(?:clearly |obviously |also "
    r"|definitely |certainly )?"
    r"(?:not\b|wrong|incorrect|false|too\b|impossible|invalid|unlikely|ruled out)"
    r"|(?:isn't|aren't|wasn't|cannot|can't|couldn't|doesn't|don't|won't|wouldn't|(?:does|do|did|will"
    r"|would|can|could) not)\b"
    r"|(?:这个)?(?:答案)?(?:明显|显然|肯定)?(?:是)?(?:不对|不正确|错误|错的|有误|不是(?![\s(]*[A-Z0-9])|错了))"
)  # fmt: skip
_REFUSED_AFTER = re.compile(
    r"[)\s]*(?:(?:as |is )?the answer )?"
    + REFUSED
    + r"|\s*[?？]|\s*\((?:incorrect|wrong|not (?:right|correct|the))",
    re.IGNORECASE,
)
_KNOWN_UNIT = re.compile(
    r"(?:km/h|m/s|km|cm|mm|kg|mg|lbs?|oz|ft|mph|mL|ml|hrs?|mins?|secs?|kWh|GB|MB|USD|EUR|RMB|g|L|h|yd)"
    r"(?:[²³]|\^\{?[23]\}?)?(?![A-Za-z0-9²³^])"
)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![A-Za-z])")
_COMPOUND = re.compile(r"-[A-Za-z]")
# Words after a number that make it another one, or none that is clear.
_CHANGED = re.compile(
    r"\s*(?:and (?:a |an |one[ -])?(?:half|quarter|third)|half|halves|thirds?|quarters?|fourths|fifths"
    r"|sixths|sevenths"
    r"|eighths|ninths|tenths|hundredths|thousandths|squared|cubed|factorial|to the power|dozens?|score|gross"
    r"|[ap]\.?m\b|o'?clock|of \(?[-0-9\ue000]|of the|out of|in (?:every )?[-0-9]|per (?:cent )?[0-9]"
    r"|plus|minus|divided by"
    r"|multiplied by|times (?:[-0-9(]|as|the|more|less|larger)|or (?:more|less|fewer|higher|above|below"
    r"|greater)"
    r"|and (?:above|below|over|more|up)|to (?:the )?[-0-9]|through [0-9]|\\?pi\b|mod"
    r"|(?:degrees? )?below|bn\b|mn\b|mil\b"
    r"|bps\b|basis points?|(?:less|more|fewer|greater) than)"
    r"|\s?(?:[‰折点兆十几]|个多|成(?![" + _CJK + r"])|[度个人天元]?以[上下]|多(?=[个人元万千百年天]|$)|分之|[点时]半)",
    re.IGNORECASE,
)  # fmt: skip
# `5 k`, `5 M`, and a letter that may be a variable (`5 x`, `5 i`); metres, grams, seconds, litres, hours are units.
_CHANGED_CASE = re.compile(r" ?[KMBT](?![A-Za-z0-9'])| {1,2}[b-fi-kn-rt-z](?![A-Za-z0-9'.])")
_NEGATIVE = re.compile(r"(?:\b(?:minus|negative)\s*|负的?\s*|零下\s*)$", re.IGNORECASE)
_SIGN_OF = re.compile(
    r"(?:^|[=≈:：(\[{,，。;；>]|\b(?:is|are|was|were|be|equals?|to|equal to|and|or)|[是为為得])\s*$",
    re.IGNORECASE,
)


# A function, a root, a power or a bracket before a number: `f(5)`, `\\log 5`, `x^{5}`, `-(5)`, `\\{5`, `[5`, `|5`.
_APPLIED = re.compile(
    r"[-+⁻₋]\s*[({]*\s*$|[a-zA-Z]\($|\\[a-zA-Z]+\s*[({]*\s*$|[√^|⌊⌈∈]\s*[({]*\s*$|\[\s*$|\\\{\s*$|\w\{\s*$"
    r"|\b(?:log|ln|lg|sin|cos|tan|sqrt|exp|max|min|gcd|lcm)[_0-9{}^ ]*\(?$"
)


def _in_context(item: Item, before: str, after: str, body: re.Match) -> Item | None:
    """The item with its sign, or unclear, or refused, by the text around it; None for a label."""
    number = item.number
    sign, lead, clear, operand = _signed(before, body.start() <= len(before))
    if _labelled(lead, after, body):
        return None
    clear = clear and _clear_after(after)
    ahead = after.lstrip(" ")
    if re.match(r"[+*×·÷∗/^]|\*\*|\\(?:sqrt|pi)|\(|-\s?[0-9(\\\ue000]|- ?[a-zA-Z](?![a-zA-Z])", ahead):
        # `5 (five)` and `5 (units)` are no products; `5(3)` is.
        operand = (
            operand
            or not ahead.startswith("(")
            or bool(re.match(r"\((?:[-0-9(\\]|[a-zA-Z](?![a-zA-Z]))", after))
        )
        if ahead[:1] == "/" and re.match(r"/ ?(?:[A-Za-z]{2,}|[" + _CJK + "])", ahead):
            operand = False
    if re.search(r"(?:[+*×·÷/]|\*\*)\s*[(\[{]*$", lead):
        operand = True
    if _BOUND.search(lead) or _MONTH_BEFORE.search(lead) or _MONTH_AFTER.match(after):
        clear = False
    if _APPLIED.search(lead) or (lead and unicodedata.category(lead[-1]) in ("Pd", "Sk", "So", "No")):
        clear = False
    refused = bool(_REFUSED_BEFORE.search(lead) or _REFUSED_AFTER.match(after))
    if number is not None and sign:
        number = number._replace(value=-number.value)
    return Item(item.start, item.end, number if clear else None, operand, refused)


def _signed(before: str, whole: bool) -> tuple[bool, str, bool, bool]:
    """(minus?, the text before the sign, clear?, operand?). `whole`: nothing stands before `before`."""
    if match := _NEGATIVE.search(before):
        lead = before[: match.start()]
        taken = bool(re.search(r"[0-9)\ue001]\s*$", lead))
        return True, lead, not taken, taken
    stripped = before.rstrip(" ")
    if not stripped.endswith(("-", "+", "—", "―")):
        return False, before, True, False
    glued, mark, lead = stripped == before, stripped[-1], stripped[:-1]
    if mark in "—―":
        return False, lead, not glued or (bool(re.search(r"[^\s]$", lead)) and not lead[-1:].isdigit()), False
    inner = lead.rstrip(" ")
    if inner.endswith(("-", "+", "—")):
        return False, inner, False, False
    if re.search(r"[0-9)\]}!%°²³'\ue001]$", inner):
        # `7-3`, `7 - 3`; but "5 -3" has two numbers, neither of which is a result.
        return mark == "-", lead, False, True
    if inner == lead and re.search(r"[^\W\u3040-\u30ff\u3400-\u9fff]$", inner):  # `B-12`, `x-5`
        return mark == "-", lead, False, True
    if re.search(r"(?:^|[^A-Za-z])[A-Za-z]$", inner):  # `x - 5`
        return mark == "-", lead, False, True
    if mark == "+":
        return False, lead, True, False
    if glued:
        return True, lead, True, False
    # `- 5`: a sign where a value is due, a bullet or a dash elsewhere.
    start = not inner.strip() and whole and "\n" not in inner
    return True, lead, start or bool(_SIGN_OF.search(inner) and inner.strip()), False


def _labelled(lead: str, after: str, body: re.Match) -> bool:
    """A name rather than a quantity: `Step 3`, `[1]`, `x_2`, `x5`, `5th`, `5-year-old`, `3. First`."""
    if body["other"]:
        return False
    if _LABEL.search(lead) and not (lead.endswith("[") and not after.startswith("]")):
        return not re.search(r"\bnumber\s*$", lead, re.I) or after.startswith((".", ":", ")"))
    if lead[-1:] == "_" or (lead[-1:].isascii() and lead[-1:].isalpha()) or lead.endswith("_{"):
        return True
    if _ORDINAL.match(after) or _COMPOUND.match(after):
        return True
    line = not lead.strip(" *_#>\t") or re.search(r"\n[ \t>*_#]*$", lead)
    small = len(body[0]) <= 2 and body[0].isdigit() and int(body[0]) <= 20
    return bool(line and small and re.match(r"(?:[.)]|\\\.)[*_]*\s+(?=\S)", after))


def _clear_after(after: str) -> bool:
    head = after[:1]
    if not head or head == "\n":
        return True
    if _CHANGED.match(after) or _CHANGED_CASE.match(after):
        return False
    if head.isascii() and head.isalpha():
        return bool(_KNOWN_UNIT.match(after))
    if unicodedata.combining(head):
        return False
    if head in "²³⁰¹⁴⁵⁶⁷⁸⁹⁺⁻^√π!_'\"′″…\\" or (head.isalpha() and not re.match(f"[{_CJK}]", head)):
        return bool(re.match(r"[\"'](?=[\s.,;)]|$)", after)) or after.startswith(
            ("\\)", "\\]", "\\n", "!=", "\\\\")
        )
    if after.startswith("...") or re.match(r"\s?[:~—/]\s?-?[0-9]|\s?[…|]|/[0-9]", after):
        return False
    return not re.match(r"[.,:\-_][0-9]|\s*\\(?!\\|\)|\]|n)[a-zA-Z]|\s*[\]}]?\s?-[0-9]", after)


# ---- numbers beside each other ----------------------------------------------------------------------------

_STOP = (
    r"(?!(?:is|are|was|were|in|for|with|at|by|per|because|since|so|from|than|if|when|equals?|gives?"
    r"|makes?|after|before"
    r"|as|on|which|where|that|but|then|into|have|has|had|not|times|plus|minus)\b)"
)
_JOINS = re.compile(
    r"[\s$)\\]*(?:[,;]|\b(?:and|or)\b|和|或)[\s$(\\]*[A-Za-z](?:_\{?\w+\}?)?\s*=[\s$(-]*|"
    r"\s*(?:[,;&/~:—]|,?\s*(?:and|or|to|through|until|versus|vs\.?)\b|[、和或与及至到]|或者|以及"
    r"|，)\s*[-(]*\s*|\s*"
    r"|\s*" + _STOP + r"[A-Za-z°'\"]{1,12}\.?,?\s+(?:and\s+)?-?"
    r"|\s*(?:(?![是为為得等有共剩总约])[\u4e00-\u9fff]){1,3}"
)  # fmt: skip


def _joined(text: str, found: list[Item]) -> list[Item]:
    """Numbers joined with each other state none: lists, ranges, dates, `5 feet 3 inches`, `3 and 4`."""
    joined = set()
    for i, (one, other) in enumerate(pairwise(found)):
        gap = text[one.end : other.start]
        if (
            len(gap) < 24
            and "\n" not in gap
            and _JOINS.fullmatch(gap)
            and not one.refused
            and not other.refused
        ):
            joined |= {i, i + 1}
    return [item._replace(number=None) if i in joined else item for i, item in enumerate(found)]
