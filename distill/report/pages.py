"""What all pages share: the template environment, the language, and numbers as people read them.

The language of a page: every sentence is written in English where it is used, and looked up when it is shown.

    with speaking("zh"):
        say("%(n)s of %(of)s", n=3, of=8)      # the Chinese of templates/zh.yaml; without one, the English
        called("student")                      # a name that the project itself gives: 学生

Templates say the same with `{% trans %}` and `_()` of jinja2's own i18n extension; both read one catalogue,
templates/zh.yaml: English to Chinese, one entry a sentence. A sentence is a %-format: its values are named, a
percent sign is written twice. tests/report/test_pages_words.py holds templates, code and catalogue together.

Names that a user gives (checkpoints, files, tasks) stay as they are; those of the embedded demo are translated.
The language belongs to the process, not to a thread: a command builds its pages in one language.

Numbers as people read them: rounded, with unit and interval, and a dash where there is none.

    percent({"accuracy": 0.82, "ci95": [0.78, 0.86]})      # 82.0 % [78.0, 86.0]
    si(2.1e9), duration(125)

The template environment, its filters, and how text of models becomes harmless.

    page_environment().get_template("report.html.j2").render(...)

Every value is escaped unless the code marks it as markup (its own figures). What a template does not find is
None to a filter, which makes it a dash: a page says what it lacks and never fails over it. The look of all
pages is `templates/style.css`, included by each, so that a page stays one file. Words go through jinja2's extension
i18n to `distill.report.pages`: `{% trans %}sentence{% endtrans %}`, `_("word")`, `name|called`.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from unicodedata import east_asian_width

import jinja2
from markupsafe import Markup

from distill.console import parameters
from distill.errors import UserError
from distill.storage import parse_yaml

LANGUAGES = {"en": "en", "zh": "zh-CN"}  # as an option, and as HTML says it
CATALOGUE = Path(__file__).parent / "templates" / "zh.yaml"
_spoken = "en"


def speak(language: str) -> None:
    """Whatever is said from now on. UserError for a language that nobody has written."""
    global _spoken
    if language not in LANGUAGES:
        raise UserError(f"--lang {language}: one of {', '.join(LANGUAGES)}")
    _spoken = language


def spoken() -> str:
    return _spoken


def html_language() -> str:
    return LANGUAGES[_spoken]


@contextlib.contextmanager
def speaking(language: str) -> Iterator[None]:
    """`speak` for the length of a block."""
    before = _spoken
    speak(language)
    try:
        yield
    finally:
        speak(before)


@cache
def catalogue() -> dict[str, str]:
    """English to Chinese, as `%`-formats."""
    return parse_yaml(CATALOGUE.read_text(encoding="utf-8"))


def lookup(text: str) -> str:
    """The format in the language that is spoken: what jinja2 calls gettext."""
    return text if _spoken == "en" else catalogue().get(text, text)


def lookup_plural(one: str, many: str, n: int) -> str:
    """The same for a counted thing; Chinese has one form, that of `many`."""
    if _spoken == "en":
        return one if n == 1 else many
    return catalogue().get(many, many)


def say(text: str, **values: object) -> str:
    """A sentence in the language of the page. `text` is written out where it is said, so that it can be collected."""
    return lookup(text) % values


def retold(sentence: str, forms: Collection[str], translate: Callable[[str], str] = lookup) -> str:
    """A sentence that was made in English, in the language of the page. `forms`: the `%`-formats it may be made of.

    A sentence of no form stays as it is, and a name that the project gives is translated.
    """
    plain = sentence.replace("%", "%%")
    for form in (plain,) if plain in forms else forms:
        pattern = re.sub(r"%\\\((\w+)\\\)s", r"(?P<\1>.+?)", re.escape(form.replace("%%", "%")))
        if found := re.fullmatch(pattern, sentence, re.S):
            values = {name: retold(value, forms, translate) for name, value in found.groupdict().items()}
            return translate(form) % values
    return called(sentence)


_PLACE = re.compile(r"%\((\w+)\)(-?\d*)[swg]")
_KINDS = {"s": ".+?", "w": r"\S+?", "g": r"(?:[-+]?(?:\d|nan|inf)\S*?|-)"}  # a text, a word, a number


def form_pattern(form: str) -> re.Pattern:
    """The lines that `form` stands for: a space is one or more, %(x)s a text, %(x)w a word, %(x)g a number."""
    parts = re.split(r"%\((\w+)\)([swg])", form)
    fixed = [re.sub(r"(\\ )+", " +", re.escape(part.replace("%%", "%"))) for part in parts[::3]]
    places = [f"(?P<{name}>{_KINDS[kind]})" for name, kind in zip(parts[1::3], parts[2::3])]
    return re.compile("".join(a + b for a, b in zip(fixed, [*places, ""])))


def filled(form: str, values: Mapping[str, str]) -> str:
    """A line of a table: %(x)-9s takes nine columns, %(x)9s the same at their right end; a Chinese letter takes two."""

    def padded(place: re.Match) -> str:
        text, columns = values[place[1]], place[2]
        room = " " * (abs(int(columns or 0)) - sum(2 if east_asian_width(c) in "WF" else 1 for c in text))
        return text + room if columns.startswith("-") else room + text

    return _PLACE.sub(padded, form.replace("%%", "%"))


def mark(text: str) -> str:
    """`text` itself: a word that is looked up later, by `called` or by a template."""
    return text


# What the project itself calls things, by the name that a file has for it. `mark` puts the words into the catalogue.
NAMES = {
    name: mark(name)
    for name in (
        mark("base"), mark("control"), mark("student"), mark("teacher"),
        mark("easy"), mark("medium"), mark("hard"), mark("all"),
        mark("addition"), mark("subtraction"), mark("multiplication"), mark("modulo"), mark("sorting"),
        mark("reversing"), mark("counting"),
        mark("prompt"), mark("thinking"), mark("answer"),
    )
}  # fmt: skip
NAMES |= {
    "prompts": mark("problems"),
    "generations": mark("teacher's answers"),
    "dataset": mark("training set"),
    "eval": mark("exam"),
    "wrong_answer": mark("wrong answer"),
    "truncated": mark("cut off"),
    "finish_reason": mark("ended otherwise"),
    "contaminated": mark("in the exam"),
    "too_short": mark("too short"),
    "too_long": mark("too long"),
    "too_few_characters": mark("too few characters"),
    "too_many_characters": mark("too many characters"),
    "charset": mark("other script"),
    "duplicate": mark("duplicate"),
    "near_duplicate": mark("near duplicate"),
    "per_prompt_cap": mark("enough per problem"),
    "no_final_answer": mark("no final answer"),
    "no_other_prompt": mark("no other problem"),
    "no_answer": mark("no answer"),
    "error": mark("error"),
    "correct": mark("correct"),
    "wrong": mark("wrong"),
    "BETTER": mark("BETTER"),
    "WORSE": mark("WORSE"),
    "INCONCLUSIVE": mark("INCONCLUSIVE"),
    "NOT COMPARED": mark("NOT COMPARED"),
    "SUPPORTED": mark("SUPPORTED"),
    "NOT SUPPORTED": mark("NOT SUPPORTED"),
    "EQUIVALENT": mark("EQUIVALENT"),
    "NOT COMPARABLE": mark("NOT COMPARABLE"),
    "teacher_answers": mark("teacher answers"),
    "cross_entropy": mark("cross-entropy"),
    "forward_kl": mark("forward KL"),
    "reverse_kl": mark("reverse KL"),
    "random": mark("random routing"),
    "uniform": mark("uniform routing"),
    "shuffled": mark("shuffled routing"),
    "letter": mark("letter"),
    "chat": mark("chat"),
    "plain": mark("plain"),
    "text": mark("text"),
    "tango": mark("Tango's score interval"),
    "bootstrap over problems": mark("bootstrap over problems"),
    "mcnemar exact": mark("exact McNemar test"),
    "sign flips over problems, exact": mark("exact sign-flip test over problems"),
    "holm": mark("Holm"),
    "as_is": mark("as it is"),
    "wrong_rule": mark("wrong rule"),
    "hidden_step": mark("hidden step"),
    "refusal": mark("refusal"),
    "refusal_checked": mark("refusal checked"),
    "bias": mark("bias"),
    "overconfidence": mark("overconfidence"),
}


def called(name: str | None) -> str:
    """A name as a reader calls it. One that the project did not give is the user's, and stays as it is."""
    return lookup(NAMES[name]) % {} if name in NAMES else str(name or "")


# ==== Numbers as people read them ====

LONGEST_TEXT = 2000
# Control characters are invisible on a page, so each shows as its picture (U+2400 and on).
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}

NB = "\u00a0"  # keeps a number and its unit on one line
DASH = "–"


# ---- numbers into words (filters of the template); what is not there becomes a dash


def absent(value) -> bool:
    """True for None and for NaN, which JSON files hold where nothing could be measured."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(value, digits: int = 3) -> str:
    """Thousands are separated; what is below 1,000 and not whole has `digits` decimals; a list counts its members."""
    if absent(value):
        return DASH
    if isinstance(value, list):
        value = len(value)
    return f"{value:.{digits}f}" if isinstance(value, float) and abs(value) < 999.5 else f"{value:,.0f}"


def rate(value) -> str:
    """A speed: three significant digits, with thousands separators."""
    if absent(value):
        return DASH
    whole = round(value, 2 - math.floor(math.log10(abs(value)))) if value else 0.0
    return f"{whole:,.0f}" if abs(whole) >= 100 else f"{whole:.3g}"


def size(model: dict | None) -> str:
    """Parameters of a checkpoint, as everywhere: `0.84 M + 0.16 M adapter`. `model` as in metrics.json."""
    about = model or {}
    if absent(about.get("parameters_total")):
        return DASH
    base, adapter = (
        parameters(about.get(key) or 0).replace(" ", NB) for key in ("parameters_total", "parameters_adapter")
    )
    if not about.get("parameters_adapter"):
        return base
    return say("%(base)s + %(adapter)s adapter", base=base, adapter=adapter)


def millions(count) -> str:
    """A number of parameters that stands alone: `1.46 M`."""
    return DASH if absent(count) else parameters(count).replace(" ", NB)


def si(value, unit: str = "") -> str:
    """`value` with three significant digits and an SI prefix: 3,650,000 -> 3.65 M."""
    if absent(value):
        return DASH
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:  # 999,700 is 1 M, not 1e+03 k
            return f"{value / scale:.3g}{NB}{prefix}{unit}"
    return f"{value:.3g}{NB}{unit}".rstrip(NB)


def duration(seconds: float | None) -> str:
    """Wall-clock time in the two largest units that fit."""
    if absent(seconds):
        return DASH
    if seconds < 59.95:
        return _joined(say("%(seconds)s s", seconds=f"{seconds:.1f}"))
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return _joined(say("%(minutes)s min, %(seconds)s s", minutes=minutes, seconds=rest))
    return _joined(say("%(hours)s h, %(minutes)s min", hours=minutes // 60, minutes=minutes % 60))


def _joined(text: str) -> str:
    """Each number stays beside its unit; the comma only marks where a line may break."""
    return " ".join(part.replace(" ", NB) for part in text.split(", "))


def share(value: float | None, digits: int = 1) -> str:
    """A fraction of 1 as a percentage."""
    if absent(value):
        return DASH
    return f"{hundredfold(value, digits)}{NB}%"


def percent(score: dict | None, digits: int = 1) -> str:
    """Accuracy of a score with its 95 % interval: `82.0 % [78.1, 85.9]`."""
    if not score or absent(score.get("accuracy")):
        return DASH
    low, high = (hundredfold(bound, digits) for bound in score["ci95"])
    return f"{share(score['accuracy'], digits)} [{low},{NB}{high}]"


def points(comparison: dict) -> str:
    """Difference of a comparison in percentage points with its 95 % interval."""
    if absent(comparison.get("difference")):
        return DASH
    low, high = comparison["ci95"]
    difference, low, high = (f"{100 * x:+.1f}" for x in (comparison["difference"], low, high))
    text = say("%(n)s points [%(low)s, %(high)s]", n=difference, low=low, high=high)
    unit, bracket, bounds = text.partition(" [")
    return (unit.replace(" ", NB) + bracket + bounds.replace(" ", NB)).replace("-", "−")


def points_alone(comparison: dict) -> str:
    """The same without the unit, for a column that names it."""
    if absent(comparison.get("difference")):
        return DASH
    low, high = comparison["ci95"]
    text = f"{100 * comparison['difference']:+.1f} [{100 * low:+.1f},{NB}{100 * high:+.1f}]"
    return text.replace("-", "−")


def p_value(value: float | None) -> str:
    """`0.023`, or `< 0.001` where more digits would claim more than the data can tell."""
    if absent(value):
        return DASH
    return f"<{NB}0.001" if value < 0.001 else f"{value:.3f}"


def clip(text: str | None) -> str:
    """Text of a model, its control characters made visible, its length bounded."""
    text = (text or "").translate(CONTROL_PICTURES)
    left_out = len(text) - LONGEST_TEXT
    if left_out <= 0:
        return text
    return text[:LONGEST_TEXT] + say("… (%(n)s more characters)", n=f"{left_out:,}")


def hundredfold(value: float, digits: int) -> str:
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"  # adding 0.0 turns -0.0 into 0.0


_MACHINES = (mark("cpu (%(name)s, %(n)s threads)"), mark("%(times)s x cpu (%(name)s, %(n)s threads)"))


def machine(device: str | None) -> str:
    """A device as `distill.devices.describe_device` names it, in the language of the page; "" without one."""
    return retold(device, _MACHINES) if device else ""


# What an evaluation warns of (distill/evaluation/measure.py), as `%`-formats.
WARNINGS = (
    mark("it has no chat template, so its answers were ended before %(text)s; --stop (evaluate.stop) sets others"),
    mark("non-finite logits (NaN or infinity) in %(n)s of %(all)s answers: they count as errors, not as wrong; the "
         "weights may be damaged, or the dtype too narrow (try fp32)"),
    mark("%(n)s of %(all)s answers failed: %(why)s"),
    mark("routing was not measured: %(why)s"),
    mark("%(n)s of %(all)s answers to %(task)s state nothing that the verifier can read, and count as not solved "
         "(verdict no_answer in answers/)"),
    mark("every answer of task %(task)s was cut at %(n)s tokens, so its accuracy says nothing; raise --max-new-tokens "
         "(evaluate.max_new_tokens)"),
    mark("fidelity leaves out %(n)s tokens whose logits are not finite"),
)  # fmt: skip


def warning(text: str) -> str:
    """A warning of metrics.json in the language of the page."""
    return retold(text, WARNINGS)


# ==== What all pages share ====

TEMPLATES = Path(__file__).parent / "templates"


# Spaces and control characters of a token are most of what it is.
VISIBLE = {ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥"} | CONTROL_PICTURES


def visible(token: str | None) -> str:
    """A token with its spaces and line ends shown; · for one whose bytes end in a later token."""
    return (token or "").translate(VISIBLE) or "·"


def breakable(path: str | None) -> Markup:
    """A path that a narrow column breaks after its slashes, not within a name."""
    return Markup("/<wbr>").join((path or DASH).split("/"))


def estimate(score: dict, digits: int = 1) -> str:
    """A share of 1 (key `accuracy`) with its interval, or alone where it has none."""
    bounds = score["ci95"]
    known = isinstance(bounds, list) and not any(absent(bound) for bound in bounds)
    return percent(score, digits) if known else share(_or_none(score["accuracy"]), digits)


def signed_share(value: float | None, digits: int = 3) -> str:
    """A change as a percentage with its sign."""
    if absent(value):
        return DASH
    return f"{100 * value:+.{digits}f}{NB}%".replace("-", "−")


FILTERS = [
    visible,
    breakable,
    estimate,
    signed_share,
    number,
    si,
    rate,
    size,
    millions,
    duration,
    share,
    percent,
    points,
    points_alone,
    p_value,
    clip,
    machine,
    warning,
]


def page_environment() -> jinja2.Environment:
    """The environment of `templates/`, with the number formats of `distill.report.pages` as filters.

    One for each language: compiling the templates takes longer than filling them in.
    """
    return _environment(spoken())


@functools.cache
def _environment(language: str) -> jinja2.Environment:
    """In the language that is spoken now: what does not change is worked out when a template is compiled."""
    assert language == spoken()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
        extensions=["jinja2.ext.i18n"],
    )
    environment.policies["ext.i18n.trimmed"] = True  # line breaks of a template are no part of a sentence
    environment.install_gettext_callables(lookup, lookup_plural, newstyle=True)
    environment.globals["html_language"] = html_language()
    environment.filters["called"] = called
    environment.filters |= {function.__name__: _defined(function) for function in FILTERS}
    return environment


def _defined(function):
    """The filter with what the template does not find passed on as None."""
    return lambda value, *rest: function(_or_none(value), *rest)


def _or_none(value):
    return None if isinstance(value, jinja2.Undefined) else value
