"""One lesson while it runs: its folder, ranges, exercises, the quiz, and the account of what was done.

    from distill.lessons import begin, expect, exercise
    folder = begin(1)                                    # seed, quiet libraries, figures; where this lesson may write
    expect("teacher, hard problems", accuracy, 0.9, 1.0, without=0.02)  # the value, its range, and what breaks it
    exercise("1.1", lambda: mine(3) == 9, "square it")             # "solved", or "not solved yet" and the hint

A range that cannot fail says nothing. So a number comes with `without`: the same measurement with the mechanism
taken away (the model before training, one scale for all, no balancing). It must lie outside the range.

A learner's kernel never stops at a number outside its range or at an exercise not done: both are printed and kept in
`EXPECTED` and `EXERCISES`, from which the account is made.

A Chinese lesson prints and draws in Chinese, by lines.zh.yaml and labels.zh.yaml in recipes/workshop.

`scaled` and `short` are for the tests alone: in a source, `scaled(80, 8)` is 80 for the learner, whose notebook shows
`80`, and 8 with DISTILL_LESSON_BUDGET=short. DISTILL_LESSON_DIR is where runs go instead of checkpoints/workshop.

What a learner has done: the account of a lesson, the quiz at its end, and the certificate of a whole workshop.

    quiz(1, {1: "b", 2: "a", 3: "c"})      # prints what is right and why, and keeps lesson 1's account
    certificate("Ada")                      # a page of all lessons done so far; returns its path

Questions lie in recipes/workshop/quiz.yaml, accounts beside the runs of their lesson (`account.json`).
"""

import builtins
import contextlib
import io
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeVar

from distill.errors import UserError
from distill.report.pages import filled, form_pattern, page_environment, retold, speaking
from distill.storage import PROJECT_ROOT, find_file, parse_yaml, read_json, write_atomic, write_json

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm falls back to text
# PEFT looks for the base's config by a path of its own; the vocabulary is the base's in any case.
warnings.filterwarnings("ignore", message="Could not find a config file")

BUDGET = "DISTILL_LESSON_BUDGET"
FOLDER = "DISTILL_LESSON_DIR"
BOTH = "DISTILL_LESSON_BOTH"  # set by the builder of the notebooks: every figure in Chinese too
T = TypeVar("T")


@dataclass(frozen=True)
class Expectation:
    """One number of a lesson, the range it should lie in, and the number without what the lesson teaches.

    `checked` is false where the short budget is too short to say anything.
    """

    name: str
    value: float
    low: float
    high: float
    checked: bool = True
    without: float | None = None

    @property
    def met(self) -> bool:
        return self.low <= self.value <= self.high


EXPECTED: list[Expectation] = []  # of the lesson in progress
EXERCISES: dict[str, bool] = {}  # exercise -> solved
NOW: dict[str, Any] = {"lesson": None, "language": "en", "labels": "en"}

WORDS = {  # their Chinese, as that of all that a cell prints, is in lines.zh.yaml
    "expected": "{name}: {value:.4g}   (expected {low:g} to {high:g}: {verdict}{without})",
    "without": "; if it did not work: {without:.4g}",
    "short": "short budget",
    "ok": "ok",
    "outside": "OUTSIDE: see 'What commonly goes wrong'",
    "solved": "exercise {number}: solved",
    "wrong": "exercise {number}: not yet right. Hint: {hint}",
    "empty": "exercise {number}: to do. Put your code in place of the three dots in the cell above. Hint: {hint}",
    "raised": "exercise {number}: your code stopped with {error}. Hint: {hint}",
    "font": "No font with Chinese letters was found: the words in figures stay English (Noto Sans CJK has them).",
    "needs": "This lesson needs {model}, which is not here. Type this in a terminal in the project's folder, "
    "then run this cell again:\n{command}",
}


def word(key: str, **values: Any) -> str:
    """A line in the language of the lesson."""
    line = WORDS[key].format(**values)
    return said_in_chinese(line, NOW["lesson"]) if NOW["language"] == "zh" else line


def short_budget() -> bool:
    """Whether DISTILL_LESSON_BUDGET asks for the short run. Raises UserError for another word."""
    asked = os.environ.get(BUDGET, "full")
    if asked not in ("full", "short"):
        raise UserError(f"{BUDGET}={asked!r}: use full (what a learner runs) or short (what the tests run)")
    return asked == "short"


def scaled(full: T, short: T) -> T:
    """The first in a lesson, the second where a test runs it. Notebooks show the first alone."""
    return short if short_budget() else full


def lessons_folder() -> Path:
    """Where the lessons' runs and records lie."""
    return Path(os.environ.get(FOLDER) or PROJECT_ROOT / "checkpoints" / "workshop")


def begin(lesson: int, language: str = "en") -> Path:
    """Start lesson `lesson`: nothing expected or solved yet, fixed seed, quiet libraries; returns its folder."""
    import matplotlib.pyplot as plt
    import torch

    from distill.devices import pick_device

    if language not in RECORD_WORDS:
        raise UserError(f"begin({lesson}, {language!r}): one of {', '.join(RECORD_WORDS)}")
    EXPECTED.clear()
    EXERCISES.clear()
    NOW.update(lesson=lesson, language=language)
    pick_device("cpu")
    torch.manual_seed(0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    plt.rcParams.update({"figure.figsize": (7, 3), "figure.dpi": 150, "savefig.bbox": "tight"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams["figure.constrained_layout.use"] = True  # labels of one figure stay out of its neighbour
    plt.rcParams.update({"grid.alpha": 0.3, "font.size": 10, "legend.frameon": False})
    _label_in(language)
    _print_in_the_language()
    folder = lessons_folder() / f"lesson{lesson}{scaled('', '-short')}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- the language of figures and of what is printed

WORKSHOP = PROJECT_ROOT / "recipes" / "workshop"
SENTENCES = (WORKSHOP / "code.zh.yaml", PROJECT_ROOT / "recipes" / "zh" / "claims.yaml")  # hints; the claims


def _label_in(language: str) -> None:
    """Figures with labels in `language`, from here on; with BOTH, each is shown in Chinese as well."""
    import matplotlib.pyplot as plt

    from distill.report.drawing import chinese_font

    NOW["labels"] = "en"
    both = bool(os.environ.get(BOTH))
    if language == "en" and not both:
        return
    if (font := chinese_font()) is None:
        return print(word("font")) if language == "zh" else None
    plt.rcParams["font.family"] = ["DejaVu Sans", font]  # the second for letters that the first has not
    _translate_text()
    NOW["labels"] = language
    if both and not hasattr(plt.show, "both"):
        plt.show = _shown_in_both(plt.show)


def _translate_text() -> None:
    """Whatever matplotlib is given to write, it writes in the language of the labels."""
    from matplotlib.text import Text

    if hasattr(original := Text.set_text, "original"):
        return

    def set_text(self, text):
        original(self, in_chinese(text) if NOW["labels"] == "zh" and isinstance(text, str) else text)

    set_text.original = original
    Text.set_text = set_text


@cache
def in_chinese(label: str) -> str:
    """A label in Chinese; one that labels.zh.yaml does not have stays as it is."""
    labels = _chinese_of(WORKSHOP / "labels.zh.yaml")
    with speaking("zh"):
        return retold(label, labels, labels.__getitem__)


@cache
def _chinese_of(file: Path) -> dict[Any, Any]:
    return parse_yaml(file.read_text(encoding="utf-8")) if file.is_file() else {}


def said_in_chinese(text: str, lesson: int | None) -> str:
    """What a lesson prints, in Chinese, line by line; a line that lines.zh.yaml does not have stays as it is."""
    return "\n".join(_by_its_form(line, lesson) or _known(line) for line in text.split("\n"))


def _by_its_form(line: str, lesson: int | None) -> str:
    """A line by the first form that it has; "" for one without. Its parts are names, sentences or lines again."""
    for pattern, chinese in _forms(lesson):
        if found := pattern.fullmatch(line.strip()):
            parts = found.groupdict()
            for name, text in parts.items():
                parts[name] = known if (known := _known(text)) != text else _by_its_form(text, lesson) or text
            told = filled(chinese, parts)
            return told if told[0] == " " else line[: len(line) - len(line.lstrip())] + told
    return ""


def _known(text: str) -> str:
    """A sentence, a label or a name."""
    return next((table[text] for table in map(_chinese_of, SENTENCES) if text in table), in_chinese(text))


@cache
def _forms(lesson: int | None) -> list[tuple[re.Pattern, str]]:
    """The lines that a lesson prints, its own last, as (pattern, Chinese)."""
    lines = _chinese_of(WORKSHOP / "lines.zh.yaml")
    forms = [form for part in ("all", lesson) for form in lines.get(part, {}).items()]
    return [(form_pattern(english), chinese) for english, chinese in forms]


def _print_in_the_language() -> None:
    """`print` says its lines in the language of the lesson in progress, from here on."""
    if NOW["language"] == "en" or hasattr(builtins.print, "original"):
        return
    original = builtins.print

    def told(*values: Any, sep: str | None = None, file: Any = None, **options: Any) -> None:
        if NOW["language"] == "zh" and file is None:
            values = (said_in_chinese((" " if sep is None else sep).join(map(str, values)), NOW["lesson"]),)
        original(*values, sep=sep, file=file, **options)

    told.original = original
    builtins.print = told


def _shown_in_both(show: Callable[..., None]) -> Callable[..., None]:
    """`plt.show`, before which every open figure is shown with Chinese labels, marked so that the builder knows it."""

    def shown(*arguments: Any, **options: Any) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import Image
        from matplotlib.text import Text

        for figure in map(plt.figure, plt.get_fignums()):
            texts = [(text, text.get_text()) for text in figure.findobj(Text)]
            NOW["labels"] = "zh"
            for text, words in texts:
                text.set_text(words)
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png")
            NOW["labels"] = "en"
            for text, words in texts:
                text.set_text(words)
            shown_in_chinese(Image(data=drawn.getvalue()))
        show(*arguments, **options)

    shown.both = True
    return shown


def shown_in_chinese(thing: Any) -> None:
    """Show what stands in the Chinese notebook in place of what is shown next. With BOTH alone."""
    from IPython.display import display

    display(thing, metadata={"lang": "zh"})


class NotInstalled(UserError):
    """Ends a lesson in one sentence: a notebook shows it without a traceback, and runs no cell after it."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def needs(model: str, command: str) -> str:
    """`model`, a checkpoint that is not shipped. Raises NotInstalled, naming the `command` that brings it."""
    if not (find_file(model) / "config.json").is_file():
        raise NotInstalled(word("needs", model=model, command=command))
    return model


def expect(name: str, value: float, low: float, high: float, short: tuple[float, float] | bool = False, *,
           without: float | None = None) -> None:  # fmt: skip
    """Print `value` beside the range it should lie in, and keep both.

    without: the same measurement where what the lesson teaches is taken away; the range must refuse it.
    The range is of the full budget. `short`: the range in the short one, True for the same, False if none holds.
    """
    value, checked = float(value), not short_budget() or short is not False
    low, high = short if short_budget() and isinstance(short, tuple) else (low, high)
    broken = None if without is None else float(without)
    found = Expectation(name, value, float(low), float(high), checked, broken)
    EXPECTED.append(found)
    verdict = WORDS["short" if not checked else "ok" if found.met else "outside"]
    broken_words = "" if broken is None else WORDS["without"].format(without=broken)
    print(word("expected", name=name, value=value, low=low, high=high, verdict=verdict, without=broken_words))


def exercise(number: str, test: Callable[[], Any], hint: str) -> None:
    """Run `test` on what the learner wrote and print whether it is solved; never raises for a wrong answer."""
    solved, error = False, ""
    try:
        solved = bool(test())
    except Exception as raised:  # the learner's code may do anything; the lesson goes on
        error = f"{type(raised).__name__}: {raised}"[:120]
    line = "solved" if solved else "empty" if _left_alone(test) else "raised" if error else "wrong"
    EXERCISES[number] = solved
    print(word(line, number=number, hint=hint, error=error))


def _left_alone(test: Callable[[], Any]) -> bool:
    """Whether something that `test` uses is still three dots: a name, or a function without another line."""
    if not isinstance(test, FunctionType):
        return False
    used = (test.__globals__.get(name) for name in _names(test.__code__))
    return any(one is ... or (isinstance(one, FunctionType) and _only_dots(one)) for one in used)


def _names(code: CodeType) -> set[str]:
    """Global names that a function uses, those of its inner functions and generators too."""
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _only_dots(function: FunctionType) -> bool:
    """`def f(x): ...` and nothing more: it returns None and names nothing."""
    return function.__code__.co_code == _dots.__code__.co_code and set(function.__code__.co_consts) <= {None}


def _dots(): ...


# ---- problems, answers, runs


def held_out_problems(
    per_level: dict[str, int], seed: int = 0, families: list[str] | None = None
) -> list[dict]:
    """Problems of the test split, as {"prompt_id", "family", "level", "messages", "answer", "verifier", ...}."""
    from distill.config.data import Prompts
    from distill.data.prompts import task_prompts

    chosen = Prompts(families=families) if families else Prompts()
    return task_prompts("test", per_level, chosen, seed)


def ask(model, tokenizer, problems: list[dict], **how) -> list[dict]:
    """Answers with verdicts, one row per (problem, sample); `how` are keys of the recipe section `evaluate`.

    Greedy unless `temperature` is given. A row has "text", "verdict", "tokens", "prompt_id", "family", "level", ...
    """
    from distill.config.recipe import load_evaluate
    from distill.evaluation.answers import answer_problems

    # A worked solution has 42 tokens at most, and its end is one; a student of a few steps never ends its answer.
    section = load_evaluate({"max_new_tokens": scaled(80, 44), **how})
    return answer_problems(model, tokenizer, problems, "", section, bar=False)[0]


def accuracy(rows: list[dict]) -> float:
    """Share of rows whose verdict is "correct"."""
    return sum(row["verdict"] == "correct" for row in rows) / len(rows)


def experiment(folder: Path, overrides: list[str], data: Path | None = None, command: str = "train",
               recipe: str = "recipes/demo.yaml") -> Path:  # fmt: skip
    """A shipped recipe with `overrides`, run as `distill COMMAND RECIPE run_dir=FOLDER ...` does; returns `folder`.

    data: a run whose prompts, answers and dataset are used instead of making them again. A folder that was made
    with other settings is made anew: it is the lesson's own.
    """
    from distill import pipeline
    from distill.config.recipe import load_recipe

    loaded = load_recipe(recipe, [*overrides, f"run_dir={folder}"])
    for stage in ("prompts", "generations", "dataset") if data else ():
        shutil.rmtree(folder / stage, ignore_errors=True)
        shutil.copytree(data / stage, folder / stage)
    with contextlib.redirect_stdout(io.StringIO()):  # which precision, what trains: in the manifest as well
        pipeline.run(loaded, command, redo=True, say=lambda _line: None)
    return folder


def share(rows: list[dict]) -> str:
    """Right answers with their 95 % interval (Wilson), as "81 % [72, 88] of 84": how a share should be told."""
    from distill.evaluation.stats import wilson_interval

    right = sum(row["verdict"] == "correct" for row in rows)
    low, high = wilson_interval(right, len(rows))
    return f"{100 * right / len(rows):.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {len(rows)}"


def step_log(arm: Path) -> list[dict]:
    """One record per optimizer step of a trained arm, as RUN_DIR/student: "step", "loss", "grad_norm", ..."""
    return [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]


# ==== What a learner has done ====

QUESTIONS = PROJECT_ROOT / "recipes" / "workshop" / "quiz.yaml"
LETTERS = "abc"
RECORD_WORDS = {
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
    say, language, right = RECORD_WORDS[NOW["language"]], NOW["language"], 0
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
    say, rows, done = RECORD_WORDS[language], [], 0
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
