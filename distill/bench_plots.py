"""Figures of a grid's page: effects with intervals, and one metric against another.

    svg = forest("Distillation", claims); svg = curve(results["curves"][0])

Inline SVG through `distill.plots`, whose palette, fonts and colours they share.
"""

from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from distill import plots
from distill.bench_metrics import metric

_FACES = {
    "SUPPORTED": plots.ACCENT,
    "NOT SUPPORTED": "#d55e00",
    "INCONCLUSIVE": plots.CARD,
    "NOT COMPARABLE": plots.CARD,
}
_SHAPES = {"SUPPORTED": "o", "NOT SUPPORTED": "X", "INCONCLUSIVE": "o", "NOT COMPARABLE": "s"}


def forest(title: str, claims: list[dict[str, Any]]) -> str:
    """One line per claim: the effect over its interval's half width, so that different units share an axis.

    Where 1 is the half width of the 95 % interval, an interval that leaves out 0 is one beyond -1 and 1. Claims of
    one unit are drawn in it instead.
    """
    with plots.matplotlib.rc_context(plots.RC):
        units = {(c["unit"], c["relative"]) for c in claims}
        scale = 100 if {unit for unit, _ in units} == {"%"} else 1
        figure = plots.new_figure(6.4, 0.7 + 0.42 * len(claims))
        axes = figure.add_subplot()
        plots.plain_axes(axes, "x")
        axes.axvline(0, color=plots.MUTED, linewidth=1)
        for row, claim in enumerate(claims):
            effect, verdict = claim["effect"], claim["verdict"]
            unit = scale if len(units) == 1 else _own_scale(effect)
            if effect["mean"] is None:
                continue
            if effect["ci95"] is not None:
                low, high = (bound * unit for bound in effect["ci95"])
                axes.plot([low, high], [row, row], color=plots.INK, linewidth=1.6, solid_capstyle="butt")
            look = {"color": _FACES.get(verdict, plots.CARD), "markeredgecolor": plots.INK, "markersize": 8}
            axes.plot(effect["mean"] * unit, row, _SHAPES.get(verdict, "o"), **look)
            if claim["margin"]:
                for side in {"within": (-1, 1), "greater": (1,), "less": (-1,)}[claim["expect"]]:
                    axes.plot(side * claim["margin"] * unit, row, "|", color=plots.INK, markersize=14)
        axes.set_yticks(range(len(claims)), [plots.shorten(c["id"], 26) for c in claims])
        axes.set_ylim(len(claims) - 0.5, -0.5)
        axes.set_xlabel(_effect_label(units))
    return plots.to_svg(figure, f"{title}: effects with 95 % intervals")


def _effect_label(units: set[tuple[str, bool]]) -> str:
    if len(units) > 1:
        return "effect, in half widths of its 95 % interval"
    unit, relative = next(iter(units))
    words = "% of the reference" if relative else {"%": "percentage points"}.get(unit, unit)
    return f"effect, {words}" if words else "effect"


def _own_scale(effect: dict[str, Any]) -> float:
    low, high = effect["ci95"] or (0.0, 0.0)
    half = (high - low) / 2
    return 1 / half if half else 1.0


def curve(found: dict[str, Any]) -> str:
    """One metric against another: a line (or points) per series, one sd over seeds as bars, fits dashed."""
    x_about, y_about = metric(found["x"]), metric(found["y"])
    by_x, by_y = (100 if about.unit == "%" else 1 for about in (x_about, y_about))
    with plots.matplotlib.rc_context(plots.RC):
        figure = plots.new_figure(6.4, 3.8)
        axes = figure.add_subplot()
        plots.plain_axes(axes, "both")
        names = list(found["series"])
        if found.get("front"):
            places = {
                arm: (x * by_x, y * by_y)
                for s in found["series"].values()
                for arm, x, y in zip(s["arms"], s["x"], s["y"])
            }
            axes.step(*zip(*(places[arm] for arm in found["front"])), where="post", color=plots.MUTED,
                      linewidth=5, alpha=0.3, label="not beaten on both axes")  # fmt: skip
        for name, series in found["series"].items():
            colour, _, line = plots.model_style(name, names)
            marker = "osD^vP*"[names.index(name) % 7]
            x, y = (np.asarray(series[key], float) * by for key, by in (("x", by_x), ("y", by_y)))
            if not len(x):
                continue
            spread = [0 if sd is None else sd * by_y for sd in series["y_sd"]]
            joined = "none" if series["fit"] or len(x) == 1 else line
            axes.errorbar(x, y, spread, label=name, color=colour, marker=marker, linestyle=joined, capsize=3,
                          markeredgecolor=plots.INK, ecolor=plots.MUTED)  # fmt: skip
            if series["fit"]:
                fit = series["fit"]
                grid = np.geomspace(x.min(), x.max(), 100)
                rise = 1 + np.exp(-fit["slope"] * (np.log10(grid / by_x) - fit["middle"]))
                axes.plot(
                    grid, by_y * (fit["low"] + (fit["top"] - fit["low"]) / rise), color=colour, linestyle=line
                )
            if len(names) > 4 or len(x) == 1:
                axes.annotate(
                    plots.shorten(name), (x[-1], y[-1]), textcoords="offset points", xytext=(6, 4), fontsize=8
                )
        if found["log_x"]:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plots.si(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x_about.label)
        axes.set_ylabel(y_about.label)
        if 1 < len(names) <= 4:
            axes.legend(frameon=False)
    return plots.to_svg(figure, found["title"])
