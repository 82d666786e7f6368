"""A teacher behind a server: whatever the server does, every question has one answer or one reason."""

import importlib.util
import json
import os
import socket
import subprocess
import time
from collections import Counter
from email.utils import formatdate

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("openai") is None:
    pytest.skip('needs pip install -e ".[endpoint]"', allow_module_level=True)

from conftest import PYTHON, ROOT
from misbehaving_server import ODD_LOGPROBS, MisbehavingServer, completion, good_text
from warm import Started, ran

from distill.config.data import Endpoint
from distill.config.data import TeacherSection as TeacherSection
from distill.config.recipe import load_recipe
from distill.data.endpoint import BadReply, EndpointTeacher, asked_wait, one_line, read_reply
from distill.data.teachers import Question
from distill.errors import RunError, UserError
from distill.models.decode import Sampling
from distill.models.load import load_tokenizer
from distill.storage import GENERATION_SCHEMA, read_json, read_rows

KEY = "planted-secret-0123456789abcdef"
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=20)


@pytest.fixture(autouse=True)
def planted_key(monkeypatch):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint(server, **changes) -> dict:
    base = {"base_url": server.base_url, "api_key_env": "TEST_ENDPOINT_KEY", "concurrency": 4, "timeout": 10,
            "retries": 2, "backoff": 0.01}  # fmt: skip
    return base | changes


def ask(server, questions, sampling=SAMPLING, heard=None, **changes):
    teacher = EndpointTeacher(TeacherSection(model="the-model", endpoint=endpoint(server, **changes)))
    asked = [Question([{"role": "user", "content": text}], (0, text, 0)) for text in questions]
    heard = [] if heard is None else heard
    teacher.open()
    answers = teacher.answer(asked, sampling, heard.append)
    assert len(heard) == len(answers) and {id(a) for a in heard} == {id(a) for a in answers}
    return answers


def names(count):
    return [f"q{i}" for i in range(count)]


# What a server may do, and what the row of a question that got nothing else says.
MISDEEDS = {
    "500": "HTTP 500: told to say 500",
    "503": "HTTP 503: told to say 503",
    "408": "HTTP 408: told to say 408",
    "409": "HTTP 409: told to say 409",
    "hang": "no answer within 0.25 s",
    "drip": "no answer within 0.25 s",
    "cut": "the connection failed (RemoteProtocolError)",
    "reset": "the connection failed (RemoteProtocolError)",
    "cut_quietly": "the answer is not JSON",
    "not_json": "the answer is not JSON",
    "page": "the answer is not JSON",
    "no_choice": "the answer has no choice: upstream gave up",
    "null": "the answer has no text",
    "latin1": "the answer is not UTF-8",
    "surrogate": "the answer has half of a surrogate pair",
    "abort": "the answer ended with finish_reason 'abort'",
    "endless": "the answer is longer than 2,117,632 bytes",
    "endless_error": "the answer is longer than 2,117,632 bytes",
    "bomb": "the answer is longer than 2,117,632 bytes",
    "error_bomb": "the answer is longer than 2,117,632 bytes",
    "two_bombs": "the answer is packed as 'gzip, gzip'",
    "brotli": "the answer is packed as 'br'",
    "no_gzip": "the answer is not packed as it says",
    "deep": "the answer is not JSON",
    "digits": "the answer is not JSON",
    "array": "the answer has no choice",
    "choice_text": "the answer has no choice",
    "message_list": "the answer has no text",
    "reason_list": "the answer ended with finish_reason ['stop']",
    "parts": "the answer has no text",
    "empty": "the answer is not JSON",
    "no_content": "the answer is not JSON",
    "charset": "the reply cannot be read",
    "error_list": "HTTP 500",
    "odd_wait": "HTTP 503",
}
SLOW = {"hang", "drip"}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_misdeed_is_tried_again_and_nothing_is_lost_or_twice(misdeed):
    questions = names(6)
    with MisbehavingServer(lambda _, attempt: misdeed if attempt == 0 else "ok") as server:
        answers = ask(server, questions, timeout=0.25 if misdeed in SLOW else 10)
    seeds = {question: seed for question, seed, _ in server.requests}
    assert [a.text for a in answers] == [good_text(q, seeds[q]) for q in questions]
    assert {(a.error, a.finish_reason, a.prompt_tokens, a.completion_tokens) for a in answers} == {
        (None, "stop", 7, 3)
    }
    asked = Counter((q, seed) for q, seed, _ in server.requests)
    assert len(asked) == 6 and set(asked.values()) == {2}, "the same seed again, and not once more"


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_what_keeps_failing_is_one_row_with_its_reason(misdeed):
    with MisbehavingServer(lambda question, _: misdeed if question == "q2" else "ok") as server:
        answers = ask(server, names(5), timeout=0.25 if misdeed in SLOW else 10)
    assert [a.error is None for a in answers] == [True, True, False, True, True]
    bad = answers[2]
    assert bad.error.startswith(MISDEEDS[misdeed]) and bad.finish_reason == "error" and bad.text == ""
    assert Counter(q for q, _, _ in server.requests) == {"q0": 1, "q1": 1, "q2": 3, "q3": 1, "q4": 1}


@pytest.mark.parametrize("name", ODD_LOGPROBS)
def test_odd_logprobs_cost_themselves_alone(name, capsys):
    with MisbehavingServer(lambda question, _: f"odd:{name}" if question == "q1" else "ok") as server:
        answers = ask(server, names(3), top_logprobs=1)
    assert [a.text.split(" with ")[0] for a in answers] == [f"answer to q{i}" for i in range(3)]
    assert all(a.logprobs == [] and a.error is None for a in answers) and len(server.requests) == 3
    assert capsys.readouterr().err.count("no usable logprobs") == 1


def test_an_answer_that_is_packed_unasked_is_read():
    with MisbehavingServer(lambda *_: "packed") as server:
        answers = ask(server, names(2))
    assert [a.text.split(" with ")[0] for a in answers] == ["answer to q0", "answer to q1"]


def test_nothing_is_sent_to_another_host():
    with MisbehavingServer(lambda *_: "ok") as other:
        with MisbehavingServer(lambda question, _: "elsewhere" if question == "q4" else "ok") as server:
            server.elsewhere = other.base_url
            answers = ask(server, names(6), concurrency=1)
        assert [a.error is None for a in answers] == [True, True, True, True, False, True]
        assert answers[4].error.startswith(f"the server redirects to {other.base_url}")
        with MisbehavingServer(lambda *_: "elsewhere") as server:
            server.elsewhere = other.base_url
            with pytest.raises(RunError, match=r"redirects to .*teacher\.endpoint\.base_url"):
                ask(server, names(6))
        with MisbehavingServer(lambda *_: "no_address") as server, pytest.raises(RunError, match="redirects"):
            ask(server, names(2))
        assert other.requests == []


def test_redirects_in_a_circle_end():
    with MisbehavingServer(lambda *_: "round") as server:
        answers = ask(server, ["q"], retries=0)
    assert "TooManyRedirects" in answers[0].error and len(server.requests) < 10


def test_a_redirect_that_stays_is_followed():
    with MisbehavingServer(lambda *_: "aside") as server:
        answers = ask(server, names(2), retries=0)
    assert [a.text.split(" with ")[0] for a in answers] == ["answer to q0", "answer to q1"]


def test_what_another_try_cannot_mend_is_not_tried_again():
    told = {"q0": "400", "q1": "422", "q2": "filtered", "q3": "tomorrow"}
    with MisbehavingServer(lambda question, _: told.get(question, "ok")) as server:
        answers = ask(server, names(5))
    assert [a.error for a in answers] == [
        "HTTP 400: told to say 400",
        "HTTP 422: told to say 422",
        "content_filter",
        "HTTP 429: daily quota; the server asks to wait 86,400 s",
        None,
    ]
    assert len(server.requests) == 5


def test_retry_after_is_waited_for():
    with MisbehavingServer(lambda _, attempt: "429" if attempt == 0 else "ok") as server:
        answers = ask(server, ["q"], backoff=0)
    assert answers[0].error is None and server.times[1] - server.times[0] >= 1.0


def test_pauses_double_are_spread_and_end_at_a_minute():
    section = {"base_url": "http://127.0.0.1/v1", "backoff": 2.0}
    teacher = EndpointTeacher(TeacherSection(model="m", endpoint=section))
    for attempt, whole in ((0, 2), (1, 4), (2, 8), (5, 60), (50, 60)):
        pauses = [teacher._pause(attempt, None) for _ in range(200)]
        assert 0.5 * whole <= min(pauses) < 0.6 * whole and 0.9 * whole < max(pauses) <= whole
    assert all(30 <= teacher._pause(0, 30.0) <= 32 for _ in range(50)), "asked for: never earlier"
    with MisbehavingServer(lambda _, attempt: "500" if attempt < 3 else "ok") as server:
        ask(server, ["q"], backoff=0.1, retries=3)
    for pause, least in zip(map(float.__sub__, server.times[1:], server.times), (0.05, 0.1, 0.2)):
        assert pause >= least


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_reading_retry_after(headers, seconds):
    assert asked_wait(headers) == seconds


def test_retry_after_as_a_date():
    assert asked_wait({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert asked_wait({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0.0


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_is_reached_and_never_exceeded(limit):
    with MisbehavingServer(lambda _, attempt: "500" if attempt == 0 else "ok", delay=0.03) as server:
        answers = ask(server, names(12), concurrency=limit)
    assert server.peak == limit and all(a.error is None for a in answers)


@pytest.mark.parametrize(
    "told, says",
    [
        ("401", "refuses the key in TEST_ENDPOINT_KEY for 'the-model'; export a key"),
        ("echo_401", "bad key: Bearer [key]"),
        ("403", "refuses the key in TEST_ENDPOINT_KEY"),
        ("402", "no credit"),
        ("quota", "no credit"),
        ("404", "does not serve 'the-model' at /chat/completions; check teacher.endpoint.base_url"),
        ("405", "check teacher.endpoint.base_url"),
    ],
)
def test_what_concerns_all_requests_stops_the_run_at_once(told, says):
    with MisbehavingServer(lambda _q, _a: told) as server, pytest.raises(RunError) as error:
        ask(server, names(40))
    assert says in str(error.value) and server.base_url in str(error.value) and KEY not in repr(error.value)
    assert len(server.requests) <= 4 and error.value.__cause__ is None


def test_a_server_without_keys_that_wants_one():
    with MisbehavingServer(lambda _q, _a: "401") as server, pytest.raises(RunError, match="api_key_env"):
        ask(server, ["q"], api_key_env=None)


def test_a_server_that_went_down_stops_the_run_before_a_part_of_errors_is_kept():
    with MisbehavingServer(lambda _q, _a: "500") as server, pytest.raises(RunError) as error:
        ask(server, names(60), retries=1)
    assert "failed 16 times in a row" in str(error.value) and "HTTP 500" in str(error.value)
    assert len(server.requests) <= 2 * (16 + 4)
    # One success in between, or answers that the server withholds on purpose, are no outage.
    with MisbehavingServer(lambda q, _: "400" if int(q[1:]) % 10 else "ok") as server:
        assert sum(a.error is None for a in ask(server, names(60), concurrency=2)) == 6
    with MisbehavingServer(lambda _q, _a: "filtered") as server:
        assert {a.error for a in ask(server, names(40))} == {"content_filter"}


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    section = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key_env": None, "retries": 1, "backoff": 0.01}
    teacher = EndpointTeacher(TeacherSection(model="m", endpoint=section))
    answer = teacher.answer([Question([{"role": "user", "content": "q"}], (0,))], SAMPLING, lambda _: None)[0]
    assert answer.error == "the connection failed (ConnectError)"


# -------------------------------------------------------------------------------------- what is sent and read


def test_the_request():
    with MisbehavingServer(lambda _q, _a: "ok") as server:
        ask(server, names(3))
        ask(server, names(3), Sampling(0.0, 1.0, 40, 0.05, 9), top_logprobs=2)
    by_question = lambda bodies: sorted(bodies, key=lambda b: b["messages"][0]["content"])  # noqa: E731
    first, second = by_question(server.bodies[:3]), by_question(server.bodies[3:])
    assert first[0] == {
        "model": "the-model", "messages": [{"role": "user", "content": "q0"}], "temperature": 0.7,
        "top_p": 0.9, "max_tokens": 20, "seed": first[0]["seed"],
    }  # fmt: skip
    added = {"top_k": 40, "min_p": 0.05, "logprobs": True, "top_logprobs": 2}
    assert {k: v for k, v in second[0].items() if k in added} == added and second[0]["max_tokens"] == 9
    seeds = [body["seed"] for body in first]
    assert seeds == [body["seed"] for body in second], "the same question is asked with the same seed, always"
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**31 for seed in seeds)


def test_the_newer_name_of_the_limit_is_learnt_without_losing_a_question():
    with MisbehavingServer(lambda _q, _a: "newer") as server:
        answers = ask(server, names(9), retries=0)
    assert all(a.error is None for a in answers) and server.bodies[-1]["max_completion_tokens"] == 20
    assert sum("max_tokens" in body for body in server.bodies) <= 4


def test_logprobs_of_the_servers_own_tokens():
    with MisbehavingServer(lambda _q, _a: "logprobs") as server:
        answer = ask(server, ["q"], top_logprobs=1)[0]
    assert answer.logprobs == [-0.5, -1.25] and answer.completion_ids == []


@pytest.mark.parametrize(
    "reply, text, reason",
    [
        (completion("4"), "4", "stop"),
        (completion(""), "", "stop"),
        (completion("4", "length"), "4", "length"),
        (completion("4", reasoning_content="2+2=4"), "<think>2+2=4</think>4", "stop"),
        (completion("4", reasoning="2+2=4"), "<think>2+2=4</think>4", "stop"),
        (completion("<think>2+2=4</think>4", reasoning="2+2=4"), "<think>2+2=4</think>4", "stop"),
        (completion(None, "length", reasoning_content="2+"), "<think>2+", "length"),
        (completion("", "length", reasoning_content="2+"), "<think>2+", "length"),
        (completion("", reasoning_content=""), "", "stop"),
        (completion("4", reasoning_content=None), "4", "stop"),
        (completion("π 🙂\n\x00"), "π 🙂\n\x00", "stop"),
    ],
)
def test_reading_an_answer(reply, text, reason):
    for body in (json.dumps(reply), json.dumps(reply, ensure_ascii=False)):
        answer = read_reply(body.encode(), None)
        assert (answer.text, answer.finish_reason, answer.error) == (text, reason, None)


@pytest.mark.parametrize(
    "usage", [None, {}, [], {"completion_tokens": "3"}, {"prompt_tokens": -1}, {"prompt_tokens": 2**40}]
)
def test_unusable_usage_counts_nothing(usage):
    answer = read_reply(json.dumps({**completion("4"), "usage": usage}).encode(), None)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("4", 0, 0)


ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(ANY_CHARACTER),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "finish_reason", "usage", "error", "reasoning",
                         "logprobs", "detail", "completion_tokens", "logprob"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({
    "choices": st.lists(st.fixed_dictionaries({
        "message": st.fixed_dictionaries({"content": json_values, "reasoning": json_values}) | json_values,
        "finish_reason": st.sampled_from(["stop", "length", "content_filter"]) | json_values,
        "logprobs": st.fixed_dictionaries({"content": json_values}) | json_values,
    }), max_size=2) | json_values,
    "usage": st.fixed_dictionaries({"prompt_tokens": json_values}) | json_values,
    "error": json_values}) | json_values)  # fmt: skip
def test_any_json_is_a_storable_answer_or_a_storable_reason(value):
    try:
        answer = read_reply(json.dumps(value).encode(), KEY)
        row = {name: getattr(answer, name) for name in ("text", "logprobs", "finish_reason", "error",
                                                        "prompt_tokens", "completion_tokens")}  # fmt: skip
    except BadReply as bad:
        row = {"error": bad.reason}
        assert len(bad.reason) < 300 and bad.reason.isprintable()
    pa.Table.from_pylist([row], schema=GENERATION_SCHEMA)


@given(st.binary(max_size=40))
def test_any_bytes(body):
    with pytest.raises(BadReply):
        read_reply(body, None)


@given(st.text(ANY_CHARACTER))
def test_one_line_is_one_storable_line(text):
    line = one_line(text)
    assert line.isprintable() and len(line) <= 200 and line.encode("utf-8") is not None


# ---------------------------------------------------------------------------------------- through the command


def overrides(server, **changes) -> list[str]:
    return [
        f"teacher.endpoint={json.dumps(endpoint(server, **changes))}",
        "teacher.model=the-model",
        "teacher.terms={acknowledged: a test}",
    ]


def test_the_key_is_nowhere(make_recipe, run_cli):
    """A server that repeats the key in errors, answers and a refusal: not in the run folder, not shown."""
    path, run_dir = make_recipe()
    few = ["prompts.levels={easy: 12}"]
    told = ["echo", "echo_ok", "echo_page", "ok"]
    with MisbehavingServer(lambda q, _: told[sum(map(ord, q)) % 4]) as server:
        done = ran(["generate", path, *overrides(server, retries=1), *few], OPENAI_LOG="debug")
        assert done.returncode == 0, done.stderr
        server.script = lambda _q, _a: "echo_401"
        code, out, err = run_cli("generate", path, *overrides(server), *few, f"run_dir={run_dir}-refused")
    assert code == 1 and "bad key: Bearer [key]" in err
    rows = list(read_rows(run_dir / "generations"))
    assert len(rows) == 24 and any(r["text"].startswith("you sent Bearer [key]") for r in rows)
    assert any("[key]" in (r["error"] or "") for r in rows)
    seen = [text.encode() for text in (done.stdout, done.stderr, out, err, repr(rows))]
    folders = (run_dir, run_dir.with_name("run-refused"))
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
    assert {"recipe.yaml", "manifest.json", "part-00000.parquet"} <= {f.name for f in files}
    for data in [*seen, *(f.read_bytes() for f in files)]:
        assert not any(part.encode() in data for part in (KEY, KEY[:16], KEY[-16:]))


def test_a_killed_stage_asks_for_missing_parts_only(make_recipe, run_cli):
    path, run_dir = make_recipe()
    few = ["prompts.levels={easy: 24}", "generate.part_size=3"]
    parts = lambda: sorted((run_dir / "generations").glob("part-*.parquet"))  # noqa: E731
    with MisbehavingServer(lambda _q, _a: "ok", delay=0.05) as server:
        process = Started(["generate", path, *overrides(server, concurrency=2), *few])
        while len(parts()) < 3:
            assert process.poll() is None, process.errors
            time.sleep(0.01)
        process.kill(group=True)
        process.wait()
        kept = {p: p.read_bytes() for p in parts()}
        assert 3 <= len(kept) < 8
        server.delay = 0.0
        # How the questions are asked may change on the way; who is asked, and what, may not.
        code, _, err = run_cli("generate", path, *overrides(server, concurrency=6, retries=5), *few)
        assert code == 0, err
        asked = Counter((q, seed) for q, seed, _ in server.requests)
    assert all(part.read_bytes() == data for part, data in kept.items())
    twice = [key for key, count in asked.items() if count > 1]
    assert len(twice) <= 6 and max(asked.values()) <= 2, "at most the part that was cut short is asked again"
    rows = list(read_rows(run_dir / "generations"))
    assert len(rows) == len({(r["prompt_id"], r["sample_idx"]) for r in rows}) == len(asked) == 48
    assert {r["text"] for r in rows} == {good_text(q, seed) for q, seed in asked}


def test_the_whole_story_with_a_teacher_behind_a_server(make_recipe, run_cli):
    path, run_dir = make_recipe(student="plain")
    answer = lambda question, seed: f"<think>{question[:12]} {seed}</think>4"  # noqa: E731
    sometimes = lambda q, attempt: "null" if attempt == 0 and len(q) % 2 else "ok"  # noqa: E731
    with MisbehavingServer(sometimes, answer=answer) as server:
        code, _, err = run_cli("run", path, *overrides(server))
        assert code == 0, err
        code, out, _ = run_cli("run", path, *overrides(server, timeout=9))
        assert code == 0 and out.count("done before") == 6
        code, _, err = run_cli("generate", path, *overrides(server, top_logprobs=1))
        assert code == 2 and "teacher.endpoint.top_logprobs: 0 -> 1" in err
        assert len({(q, seed) for q, seed, _ in server.requests}) == 48
    counts = read_json(run_dir / "generations" / "manifest.json")["counts"]
    assert counts["rows"] == 48 and counts["errors"] == 0
    assert counts["tokens"] == 48 * 3 and counts["prompt_tokens"] == 48 * 7, "the server's own counts"
    tokenizer = load_tokenizer(load_recipe(path).student.model)
    rows = list(read_rows(run_dir / "dataset"))
    assert rows and all(tokenizer.decode(r["completion_ids"][:-1]) == r["text"] for r in rows)
    metrics = read_json(run_dir / "eval" / "metrics.json")
    assert list(metrics["models"]) == ["base", "control", "student"]
    assert (run_dir / "report.html").is_file()
    assert read_json(run_dir / "generations" / "manifest.json")["flops"] is None
    code, out, err = run_cli("cost", run_dir)
    assert code == 0 and server.base_url in out, err


# ----------------------------------------------------------------------------------- before anything is spent


def test_logits_of_an_endpoint_are_refused(make_recipe, run_cli):
    path, run_dir = make_recipe()
    with MisbehavingServer(lambda _q, _a: "ok") as server:
        code, _, err = run_cli("run", path, *overrides(server), "train.objectives=[{name: forward_kl}]")
    assert code == 2 and "gives text alone" in err and "cross_entropy" in err
    assert not server.requests and not (run_dir / "prompts").exists()


def test_a_dry_run_needs_no_key_and_no_server(make_recipe, run_cli, monkeypatch):
    monkeypatch.delenv("TEST_ENDPOINT_KEY")
    path, _ = make_recipe()
    with MisbehavingServer(lambda _q, _a: "ok") as server:
        code, out, err = run_cli("run", path, *overrides(server), "--dry-run")
        assert code == 0 and "# answers: 48" in out and "flops_at_most" not in out, err
        code, _, err = run_cli("generate", path, *overrides(server))
    assert code == 2 and "TEST_ENDPOINT_KEY is not set" in err and not server.requests


def test_a_missing_client_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("distill.data.endpoint.find_spec", lambda name: None)
    with MisbehavingServer(lambda _q, _a: "ok") as server, pytest.raises(UserError, match=r"\.\[endpoint\]"):
        ask(server, ["q"])


@pytest.mark.parametrize("key", ["two words", "newline\nin it", "ключ"])
def test_a_key_that_no_header_can_carry(monkeypatch, key):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", key)
    with MisbehavingServer(lambda _q, _a: "ok") as server, pytest.raises(UserError) as error:
        ask(server, ["q"])
    assert "TEST_ENDPOINT_KEY holds characters" in str(error.value) and key not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"api_key_env": f"sk-{KEY}"},
        {"api_key_env": f"hf_{KEY.replace('-', '')}"},
        {"base_url": f"http://user:{KEY}@127.0.0.1/v1"},
        {"base_url": f"http://127.0.0.1/v1?key={KEY}"},
        {"base_url": KEY},
        {"base_url": f"ftp://{KEY}/v1"},
        {"base_url": "http://127.0.0.1:99999/v1"},
        {"api_key": KEY},
    ],
)
def test_a_key_pasted_into_the_recipe_is_refused_and_not_repeated(make_recipe, run_cli, change):
    path, run_dir = make_recipe()
    section = {"base_url": "http://127.0.0.1:1/v1", **change}
    code, out, err = run_cli("generate", path, f"teacher.endpoint={json.dumps(section)}")
    assert code == 2 and "teacher.endpoint" in err
    assert KEY not in out + err and KEY.replace("-", "") not in out + err and not run_dir.exists()


def test_defaults_are_as_documented():
    section = Endpoint(base_url="http://localhost:8000/v1")
    assert section.model_dump(exclude={"base_url"}) == {
        "api_key_env": "OPENAI_API_KEY", "concurrency": 8, "timeout": 60, "retries": 5, "backoff": 1.0,
        "top_logprobs": 0, "tokenizer": None,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- a real server

SERVING = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))


@pytest.mark.skipif(not SERVING, reason='needs pip install "transformers[serving]"')
def test_transformers_serve_gives_what_the_local_teacher_gives(make_recipe, run_cli):
    """The shipped teacher behind `transformers serve`, greedy: texts and counts as when it is loaded here."""
    teacher = str(ROOT / "checkpoints" / "teacher")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    serve = "import gc; gc.disable(); from transformers.cli.transformers import main; main()"
    server = subprocess.Popen(
        [PYTHON, "-c", serve, "serve", teacher, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        greedy = ["generate.temperature=0", "generate.samples=1", "generate.max_new_tokens=40",
                  "prompts.levels={easy: 4, medium: 4, hard: 4}", f"teacher.model={teacher}",
                  "teacher.terms={acknowledged: a test}"]  # fmt: skip
        path, here = make_recipe(name="here")
        code, _, err = run_cli("generate", path, *greedy)
        assert code == 0, err
        section = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key_env": None, "top_logprobs": 1}
        path, there = make_recipe(name="there")
        deadline = time.monotonic() + 90
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        code, _, err = run_cli("generate", path, *greedy, f"teacher.endpoint={json.dumps(section)}")
        assert code == 0, err
    finally:
        server.terminate()
        server.wait(10)
    local, remote = (list(read_rows(run / "generations")) for run in (here, there))
    assert len(local) == 12 and sum(r["verdict"] == "correct" for r in remote) >= 8
    same = ("prompt_id", "text", "finish_reason", "verdict", "prompt_tokens", "completion_tokens", "error")
    for a, b in zip(local, remote):
        assert {name: a[name] for name in same} == {name: b[name] for name in same}
        assert a["completion_ids"] and not b["completion_ids"]
