"""Sliders: HTML that stands alone, with its data in it; an unknown kind or missing numbers are refused."""

import json
import re

import pytest

from distill.errors import UserError
from distill.lessons.shown import KINDS, TITLES, page, script, slider


def data_of(text: str) -> list[dict]:
    return [
        json.loads(found) for found in re.findall(r"<script type='application/json'>(.*?)</script>", text)
    ]


def test_a_slider_stands_alone():
    shown = slider("temperature", "zh", scores=[1.0, 2.0], names=["</script>", "b"])
    (told,) = data_of(shown)
    assert told["data"]["names"][0] == "</script>" and told["lang"] == "zh"
    assert shown._repr_html_() == shown and "<script>" in shown
    assert "拖动滑块" in shown


def test_every_kind_is_in_the_script_and_on_the_page():
    known = set(re.findall(r"^    (\w+): \{$", script(), re.M))
    assert known == set(KINDS)
    for language in ("en", "zh"):
        text = page(language)
        assert [told["kind"] for told in data_of(text)] == list(TITLES)
        assert set(re.findall(r"https?://[^\s'\"]+", text)) == {
            "http://www.w3.org/2000/svg"
        }  # a name, not an address


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(UserError, match="one of temperature"):
        slider("speed")
    with pytest.raises(UserError, match="needs scores="):
        slider("temperature", names=["a"])
    with pytest.raises(UserError, match="needs at="):
        slider("walk", at=[1, 2])
