"""The workshop: every lesson runs, its exercises' solutions hold, its notebooks are what their source makes."""

import ast
import builtins
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT
from half_right import HALF_RIGHT

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("jupytext", reason="the extra `workshop` is not installed")
matplotlib.use("Agg")

import build as workshop  # noqa: E402
import source  # noqa: E402

from distill.config.recipe import load_recipe  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.lessons import lesson as lessons  # noqa: E402
from distill.lessons.lesson import LETTERS, questions  # noqa: E402
from distill.report import drawing  # noqa: E402

NUMBERS = workshop.lesson_numbers()
FULL = workshop.results()["lessons"]


@pytest.fixture
def short(monkeypatch, tmp_path):
    monkeypatch.setenv(lessons.BUDGET, "short")
    monkeypatch.setenv(lessons.FOLDER, str(tmp_path))
    return tmp_path


# ---- every lesson -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg")
@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_runs_and_its_solutions_hold(number, short, capsys, monkeypatch):
    """And an answer that is half right, in the place of the solution, does not count as solved.

    Whatever its figures say and its cells print has a Chinese form, a word that is a key of a dictionary too.
    """
    import matplotlib.pyplot as plt

    lesson, tried, drawn = workshop.read_lesson(number), set(), set()
    monkeypatch.setattr(plt, "show", lambda: drawn.update(_texts_of_figures()))

    def half_right(index: int, names: dict) -> None:
        cell = lesson.cells[index]
        if cell.kind != "code" or not (found := re.search(r'exercise\(\s*"(\d\.\d)"', cell.source)):
            return
        solution = next(c.source for c in reversed(lesson.cells[:index]) if c.kind == "solution")
        tried.add(found[1])
        for answer, solved in ((HALF_RIGHT[found[1]], False), (solution, True)):
            exec(answer, names)
            exec(cell.source, names)
            assert lessons.EXERCISES[found[1]] is solved, f"{found[1]}: {answer}"

    told = workshop.execute(lesson, solutions=True, after=half_right)
    plt.close("all")
    printed = capsys.readouterr().out
    assert {text for text in drawn if _is_english(lessons.in_chinese(text))} == set()
    assert [line for line in printed.splitlines() if _left_in_english(line, number)] == []
    assert tried == set(told["exercises"])
    unsolved = [name for name, solved in told["exercises"].items() if not solved]
    assert 2 <= len(told["exercises"]) <= 3 and not unsolved, printed
    outside = [e for e in told["expected"] if e["checked"] and not e["met"]]
    assert sum(e["checked"] for e in told["expected"]) >= 2 and not outside


def _texts_of_figures() -> set[str]:
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    for figure in (figures := [plt.figure(n) for n in plt.get_fignums()]):
        figure.canvas.draw()
    texts = {text.get_text() for figure in figures for text in figure.findobj(Text)}
    plt.close("all")
    return texts


# What the field writes in Latin letters, names of models, and words of code: in Chinese sentences as they are.
LATIN = re.compile(
    r"(?<![a-zA-Z])(?:auto|logit|reap|nvfp4|experts|fp8-emulated|model\.layers\.\d\.mlp|wrong_rule|hidden_step|wrong_answer|"
    r"duplicate|truncated|MaxVio|float|bfloat|autocast|Accelerate|LiveCodeBench|Diamond|think|mathdefault|times|attention|beta|nats|gradient|Hopper|"
    r"distill cost [\w-]+|train\.precision=\w+|student\.lora\.experts: true|提示：.*)(?![a-zA-Z])"
)
# What the lessons print of models, problems and files, as patterns of whole lines.
DATA = (
    r".*<think>.*",
    r"(\w+_\w+: )?(What|Which|Name|Add|Put|Explain|Sort|Count|Reverse) .*[.?]",
    r"\s*(asked for|trains): +\[.*",
    r"[\w/-]+\s+(yes|no|same_provider|unknown)\s+.*",
)


def _is_english(text: str) -> bool:
    """Words of four small letters, and none of them Chinese."""
    return bool(re.search("[a-z]{4}", LATIN.sub("", text))) and not re.search("[\u4e00-\u9fff]", text)


def _left_in_english(line: str, number: int) -> bool:
    told = lessons.said_in_chinese(line, number)
    if any(re.fullmatch(pattern, line.strip()) for pattern in DATA):
        return False
    return bool(re.search("[a-z]{4}", LATIN.sub("", told))) and not (number == 7 and _said_by_a_model(line))


def _said_by_a_model(line: str) -> bool:
    """Lesson 7 prints answers in plain English, below their question or behind the name of the model."""
    return line.startswith("    ") or line == "**Yes**"


@pytest.mark.parametrize("number", NUMBERS)
def test_every_line_that_a_lesson_printed_is_chinese_in_the_chinese_notebook(number):
    english, chinese = (
        [
            "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout").splitlines()
            for cell in json.loads(workshop.read_lesson(number).notebook_path(language).read_text())["cells"]
            if cell["cell_type"] == "code" and "quiz" not in cell["metadata"].get("tags", [])
        ]
        for language in ("en", "zh")
    )
    pairs = [pair for cells in zip(english, chinese, strict=True) for pair in zip(*cells, strict=True)]
    assert len(pairs) > 6
    assert [told for told, _ in pairs if _left_in_english(told, number)] == []
    for line, told in pairs:
        assert lessons.said_in_chinese(line, number) == told
        assert sorted(re.findall(r"\d+", line)) == sorted(re.findall(r"\d+", told)), told


def test_a_line_without_its_chinese_would_be_seen(monkeypatch):
    lines = lessons._chinese_of(lessons.WORKSHOP / "lines.zh.yaml")
    row = "balanced: MaxVio 0.20 over the last steps"
    assert not _left_in_english(row, 5) and not _is_english(lessons.in_chinese("balanced, random experts"))
    assert _left_in_english(row, 4), "a form belongs to its lesson"
    fewer = {**lines, 5: {k: v for k, v in lines[5].items() if "over the last steps" not in k}}
    monkeypatch.setattr(lessons, "_chinese_of", lambda file: fewer if file.name == "lines.zh.yaml" else {})
    lessons._forms.cache_clear()
    try:
        assert _left_in_english(row, 5)
    finally:
        lessons._forms.cache_clear()
    assert _is_english("its own text") and not _is_english("学生 its own text")


@pytest.mark.parametrize("number", NUMBERS)
def test_the_measured_run_was_of_this_code_and_within_its_ranges(number):
    """Without solutions: what a learner meets. An exercise that counts as solved before it is done proves nothing."""
    measured = FULL[str(number)]
    assert measured["code"] == workshop.read_lesson(number).code_hash
    assert measured["expected"] and all(e["met"] and e["checked"] for e in measured["expected"])
    assert not any(measured["exercises"].values())
    assert measured["seconds"] < 10 * 60, "a lesson may take ten minutes, with other work beside it"
    assert measured["cpu_seconds"] < 6 * 60


def test_a_lesson_whose_model_is_not_here_ends_in_one_sentence(monkeypatch, tmp_path):
    """A notebook shows these lines in place of a traceback, and runs no cell after them."""
    monkeypatch.setattr(lessons, "NOW", {"lesson": 7, "language": "en"})
    with pytest.raises(lessons.NotInstalled) as stopped:
        lessons.needs(str(tmp_path / "smollm2"), "distill import smollm2")
    assert stopped.value._render_traceback_() == [str(stopped.value)]
    assert "not here" in str(stopped.value) and str(stopped.value).endswith("\ndistill import smollm2")
    assert lessons.needs("checkpoints/base", "") == "checkpoints/base"
    calls = [c.source for c in workshop.read_lesson(7).cells if "needs(" in c.source]
    assert len(calls) == 1 and '"distill import smollm2")' in calls[0]


SMALL = """
# %% [markdown] lang="en"
# # Small

# %% [markdown] lang="zh"
# # 小

# %%
import sys

import matplotlib.pyplot as plt

from distill import lessons

plt.plot([1, 2, 4])
plt.show()
print("progress", file=sys.stderr)

# %% tags=["exercise"]
def double(x):
    return ...

# %% tags=["solution"]
def double(x):
    return 2 * x

# %%
lessons.exercise("1", lambda: double(2) == 4, "add")
lessons.expect("a number", 0.5, 0, 1, short=(0, 1))
"""


@pytest.mark.parametrize("lesson", ["small", pytest.param("real", marks=pytest.mark.slow)])
def test_a_lesson_runs_in_a_kernel(short, lesson, monkeypatch):
    """As Jupyter runs it: the notebook with its install cell, in a process of its own."""
    number = min(NUMBERS, key=lambda n: FULL[str(n)]["cpu_seconds"])
    read = workshop.read_lesson(number)
    if lesson == "small":  # a page of what every lesson has, without a model
        (short / f"lesson{number}.py").write_text(SMALL)
        with monkeypatch.context() as there:
            there.setattr(workshop, "FOLDER", short)
            read = workshop.read_lesson(number)
    made, told, _ = workshop.execute_in_kernel(read)
    if lesson == "real":
        assert "quiz" in made.cells[-1].metadata["tags"] and "quiz: 0 of 3" in made.cells[-1].outputs[0].text
    kinds = {m for c in made.cells if c.cell_type == "code" for o in c.outputs for m in o.get("data", {})}
    assert "image/png" in kinds
    assert told["exercises"] and not any(told["exercises"].values())
    for outputs in workshop.clean_outputs(made):
        assert all(o.get("name") != "stderr" for o in outputs)


# ---- notebooks --------------------------------------------------------------------------------------------


def test_committed_notebooks_are_what_their_source_makes():
    assert workshop.stale(NUMBERS) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_both_languages_have_every_part(number):
    lesson = workshop.read_lesson(number)
    kinds = [c.kind for c in lesson.cells]
    assert kinds[0] == "text" and kinds.count("exercise") == kinds.count("solution") in (2, 3)
    for language, words in {
        "en": (
            "you can",
            "minutes",
            "2-core CPU",
            "8 GB",
            "no bf16",
            "24 GB",
            "commonly goes wrong",
            "## Quiz",
        ),
        "zh": ("你能够", "分钟", "双核 CPU", "8 GB", "不支持 bf16", "24 GB", "常见问题", "## 小测"),
    }.items():
        text = "\n".join(c.text[language] for c in lesson.cells if c.kind == "text")
        assert [w for w in words if w not in text] == []
        assert bool(re.search("[\u4e00-\u9fff]", text)) == (language == "zh")
        cells = json.loads(lesson.notebook_path(language).read_text())["cells"]
        hidden = [c for c in cells if "solution" in c["metadata"].get("tags", [])]
        assert len(hidden) == kinds.count("solution") and all(c["cell_type"] == "markdown" for c in hidden)
        assert all("".join(c["source"]).startswith("<details>") for c in hidden)
        code = [c for c in cells if c["cell_type"] == "code"]
        install = workshop.install_cell()
        assert "".join(code[0]["source"]) == (install if language == "en" else source.in_language(install))
        assert all(c["execution_count"] for c in code) and any(c["outputs"] for c in code)


def _but_for_the_language(outputs: list[dict]) -> list:
    """Numbers of what was printed, and kinds of what was shown."""
    text = "".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout")
    kinds = [sorted(set(o["data"]) & {"image/png", "text/html"}) for o in outputs if "data" in o]
    return [sorted(re.findall(r"\d+", text)), kinds]


def test_notebooks_are_small_and_outputs_the_same_in_both_languages():
    total = 0
    for number in NUMBERS:
        outputs = []
        for language in workshop.LANGUAGES:
            path = workshop.read_lesson(number).notebook_path(language)
            total += path.stat().st_size
            code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
            outputs.append([c["outputs"] for c in code if "quiz" not in c["metadata"].get("tags", [])])
        english, chinese = ([_but_for_the_language(cell) for cell in one] for one in outputs)
        assert english == chinese
        printed = "".join("".join(o.get("text", "")) for cell in outputs[1] for o in cell)
        assert "expected" not in printed and "exercise" not in printed and "（预期" in printed
        text = json.dumps(outputs)
        assert str(ROOT) not in text and "Traceback" not in text
    assert total < 6_000_000


def test_words_of_a_figure_have_their_chinese():
    """Axes, titles and legends as the lessons write them; and the names of the numbers that they check."""
    drawn = {"xlabel", "ylabel", "title", "set_xlabel", "set_ylabel", "label"}
    said = {e["name"] for lesson in FULL.values() for e in lesson["expected"]}
    for number in NUMBERS:
        for cell in source.read_lesson(number).cells:
            for node in ast.walk(ast.parse(cell.source)) if cell.kind == "code" else ():
                if isinstance(node, ast.keyword) and node.arg in drawn:
                    said |= _written(node.value)
                elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in drawn and node.args:
                    said |= _written(node.args[0])
    assert len(said) > 130
    left = {
        text
        for text in said
        if re.search("[a-z]{4}", text) and not re.search("[\u4e00-\u9fff]", lessons.in_chinese(text))
    }
    assert left == set()


def _written(node: ast.expr) -> set[str]:
    """A text of the source, its values as a 7; none for a name."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.JoinedStr):
        return {"".join(part.value if isinstance(part, ast.Constant) else "7" for part in node.values)}
    return set()


def test_the_builder_says_in_chinese_what_a_chinese_lesson_prints(monkeypatch, capsys):
    """Word for word: the notebook's output is the line that the learner's own run prints, through `print` too."""
    printed = []
    for language in ("en", "zh"):
        monkeypatch.setitem(lessons.NOW, "language", language)
        lessons.expect("student minus control", 0.5123, 0.25, 1, without=-0.0125)
        lessons.expect("dead experts", 12345678.0, 0, 1e9)
        hint = "divide by T, then softmax over the vocabulary"
        lessons.exercise(
            "4.1", _uses_place, source.translations().get(hint, hint) if language == "zh" else hint
        )
        printed.append(capsys.readouterr().out.splitlines())
    lessons.EXPECTED.clear(), lessons.EXERCISES.clear()
    assert [lessons.said_in_chinese(line, None) for line in printed[0]] == printed[1]
    assert all(re.search("[\u4e00-\u9fff]", line) for line in printed[1])
    assert lessons.said_in_chinese("any other line: 3", None) == "any other line: 3"
    monkeypatch.setattr(builtins, "print", print)
    monkeypatch.setitem(lessons.NOW, "lesson", 8)
    lessons._print_in_the_language()
    print("whole          right 99 % [94, 100] of 84\n", "2 experts:", "45 %", sep="")
    print("whole", file=sys.stderr)
    monkeypatch.setitem(lessons.NOW, "language", "en")
    print("2 experts: 45 %")
    said, error = capsys.readouterr()
    assert (
        said == "完整           答对 99 % [94, 100]，共 84 题\n2 experts:45 %\n2 experts: 45 %\n"
        and error == "whole\n"
    )


place = ...


def _uses_place() -> bool:
    return place == 4


def test_a_notebook_has_the_outputs_of_its_language():
    """A Chinese picture stands in the place of the English one that follows, and is found again."""

    def picture(name: str, **about: str) -> dict:
        return {"output_type": "display_data", "data": {"image/png": name}, "metadata": about}

    said = {"output_type": "stream", "name": "stdout", "text": "hello\n"}
    both = [picture("zh", lang="zh"), said, picture("en"), picture("second")]
    english, chinese = (workshop.in_one_language(both, language, 1) for language in ("en", "zh"))
    assert english == both[1:] and chinese == [said, both[0], both[3]]
    assert workshop._together(english, chinese) == [said, both[0], *both[2:]]
    assert workshop._together(english, [said]) == english  # of another run: the English ones alone


def test_a_figure_is_drawn_in_the_language_of_the_lesson(monkeypatch, capsys):
    import matplotlib.pyplot as plt

    monkeypatch.setitem(lessons.NOW, "labels", "en")
    with plt.rc_context():
        monkeypatch.setattr(drawing, "chinese_font", lambda: None)
        lessons._label_in("zh")
        assert (
            "没有找到中文字体" not in capsys.readouterr().out
        )  # the words are those of the lesson's language
        assert lessons.NOW["labels"] == "en"
        monkeypatch.setattr(drawing, "chinese_font", lambda: "DejaVu Sans")
        lessons._label_in("zh")
        figure, axis = plt.subplots()
        axis.plot([1, 2], label="one scale")
        axis.set(xlabel="optimizer step", title="right answers to 60 hard problems, %, with 95 % interval")
        axis.set_yticks([1, 2], ["control", "7B"])
        assert axis.legend().texts[0].get_text() == "一个系数"
        assert [axis.get_xlabel(), axis.get_title()] == ["优化步数", "60 道难题答对的比例，%，附 95 % 区间"]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["对照", "7B"]
        lessons._label_in("en")
        axis.set_xlabel("optimizer step")
        assert axis.get_xlabel() == "optimizer step"
        plt.close(figure)


# ---- what a learner sees -------------------------------------------------------------------------------------


class _ForLearners(ast.NodeTransformer):
    """`scaled(a, b)` is `a`, `short=` is not there, and text that it was put into is plain text."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if getattr(node.func, "id", "") == "scaled":
            node.args[0].was_scaled = True
            return node.args[0]
        node.keywords = [k for k in node.keywords if k.arg != "short"]
        return node

    def visit_ImportFrom(self, node):
        node.names = [name for name in node.names if name.name != "scaled"]
        return node

    def visit_JoinedStr(self, node):
        self.generic_visit(node)
        if not any(getattr(getattr(part, "value", None), "was_scaled", False) for part in node.values):
            return node
        parts = []
        for part in node.values:
            scaled = isinstance(part, ast.FormattedValue) and getattr(part.value, "was_scaled", False)
            text = str(ast.literal_eval(part.value)) if scaled else getattr(part, "value", None)
            if not isinstance(text, str):
                parts.append(part)
            elif parts and isinstance(parts[-1], str):
                parts[-1] += text
            else:
                parts.append(text)
        if all(isinstance(part, str) for part in parts):
            return ast.Constant("".join(parts))
        return ast.JoinedStr([ast.Constant(p) if isinstance(p, str) else p for p in parts])


@pytest.mark.parametrize("number", NUMBERS)
def test_the_learner_sees_neither_scaled_nor_short_and_runs_the_same(number):
    for cell in workshop.read_lesson(number).cells:
        if cell.kind == "text":
            continue
        assert not re.search(r"\bscaled\b(?! by)|\bshort=", cell.code)
        wanted = ast.unparse(_ForLearners().visit(ast.parse(cell.source)))
        assert ast.unparse(ast.parse(cell.code)) == wanted


@pytest.mark.parametrize("number", NUMBERS)
def test_the_chinese_code_differs_in_what_is_read_alone(number):
    for cell in workshop.read_lesson(number).cells:
        if cell.kind == "text":
            continue
        missing = [words for words in source.readable(cell.code) if words not in source.translations()]
        assert missing == []
        names = [
            sorted({n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)})
            for code in (cell.code, cell.code_in("zh"))
        ]
        assert names[0] == names[1]


def test_texts_say_the_numbers_that_were_measured():
    """A number in a text is named, not typed: `{{NAME|FORMAT}}`; every name was measured in its lesson."""
    for number in NUMBERS:
        for cell in workshop.read_lesson(number).cells:
            for language in workshop.LANGUAGES if cell.kind == "text" else ():
                text = workshop.filled(cell.text[language], number, "1")
                assert "{{" not in text and not re.search(r"(?<!\w)\? ?%", text), (number, text[:80])


# ---- ranges that can fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NUMBERS)
def test_no_range_accepts_the_number_without_the_mechanism(number):
    """Measured in the same run: the model before training, no balancing, one scale for all."""
    for e in FULL[str(number)]["expected"]:
        assert e["without"] is not None, f"lesson {number}: {e['name']} says nothing of what breaks it"
        assert not e["low"] <= e["without"] <= e["high"], f"lesson {number}: {e['name']} cannot fail"


def test_numbers_that_texts_type_are_right():
    """What no lesson measures under a name: by the formula."""
    import torch

    from distill import generalized_jsd
    from distill.moe.metrics import max_violation_noise_floor
    from distill.training.losses import batch_balance

    assert round(max_violation_noise_floor(64, 8, 2), 2) == 0.34  # lesson 5, what commonly goes wrong
    for text in ("0.34 by chance", "0.34"):
        assert any(text in cell.text["en"] for cell in workshop.read_lesson(5).cells if cell.kind == "text")

    x = torch.linspace(-6, 6, 121)
    bell = lambda centre, width: (-((x - centre) ** 2) / (2 * width**2))[None]  # noqa: E731
    two = torch.logaddexp(torch.tensor(0.6).log() + bell(2, 0.5), torch.tensor(0.4).log() + bell(-2, 0.5))
    covers, picks = (float(generalized_jsd(q, two, beta=0.5)) for q in (bell(0.41, 2.06), bell(2, 0.5)))
    assert picks < covers and (round(picks, 2), round(covers, 2)) == (0.16, 0.2)  # lesson 2

    scores = torch.full((1, 64, 2), 0.001)
    scores[..., 0] = 0.999
    both = torch.cat([scores, scores], 1), torch.zeros(1, 128, 1, dtype=torch.long)
    assert abs(float(batch_balance(*both, torch.ones(1, 128))) - 2) < 0.01


# ---- quizzes, slides, sliders ----------------------------------------------------------------------------------


def test_every_lesson_has_its_quiz_in_both_languages():
    assert sorted(questions()) == NUMBERS
    for asked in questions().values():
        assert len(asked) == 3
        for one in asked:
            assert one["right"] in LETTERS
            for language in workshop.LANGUAGES:
                said = one[language]
                assert (
                    len(said["options"]) == len(set(said["options"])) == 3
                    and said["question"]
                    and said["why"]
                )
                chinese = bool(re.search("[\u4e00-\u9fff]", said["question"] + said["why"]))
                assert chinese == (language == "zh")
    rights = [one["right"] for asked in questions().values() for one in asked]
    assert {letter: rights.count(letter) for letter in LETTERS} == dict.fromkeys(LETTERS, len(NUMBERS))


def test_slides_hold_every_section_exercise_and_question_and_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(workshop, "FOLDER", tmp_path)
    number = 6
    workshop.write_slides([number])
    for language, ending in workshop.LANGUAGES.items():
        page = (tmp_path / f"slides{ending}.html").read_text()
        assert "http" not in re.sub(r"base64,[^']+", "", page).replace("http://www.w3.org", "")
        assert page.count("data:image/png") >= 3 and "{{" not in page
        text = "\n".join(c.text[language] for c in workshop.read_lesson(number).cells if c.kind == "text")
        for heading in re.findall(r"(?m)^## (.+)$", text):
            shown = workshop.slides.inline(heading)
            assert f"<h2>{shown}</h2>" in page or heading in ("Exercises", "练习", "Quiz", "小测"), heading
        assert page.count("class='quiz'") == 6
        assert page.count("class='exercise") == len(re.findall(r"(?m)^\*\*\d\.\d\*\* ", text))


def test_both_languages_have_the_same_slides_and_no_sentence_is_cut():
    for number in NUMBERS:
        made = {}
        for language in workshop.LANGUAGES:
            lesson = workshop.read_lesson(number)
            outputs = [
                workshop.in_one_language(cell, language, number) for cell in workshop.stored_outputs(lesson)
            ]
            made[language] = workshop.slides.of_lesson(lesson, language, outputs, lambda text: text)
        english, chinese = ([(s.kind, bool(s.picture)) for s in made[one]] for one in ("en", "zh"))
        assert english == chinese
        for slide in made["en"]:
            assert not (slide.picture and slide.full)
            assert not any(point.endswith(" al.") for point in slide.points)


def pages() -> dict[str, str]:
    texts = {p.name: p.read_text() for p in workshop.FOLDER.glob("*.md")}
    for number in NUMBERS:
        for language in workshop.LANGUAGES:
            cells = [c.text[language] for c in workshop.read_lesson(number).cells if c.kind == "text"]
            texts[f"lesson{number}.{language}"] = "\n".join(cells)
    return texts


def test_links_lead_somewhere():
    for name, text in pages().items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (workshop.FOLDER / target).exists(), f"{name}: {target}"


def test_overrides_in_the_texts_are_keys_of_a_recipe():
    found = set()
    for text in pages().values():
        for code in re.findall(r"`([^`\n]+=[^`\n]+)`", text):
            recipe = re.search(r"recipes/\w+\.yaml", code)
            words = shlex.split(code) if code.count("'") % 2 == 0 else code.split()
            keys = [w for w in words if re.match(r"(train|student|teacher|generate)\.[\w.]+=\S", w)]
            found |= {(recipe[0] if recipe else "recipes/demo.yaml", tuple(keys))} if keys else set()
    assert len(found) > 5
    for recipe, words in found:
        load_recipe(recipe, list(words))


# ---- the install cell -------------------------------------------------------------------------------------


def run_install(cwd, tmp_path, installed: bool):
    """The cell in a process of its own, without site-packages if not `installed`; notes what `pip` is asked."""
    log = tmp_path / "asked.json"
    patch = (
        "import json, subprocess, sys\n"
        "def run(command, **_):\n"
        f"    json.dump(command, open({str(log)!r}, 'w'))\n"
        "    return subprocess.CompletedProcess(command, 0)\n"
        "subprocess.run = run\n"
    )
    code = patch + workshop.install_cell() + "\nprint(sys.path[0])\nimport distill.lessons"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if installed:
        env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *([] if installed else ["-S"]), "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    return done, json.loads(log.read_text()) if log.is_file() else None


def test_the_install_cell_does_nothing_where_it_is_installed(tmp_path):
    done, asked = run_install(tmp_path, tmp_path, installed=True)
    assert done.returncode == 0 and asked is None


def test_the_install_cell_pins_what_the_project_pins(tmp_path):
    done, asked = run_install(ROOT / "recipes" / "workshop", tmp_path, installed=False)
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert asked[1:5] == ["-m", "pip", "install", "--quiet"] and asked[5:] == pins
    assert done.stdout.splitlines()[-1] == str(ROOT)


def test_a_folder_of_the_name_is_not_the_package(tmp_path):
    """A clone in ./distill is found as a namespace without code by the name alone."""
    package = tmp_path / "distill" / "distill"
    package.mkdir(parents=True)
    (tmp_path / "distill" / "checkpoints" / "teacher").mkdir(parents=True)
    (package / "lessons").mkdir()
    for name in ("__init__.py", "lessons/__init__.py"):
        (package / name).write_text("")
    done, asked = run_install(tmp_path, tmp_path, installed=False)
    assert asked and done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "distill")


def test_the_install_cell_unpacks_an_uploaded_project(tmp_path):
    """Colab: the notebook alone, and distill.zip uploaded beside it."""
    with zipfile.ZipFile(tmp_path / "distill.zip", "w") as archive:
        archive.writestr("project/distill/lessons/__init__.py", "")
        archive.writestr("project/checkpoints/teacher/config.json", "{}")
    done, asked = run_install(tmp_path, tmp_path, installed=False)
    assert asked and done.stdout.splitlines()[-1] == str(tmp_path / "project")


def test_the_install_cell_says_what_is_missing(tmp_path):
    done, asked = run_install(tmp_path, tmp_path, installed=False)
    assert asked is None and "Upload the project as distill.zip" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_text_without_its_other_language_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "FOLDER", tmp_path)
    (tmp_path / "lesson1.py").write_text('# %% [markdown] lang="en"\n# # One\n\n# %%\nx = 1\n')
    with pytest.raises(UserError, match="pairs"):
        workshop.read_lesson(1)
    (tmp_path / "lesson1.py").write_text('# %% tags=["solution"]\nx = 1\n')
    with pytest.raises(UserError, match="before any exercise"):
        workshop.read_lesson(1)
    with pytest.raises(UserError, match="does not exist"):
        workshop.read_lesson(9)


def test_stale_notebooks_are_named(tmp_path, monkeypatch):
    number = NUMBERS[0]
    text = (workshop.FOLDER / f"lesson{number}.py").read_text()
    for module in (workshop, source):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(source, "translations", dict)
    (tmp_path / f"lesson{number}.py").write_text(text + "\n# %%\nprint('more')\n")
    monkeypatch.setattr(workshop.Path, "relative_to", lambda self, _other: self)
    found = workshop.stale([number])
    assert sum(f"lesson{number}" in line and "is not what its source makes" in line for line in found) == 2
    assert any("outputs of other code" in line for line in found)


def test_notebook_extra_is_named_where_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    with pytest.raises(UserError, match=r"\[workshop\]"):
        workshop.read_lesson(1)
    assert importlib.util.find_spec("distill")
