"""A lesson's source: cells read from recipes/workshop/lessonN.py, and the code as its learner sees it.

    lesson = read_lesson(2)
    lesson.cells[3].source          # as written, and as the tests run it
    lesson.cells[3].code            # as the notebook shows it: without `scaled`, without `short`

In a source, `scaled(40, 3)` is 40 for the learner and 3 where the tests run the lesson, and `expect(..., short=...)`
says what the short run may end with. Neither concerns a learner: `learners` takes both out, and what is left does the
same (tests/recipes/test_workshop.py compares the two as syntax trees).
"""

import ast
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from distill.errors import UserError
from distill.lessons.lesson import LETTERS, questions
from distill.storage import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "recipes" / "workshop"
LANGUAGES = {"en": "", "zh": ".zh-CN"}  # language -> what the notebook's name ends in
QUIZ = {
    "en": ("Quiz", "Write a letter for each question into the cell below and run it. It scores itself."),
    "zh": ("小测", "在下面的单元格里给每道题填一个字母，然后运行，它会自己评分。"),
}


@dataclass(frozen=True)
class Cell:
    """`kind`: text (with both languages), code, exercise, solution or quiz (with `source`, as written)."""

    kind: str
    text: dict[str, str]
    source: str = ""

    @property
    def code(self) -> str:
        """What the notebook shows."""
        return learners(self.source)

    def code_in(self, language: str) -> str:
        """The same with comments in `language`, where the lesson speaks that language too."""
        if language == "en":
            return self.code
        return in_language(re.sub(r"\bbegin\((\d+)\)", rf'begin(\1, "{language}")', self.code))


@dataclass(frozen=True)
class Lesson:
    number: int
    cells: tuple[Cell, ...]

    @property
    def code_hash(self) -> str:
        """Of all that a learner's kernel executes: outputs made from other code are stale. Layout does not count."""
        code = [re.sub(r"\s+", "", c.code) for c in self.cells if c.kind in ("code", "exercise")]
        plain = re.sub(r",(?=[)\]}])", "", "\0".join(code))
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    def notebook_path(self, language: str) -> Path:
        return FOLDER / f"lesson{self.number}{LANGUAGES[language]}.ipynb"


def need(module: str):
    try:
        return __import__(module)
    except ImportError:
        raise UserError(f"{module} is not installed; pip install -e '.[workshop]'") from None


# ---- reading a lesson ----------------------------------------------------------------------------------


def lesson_numbers() -> list[int]:
    return sorted(int(p.stem.removeprefix("lesson")) for p in FOLDER.glob("lesson[0-9].py"))


def read_lesson(number: int) -> Lesson:
    """The lesson's cells. Raises UserError for a text without its other language, or a solution without exercise."""
    path = FOLDER / f"lesson{number}.py"
    if not path.is_file():
        raise UserError(f"lesson {number} does not exist; there are {', '.join(map(str, lesson_numbers()))}")
    cells: list[Cell] = []
    waiting = ""  # an English text whose Chinese one comes next
    for raw in need("jupytext").read(path).cells:
        language, tags = raw.metadata.get("lang"), raw.metadata.get("tags", [])
        expected = "zh" if waiting else ("en" if raw.cell_type == "markdown" else None)
        if language != expected:
            raise UserError(
                f"{path.name}: texts come in pairs, English then Chinese; at {raw.source[:60]!r} a text "
                f'with lang="{expected}" was expected'
                if expected
                else f"{path.name}: only texts have a language, not {raw.source[:60]!r}"
            )
        if language == "en":
            waiting = raw.source
        elif language == "zh":
            cells.append(Cell("text", {"en": waiting, "zh": raw.source}))
            waiting = ""
        else:
            kind = next((t for t in ("exercise", "solution") if t in tags), "code")
            if kind == "solution" and not any(c.kind == "exercise" for c in cells):
                raise UserError(f"{path.name}: a solution stands before any exercise")
            cells.append(Cell(kind, {}, raw.source))
    if waiting:
        raise UserError(f"{path.name}: {waiting[:60]!r} has no Chinese text after it")
    return Lesson(number, (*cells, *_quiz(number)))


def _quiz(number: int) -> list[Cell]:
    """The last cells of a lesson: its questions, and where the letters go."""
    asked = questions().get(number, [])
    if not asked:
        return []
    texts = {}
    for language, (title, how) in QUIZ.items():
        lines = [f"## {title}", "", how]
        for n, one in enumerate(asked, 1):
            lines += ["", f"**{n}.** {one[language]['question']}", ""]
            lines += [f"- **{a}** {option}" for a, option in zip(LETTERS, one[language]["options"])]
        texts[language] = "\n".join(lines)
    places = ", ".join(f'{n}: ""' for n in range(1, len(asked) + 1))
    code = (
        f"from distill.lessons import quiz\n\nquiz({number}, {{{places}}})  # between the quotes: a, b or c"
    )
    return [Cell("text", texts), Cell("quiz", {}, code)]


# ---- what the learner sees -----------------------------------------------------------------------------

COMMENT = re.compile(r"(?m)(?<![^\s])# ([^#\n]+)$")
DOCSTRING = re.compile(r'"""(.*?)"""', re.S)
HINT = re.compile(r'(?m)"((?:[^"\\\n]|\\.)+)"\,?\s*\)$')  # the last words in a call of `exercise`
_IMPORT = re.compile(r"from distill\.lessons import (?:\([^)]*\)|[^\n]*)")
_SHORT = re.compile(r",?\s*\bshort=")
_F_STRING = re.compile(r'f"((?:[^"\\\n]|\\.)*)"')


@cache
def translations() -> dict[str, str]:
    """What is read in the code cells: English to Chinese."""
    return yaml.safe_load((FOLDER / "code.zh.yaml").read_text(encoding="utf-8"))


def readable(code: str) -> list[str]:
    """Comments, docstrings and hints of a code cell: what a reader of another language wants in it."""
    hints = [hint for hint in HINT.findall(code) if "{" not in hint] if "exercise(" in code else []
    return [*COMMENT.findall(code), *DOCSTRING.findall(code), *hints]


def in_language(code: str) -> str:
    """A code cell with its comments, docstrings and hints in Chinese."""
    for english in sorted(readable(code), key=len, reverse=True):
        code = code.replace(english, translations().get(english, english))
    return code


def learners(source: str) -> str:
    """`source` without what only the tests need; it does the same in the full budget."""
    code = _F_STRING.sub(lambda found: _unscaled_text(found[0], found[1]), source)
    while (at := re.search(r"\bscaled\(", code)) is not None:
        first, end = _first_argument(code, at.end())
        code = code[: at.start()] + first + code[end:]
    while (at := _SHORT.search(code)) is not None:
        code = code[: at.start()] + code[_end_of_value(code, at.end()) :]
    code = _IMPORT.sub(lambda found: re.sub(r",\s*scaled\b|\bscaled,\s*", "", found[0]), code)
    return code.replace("  # fmt: skip", "")


def _end_of_value(code: str, start: int) -> int:
    """Where the expression that begins at `start` ends: at a comma or a closing bracket of what it stands in."""
    depth, quote = 0, ""
    for place in range(start, len(code)):
        sign = code[place]
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}" or (sign == "," and not depth):
            if not depth:
                return place
            depth -= 1
    raise UserError(f"an expression does not end: {code[start : start + 40]!r}")


def _first_argument(code: str, start: int) -> tuple[str, int]:
    """(the first argument of a call whose brackets open before `start`, the place after its closing bracket)."""
    end = _end_of_value(code, start)
    close = _end_of_value(code, end + 1)
    while code[close] == ",":
        close = _end_of_value(code, close + 1)
    return code[start:end], close + 1


def _unscaled_text(whole: str, inside: str) -> str:
    """An f-string whose `{scaled(a, b)}` stand as what `a` prints; a plain string where nothing else is filled in."""
    if "{scaled(" not in inside:
        return whole
    pieces: list[tuple[bool, str]] = []  # (is it an expression, text)
    place = 0
    while place < len(inside):
        if inside[place : place + 2] in ("{{", "}}"):
            pieces.append((False, inside[place]))
            place += 2
        elif inside[place] == "{":
            end = _end_of_value(inside, place + 1)
            expression = inside[place + 1 : end]
            if expression.startswith("scaled("):
                value = ast.literal_eval(_first_argument(expression, len("scaled("))[0])
                pieces.append((False, str(value)))
            else:
                pieces.append((True, expression))
            place = end + 1
        else:
            pieces.append((False, inside[place]))
            place += 1
    if not any(expression for expression, _ in pieces):
        return '"' + "".join(text for _, text in pieces) + '"'
    doubled = (
        f"{{{t}}}" if expression else t.replace("{", "{{").replace("}", "}}") for expression, t in pieces
    )
    return 'f"' + "".join(doubled) + '"'
