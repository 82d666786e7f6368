"""What all figures share: styles of models, matplotlib to inline SVG, and one scale of colours for heat maps.

    figure, axes = new_figure(6, 3); ...; svg = to_svg(figure)

Why SVG text: it stays sharp on a projector, can be searched and read aloud, and takes its colours from the
page, so one figure serves light, dark and printed pages. Models differ in colour, hatch and marker (the
palette is Okabe & Ito's, safe for colour-blind readers), so a black-and-white print loses nothing.

The SVG strings are ready for HTML5: no prolog, no namespaces, ids that cannot meet those of another figure,
the same bytes for the same numbers.

Heat maps: one scale of colours for all of them, so that a shade means the same in every figure of every page.

    svg = expert_load("teacher", {"model.layers.1.mlp": [0.2, 0.1, ...]})
    svg = heat_map("layer 1", ["addition", ...], cells, uniform=25.0, what="kind of problem")
    svg = loss_map("accuracy lost", ["layer 1"], cells)

A share is coloured by how it compares with the share that an even router would give: white is even, orange more,
purple less, and the ends are four times and a quarter of it, whatever the figure. Losses have their own unit, so their
scale is in points around 0. Every cell carries its number where there is room, and says it under the pointer.

Shapes: R rows, C columns (experts), E experts.
"""

import contextlib
import hashlib
import html
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextToPath

from distill.report.pages import called, say

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
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "Microsoft YaHei", "PingFang SC",
    "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Noto Sans CJK JP",
)  # fmt: skip


def chinese_font() -> str | None:
    """A font of this machine that has Chinese letters."""
    from matplotlib import font_manager

    def known() -> str | None:
        names = {font.name for font in font_manager.fontManager.ttflist}
        return next((name for name in CHINESE_FONTS if name in names), None)

    if known() is None:  # matplotlib's list may be older than the font
        for path in font_manager.findSystemFonts():
            if re.search(r"CJK|SansSC|HanSans|Hei|PingFang|DroidSansFallback", Path(path).name):
                with contextlib.suppress(RuntimeError, OSError):  # of a kind that matplotlib does not read
                    font_manager.fontManager.addfont(path)
    return known()


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
    with _room_for_wide_letters(), matplotlib.rc_context(RC):  # letters as text, whoever draws
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


# ==== Heat maps ====

COLOURS = "PuOr_r"
OCTAVES = 2.0  # the scale ends at 2^2 times the uniform share, and at that part of it
LEAST_POINTS = 5.0  # a scale of losses reaches so far at least: smaller ones are chance
DARK, LIGHT = "#101418", "#ffffff"  # text on a cell, whatever the page's colours are


def expert_load(model: str, loads: dict[str, list[float]]) -> str:
    """Share of the routed tokens that each expert received: a row a layer, a column an expert.

    `loads[layer]` is [E] and sums to 1; layers may differ in E, and each is compared with its own 1/E.
    """
    labels, widest = layer_labels(list(loads)), max(len(load) for load in loads.values())
    cells = np.full((len(loads), widest), np.nan)
    for row, load in enumerate(loads.values()):
        cells[row, : len(load)] = 100 * np.asarray(load, dtype=float)
    uniform = np.array([100.0 / len(load) for load in loads.values()])
    said = say("Share of tokens per expert and layer of %(model)s", model=called(model))
    return _drawn("", labels, cells, _octaves(cells, uniform[:, None]), uniform, said, alone=True)


def heat_map(title: str, rows: list[str], cells: np.ndarray, *, uniform: float, what: str) -> str:
    """[R, C] shares in % as cells, columns being experts; NaN stays empty. `what` says what the rows are."""
    said = say("%(title)s: %(what)s by expert, in %%", title=title, what=what)
    return _drawn(title, rows, cells, _octaves(cells, uniform), np.array([uniform]), said)


def loss_map(title: str, rows: list[str], cells: np.ndarray) -> str:
    """[R, C] points of accuracy lost, columns being experts; a loss is orange, a gain purple."""
    reach = max(LEAST_POINTS, float(np.nanmax(np.abs(cells))))
    return _drawn(title, rows, cells, cells / reach, None, title, alone=True, reach=reach)


def _octaves(cells: np.ndarray, uniform) -> np.ndarray:
    """-1 to 1: how often a share doubles the uniform one, by what the scale holds."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log2(cells / uniform) / OCTAVES, -1, 1)


def _drawn(
    title: str,
    rows: list[str],
    cells: np.ndarray,
    shades: np.ndarray,
    uniform: np.ndarray | None,
    said: str,
    *,
    alone: bool = False,
    reach: float = 0.0,
) -> str:
    """`shades` [R, C] are -1 to 1. `alone` gives many experts the whole width; `reach` is that of a loss."""
    columns, hover = cells.shape[1], Hover()
    small, wide = columns <= SMALL_CELLS, alone and columns > SMALL_CELLS
    with matplotlib.rc_context(RC):
        tall = max(0.05, min(0.32, (6.4 if wide else 3.9) / len(rows)))
        figure = new_figure(7.2 if wide else 4.9, 1.2 + (0.3 if title else 0.05) + tall * len(rows))
        axes = figure.add_subplot()
        colours = ScalarMappable(Normalize(-1, 1), COLOURS)
        if cells.size <= CELLS_AS_VECTORS:
            _cells(axes, rows, cells, shades, colours, hover, uniform)
        else:
            colours = axes.pcolormesh(shades, cmap=COLOURS, vmin=-1, vmax=1)
            colours.set_rasterized(True)
        if columns <= CELLS_WITH_TEXT and len(rows) <= 24:
            for (row, column), value in np.ndenumerate(cells):
                if np.isfinite(value):
                    digits = 1 if small and abs(value) < 99.95 else 0
                    place = {"ha": "center", "va": "center", "fontsize": 8.5 if small or wide else 7}
                    shade = LIGHT if abs(shades[row, column]) > 0.62 else DARK
                    axes.text(column + 0.5, row + 0.5, _number(value, digits), color=shade, **place)
        axes.set_xlim(0, columns)
        axes.set_ylim(len(rows), 0)
        step = max(1, columns // 16)
        axes.set_xticks(np.arange(0, columns, step) + 0.5, np.arange(0, columns, step))
        step = max(1, len(rows) // 16)
        axes.set_yticks(
            np.arange(0, len(rows), step) + 0.5, [shorten(r, 22) for r in rows[::step]], color=INK
        )
        axes.set_facecolor("none")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(say("expert"))
        if title:
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        fraction = min(0.4, 0.13 / (tall * len(rows)))  # the same bar under few rows and many
        bar = figure.colorbar(
            colours, ax=axes, orientation="horizontal", fraction=fraction, aspect=45, pad=0.03
        )
        _bar(bar, uniform, reach)
        return to_svg(figure, said, 620 if wide else 300, hover)  # 300: the whole width of a phone


def _cells(axes, rows, cells, shades, colours, hover, uniform) -> None:
    """A rectangle each, which says its number under the pointer."""
    edge = {"edgecolor": "white", "linewidth": 0.8} if cells.shape[1] <= 2 * CELLS_WITH_TEXT else {}
    for (row, column), value in np.ndenumerate(cells):
        if not np.isfinite(value):
            continue
        if uniform is None:
            said = say("%(row)s, expert %(e)s: %(n)s points", row=rows[row], e=column, n=_number(value, 1))
        else:
            times = value / (uniform[row] if len(uniform) > 1 else uniform[0])
            said = say(
                "%(row)s, expert %(e)s: %(n)s %%, %(times)s × the even share",
                row=rows[row], e=column, n=_number(value, 1), times=f"{times:.2f}",
            )  # fmt: skip
        colour = colours.to_rgba(shades[row, column])
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, gid=hover.says(said), **edge))


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # adding 0.0 turns -0.0 into 0.0


def _bar(bar, uniform: np.ndarray | None, reach: float) -> None:
    """The same five marks under every map of shares; under a map of losses the ends and 0."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    if uniform is None:
        ends = [_number(end, 1) for end in (-reach, 0.0, reach)]
        bar.set_ticks([-1, 0, 1], labels=[ends[0], say("no loss: 0 points"), ends[2]])
    else:
        same = np.ptp(uniform) < 1e-9
        even = say("even: %(n)s %%", n=f"{uniform[0]:.3g}") if same else say("even")
        bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["¼ ×", "½ ×", even, "2 ×", "4 ×"])
    bar.ax.axvline(0, color=DARK, linewidth=1.5)
    labels = bar.ax.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")
