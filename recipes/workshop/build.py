"""The workshop's notebooks: made from one source per lesson, in two languages, executed, and kept current.

    python recipes/workshop/build.py build [N ...]   text and code anew from recipes/workshop/lessonN.py, outputs kept
    python recipes/workshop/build.py run [N ...]     execute in a real kernel; outputs, minutes and numbers
    python recipes/workshop/build.py check           are the committed files those that `build` would write?
    python recipes/workshop/build.py slides          the instructor's slides, from the notebooks; not committed

A lesson is one Python file of cells in jupytext's percent format (source.py): markdown cells marked
lang="en" or lang="zh", always in pairs, and code cells that both languages share. A cell tagged `exercise` is what
the learner completes; the cell tagged `solution` after it is hidden in the notebook (an HTML <details> that Jupyter, VS
Code and Colab fold) and is run by the tests. The quiz at the end comes from quiz.yaml. In a text, `{{minutes}}` is the
measured time and `{{NAME|FORMAT}}` the measured value of the number NAME, so no text says another number than its
lesson prints. `build` also writes the page of sliders.

Lessons are executed once, without solutions, as a learner meets them. Numbers are the same in both languages. In the
Chinese notebooks comments are Chinese (code.zh.yaml), and so are figures (labels.zh.yaml; each is drawn twice) and
what a cell prints (lines.zh.yaml). What models, problems and files say stays as it is.

Needs the extra `workshop` (jupytext, nbformat; to execute, nbclient and ipykernel).
"""

import argparse
import contextlib
import functools
import io
import json
import os
import re
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slides
from source import FOLDER, LANGUAGES, Lesson, in_language, lesson_numbers, need, read_lesson

from distill.errors import DistillError, RunError
from distill.lessons import shown
from distill.lessons.lesson import BOTH, NOW, quiz, said_in_chinese
from distill.lessons.lesson import FOLDER as LESSONS
from distill.storage import PROJECT_ROOT, read_json, write_json

RESULTS = PROJECT_ROOT / "recipes" / "results" / "workshop.json"
SUMMARY = {"en": "Solution (click to open)", "zh": "参考答案（点击展开）"}
PLACE = re.compile(r"\{\{([^{}|]+)\|([^{}|]+)\}\}")
MARK = re.compile(r"(<!-- measured -->\n).*?(<!-- end of measured -->)", re.S)
ACCOUNT = "import json; from distill.lessons import account; print(json.dumps(account()))"


def install_cell() -> str:
    """The first cell of every notebook: the dependencies that pyproject.toml pins, and the project's folder."""
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = "\n".join(f'    "{pin}",' for pin in project["dependencies"])
    address = project.get("urls", {}).get("Repository", "")
    template = (PROJECT_ROOT / "recipes" / "workshop" / "install_cell.py").read_text(encoding="utf-8")
    return template.replace('    "PINS",', pins).replace("REPOSITORY_URL", address).rstrip()


# ---- writing notebooks ---------------------------------------------------------------------------------


def notebook(lesson: Lesson, language: str, outputs: list[list[dict]] | None = None, minutes: str = "?"):
    """The lesson as a notebook. `outputs`: of each code cell in order, the install cell included."""
    v4 = need("nbformat").v4
    first = install_cell() if language == "en" else in_language(install_cell())
    code = [first, *(c.code_in(language) for c in lesson.cells if c.kind in ("code", "exercise"))]
    outputs = outputs if outputs and len(outputs) == len(code) else [[] for _ in code]
    outputs = [in_one_language(shown, language, lesson.number) for shown in outputs]
    made, ran = [], 0

    def add_code(source: str, tags: list[str], printed: list | None = None) -> None:
        nonlocal ran
        shown = outputs[ran] if printed is None else printed
        about = {"tags": tags} if tags else {}
        if tags == ["install"]:  # fifty lines before the lesson begins: JupyterLab folds them
            about["jupyter"] = {"source_hidden": True}
        cell = v4.new_code_cell(source, outputs=shown, metadata=about)
        ran += 1
        cell["execution_count"] = ran if any(outputs) else None
        made.append(cell)

    for index, cell in enumerate(lesson.cells):
        if index == 1:  # after the title: what a reader should see first
            add_code(code[0], ["install"])
        if cell.kind == "text":
            made.append(v4.new_markdown_cell(filled(cell.text[language], lesson.number, minutes)))
        elif cell.kind == "solution":
            code_shown = cell.code_in(language)
            folded = f"<details><summary>{SUMMARY[language]}</summary>\n\n```python\n{code_shown}\n```\n\n</details>"
            made.append(v4.new_markdown_cell(folded, metadata={"tags": ["solution"]}))
        elif cell.kind == "quiz":
            add_code(cell.code_in(language), ["quiz"], quiz_output(lesson.number, language))
        else:
            add_code(code[ran], [cell.kind] if cell.kind == "exercise" else [])
    for index, cell in enumerate(made):
        cell["id"] = f"lesson{lesson.number}-{index:02d}"
    return v4.new_notebook(
        cells=made,
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "distill": {"lesson": lesson.number, "executed": lesson.code_hash if any(outputs) else None},
        },
    )


def filled(text: str, number: int, minutes: str) -> str:
    """A text with what was measured in its places: minutes, and numbers of the lesson by name.

    A number that was never measured is a question mark; the tests refuse one.
    """
    values = {e["name"]: e["value"] for e in results()["lessons"].get(str(number), {}).get("expected", [])}

    def value(found: re.Match) -> str:
        name, how = found[1], found[2]
        if name not in values:
            return "?"
        return f"{100 * values[name]:.0f}" if how == "%" else format(values[name], how)

    return PLACE.sub(value, text.replace("{{minutes}}", minutes))


def quiz_output(number: int, language: str) -> list:
    """What the quiz prints before anything is answered: run here, since it needs nothing of the lesson."""
    before = dict(NOW)
    NOW.update(lesson=None, language=language)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            quiz(number, {})
    finally:
        NOW.update(before)
    return [need("nbformat").v4.new_output("stream", name="stdout", text=printed.getvalue())]


def stored_outputs(lesson: Lesson) -> list[list[dict]] | None:
    """The outputs in the committed notebooks, by code cell, what is Chinese marked; None where there are none."""
    found = {}
    for language in LANGUAGES:
        path = lesson.notebook_path(language)
        if not path.is_file():
            return found.get("en")
        code = [cell for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
        found[language] = [
            _joined(cell["outputs"]) for cell in code if "quiz" not in cell["metadata"].get("tags", [])
        ]
    return [_together(*cell) for cell in zip(found["en"], found["zh"])]


def _rich(outputs: list[dict]) -> list[dict]:
    return [output for output in outputs if output["output_type"] in ("display_data", "execute_result")]


def _is_chinese(output: dict) -> bool:
    return output.get("metadata", {}).get("lang") == "zh"


def _together(english: list[dict], chinese: list[dict]) -> list[dict]:
    """A cell's outputs as they were executed: before each figure or page the Chinese one, where there is one."""
    if len(_rich(english)) != len(_rich(chinese)):
        return english
    other = dict(zip(map(id, _rich(english)), _rich(chinese)))
    both = []
    for output in english:
        found = other.get(id(output))
        both += [found, output] if found and _is_chinese(found) else [output]
    return both


def in_one_language(outputs: list[dict], language: str, number: int) -> list[dict]:
    """What one notebook of lesson `number` shows: no output of the other language, and in Chinese what is printed."""
    if language == "en":
        return [output for output in outputs if not _is_chinese(output)]
    kept, waiting = [], None  # a Chinese output stands in the place of the next English one
    for output in outputs:
        if _is_chinese(output):
            waiting = output
        elif waiting and output["output_type"] in ("display_data", "execute_result"):
            kept.append(waiting)
            waiting = None
        else:
            kept.append(_said_in_chinese(output, number))
    return kept


def _said_in_chinese(output: dict, number: int) -> dict:
    """A stream with its lines in Chinese, a slider with its words: both know two languages."""
    if output.get("name") == "stdout":
        return type(output)({**output, "text": said_in_chinese(output["text"], number)})
    page = output.get("data", {}).get("text/html", "")
    if "class='explore'" in page:
        page = page.replace('"lang": "en"', '"lang": "zh"').replace(shown.NOTES["en"], shown.NOTES["zh"])
        return type(output)({**output, "data": {**output["data"], "text/html": page}})
    return output


def _joined(outputs: list[dict]) -> list[dict]:
    """Outputs as nbformat holds them in memory: texts in one piece, not in lines."""

    def whole(value: Any) -> Any:
        return "".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value

    node = need("nbformat").from_dict
    return [
        node({k: {m: whole(v) for m, v in x.items()} if k == "data" else whole(x) for k, x in o.items()})
        for o in outputs
    ]


def results() -> dict[str, Any]:
    return read_json(RESULTS) if RESULTS.is_file() else {"lessons": {}}


def minutes_of(number: int) -> str:
    """The measured minutes of computing of a lesson's cells, as text: CPU time, which other work does not disturb."""
    measured = results()["lessons"].get(str(number))
    return f"{measured['cpu_seconds'] / 60:.1f}" if measured else "?"


def table(language: str) -> str:
    """Per lesson, what was measured: for the README's of the workshop."""
    head = {"en": "| lesson | minutes of computing, one CPU thread | numbers checked | exercises |",
            "zh": "| 课 | 计算用时（分钟，单线程 CPU） | 校验的数值 | 练习 |"}[language]  # fmt: skip
    lines = [head, "|---|---|---|---|"]
    for number, measured in sorted(results()["lessons"].items()):
        lines.append(
            f"| [{number}](lesson{number}{LANGUAGES[language]}.ipynb) | {minutes_of(int(number))} "
            f"| {len(measured['expected'])} | {len(measured['exercises'])} |"
        )
    return "\n".join(lines) + "\n"


def generated(numbers: list[int]) -> dict[Path, str]:
    """Every file that `build` writes, with its text."""
    nbformat, files = need("nbformat"), {}
    for number in numbers:
        lesson = read_lesson(number)
        outputs = stored_outputs(lesson)
        for language in LANGUAGES:
            made = notebook(lesson, language, outputs, minutes_of(number))
            made["metadata"]["distill"]["executed"] = _executed(lesson)
            files[lesson.notebook_path(language)] = nbformat.writes(made, version=4) + "\n"
    for language, ending in LANGUAGES.items():
        files[FOLDER / f"sliders{ending}.html"] = shown.page(language)
        path = FOLDER / f"README{ending}.md"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            files[path] = MARK.sub(lambda found: found[1] + table(language) + found[2], text)  # noqa: B023
    return files


def _executed(lesson: Lesson) -> str | None:
    measured = results()["lessons"].get(str(lesson.number))
    return measured["code"] if measured else None


def build(numbers: list[int]) -> None:
    for path, text in generated(numbers).items():
        path.write_text(text, encoding="utf-8")


def write_slides(numbers: list[int]) -> None:
    """slides.html and slides.zh-CN.html, from the lessons and the outputs of their notebooks."""
    lessons = [read_lesson(number) for number in numbers]
    for language, ending in LANGUAGES.items():
        shown = []
        for lesson in lessons:
            fill = functools.partial(filled, number=lesson.number, minutes=minutes_of(lesson.number))
            outputs = [
                in_one_language(cell, language, lesson.number) for cell in stored_outputs(lesson) or ()
            ]
            shown += slides.of_lesson(lesson, language, outputs, fill)
        path = FOLDER / f"slides{ending}.html"
        path.write_text(slides.page(shown, language), encoding="utf-8")
        print(path)


def stale(numbers: list[int]) -> list[str]:
    """What `build` would change, and which outputs were made from other code; [] if all is current."""
    found = [
        f"{path.relative_to(PROJECT_ROOT)} is not what its source makes; run python recipes/workshop/build.py build"
        for path, text in generated(numbers).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for number in numbers:
        if _executed(lesson := read_lesson(number)) != lesson.code_hash:
            found.append(
                f"lesson {number} has outputs of other code; run python recipes/workshop/build.py run {number}"
            )
    return found


# ---- executing -----------------------------------------------------------------------------------------


def execute(
    lesson: Lesson, solutions: bool, after: Callable[[int, dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run the lesson's code in this process, with or without its solutions; returns `distill.lessons.account()`.

    after: called behind each cell with its index and the names that exist by then. Raises RunError naming the cell
    that failed.
    """
    from distill.lessons import account

    namespace: dict[str, Any] = {"__name__": "__main__"}
    for index, cell in enumerate(lesson.cells):
        if cell.kind in ("text", "quiz") or (cell.kind == "solution" and not solutions):
            continue
        try:
            exec(compile(cell.source, f"lesson{lesson.number}[{index}]", "exec"), namespace)
        except Exception as error:
            first = cell.source.strip().splitlines()[0]
            raise RunError(f"lesson {lesson.number}, cell {index} ({first}): {error!r}") from error
        if after:
            after(index, namespace)
    return account()


def execute_in_kernel(lesson: Lesson, cwd: Path = FOLDER, timeout: float = 7200):
    """(notebook with outputs, account, seconds) of a run in a Jupyter kernel, as a learner's."""
    nbclient, nbformat = need("nbclient"), need("nbformat")
    need("ipykernel")
    made = notebook(lesson, "en")
    sources = [install_cell(), *(c.source for c in lesson.cells if c.kind in ("code", "exercise"))]
    for cell, source in zip((c for c in made.cells if c.cell_type == "code"), sources):
        cell["source"] = source  # with what the tests shorten
    made.cells.append(nbformat.v4.new_code_cell(ACCOUNT))
    client = nbclient.NotebookClient(
        made,
        timeout=timeout,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(cwd)}},
    )
    start = time.perf_counter()
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise RunError(f"lesson {lesson.number} failed: {str(error).strip().splitlines()[-1]}") from error
    seconds = time.perf_counter() - start
    printed = [o.text for o in made.cells.pop().outputs if o.get("name") == "stdout"]
    return made, json.loads("".join(printed)), seconds


def clean_outputs(made) -> list[list[dict]]:
    """Outputs by code cell, without progress bars and whatever else went to stderr, and without counters."""
    kept = []
    for cell in made.cells:
        if cell.cell_type == "code" and "quiz" not in cell.metadata.get("tags", []):
            outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for output in outputs:
                output.pop("execution_count", None) if output.output_type == "display_data" else None
            kept.append(outputs)
    return kept


def run(numbers: list[int]) -> None:
    """Execute lessons in the full budget and keep what came out. Raises RunError for a number outside its range.

    In a folder of its own, without finished stages of an earlier run: the minutes are those of a learner's first time.
    """
    from distill.devices import describe_device, pick_device
    from distill.stages import versions

    nbformat = need("nbformat")
    os.environ["DISTILL_LESSON_BUDGET"] = "full"
    for number in numbers:
        lesson = read_lesson(number)
        with tempfile.TemporaryDirectory(prefix="lesson-") as fresh:
            os.environ[LESSONS] = fresh
            os.environ[BOTH] = "1"
            made, told, seconds = execute_in_kernel(lesson)
        outside = [e for e in told["expected"] if not e["met"]]
        for e in told["expected"]:
            print(f"  {e['name']}: {e['value']:.4g} ({e['low']:g} to {e['high']:g})")
        print(f"lesson {number}: {seconds:.0f} s, load {os.getloadavg()[0]:.1f}")
        if outside:
            line = "lesson {0}: {name} is {value:.4g}, expected {low:g} to {high:g}"
            raise RunError(*(line.format(number, **e) for e in outside))
        found = results()
        found |= {"device": describe_device(pick_device("cpu")), "versions": versions()}
        entry = {"seconds": round(seconds, 1), "load": round(os.getloadavg()[0], 1), "code": lesson.code_hash}
        found["lessons"][str(number)] = {**entry, **told}
        write_json(RESULTS, found)
        for language in LANGUAGES:
            done = notebook(lesson, language, clean_outputs(made), minutes_of(number))
            lesson.notebook_path(language).write_text(
                nbformat.writes(done, version=4) + "\n", encoding="utf-8"
            )
        build([number])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python recipes/workshop/build.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("what", choices=["build", "run", "check", "slides"])
    parser.add_argument("lessons", nargs="*", type=int, metavar="N", help="lessons; none means all")
    given = parser.parse_args(arguments)
    numbers = given.lessons or lesson_numbers()
    try:
        if given.what == "check":
            found = stale(numbers)
            print("\n".join(found) or f"lessons {', '.join(map(str, numbers))} are current")
            return 1 if found else 0
        {"build": build, "run": run, "slides": write_slides}[given.what](numbers)
    except DistillError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
