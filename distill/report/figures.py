"""Figures of report and dossier, one inline SVG string each.

    svg = accuracy_panel("hard", {"student": {"accuracy": 0.82, "ci95": [0.78, 0.86], "n": 300}})
    svg = reliability("tokens", {"student": {"ece": 0.03, "brier": 0.2, "bins": [...]}}, order=["student"])

Every figure is readable in black and white: models differ in marker and line style, axes carry their unit. A mark says
its numbers under the pointer, and the page has all of them in a table. Heat maps are in distill/report/drawing.py.
"""

import itertools

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from distill.report.drawing import (
    CARD,
    INK,
    MUTED,
    NAME_WIDTH,
    RC,
    Hover,
    model_style,
    new_figure,
    plain_axes,
    short_name,
    shorten,
    to_svg,
)
from distill.report.pages import absent, called, number, percent, points, say, share, si

MARKERS = "osD^vPX*"
VERDICT_MARKERS = {"BETTER": "^", "WORSE": "v"}
FEW_ANSWERS = 20  # a bin that holds fewer says little: one answer more or less moves it by 5 points
FADED = 0.25


def _style(name: str, order: list[str]) -> dict:
    """Marker, line and colour of a model: the same in every figure of the page."""
    fill, _, dashes = model_style(name, order)
    look = {"marker": MARKERS[order.index(name) % len(MARKERS)], "markersize": 7, "color": fill}
    return look | {"markeredgecolor": INK, "markeredgewidth": 0.8, "linestyle": dashes}


def _listed(names) -> str:
    return ", ".join(map(called, names))


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
        axes, hover = figure.add_subplot(), Hover()
        plain_axes(axes, "x")
        for row, scores in enumerate(families.values()):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color=MUTED, alpha=0.08, linewidth=0)
            for place, name in enumerate(drawn):
                if name in scores:
                    y = row - 0.5 + (place + 1) * step
                    _whiskers(axes, scores[name], y)
                    label = None if row else short_name(name, 36)
                    look = _style(name, order) | {"linestyle": "none", "label": label}
                    gid = hover.says(f"{called(name)}: {percent(scores[name])}, n = {scores[name]['n']:,}")
                    axes.plot([100 * scores[name]["accuracy"]], [y], **look, zorder=3, clip_on=False, gid=gid)
        for name in (n for n in drawn if n not in next(iter(families.values()))):
            axes.plot([], [], **(_style(name, order) | {"linestyle": "none", "label": short_name(name, 36)}))
        axes.set_yticks(range(len(families)), [short_name(name, 20) for name in families], color=INK)
        axes.set_ylim(len(families) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        _title(axes, say("%(task)s: accuracy", task=short_name(task, 28)))
        figure.legend(loc="outside lower left", frameon=False, labelcolor=INK, handletextpad=0.3)
        said = say("Accuracy per family on %(task)s", task=called(task)) + f": {_listed(drawn)}"
        return to_svg(figure, said, hover=hover)


def verdict_panel(task: str, pairs: list[dict]) -> str:
    """Differences in accuracy of one task, a row a pair: dot, 95 % interval and verdict; the line is no difference."""
    with matplotlib.rc_context(RC):
        figure = new_figure(4.9, 0.95 + 0.5 * len(pairs))
        axes, hover = figure.add_subplot(), Hover()
        plain_axes(axes, "x")
        axes.axvline(0, color=INK, linewidth=1.2)
        for row, pair in enumerate(pairs):
            _whiskers(axes, pair, row)
            marker = VERDICT_MARKERS.get(pair["verdict"], "o")
            fill = INK if pair["verdict"] in VERDICT_MARKERS else CARD
            look = {"marker": marker, "markersize": 8, "color": fill, "markeredgecolor": INK, "zorder": 3}
            axes.plot([100 * pair["difference"]], [row], **look, gid=hover.says(points(pair)))
            words = called(pair["verdict"]).lower()
            axes.text(1.02, row, words, transform=axes.get_yaxis_transform(), va="center", fontsize=10.5)
        names = [(short_name(pair["b"], 20), short_name(pair["a"], 20)) for pair in pairs]
        labels = [say("%(one)s\nagainst %(other)s", one=one, other=other) for one, other in names]
        axes.set_yticks(range(len(pairs)), labels, color=INK)
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_xlabel(say("difference in accuracy, percentage points"))
        _title(axes, short_name(task, 40))
        said = say("Differences in accuracy on %(task)s with 95 %% intervals", task=called(task))
        return to_svg(figure, said, hover=hover)


def compute_panel(task: str, points: list[tuple[str, dict, float]], now: str | None) -> str:
    """Accuracy in % against forward FLOPs per token, an interval each; `now` names the model as it is.

    `points` are (label, score, FLOPs per token); the labels stand beside the dots.
    """
    points = sorted(points, key=lambda point: point[2])
    with matplotlib.rc_context(RC):
        figure = new_figure(4.6, 3.1)
        axes, hover = figure.add_subplot(), Hover()
        plain_axes(axes, "both")
        x = [flops for _, _, flops in points]
        axes.plot(x, [100 * s["accuracy"] for _, s, _ in points], color=MUTED, linewidth=1.2, zorder=1)
        for label, score, flops in points:
            low, high = (100 * bound for bound in score["ci95"])
            axes.plot([flops, flops], [low, high], color=INK, linewidth=1.2, zorder=2)
            fill = INK if label == now else CARD
            look = {"marker": "o", "markersize": 8, "color": fill, "markeredgecolor": INK, "zorder": 3}
            gid = hover.says(f"k = {label}: {percent(score)}, {si(flops, 'FLOP')}")
            axes.plot([flops], [100 * score["accuracy"]], **look, gid=gid)
            said = say("k = %(k)s (as it is)", k=label) if label == now else f"k = {label}"
            axes.annotate(
                said, (flops, 100 * score["accuracy"]), (7, -14), textcoords="offset points", fontsize=9
            )
        axes.set_ylim(0, 104)
        axes.margins(x=0.16)
        axes.set_ylabel(say("accuracy, %%"))
        axes.set_xlabel(say("operations per token (FLOP)"))
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda value, _: si(value))
        _title(axes, short_name(task, 40))
        said = say("Accuracy on %(task)s against operations per token", task=called(task))
        return to_svg(figure, said, hover=hover)


def score_dots(title: str, scores: dict[str, dict], reference: str | None) -> str:
    """Accuracy of variants of one model, a row each; the line is the model as it is (`reference`)."""
    with matplotlib.rc_context(RC):
        figure = new_figure(4.9, 0.95 + 0.34 * len(scores))
        axes, hover = figure.add_subplot(), Hover()
        plain_axes(axes, "x")
        if reference in scores:
            axes.axvline(100 * scores[reference]["accuracy"], color=INK, linewidth=1.2, linestyle="--")
        for row, (label, score) in enumerate(scores.items()):
            _whiskers(axes, score, row)
            fill = INK if label == reference else CARD
            look = {"marker": "o", "markersize": 8, "color": fill, "markeredgecolor": INK, "zorder": 3}
            gid = hover.says(f"{label}: {percent(score)}, n = {score['n']:,}")
            axes.plot([100 * score["accuracy"]], [row], **look, clip_on=False, gid=gid)
            text = share(score["accuracy"])
            axes.text(1.04, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        axes.set_yticks(range(len(scores)), [shorten(label, 26) for label in scores], color=INK)
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        _title(axes, say("%(task)s: accuracy", task=short_name(title, 34)))
        said = say("Accuracy on %(task)s", task=called(title)) + f": {', '.join(scores)}"
        return to_svg(figure, said, hover=hover)


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

    `found[model]` has `ece`, `brier` and `bins` (low, high, n, confidence, accuracy), as metrics.json. Bins of fewer
    than FEW_ANSWERS predictions are faded, and so is the line to them.
    """
    with matplotlib.rc_context(RC):
        figure = new_figure(4.6, 4.5 + 0.2 * len(found))
        (axes, counts), hover = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1]), Hover()
        plain_axes(axes, "both")
        plain_axes(counts, "y")
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=":")
        for name, values in found.items():
            bins = [b for b in values["bins"] if b["n"] and not absent(b["confidence"])]
            look = _style(name, order)
            for one, two in itertools.pairwise(bins):
                faint = FADED if min(one["n"], two["n"]) < FEW_ANSWERS else 1
                x, y = ([100 * b[key] for b in (one, two)] for key in ("confidence", "accuracy"))
                line = {key: look[key] for key in ("color", "linestyle")}
                axes.plot(x, y, **line, linewidth=1.6, alpha=faint, clip_on=False)
            for b in bins:
                said = say("%(model)s: certain to %(sure)s, right in %(right)s, n = %(n)s", model=called(name),
                           sure=share(b["confidence"]), right=share(b["accuracy"]), n=number(b["n"]))  # fmt: skip
                mark = look | {"linestyle": "none", "alpha": FADED if b["n"] < FEW_ANSWERS else 1}
                place = [100 * b["confidence"]], [100 * b["accuracy"]]
                axes.plot(*place, **mark, clip_on=False, gid=hover.says(said))
            said = f"{short_name(name, 22)}: ECE {values['ece']:.3f}, Brier {values['brier']:.3f}"
            axes.plot([], [], **look, linewidth=1.6, label=said)
            edges = [100 * b["low"] for b in values["bins"]] + [100 * values["bins"][-1]["high"]]
            total = sum(b["n"] for b in values["bins"]) or 1
            held = [100 * b["n"] / total for b in values["bins"]]
            counts.stairs(held, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.8)
        axes.set_ylim(0, 102)
        axes.set_ylabel(say("right, %%"))
        counts.set_xlim(0, 100)
        counts.set_ylim(0, None)
        counts.set_ylabel(say("share, %%"))
        counts.set_xlabel(say("certainty of the model, %%"))
        _title(axes, title)
        figure.legend(loc="outside lower left", frameon=False, labelcolor=INK, handlelength=3)
        return to_svg(figure, say("Reliability of %(what)s", what=title) + f": {_listed(found)}", hover=hover)


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
        said = say("%(title)s, %(unit)s per layer", title=title, unit=unit) + f": {', '.join(order)}"
        return to_svg(figure, said)


def accuracy_panel(task: str, scores: dict[str, dict], order: list[str] | None = None) -> str:
    """Horizontal bars of one task, a model each, with the 95 % interval as error bar.

    `scores[model]` has `accuracy` (0 to 1), `ci95` ([low, high], 0 to 1) and `n`. `order` is the list of
    all models of the page, which keeps a model's colour the same in every panel.
    """
    names = list(scores)
    order = order or names
    with matplotlib.rc_context(RC):
        labels, hover = [short_name(name, 2 * NAME_WIDTH) for name in names], Hover()
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
                gid=hover.says(f"{called(name)}: {percent(score)}, n = {score['n']:,}"),
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
        span = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]}–{counts[-1]}"
        figure.suptitle(f"{short_name(task, 30)} ({span})", x=0.01, ha="left", fontsize=11, fontweight="bold")
        each = ", ".join(f"{called(name)} {share(scores[name]['accuracy'], 0)}" for name in names)
        said = say("Accuracy on %(task)s", task=called(task))
        return to_svg(figure, f"{said}: {each}", hover=hover)


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
            axes.plot(steps, smoothed, color=fill, linewidth=2.2, linestyle=dashes, label=short_name(name))
            drawn.append(smoothed)
        finite = np.concatenate(drawn)
        finite = finite[np.isfinite(finite)]
        if len(finite):
            # The smoothed lines set the scale, so that one bad step cannot flatten everything else.
            axes.set_ylim(min(0.0, finite.min()), 1.15 * finite.max() or 1.0)
        axes.set_xlabel(say("optimizer step"))
        _title(axes, say("%(title)s, nats per token", title=title))
        axes.legend(frameon=False, handlelength=3, labelcolor=INK)
        said = say("%(title)s against optimizer step", title=title)
        return to_svg(figure, f"{said}: {_listed(curves)}")
