"""What a learner has done: the account of a lesson, the quiz at its end, and the certificate of a whole workshop.

    quiz(1, {1: "b", 2: "a", 3: "c"})      # prints what is right and why, and keeps lesson 1's account
    certificate("Ada")                      # a page of all lessons done so far; returns its path

Questions lie in recipes/workshop/quiz.yaml, in both languages; the builder prints them into the notebooks. Accounts
lie beside the runs of their lesson (`account.json`), so a workshop may be interrupted, or spread over days.
"""

import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.lessons.lesson import EXERCISES, EXPECTED, NOW, lessons_folder
from distill.report.pages import page_environment
from distill.storage import PROJECT_ROOT, parse_yaml, read_json, write_atomic, write_json

QUESTIONS = PROJECT_ROOT / "recipes" / "workshop" / "quiz.yaml"
LETTERS = "abc"
WORDS = {
    "en": {
        "right": "{n}. {letter}: right. {why}",
        "wrong": "{n}. {given}: no. {why}",
        "open": "{n}. not answered yet: write a, b or c",
        "score": "quiz: {right} of {of}",
        "title": "Workshop on distillation",
        "of": "{name} has done {done} of {lessons} lessons.",
        "head": ("lesson", "numbers in their range", "exercises solved", "quiz"),
        "none": "not done",
        "note": "Made on {date} by the lessons, from what was run on this machine. It proves nothing to others.",
    },
    "zh": {
        "right": "{n}. {letter}：对。{why}",
        "wrong": "{n}. {given}：不对。{why}",
        "open": "{n}. 还没作答：请写 a、b 或 c",
        "score": "小测：{of} 题答对 {right} 题",
        "title": "蒸馏工作坊",
        "of": "{name} 已完成 {lessons} 课中的 {done} 课。",
        "head": ("课", "落在区间内的数值", "完成的练习", "小测"),
        "none": "未完成",
        "note": "{date} 由课程根据本机的运行结果生成，只供自己留念，不能作为证明。",
    },
}


@cache
def questions() -> dict[int, list[dict[str, Any]]]:
    """Of every lesson its questions: `right` (a letter), and per language `question`, `options`, `why`."""
    return parse_yaml(QUESTIONS.read_text(encoding="utf-8"))


def account() -> dict[str, Any]:
    """What the lesson in progress measured, as plain JSON: for `build`, the tests and the certificate."""
    import torch

    expected = [asdict(e) | {"met": e.met} for e in EXPECTED]
    used = {"cpu_seconds": round(time.process_time(), 1), "threads": torch.get_num_threads()}
    return {"expected": expected, "exercises": dict(EXERCISES), **used}


def quiz(lesson: int, answers: dict[int, str]) -> None:
    """Score the learner's letters, say why for each, and keep the account of the lesson with the score.

    UserError for a lesson without questions.
    """
    asked = questions().get(lesson)
    if not asked:
        raise UserError(f"quiz({lesson}): there are questions for lessons {', '.join(map(str, questions()))}")
    say, language, right = WORDS[NOW["language"]], NOW["language"], 0
    for n, one in enumerate(asked, 1):
        given = str(answers.get(n, "")).strip().lower()
        line = "right" if given == one["right"] else ("wrong" if given in LETTERS and given else "open")
        right += line == "right"
        print(say[line].format(n=n, letter=one["right"], given=given, why=one[language]["why"]))
    print(say["score"].format(right=right, of=len(asked)))
    if NOW["lesson"] == lesson:
        write_json(_record(lesson), account() | {"quiz": [right, len(asked)]})


def _record(lesson: int) -> Path:
    folder = lessons_folder() / f"lesson{lesson}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "account.json"


def certificate(name: str, language: str | None = None) -> Path:
    """Write `certificate.html` beside the lessons' folders: each lesson with its numbers, exercises and quiz."""
    language = language or NOW["language"]
    say, rows, done = WORDS[language], [], 0
    for lesson in questions():
        path = lessons_folder() / f"lesson{lesson}" / "account.json"
        cells = [str(lesson), say["none"], "", ""]
        if path.is_file():
            told = read_json(path)
            met, solved = [e["met"] for e in told["expected"]], list(told["exercises"].values())
            pairs = ((sum(met), len(met)), (sum(solved), len(solved)), told["quiz"])
            cells = [str(lesson), *(f"{got} / {of}" for got, of in pairs)]
            done += 1
        rows.append(cells)
    values = {
        "lang": "zh-CN" if language == "zh" else "en", "title": say["title"], "head": say["head"], "rows": rows,
        "who": say["of"].format(name=name, done=done, lessons=len(rows)),
        "note": say["note"].format(date=time.strftime("%Y-%m-%d")),
    }  # fmt: skip
    page = page_environment().get_template("certificate.html.j2").render(**values)
    path = lessons_folder() / "certificate.html"
    write_atomic(path, page)
    print(path)
    return path
