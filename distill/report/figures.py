"""Figures of report and dossier, one inline SVG string each.

    svg = accuracy_panel("hard", {"student": {"accuracy": 0.82, "ci95": [0.78, 0.86], "n": 300}})
    svg = reliability("tokens", {"student": {"ece": 0.03, "brier": 0.2, "bins": [...]}}, order=["student"])

Every figure is readable in black and white: models differ in marker and line style, cells of a heat map carry
their number where there is room, axes their unit. Where there is none, the page has the numbers in a table.

Shapes: E experts, G groups of tokens, L layers.
"""

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from distill.report.drawing import (
    CARD,
    CELLS_AS_VECTORS,
    CELLS_WITH_TEXT,
    INK,
    MUTED,
    NAME_WIDTH,
    RC,
    SMALL_CELLS,
    layer_labels,
    model_style,
    new_figure,
    plain_axes,
    shorten,
    to_svg,
)
from distill.report.numbers import absent, percent, share, si

MARKERS = "osD^vPX*"
VERDICT_MARKERS = {"BETTER": "^", "WORSE": "v"}
DARK, LIGHT = "#101418", "#ffffff"  # text on a cell, whatever the page's colours are


def _style(name: str, order: list[str]) -> dict:
    """Marker, line and colour of a model: the same in every figure of the page."""
    fill, _, dashes = model_style(name, order)
    look = {"marker": MARKERS[order.index(name) % len(MARKERS)], "markersize": 7, "color": fill}
    return look | {"markeredgecolor": INK, "markeredgewidth": 0.8, "linestyle": dashes}


def _title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold")


def _whiskers(axes, score: dict, y: float) -> None:
    low, high = (100 * bound for bound in score["ci95"])
    axes.plot([low, high], [y, y], color=INK, linewidth=1.2, zorder=2, solid_capstyle="butt")


def family_panel(task: str, families: dict[str, dict[str, dict]], order: list[str]) -> str:
    """Accuracy of each model in each family of one task, with 95 % intervals: one row of dots a family.

    `families[family][model]` is a score as of metrics.json.
    """
    drawn = [name for name in order if any(name in scores for scores in families.values())]
    step = 1 / (len(drawn) + 1)
    with matplotlib.rc_context(RC):
        figure = new_figure(4.6, 0.95 + (0.16 * len(drawn) + 0.14) * len(families) + 0.19 * len(drawn))
        axes = figure.add_subplot()
        plain_axes(axes, "x")
        for row, scores in enumerate(families.values()):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color=MUTED, alpha=0.08, linewidth=0)
            for place, name in enumerate(drawn):
                if name in scores:
                    y = row - 0.5 + (place + 1) * step
                    _whiskers(axes, scores[name], y)
                    look = _style(name, order) | {
                        "linestyle": "none",
                        "label": None if row else shorten(name, 36),
                    }
                    axes.plot([100 * scores[name]["accuracy"]], [y], **look, zorder=3, clip_on=False)
        for name in (n for n in drawn if n not in next(iter(families.values()))):
            axes.plot([], [], **(_style(name, order) | {"linestyle": "none", "label": shorten(name, 36)}))
        axes.set_yticks(range(len(families)), [shorten(name, 20) for name in families], color=INK)
        axes.set_ylim(len(families) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        _title(axes, f"{shorten(task, 28)}: accuracy")
        figure.legend(loc="outside lower left", frameon=False, labelcolor=INK, handletextpad=0.3)
        return to_svg(figure, f"Accuracy per family on {task} of {', '.join(drawn)}")


def verdict_panel(task: str, pairs: list[dict]) -> str:
    """Differences in accuracy of one task, a row a pair: dot, 95 % interval and verdict; the line is no difference."""
    with matplotlib.rc_context(RC):
        figure = new_figure(4.9, 0.95 + 0.5 * len(pairs))
        axes = figure.add_subplot()
        plain_axes(axes, "x")
        axes.axvline(0, color=INK, linewidth=1.2)
        for row, pair in enumerate(pairs):
            _whiskers(axes, pair, row)
            marker = VERDICT_MARKERS.get(pair["verdict"], "o")
            fill = INK if pair["verdict"] in VERDICT_MARKERS else CARD
            look = {"marker": marker, "markersize": 8, "color": fill, "markeredgecolor": INK, "zorder": 3}
            axes.plot([100 * pair["difference"]], [row], **look)
            words = pair["verdict"].lower()
            axes.text(1.02, row, words, transform=axes.get_yaxis_transform(), va="center", fontsize=10.5)
        names = [f"{shorten(pair['b'], 20)}\nagainst {shorten(pair['a'], 20)}" for pair in pairs]
        axes.set_yticks(range(len(pairs)), names, color=INK)
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_xlabel("difference in accuracy, percentage points")
        _title(axes, shorten(task, 40))
        return to_svg(figure, f"Differences in accuracy on {task} with 95 % intervals")


def heat_map(
    title: str,
    rows: list[str],
    cells: np.ndarray,
    *,
    mark: float,
    words: str,
    unit: str,
    what: str,
    top: float = 0.0,
    alone: bool = False,
) -> str:
    """[R, C] numbers as cells, columns being experts; NaN stays empty. The bar carries a line at `mark`.

    The scale reaches to `top` at least, so that figures can share one. `words` say what the mark is, `unit` what
    the numbers are in, `what` the rows (for a screen reader too). `alone` gives many experts the whole width.
    """
    low, high = float(np.nanmin(cells)), float(np.nanmax(cells))
    low, high = min(low, mark, 0.0), max(high, mark, top)
    high = high if high > low else low + 1.0
    columns = cells.shape[1]
    small, wide = columns <= SMALL_CELLS, alone and columns > SMALL_CELLS
    with matplotlib.rc_context(RC):
        tall = max(0.05, min(0.32, (6.4 if wide else 3.9) / len(rows)))
        figure = new_figure(7.2 if wide else 4.9, 1.5 + tall * len(rows))
        axes = figure.add_subplot()
        edge = {"edgecolors": "white", "linewidth": 0.8} if columns <= 2 * CELLS_WITH_TEXT else {}
        mesh = axes.pcolormesh(cells, cmap="YlGnBu", vmin=low, vmax=high, **edge)
        mesh.set_rasterized(cells.size > CELLS_AS_VECTORS)
        if columns <= CELLS_WITH_TEXT and len(rows) <= 24:
            for (row, column), value in np.ndenumerate(cells):
                if np.isfinite(value):
                    shade = LIGHT if value > low + 0.6 * (high - low) else DARK
                    digits = 1 if small and abs(value) < 99.95 else 0
                    text = f"{round(value, digits) + 0.0:.{digits}f}"  # adding 0.0 turns -0.0 into 0.0
                    place = {"ha": "center", "va": "center", "fontsize": 8.5 if small or wide else 7}
                    axes.text(column + 0.5, row + 0.5, text.replace("-", "−"), color=shade, **place)
        step = max(1, columns // 16)
        axes.set_xticks(np.arange(0, columns, step) + 0.5, np.arange(0, columns, step))
        step = max(1, len(rows) // 16)
        axes.set_yticks(
            np.arange(0, len(rows), step) + 0.5, [shorten(r, 22) for r in rows[::step]], color=INK
        )
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("expert")
        _title(axes, title)
        fraction = min(0.4, 0.13 / (tall * len(rows)))  # the same bar under few rows and many
        bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", fraction=fraction, aspect=45, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.axvline(mark, color=DARK, linewidth=2.5)
        _bar_ticks(bar, low, mark, high, f"{words}: {mark:.3g} {unit}".replace("-", "−"))
        return to_svg(
            figure, f"{title}: {what} by expert, in {unit}; {words} is {mark:.3g}", 620 if wide else 300
        )


def _bar_ticks(bar, low: float, mark: float, high: float, words: str) -> None:
    """The two ends, and the mark with its words; an end that the words would cover is left out."""
    place = (mark - low) / (high - low)
    ticks, texts = [mark], [words]
    for end, near in ((low, place < 0.3), (high, place > 0.7)):
        if not near:
            ticks.append(end)
            texts.append(f"{end:.3g}".replace("-", "−"))
    bar.set_ticks(ticks, labels=texts)
    bar.ax.tick_params(length=0)
    bar.ax.get_xticklabels()[0].set_horizontalalignment(
        "left" if place < 0.3 else "right" if place > 0.7 else "center"
    )


def compute_panel(task: str, points: list[tuple[str, dict, float]], now: str | None) -> str:
    """Accuracy in % against forward FLOPs per token, an interval each; `now` names the model as it is.

    `points` are (label, score, FLOPs per token); the labels stand beside the dots.
    """
    points = sorted(points, key=lambda point: point[2])
    with matplotlib.rc_context(RC):
        figure = new_figure(4.6, 3.1)
        axes = figure.add_subplot()
        plain_axes(axes, "both")
        x = [flops for _, _, flops in points]
        axes.plot(x, [100 * s["accuracy"] for _, s, _ in points], color=MUTED, linewidth=1.2, zorder=1)
        for label, score, flops in points:
            low, high = (100 * bound for bound in score["ci95"])
            axes.plot([flops, flops], [low, high], color=INK, linewidth=1.2, zorder=2)
            fill = INK if label == now else CARD
            look = {"marker": "o", "markersize": 8, "color": fill, "markeredgecolor": INK, "zorder": 3}
            axes.plot([flops], [100 * score["accuracy"]], **look)
            said = f"k = {label} (as is)" if label == now else f"k = {label}"
            axes.annotate(
                said, (flops, 100 * score["accuracy"]), (7, -14), textcoords="offset points", fontsize=9
            )
        axes.set_ylim(0, 104)
        axes.margins(x=0.16)
        axes.set_ylabel("accuracy, %")
        axes.set_xlabel("forward FLOP per token")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda value, _: si(value))
        _title(axes, shorten(task, 40))
        return to_svg(figure, f"Accuracy on {task} against FLOP per token")


def score_dots(title: str, scores: dict[str, dict], reference: str | None) -> str:
    """Accuracy of variants of one model, a row each; the line is the model as it is (`reference`)."""
    with matplotlib.rc_context(RC):
        figure = new_figure(4.9, 0.95 + 0.34 * len(scores))
        axes = figure.add_subplot()
        plain_axes(axes, "x")
        if reference in scores:
            axes.axvline(100 * scores[reference]["accuracy"], color=INK, linewidth=1.2, linestyle="--")
        for row, (label, score) in enumerate(scores.items()):
            _whiskers(axes, score, row)
            fill = INK if label == reference else CARD
            look = {"marker": "o", "markersize": 8, "color": fill, "markeredgecolor": INK, "zorder": 3}
            axes.plot([100 * score["accuracy"]], [row], **look, clip_on=False)
            text = share(score["accuracy"])
            axes.text(1.04, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        axes.set_yticks(range(len(scores)), [shorten(label, 26) for label in scores], color=INK)
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        _title(axes, f"{shorten(title, 34)}: accuracy")
        return to_svg(figure, f"Accuracy on {title}: {', '.join(scores)}")


def log_dots(title: str, values: dict[str, float], unit: str) -> str:
    """Positive numbers of very different size on a logarithmic axis, a labelled row each; zeros stand at the left."""
    positive = [value for value in values.values() if value > 0]
    with matplotlib.rc_context(RC):
        figure = new_figure(4.6, 0.95 + 0.32 * len(values))
        axes = figure.add_subplot()
        plain_axes(axes, "x")
        floor = min(positive) / 10 if positive else 0.1
        for row, value in enumerate(values.values()):
            axes.plot([max(value, floor)], [row], marker="o", markersize=8, color=INK, clip_on=False)
            said = _three_digits(value)
            axes.text(1.04, row, said, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(floor, 3 * max(positive, default=10 * floor))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.12g}")
        axes.set_yticks(range(len(values)), [shorten(name, 22) for name in values], color=INK)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlabel(unit)
        _title(axes, title)
        return to_svg(
            figure, f"{title}, {unit}: " + ", ".join(f"{k} {_three_digits(v)}" for k, v in values.items())
        )


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def reliability(title: str, found: dict[str, dict], order: list[str]) -> str:
    """Accuracy against confidence per bin, the diagonal being honesty; below, how many predictions each bin holds.

    `found[model]` has `ece`, `brier` and `bins` (low, high, n, confidence, accuracy), as metrics.json.
    """
    with matplotlib.rc_context(RC):
        figure = new_figure(4.6, 4.5 + 0.2 * len(found))
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        plain_axes(axes, "both")
        plain_axes(counts, "y")
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=":")
        for name, values in found.items():
            bins = [b for b in values["bins"] if b["n"] and not absent(b["confidence"])]
            look = _style(name, order)
            said = f"{shorten(name, 22)}: ECE {values['ece']:.3f}, Brier {values['brier']:.3f}"
            x, y = ([100 * b[key] for b in bins] for key in ("confidence", "accuracy"))
            axes.plot(x, y, **look, linewidth=1.6, label=said, clip_on=False)
            edges = [100 * b["low"] for b in values["bins"]] + [100 * values["bins"][-1]["high"]]
            total = sum(b["n"] for b in values["bins"]) or 1
            held = [100 * b["n"] / total for b in values["bins"]]
            counts.stairs(held, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.8)
        axes.set_ylim(0, 102)
        axes.set_ylabel("right, %")
        counts.set_xlim(0, 100)
        counts.set_ylim(0, None)
        counts.set_ylabel("share, %")
        counts.set_xlabel("confidence of the model, %")
        _title(axes, title)
        figure.legend(loc="outside lower left", frameon=False, labelcolor=INK, handlelength=3)
        return to_svg(figure, f"Reliability of {title}: " + ", ".join(found))


def layer_lines(title: str, lines: dict[str, tuple[list[str], list[float]]], unit: str) -> str:
    """A number per layer, a line with markers per variant: `lines[variant]` is (layer labels, values)."""
    order = list(lines)
    labels = max((layers for layers, _ in lines.values()), key=len)
    with matplotlib.rc_context(RC):
        figure = new_figure(4.6, 2.9)
        axes = figure.add_subplot()
        plain_axes(axes, "y")
        for variant, (layers, values) in lines.items():
            axes.plot(
                [labels.index(layer) for layer in layers], values, **_style(variant, order), label=variant
            )
        step = -(-len(labels) // 6)
        axes.set_xticks(range(0, len(labels), step), [shorten(layer, 10) for layer in labels[::step]])
        axes.set_ylim(0, None)
        axes.set_ylabel(unit)
        _title(axes, title)
        figure.legend(loc="outside lower left", frameon=False, labelcolor=INK, handlelength=3, ncols=2)
        return to_svg(figure, f"{title}, {unit} per layer: {', '.join(order)}")


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
