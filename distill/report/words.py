"""The language of a page: every sentence is written in English where it is used, and looked up when it is shown.

    with speaking("zh"):
        say("%(n)s of %(of)s", n=3, of=8)      # the Chinese of templates/zh.yaml; without one, the English
        called("student")                      # a name that the project itself gives: 学生

Templates say the same with `{% trans %}` and `_()` of jinja2's own i18n extension; both read one catalogue,
templates/zh.yaml: English to Chinese, one entry a sentence. A sentence is a %-format: its values are named, a
percent sign is written twice. tests/report/test_words.py holds templates, code and catalogue together.

Names that a user gives (checkpoints, files, tasks) stay as they are; those of the embedded demo are translated.
The language belongs to the process, not to a thread: a command builds its pages in one language.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

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
}


def called(name: str | None) -> str:
    """A name as a reader calls it. One that the project did not give is the user's, and stays as it is."""
    return lookup(NAMES[name]) % {} if name in NAMES else str(name or "")
