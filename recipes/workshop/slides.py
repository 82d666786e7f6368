"""The instructor's slides, made from the lessons: one HTML page a language, offline, with the figures of the notebooks.

    python recipes/workshop/build.py slides        # recipes/workshop/slides.html and slides.zh-CN.html

A lesson becomes a title with its goals, a slide for every section (its heading, its first sentences, the figure that
the next cell made), one for an exercise, and its quiz, where the answer comes with the next key. Nothing is written for
the slides alone, so they cannot say other things than the lessons. Arrow keys, space, a click or a swipe go on; `o`
shows all; the number of the slide stands in the address.
"""

import base64
import html
import re
from dataclasses import dataclass, field

from source import FOLDER, Lesson

from distill.lessons.lesson import LETTERS, questions
from distill.storage import PROJECT_ROOT

WORDS = {
    "en": {"title": "Workshop on distillation", "goals": "After this lesson you can", "exercise": "Exercise",
           "quiz": "Quiz", "hint": "The arrow keys turn the page. The key o shows all slides.", "lang": "en"},
    "zh": {"title": "蒸馏工作坊", "goals": "学完本课，你能够", "exercise": "练习",
           "quiz": "小测", "hint": "按方向键翻页，按 o 键看全部幻灯片。", "lang": "zh-CN"},
}  # fmt: skip
SENTENCES = 3  # of a section, on its slide
MOST_LETTERS = 420
ROOM_BESIDE_A_FIGURE = 170  # letters: two lines or three


@dataclass
class Slide:
    """`points` are HTML; `picture` is a PNG in base64."""

    title: str
    points: list[str] = field(default_factory=list)
    picture: str = ""
    kind: str = "section"
    full: bool = False  # a figure below these points would be too small for a projector


def inline(text: str) -> str:
    """Markdown of a line as HTML: code, bold, italics; links become their words."""
    text = html.escape(re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text), quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"(?<!\*)\*([^*\s][^*]*)\*(?!\*)", r"<i>\1</i>", text)


def sentences(text: str) -> list[str]:
    """The first sentences of a paragraph, of English or Chinese."""
    ends = r"(?<! al)[.!?](?=\s|$)|[。！？]"  # "et al." ends nothing
    found = re.findall(rf".+?(?:{ends})", text.replace("\n", " ")) or [text]
    kept, letters = [], 0
    for sentence in found[:SENTENCES]:
        letters += len(sentence)
        if kept and letters > MOST_LETTERS:
            break
        kept.append(sentence.strip())
    return kept


def picture_of(outputs: list[dict]) -> str:
    """The first figure among the outputs of a cell."""
    for output in outputs:
        image = output.get("data", {}).get("image/png")
        if image:
            return "".join(image).replace("\n", "")
    return ""


def answers_shown(language: str) -> str:
    """README's picture of a problem before and after: the cell itself shows a page, not a picture."""
    path = PROJECT_ROOT / "docs" / "pictures" / f"answers-light{'-zh' if language == 'zh' else ''}.png"
    return base64.b64encode(path.read_bytes()).decode()


def of_lesson(lesson: Lesson, language: str, outputs: list[list[dict]] | None, fill) -> list[Slide]:
    """Slides of one lesson. `outputs` by code cell, the install cell first; `fill` puts measured numbers into texts."""
    slides, ran = [], 1
    for index, cell in enumerate(lesson.cells):
        if cell.kind in ("code", "exercise"):
            image = picture_of(outputs[ran]) if outputs and ran < len(outputs) else ""
            if outputs and lesson.number == 0 and "show(asked" in cell.source:
                image = answers_shown(language)
            ran += 1
            if image and slides:
                if slides[-1].picture or slides[-1].kind == "title" or slides[-1].full:
                    slides.append(Slide(slides[-1].title))
                slides[-1].picture = image
        if cell.kind != "text":
            continue
        if index + 1 < len(lesson.cells) and lesson.cells[index + 1].kind == "quiz":
            slides += _quiz(lesson.number, language)
            continue
        made, english = (
            _of_text(fill(cell.text[one]), WORDS[one], first=index == 0) for one in (language, "en")
        )
        for slide, twin in zip(made, english):  # both languages have the same slides
            slide.full = len(re.sub("<[^>]+>", "", "".join(twin.points))) > ROOM_BESIDE_A_FIGURE
        slides += made
    return slides


def _of_text(text: str, words: dict, first: bool) -> list[Slide]:
    slides = []
    parts = re.split(r"(?m)^(#{1,3} .+)$", text)
    if exercises := re.findall(r"(?ms)^\*\*(\d\.\d)\*\* (.+?)(?=^\*\*\d\.\d\*\*|\Z)", text):
        slides = [
            Slide(f"{words['exercise']} {n}", [inline(s) for s in sentences(t)], kind="exercise")
            for n, t in exercises
        ]
    for heading, body in zip(parts[1::2], parts[2::2]):
        title = heading.lstrip("# ")
        body = re.sub(r"(?ms)^```.*?^```", "", body).strip()
        if re.match(r"\*\*\d\.\d\*\*", body) or not body:
            continue  # exercises have slides of their own
        paragraphs = [p for p in re.split(r"\n\s*\n", body) if p.strip() and not p.startswith("|")]
        points: list[str] = []
        if first and heading.startswith("# "):
            goals = next((p for p in paragraphs if words["goals"] in p), "")
            lines = re.split(r"[;；]", goals.partition("**")[2].partition("**")[2].lstrip(" ：:"))
            points = [inline(line.strip(" .。")) for line in lines if line.strip()]
        else:
            for paragraph in paragraphs[:2]:
                items = re.findall(r"(?m)^- (.+)$", paragraph)
                points += [inline(sentences(item)[0]) for item in items] or [
                    inline(s) for s in sentences(paragraph)
                ]
        is_title = first and heading.startswith("# ")
        place = 0 if not slides or slides[0].kind == "exercise" else len(slides)
        slides.insert(place, Slide(inline(title), points[:6], kind="title" if is_title else "section"))
        first = False
    return slides


def _quiz(number: int, language: str) -> list[Slide]:
    slides = []
    for n, one in enumerate(questions().get(number, []), 1):
        said = one[language]
        options = [f"<b>{letter}</b> {inline(option)}" for letter, option in zip(LETTERS, said["options"])]
        title = f"{WORDS[language]['quiz']} {number}.{n}"
        slides.append(Slide(title, [inline(said["question"]), *options], kind="quiz"))
        right = options[LETTERS.index(one["right"])]
        slides.append(
            Slide(
                title, [inline(said["question"]), f"<mark>{right}</mark>", inline(said["why"])], kind="quiz"
            )
        )
    return slides


def page(slides: list[Slide], language: str) -> str:
    """All slides as one HTML page."""
    words = WORDS[language]
    first = Slide(words["title"], [words["hint"]], kind="title")
    shown = "".join(
        f"<section class='{slide.kind}{' pictured' if slide.picture else ''}'><h2>{slide.title}</h2>"
        + ("<ul>" + "".join(f"<li>{point}</li>" for point in slide.points) + "</ul>" if slide.points else "")
        + (f"<img alt='' src='data:image/png;base64,{slide.picture}'>" if slide.picture else "")
        + "</section>\n"
        for slide in (first, *slides)
    )
    text = (FOLDER / "deck.html").read_text(encoding="utf-8")
    for name, value in (("lang", words["lang"]), ("title", html.escape(words["title"])), ("slides", shown)):
        text = text.replace(f"{{{{{name}}}}}", value)
    return text
