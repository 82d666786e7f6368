"""The rules that drop teacher answers: each by hand, in order, counted, and explained."""

import json
import random

import numpy as np
import pytest
from conftest import ROOT

from distill.config.data import Filter
from distill.data.filter_rules import (
    ORDER,
    Candidate,
    HeldOut,
    MinHash,
    Rules,
    identity,
    ngrams,
    script_share,
    words,
)
from distill.errors import UserError
from distill.storage import read_json, read_rows


def candidate(
    text="an answer", prompt_id="p", sample=0, verdict="correct", reason="stop", question="Why?", **new
):
    row = {
        "prompt_id": prompt_id, "sample_idx": sample, "text": text, "verdict": verdict,
        "finish_reason": reason, "error": new.pop("error", None),
    }  # fmt: skip
    prompt = {"prompt_id": prompt_id, "answer": "ref", "messages": [{"role": "user", "content": question}]}
    return Candidate(row, prompt, {"prompt_ids": [1] * 5, "completion_ids": [1] * 4, **new})


def dropped(section: Filter, *candidates: Candidate, guard=None) -> list[str | None]:
    rules = Rules(section, guard)
    return [found and found[0] for found in map(rules.refuse, candidates)]


@pytest.mark.parametrize(
    "settings, bad, rule",
    [
        ({}, {"error": "timeout", "verdict": "error"}, "error"),
        ({}, {"reason": "length", "verdict": "truncated"}, "truncated"),
        ({"finish_reasons": ["stop"]}, {"reason": "content_filter"}, "finish_reason"),
        ({}, {"verdict": "wrong"}, "wrong_answer"),
        ({"min_tokens": 5}, {}, "too_short"),
        ({"max_tokens": 8}, {}, "too_long"),
        ({"min_characters": 10}, {}, "too_few_characters"),
        ({"max_characters": 8}, {}, "too_many_characters"),
        ({"charset": "cjk"}, {}, "charset"),
        ({"charset": "latin"}, {"text": "答案是四"}, "charset"),
    ],
)
def test_one_rule_each(settings, bad, rule):
    assert dropped(Filter(**settings), candidate(**bad)) == [rule]


@pytest.mark.parametrize(
    "settings, good",
    [
        ({}, {"reason": "content_filter"}),
        ({"finish_reasons": ["stop", "length"], "correct_only": False}, {"reason": "length"}),
        ({"correct_only": False}, {"verdict": "wrong"}),
        ({"min_tokens": 4, "max_tokens": 9, "min_characters": 9, "max_characters": 9}, {}),
        ({"charset": "latin"}, {"text": "42 + 3"}),
        ({"charset": "latin", "charset_share": 0.5}, {"text": "abcd 答案"}),
    ],
)
def test_bounds_are_inclusive_and_off_is_off(settings, good):
    assert dropped(Filter(**settings), candidate(**good)) == [None]


def test_the_first_rule_in_order_names_the_drop():
    everything = Filter(min_tokens=9, min_characters=99, charset="cjk")
    everything = everything.model_copy(update={"finish_reasons": ["other"]})
    worst = {"error": "x", "verdict": "wrong", "reason": "length"}
    for expected in ("error", "truncated", "finish_reason", "wrong_answer", "too_short"):
        assert dropped(everything, candidate(**worst)) == [expected]
        worst |= {
            "error": {"error": None},
            "truncated": {"reason": "stop"},
            "wrong_answer": {"verdict": "correct"},
        }.get(expected, {})
        if expected == "finish_reason":
            everything = everything.model_copy(update={"finish_reasons": None})
    assert set(ORDER) <= set(dir(Rules)), "every name is a rule"


def test_cut_off_answers_are_kept_without_an_end_token_and_with_their_signals(make_recipe, run_cli):
    """They had the end token that they never wrote, and no signal: training on sampled signals refused them."""
    keys = [
        "filter.finish_reasons=[stop, length]",
        "filter.correct_only=false",
        "generate.signal={kind: sampled, k: 4}",
    ]
    keys += ["train.objectives=[{name: sampled_cross_entropy}]", "control.enabled=false"]
    path, run_dir = make_recipe()
    for command in ("generate", "filter", "train"):
        code, _, err = run_cli(command, path, *keys)
        assert code == 0, err
    said = {(r["prompt_id"], r["sample_idx"]): r for r in read_rows(run_dir / "generations")}
    kept = [(row, said[row["prompt_id"], row["sample_idx"]]) for row in read_rows(run_dir / "dataset")]
    assert {answer["finish_reason"] for _, answer in kept} == {"stop", "length"}
    for row, answer in kept:
        assert row["signal_ids"] == answer["signal_ids"] and row["signal_ids"]
        if answer["finish_reason"] == "length":
            assert row["completion_ids"] == answer["completion_ids"], (
                "nothing stands behind a text that was cut"
            )
    code, _, err = run_cli("generate", path, *keys, "filter.finish_reasons=[stop]")
    assert code == 2 and "scored" in err, "the rows of another filter would lack their signals"


def test_an_empty_answer_that_was_cut_off_is_no_row():
    kept = Filter(finish_reasons=["stop", "length"], correct_only=False)
    assert dropped(kept, candidate("", reason="length", completion_ids=[])) == ["truncated"]


def test_duplicates_and_the_cap_count_kept_rows_only():
    rows = [candidate("a", verdict="wrong"), candidate("a"), candidate("a"), candidate("a", prompt_id="q"),
            candidate("b"), candidate("c"), candidate("a")]  # fmt: skip
    found = dropped(Filter(max_per_prompt=2), *rows)
    assert found == ["wrong_answer", None, "duplicate", None, None, "per_prompt_cap", "duplicate"]
    assert dropped(Filter(deduplicate=False), *rows) == ["wrong_answer", *[None] * 6]


# ---- near duplicates -------------------------------------------------------------------------------


def jaccard(a: str, b: str) -> float:
    a, b = ngrams(a, 3), ngrams(b, 3)
    return len(a & b) / len(a | b)


def test_minhash_estimates_jaccard():
    """Against exact Jaccard on 200 random pairs: unbiased, error within four standard errors of 128 draws."""
    rng = random.Random(0)
    errors = []
    for _ in range(200):
        base = [f"w{rng.randrange(500)}" for _ in range(60)]
        other = [w if rng.random() < 0.97 else "x" for w in base]
        a, b = " ".join(base), " ".join(other)
        index = MinHash(threshold=0.01)
        index.add(a, "a")
        found = index.nearest(b)
        exact = jaccard(a, b)
        assert abs(found[0] - exact) < 4 * np.sqrt(0.25 / 128)
        errors.append(found[0] - exact)
    assert abs(np.mean(errors)) < 0.01


def test_near_duplicates_are_found_and_others_kept():
    """Every pair at Jaccard 0.9 or more is found at threshold 0.8, none below 0.6."""
    rng = random.Random(1)
    texts = [" ".join(f"w{rng.randrange(2000)}" for _ in range(100)) for _ in range(100)]
    index = MinHash(0.8)
    for i, text in enumerate(texts):
        assert index.nearest(text) is None
        index.add(text, str(i))
    for i, text in enumerate(texts):
        near = text.split()
        near[50] = "changed"
        assert jaccard(text, " ".join(near)) >= 0.9 and index.nearest(" ".join(near))[1] == str(i)
        far = [w if k % 8 else "changed" for k, w in enumerate(near)]
        assert jaccard(text, " ".join(far)) < 0.6 and index.nearest(" ".join(far)) is None
    assert index.nearest("") is None


def test_near_duplicates_look_at_question_and_answer():
    long = "first we add the numbers and then we carry the one to the left"
    rows = [
        candidate(long),
        candidate(long + ".", sample=1),
        candidate(long, prompt_id="q", question="How many apples " * 9),
    ]
    assert dropped(Filter(near_duplicates=0.8), *rows) == [None, "near_duplicate", None]
    rules = Rules(Filter(near_duplicates=0.8))
    assert rules.refuse(rows[0]) is None and "to p sample 0" in rules.refuse(rows[1])[1]
    again = [dropped(Filter(near_duplicates=0.5), *rows) for _ in range(2)]
    assert again[0] == again[1]


def test_words_of_texts_without_spaces():
    assert words("Ａｂ-12, 中国x!") == ["ab", "-", "12", ",", "中", "国", "x", "!"]
    assert ngrams("a b", 3) == {"a b"} and ngrams("", 3) == set()
    assert ngrams("a b c d", 3) == {"a b c", "b c d"}


@pytest.mark.parametrize(
    "text, latin, cjk",
    [
        ("abc", 1, 0),
        ("中文", 0, 1),
        ("abか한", 0.5, 0.5),
        ("12 + 3", 1, 1),
        ("", 1, 1),
        ("Ａé", 1, 0),
        ("дa", 0.5, 0),
    ],
)
def test_script_share(text, latin, cjk):
    assert (script_share(text, "latin"), script_share(text, "cjk")) == (latin, cjk)


# ---- decontamination -------------------------------------------------------------------------------

HELD_OUT = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May."


def test_overlap_by_hand():
    guard = HeldOut([HELD_OUT], n=4)
    assert guard.overlap(HELD_OUT.upper()) == 1.0
    assert guard.overlap("something else entirely with no shared run of words") == 0.0
    assert guard.overlap("she sold half as then") == pytest.approx(1 / 2)  # 2 runs of 4, one of them shared
    assert guard.overlap("April") == 0.0 and HeldOut(["April"], 4).overlap("april") == 1.0
    assert guard.overlap("") == 0.0


def test_contaminated_prompts_are_dropped_with_all_their_answers():
    guard = HeldOut([HELD_OUT], n=4)
    rows = [
        candidate("a", question=HELD_OUT), candidate("b", question=HELD_OUT),
        candidate("a", prompt_id="q", question="How many eggs are in a dozen and a half?"),
    ]  # fmt: skip
    assert dropped(Filter(), *rows, guard=guard) == ["contaminated", "contaminated", None]
    assert dropped(Filter(), *rows) == [None, None, None]
    half = candidate(question="she sold half as then")  # one of its two 4-grams
    assert dropped(Filter(), half, guard=guard) == ["contaminated"], "the share is inclusive"
    assert dropped(Filter(decontaminate_share=0.51), half, guard=guard) == [None]


def test_the_words_of_a_template_do_not_count():
    shared = "Reason step by step, and put your final answer within the box at the end."
    prompt = {"prompt_id": "p", "answer": "1", "question": "6 * 7?",
              "messages": [{"role": "user", "content": f"6 * 7? {shared}"}]}  # fmt: skip
    guard = HeldOut([f"5 * 8? {shared}"], n=4)
    assert Rules(Filter(), guard).contaminated(Candidate({}, prompt, None)) is None
    assert Rules(Filter(), guard).contaminated(Candidate({}, {**prompt, "question": None}, None))


def test_identity_has_only_what_matters():
    plain = identity(Filter(), None)
    assert "held_out" not in plain and not {"charset_share", "decontaminate_ngram"} & set(plain["filter"])
    assert plain == identity(Filter(charset_share=0.5), None), "a rule that is off has no settings"
    guard = HeldOut(["a"], 8)
    assert identity(Filter(), guard)["held_out"] != identity(Filter(), HeldOut(["b"], 8))["held_out"]
    assert identity(Filter(decontaminate_ngram=5), guard)["filter"]["decontaminate_ngram"] == 5


# ---- the stage -------------------------------------------------------------------------------------


def test_every_row_is_kept_or_explained(make_recipe, run_cli):
    path, run_dir = make_recipe("llama", "llama")
    assert run_cli("generate", path)[0] == 0
    code, out, err = run_cli(
        "filter",
        path,
        "--explain",
        "filter.max_per_prompt=1",
        "filter.max_characters=30",
        "filter.max_tokens=60",
    )
    assert code == 0, err
    manifest = read_json(run_dir / "dataset" / "manifest.json")
    counts = manifest["counts"]
    gone = list(read_rows(run_dir / "dataset" / "dropped"))
    kept = list(read_rows(run_dir / "dataset"))
    assert len(kept) + len(gone) == 48 == counts["kept"] + counts["dropped"]
    assert len(kept) == len(list(read_rows(run_dir / "dataset" / "control"))) == counts["rows"]
    assert sum(len(r["completion_ids"]) for r in kept) == counts["tokens"]
    for rule, n in counts["dropped_by_rule"].items():
        assert sum(r["rule"] == rule for r in gone) == n and f"  {rule}: {n}\n" in out + "\n"
    assert out.count("->") == sum(min(3, n) for n in counts["dropped_by_rule"].values())
    assert max(map(len, out.splitlines())) < 250
    code, out, err = run_cli("filter", path, "filter.max_per_prompt=2")
    assert code == 2 and "filter.max_per_prompt: 1 -> 2" in err


def test_decontamination_is_on_for_files(make_recipe, run_cli, tmp_path):
    """Four of six training questions are held out; with the rule off they are trained on."""
    path, run_dir = make_recipe("llama", "llama")
    for name, n in (("train", 6), ("test", 4)):
        rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [f"prompts.source={tmp_path / 'train.jsonl'}", f"evaluate.source={tmp_path / 'test.jsonl'}"]
    keys = [*sources, "generate.max_new_tokens=200", "filter.finish_reasons=[stop,length]"]
    assert run_cli("generate", path, *keys)[0] == 0
    code, out, err = run_cli("filter", path, *keys, "--explain")
    assert code == 0, err
    gone = [r for r in read_rows(run_dir / "dataset" / "dropped") if r["rule"] == "contaminated"]
    assert len(gone) == 8 and all("100% of the prompt's 8-grams" in r["detail"] for r in gone)
    assert "contaminated: 8" in out and "What is 0 + 1?" in out
    code, _, err = run_cli("filter", path, *keys, "filter.decontaminate=false")
    assert code == 2 and "held_out" in err
    assert run_cli("filter", path, *keys, "filter.decontaminate=false", "--redo")[0] == 0
    assert read_json(run_dir / "dataset" / "manifest.json")["counts"]["kept"] == 12


def test_a_control_arm_needs_every_answer(tmp_path):
    """By the stage itself: what is on the hub is not looked at before."""
    from distill.data.filter import _write

    row = {"prompt_id": "p", "sample_idx": 0, "prompt_ids": [1], "completion_ids": [2, 3], "text": "t"}
    prompt = {"messages": [{"role": "user", "content": "q"}], "answer": ""}
    with pytest.raises(UserError, match="1 rows lack it"):
        _write([row], tmp_path / "a", {"p": prompt}, None, control=True)
    assert _write([row], tmp_path / "b", {"p": prompt}, None, control=False)["kept"] == 1


def test_parts_are_written_as_they_fill(tmp_path):
    from distill.data.filter import _Parts
    from distill.storage import DATASET_SCHEMA, parts

    rows = [{"prompt_id": str(i), "sample_idx": 0} for i in range(7)]
    writer = _Parts(tmp_path / "some", DATASET_SCHEMA, size=3)
    for row in rows:
        writer.add(row)
    assert len(parts(tmp_path / "some")) == 2, "full parts are on disk before the end"
    writer.close()
    assert [r["prompt_id"] for r in read_rows(tmp_path / "some")] == [r["prompt_id"] for r in rows]
    _Parts(tmp_path / "none", DATASET_SCHEMA).close()
    assert len(parts(tmp_path / "none")) == 1 and not list(read_rows(tmp_path / "none"))


def test_nothing_left_says_what_dropped_it(make_recipe, run_cli):
    path, _ = make_recipe("llama", "llama")
    assert run_cli("generate", path)[0] == 0
    code, _, err = run_cli("filter", path, "filter.min_characters=9999")
    assert code == 2 and "too_few_characters" in err
    assert UserError.exit_code == 2


def test_answers_that_nothing_can_verify_are_dropped_unless_asked_for():
    """correct_only without a reference: dropped by default; `keep_unverified` keeps them and still judges the rest."""

    def asked(answer: str, verifier: str = "exact", verdict: str = "wrong") -> Candidate:
        made = candidate(verdict=verdict)
        made.prompt.update(answer=answer, verifier=verifier)
        return made

    rows = [asked(""), asked("ref"), asked("ref", verdict="correct"), asked("", "regex:^yes$")]
    assert dropped(Filter(deduplicate=False), *rows) == ["wrong_answer", "wrong_answer", None, "wrong_answer"]
    kept = Filter(keep_unverified=True, deduplicate=False)
    assert dropped(kept, *rows) == [None, "wrong_answer", None, "wrong_answer"], (
        "a pattern needs no reference"
    )
    assert "keep_unverified" not in identity(Filter(), None)["filter"], "older datasets stay valid"
    assert identity(kept, None)["filter"]["keep_unverified"] is True


def test_answers_end_with_the_students_end_token_alone():
    """A teacher of the same vocabulary may end its turns with another special token: not both, one after the other."""
    from transformers import AutoTokenizer

    from distill.data.filter import _completion

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "base")
    end = tokenizer.eos_token_id
    other = next(i for i in tokenizer.all_special_ids if i != end)
    words = tokenizer("12", add_special_tokens=False)["input_ids"]
    for ids in (words, [*words, end], [*words, other], None):
        assert _completion("12", tokenizer, ids) == [*words, end]
    assert _completion("", tokenizer, [other]) == [end] and _completion("", tokenizer, []) == [end]
