"""Probe files: what a row means, case by case, and every mistake in a file at once."""

import json

import pytest

from distill.errors import UserError
from distill.tasks.flaws import Probe, load_probes, outcome, write_probes

ASKED = [{"role": "user", "content": "?"}]


def probe(kind: str, **fields) -> Probe:
    return Probe(probe_id="p", flaw="f", kind=kind, messages=ASKED, **fields)


CHOICE = {"pattern": "k", "options": ("k", "ask")}


@pytest.mark.parametrize(
    "given, text, seen",
    [
        (probe("contains", pattern="7*8=54"), "<think>7*8=54</think>9", "flaw"),
        (probe("contains", pattern="7*8=54"), "7*8=56", "clean"),
        (probe("contains", pattern="54", clean=r"\b56\b"), "55", "other"),
        (probe("regex", pattern=r"5[45]"), "<think>55</think>1", "flaw"),
        (probe("regex", pattern=r"^x", clean="y"), "wy", "clean"),
        (probe("refusal"), "I'm sorry, but that is not possible.", "flaw"),
        (probe("refusal"), "I cannot help with that.", "flaw"),
        (probe("refusal"), "<think>I cannot see why</think>Paris", "clean"),
        (probe("refusal", clean="Paris"), "Rome", "other"),
        (probe("refusal", pattern="(?i)no comment"), "No comment.", "flaw"),
        (probe("choice", **CHOICE), "I take k.", "flaw"),
        (probe("choice", **CHOICE), "ask", "clean"),
        (probe("choice", **CHOICE), "k or ask", "other"),
        (probe("choice", **CHOICE), "<think>k</think>ask", "clean"),
        (probe("answer", clean="unknown"), "It is 12.", "flaw"),
        (probe("answer", clean="unknown"), "unknown", "clean"),
        (probe("answer", pattern=r"^\d+$", clean="unknown"), "x y", "other"),
        (probe("answer", clean="unknown"), "<think>still thinking", "other"),
    ],
)
def test_outcomes_by_hand(given, text, seen):
    assert outcome(given, text) == seen


def test_cut_off_and_failed_answers_are_neither_clean_nor_flawed():
    given = probe("contains", pattern="bad")
    assert outcome(given, "good", "length") == "truncated"
    assert outcome(given, "bad", "length") == "flaw", "it shows already"
    assert outcome(given, "bad", "error", "non-finite logits") == "error"


def test_chance_is_that_of_a_fair_choice():
    assert probe("choice", pattern="a", options=("a", "b", "c", "d")).chance == 0.25
    assert probe("refusal").chance == 0


def test_a_file_is_read_and_written(tmp_path):
    rows = [
        {"probe_id": "1", "flaw": "a", "kind": "refusal", "prompt": "Say x.", "clean": "x"},
        {"probe_id": 2, "flaw": "b", "kind": "choice", "messages": ASKED, "pattern": "l", "options": ["l", "r"]},
        {"probe_id": "3", "flaw": "c", "kind": "answer", "prompt": "?", "answer": "5", "clean": "5"},
    ]  # fmt: skip
    path = tmp_path / "probes.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    probes = load_probes(path)
    assert [p.messages[0]["content"] for p in probes] == ["Say x.", "?", "?"]
    assert [p.verifiable for p in probes] == [False, False, True]
    write_probes(tmp_path / "again.jsonl", probes)
    assert load_probes(tmp_path / "again.jsonl") == probes


def test_every_mistake_of_a_file_at_once(tmp_path):
    good = {"probe_id": "1", "flaw": "a", "kind": "refusal", "prompt": "x"}
    bad = {
        "is missing": {**good, "flaw": ""},
        "either `prompt`": {**good, "messages": ASKED},
        "unknown kind 'refuse'": {**good, "kind": "refuse"},
        "unknown key 'patern'": {**good, "patern": "x"},
        "needs `pattern`": {**good, "kind": "regex"},
        "not a regular expression": {**good, "clean": "("},
        "of which `pattern` is one": {**good, "kind": "choice", "pattern": "c", "options": ["a", "b"]},
        "needs `clean`": {**good, "kind": "answer"},
        "unknown verifier": {**good, "verifier": "guess"},
        "empty prompt": {**good, "prompt": ""},
        "occurs twice": good,
    }
    rows = [good] + [{"probe_id": str(i), **{k: v for k, v in row.items() if k != "probe_id"}}
                     for i, row in enumerate(list(bad.values())[:-1], 2)] + [good]  # fmt: skip
    path = tmp_path / "probes.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), "no json", "[]"]))
    with pytest.raises(UserError) as caught:
        load_probes(path)
    problems = caught.value.problems
    assert len(problems) == len(bad) + 2
    for said, problem in zip(bad, problems):
        assert said in problem and "line" in problem
    path.write_text("\n")
    with pytest.raises(UserError, match="no probes"):
        load_probes(path)
    with pytest.raises(UserError, match="not found"):
        load_probes(tmp_path / "absent.jsonl")
