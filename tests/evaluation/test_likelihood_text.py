"""Nats and bits per byte: every token once, with the context stated; against a plain float64 loop."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.evaluation.likelihood import answers_nll, solutions_nll, text_names, text_nll, text_rows, windows
from distill.models.chat import prompt_ids
from distill.models.load import load_model, load_tokenizer
from distill.storage import read_json
from distill.tasks.corpus import documents as read_documents


@given(length=st.integers(1, 200), window=st.integers(2, 40), data=st.data())
def test_every_token_is_scored_once_with_enough_context(length, window, data):
    stride = data.draw(st.integers(1, max(1, window // 2)))
    tokens = list(range(1, length + 1))
    passes = windows(tokens, 0, window, stride)
    assert [t for _, scored in passes for t in scored] == tokens
    for number, (context, scored) in enumerate(passes):
        together = context + scored
        assert context and len(together) <= window
        assert together == list(range(together[0], together[0] + len(together)))
        if number:
            assert len(scored) <= stride and len(context) == window - len(scored)


def test_nats_are_the_definition(hub):
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    documents = ["Ein Text, der länger ist als das Fenster.", "ab"]
    found = text_nll(model, tokenizer, documents, window=16)
    nats, tokens = [], 0
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        total = 0.0
        for context, scored in windows(ids, tokenizer.eos_token_id, 16, 8):
            with torch.no_grad():
                logs = model(torch.tensor([context + scored])).logits[0].double().log_softmax(-1)
            total -= sum(float(logs[len(context) - 1 + i, t]) for i, t in enumerate(scored))
        nats.append(total)
        tokens += len(ids)
    size = sum(len(d.encode()) for d in documents)
    assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, size, 2)
    assert found["nll_per_token"] == pytest.approx(sum(nats) / tokens, rel=1e-5)
    assert found["nll_per_byte"] == pytest.approx(sum(nats) / size, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / size / math.log(2), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-4)
    assert (found["window"], found["stride"], found["not_finite"]) == (16, 8, 0)


def test_one_window_is_the_library_s_own_loss(hub):
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("one short text")["input_ids"]]])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    found = text_nll(model, tokenizer, ["one short text"], window=10_000)
    assert found["nll_per_token"] == pytest.approx(loss, rel=1e-5) and found["window"] == 512


def test_a_document_begins_with_the_first_token_of_texts(hub):
    """Where the tokenizer has one; else with the end of the text before."""
    model, tokenizer = load_model(hub["llama"]), load_tokenizer(hub["llama"])
    assert text_rows(model, tokenizer, ["ab"], 16)[0][0][0] == [tokenizer.eos_token_id]
    tokenizer.bos_token = "<|im_start|>"
    assert tokenizer.bos_token_id != tokenizer.eos_token_id
    assert text_rows(model, tokenizer, ["ab"], 16)[0][0][0] == [tokenizer.bos_token_id]
    one, two = (text_rows(model, tokenizer, texts, 16) for texts in (["a" * 40], ["a" * 40, "b" * 10]))
    assert one[1] == list(range(len(one[0]))) and len(one[0]) > 2, "one text: its passes are the units"
    assert two[1] == [0] * len(one[0]) + [1]


def test_batches_do_not_change_the_number(hub):
    model, tokenizer = load_model(hub["qwen3_moe"], "fp32"), load_tokenizer(hub["qwen3_moe"])
    documents = ["x" * 90, "some words " * 9, "y"]
    one, many = (text_nll(model, tokenizer, documents, 32, batch_size=b)["nll_per_token"] for b in (1, 16))
    assert one == pytest.approx(many, rel=1e-5)


def test_non_finite_tokens_are_counted_and_no_per_byte_number_pretends(hub):
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("b")["input_ids"][0]] = math.nan
    found = text_nll(model, tokenizer, ["aaab", "aa"], window=64)
    assert found["not_finite"] == 0, "the last token is predicted, not read"
    found = text_nll(model, tokenizer, ["aabaa", "aa"], window=64)
    # All five: attention multiplies the NaN by a weight of 0 for earlier tokens, which is NaN again.
    assert found["not_finite"] == 5 and found["tokens"] == 2
    assert found["nll_per_byte"] is None and np.isfinite(found["nll_per_token"])


def test_answers_of_another_model(hub, monkeypatch):
    """The very tokens for the same vocabulary, the text otherwise; both end with the end token."""
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    problems = [{"messages": [{"role": "user", "content": q}]} for q in ("1+1?", "again?", "cut?")]
    ids = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in ("two", "zwölf", "n")]
    answers = [
        {"text": t, "completion_ids": i, "finish_reason": r}
        for t, i, r in zip(("two", "zwölf", "n"), ids, ("stop", "stop", "length"))
    ]
    same = answers_nll(model, tokenizer, problems, answers, True, 10)
    text = answers_nll(model, tokenizer, problems, answers, False, 10)
    assert same == text and same["documents"] == 2 and same["window"] is None
    assert same["tokens"] == 4 + 7 and same["bytes"] == 3 + 6
    total = 0.0
    for p, completion in list(zip(problems, ids))[:2]:
        prompt = prompt_ids(tokenizer, p["messages"])
        with torch.no_grad():
            logs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        total -= sum(float(logs[len(prompt) - 1 + i, t]) for i, t in enumerate(completion))
    assert same["nll_per_token"] == pytest.approx(total / 11, rel=1e-5)
    assert answers_nll(model, tokenizer, problems, answers, True, 1)["documents"] == 1
    whole = [len(prompt_ids(tokenizer, p["messages"])) + len(i) for p, i in zip(problems, ids)]
    for room, fitting in ((max(whole[:2]), 2), (max(whole[:2]) - 1, 1)):
        monkeypatch.setattr(model.config, "max_position_embeddings", room)
        fits = answers_nll(model, tokenizer, problems, answers, True, 10)
        assert fits["documents"] == fitting, "prompt and answer together have to fit"
    assert answers_nll(model, tokenizer, problems[2:], answers[2:], True, 1) is None


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    assert read_documents(str(tmp_path / "a.txt")) == ["one\ntwo"]
    assert read_documents(str(tmp_path / "b.jsonl")) == ["x", "y"]
    bad = {
        "c.md": "x",
        "empty.txt": " \n",
        "no.jsonl": '{"txt": 1}',
        "num.jsonl": '{"text": 1}',
        "bad.jsonl": "{",
    }
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="--text"):
            read_documents(str(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        read_documents(str(tmp_path / "missing.txt"))
    assert text_names(["x/a.txt", "b.txt"]) == ["a.txt", "b.txt"]
    assert text_names(["x/a.txt", "y/a.txt"]) == ["x/a.txt", "y/a.txt"]


AS_IT_IS = ["a\r\nb\n", "a\u2028b\x85c\x0bd\x0c", "e\u0301 \ufeff", " \n x\t", "a\rb"]


@pytest.mark.parametrize("text", AS_IT_IS)
def test_documents_are_the_bytes_of_the_file(tmp_path, text, hub):
    """Line ends included, and no character of a text ends a line of JSONL; only a byte-order mark goes."""
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(mark + text.encode())
        assert read_documents(str(tmp_path / "a.txt")) == [text]
        lines = [json.dumps({"text": t}, ensure_ascii=False) for t in (text, "b")]
        (tmp_path / "b.jsonl").write_bytes(mark + "\r\n".join(lines).encode())
        assert read_documents(str(tmp_path / "b.jsonl")) == [text, "b"]
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    found = text_nll(model, tokenizer, read_documents(str(tmp_path / "a.txt")), window=64)
    assert found["bytes"] == len(text.encode())


@pytest.mark.parametrize(
    "name, raw, problem",
    [
        ("a.txt", "caf\u00e9".encode("latin1"), "line 1: not UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-16"), "UTF-16"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "' + "\u00e9".encode("latin1") + b'"}', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 1e5}', "line 3: no object with `text`"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "line 2: no object"),
        ("a.jsonl", b'{"text": "x"}\n["x"]', "line 2: no object"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: half of a surrogate pair"),
    ],
)
def test_unreadable_texts_are_refused_with_their_line(tmp_path, name, raw, problem):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as caught:
        read_documents(str(tmp_path / name))
    (line,) = caught.value.problems
    assert problem in line and name in line and "\n" not in line


def test_on_the_command_line(run_cli, hub, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "hello " * 20}))
    arguments = (
        "--text",
        tmp_path / "t.jsonl",
        "--tasks",
        "easy",
        "--problems",
        "2",
        "--max-new-tokens",
        "2",
    )
    out = tmp_path / "out"
    code, _, err = run_cli("evaluate", hub["llama"], *arguments, "--teacher", hub["plain"], "--out", out)
    assert code == 0, err
    models = read_json(out / "metrics.json")["models"]
    assert models["llama"]["text"]["t.jsonl"]["bytes"] == 120
    assert models["llama"]["text"]["t.jsonl"]["tokens"] == models["teacher"]["text"]["t.jsonl"]["tokens"]
    code, _, err = run_cli(
        "evaluate", hub["llama"], "--text", tmp_path / "missing.txt", "--out", tmp_path / "no"
    )
    assert code == 2 and "missing.txt" in err


def test_worked_solutions_are_read_problem_by_problem(hub):
    """The first of each level, after their questions, end token included; every answer keeps its own nats."""
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    problems = [
        {
            "prompt_id": f"p{i}",
            "level": level,
            "messages": [{"role": "user", "content": f"{i}+1?"}],
            "solution": text,
        }
        for i, (level, text) in enumerate(
            [("easy", "one"), ("easy", "no"), ("hard", "three"), ("easy", "left out")]
        )
    ]
    answers = [{"prompt_id": p["prompt_id"], "sample_idx": s} for p in problems for s in (0, 1)]
    found = solutions_nll(model, tokenizer, problems, answers, 2)
    assert {level: score["documents"] for level, score in found.items()} == {"easy": 2, "hard": 1}
    kept = {a["prompt_id"]: a for a in answers if "solution_nats" in a}
    assert set(kept) == {"p0", "p1", "p2"} and all(a["sample_idx"] == 0 for a in kept.values())
    for problem in problems[:3]:
        prompt = prompt_ids(tokenizer, problem["messages"])
        ids = [*tokenizer(problem["solution"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logs = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        nats = -sum(float(logs[len(prompt) - 1 + i, t]) for i, t in enumerate(ids))
        assert kept[problem["prompt_id"]]["solution_nats"] == pytest.approx(nats, rel=1e-5)
        assert kept[problem["prompt_id"]]["solution_tokens"] == len(ids)
    easy = [kept["p0"], kept["p1"]]
    mean = sum(a["solution_nats"] for a in easy) / sum(a["solution_tokens"] for a in easy)
    assert found["easy"]["nll_per_token"] == pytest.approx(mean)
    assert solutions_nll(model, tokenizer, [{**problems[0], "solution": None}], answers, 2) == {}
