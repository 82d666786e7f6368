"""A page as a reader finds it: its visible words, tables and cells, and the points of a figure."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "hr", "input", "wbr"}


class Page(HTMLParser):
    """Table cells by row, tags with attributes, all text; checks that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.tags, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] in ("dt", "dd"):
            self.words.append(" ")
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words).replace("\u00a0", " "))

    @property
    def cells(self) -> list[list[str]]:
        return [
            [re.sub(r"\s+", " ", cell.replace("\u00a0", " ")).strip() for cell in row] for row in self.rows
        ]


def points(difference: float, low: float, high: float) -> str:
    return f"{difference:+.1f} points [{low:+.1f}, {high:+.1f}]".replace("-", "\u2212")
