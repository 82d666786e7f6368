"""Conversations as they come: the common forms become plain messages, and nothing asks a question with its answer."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config.data import Prompts
from distill.data.prompts import file_prompts, named_problems
from distill.errors import UserError
from distill.storage import read_rows
from distill.tasks.flaws import load_probes


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text) -> dict:
    return {"role": "user", "content": text}


def assistant(text) -> dict:
    return {"role": "assistant", "content": text}


def said(who: str, text: str) -> dict:
    return {"from": who, "value": text}


ASKED = [user("2+2?")]
MORE = [user("2+2?"), assistant("4"), user("so?")]
ACCEPTED = {
    "text": ("2+2?", ASKED),
    "OpenAI": (MORE, MORE),
    "ShareGPT": ([said("human", "2+2?"), said("gpt", "4")], ASKED),
    "ShareGPT, several turns": ([said("human", "2+2?"), said("gpt", "4"), said("human", "so?")], MORE),
    "ShareGPT with a system turn": ([said("system", "S"), said("human", "2+2?")], [system("S"), *ASKED]),
    "ShareGPT, other names": ([said("user", "2+2?"), said("chatgpt", "4"), said("user", "so?")], MORE),
    "bots": ([said("human", "2+2?"), said("bot", "4"), said("Human", "so?")], MORE),
    "capitals": ([{"role": "User", "content": "2+2?"}, {"role": "ASSISTANT", "content": "4"}], ASKED),
    "parts": ([user([{"type": "text", "text": "2+2?"}])], ASKED),
    "parts beside text": ([user([{"type": "text", "text": "2+2?"}]), *MORE[1:]], MORE),
    "several parts": ([user([{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}])], ASKED),
    "parts of every turn": (
        [system([{"type": "text", "text": "S"}]), user([{"type": "text", "text": "2+2?"}])],
        [system("S"), *ASKED],
    ),
    "parts of the Responses API": ([user([{"type": "input_text", "text": "2+2?"}])], ASKED),
    "developer": ([{"role": "developer", "content": "S"}, *ASKED], [system("S"), *ASKED]),
    "other keys": (
        [{"role": "user", "content": "2+2?", "name": "x", "weight": 1, "tool_calls": None}],
        ASKED,
    ),
    "an empty list of tool calls": ([*ASKED, {**assistant("4"), "tool_calls": []}, user("so?")], MORE),
    "an empty system turn": ([system(""), *ASKED], [system(""), *ASKED]),
    "a last answer": ([*ASKED, assistant("4")], ASKED),
    "a last answer after more": ([*MORE, assistant("yes")], MORE),
    "any text": ([user(" [INST]\u2028\tx\n")], [user(" [INST]\u2028\tx\n")]),
    "text like a list": ("[1, 2] reversed?", [user("[1, 2] reversed?")]),
    "a list of numbers as text": ("[3, 1, 2]", [user("[3, 1, 2]")]),
}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [
    user("2+2?"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "x"}, user("so?"),
]  # fmt: skip
REFUSED = {
    "a number": (5, "has 5 as its prompt, without quotes"),
    "a decimal": (2.50, "has 2.5 as its prompt, without quotes"),
    "true": (True, "has true as its prompt, without quotes"),
    "texts": (["a", "b"], "a list as its prompt whose items are no messages"),
    "lists of messages": ([ASKED, ASKED], "items are no messages"),
    "one message": (user("2+2?"), "an object as its prompt"),
    "an object around": ({"messages": ASKED}, "an object as its prompt"),
    "nothing": (None, "an empty 'question'"),
    "no messages": ([], "an empty 'question'"),
    "white space": (" \n", "an empty prompt"),
    "stored as text": (json.dumps(ASKED), "a conversation stored as text"),
    "ShareGPT stored as text": (json.dumps([said("human", "x")], indent=1), "a conversation stored as text"),
    "no content of the system": ([system(None), *ASKED], "no content (null) in turn 1"),
    "no content of the user": ([user(None)], "no content (null) in turn 1"),
    "no content of the assistant": ([*ASKED, assistant(None), user("so?")], "no content (null) in turn 2"),
    "no key content": ([{"role": "user"}], "no content (null) in turn 1"),
    "no value": ([{"from": "human"}], "no content (null) in turn 1"),
    "a number as content": ([user(5)], "'5' as content of turn 1"),
    "an object as content": ([user({"text": "x"})], "as content of turn 1"),
    "an empty user turn": ([user("")], "an empty turn 1"),
    "an empty part": ([user([{"type": "text", "text": " "}])], "an empty turn 1"),
    "no parts": ([user([])], "an empty turn 1"),
    "an empty assistant turn": ([*ASKED, assistant(""), user("so?")], "an empty turn 2"),
    "tools": (TOOLS, "a tool call or its result in turn 2"),
    "a call beside text": ([*ASKED, {**assistant("x"), "tool_calls": [CALL]}, user("?")], "a tool call or its result"),
    "an old call": ([*ASKED, {**assistant("x"), "function_call": {"name": "f"}}, user("?")], "a tool call"),
    "a tool's turn": ([user("x"), {"role": "tool", "content": "4"}], "a tool call or its result in turn 2"),
    "a function's turn": ([user("x"), {"role": "function", "content": "4"}], "a tool call"),
    "ShareGPT's tools": ([said("human", "x"), said("function_call", "{}"), said("observation", "4")], "a tool call"),
    "a picture": ([user([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}])],
                  "a part 'image_url' in turn 1"),
    "sound": ([user([{"type": "input_audio", "input_audio": {}}])], "a part 'input_audio'"),
    "a picture beside": ([{**user("x"), "images": ["a.png"]}], "'images' in turn 1"),
    "a part without text": ([user([{"type": "text"}])], "a part without text"),
    "texts as parts": ([user(["x"])], "a part without text"),
    "an unknown role": ([{"role": "narrator", "content": "x"}], "unknown role 'narrator'"),
    "no role": ([{"content": "x"}], "turn 1 of its conversation without one role"),
    "two roles": ([{"role": "user", "from": "gpt", "content": "x"}], "without one role"),
    "a number as role": ([{"role": 1, "content": "x"}], "unknown role '1'"),
    "other keys alone": ([{"speaker": "user", "text": "x"}], "without one role"),
    "two user turns": ([user("a"), user("b")], "two user turns in a row (turn 2)"),
    "two assistant turns": ([user("a"), assistant("b"), assistant("c")], "two assistant turns in a row (turn 3)"),
    "two user turns after a system's": ([system("S"), user("a"), user("b")], "in a row (turn 3)"),
    "a late system turn": ([*ASKED, system("S")], "a system turn that is not the first (turn 2)"),
    "two system turns": ([system("S"), system("T"), *ASKED], "not the first (turn 2)"),
    "the assistant first": ([assistant("Hi!"), *ASKED], "that the assistant begins"),
    "the system alone": ([system("S")], "without a user's turn"),
    "the assistant alone": ([assistant("S")], "without a user's turn"),
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def to_file(*rows: dict, form: str = "jsonl") -> str:
        path = tmp_path / f"data.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        return str(path)

    return to_file


def read(path: str, **keys) -> list[dict]:
    return file_prompts(path, Prompts(source=path, prompt_column="question", **keys), "train")


def refused(path: str, **keys) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(path, **keys)
    return caught.value.problems


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("given, expected", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_common_forms_are_plain_messages(write, given, expected, form):
    if form == "parquet" and given == ACCEPTED["parts beside text"][0]:
        pytest.skip("a column of Parquet holds texts or lists, not both")
    (row,) = read(write({"question": given, "answer": "1"}, form=form))
    assert row["messages"] == expected and row["answer"] == "1"


@pytest.mark.parametrize("given, problem", REFUSED.values(), ids=REFUSED.keys())
def test_the_rest_is_refused_with_its_row_and_a_fix(write, given, problem):
    (line,) = refused(write({"question": "fine", "answer": "1"}, {"question": given, "answer": "1"}))
    assert "row 2 has" in line and problem in line and "; " in line and "\n" not in line


def test_unlike_messages_of_a_parquet_file(write):
    """One struct has the keys of all: what a message lacks is null."""
    rows = [
        {"question": [{"role": "user", "content": "a", "tool_calls": None}]},
        {"question": [{"role": "user", "content": "b", "tool_calls": None},
                      {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    ]  # fmt: skip
    path = write(*rows, form="parquet")
    assert "row 2 has a tool call" in refused(path, answer_column="")[0]
    assert [r["messages"] for r in read(path, answer_column="", limit=1)] == [[user("a")]]


def test_many_rows_are_told_in_a_handful(write):
    path = write(*[{"question": 5, "answer": "1"}] * 3, *[{"question": [], "answer": "1"}] * 4)
    found = refused(path)
    assert ["row 1 has 5" in found[0], "row 4 has an empty" in found[3], len(found)] == [True, True, 6]
    assert "and 2 more rows" in found[5]


# ---- the last assistant turn ---------------------------------------------------------------------------------------


def test_a_last_turn_is_dropped_taken_as_the_reference_or_refused(write):
    asked = [user("2+2?")]
    rows = [{"question": [*asked, assistant("<think>2, 4</think>\n4 ")]}, {"question": [*MORE]}]
    path = write(*rows)
    assert "no column 'answer'" in refused(path)[0], "nothing is taken as a reference unasked"
    assert [(r["messages"], r["answer"]) for r in read(path, answer_column="")] == [(asked, ""), (MORE, "")]
    taken = read(path, last_turn="reference")
    assert [(r["messages"], r["answer"]) for r in taken] == [(asked, "4"), (MORE, "")]
    (line,) = refused(path, last_turn="refuse", answer_column="")
    assert "row 1 has an assistant's turn at the end" in line and "prompts.last_turn=reference" in line


def test_two_references_are_refused_unless_they_agree(write):
    row = {"question": [user("2+2?"), assistant("It is 4")], "answer": "4"}
    assert read(write(row))[0]["answer"] == "4"
    (line,) = refused(write(row), last_turn="reference")
    assert "two references, '4' in 'answer' and a last assistant turn" in line
    assert read(write(row), last_turn="reference", answer_column="")[0]["answer"] == "It is 4"
    assert read(write({**row, "answer": "It is 4"}), last_turn="reference")[0]["answer"] == "It is 4"
    assert read(write({**row, "answer": ""}), last_turn="reference")[0]["answer"] == "It is 4"
    thinking = {"question": [user("2+2?"), assistant("<think>2 and 2")], "answer": ""}
    assert "all thinking" in refused(write(thinking), last_turn="reference")[0]
    path = write(row)
    with pytest.raises(UserError, match="no column 'key'"):
        read(path, last_turn="reference", answer_column="key")
    assert (
        "verifier 'choice'"
        in refused(write(row), last_turn="reference", answer_column="", verifier="choice")[0]
    )


def test_held_out_files_and_tasks_are_read_the_same_way(write):
    path = write({"question": [said("human", "2+2?"), said("gpt", "4")]})
    (row,) = named_problems(path, Prompts(prompt_column="question", last_turn="reference"))
    assert (row["messages"], row["answer"]) == ([user("2+2?")], "4")


# ---- prompts.system --------------------------------------------------------------------------------------------------


def test_the_recipe_s_system_message_comes_first_and_never_beside_another(write):
    path = write({"question": MORE, "answer": "1"})
    assert read(path, system="Be brief.")[0]["messages"] == [system("Be brief."), *MORE]
    own = {"question": [system("S"), *ASKED], "answer": "1"}
    assert read(write(own))[0]["messages"] == own["question"]
    assert read(write(own), system="S")[0]["messages"] == own["question"], "the same, once"
    for text in ("S", ""):
        own["question"][0] = system(text)
        (line,) = refused(write(own), system="Be brief.")
        assert "row 1 has a system turn of its own" in line and "leave out prompts.system" in line


# ---- where else conversations are read -------------------------------------------------------------------------------


def test_a_csv_file_has_no_conversations(tmp_path):
    path = tmp_path / "data.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["5", "1"], [json.dumps(ASKED), "1"]])
    (line,) = refused(str(path))
    assert "row 2 (line 3) has a conversation stored as text" in line and "JSONL or Parquet" in line


def test_probes_hold_conversations_and_texts_as_written(tmp_path):
    path = tmp_path / "probes.jsonl"
    base = {"flaw": "f", "kind": "choice", "pattern": "007", "options": ["007", 1.50], "answer": 1e5}
    rows = [
        {**base, "probe_id": 7, "messages": [said("system", "S"), said("human", "x\u2028y")]},
        {**base, "probe_id": "b", "messages": [user([{"type": "text", "text": "x"}])]},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).replace("100000.0", "1e5")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("1.5", "1.50").encode())
    first, second = load_probes(path)
    assert first.messages == [system("S"), user("x\u2028y")] and second.messages == [user("x")]
    assert (first.probe_id, first.options, first.answer) == ("7", ("007", "1.50"), "1e5")
    bad = {
        "line 1: it has 5 as its prompt": {**base, "probe_id": "1", "prompt": 5},
        "line 2: its messages end with": {**base, "probe_id": "2", "messages": [user("a"), assistant("b")]},
        "line 3: it has two user turns": {**base, "probe_id": "3", "messages": [user("a"), user("b")]},
        "line 4: `options` is a list": {**base, "probe_id": "4", "prompt": "x", "options": "ab"},
        "line 5: a list in 'answer'": {**base, "probe_id": "5", "prompt": "x", "answer": [1]},
    }
    path.write_text("\n".join(map(json.dumps, bad.values())) + "\noops")
    with pytest.raises(UserError) as caught:
        load_probes(path)
    assert len(caught.value.problems) == 6 and "line 6: not JSON" in caught.value.problems[5]
    assert all(said_so in line for said_so, line in zip(bad, caught.value.problems))
    path.write_bytes("é".encode("latin1"))
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        load_probes(path)


# ---- on the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a number", "texts", "no content of the system", "tools", "two user turns"])
def test_a_refused_conversation_leaves_nothing(write, run_cli, make_recipe, hub, tmp_path, name):
    given, problem = REFUSED[name]
    source = write({"question": given, "answer": "1"})
    path, run_dir = make_recipe()
    words = [f"prompts.source={source}", "prompts.prompt_column=question", f"evaluate.source={source}"]
    for command in ("generate", "run"):
        code, _, err = run_cli(command, path, *words)
        assert code == 2 and problem in err and "row 1" in err and "Traceback" not in err, err
        assert not run_dir.exists()
    code, out, err = run_cli("doctor", path, *words)
    assert code and problem in out and "Traceback" not in out + err
    out = tmp_path / "out"
    words = ["--tasks", source, words[1], "--out", out]
    code, _, err = run_cli("evaluate", hub["llama"], *words)
    assert code == 2 and problem in err and "Traceback" not in err and not out.exists()


def test_a_run_asks_the_questions_of_conversations(write, run_cli, make_recipe):
    source = write(
        {"question": [said("human", "2+2?"), said("gpt", "4")]},
        {"question": [user([{"type": "text", "text": "3+3?"}]), assistant("6")]},
        {"question": "4+4?"},
    )
    path, run_dir = make_recipe()
    words = [
        f"prompts.source={source}", "prompts.prompt_column=question", "prompts.last_turn=reference",
        "prompts.system=S", f"evaluate.source={source}",
        "control.enabled=false",
    ]  # fmt: skip
    code, _, err = run_cli("generate", path, *words)
    assert code == 0, err
    rows = list(read_rows(run_dir / "prompts"))
    assert [r["messages"] for r in rows] == [[system("S"), user(q)] for q in ("2+2?", "3+3?", "4+4?")]
    assert [r["answer"] for r in rows] == ["4", "6", ""]
    assert len(list(read_rows(run_dir / "generations"))) == 6
