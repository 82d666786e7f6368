"""The picture of the pipeline on the first screen of README, for light and for dark pages: two SVG files, one drawing.

    python docs/generate/pictures.py          # docs/pictures/pipeline-light.svg and pipeline-dark.svg, and -zh of each

Boxes and arrows stand in the tables below. A test compares the committed files with what this writes.
"""

from html import escape

from distill.storage import PROJECT_ROOT, write_atomic

FOLDER = PROJECT_ROOT / "docs" / "pictures"
_COLOURS = {
    "light": {"ink": "#1f2328", "soft": "#59636e", "line": "#818b98", "data": "#f6f8fa", "model": "#ddf4ff", "end": "#dafbe1"},
    "dark": {"ink": "#f0f6fc", "soft": "#9198a1", "line": "#6e7681", "data": "#151b23", "model": "#0c2d6b", "end": "#033a16"},
}  # fmt: skip
_SIZE = (1010, 250)
# Name: (x, y, width, height, kind). The words of each stand below, in both languages: a title and one line.
_BOXES = {
    "prompts": (10, 90, 160, 64, "data"),
    "teacher": (205, 20, 170, 64, "model"),
    "filter": (410, 20, 180, 64, "data"),
    "student": (625, 20, 180, 64, "model"),
    "control": (625, 160, 180, 64, "model"),
    "exam": (835, 90, 165, 64, "end"),
}
_ARROWS = [
    ("prompts", "teacher"),
    ("teacher", "filter"),
    ("filter", "student"),
    ("prompts", "control"),
    ("student", "exam"),
    ("control", "exam"),
]
_WORDS = {
    "": {
        "prompts": ("prompts", "questions and answers"),
        "teacher": ("teacher", "large, writes the steps"),
        "filter": ("check", "wrong answers are dropped"),
        "student": ("student", "learns the teacher's text"),
        "control": ("control", "the same, no teacher"),
        "exam": ("exam and report", "who is right, how often"),
        "below": "final answers only: same base, same number of steps",
    },
    "-zh": {
        "prompts": ("题目", "问题和最终答案"),
        "teacher": ("教师", "大模型，写出过程"),
        "filter": ("检查", "丢掉错误的回答"),
        "student": ("学生", "学教师写的内容"),
        "control": ("对照", "其余相同，没有教师"),
        "exam": ("考试与报告", "谁答对，对多少"),
        "below": "只用最终答案：底座相同，步数相同",
    },
}


def picture(colours: str, language: str = "") -> str:
    """The drawing as SVG text. colours: "light" or "dark"; language: "" or "-zh"."""
    c, words = _COLOURS[colours], _WORDS[language]
    width, height = _SIZE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', 'Noto Sans CJK SC', sans-serif\" text-anchor=\"middle\">",
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{c["line"]}"/></marker></defs>',
    ]
    parts += [_arrow(_BOXES[a], _BOXES[b], c["line"]) for a, b in _ARROWS]
    parts += [_box(_BOXES[name], *words[name], c) for name in _BOXES]
    parts.append(f'<text x="400" y="216" font-size="13" fill="{c["soft"]}">{escape(words["below"])}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _box(place: tuple, title: str, line: str, c: dict[str, str]) -> str:
    x, y, w, h, kind = place
    middle = x + w / 2
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{c[kind]}" stroke="{c["line"]}"/>'
        f'<text x="{middle:g}" y="{y + 28}" font-size="16" font-weight="600" fill="{c["ink"]}">{escape(title)}</text>'
        f'<text x="{middle:g}" y="{y + 48}" font-size="12" fill="{c["soft"]}">{escape(line)}</text>'
    )


def _arrow(start: tuple, end: tuple, colour: str) -> str:
    """From the right side of one box to the left side of another, level at both ends."""
    x1, y1 = start[0] + start[2], start[1] + start[3] / 2
    x2, y2 = end[0], end[1] + end[3] / 2
    bend = min(40, (x2 - x1) / 2)
    path = f"M{x1} {y1:g}C{x1 + bend:g} {y1:g} {x1 + bend:g} {y2:g} {x1 + 2 * bend:g} {y2:g}L{x2} {y2:g}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" marker-end="url(#tip)"/>'


def main() -> None:
    for colours in _COLOURS:
        for language in _WORDS:
            write_atomic(FOLDER / f"pipeline-{colours}{language}.svg", picture(colours, language))


if __name__ == "__main__":
    main()
