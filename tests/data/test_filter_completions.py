"""What of an answer is trained on: controls that keep prompts and order and change the text alone."""

import pytest
from conftest import ROOT

from distill.config.recipe import load_recipe
from distill.data.filter import reduced
from distill.errors import UserError

PROMPTS = {f"p{i}": {"answer": f"ref{i}"} for i in range(4)}


def row(i: int, sample: int = 0, level: str = "easy", text: str | None = None) -> dict:
    text = f"<think>w{i}{sample}</think>a{i}{sample}" if text is None else text
    return {"prompt_id": f"p{i}", "sample_idx": sample, "family": "f", "level": level, "text": text}


def make(row: dict, text: str) -> dict:
    return {**row, "text": text}


def texts(rows: list[dict], how: str) -> list:
    return [r.get("rule") or r["text"] for r in reduced(rows, how, PROMPTS, make)]


def test_whole_changes_nothing_and_answers_lose_their_working():
    rows = [row(0), row(1), {**row(2), "rule": "wrong_answer"}, row(3, text="<think>never closed")]
    assert list(reduced(rows, "whole", PROMPTS, make)) == rows
    assert texts(rows, "teacher_answer") == ["a00", "a10", "wrong_answer", "no_final_answer"]
    assert texts(rows, "reference_answer") == ["ref0", "ref1", "wrong_answer", "ref3"]


def test_shuffled_gives_each_prompt_the_answers_of_another_of_its_cell():
    rows = [row(0), row(0, 1), row(1), row(2, level="hard"), row(3, level="hard"), row(3, 1, level="hard")]
    found = list(reduced(rows, "shuffled", PROMPTS, make))
    assert [r["prompt_id"] for r in found] == [r["prompt_id"] for r in rows]
    owner = {r["text"]: (r["prompt_id"], r["level"]) for r in rows}
    for r in found:
        prompt, level = owner[r["text"]]
        assert prompt != r["prompt_id"] and level == r["level"]
    assert texts([row(0), row(0, 1)], "shuffled") == ["no_other_prompt"] * 2


def test_what_cannot_go_together_is_refused():
    demo, sparse = str(ROOT / "recipes" / "demo.yaml"), "train.objectives=[{name: sparse_forward_kl}]"
    with pytest.raises(UserError, match="completions=shuffled trains on another text"):
        load_recipe(demo, ["filter.completions=shuffled", sparse, "generate.signal={kind: top_k, k: 4}"])
    with pytest.raises(UserError, match="this recipe has no control; leave it out"):
        load_recipe(demo, ["control.enabled=false", "evaluate.models=[control, student]"])


def test_a_dose_spoils_its_share_and_a_larger_one_contains_it():
    """The planted positives: 10, 25 and 100 % of the prompts with the answer of another."""
    many = {f"p{i}": {"answer": "x"} for i in range(1000)}
    rows = [row(i) for i in range(1000)]
    spoilt = {}
    for share in (0.1, 0.25, 1.0):
        found = list(reduced(rows, "shuffled", many, make, share))
        assert [r["prompt_id"] for r in found] == [r["prompt_id"] for r in rows]
        spoilt[share] = {r["prompt_id"] for r, old in zip(found, rows) if r["text"] != old["text"]}
        assert len(spoilt[share]) / 1000 == pytest.approx(share, abs=0.03)
    assert spoilt[0.1] < spoilt[0.25] < spoilt[1.0]


def test_a_dataset_without_a_dose_is_what_it_was_before_there_was_the_key():
    from distill.config.data import Filter
    from distill.data.filter_rules import identity

    assert "shuffled_share" not in identity(Filter(completions="shuffled"), None)["filter"]
    assert (
        identity(Filter(completions="shuffled", shuffled_share=0.1), None)["filter"]["shuffled_share"] == 0.1
    )
