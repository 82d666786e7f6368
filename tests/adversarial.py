"""Answers with known truth, made to mislead: spelled from a value outwards, with nothing taken from the verifiers.

    for case in cases(seed=0, n=1000): judge(case.verifier, case.text, case.reference)   # correct iff case.right

A case is a right answer in a plain form (it must be correct), or one whose reference is something that the answer
does not state: a distractor, a number that was taken back, a part of the number, another sign or unit (it must not).

    python tests/adversarial.py 100000 [SEED]     # the recorded run: counts of false accepts and misses by verifier
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

Rng = random.Random


class Case(NamedTuple):
    verifier: str
    text: str
    reference: str
    right: bool
    form: str


def cases(
    seed: int, n: int, verifiers: tuple[str, ...] = ("numeric", "choice", "exact", "math", "regex")
) -> Iterator[Case]:
    """n cases, the verifiers in turn: every fourth numeric, and so on, so that any n has all of them."""
    rng = Rng(seed)
    turns = [
        v
        for v in verifiers
        for _ in range({"numeric": 10, "choice": 6, "exact": 2, "math": 2, "regex": 1}[v])
    ]
    for i in range(n):
        yield _MAKERS[turns[i % len(turns)]](rng)


# ---- numeric ----------------------------------------------------------------------------------------------


def value(rng: Rng) -> Fraction:
    kind = rng.randrange(7)
    if kind == 0:
        return Fraction(rng.randrange(2, 30))
    if kind <= 2:
        return Fraction(rng.randrange(30, 1000))
    if kind == 3:
        return Fraction(rng.randrange(1000, 10 ** rng.randrange(4, 10)))
    if kind == 4:
        return Fraction(rng.randrange(1, 10**5), 10 ** rng.randrange(1, 4))
    if kind == 5:
        return Fraction(rng.randrange(1, 12), rng.randrange(2, 13))
    return -Fraction(rng.randrange(2, 5000))


def decimal(v: Fraction) -> str | None:
    for places in range(7):
        if (v * 10**places).denominator == 1:
            digits = str(abs(v) * 10**places).zfill(places + 1)
            return ("-" if v < 0 else "") + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
    return None


def grouped(digits: str, mark: str, indian: bool = False) -> str:
    whole, point, rest = digits.partition(".")
    groups = [whole[-3:]]
    whole, size = whole[:-3], 2 if indian else 3
    while whole:
        groups.insert(0, whole[-size:])
        whole = whole[:-size]
    return mark.join(groups) + point + rest


def wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if c in "0123456789.,-" else c for c in text)


def unsigned(rng: Rng, v: Fraction) -> str:
    """A clear spelling of v > 0."""
    plain = decimal(v)
    if plain is None:
        a, b = v.numerator, v.denominator
        forms = [
            f"{a}/{b}",
            f"\\frac{{{a}}}{{{b}}}",
            f"\\dfrac{{{a}}}{{{b}}}",
            f"\\tfrac{{{a}}}{{{b}}}",
            f"{a} / {b}",
        ]
        if a > b:
            w, r = divmod(a, b)
            forms += [f"{w} {r}/{b}", f"{w}\\frac{{{r}}}{{{b}}}", f"{w} \\frac{{{r}}}{{{b}}}"]
        elif a < 10 and b < 10:
            forms.append(f"\\frac{a}{b}" if b < 10 else forms[0])
        return rng.choice(forms)
    if v >= 1000:
        marks = [",", ",", ",", "{,}", ",\\!", "\\,", "\u202f", "\u2009", "\u00a0", "'", "_", " "]
        forms = [plain, grouped(plain, rng.choice(marks)), wide(grouped(plain, ",")), wide(plain)]
        if v >= 100000:
            forms.append(grouped(plain, ",", indian=True))
        if v % 1000 == 0 and v.denominator == 1:
            forms += [f"{v // 1000} thousand"]
        if v.denominator == 1:
            forms += [plain + ".00", plain + ".0"]
            mantissa = str(int(v))
            forms += [
                f"{mantissa[0]}.{mantissa[1:]} \\times 10^{{{len(mantissa) - 1}}}",
                f"{mantissa[0]}.{mantissa[1:]}e{len(mantissa) - 1}",
                f"{mantissa[0]}.{mantissa[1:]} × 10^{len(mantissa) - 1}",
            ]
        return rng.choice(forms)
    return rng.choice([plain, plain, plain, wide(plain), plain + ("0" if "." in plain else ".0")])


def spell(rng: Rng, v: Fraction, currency: bool = True) -> str:
    minus = rng.choice(["-", "-", "\u2212", "–", "－"]) if v < 0 else ""
    body = unsigned(rng, abs(v))
    money = (
        rng.choice(["$", "\\$", "€", "£"]) if currency and "\\" not in body and rng.random() < 0.15 else ""
    )
    return f"{money}{minus}{body}" if money and rng.random() < 0.2 else f"{minus}{money}{body}"


def near(rng: Rng, v: Fraction) -> Fraction:
    """Another value that a careless reader could take for v."""
    plain = decimal(abs(v)) or f"{v.numerator}"
    digits = plain.replace(".", "")
    options = [
        -v,
        v + 1,
        v - 1,
        v + Fraction(1, 100),
        v * 10,
        v / 10,
        v * 1000,
        v / 100,
        Fraction(v.numerator),
        v * 1000000,
        Fraction(v.denominator),
        Fraction(int(digits)),
        Fraction(int(v)),
        v + Fraction(1, 10**7),
        1 / v if v else v,
        Fraction(int(digits[-3:])),
        Fraction(int(digits[:1])),
        Fraction(int(digits[1:] or "7")),
        v + 1000,
    ]
    options = [o for o in options if o != v]
    return rng.choice(options)


def reference(rng: Rng, v: Fraction) -> str:
    plain = decimal(v)
    if plain is None:
        return rng.choice(
            [
                f"{v.numerator}/{v.denominator}",
                ("-" if v < 0 else "") + f"\\frac{{{abs(v.numerator)}}}{{{v.denominator}}}",
            ]
        )
    return plain


OBJECTS = ["apples", "clips", "dollars", "students", "km", "minutes", "marbles", "kg", "tickets"]
UNITS = ["", "", "", " apples", " dollars", " km", " kg", "\\text{ cm}", " minutes", "%", "°"]
OBJECTS_ZH = ["个", "元", "公里", "天", "人"]

# {v} the truth, {d}, {e} distractors, {o} objects. What is stated is v, and nothing else.
STATED = [
    "{v}",
    "**{v}**",
    "${v}$",
    "#### {v}",
    "#### {v}{u}",
    "####{v}",
    "\\boxed{{{v}}}",
    "$\\boxed{{{v}}}$",
    "The answer is {v}.",
    "The answer is {v}{u}.",
    "Answer: {v}",
    "**Answer:** {v}",
    "**Final Answer:** {v}{u}",
    "**Final Answer**\n\n{v}",
    "Final answer: {v}",
    "The final answer is: $\\boxed{{{v}}}$. I hope it is correct.",
    "So the answer is {v}{u}.",
    "Therefore, the answer is **{v}**.",
    "答案是{v}。",
    "答案：{v}",
    "最终答案是 {v}。",
    "所以答案为{v}。",
    "So it is {v}.",
    "The total is {v}{u}.",
    "It equals {v}.",
    "x = {v}",
    "Thus $x = {v}$.",
    "\\[ \\boxed{{{v}}} \\]",
    "<answer>{v}</answer>",
    "The result is \\({v}\\).",
    "She has {v} {o}.",
    "一共是{v}",
    "\\boxed{{{v}\\text{{ cm}}}}",
    "Answer: {v} {o}",
    "answer is {v}",
    "The correct answer is: {v}",
    "I think it is {v}.",
]
BEFORE = [
    "",
    "",
    "",
    "First, {d} + {e} = {f}. ",
    "There are {d} boxes of {e} {o}.\n",
    "Step 1: take {d}.\nStep 2: add {e}.\n",
    "Let x = {d}. Then x > {e}. ",
    "1. We have {d} {o}.\n2. We buy {e} more.\n\n",
    "If the answer were {d}, we would be done. ",
    "It is not {d}. ",
    "My first guess was {d}, and it was wrong.\n",
    "小明有{d}个苹果，又买了{e}个。",
    "In {d} days she walks {e} km. ",
    "The wrong answer is {d}.\n",
    "### Step {d}\nAdd {e}.\n\n",
    "#### Step 3\nAdd {d} and {e}.\n\n",
    "#### 2. Compute the sum of {d} and {e}\n\n",
    "<think>Is it {d}? No, {e}.</think>",
    "Between {d} and {e}, we look further.\n",
    "\\(a_{d} = {e}\\).\n",
]
# After a marked result.
AFTER = [
    "",
    "",
    "",
    " It took {d} steps.",
    "\n\nCheck: {d} + {e} = {f}.",
    " (That is more than {d}.)",
    "\nNote: {d} of the {e} {o} are red.",
    " This holds for all {d} cases.",
    " It is not {d}.",
    "\n\nQuestion: How many {o} in {d} boxes of {e}?\nAnswer: {d}",
    "\n\nQ: What is {d} + {e}?\nA: {f}",
    "\n\n问题：{d}加{e}是多少？\n答案：{f}",
    "，因为{d}太大。",
]
MARKED = ("####", "boxed", "nswer", "答案")
# Nothing is stated clearly: no reference is right, v and d least of all.
UNCLEAR = [
    "The answer is between {v} and {d}.",
    "The answer is {v} or {d}.",
    "Answer: {v}, {d}",
    "Answer: {v}:{d}",
    "The answer is {v} to {d}.",
    "\\boxed{{{v}, {d}}}",
    "\\boxed{{({v}, {d})}}",
    "\\boxed{{[{v}, {d}]}}",
    "\\boxed{{{v}x}}",
    "\\boxed{{{v} + x}}",
    "\\boxed{{{v}^2}}",
    "\\boxed{{{v}\\pi}}",
    "\\boxed{{{v}\\sqrt{{{d}}}}}",
    "\\boxed{{\\sqrt{{{v}}}}}",
    "\\boxed{{x > {v}}}",
    "\\boxed{{\\ge {v}}}",
    "The answer is at least {v}.",
    "The answer is not {v}.",
    "The answer isn't {v}.",
    "答案不是{v}。",
    "Answer: more than {v}",
    "The answer is less than {v}.",
    "Is it {v}?",
    "\\boxed{{{v}!}}",
    "{v}²",
    "{v}³",
    "\\boxed{{{v} = {d}}}",
    "{v} ± {d}",
    "x_{v}",
    "Step {v}",
    "{v} - {d}",
    "{v}-{d}",
    "Answer: {v} + {d}",
    "{v} is wrong.",
    "It can't be {v}.",
    "至少{v}",
    "大于{v}",
    "{v}不对",
    "\\boxed{{[{v}]}}",
    "\\boxed{{\\{{{v}\\}}}}",
    "Answer: {v} dozen",
    "3 friends share {v} {o} in {d} days.",
    "If the answer were {v}, we would be done.",
    "Answer: {v}. Wait, that is wrong.",
    "\\boxed{{{v}}}. Actually, this is wrong.",
    "答案是{v}。不对，重新算。",
    "#### {v}\nWait, that is not right.",
    "Some say the answer is {v}.",
    "The wrong answer is {v}.",
    "Answer: {v} feet {d} inches",
    "Answer: {v} hours and {d} minutes",
    "Answer: {v}k",
    "{v} out of {d}",
    "Answer: {v} of {d}",
    "\\boxed{{{v}_2}}",
    "May {v}",
    "{v}th",
    "#{v}",
    "\\boxed{{|{v}|}}",
    "\\boxed{{f({v})}}",
    "\\boxed{{\\log {v}}}",
    "\\boxed{{{v} \\cdot {d}}}",
    "\\boxed{{{v} \\pmod{{{d}}}}}",
    "Answer: {v}/{d}/{e}",
    "Answer: {v}~{d}",
]
# Said, then taken back: v counts.
BACK = [
    "Answer: {d}. Wait, {v}.",
    "The answer is {d}. Actually, it is {v}.",
    "The answer is {d}. No, the answer is {v}.",
    "\\boxed{{{d}}}. Wait, that is wrong: \\boxed{{{v}}}.",
    "答案是{d}。不对，是{v}。",
    "#### {d}\nWait, I made a mistake.\n#### {v}",
    "So it is {d}. Sorry, {v}.",
    "It is {d}. Hmm, no: it is {v}.",
    "The answer is {d}. Correction: the answer is {v}.",
    "答案是{d}。更正：答案是{v}。",
    "The answer is not {d} but {v}.",
    "It is {v}, not {d}.",
    "The answer is {v} rather than {d}.",
    "答案不是{d}，而是{v}。",
    "答案是{v}，而不是{d}。",
    "The answer is {v} instead of {d}.",
]


def numeric(rng: Rng) -> Case:
    v = value(rng)
    d, e = (rng.choice([Fraction(rng.randrange(2, 2000)), abs(near(rng, v))]) for _ in range(2))
    d = d if d != abs(v) else d + 1
    e = e if e != abs(v) else e + 1
    simple = all(decimal(x) for x in (d, e))
    d, e = (
        (d, e)
        if simple
        else (Fraction(37) if abs(v) != 37 else Fraction(38), Fraction(11) if abs(v) != 11 else Fraction(12))
    )
    form = rng.choice(["stated"] * 6 + ["unclear", "unclear", "unclear", "back", "parts"])
    units = UNITS if abs(v) >= 1 else [u for u in UNITS if u != "%"]  # 0.5 % or 0.5: unclear by the rule
    words = {
        "d": decimal(d),
        "e": decimal(e),
        "f": decimal(d + e),
        "o": rng.choice(OBJECTS),
        "u": rng.choice(units),
    }
    if form == "parts":
        return _parts(rng)
    if form == "unclear":
        template = rng.choice(UNCLEAR)
        glued = any(
            s in template for s in ("}k", "x_", "Step", "#{", "th", "²", "³", "-{", "/{", "}_2", "May", "~")
        )
        text = template.format(v=decimal(abs(v)) or "17" if glued else spell(rng, abs(v), False), **words)
        wanted = (
            rng.choice([v, abs(v), -v, d, d, near(rng, v)])
            if not glued
            else rng.choice([Fraction(decimal(abs(v)) or 17), d])
        )
        # A box with a ratio or range is a fraction or a number to nobody; but a reference may be what it comes to.
        return Case("numeric", text, reference(rng, wanted), False, template)
    if form == "back":
        template = rng.choice(BACK)
        text = template.format(v=spell(rng, v), **words)
        right = rng.random() < 0.5
        return Case("numeric", text, reference(rng, v if right else d), right, template)
    template = rng.choice(STATED)
    before = rng.choice(BEFORE)
    marked = any(mark in template for mark in MARKED) and "**Final Answer**" not in template
    after = rng.choice(AFTER) if marked and not template.startswith("**Answer") else ""
    if template in ("{v}", "**{v}**", "${v}$") and before and not before.endswith("\n"):
        before = ""
    if (template.startswith("####") or "**Final" in template) and before and not before.endswith("\n"):
        before += "\n"
    text = (before + template + after).format(v=spell(rng, v, "$" not in template), **words)
    right = rng.random() < 0.5
    if right:
        return Case("numeric", text, reference(rng, v), True, before + template + after)
    used = before + after
    others = [Fraction(words[k]) for k in "def" if "{" + k + "}" in used] + [near(rng, v), near(rng, v)]
    percent = "%" in text  # the unit of what is stated; below 1 % it is unclear and right for nobody
    wanted = rng.choice([o for o in others if o != v] or [v + 1])
    return Case(
        "numeric", text, reference(rng, wanted), False, before + template + after + (" %" if percent else "")
    )


def _parts(rng: Rng) -> Case:
    """Literals with one known reading, or none, against what a part of them would be."""
    a, b, c = rng.randrange(1, 999), rng.randrange(100, 999), rng.randrange(100, 999)
    x, y = rng.randrange(2, 9), rng.randrange(2, 9)
    text, wrong = rng.choice(
        [
            (f"{a},\\!{b}", [a, b]),
            (f"{a},{b},{c}", [a, b, c, int(f"{b}{c}")]),
            (f"{a} {b} {c}", [a, b, c, int(f"{b}{c}")]),
            (f"{a},{x}", [a, x, Fraction(f"{a}.{x}"), int(f"{a}{x}")]),
            (f"{a}.{b}.{c}", [a, b, c, Fraction(f"{a}.{b}"), int(f"{a}{b}{c}")]),
            (f"{x}³", [x, int(f"{x}3"), 3]),
            (f"{x}½", [x, Fraction(1, 2), Fraction(x, 2), int(f"{x}1")]),
            (f"{a} {x}/{x + y}", [a, Fraction(x, x + y), x + y, x]),
            (f"\\frac{x}{y}", [int(f"{x}{y}"), x + y, 10 * x]),
            (f"{a} million", [a]),
            (f"{a}万", [a]),
            (f"{a}k", [a, 1000 * a]),
            (f"{a}m", [a]),
            (f"{a}M", [a, a * 10**6]),
            (f"{a}%", [Fraction(a, 100)]),
            (f"-{a}", [a]),
            (f"–{a}", [a]),
            (f"− {a}", [a]),
            (f"minus {a}", [a]),
            (f"negative {a}", [a]),
            (f"负{a}", [a]),
            (f"-${a}", [a]),
            (f"-US${a}", [a]),
            (f"{a}×10^{x}", [a, 10, x]),
            (f"{a}.{b}e{x}", [x, Fraction(f"{a}.{b}")]),
            (f"{a}-{b}", [a, b, -b, a - b]),
            (f"{a}–{b}", [a, b, -b]),
            (f"{a}:{b}", [a, b, Fraction(a, b)]),
            (f"20{b % 90 + 10}-0{x}-1{y}", [x, int(f"1{y}"), -x, -int(f"1{y}")]),
            (f"{x}/{y}/20{b % 90 + 10}", [x, y, Fraction(x, y)]),
            (f"{a} dozen", [a, 12 * a]),
            (f"{a} and a half", [a]),
            (f"{a} times {x}", [a, x]),
            (f"{a}x", [a]),
            (f"x{a}", [a]),
            (f"{a}.{b}…", [Fraction(f"{a}.{b}")]),
            (f"{a}0000001.00", [int(f"{a}0000000")]),
            (f"{a}000000.5", [int(f"{a}000000")]),
            (f"{a}{b}{c}{a}{b}{c}{a}.0", [int(f"{a}{b}{c}{a}{b}{c}{a}") + 1]),
            (f"{a} 1/0", [a, 1, 0]),
            (f"{a}.{b}", [a, b, int(f"{a}{b}")]),
            (f"{x}:{b % 50 + 10} pm", [x, b % 50 + 10]),
            (f"{x} pm", [x]),
            (f"{a}'{x}\"", [a, x]),
            (f"{x}分之{y}", [x, y, int(f"{x}{y}")] if x != y else [7]),
            (f"百分之{a}", [Fraction(a, 100)]),
            (f"第{a}", [a]),
            (f"{a}千克{b}克", [a, b, a * 1000]),
            (f"({a}, {b})", [a, b]),
            (f"{{{a}, {b}}}", [a, b]),
            (f"[{a}]", [a]),
            (f"{a} {b % 90 + 1}", [a, b % 90 + 1, int(f"{a}{b % 90 + 1}")]),
            (f"0,{b}", [b, Fraction(f"0.{b}")]),
            (f"{a},{x}{y}", [a, int(f"{x}{y}"), int(f"{a}{x}{y}"), Fraction(f"{a}.{x}{y}")]),
            (f"{a}.{b},{x}{y}", [a, b, int(f"{x}{y}"), int(f"{a}{b}")]),
            (f"{a}°{x}'", [a, x]),
            (f"{a} + {b}", [a, b, a + b]),
            (f"{a} * {x}", [a, x]),
            (f"√{a}", [a]),
            (f"{a}²", [a]),
            (f"10^{x}", [x, 10]),
            (f"{y}^{x}", [x, y]),
        ]
    )
    wanted = rng.choice(wrong)
    wrapped = rng.choice(
        ["{}", "The answer is {}.", "Answer: {}", "答案是{}", "#### {}", "$\\boxed{{{}}}$"]
    ).format(text)
    value_ = Fraction(wanted)
    # `1,5` and its like state nothing; the other literals state something else than `wanted`.
    return Case(
        "numeric",
        wrapped,
        decimal(value_) or f"{value_.numerator}/{value_.denominator}",
        False,
        "part: " + text,
    )


# ---- choice -----------------------------------------------------------------------------------------------

CHOSEN = [
    "{a}",
    "({a})",
    "{a}.",
    "**{a}**",
    "Answer: {a}",
    "The answer is {a}.",
    "The answer is ({a}).",
    "**Answer: {a}**",
    "\\boxed{{{a}}}",
    "$\\boxed{{\\text{{{a}}}}}$",
    "The correct answer is {a}) 4 apples.",
    "{a}) 4 apples",
    "{a}. because it is larger",
    "{a}, not {b}",
    "The answer is {a}, not {b}.",
    "{b} is wrong. The answer is {a}.",
    "({b}) is too small and ({a}) fits",
    "The answer is not {b}, so it must be {a}",
    "I choose {a}.",
    "Option {a} is correct.",
    "{a} is the correct answer.",
    "It must be {a}, because {b} is too large.",
    "The answer is {a} because {b} is wrong and {c} is too small.",
    "Neither {b} nor {c}. The answer is {a}.",
    "答案是{a}。",
    "答案：{a}",
    "故选{a}",
    "应该是{a}，而不是{b}",
    "答案不是{b}，而是{a}。",
    "选项{b}错误，选项{a}正确。",
    "排除{b}和{c}，选{a}。",
    "正确答案是（{a}）。",
    "所以答案是{a}，因为{b}太小。",
    "I considered {b} and {c}. Final answer: {a}",
    "Answer: {b}. Wait, {a}.",
    "The answer is {b}. Actually, it is {a}.",
    "答案是{b}。不对，应该是{a}。",
    "{a} rather than {b}",
    "The answer is {a} instead of {b}.",
    "{b} is tempting, but {a} is correct.",
    "Answer: {a}\n\nQuestion: And this?\nAnswer: {b}",
    "{b}: wrong\n{c}: wrong\n\nAnswer: {a}",
    "answer: option {a}",
    "The best choice is {a}.",
    "{a}\n\nExplanation: {b} and {c} are too small.",
    "Answer: {a}\n{b}: too small\n{c}: too large",
    "<think>{b} or {c}?</think>{a}",
    "Let me see. {b} cannot be right. So {a}.",
    "My answer: {a}",
    "I'd go with {a}.",
    "the answer is {l}",
    "answer: {l}",
    "({l})",
    "{l}",
    "答案是{l}",
    "{l}) because",
]
NO_CHOICE = [
    "not {a}",
    "Not {a}.",
    "The answer is not {a}.",
    "{a} is wrong.",
    "{a} is incorrect",
    "It can't be {a}",
    "The answer cannot be {a}.",
    "I don't think it is {a}.",
    "{a} or {b}",
    "The answer is {a} or {b}.",
    "Answer: {a}, {b}",
    "Answer: {a} and {b}",
    "Both {a} and {b} are correct.",
    "Is it {a}?",
    "{a}?",
    "It could be {a}.",
    "If {a} is correct, then we stop.",
    "{a}不对",
    "答案不是{a}",
    "不选{a}",
    "{a}是错的",
    "选项{a}错误",
    "排除{a}",
    "{a}. one\n{b}. two\n{c}. three",
    "Neither {a} nor {b}.",
    "Vitamin {a} is healthy",
    "Point {a} lies on line {b}{c}",
    "{a}{b}",
    "\\boxed{{{a}, {b}}}",
    "\\boxed{{{a}{b}}}",
    "Answer: {a}. Wait, that is wrong.",
    "答案是{a}。不对。",
    "The answer isn't {a}.",
    "x_{a}",
    "{a}-12",
    "grade {a} students",
    "Option {a} is wrong",
    "Answer: not {a}",
    "I rule out {a}.",
    "Eliminate {a}.",
    "{a}和{b}都不对",
    "{a} and {b} are wrong.",
    "between {a} and {b}",
    "maybe {a}",
    "25 °{a}",
    "{a}'s",
    "Which is right, {a} or {b}?",
    "Some say the answer is {a}.",
    "{a}, {b}, and {c} are all wrong.",
    "可能是{a}",
]


def choice(rng: Rng) -> Case:
    a, b, c = rng.sample("BCDEFGH", 3)
    if rng.random() < 0.6:
        template = rng.choice(CHOSEN)
        text = template.format(a=a, b=b, c=c, l=a.lower())
        right = rng.random() < 0.5
        return Case("choice", text, a if right else rng.choice([b, c]), right, template)
    template = rng.choice(NO_CHOICE)
    return Case("choice", template.format(a=a, b=b, c=c), rng.choice([a, a, b, c]), False, template)


# ---- exact and regex --------------------------------------------------------------------------------------

WORDS = [
    "fish",
    "final",
    "Paris",
    "北京",
    "x2",
    "42",
    "007",
    "e d c",
    "3.14",
    "naïve",
    "Ünder",
    "C++",
    "a.b",
    "1,000",
]


def exact(rng: Rng) -> Case:
    text = " ".join(rng.sample(WORDS, rng.randrange(1, 4)))
    same = [
        lambda t: t,
        lambda t: f"  {t}\n",
        lambda t: t.replace(" ", "  "),
        lambda t: t.replace(" ", "\u00a0"),
        lambda t: t.replace("fi", "ﬁ"),
        lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
        lambda t: "\u200b".join(t),
        lambda t: "\ufeff" + t,
        lambda t: t.replace("ï", "i\u0308"),
        lambda t: f"<think>{t}?</think>{t}",
    ]
    other = [
        lambda t: t + ".",
        lambda t: f"Answer: {t}",
        lambda t: t + " " + t,
        lambda t: t.swapcase() + "z",
        lambda t: t + "²",
        lambda t: t + "½",
        lambda t: "①" + t,
        lambda t: "-" + t,
        lambda t: t[:-1],
        lambda t: t + "\n\nWait, no.",
        lambda t: t[::-1] + "q",
        lambda t: f"not {t}",
        lambda t: f"[{t}]",
        lambda t: f'"{t}"',
    ]
    if rng.random() < 0.5:
        return Case("exact", rng.choice(same)(text), text, True, "same")
    # What NFKC would make equal: superscripts, circled digits, vulgar fractions.
    tricks = [
        ("2³", "23"),
        ("1½", "11/2"),
        ("①", "1"),
        ("x²", "x2"),
        ("4⁄2", "42"),
        ("㎡", "m2"),
        ("ℝ", "R"),
        ("⒈", "1."),
        ("½", "1/2"),
        ("½", "1⁄2"),
        ("H₂O", "H2O"),
    ]
    if rng.random() < 0.3:
        shown, plain = rng.choice(tricks)
        return Case("exact", f"{text} {shown}", f"{text} {plain}", False, "trick")
    return Case("exact", rng.choice(other)(text), text, False, "other")


def pattern(rng: Rng) -> Case:
    text = rng.choice(["a.b", "C++", "(x)", "[1]", "3.14", "$5", "1|2", "a*b", "北京"])
    if rng.random() < 0.5:
        return Case("regex:^{answer}$", text, text, True, "pattern")
    other = text.translate(str.maketrans(".+([$|*北", "x-{{6~b东"))
    return Case("regex:^{answer}$", rng.choice([other, text + text, "not " + text]), text, False, "pattern")


# ---- math -------------------------------------------------------------------------------------------------

FORMULAS = [
    "{n}",
    "{n}",
    "{n}",
    "\\frac{{{n}}}{{{p}}}",
    "{n}\\sqrt{{2}}",
    "\\sqrt{{{p}}}",
    "{n}x + {m}",
    "x^2 + {n}",
    "({n}, {m})",
    "\\left[{n}, {m}\\right)",
    "{n}\\pi",
    "\\frac{{{n}\\pi}}{{{p}}}",
    "2^{{{n}}}",
    "{n} + {m}i",
]
SAME = [
    "\\boxed{{{R}}}",
    "$\\boxed{{{R}}}$",
    "The answer is ${R}$.",
    "**Final Answer:** ${R}$",
    "So ${R}$.",
    "\\[ {R} \\]",
    "Thus the final answer is \\boxed{{{R}}}. I hope it is correct.",
    "#### {R}",
    "答案是 ${R}$。",
    "\\boxed{{W}}. Wait, \\boxed{{{R}}}.",
    "The answer is not ${W}$ but ${R}$.",
]
CHANGED = [
    "{R}\\%",
    "{R}^\\circ",
    "[{R}]",
    "{W} = {R}",
    "W = {R}",
    "{W} = x = {R}",
    "\\neq {R}",
    "x \\neq {R}",
    "> {R}",
    "x \\ge {R}",
    "-({R})",
    "{R} + 1",
    "2 \\cdot ({R})",
    "\\{{{R}\\}}",
    "\\text{{not }}{R}",
    "not {R}",
    "{R}'",
    "{R}, {W}",
    "{R} \\text{{ or }} {W}",
    "\\approx {R}",
    "({R})^2",
    "{R} : {W}",
    "\\pm ({R})",
    "{W}",
    "{R}\\text{{ million}}",
    "x \\in {R}",
    "{R}\\ldots",
    "{R}\\text{{ is wrong}}",
    "{R} + x",
    "\\frac{{{R}}}{{7}}",
    "\\sqrt{{{R} + 1}}",
]
NOT_STATED = [
    "The answer is not ${R}$.",
    "It is ${R}$. Wait, it is ${W}$.",
    "\\boxed{{{R}}}. Wait, \\boxed{{{W}}}.",
    "Is it ${R}$?",
    "If the answer were ${R}$, we would stop.",
    "\\boxed{{{W}}}",
    "The answer is ${W}$, not ${R}$.",
]


def math(rng: Rng) -> Case:
    n, m, p = rng.sample(range(2, 60), 3)
    p = rng.choice([3, 5, 7, 11, 13])
    R = rng.choice(FORMULAS).format(n=n, m=n + m, p=p)
    W = rng.choice([f"{n + 61}", f"{n + 61}\\sqrt{{3}}", f"\\frac{{{n + 61}}}{{17}}"])
    if rng.random() < 0.4:
        template = rng.choice(SAME)
        return Case("math", template.format(R=R, W=W).replace("{W}", W), R, True, template)
    if rng.random() < 0.8:
        template = rng.choice(CHANGED)
        outer = rng.choice(["\\boxed{{{}}}", "The answer is ${}$.", "$$\\boxed{{{}}}$$", "So ${}$."])
        return Case("math", outer.format(template.format(R=R, W=W)), R, False, template)
    template = rng.choice(NOT_STATED)
    return Case("math", template.format(R=R, W=W), R, False, template)


_MAKERS = {"numeric": numeric, "choice": choice, "exact": exact, "math": math, "regex": pattern}


def main() -> None:
    from distill.tasks.verify import judge

    n, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    asked, bad, shown = Counter(), Counter(), Counter()
    distinct = set()
    for case in cases(seed, n):
        distinct.add(case[:3])
        verdict = judge(case.verifier, case.text, case.reference)
        name = case.verifier.partition(":")[0]
        asked[name, "right" if case.right else "adversarial"] += 1
        if (verdict == "correct") != case.right:
            kind = "miss" if case.right else "false accept"
            bad[name, kind] += 1
            shown[name, case.form] += 1
            if shown[name, case.form] <= 2:
                print(
                    f"{kind}: {name} {case.text!r} reference {case.reference!r}: {verdict}   [{case.form!r}]"
                )
    print(f"asked {n}, {len(distinct)} different:", dict(asked))
    print("false accepts and misses", dict(bad) or "none")


if __name__ == "__main__":
    main()
