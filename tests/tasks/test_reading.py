"""A file's text is its text: no number, date or missing value is guessed; what cannot be read is one line."""

import csv
import io
import json
import re
from datetime import date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.data import Prompts
from distill.data.prompts import file_prompts, make_prompts, named_problems
from distill.errors import UserError
from distill.storage import fingerprint, read_json, read_rows, write_json
from distill.tasks.corpus import render


def answers(path, **keys) -> list[str]:
    return [row["answer"] for row in file_prompts(str(path), Prompts(source=str(path), **keys), "train")]


def problems(path, **keys) -> list[str]:
    with pytest.raises(UserError) as caught:
        answers(path, **keys)
    return caught.value.problems


# Each of these was one column of another type, or a missing value, for a reader that infers types.
WRITTEN = {
    "dates": ["2024-01-05", "2023-12-31"],
    "times": ["2024-01-05T14:30:00Z", "2024-01-05 14:30"],
    "whole beside decimal": ["42", "3.5"],
    "30 digits": ["123456789012345678901234567890", "1"],
    "leading zeros": ["007", "012"],
    "exponents": ["1e5", "2E-3"],
    "trailing zeros": ["3.50", "1.0"],
    "booleans": ["true", "false"],
    "capital booleans": ["True", "FALSE"],
    "missing in words": ["NA", "None", "null", "nan", "N/A", "NULL", "-"],
    "infinities": ["inf", "-Infinity", "NaN"],
    "signs": ["+5", "-0", "−3"],
    "thousands": ["1,000", "1 000", "1_000"],
    "fractions": ["1/2", "0x1F", "12%"],
    "spaces": [" a ", "a  b", "\ta"],
    "quotes": ['say "no"', "'x'", '"'],
    "clock": ["12:30", "1:2:3"],
}
KINDS = pytest.mark.parametrize("texts", WRITTEN.values(), ids=WRITTEN.keys())


@KINDS
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_texts_arrive_as_written(tmp_path, texts, form):
    path = tmp_path / f"data.{form}"
    rows = [
        {"prompt": f"q{i}", "answer": text, "level": text, "family": text} for i, text in enumerate(texts)
    ]
    if form in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) if form == "jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    read = file_prompts(str(path), Prompts(source=str(path)), "train")
    assert [row["answer"] for row in read] == texts
    assert [row["level"] for row in read] == texts and [row["family"] for row in read] == texts


LITERALS = [
    "42", "3.5", "3.50", "1.0", "1e5", "2E-3", "-0", "0", "0.1", "1E400", "123456789012345678901234567890",
    "0.12345678901234567890123", "true", "false", "NaN", "-Infinity", "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_json_literals_are_the_text_of_the_file(tmp_path, form):
    """`42` beside `3.5`, dates beside numbers: every literal on its own, whatever stands in the other rows."""
    lines = [f'{{"prompt": "q", "answer": {literal}}}' for literal in [*LITERALS, '"2024-01-05"', "null"]]
    path = tmp_path / f"data.{form}"
    path.write_text("\n".join(lines) if form == "jsonl" else f"[{', '.join(lines)}]")
    assert answers(path) == [*LITERALS, "2024-01-05", ""]


def test_zero_is_a_level_and_a_family(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "a", "level": 0, "family": false}\n{"prompt": "b", "level": 1.50}\n'
        '{"prompt": "c", "level": "", "family": null}\n{"prompt": "d", "level": "0", "family": 7}'
    )
    rows = file_prompts(str(path), Prompts(source=str(path), answer_column=""), "train")
    assert [r["level"] for r in rows] == ["0", "1.50", "all", "0"]
    assert [r["family"] for r in rows] == ["false", "all", "all", "7"]
    text = tmp_path / "data.csv"
    text.write_text("prompt,level,family\na,0,007\nb,,\n")
    rows = file_prompts(str(text), Prompts(source=str(text), answer_column=""), "train")
    assert [(r["level"], r["family"]) for r in rows] == [("0", "007"), ("all", "all")]


def test_solutions_completions_templates_and_tasks_are_text_too(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"n": 1e3, "ok": true, "list": [1.0, 2.50, false], "worked": 3.10, "answer": "007"}\n')
    section = Prompts(source=str(path), template="{n} {ok}\n{list}", completion_column="worked")
    (row,) = file_prompts(str(path), section, "train")
    assert row["messages"][0]["content"] == "1e3 true\nA. 1.0\nB. 2.50\nC. false"
    assert row["question"] == "1e3\ntrue\nA. 1.0\nB. 2.50\nC. false" and row["completion"] == "3.10"
    section = Prompts(source=str(path), template="{n}", solutions=True, solution_column="worked")
    assert file_prompts(str(path), section, "train")[0]["solution"] == "3.10"
    (row,) = named_problems(str(path), Prompts(template="{n}"))
    assert (row["answer"], row["level"]) == ("007", "data")
    # A template filled from Python has no literals; the same rule writes its values.
    assert render("{a} {b} {c}", {"a": 4.0, "b": True, "c": date(2024, 1, 5)}) == "4 true 2024-01-05"


@pytest.mark.parametrize("column", ["answer", "level", "family", "worked"])
@pytest.mark.parametrize("value", [[1], {"a": 1}])
def test_lists_and_objects_are_no_text(tmp_path, column, value):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "q", "answer": "1", "worked": "w", column: value}))
    (line,) = problems(path, completion_column="worked")
    assert f"row 1 has {'a list' if isinstance(value, list) else 'an object'} in '{column}'" in line


# ---- JSONL, byte by byte -------------------------------------------------------------------------------------------

TRICKY = {
    "bom": (b'\xef\xbb\xbf{"prompt": "q", "answer": "1"}\n', ["1"]),
    "crlf": (b'{"prompt": "q", "answer": "1"}\r\n{"prompt": "q", "answer": "2"}\r\n', ["1", "2"]),
    "line separator": ('{"prompt": "q", "answer": "a\u2028b\u2029c"}\n'.encode(), ["a\u2028b\u2029c"]),
    "next line": ('{"prompt": "q", "answer": "a\x85b"}\n'.encode(), ["a\x85b"]),
    "vertical tab": (b'{"prompt": "q", "answer": "a\x0bb"}\n', ["a\x0bb"]),
    "form feed and separators": (b'{"prompt": "q", "answer": "a\x0cb\x1cc\x1dd\x1ee"}', ["a\x0cb\x1cc\x1dd\x1ee"]),
    "tab": (b'{"prompt": "q", "answer": "a\tb"}\n', ["a\tb"]),
    "empty lines": (b'\n{"prompt": "q", "answer": "1"}\n \n\r\n{"prompt": "q", "answer": "2"}\n\n', ["1", "2"]),
    "no last line end": (b'{"prompt": "q", "answer": "1"}\n{"prompt": "q", "answer": "2"}', ["1", "2"]),
    "decomposed": ('{"prompt": "q", "answer": "e\u0301"}'.encode(), ["e\u0301"]),
    "pair of surrogates": (b'{"prompt": "q", "answer": "\\ud83d\\ude00"}', ["\U0001f600"]),
    "other keys": (b'{"prompt": "q"}\n{"answer": 2, "prompt": "q", "more": {"a": [1, null]}}', ["", "2"]),
    "a list in a .jsonl": (b'[{"prompt": "q", "answer": 1.0},\n{"prompt": "q", "answer": "x"}]', ["1.0", "x"]),
}  # fmt: skip


@pytest.mark.parametrize("raw, expected", TRICKY.values(), ids=TRICKY.keys())
def test_lines_of_json_are_read_as_they_are(tmp_path, raw, expected):
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw)
    assert answers(path) == expected


GOOD = b'{"prompt": "q", "answer": "1"}\n'
BROKEN = {
    "latin-1": (GOOD + '{"prompt": "café", "answer": "1"}'.encode("latin1"), "line 2: not UTF-8.*0xe9.*-f latin1"),
    "cp1252": ('{"prompt": "“q”", "answer": "1"}'.encode("cp1252"), "line 1: not UTF-8.*0x93"),
    "gbk": (GOOD * 2 + '{"prompt": "中文", "answer": "1"}'.encode("gbk"), "line 3: not UTF-8"),
    "utf-16": (GOOD.decode().encode("utf-16"), "line 1: the file is UTF-16; .*iconv -f utf-16 "),
    "utf-16 without a mark": (GOOD.decode().encode("utf-16-le"), "UTF-16LE; .*iconv -f utf-16le"),
    "utf-16 the other way": (GOOD.decode().encode("utf-16-be"), "UTF-16BE; .*iconv -f utf-16be"),
    "utf-32": (GOOD.decode().encode("utf-32"), "UTF-32; .*iconv -f utf-32"),
    "cut off": (GOOD + b'{"prompt": "q", "ans', "line 2: not JSON .Unterminated string"),
    "two rows in a line": (GOOD + GOOD.strip() * 2, "line 2: not JSON .Extra data, column 31"),
    "single quotes": (b"{'prompt': 'q'}", "line 1: not JSON"),
    "a text": (GOOD + b'"q"', "line 2: not an object"),
    "a number": (b"5\n" + GOOD, "line 1: not an object"),
    "a key twice": (GOOD + b'{"prompt": "q", "answer": "1", "answer": "2"}', "line 2: key 'answer' stands in it twice"),
    "half a pair": (b'{"prompt": "q", "answer": "\\ud83d"}', "line 1: half of a surrogate pair"),
    "deep": (b"\n" + b"[" * 100_000, "not JSON|nested too deeply|not an object"),
    "deep inside": (b'{"prompt": ' + b"[" * 100_000, "line 1: nested too deeply"),
    "old Macintosh": (GOOD.strip() + b"\r" + GOOD.strip(), "line 1: not JSON .Extra data"),
    "empty": (b"", "there are no rows in it"),
    "blank": (b"\n\n", "there are no rows in it"),
}  # fmt: skip


@pytest.mark.parametrize("raw, problem", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_jsonl_is_one_line(tmp_path, raw, problem):
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw)
    (line,) = problems(path)
    assert re.search(problem, line) and "\n" not in line and "data.jsonl" in line


def test_the_first_problems_are_told_and_the_others_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"oops\n" * 9)
    found = problems(path)
    assert [f"line {n}: not JSON" in line for n, line in zip(range(2, 7), found)] == [True] * 5
    assert len(found) == 6 and "and 4 more rows" in found[5]
    path.write_bytes(GOOD + b'\n\n{"prompt": ""}\n' * 6 + GOOD)
    found = problems(path)
    assert "row 2 (line 4) has an empty 'prompt'" in found[0] and "and 1 more row " in found[5]


def test_a_limit_reads_the_first_rows_only(tmp_path):
    for form, text in (("jsonl", GOOD * 2 + b"oops"), ("csv", b'prompt,answer\nq,1\nq,1\nq,"')):
        path = tmp_path / f"data.{form}"
        path.write_bytes(text)
        assert answers(path, limit=2) == ["1", "1"] and problems(path, limit=3)


# ---- .json ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"prompt": "q", "answer": 1.50}]', ["1.50"]),
        ('\ufeff [\n {"prompt": "q", "answer": "x"},\n {"prompt": "q"}\n]\n', ["x", ""]),
        ('{"prompt": "q", "answer": 7}', ["7"]),
        ('{"prompt": "q", "answer": 7}\n{"prompt": "q", "answer": true}\n', ["7", "true"]),
        ('{"version": "1.1", "data": [{"prompt": "q", "answer": 2.0}]}', ["2.0"]),
        ('{\n"prompt": ["q", "r"],\n"answer": [1, 2.0]}', ["1", "2.0"]),
    ],
)
def test_a_json_file_is_a_list_lines_data_or_columns(tmp_path, text, expected):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    assert answers(path) == expected


@pytest.mark.parametrize(
    "text, problem",
    [
        ('[{"prompt": "q"},\n{"prompt": "q",}]', "line 2: not JSON"),
        ('[{"prompt": "q"}, "q"]', "row 2 is no object"),
        ("5", "it is no list"),
        ("[]", "there are no rows"),
        ('[{"prompt": "q", "prompt": "r"}]', "key 'prompt' stands in it twice"),
        ('[{"prompt": "\\udc00"}]', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_file_is_one_line(tmp_path, text, problem):
    path = tmp_path / "data.json"
    path.write_text(text)
    (line,) = problems(path, answer_column="")
    assert problem in line and "\n" not in line
    path.write_bytes('[{"prompt": "q"},\n{"prompt": "é"}]'.encode("latin1"))
    assert "line 2: not UTF-8" in problems(path)[0]


# ---- CSV -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.csv", "prompt,answer\nq,\n", [""]),
        ("a.csv", "\ufeffprompt,answer\r\nq,1\r\n", ["1"]),
        ("a.csv", 'prompt,answer\nq,"a\nb\r\nc"\n', ["a\nb\r\nc"]),
        ("a.csv", 'prompt,answer\nq,"a ""b"" c"\n\nq,5" pipe\n', ['a "b" c', '5" pipe']),
        ("a.csv", "prompt,answer\nq,a\u2028b\x85c\n", ["a\u2028b\x85c"]),
        ("a.csv", "prompt,answer\rq,1\rq,2", ["1", "2"]),
        ("a.csv", ",prompt,answer\n0,q,1\n", ["1"]),
        ("a.csv", "prompt,answer\nq,1;2\n", ["1;2"]),
        ("a.tsv", "prompt\tanswer\nq\t1,5\n", ["1,5"]),
        ("a.CSV", "prompt,answer\nq,01\n", ["01"]),
        ("a.csv", "prompt,answer\nq," + "x" * 200_000, ["x" * 200_000]),
    ],
)
def test_separated_cells_are_text(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert answers(path) == expected


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("a.csv", "prompt,answer\nq,1\nq,1,2\n", "row 2 (line 3) has 3 cells and the header 2"),
        ("a.csv", 'prompt,answer\nq,"1\n2"\nq\n', "row 2 (line 4) has 1 cells and the header 2"),
        ("a.csv", 'prompt,answer\nq,1\n"q,1\nq,2\n', "begins in line 3 is no row"),
        ("a.csv", 'prompt,answer\n"q"x,1\n', "begins in line 2 is no row"),
        ("a.csv", "prompt,answer,answer\nq,1,2\n", "two columns 'answer'"),
        ("a.csv", "prompt;answer\nq;1\n", "separated by commas, and its header by ';'"),
        ("a.csv", "prompt\tanswer\nq\t1\n", "name it .tsv"),
        ("a.tsv", "prompt,answer\nq,1\n", "name it .csv"),
        ("a.csv", "", "no rows in it"),
    ],
)
def test_what_is_no_csv_is_one_line(tmp_path, name, text, problem):
    path = tmp_path / name
    path.write_text(text)
    (line,) = problems(path)
    assert problem in line and "\n" not in line
    path.write_bytes("prompt,answer\nq,1\nq,é\n".encode("latin1"))
    assert "line 3: not UTF-8" in problems(path)[0]
    path.write_bytes("prompt,answer\nq,1\n".encode("utf-16"))
    assert "UTF-16" in problems(path)[0]


def test_other_forms_are_named(tmp_path):
    for name in ("a.xlsx", "a.txt", "a"):
        (tmp_path / name).write_text("x")
        assert ".jsonl, .json, .csv, .tsv, .parquet" in problems(tmp_path / name)[0]
    assert "not found" in problems(tmp_path / "absent.csv")[0]


# ---- Parquet and the hub: one stated spelling per type ---------------------------------------------------------------

TYPED = {
    "whole": (pa.array([7, None]), ["7", ""]),
    "big": (pa.array([Decimal("123456789012345678901234567890")]), ["123456789012345678901234567890"]),
    "with gaps": (pa.array([42.0, 3.5, 0.1, 1e22]), ["42", "3.5", "0.1", "1e+22"]),
    "narrow": (pa.array([0.1, 2.0], pa.float32()), ["0.1", "2"]),
    "money": (pa.array([Decimal("3.50"), Decimal("0.00")]), ["3.50", "0.00"]),
    "tiny decimal": (pa.array([Decimal("0.0000000001")]), ["0.0000000001"]),
    "booleans": (pa.array([True, False]), ["true", "false"]),
    "dates": (pa.array([date(2024, 1, 5)]), ["2024-01-05"]),
    "times": (pa.array([datetime(2024, 1, 5, 14, 30)], pa.timestamp("ns")), ["2024-01-05 14:30:00"]),
    "categories": (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    "bytes": (pa.array(["é".encode()]), ["é"]),
    "large": (pa.array(["x"], pa.large_string()), ["x"]),
}


@pytest.mark.parametrize("column, expected", TYPED.values(), ids=TYPED.keys())
def test_types_of_parquet_have_one_spelling(tmp_path, column, expected, monkeypatch):
    table = pa.table({"prompt": ["q"] * len(column), "answer": column})
    pq.write_table(table, tmp_path / "a.parquet")
    assert answers(tmp_path / "a.parquet") == expected
    from datasets import Dataset

    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: Dataset(table))
    assert answers("hub:org/name") == expected and answers("hub:org/name", limit=1) == expected[:1]


def test_nested_parquet_and_its_mistakes(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"q": ["x"], "options": [[1.5, 2.0, None]], "s": [{"a": 1}], "raw": [b"\xff"]}), path
    )
    keys = {"prompt_column": "q", "answer_column": ""}
    assert answers(path, **keys) == [""], "what no key of the recipe names may hold anything"
    assert "an object in 's'" in problems(path, prompt_column="q", answer_column="s")[0]
    assert "not UTF-8 in 'raw'" in problems(path, prompt_column="q", answer_column="raw")[0]
    assert "takes text, numbers and lists" in problems(path, template="{options}", answer_column="")[0]
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], ["prompt", "prompt"]), path)
    assert "two columns 'prompt'" in problems(path)[0]
    wrong = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"prompt": wrong, "answer": ["1"]}), path)
    assert "without a form here" in problems(path)[0]
    pq.write_table(pa.table({"prompt": ["q"], "answer": pa.array([2**60], pa.timestamp("ms"))}), path)
    assert "without a form here" in problems(path)[0]
    path.write_bytes(b"PAR1 not really")
    assert "cannot be read as Parquet" in problems(path)[0]


# ---- any text comes back ---------------------------------------------------------------------------------------------

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None)
@given(texts=st.lists(ANY, min_size=1, max_size=5), ascii=st.booleans())
def test_any_text_through_jsonl(tmp_path_factory, texts, ascii):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps({"prompt": f"q{t}", "answer": t}, ensure_ascii=ascii) for t in texts]
    path.write_bytes("\n".join(lines).encode())
    rows = file_prompts(str(path), Prompts(source=str(path)), "train")
    assert [r["answer"] for r in rows] == texts
    assert [r["messages"][0]["content"] for r in rows] == [f"q{t}" for t in texts]


@settings(deadline=None)
@given(texts=st.lists(ANY, min_size=1, max_size=5), form=st.sampled_from(["csv", "tsv"]))
def test_any_text_through_csv(tmp_path_factory, texts, form):
    path = tmp_path_factory.getbasetemp() / f"any.{form}"
    made = io.StringIO(newline="")
    writer = csv.writer(made, delimiter="," if form == "csv" else "\t", quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt", "answer"], *([f"q{t}", t] for t in texts)])
    path.write_bytes(made.getvalue().encode())
    rows = file_prompts(str(path), Prompts(source=str(path)), "train")
    assert [r["answer"] for r in rows] == texts
    assert [r["messages"][0]["content"] for r in rows] == [f"q{t}" for t in texts]


# ---- runs of before ------------------------------------------------------------------------------------------------


def test_old_folders_are_finished_unless_their_file_reads_otherwise(tmp_path, make_recipe):
    from distill.config.recipe import load_recipe

    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "q", "answer": 4}\n')
    path, run_dir = make_recipe()
    recipe = load_recipe(path, [f"prompts.source={data}", f"evaluate.source={data}"])
    made = make_prompts(recipe)
    assert made["reading"] == 2 and "last_turn" not in made["config"]["prompts"]
    manifest = run_dir / "prompts" / "manifest.json"
    write_json(manifest, {key: value for key, value in made.items() if key != "reading"})
    assert "reading" not in make_prompts(recipe), "the same rows: finished, and left alone"

    data.write_text('{"prompt": "q", "answer": 4.0}\n')
    old = {**read_json(manifest), "config": {**made["config"]}}
    from distill.data.prompts import source_hash

    old["config"]["source_hash"] = source_hash(str(data))
    identity = {key: old[key] for key in ("config", "inputs")}
    old["fingerprint"] = fingerprint({"identity": identity, "files": old["files"]})
    write_json(manifest, old)
    with pytest.raises(UserError, match=r"row 1, answer: '4' -> '4.0'.*--redo"):
        make_prompts(recipe)
    assert make_prompts(recipe, redo=True)["reading"] == 2
    assert [row["answer"] for row in read_rows(run_dir / "prompts")] == ["4.0"]


def test_a_recipe_with_another_last_turn_is_another_recipe(tmp_path, make_recipe):
    from distill.config.recipe import load_recipe

    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "q", "answer": 4}\n')
    path, _ = make_recipe()
    overrides = [f"prompts.source={data}", f"evaluate.source={data}"]
    make_prompts(load_recipe(path, overrides))
    with pytest.raises(UserError, match="last_turn: None -> reference"):
        make_prompts(load_recipe(path, [*overrides, "prompts.last_turn=reference"]))


# ---- on the command line: exit code 2, one line each, nothing written ------------------------------------------------


@pytest.mark.parametrize(
    "name, raw",
    [
        ("latin.jsonl", '{"prompt": "café", "answer": "1"}\n'.encode("latin1")),
        ("ragged.csv", b"prompt,answer\nq,1,2\n"),
        ("wide.jsonl", GOOD.decode().encode("utf-16")),
        ("nested.jsonl", b'{"prompt": "q", "answer": ["1"]}'),
    ],
)
def test_refused_files_leave_nothing(tmp_path, run_cli, make_recipe, hub, name, raw):
    (tmp_path / name).write_bytes(raw)
    path, run_dir = make_recipe()
    good = tmp_path / "good.jsonl"
    good.write_bytes(GOOD)
    for source, held_out in ((tmp_path / name, good), (good, tmp_path / name)):
        words = [f"prompts.source={source}", f"evaluate.source={held_out}"]
        code, _, err = run_cli("run", path, *words)
        assert code == 2 and name in err and "Traceback" not in err and not run_dir.exists(), err
        assert len([line for line in err.splitlines() if line.startswith("distill: ")]) == 1
    out = tmp_path / "out"
    code, _, err = run_cli("evaluate", hub["llama"], "--tasks", tmp_path / name, "--out", out)
    assert code == 2 and name in err and "Traceback" not in err and not out.exists(), err


def test_both_files_are_told_at_once(tmp_path, run_cli, make_recipe):
    path, run_dir = make_recipe()
    for name in ("one.jsonl", "two.csv"):
        (tmp_path / name).write_bytes('{"prompt": "é"}'.encode("latin1"))
    words = [f"prompts.source={tmp_path / 'one.jsonl'}", f"evaluate.source={tmp_path / 'two.csv'}"]
    code, _, err = run_cli("generate", path, *words)
    assert code == 2 and "one.jsonl" in err and "two.csv" not in err
    code, _, err = run_cli("run", path, *words)
    assert code == 2 and "one.jsonl" in err and "two.csv" in err and not run_dir.exists()
