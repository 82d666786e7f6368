"""How the report shows numbers: as figures (one inline SVG string each) and as words with unit and interval.

Why SVG text: it stays sharp on a projector, can be searched and read aloud, and takes its colours from the
page, so one figure serves light, dark and printed pages. Models differ in colour, hatch and marker (the
palette is Okabe & Ito's, safe for colour-blind readers), so a black-and-white print loses nothing.

    svg = accuracy_panel("hard", {"student": {"accuracy": 0.82, "ci95": [0.78, 0.86], "n": 300}})
    percent({"accuracy": 0.82, "ci95": [0.78, 0.86]})      # 82.0 % [78.0, 86.0]

The SVG strings are ready for HTML5: no prolog, no namespaces, ids that cannot meet those of another figure,
the same bytes for the same numbers. Shape legend: E experts.
"""

import hashlib
import html
import io
import math
import re

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
NB = "\u00a0"  # keeps a number and its unit on one line
DASH = "–"
LONGEST_TEXT = 2000
# Control characters are invisible on a page, so each shows as its picture (U+2400 and on).
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


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


def to_svg(figure: Figure, label: str, min_width: int = 300) -> str:
    """The figure as an inline `<svg>`; `label` is what a screen reader says."""
    buffer = io.StringIO()
    # Every entry of the metadata block is dropped: it holds a date and addresses on the network.
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    svg = buffer.getvalue()
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


def accuracy_panel(task: str, scores: dict[str, dict], order: list[str] | None = None) -> str:
    """Horizontal bars of one task, a model each, with the 95 % interval as error bar.

    `scores[model]` has `accuracy` (0 to 1), `ci95` ([low, high], 0 to 1) and `n`. `order` is the list of
    all models of the page, which keeps a model's colour the same in every panel.
    """
    names = list(scores)
    order = order or names
    with matplotlib.rc_context(RC):
        labels = [shorten(name, 2 * NAME_WIDTH) for name in names]
        longest = min(NAME_WIDTH, max(map(len, labels)))
        figure = new_figure(3.4 + 0.07 * longest, 0.75 + 0.38 * len(names))
        axes = figure.add_subplot()
        plain_axes(axes, "x")
        for row, name in enumerate(names):
            fill, hatch, _ = model_style(name, order)
            score = scores[name]
            low, high = (100 * bound for bound in score["ci95"])
            axes.barh(
                row,
                100 * score["accuracy"],
                height=0.68,
                color=fill,
                hatch=hatch,
                edgecolor=INK,
                linewidth=0.8,
            )
            # The casing in the colour of the page keeps the interval visible on every fill and hatch.
            bar = {"xdata": [low, high], "ydata": [row, row], "marker": "|", "clip_on": False}
            axes.add_line(Line2D(**bar, color=CARD, linewidth=5, markersize=13, markeredgewidth=5))
            axes.add_line(Line2D(**bar, color=INK, linewidth=1.8, markersize=9, markeredgewidth=1.8))
            axes.text(1.05, row, percent(score, 0), transform=axes.get_yaxis_transform(), va="center")
        lines = [f"{label[:NAME_WIDTH]}\n{label[NAME_WIDTH:]}".strip() for label in labels]
        axes.set_yticks(range(len(names)), lines, color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        counts = sorted({scores[name]["n"] for name in names})
        span = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
        figure.suptitle(f"{shorten(task, 30)} ({span})", x=0.01, ha="left", fontsize=11, fontweight="bold")
        said = ", ".join(f"{name} {share(scores[name]['accuracy'], 0)}" for name in names)
        return to_svg(figure, f"Accuracy on {task}: {said}")


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` steps, shorter at both ends, of the values that are finite."""
    finite = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def loss_curves(title: str, curves: dict[str, tuple[list, list]], window: dict[str, int], order=None) -> str:
    """Loss (nats per trained token) against optimizer step, raw and smoothed, one line a model.

    `curves[model]` is (steps, values); `window[model]` the number of steps of the moving average.
    """
    with matplotlib.rc_context(RC):
        figure = new_figure(4.0, 2.9)
        axes = figure.add_subplot()
        plain_axes(axes, "y")
        drawn = []
        for name, (steps, values) in curves.items():
            fill, _, dashes = model_style(name, order or list(curves))
            values = np.asarray(values, dtype=float)
            smoothed = smooth(values, window[name])
            axes.plot(steps, values, color=fill, linewidth=0.7, alpha=0.3)
            axes.plot(steps, smoothed, color=fill, linewidth=2.2, linestyle=dashes, label=shorten(name))
            drawn.append(smoothed)
        finite = np.concatenate(drawn)
        finite = finite[np.isfinite(finite)]
        if len(finite):
            # The smoothed lines set the scale, so that one bad step cannot flatten everything else.
            axes.set_ylim(min(0.0, finite.min()), 1.15 * finite.max() or 1.0)
        axes.set_xlabel("optimizer step")
        axes.set_title(f"{title}, nats per token", loc="left", fontsize=11, fontweight="bold")
        axes.legend(frameon=False, handlelength=3, labelcolor=INK)
        return to_svg(figure, f"{title} against optimizer step for {' and '.join(curves)}")


def in_order(names) -> list[str]:
    """Names from a JSON file, whose keys are sorted as text, as a reader counts: layer 2 before layer 10.

    The embedded levels stand by difficulty.
    """
    known = {"easy": "0", "medium": "1", "hard": "2"}

    def key(name: str) -> list:
        return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", known.get(name, name))]

    return sorted(names, key=key)


def layer_labels(names: list[str]) -> list[str]:
    """ "layer 3" for a router's full name where that stays unique, the shortened name where it does not.

    "layer 3 pass 2" where a model goes through its layers more than once.
    """
    numbers = [re.search(r"\blayers?\.(\d+)(?:.*?( pass \d+)$)?", name) for name in names]
    labels = [
        f"layer {found[1]}{found[2] or ''}" if found else shorten(name) for name, found in zip(names, numbers)
    ]
    return labels if len(set(labels)) == len(names) else [shorten(name) for name in names]


def expert_load(model: str, loads: dict[str, list[float]]) -> str:
    """Heat map of the share of routed tokens each expert received: a row a layer, a column an expert.

    `loads[layer]` is [E] and sums to 1 (layers may differ in E). The bar below carries a mark at the
    uniform share 1/E.
    """
    labels, widest = layer_labels(list(loads)), max(len(load) for load in loads.values())
    cells = np.full((len(loads), widest), np.nan)
    for row, load in enumerate(loads.values()):
        cells[row, : len(load)] = 100 * np.asarray(load, dtype=float)
    uniform = 100.0 / widest
    top = max(2 * uniform, float(np.nanmax(cells)))
    with matplotlib.rc_context(RC):
        wide = 4.9 if widest <= SMALL_CELLS else 7.2
        figure = new_figure(wide, 1.35 + min(0.42, max(0.2, 4 / len(loads))) * len(loads))
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(cells, cmap="YlGnBu", vmin=0, vmax=top, edgecolors="white", linewidth=1)
        mesh.set_rasterized(cells.size > CELLS_AS_VECTORS)
        if widest <= CELLS_WITH_TEXT:
            for (row, column), value in np.ndenumerate(cells):
                if np.isfinite(value):
                    text = f"{value:.1f}" if widest <= SMALL_CELLS else f"{value:.0f}"
                    shade = "#ffffff" if value > 0.6 * top else "#101418"
                    middle = {"ha": "center", "va": "center", "fontsize": 9}
                    axes.text(column + 0.5, row + 0.5, text, color=shade, **middle)
        ticks = np.arange(0, widest, max(1, widest // 16))
        axes.set_xticks(ticks + 0.5, ticks)
        axes.set_yticks(np.arange(len(loads)) + 0.5, labels, color=INK)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title("expert", fontsize=10, color=MUTED)
        bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", fraction=0.07, aspect=45, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.axvline(uniform, color="#101418", linewidth=2.5)
        bar.set_ticks([0, uniform, top], labels=["0 %", f"uniform: {uniform:.1f} %", f"{top:.0f} %"])
        bar.ax.tick_params(length=0)
        label = f"Share of tokens per expert and layer of {model}; uniform would be {uniform:.1f} %"
        return to_svg(figure, label, min_width=300 if widest <= SMALL_CELLS else 620)


# ---- numbers into words (filters of the template); what is not there becomes a dash


def absent(value) -> bool:
    """True for None and for NaN, which JSON files hold where nothing could be measured."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(value, digits: int = 3) -> str:
    """Integers with thousands separators, other numbers to `digits` decimals; a list counts its members."""
    if absent(value):
        return DASH
    if isinstance(value, list):
        value = len(value)
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"


def si(value, unit: str = "") -> str:
    """`value` with three significant digits and an SI prefix: 3,650,000 -> 3.65 M."""
    if absent(value):
        return DASH
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:  # 999,700 is 1 M, not 1e+03 k
            return f"{value / scale:.3g}{NB}{prefix}{unit}"
    return f"{value:.3g}{NB}{unit}".rstrip(NB)


def duration(seconds: float | None) -> str:
    """Wall-clock time in the two largest units that fit."""
    if absent(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f}{NB}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NB}min {rest}{NB}s"
    return f"{minutes // 60}{NB}h {minutes % 60}{NB}min"


def share(value: float | None, digits: int = 1) -> str:
    """A fraction of 1 as a percentage."""
    if absent(value):
        return DASH
    return f"{_hundredfold(value, digits)}{NB}%"


def _hundredfold(value: float, digits: int) -> str:
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"  # adding 0.0 turns -0.0 into 0.0


def percent(score: dict | None, digits: int = 1) -> str:
    """Accuracy of a score with its 95 % interval: `82.0 % [78.1, 85.9]`."""
    if not score or absent(score.get("accuracy")):
        return DASH
    low, high = (_hundredfold(bound, digits) for bound in score["ci95"])
    return f"{share(score['accuracy'], digits)} [{low},{NB}{high}]"


def points(comparison: dict) -> str:
    """Difference of a comparison in percentage points with its 95 % interval."""
    if absent(comparison.get("difference")):
        return DASH
    low, high = comparison["ci95"]
    text = f"{100 * comparison['difference']:+.1f}{NB}points [{100 * low:+.1f},{NB}{100 * high:+.1f}]"
    return text.replace("-", "−")


def p_value(value: float | None) -> str:
    """`0.023`, or `< 0.001` where more digits would claim more than the data can tell."""
    if absent(value):
        return DASH
    return f"<{NB}0.001" if value < 0.001 else f"{value:.3f}"


def clip(text: str | None) -> str:
    """Text of a model, its control characters made visible, its length bounded."""
    text = (text or "").translate(CONTROL_PICTURES)
    left_out = len(text) - LONGEST_TEXT
    return text if left_out <= 0 else f"{text[:LONGEST_TEXT]}… ({left_out:,} more characters)"
