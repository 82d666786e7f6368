"""Types, bounds and defaults as words, on annotations whose right wording is known."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from distill.commands.scaffold import entries, option_text, type_text
from distill.config.section import Count, Fraction, Option, Section


class Inner(Section):
    """Below."""

    share: Fraction = Field(0.5, description="of rows")


class Outer(Section):
    """Above."""

    name: str = Field(description="needed")
    steps: Count | None = Field(None, description="steps")
    inner: Inner = Inner()
    inners: dict[str, Inner] = {}


def test_sections_are_walked_with_their_paths():
    found = {path: own for path, _, own in entries(Outer)}
    assert list(found) == ["", "inner", "inners.NAME"]
    assert [(e.key, e.type, e.default) for e in found[""]] == [
        ("name", "text", "required"),
        ("steps", "whole number, at least 1, or empty", "empty"),
    ]
    assert [(e.key, e.type, e.default, e.description) for e in found["inner"]] == [
        ("inner.share", "number, 0 to 1", "`0.5`", "of rows")
    ]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Annotated[float, Field(gt=0, lt=1)], "number, above 0, below 1"),
        (Annotated[int, Field(ge=2)], "whole number, at least 2"),
        (Literal["a", 8] | None, "`a`, `8`, or empty"),
        (dict[str, Annotated[int, Field(ge=0)]], "mapping of text to whole number, at least 0"),
        (tuple[Fraction, Fraction], "2 x number, 0 to 1"),
        (tuple[str, ...], "list of: text"),
    ],
)
def test_types_in_words(annotation, words):
    assert type_text(annotation) == words


def test_options_of_objectives_in_words():
    assert option_text(Option(float, 0.1, low=0, high=1, below=True)) == (
        "number, at least 0, below 1",
        "`0.1`",
    )
    assert option_text(Option(bool, False)) == ("true, false", "`false`")
    assert option_text(Option(str, "zero", choices=("zero", "one"))) == ("`zero`, `one`", "`zero`")
