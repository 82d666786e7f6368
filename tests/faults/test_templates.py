"""Chat templates that go wrong for one conversation of many: one line with the row, and nothing lost.

A template is a program. `distill/models/folders.py` tries it on a few questions before anything else; here it behaves
until a question has the word "seven".
"""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from distill.config.data import TeacherSection
from distill.data.teachers import HOPELESS, LocalTeacher, Question
from distill.doctor.pair import Pair
from distill.errors import RunError, UserError
from distill.models import chat
from distill.models.chat import prompt_ids
from distill.models.decode import Sampling
from distill.storage import read_json, read_rows

WORST = {
    "raises": "{{ raise_exception('unlucky') }}",
    "fails": "{{ nothing.at.all }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "writes": "{{ 'x' * 10000000 }}",
    "hoards": "{{ ('x' * 10000000000) | length }}",
    "doubles": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
}
SAID = {
    "raises": "unlucky",
    "fails": "undefined",
    "loops": "end within",
    "writes": "10,000,0",
    "hoards": "MB",
}


def template(worst: str) -> str:
    return (
        f"{{% if 'seven' in messages[-1]['content'] %}}{WORST[worst]}{{% endif %}}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )


def asked(*words: str) -> list[dict]:
    return [{"prompt_id": w, "messages": [{"role": "user", "content": f"what is {w}?"}]} for w in words]


@pytest.mark.parametrize("worst", WORST)
def test_time_memory_and_length_are_limited(worst, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    monkeypatch.setattr(chat, "MEMORY", 2**26)  # a string of a gigabyte is seconds of work
    tokenizer = byte_tokenizer(template(worst))
    good, bad = asked("six", "seven")
    begun = time.process_time()
    with pytest.raises(UserError, match="refuses these messages") as caught:
        prompt_ids(tokenizer, bad["messages"])
    assert time.process_time() - begun < 3 and SAID.get(worst, "MB") in str(caught.value)
    assert tokenizer.decode(prompt_ids(tokenizer, good["messages"])) == "what is six?:"
    with pytest.raises(UserError, match=r"^who, row seven \(what is seven\?\): .*; leave this row out"):
        chat.check_prompts(tokenizer, asked("six", "seven", "eight"), "who")


def test_a_thread_is_not_held_either():
    """No signal reaches it: `distill play` answers in threads."""
    tokenizer, found = byte_tokenizer(template("loops")), []

    def ask(word: str) -> None:
        try:
            found.append(len(prompt_ids(tokenizer, asked(word)[0]["messages"])))
        except UserError as error:
            found.append(str(error))

    for word in ("six", "seven"):
        thread = threading.Thread(target=ask, args=[word])
        thread.start()
        thread.join(60)
    assert found[0] == len("what is six?:") and "does not end within" in found[1]


def test_many_rows_are_told_five_at_a_time():
    with pytest.raises(UserError) as caught:
        chat.check_prompts(byte_tokenizer(template("raises")), asked(*(f"seven{i}" for i in range(9))), "who")
    assert len(caught.value.problems) == 6 and caught.value.problems[-1] == "and more of them"


@pytest.fixture
def unlucky(tmp_path, hub) -> str:
    """The tiny llama with such a template."""
    folder = Path(shutil.copytree(hub["llama"], tmp_path / "unlucky"))
    byte_tokenizer(template("raises")).save_pretrained(folder)
    return str(folder)


def test_a_local_teacher_answers_the_others(unlucky):
    """Each question by its own seed: the answers are those of the others alone."""
    teacher = LocalTeacher(TeacherSection(model=unlucky), "cpu", 8)

    def answers(*words: str):
        questions = [
            Question(row["messages"], (0, row["prompt_id"], i)) for row in asked(*words) for i in (0, 1)
        ]
        return teacher.answer(questions, Sampling(1.0, max_new_tokens=4), done.append)

    done = []
    found = answers("six", "seven", "eight")
    assert len(done) == 6 and [a.finish_reason == "error" for a in found] == [0, 0, 1, 1, 0, 0]
    assert "unlucky" in found[2].error and found[2].text == ""
    assert [a.completion_ids for a in found[:2] + found[4:]] == [
        a.completion_ids for a in answers("six", "eight")
    ]
    with pytest.raises(RunError, match=f"{HOPELESS} questions in a row fail, the last with: .*unlucky"):
        answers(*(f"seven{i}" for i in range(HOPELESS)))


@pytest.fixture
def recipe(make_recipe, tmp_path):
    """(path, run folder, overrides) over files of questions: recipe("llama", "llama", seven_in="train")."""

    def write(teacher: str, student: str, seven_in: str):
        path, run_dir = make_recipe(teacher, student)
        for name in ("train", "test"):
            words = ["one", "two", "three", "seven" if name == seven_in else "eight", "nine"]
            lines = [json.dumps({"prompt": f"{name}: what is {w}?", "answer": "7"}) for w in words]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        keys = [f"prompts.source={tmp_path / 'train.jsonl'}", f"evaluate.source={tmp_path / 'test.jsonl'}"]
        return path, run_dir, [*keys, "filter.decontaminate=false", "filter.finish_reasons=[stop, length]"]

    return write


@pytest.mark.parametrize("who, file", [("teacher", "train"), ("student", "train"), ("student", "test")])
def test_what_can_be_read_is_told_before_the_first_stage(recipe, run_cli, unlucky, who, file):
    pair = {"teacher": (unlucky, "llama"), "student": ("llama", unlucky)}[who]
    path, run_dir, keys = recipe(*pair, seven_in=file)
    code, _, err = run_cli("run", path, *keys)
    assert code == 2 and not run_dir.exists()
    (line,) = [line for line in err.splitlines() if "what is seven?" in line]
    assert who in line and "unlucky" in line and "leave this row out" in line


def test_filter_drops_what_the_student_cannot_be_asked(recipe, run_cli, unlucky, monkeypatch):
    """By the stage itself: rows of the hub are not looked at before."""
    path, run_dir, keys = recipe("llama", unlucky, seven_in="train")
    monkeypatch.setattr(Pair, "training_rows", None)
    code, _, err = run_cli("generate", path, *keys)
    assert code == 0, err
    code, _, err = run_cli("filter", path, *keys)
    assert code == 0 and err.count("rule template") == err.count("what is seven?") == 1, err
    counts = read_json(run_dir / "dataset" / "manifest.json")["counts"]
    assert counts["dropped_by_rule"] == {"template": 2} and counts["kept"] == 8
    assert all("unlucky" in row["detail"] for row in read_rows(run_dir / "dataset" / "dropped"))


def test_evaluate_and_train_name_the_row_and_begin_nothing(recipe, run_cli, unlucky, tmp_path, monkeypatch):
    path, run_dir, keys = recipe("llama", "llama", seven_in="test")
    tasks = str(tmp_path / "test.jsonl")
    code, _, err = run_cli("evaluate", unlucky, "--tasks", tasks, "--out", tmp_path / "out")
    assert code == 2 and "what is seven?" in err and not (tmp_path / "out").exists(), err
    path, run_dir, keys = recipe("llama", "other_vocabulary", seven_in="train")
    keys += ["train.objectives=[{name: uld}]", "control.enabled=false"]
    for command in ("generate", "filter"):
        assert run_cli(command, path, *keys)[0] == 0
    monkeypatch.setattr(Pair, "training_rows", None)
    code, _, err = run_cli("train", path, *keys, f"teacher.model={unlucky}")
    assert code == 2 and "what is seven?" in err and not (run_dir / "student" / "metrics.jsonl").exists(), err
