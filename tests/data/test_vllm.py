"""Signals of a served teacher are those of the same teacher here, and what a server gets wrong is never stored."""

import importlib.util
import itertools
import json

import numpy as np
import pytest

if importlib.util.find_spec("openai") is None:
    pytest.skip('needs pip install -e ".[endpoint]"', allow_module_level=True)

from logprob_server import LogprobServer

from distill.data.teachers import BadReply
from distill.data.vllm import read_top_k
from distill.models.load import load_model
from distill.storage import read_rows


def said(question: str) -> str:
    """An answer that does not depend on the model: its sampled bytes would be no text."""
    return f"<think>{len(question)}</think>{sum(map(ord, question)) % 97}"


@pytest.fixture
def prompts(tmp_path):
    """A file of questions, and the same with answers."""
    questions = [f"what is {i} and {i * i}?" for i in range(14)]
    plain, answered = tmp_path / "plain.jsonl", tmp_path / "answered.jsonl"
    plain.write_text("".join(json.dumps({"prompt": q, "answer": "1"}) + "\n" for q in questions))
    answered.write_text(
        "".join(json.dumps({"prompt": q, "answer": "1", "said": said(q)}) + "\n" for q in questions)
    )
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "is anything held out?", "answer": "1"}) + "\n")
    return plain, answered


OPTIONS = [
    "generate.samples=1", "teacher.terms={acknowledged: a test}", "generate.part_size=4",
    "generate.signal={kind: top_k, k: 6, bits: 32}",
    "train.objectives=[{name: sparse_forward_kl, tail: tail_bucket}]", "control.enabled=false", "filter.min_tokens=1",
]  # fmt: skip


def read_from(file) -> list[str]:
    return [f"prompts.source={file}", f"evaluate.source={file.with_name('held_out.jsonl')}"]


def losses(run_dir) -> list[float]:
    lines = (run_dir / "student" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def through(run_cli, path, run_dir, *options: str):
    for command in ("generate", "filter", "train"):
        code, _, err = run_cli(command, path, *OPTIONS, *options)
        assert code == 0, err
    return {row["prompt_id"]: row for row in read_rows(run_dir / "generations")}


def test_a_served_teacher_leaves_the_signals_of_a_local_one(make_recipe, run_cli, hub, prompts):
    """The same texts scored here and by a server; then a student on either reaches the same loss."""
    plain, answered = prompts
    path, here = make_recipe(student="qwen3_moe", name="here")
    local = through(
        run_cli,
        path,
        here,
        *read_from(answered),
        "prompts.completion_column=said",
    )
    path, there = make_recipe(student="qwen3_moe", name="there")
    with LogprobServer(load_model(hub["qwen3_moe"]), said) as server:
        endpoint = f"{{base_url: '{server.base_url}', api_key_env: null, tokenizer: {hub['qwen3_moe']}}}"
        served = through(
            run_cli,
            path,
            there,
            *read_from(plain),
            f"teacher.endpoint={endpoint}",
        )
        assert server.scored == 15, "each answer once, and a short text before any of them"
    assert local.keys() == served.keys()
    for key, mine in local.items():
        theirs = served[key]
        assert (
            mine["prompt_ids"] == theirs["prompt_ids"] and mine["completion_ids"] == theirs["completion_ids"]
        )
        assert mine["signal_ids"] == theirs["signal_ids"]
        values = [np.frombuffer(row["signal_values"], np.float32) for row in (mine, theirs)]
        np.testing.assert_allclose(*values, atol=2e-5)
        np.testing.assert_allclose(mine["logprobs"], theirs["logprobs"], atol=2e-5)
    assert losses(there) == pytest.approx(losses(here), abs=1e-4)


WRONG = [
    (lambda _tables: None, "gives no prompt_logprobs"),
    (lambda tables: [t and dict(list(t.items())[:3]) for t in tables], "raise its --max-logprobs"),
    (lambda tables: tables[:-1], "another number of tokens"),
    (lambda tables: [t and {i: {"logprob": 0.5, "rank": 1} for i in t} for t in tables], "above 0"),
]


def generate(run_cli, hub, path, file, **server) -> tuple[int, str, int]:
    """(exit code, errors, questions answered) of `generate` against such a server."""
    asked = []
    with LogprobServer(
        load_model(hub["qwen3_moe"]), lambda q: asked.append(q) or said(q), **server
    ) as running:
        endpoint = f"{{base_url: '{running.base_url}', api_key_env: null, tokenizer: {hub['qwen3_moe']}}}"
        code, _, err = run_cli("generate", path, *OPTIONS, *read_from(file), f"teacher.endpoint={endpoint}")
    return code, err, len(asked)


@pytest.mark.parametrize("broken, message", WRONG)
def test_what_a_server_gets_wrong_is_told_before_an_answer_is_paid_for(
    make_recipe, run_cli, hub, prompts, broken, message
):
    path, run_dir = make_recipe(student="qwen3_moe")
    code, err, asked = generate(run_cli, hub, path, prompts[0], broken=broken)
    assert code == 2 and message in err and asked == 0 and not (run_dir / "generations").exists()


def test_more_tokens_than_the_server_names_are_told_with_the_fix(make_recipe, run_cli, hub, prompts):
    path, _ = make_recipe(student="qwen3_moe")
    code, err, asked = generate(run_cli, hub, path, prompts[0], most=5)
    assert code == 2 and asked == 0
    assert (
        "greater than max allowed: 5" in err and "Lower generate.signal.k" in err and "--max-logprobs" in err
    )


@pytest.mark.parametrize("broken, message", WRONG)
def test_what_a_server_gets_wrong_later_is_a_failed_row(make_recipe, run_cli, hub, prompts, broken, message):
    path, run_dir = make_recipe(student="qwen3_moe")
    replies = itertools.count()
    generate(run_cli, hub, path, prompts[0], broken=lambda t: broken(t) if next(replies) else t)
    rows = list(read_rows(run_dir / "generations"))
    assert rows and all(message in row["error"] and row["signal_ids"] is None for row in rows)


def test_signals_need_the_tokenizer_and_are_top_k(make_recipe, run_cli, hub, prompts):
    path, _ = make_recipe()
    endpoint = "teacher.endpoint={base_url: 'http://127.0.0.1:1/v1', api_key_env: null%s}"
    code, _, err = run_cli("generate", path, *OPTIONS, *read_from(prompts[0]), endpoint % "")
    assert code == 2 and "teacher.endpoint.tokenizer" in err
    known = endpoint % f", tokenizer: {hub['qwen3_moe']}"
    sampled = ["generate.signal={kind: sampled, k: 4}", "train.objectives=[{name: sampled_cross_entropy}]"]
    code, _, err = run_cli(
        "generate",
        path,
        *OPTIONS,
        *sampled,
        *read_from(prompts[0]),
        known,
    )
    assert code == 2 and "kind=top_k" in err


def test_the_table_is_read_by_rank_and_the_own_token_apart():
    table = {
        "7": {"logprob": -0.5, "rank": 1},
        "3": {"logprob": -4.0, "rank": 9},
        "5": {"logprob": -1.0, "rank": 2},
    }
    body = json.dumps({"choices": [{"prompt_logprobs": [None, table, table]}]}).encode()
    ids, logprobs, own = read_top_k(body, [1, 7, 3], 1, 2, 10)
    assert (
        ids.tolist() == [[7, 5], [7, 5]] and logprobs.tolist() == [[-0.5, -1.0]] * 2 and own == [-0.5, -4.0]
    )
    with pytest.raises(BadReply, match="another tokenizer"):
        read_top_k(body, [1, 7, 8], 1, 2, 10)
    for wrong in (b"<html>", b'{"choices": []}', b'{"choices": [{"prompt_logprobs": [null, [1]]}]}'):
        with pytest.raises(BadReply):
            read_top_k(wrong, [1, 7], 1, 1, 10)


@pytest.mark.parametrize(
    "table",
    [
        {"7": {"logprob": -0.5, "rank": 1}, "12": {"logprob": -1.0, "rank": 2}},  # no id of the tokenizer
        {"7": {"logprob": -0.5, "rank": 1}, "9" * 40: {"logprob": -1.0, "rank": 2}},
        {"7": {"logprob": -0.5, "rank": 1}, "-3": {"logprob": -1.0, "rank": 2}},
        {"7": {"logprob": -0.5, "rank": 1}, "07": {"logprob": -1.0, "rank": 2}},  # twice
        {"7": {"logprob": "-0.5", "rank": 1}, "3": {"logprob": -1.0, "rank": 2}},
        {"7": {"logprob": -0.5, "rank": True}, "3": {"logprob": -1.0, "rank": 2}},
        {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": float("-inf"), "rank": 2}},
        {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": float("nan"), "rank": 2}},
        {"7": {"logprob": -2.0, "rank": 1}, "3": {"logprob": -1.0, "rank": 2}},  # the second is likelier
        {"7": {"logprob": -0.1, "rank": 1}, "3": {"logprob": -0.1, "rank": 2}},  # 1.8 in all
        {
            "7": {"logprob": -0.5, "rank": 9},
            "3": {"logprob": -0.1, "rank": 1},
        },  # the own token, not the second
        {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": -1.0, "rank": "2"}},
        {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": -1.0}},
        {"7": {"logprob": -0.5, "rank": 1}, "3": -1.0},
        {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": -(10**400), "rank": 2}},
        {"7": {"logprob": -0.5, "rank": 1}, "": {"logprob": -1.0, "rank": 2}},
        {"7": {"logprob": -0.5, "rank": 1}, "3.0": {"logprob": -1.0, "rank": 2}},
        {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": True, "rank": 2}},
        [["7", -0.5]],
        None,
    ],
)
def test_no_field_of_a_table_is_trusted(table):
    body = json.dumps({"choices": [{"prompt_logprobs": [None, table]}]}).encode()
    with pytest.raises(BadReply):
        read_top_k(body, [1, 7], 1, 2, 10)
