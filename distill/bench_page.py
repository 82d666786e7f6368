"""What a grid found, for people: the claims as text, and `bench.html`, one self-contained page.

    print(claims_text(results)); build_page(results, Path("bench.html"))

It reads results.json's content and nothing else. Figures are inline SVG in the style of the other pages, readable
in black and white and at phone width; there is no script.
"""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from distill import bench_plots, plots
from distill.bench_metrics import metric
from distill.pages import page_environment
from distill.shards import write_atomic

MARKS = {"SUPPORTED": "✓", "NOT SUPPORTED": "✗", "INCONCLUSIVE": "?", "NOT COMPARABLE": "–"}


def amount(value: float | None, unit: str, sign: bool = False) -> str:
    """A number in its unit: shares as points of a per cent, small and large ones with a prefix."""
    if value is None:
        return plots.DASH
    plus = "+" if sign else ""
    if unit == "%":
        return f"{100 * value:{plus}.{_digits(100 * value)}f}"
    if unit == "nats/token":
        return f"{value:{plus}.3f}"
    if abs(value) >= 10_000:
        return ("+" if sign and value > 0 else "") + plots.si(value)
    return f"{value:{plus}.{_digits(value)}f}"


def _digits(value: float) -> int:
    size = abs(value)
    return 1 if size >= 1 or size == 0 else 2 if size >= 0.1 else 3 if size >= 0.01 else 4


def shown_effect(claim: dict[str, Any]) -> str:
    """`+68.8 [61.2, 76.4] points`, or the mean alone where there is one seed."""
    effect, unit = claim["effect"], claim["unit"]
    words = {"%": "%" if claim["relative"] else "points"}.get(unit, unit)
    text = amount(effect["mean"], unit, sign=True)
    if effect["ci95"] is not None:
        low, high = (amount(bound, unit) for bound in effect["ci95"])
        text += f" [{low}, {high}]"
    return f"{text} {words}".rstrip().replace("-", "−")


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


def build_page(results: dict[str, Any], path: Path) -> None:
    """Write the page."""
    groups: dict[str, list] = {}
    for claim in results["claims"]:
        shown = {**claim, "shown": shown_effect(claim), "mark": MARKS[claim["verdict"]]}
        shown["means"] = [
            (term.partition("@")[0], amount(mean, metric(term.partition("@")[2]).unit))
            for term, mean in claim["means"].items()
        ]
        shown["words"] = metric(claim["metric"]).words
        groups.setdefault(claim["group"], []).append(shown)
    figures = {group: Markup(bench_plots.forest(group, claims)) for group, claims in groups.items()}
    curves = [
        (c, Markup(bench_plots.curve(c)))
        for c in results["curves"]
        if any(s["x"] for s in c["series"].values())
    ]
    page = (
        page_environment()
        .get_template("bench.html.j2")
        .render(
            results=results,
            groups=groups,
            figures=figures,
            curves=curves,
            arms=_arms(results),
            counts={v: sum(c["verdict"] == v for c in results["claims"]) for v in MARKS},
        )
    )
    write_atomic(path, page)


def _arms(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per arm: what it is, its budget, and accuracy with its spread over seeds."""
    rows = []
    for name, arm in results["arms"].items():
        cells = []
        for key in ("accuracy.easy", "accuracy.medium", "accuracy.hard"):
            found = arm["metrics"].get(key)
            sd = f" ± {100 * found['sd']:.1f}" if found and found["sd"] is not None else ""
            cells.append(f"{100 * found['mean']:.1f}{sd}" if found else plots.DASH)
        rows.append({"name": name, "about": arm["about"], "cells": cells, "budget": arm["budget"]})
    return rows
