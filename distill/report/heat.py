"""Heat maps: one scale of colours for all of them, so that a shade means the same in every figure of every page.

    svg = expert_load("teacher", {"model.layers.1.mlp": [0.2, 0.1, ...]})
    svg = heat_map("layer 1", ["addition", ...], cells, uniform=25.0, what="kind of problem")
    svg = loss_map("accuracy lost", ["layer 1"], cells)

A share is coloured by how it compares with the share that an even router would give: white is even, orange more,
purple less, and the ends are four times and a quarter of it, whatever the figure. Losses have their own unit, so their
scale is in points around 0. Every cell carries its number where there is room, and says it under the pointer.

Shapes: R rows, C columns (experts), E experts.
"""

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from distill.report.drawing import (
    CELLS_AS_VECTORS,
    CELLS_WITH_TEXT,
    INK,
    RC,
    SMALL_CELLS,
    Hover,
    layer_labels,
    new_figure,
    shorten,
    to_svg,
)
from distill.report.words import called, say

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
        return to_svg(figure, said, 620 if wide else 440 if alone else 300, hover)


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
