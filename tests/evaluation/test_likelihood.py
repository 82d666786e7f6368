"""Multiple choice by likelihood: the three scores against float64 sums over the plain forward pass."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, byte_tokenizer
from tiny_families import model_of
from transformers import PreTrainedConfig

from distill.data import scoring
from distill.data.scoring import logprobs_behind, pieces
from distill.errors import UserError
from distill.evaluation.likelihood import _logprobs, _plain_rows, letters_of, likelihoods, question_of
from distill.models.chat import prompt_ids
from distill.models.load import load_model, load_tokenizer
from distill.storage import read_json

CHOICES = [["Paris", "Rome is longer", "x"], ["no", "yes", "perhaps, perhaps not", "1234"], ["a b", "c"]]


def problem(number: int, choices: list[str] | None, answer: str, level: str = "quiz") -> dict:
    listed = "\n".join(f"{x}. {c}" for x, c in zip("ABCDEF", choices or ["one", "two"]))
    message = {"role": "user", "content": f"Question {number}?\n{listed}"}
    return {"prompt_id": str(number), "messages": [message], "answer": answer, "verifier": "choice"} | {
        "level": level,
        "choices": choices,
    }


def by_hand(model, tokenizer, asked: dict, option: str) -> tuple[float, int]:
    """(log p of the option, its tokens), one sequence at a time, in float64."""
    prompt = prompt_ids(tokenizer, asked["messages"])
    ids = tokenizer(option, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + i, t]) for i, t in enumerate(ids)), len(ids)


def test_scores_are_the_definitions(hub):
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    problems = [problem(i, choices, "ABC"[i]) for i, choices in enumerate(CHOICES)]
    found = likelihoods(model, tokenizer, problems, batch_size=2)["quiz"]
    assert [(f["form"], f["options"]) for f in found] == [
        ("chat", "letter"), ("plain", "letter"), ("chat", "text"), ("plain", "text")
    ]  # fmt: skip
    found = [f for f in found if f["form"] == "chat"]
    for score, texts in zip(
        found, (lambda p: [f"Answer: {x}" for x in letters_of(p)], lambda p: p["choices"])
    ):
        assert score["errors"] == 0 and score["mean_options"] == 3
        right = dict.fromkeys(("sum", "per_token", "per_byte", "per_character"), 0)
        for p in problems:
            options = texts(p)
            pairs = [by_hand(model, tokenizer, p, o) for o in options]
            values = {
                "sum": [total for total, _ in pairs],
                "per_token": [total / n for total, n in pairs],
                "per_byte": [total / len(o.encode()) for (total, _), o in zip(pairs, options)],
                "per_character": [total / len(o) for (total, _), o in zip(pairs, options)],
            }
            for name, v in values.items():
                right[name] += "ABCDEF"[v.index(max(v))] == p["answer"]
        for name, count in right.items():
            assert score[name]["accuracy"] == pytest.approx(count / 3) and score[name]["n"] == 3
            assert score[name]["ci95"][0] <= count / 3 <= score[name]["ci95"][1]


def scored(model, tokenizer, asked: dict, options: str = "text", form: str = "chat") -> dict:
    (found,) = [
        f
        for f in likelihoods(model, tokenizer, [asked])["quiz"]
        if (f["form"], f["options"]) == (form, options)
    ]
    return found


PLAIN = {
    "letter": ("Question 7?\nA. yes\nB. nö\nAnswer:", [" A", " B"]),
    "text": ("Question: Question 7?\nAnswer:", [" yes", " nö"]),
}


@pytest.mark.parametrize("options", PLAIN)
def test_the_plain_form_is_the_harness_s_text(hub, options):
    """Without a template, the tokens of context and option as one text; lengths without the blank before it."""
    model, tokenizer = load_model(hub["plain"], "fp32"), load_tokenizer(hub["plain"])
    asked = problem(7, ["yes", "nö"], "A")
    context, texts = PLAIN[options]
    rows = _plain_rows(tokenizer, asked, options)
    assert [tokenizer.decode(before) for before, _, _ in rows] == [context] * 2
    assert [tokenizer.decode(ids) for _, ids, _ in rows] == texts
    assert [text for _, _, text in rows] == [text[1:] for text in texts]
    found = scored(model, tokenizer, asked, options, "plain")
    for name, size in (("sum", lambda t: 1), ("per_character", len), ("per_byte", lambda t: len(t.encode()))):
        values = []
        for text in texts:
            before, ids = (
                tokenizer(context)["input_ids"],
                tokenizer(text, add_special_tokens=False)["input_ids"],
            )
            with torch.no_grad():
                logs = model(torch.tensor([before + ids])).logits[0].double().log_softmax(-1)
            values.append(
                sum(float(logs[len(before) - 1 + i, t]) for i, t in enumerate(ids)) / size(text[1:])
            )
        assert found[name]["accuracy"] == float(values[0] >= values[1]), name


def test_the_question_is_what_was_asked():
    listed = {"choices": ["x", "y"], "messages": [{"role": "user", "content": "Pick one.\nA. x\nB. y"}]}
    assert question_of(listed) == "Pick one."
    assert question_of({**listed, "question": "Which?"}) == "Which?"
    other = {"choices": None, "messages": [{"role": "user", "content": "Pick one.\nA. x\nB. y\n"}]}
    assert question_of(other) == "Pick one.\nA. x\nB. y"


class Flat(torch.nn.Module):
    """A causal LM to whom all tokens are equally likely."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.head = torch.nn.Linear(1, vocabulary, bias=False)
        torch.nn.init.zeros_(self.head.weight)
        self.config = PreTrainedConfig(vocab_size=vocabulary)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.head(torch.ones(*input_ids.shape, 1)))


def test_the_sum_prefers_short_options_and_the_others_do_not():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    text = scored(Flat(len(tokenizer)), tokenizer, problem(0, ["long option", "b", "middle"], "B"))
    assert text["sum"]["accuracy"] == 1.0
    assert text["per_token"]["accuracy"] == text["per_byte"]["accuracy"] == 0.0  # equal: the first is taken


class Skewed(Flat):
    """The same, but for one byte, which is a little less likely than all others."""

    def __init__(self, tokenizer, byte: str, by: float):
        super().__init__(len(tokenizer))
        self.head.weight.data[tokenizer(byte, add_special_tokens=False)["input_ids"][0]] = -by


def text_scores(model, tokenizer, choices: list[str], answer: str) -> dict[str, float]:
    tokenizer.pad_token = tokenizer.eos_token
    text = scored(model, tokenizer, problem(0, choices, answer))
    return {name: text[name]["accuracy"] for name in ("sum", "per_token", "per_byte")}


def test_per_byte_counts_bytes_and_not_characters():
    """One token a byte, and b costs 0.1 nats more: an option of two-byte letters is the likelier one by the byte,
    and the less likely one by the letter."""
    tokenizer = byte_tokenizer(CHATML)
    found = text_scores(Skewed(tokenizer, "b", 0.1), tokenizer, ["bb", "éé"], "B")
    assert found == {"sum": 0.0, "per_token": 1.0, "per_byte": 1.0}
    assert text_scores(Skewed(tokenizer, "b", 0.1), tokenizer, ["éé", "bb"], "B")["per_byte"] == 0.0


def test_of_equal_options_the_first_is_taken():
    tokenizer = byte_tokenizer(CHATML)
    flat = Flat(len(tokenizer))
    for answer, right in (("A", 1.0), ("B", 0.0), ("C", 0.0)):
        assert set(text_scores(flat, tokenizer, ["abc", "xyz", "ijk"], answer).values()) == {right}, answer
    letter = scored(flat, tokenizer, problem(0, ["abc", "xyz"], "A"), "letter")
    assert letter["sum"]["accuracy"] == letter["per_byte"]["accuracy"] == 1.0


def test_non_finite_options_are_errors(hub):
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    for found in likelihoods(model, tokenizer, [problem(0, CHOICES[0], "A")])["quiz"]:
        assert found["errors"] == 1 and found["sum"]["accuracy"] == 0


def test_letters_are_read_off_the_prompt_where_no_choices_are_given():
    assert letters_of(problem(0, None, "A")) == "AB"
    assert letters_of(problem(0, CHOICES[1], "A")) == "ABCD"
    bare = problem(0, None, "A") | {"messages": [{"role": "user", "content": "Which?\nB. only"}]}
    with pytest.raises(UserError, match="offers no choices"):
        letters_of(bare)


def test_on_the_command_line(run_cli, hub, tmp_path):
    rows = [
        {"question": f"Pick {i}", "choices": choices, "answer": 1, "subject": "s"}
        for i, choices in enumerate(CHOICES)
    ]
    path = tmp_path / "mmlu.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    arguments = ("--tasks", f"mmlu:{path}", "--likelihood", "--max-new-tokens", "3", "--out", out)
    code, _, err = run_cli("evaluate", hub["llama"], *arguments)
    assert code == 0, err
    metrics = read_json(out / "metrics.json")["models"]["llama"]
    assert [s["options"] for s in metrics["likelihood"]["mmlu"]] == ["letter", "letter", "text", "text"]
    assert [s["form"] for s in metrics["likelihood"]["mmlu"]] == ["chat", "plain", "chat", "plain"]
    assert metrics["likelihood"]["mmlu"][1]["sum"]["n"] == metrics["tasks"]["mmlu"]["n"] == 3
    code, _, err = run_cli(
        "evaluate", hub["llama"], "--tasks", "easy", "--likelihood", "--out", tmp_path / "no"
    )
    assert code == 2 and "multiple-choice" in err


ROWS = [  # (a question, its options): lengths that pad each other, options of one token, one question alone
    ([5, 9, 3, 40, 41, 42, 43], [[7], [8, 9], [10, 11, 12, 13, 14, 15]]),
    ([20, 21], [[22, 23, 24], [25]]),
    ([30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41], [[50, 51, 52, 53, 54], [60, 61], [62, 63, 64]]),
    ([70], [[71, 72]]),
]
CONTEXTS = [context for context, options in ROWS for _ in options]
OPTIONS = [option for _, options in ROWS for option in options]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3", "mamba"])
def test_options_behind_a_question_read_once_are_those_of_whole_rows(family):
    """Against one sequence at a time in float64 sums; gemma3_text has windows of 4 tokens, mamba no cache to copy."""
    small = {"num_hidden_layers": 2, "state_size": 4} if family == "mamba" else {}
    model = model_of(family, **small)
    read = []
    handle = model.register_forward_pre_hook(
        lambda _m, _args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = logprobs_behind(model, CONTEXTS, OPTIONS, pad_id=0, vocabulary=96)
    handle.remove()
    assert [len(row) for row in found] == [len(option) for option in OPTIONS]
    for context, option, row in zip(CONTEXTS, OPTIONS, found):
        with torch.no_grad():
            logs = model(torch.tensor([context + option])).logits[0].double().log_softmax(-1)
        wanted = [float(logs[len(context) - 1 + i, t]) for i, t in enumerate(option)]
        assert row == pytest.approx(wanted, abs=1e-5)
    shared = (
        4 * 12 + 7 * 5
    )  # four questions, and the seven options of several tokens but their last, in columns
    assert sum(read) == (9 * 16 if family == "mamba" else shared)


def test_contexts_are_copied_for_as_many_options_as_fit(monkeypatch):
    """At most so many bytes of keys and values: one option at a time gives the same numbers."""
    model = model_of("gemma3_text")
    together = logprobs_behind(model, CONTEXTS, OPTIONS, pad_id=0, vocabulary=96)
    monkeypatch.setattr(scoring, "COPIED", 1)
    rows = []
    model.register_forward_pre_hook(
        lambda _m, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    alone = logprobs_behind(model, CONTEXTS, OPTIONS, pad_id=0, vocabulary=96)
    assert rows == [4] + [1] * 7
    for one, many in zip(alone, together):
        assert one == pytest.approx(many, abs=1e-5)


def test_pieces_keep_the_options_of_a_question_together():
    found = pieces(CONTEXTS, OPTIONS, 4, 96)
    assert sorted(i for piece in found for i in piece) == list(range(len(OPTIONS)))
    assert [{tuple(CONTEXTS[i]) for i in piece} for piece in found] == [{(70,), (20, 21)}, {tuple(ROWS[0][0])},
                                                                      {tuple(ROWS[2][0])}]  # fmt: skip
    model = model_of("llama")
    rows = (model, SimpleNamespace(pad_token_id=0), CONTEXTS, OPTIONS)
    for one, many in zip(_logprobs(*rows, 3), _logprobs(*rows, 64)):
        assert one == pytest.approx(many, abs=1e-5)


def test_every_prompt_is_read_once_for_letters_and_words(hub):
    """Two problems: their chat prompts, and the two texts of the plain form, whatever the number of options."""
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    problems = [problem(i, choices, "A") for i, choices in enumerate(CHOICES[:2])]
    rows = []
    handle = model.register_forward_pre_hook(
        lambda _m, _args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    likelihoods(model, tokenizer, problems)
    handle.remove()
    contexts = {tuple(prompt_ids(tokenizer, p["messages"])) for p in problems}
    contexts |= {
        tuple(before)
        for p in problems
        for kind in ("letter", "text")
        for before, _, _ in _plain_rows(tokenizer, p, kind)
    }
    read = [shape[0] for shape in rows if shape[0] > 1]
    # Letters and words of seven options in both forms, but for `x`, which is one token: the prompt says it.
    assert read == [len(contexts), 4 * 7 - 1]
