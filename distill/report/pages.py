"""What the two pages share: the template environment, its filters, and how text of models becomes harmless.

    page_environment().get_template("report.html.j2").render(...)

Every value is escaped unless the code marks it as markup (its own figures). What a template does not find is
None to a filter, which makes it a dash: a page says what it lacks and never fails over it. The look of all
pages is `templates/style.css`, included by each, so that a page stays one file. Words go through jinja2's extension
i18n to `distill.report.words`: `{% trans %}sentence{% endtrans %}`, `_("word")`, `name|called`.
"""

from pathlib import Path

import jinja2
from markupsafe import Markup

from distill.report import numbers, words

TEMPLATES = Path(__file__).parent / "templates"


# Spaces and control characters of a token are most of what it is.
VISIBLE = {ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥"} | numbers.CONTROL_PICTURES


def visible(token: str | None) -> str:
    """A token with its spaces and line ends shown; · for one whose bytes end in a later token."""
    return (token or "").translate(VISIBLE) or "·"


def breakable(path: str | None) -> Markup:
    """A path that a narrow column breaks after its slashes, not within a name."""
    return Markup("/<wbr>").join((path or numbers.DASH).split("/"))


def estimate(score: dict, digits: int = 1) -> str:
    """A share of 1 (key `accuracy`) with its interval, or alone where it has none."""
    bounds = score["ci95"]
    known = isinstance(bounds, list) and not any(numbers.absent(bound) for bound in bounds)
    return numbers.percent(score, digits) if known else numbers.share(_or_none(score["accuracy"]), digits)


def signed_share(value: float | None, digits: int = 3) -> str:
    """A change as a percentage with its sign."""
    if numbers.absent(value):
        return numbers.DASH
    return f"{100 * value:+.{digits}f}{numbers.NB}%".replace("-", "−")


FILTERS = [
    visible,
    breakable,
    estimate,
    signed_share,
    numbers.number,
    numbers.si,
    numbers.rate,
    numbers.size,
    numbers.millions,
    numbers.duration,
    numbers.share,
    numbers.percent,
    numbers.points,
    numbers.points_alone,
    numbers.p_value,
    numbers.clip,
]


def page_environment() -> jinja2.Environment:
    """The environment of `templates/`, with the number formats of `distill.report.numbers` as filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
        extensions=["jinja2.ext.i18n"],
    )
    environment.policies["ext.i18n.trimmed"] = True  # line breaks of a template are no part of a sentence
    environment.install_gettext_callables(words.lookup, words.lookup_plural, newstyle=True)
    environment.globals["html_language"] = words.html_language()
    environment.filters["called"] = words.called
    environment.filters |= {function.__name__: _defined(function) for function in FILTERS}
    return environment


def _defined(function):
    """The filter with what the template does not find passed on as None."""
    return lambda value, *rest: function(_or_none(value), *rest)


def _or_none(value):
    return None if isinstance(value, jinja2.Undefined) else value
