"""Answers at real sizes: batches that fit, models that run on, options in words, and what could not be read."""

import itertools
import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config.evaluation import Evaluate
from distill.evaluation import answers
from distill.evaluation.answers import answer_parts, fitting_batch, options_of, problem_prompts, stop_strings
from distill.models.load import load_model, load_tokenizer
from distill.tasks.verify import chosen_option, judge


def test_the_cache_is_counted_before_it_is_made(hub, monkeypatch):
    model, section = load_model(hub["llama"]), Evaluate(max_new_tokens=100, batch_size=64)
    prompts = [[1] * 28] * 64
    assert fitting_batch(model, 258, prompts, section) == 64
    # 2 layers x 2 heads of keys and values x 8 numbers in fp32 a token, twice, and the logits.
    row = 2 * 128 * 2 * 2 * 2 * 8 * 4 + 24 * 258
    monkeypatch.setattr(answers, "free_memory", lambda _device: 2 * 10 * row)
    assert fitting_batch(model, 258, prompts, section) == 10
    monkeypatch.setattr(answers, "free_memory", lambda _device: 1)
    assert fitting_batch(model, 258, prompts, section) == 1


def test_a_tokenizer_reads_the_same_problems_once(hub, monkeypatch):
    tokenizer, read = load_tokenizer(hub["llama"]), []
    problems = [
        {"prompt_id": str(i), "messages": [{"role": "user", "content": f"{i} + 1"}]} for i in range(3)
    ]
    plainly = answers.prompt_ids
    monkeypatch.setattr(answers, "prompt_ids", lambda *a: read.append(a) or plainly(*a))
    first = problem_prompts(tokenizer, problems)
    assert problem_prompts(tokenizer, problems) is first and len(read) == 3
    assert first == [plainly(tokenizer, p["messages"]) for p in problems]
    assert problem_prompts(tokenizer, problems[1:]) == first[1:], "other problems are read anew"
    assert problem_prompts(load_tokenizer(hub["llama"]), problems) == first and len(read) == 8


def test_a_smaller_batch_is_told_and_gives_the_same_answers(hub, tmp_path, run_cli, monkeypatch):
    ask = [
        "evaluate",
        hub["llama"],
        "--tasks",
        "easy",
        "--problems",
        "6",
        "--max-new-tokens",
        "6",
        "--no-speed",
    ]
    assert run_cli(*ask, "--out", str(tmp_path / "a"))[0] == 0
    monkeypatch.setattr(answers, "MOST_ON_CPU", 1)
    code, said, _ = run_cli(*ask, "--out", str(tmp_path / "b"))
    assert code == 0 and "evaluate: 1 answers at a time, not 256" in said
    both = [json.loads((tmp_path / x / "metrics.json").read_text())["models"]["llama"] for x in "ab"]
    assert [m["cost"]["batch_size"] for m in both] == [256, 1]
    assert "prefill_tokens_per_second" not in both[0]["cost"]
    texts = [[r["text"] for r in pq.read_table(tmp_path / x / "answers").to_pylist()] for x in "ab"]
    assert texts[0] == texts[1]


def test_models_without_turns_are_stopped(hub):
    own, none = load_tokenizer(hub["llama"]), load_tokenizer(hub["plain"])
    assert stop_strings(own, Evaluate()) == []
    assert stop_strings(none, Evaluate()) == ["\n\n", "\nUser:"]
    assert stop_strings(none, Evaluate(stop=["."])) == ["."]


def test_an_answer_ends_before_its_stop(hub, tmp_path, run_cli):
    """Whatever the model writes, its second character is made the stop."""
    ask = [
        "evaluate",
        hub["plain"],
        "--tasks",
        "easy",
        "--problems",
        "2",
        "--max-new-tokens",
        "12",
        "--no-speed",
    ]
    code, _, told = run_cli(*ask, "--out", str(tmp_path / "a"))
    assert code == 0 and "so its answers were ended before" in told
    (first, *_) = pq.read_table(tmp_path / "a" / "answers").to_pylist()
    stop = first["text"][4]
    code, _, told = run_cli(*ask, "--stop", stop, "--out", str(tmp_path / "b"))
    assert code == 0 and "so its answers were ended before" not in told
    (second, *_) = pq.read_table(tmp_path / "b" / "answers").to_pylist()
    assert second["text"] == first["text"].partition(stop)[0]
    assert second["finish_reason"] == "stop" and second["tokens"] < first["tokens"]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("The capital of France is Paris.", "correct"),
        ("It is Lyon.", "wrong"),
        ("Paris or Lyon", "no_answer"),
        ("It is not Paris.", "no_answer"),
        ("I do not know.", "no_answer"),
        ("Answer: B", "wrong"),
    ],
)
def test_an_option_in_words_is_chosen(answer, verdict):
    assert judge("choice", answer, "A", options=["Paris", "Lyon", "Nice"]) == verdict


def test_an_option_within_another_is_not_chosen():
    assert chosen_option("in Paris, Texas", ["Paris", "Paris, Texas"]) == "B"


def test_options_are_read_from_the_prompt():
    def problem(text, **more):
        return {"verifier": "choice", "messages": [{"role": "user", "content": text}], **more}

    assert options_of(problem("Which?\nA. Paris\n(B) Lyon\nC) Nice")) == ["Paris", "Lyon", "Nice"]
    assert options_of(problem("Which?", choices=["x", "y"])) == ["x", "y"]
    assert options_of(problem("Which city is A. great?")) is None
    assert options_of({**problem("A. x\nB. y"), "verifier": "exact"}) is None


def test_answers_that_could_not_be_read_are_told(hub, tmp_path, run_cli):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Which?\\nA. Paris\\nB. Lyon", "answer": "A"}\n' * 5)
    code, _, told = run_cli(
        "evaluate", hub["plain"], "--tasks", str(file), "prompts.verifier=choice", "--limit", "3", "--stop", "Z",
        "--max-new-tokens", "200", "--no-speed", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, told
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["models"]["plain"]["tasks"]["mine"]["n"] == 3  # --limit is of files too
    rows = pq.read_table(tmp_path / "out" / "answers").to_pylist()
    unread = sum(row["verdict"] == "no_answer" for row in rows)
    assert (f"{unread} of 3 answers to mine state nothing" in told) == (unread > 0)


def test_a_folder_of_another_evaluation_is_kept(hub, tmp_path, run_cli):
    ask = [
        "evaluate",
        hub["llama"],
        "--tasks",
        "easy",
        "--max-new-tokens",
        "2",
        "--no-speed",
        "--out",
        str(tmp_path / "a"),
    ]
    assert run_cli(*ask, "--problems", "2")[0] == 0
    code, _, told = run_cli(*ask, "--problems", "3")
    assert code == 2 and "give another --out" in told and "run_dir" not in told


def test_texts_alone_need_no_answers(hub, tmp_path):
    """As `--harness X` alone: nothing is answered, and the folder is whole."""
    from distill.config.recipe import load_evaluate
    from distill.evaluation.evaluate import evaluate_checkpoints
    from distill.report.dossier import build_dossier
    from distill.report.report import summary_table

    text = tmp_path / "text.txt"
    text.write_text("Some words to read, and some more of them.")
    section = load_evaluate({"levels": {}, "text": [str(text)], "speed": False})
    evaluate_checkpoints({"llama": hub["llama"]}, hub["plain"], tmp_path / "out", section, [])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        metrics["models"]["llama"]["tasks"] == {}
        and metrics["models"]["llama"]["text"]["text.txt"]["tokens"] > 5
    )
    assert metrics["models"]["llama"]["text"]["text.txt"]["teacher"]["forward_kl"] > 0
    assert "text: text.txt" in summary_table(metrics)
    assert build_dossier(tmp_path / "out").is_file()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 256))
def test_parts_have_every_question_once_and_the_longest_first(lengths, batch):
    parts = answer_parts(lengths, batch)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(1 <= len(part) <= batch for part in parts) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(lengths[a] >= lengths[b] for part in parts for a, b in itertools.pairwise(part))


def test_two_parts_are_as_long_as_each_other_unless_padding_costs_more():
    """Two processes wait for the longer one: the long half of these questions took 22 s where the other took 13."""
    one, other = answer_parts([20 + i // 10 for i in range(200)], 128)
    assert len(one) == len(other) == 100
    lengths = [20 + i // 10 for i in range(200)]
    assert abs(sum(lengths[i] for i in one) - sum(lengths[i] for i in other)) <= 20
    far = [1000] * 100 + [10] * 100
    assert [{far[i] for i in part} for part in answer_parts(far, 128)] == [{1000}, {10}]
