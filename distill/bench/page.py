"""What a grid found, for people: the claims as text, and `bench.html`, one self-contained page.

    print(claims_text(results)); build_bench_page(results, Path("bench.html"), "zh")
    svg = forest("Distillation", claims); svg = curve(results["curves"][0])     # effects; a metric against another

It reads results.json's content, and the bench file's sentences in another language: those of `zh/NAME.yaml` beside
NAME.yaml, where somebody wrote one. Figures are inline SVG in the style of the other pages, readable
in black and white and at phone width; there is no script.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from distill.bench.judge import falsified_by
from distill.bench.metrics import metric, unit_words
from distill.report import drawing, pages
from distill.report.pages import called, lookup, mark, page_environment, say, speaking, spoken
from distill.storage import find_file, parse_yaml, write_atomic

MARKS = {
    "SUPPORTED": "✓",
    "NOT SUPPORTED": "✗",
    "EQUIVALENT": "=",
    "INCONCLUSIVE": "?",
    "NOT COMPARABLE": "–",
}
COLOURS = {
    "SUPPORTED": "better",
    "NOT SUPPORTED": "worse",
    "INCONCLUSIVE": "inconclusive",
}  # of the style sheet


def amount(value: float | None, unit: str, sign: bool = False) -> str:
    """A number in its unit: shares as points of a per cent, small and large ones with a prefix."""
    if value is None:
        return pages.DASH
    plus = "+" if sign else ""
    if unit == "%":
        return f"{100 * value:{plus}.{_digits(100 * value)}f}"
    if unit == "nats/token":
        return f"{value:{plus}.3f}"
    if abs(value) >= 10_000:
        return ("+" if sign and value > 0 else "") + pages.si(value)
    return f"{value:{plus}.{_digits(value)}f}"


def _digits(value: float) -> int:
    size = abs(value)
    return 1 if size >= 1 or size == 0 else 2 if size >= 0.1 else 3 if size >= 0.01 else 4


def shown_effect(claim: dict[str, Any]) -> str:
    """`+68.8 [61.2, 76.4] points`, or the mean alone where there is one seed."""
    effect, unit = claim["effect"], claim["unit"]
    words = unit_words(unit, claim["relative"])
    text = amount(effect["mean"], unit, sign=True)
    if effect["ci95"] is not None:
        low, high = (amount(bound, unit) for bound in effect["ci95"])
        text += f" [{low}, {high}]"
    return f"{text} {words}".rstrip().replace("-", "−")


def shown_size(value: float | None, claim: dict[str, Any]) -> str:
    """A size in the unit of a claim's effect: `3.1 points`."""
    unit = claim["unit"]
    return f"{amount(value, unit)} {unit_words(unit, bool(claim.get('relative')))}".rstrip()


_LIMITS = {
    "en": {
        "dose": "{share:.0%} spoilt: {verdict} ({effect})",
        "doses": "The judge is tested too. Some answers were spoilt on purpose. The claim that this costs accuracy "
        "gets these verdicts: {judged}. {limit} An effect of {size} is found four times in five.",
        "seen": "So {share:.0%} of spoilt answers are noticed.",
        "unseen": "So no share of spoilt answers is noticed.",
        "nulls": "Of {n} comparisons where nothing differs, {called} were called different. At 5 % the number expected "
        "is {due:g} (95 % interval of the rate: {low:.0f} to {high:.0f} %).",
    },
    "zh": {
        "dose": "改坏 {share:.0%}，{verdict}（{effect}）",
        "doses": "判定方法本身也受检验。故意改坏一部分答案，“这会降低正确率”这一说法的判定是：{judged}。"
        "{limit}{size}的效应，五次里能发现四次。",
        "seen": "也就是说，改坏 {share:.0%} 就能察觉。",
        "unseen": "也就是说，改坏多少都没有察觉。",
        "nulls": "在 {n} 次本来没有差别的比较中，有 {called} 次被判为有差别；按 5 % 的水平应有 {due:g} 次"
        "（比率的 95 % 区间：{low:.0f} 到 {high:.0f} %）。",
    },
}


def limit_text(controls: dict[str, Any] | None, language: str = "en") -> str:
    """What the planted claims say of the judge, in sentences; empty where there were none."""
    if not controls:
        return ""
    size, words, found = {"unit": controls["unit"], "relative": False}, _LIMITS[language], []

    def points(text: str) -> str:
        return text if language == "en" else text.replace(" points", " 个百分点")  # README's, made in English

    if controls["doses"]:
        shown = [(d["dose"], d["verdict"], points(shown_effect({**d, **size}))) for d in controls["doses"]]
        limit = controls["limit"]
        found.append(
            words["doses"].format(
                judged=(", " if language == "en" else "；").join(
                    words["dose"].format(share=share, verdict=verdict_words(verdict, language), effect=effect)
                    for share, verdict, effect in shown
                ),
                limit=words["seen"].format(share=limit["dose"]) if limit["dose"] else words["unseen"],
                size=points(shown_size(limit["effect"], size)),
            )
        )
    if controls["nulls"]:
        low, high = (100 * bound for bound in controls["called_ci95"])
        n = len(controls["nulls"])
        counts = {"n": n, "called": controls["called"], "due": n / 20, "low": low, "high": high}
        found.append(words["nulls"].format(**counts))
    return (" " if language == "en" else "").join(found)


def fact_text(fact: dict[str, Any]) -> str:
    """A fact's number: the mean, and the range of the seeds where they differ."""
    text = amount(fact["mean"], fact["unit"], sign=True)
    if fact["range"] and (low := amount(fact["range"][0], fact["unit"], True)) != (
        high := amount(fact["range"][1], fact["unit"], True)
    ):
        text += say(" (%(low)s to %(high)s)", low=low, high=high)
    return f"{text} {unit_words(fact['unit'], fact['relative'])}".rstrip().replace("-", "−")


def claims_text(results: dict[str, Any]) -> str:
    """The claims table in plain text, one claim a line, with what it rests on."""
    lines, group = [], None
    for claim in results["claims"]:
        if claim["group"] != group:
            group = claim["group"]
            lines += ["", group] if group else [""]
        lines.append(
            f"  {claim['verdict']:14} {claim['id']:24} {shown_effect(claim)}  ({claim['hypothesis']})"
        )
        lines += [f"{'':17}not comparable: {why}" for why in claim["unequal"]]
        if claim["verdict"] == "INCONCLUSIVE" and claim.get("detectable") is not None:
            lines.append(f"{'':17}could have decided {shown_size(claim['detectable'], claim)}")
    if results.get("facts"):
        lines += ["", "Facts"]
    for fact in results.get("facts", ()):
        lines.append(f"  {'':14} {fact['id']:24} {fact_text(fact)}  ({fact['statement']})")
    if limit := limit_text(results.get("controls")):
        lines += ["", limit]
    count = {v: sum(c["verdict"] == v for c in results["claims"]) for v in MARKS}
    seconds = results["seconds"]
    return "\n".join(
        [
            *lines,
            "",
            f"{', '.join(f'{n} {v}' for v, n in count.items() if n)}; {results['seeds']} seeds, "
            f"{results['tasks']} tasks, {seconds['wall'] / 60:.0f} min on the wall ({results['jobs']} at a time), "
            f"{results['device']}",
        ]
    ).lstrip("\n")


def build_bench_page(results: dict[str, Any], path: Path, language: str = "en") -> None:
    """Write the page in a language of `distill.report.pages`."""
    with speaking(language):
        write_atomic(path, _page(results))


def _page(results: dict[str, Any]) -> str:
    own = _own_words(results)
    groups: dict[str, list] = {}
    for claim in results["claims"]:
        groups.setdefault(claim["group"], []).append(_shown_claim(claim, own))
    figures = {group: Markup(forest(own(group), claims, own)) for group, claims in groups.items()}
    curves = [
        (c, Markup(curve(c, own))) for c in results["curves"] if any(s["x"] for s in c["series"].values())
    ]
    environment = page_environment()
    environment.filters |= {"own": own, "verdict_words": verdict_words, "budget_words": _budget_words}
    return environment.get_template("bench.html.j2").render(
        results=results,
        colours=COLOURS,
        groups=groups,
        figures=figures,
        curves=curves,
        arms=_arms(results),
        limit=limit_text(results.get("controls"), spoken()),
        facts=[{**fact, "shown": fact_text(fact)} for fact in results.get("facts", ())],
        sizes={c["id"]: shown_size(c["detectable"], c) for c in results["claims"] if c.get("detectable")},
        counts={v: sum(c["verdict"] == v for c in results["claims"]) for v in MARKS},
    )


def _own_words(results: dict[str, Any]) -> Callable[[str], str]:
    """The sentences and names of a bench file in the language of the page: `zh/NAME.yaml` beside NAME.yaml."""
    file = find_file(results.get("bench", ""))
    if spoken() == "en":
        return str
    table = _sentences(file.parent / spoken() / file.name)

    def own(text: str) -> str:
        name, at, setting = text.partition("@")  # an arm with another number of experts: teacher@k4
        return table[text] if text in table else called(name) + at + setting

    return own


@cache
def _sentences(path: Path) -> dict[str, str]:
    return parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}


def verdict_words(verdict: str, language: str | None = None) -> str:
    """A verdict as a reader calls it, beside its name in files, in the language of the page or in `language`."""
    if (language or spoken()) == "en":
        return verdict
    with speaking(language or spoken()):
        return f"{called(verdict)} {verdict}"


_BUDGETS = (mark("small"), mark("full"))
_SAME = (mark("prompts"), mark("steps"), mark("rows"), mark("tokens"), mark("flops"))


def _budget_words(name: str) -> str:
    return lookup(name) if name in _BUDGETS else name


def _shown_claim(claim: dict[str, Any], own: Callable[[str], str]) -> dict[str, Any]:
    """A claim with what the page says of it in words."""
    n, corrected = claim["effect"]["n"], claim["p_value_holm"]
    basis = say("%(metric)s; n = %(n)s seeds", metric=metric(claim["metric"]).words, n=n)
    if corrected is not None:
        basis += say(", corrected p %(p)s", p=pages.p_value(corrected))
    if claim["alone"] != claim["verdict"]:
        basis += say("; alone it would be %(verdict)s", verdict=verdict_words(claim["alone"]))
    shown = {
        **claim,
        "shown": shown_effect(claim),
        "mark": MARKS[claim["verdict"]],
        "means": [
            (own(term.partition("@")[0]), amount(mean, metric(term.partition("@")[2]).unit))
            for term, mean in claim["means"].items()
        ],
        "basis": say("(%(basis)s)", basis=basis),
        "equal": [lookup(what) if what in _SAME else what for what in claim["equal"]],
    }
    if "falsified" not in claim:  # results of the first registration
        return shown
    rest = claim["family"].partition(": ")[2]
    kept = ("expect", "margin", "trivial", "unit", "relative")
    return shown | {
        "family_words": say("exploratory: %(group)s", group=own(rest)) if rest else say("headline"),
        "falsified_by": falsified_by(**{key: claim[key] for key in kept}),
        "fixed": [_fixed(name, own) for name in claim.get("fixed") or ()],
    }


def _fixed(name: str, own: Callable[[str], str]) -> str:
    arm = name.removeprefix("the one run of ")
    return name if arm == name else say("the one run of %(arm)s", arm=own(arm))


def _arms(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per arm: what it is, its budget, and accuracy with its spread over seeds."""
    rows = []
    for name, arm in results["arms"].items():
        cells = []
        for key in ("accuracy.easy", "accuracy.medium", "accuracy.hard"):
            found = arm["metrics"].get(key)
            if isinstance(found, list):  # as results are committed: mean and sd alone
                found = dict(zip(("mean", "sd"), found))
            sd = f" ± {100 * found['sd']:.1f}" if found and found["sd"] is not None else ""
            cells.append(f"{100 * found['mean']:.1f}{sd}" if found else pages.DASH)
        rows.append({"name": name, "about": arm["about"], "cells": cells, "budget": arm["budget"]})
    return rows


WIDTH, MIN_WIDTH = 5.0, 320  # inches, pixels: what fits a phone without being smaller than it is readable
_FACES = {
    "SUPPORTED": drawing.ACCENT,
    "NOT SUPPORTED": "#d55e00",
    "EQUIVALENT": "#56b4e9",
    "INCONCLUSIVE": drawing.CARD,
    "NOT COMPARABLE": drawing.CARD,
}
_SHAPES = {
    "SUPPORTED": "o",
    "NOT SUPPORTED": "X",
    "EQUIVALENT": "D",
    "INCONCLUSIVE": "o",
    "NOT COMPARABLE": "s",
}


def forest(title: str, claims: list[dict[str, Any]], own: Callable[[str], str] = str) -> str:
    """One line per claim: the effect over its interval's half width, so that different units share an axis.

    Where 1 is the half width of the 95 % interval, an interval that leaves out 0 is one beyond -1 and 1. Claims of
    one unit are drawn in it instead.
    """
    with matplotlib.rc_context(drawing.RC):
        units = {(c["unit"], c["relative"]) for c in claims}
        scale = 100 if {unit for unit, _ in units} == {"%"} else 1
        figure = drawing.new_figure(WIDTH, 0.7 + 0.38 * len(claims))
        axes = figure.add_subplot()
        drawing.plain_axes(axes, "x")
        axes.axvline(0, color=drawing.MUTED, linewidth=1)
        for row, claim in enumerate(claims):
            effect, verdict = claim["effect"], claim["verdict"]
            unit = scale if len(units) == 1 else _own_scale(effect)
            if effect["mean"] is None:
                continue
            if effect["ci95"] is not None:
                low, high = (bound * unit for bound in effect["ci95"])
                axes.plot([low, high], [row, row], color=drawing.INK, linewidth=1.6, solid_capstyle="butt")
            look = {
                "color": _FACES.get(verdict, drawing.CARD),
                "markeredgecolor": drawing.INK,
                "markersize": 8,
            }
            axes.plot(effect["mean"] * unit, row, _SHAPES.get(verdict, "o"), **look)
            if claim["margin"]:
                for side in {"within": (-1, 1), "greater": (1,), "less": (-1,)}[claim["expect"]]:
                    axes.plot(side * claim["margin"] * unit, row, "|", color=drawing.INK, markersize=14)
        axes.set_yticks(range(len(claims)), [drawing.shorten(own(c["id"]), 26) for c in claims])
        axes.set_ylim(len(claims) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))  # more labels of small numbers run into each other
        axes.set_xlabel(_effect_label(units))
    label = say("%(title)s: effects with 95 %% intervals", title=title)
    return drawing.to_svg(figure, label, MIN_WIDTH)


def _effect_label(units: set[tuple[str, bool]]) -> str:
    if len(units) > 1:
        return say("effect, in half widths of its 95 %% interval")
    unit, relative = next(iter(units))
    if relative:
        return say("effect, %% of the reference")
    if unit == "%":
        return say("effect, percentage points")
    return say("effect, %(unit)s", unit=unit_words(unit, relative)) if unit else say("effect")


def _own_scale(effect: dict[str, Any]) -> float:
    low, high = effect["ci95"] or (0.0, 0.0)
    half = (high - low) / 2
    return 1 / half if half else 1.0


def curve(found: dict[str, Any], own: Callable[[str], str] = str) -> str:
    """One metric against another: a line (or points) per series, one sd over seeds as bars, fits dashed."""
    x_about, y_about = metric(found["x"]), metric(found["y"])
    by_x, by_y = (100 if about.unit == "%" else 1 for about in (x_about, y_about))
    with matplotlib.rc_context(drawing.RC):
        figure = drawing.new_figure(WIDTH, 3.4)
        axes = figure.add_subplot()
        drawing.plain_axes(axes, "both")
        names = list(found["series"])
        if found.get("front"):
            places = {
                arm: (x * by_x, y * by_y)
                for s in found["series"].values()
                for arm, x, y in zip(s["arms"], s["x"], s["y"])
            }
            axes.step(*zip(*(places[arm] for arm in found["front"])), where="post", color=drawing.MUTED,
                      linewidth=5, alpha=0.3, label=say("not beaten on both axes"))  # fmt: skip
        for name, series in found["series"].items():
            colour, _, line = drawing.model_style(name, names)
            marker = "osD^vP*"[names.index(name) % 7]
            x, y = (np.asarray(series[key], float) * by for key, by in (("x", by_x), ("y", by_y)))
            if not len(x):
                continue
            spread = [0 if sd is None else sd * by_y for sd in series["y_sd"]]
            joined = "none" if series["fit"] or len(x) == 1 else line
            axes.errorbar(x, y, spread, label=own(name), color=colour, marker=marker, linestyle=joined, capsize=3,
                          markeredgecolor=drawing.INK, ecolor=drawing.MUTED)  # fmt: skip
            if series["fit"]:
                fit = series["fit"]
                grid = np.geomspace(x.min(), x.max(), 100)
                rise = 1 + np.exp(-fit["slope"] * (np.log10(grid / by_x) - fit["middle"]))
                axes.plot(
                    grid, by_y * (fit["low"] + (fit["top"] - fit["low"]) / rise), color=colour, linestyle=line
                )
            if len(names) > 4 or len(x) == 1:
                axes.annotate(
                    drawing.shorten(own(name)),
                    (x[-1], y[-1]),
                    textcoords="offset points",
                    xytext=(6, 4),
                    fontsize=8,
                )
        if found["log_x"]:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            narrow = high < 10 * low  # there a log locator's labels run into each other
            axes.xaxis.set_major_locator(MaxNLocator(4) if narrow else LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: pages.si(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x_about.label)
        axes.set_ylabel(y_about.label)
        if 1 < len(names) <= 4:
            axes.legend(frameon=False)
    return drawing.to_svg(figure, own(found["title"]), MIN_WIDTH)
