"""What all figures share: styles of models, an empty figure, and the way from matplotlib to inline SVG.

    figure, axes = new_figure(6, 3); ...; svg = to_svg(figure)

Why SVG text: it stays sharp on a projector, can be searched and read aloud, and takes its colours from the
page, so one figure serves light, dark and printed pages. Models differ in colour, hatch and marker (the
palette is Okabe & Ito's, safe for colour-blind readers), so a black-and-white print loses nothing.

The SVG strings are ready for HTML5: no prolog, no namespaces, ids that cannot meet those of another figure,
the same bytes for the same numbers.
"""

import contextlib
import hashlib
import html
import io
import re

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.textpath import TextToPath

from distill.report.words import called, say

# Placeholders in the drawing; `to_svg` swaps them for the CSS variables of the page.
INK, MUTED, GRID, CARD = "#1b1f24", "#5b6471", "#d6dbe2", "#fefdfc"
ACCENT = "#0072b2"
CSS_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    CARD: "var(--card)",
    ACCENT: "var(--accent)",
}
STYLES = {  # model: fill, hatch, line style
    "base": ("#bcc2ca", "", ":"),
    "control": ("#e69f00", "////", "--"),
    "student": (ACCENT, "", "-"),
    "teacher": ("#009e73", "xxxx", "-."),
}
SPARE_STYLES = [
    ("#cc79a7", "\\\\\\\\", (0, (5, 1))),
    ("#56b4e9", "----", (0, (1, 1))),
    ("#d55e00", "++++", (0, (3, 1, 1, 1))),
    ("#f0e442", "||||", (0, (8, 2))),
]
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distill",
    "text.parse_math": False,  # a model called "a$b$c" is a name, not a formula
    "font.family": "DejaVu Sans",  # ships with matplotlib: the layout does not depend on the machine
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "hatch.color": INK,
    "hatch.linewidth": 0.6,
}
NAME_WIDTH = 20  # characters of a model's name on one line of a bar chart
SMALL_CELLS = 8  # up to this many experts a cell has room for one decimal
CELLS_WITH_TEXT = 16
CELLS_AS_VECTORS = 2000


def model_style(name: str, order: list[str]):
    """(fill, hatch, line style) of a model: fixed for the four of the demo, by position for any other."""
    if name in STYLES:
        return STYLES[name]
    others = [other for other in order if other not in STYLES]
    return SPARE_STYLES[others.index(name) % len(SPARE_STYLES)]


def shorten(name: str, length: int = 18) -> str:
    """`name` with its middle left out, at most `length` characters."""
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure


# Letters as wide as they are high. matplotlib's own font has none of them, so it would leave too little room.
_WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uff60]")


@contextlib.contextmanager
def _room_for_wide_letters():
    """Text is measured with an em dash for every wide letter; the page's own font draws it."""
    original = TextToPath.get_text_width_height_descent

    def measured(self, text, prop, ismath):
        return original(self, _WIDE.sub("\u2014", text), prop, ismath)

    TextToPath.get_text_width_height_descent = measured
    try:
        yield
    finally:
        TextToPath.get_text_width_height_descent = original


class Hover:
    """What the pointer is told over parts of one figure, without a script: an SVG title each.

    hover = Hover(); artist.set_gid(hover.says("layer 1, expert 3: 14.0 %")); to_svg(figure, label, hover=hover)
    """

    def __init__(self):
        self.texts: list[str] = []

    def says(self, text: str) -> str:
        """The gid for the artist that `text` belongs to."""
        self.texts.append(text)
        return f"hover{len(self.texts) - 1}"

    def written(self, body: str) -> str:
        """The drawing with a title as the first thing in each named group, whose name is then free to go."""

        def titled(match: re.Match) -> str:
            return f"<g><title>{html.escape(self.texts[int(match[1])])}</title>"

        return re.sub(r'<g id="hover(\d+)">', titled, body)


def written_svg(figure: Figure) -> str:
    """The file that `figure.savefig` would write, which draws everything twice, the first time for the layout alone."""
    buffer, canvas, dpi = io.StringIO(), FigureCanvasSVG(figure), figure.dpi
    with _room_for_wide_letters():
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        figure.dpi = dpi  # which asking for the size of text had changed
        # Every entry of the metadata block is dropped: it holds a date and addresses on the network.
        canvas.print_svg(buffer, metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    return buffer.getvalue()


def to_svg(figure: Figure, label: str, min_width: int = 300, hover: Hover | None = None) -> str:
    """The figure as an inline `<svg>`; `label` is what a screen reader says."""
    written = written_svg(figure)
    svg = hover.written(written) if hover else written
    svg = svg[svg.index("<svg") :]
    # The drawing's own style rule (`*{...}`) would reach the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    opening, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="([^"]*)"', opening).group(1)
    width = float(view_box.split()[2])

    prefix = "f" + hashlib.sha256((label + body).encode()).hexdigest()[:8] + "-"
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\b(id="|href="#|url\(#)', lambda match: match.group(1) + prefix, body)
    for colour, variable in CSS_COLOURS.items():
        body = body.replace(colour, variable)
    # Natural size is 1 pt = 1 px; half as large again is the most that still looks drawn to scale.
    size = f"min-width:{min_width}px;max-width:{width * 1.5:.0f}px"
    return (
        f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(label, quote=True)}" style="{size}">'
        + body.strip()
    )


def plain_axes(axes, grid: str) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def in_order(names) -> list[str]:
    """Names from a JSON file, whose keys are sorted as text, as a reader counts: layer 2 before layer 10.

    The embedded levels stand by difficulty.
    """
    known = {"easy": "0", "medium": "1", "hard": "2"}

    def key(name: str) -> list:
        return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", known.get(name, name))]

    return sorted(names, key=key)


def layer_label(number: str | int, again: str | None = None) -> str:
    if again:
        return say("layer %(n)s pass %(again)s", n=number, again=again)
    return say("layer %(n)s", n=number)


def short_name(name: str, length: int = 18) -> str:
    """A model, task or family as a figure has room for it."""
    return shorten(called(name), length)


def layer_labels(names: list[str]) -> list[str]:
    """ "layer 3" for a router's full name where that stays unique, the shortened name where it does not.

    "layer 3 pass 2" where a model goes through its layers more than once.
    """
    numbers = [re.search(r"\blayers?\.(\d+)(?:.*? pass (\d+)$)?", name) for name in names]
    labels = [
        layer_label(found[1], found[2]) if found else shorten(name) for name, found in zip(names, numbers)
    ]
    return labels if len(set(labels)) == len(names) else [shorten(name) for name in names]
