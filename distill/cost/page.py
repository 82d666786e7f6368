"""The break-even as text and as one page: `break_even.html` with two figures, and `break_even.json` beside it.

    distill cost RUN_DIR --break-even --out DIR [--lang zh]

Regions differ in grey, hatch and label, lines in dashes, so that a black-and-white print loses nothing.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup

from distill.console import text_table
from distill.cost.break_even import SAID, STRATEGIES, UNITS, Costs, segments, strategy_lines
from distill.errors import UserError
from distill.report.drawing import INK, MUTED, RC, new_figure, plain_axes, to_svg
from distill.report.pages import lookup, mark, page_environment, retold, say, si, speaking
from distill.storage import json_text, write_atomic, write_json

_STRATEGY_WORDS = {
    "teacher": mark("keep calling the teacher"),
    "distil": mark("distil"),
    "direct": mark("train directly"),
}
_INPUTS = {
    "teacher_query": mark("teacher query"),
    "student_query": mark("student query"),
    "teacher_outputs": mark("teacher outputs"),
    "distil_student": mark("distil student"),
    "direct_student": mark("direct student"),
    "direct_query": mark("direct query"),
    "teacher_training": mark("teacher training"),
}
_LOOK = {  # fill, hatch, dashes
    "teacher": ("#bcc2ca", "", "-."),
    "distil": ("#56b4e9", "////", "-"),
    "direct": ("#f0e442", "....", "--"),
}
STUDENTS = 1000  # the region plot goes from 1 to as many
COLUMNS, ROWS = 160, 60
WIDTH, MIN_WIDTH = 5.0, 320  # of a figure, inches and pixels: it fits a phone


def write_page(found: dict[str, Any], out: Path, language: str = "en") -> Path:
    """`break_even.json` and `break_even.html` in `out`. Raises UserError where either exists already.

    The very same numbers may be there: a command that was stopped between the two goes on.
    """
    page, data = out / "break_even.html", out / "break_even.json"
    same = data.is_file() and data.read_bytes() == json_text(found).encode()
    there = [path for path in (page, data) if path.exists() and not (same and path == data)]
    if there:
        raise UserError(
            *(f"{path} exists; remove it or give another --out (nothing is overwritten)" for path in there)
        )
    with speaking(language):
        html = _page(found)
    out.mkdir(parents=True, exist_ok=True)
    write_json(data, found)
    write_atomic(page, html)
    return page


def _page(found: dict[str, Any]) -> str:
    costs = Costs(**found["inputs"]["costs"])
    figures = [
        regions(costs, found["queries"], found["students"]),
        cost_lines(costs, found["students"], found["queries"], lookup(UNITS[found["inputs"]["unit"]])),
    ]
    return (
        page_environment()
        .get_template("break_even.html.j2")
        .render(
            inputs=found["inputs"],
            notes=[retold(note, SAID.values()) for note in found["inputs"]["notes"]],
            figures=[Markup(figure) for figure in figures],
            lead=lead(found),
            spans_queries=spans(found, "by_queries", "queries"),
            rows=rows(found),
        )
    )


def _most_queries(costs: Costs, queries: float, students: float) -> float:
    """The right end of the query axis: a decade beyond the last crossing that 1 to many students have."""
    ends = [queries, 1e3]
    for number in (1, students, STUDENTS):
        ends += [s.start for s in segments(strategy_lines(costs, number))]
    return 10 ** (math.ceil(math.log10(min(max(ends), 1e15))) + 1)


def regions(costs: Costs, queries: float, students: float) -> str:
    """Queries across, students upwards, both logarithmic: which strategy is cheapest where."""
    most = _most_queries(costs, queries, students)
    tallest = max(STUDENTS, 10 * students)
    x = np.logspace(0, np.log10(most), COLUMNS)
    y = np.logspace(0, np.log10(tallest), ROWS)
    lines = [strategy_lines(costs, number) for number in y]
    amounts = np.array([[line.fixed + line.slope * x for line in row] for row in lines])  # [rows, 3, columns]
    winner = amounts.argmin(axis=1)
    tiny = np.finfo(float).tiny
    with matplotlib.rc_context(RC):
        figure = new_figure(WIDTH, 3.4)
        axes = figure.add_subplot()
        plain_axes(axes, "both")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for index, line in enumerate(lines[0]):
            where = winner == index
            if not where.any():
                continue
            fill, hatch, _ = _LOOK[line.name]
            # Above 0 where this one is the cheapest: its contour at 0 is the boundary, between grid points too.
            own, others = amounts[:, index], np.delete(amounts, index, axis=1).min(axis=1)
            ahead = (others - own) / (others + own + tiny)
            axes.contourf(x, y, ahead, [0, 1.01], colors=[fill], alpha=0.55, hatches=[hatch])
            if not where.all():
                axes.contour(x, y, ahead, [0], colors=[INK], linewidths=1.2)
            row, column = _middle(where)
            axes.text(
                x[column], y[row], lookup(_STRATEGY_WORDS[line.name]), ha="center", va="center",
                bbox={"facecolor": "white", "edgecolor": INK, "boxstyle": "round,pad=0.25"}, color="black",
            )  # fmt: skip
        if queries >= 1:
            axes.plot([queries], [students], marker="D", color=INK, markersize=7, clip_on=False, zorder=5)
        axes.xaxis.set_major_formatter(_short)
        axes.yaxis.set_major_formatter(_short)
        axes.set_xlabel(say("queries answered in all"))
        axes.set_ylabel(say("number of students"))
        return to_svg(
            figure, say("Which strategy is cheapest, by number of queries and of students"), MIN_WIDTH
        )


def _short(value: float, _position: int) -> str:
    return f"{value:g}" if value < 1000 else si(value)


def _middle(where: np.ndarray) -> tuple[int, int]:
    """A cell of the region that is far from its edges, for the label."""
    rows_with = np.flatnonzero(where.any(axis=1))
    best = max(rows_with[len(rows_with) // 8 : -(len(rows_with) // 8) or None], key=lambda r: where[r].sum())
    widest = where.sum(axis=1) == where[best].sum()
    row = int(np.median(np.flatnonzero(widest & where.any(axis=1))))
    columns = np.flatnonzero(where[row])
    middle = int(columns[len(columns) // 2])
    return row, min(max(middle, COLUMNS // 7), COLUMNS - COLUMNS // 7)


def cost_lines(costs: Costs, students: float, queries: float, unit: str) -> str:
    """Total cost against the number of queries, for one number of students."""
    lines = strategy_lines(costs, students)
    x = np.logspace(0, np.log10(_most_queries(costs, queries, students)), COLUMNS)
    with matplotlib.rc_context(RC):
        figure = new_figure(WIDTH, 3.4)
        axes = figure.add_subplot()
        plain_axes(axes, "both")
        axes.set_xscale("log")
        for line in lines:
            y = np.array([line.at(value) for value in x], dtype=float)
            axes.plot(
                x,
                np.where(y > 0, y, np.nan),
                _LOOK[line.name][2],
                color=INK,
                label=lookup(_STRATEGY_WORDS[line.name]),
                lw=1.6,
            )
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(_short)
        axes.yaxis.set_major_formatter(_short)
        for segment in segments(lines)[1:]:
            axes.axvline(segment.start, color=MUTED, linestyle=":", linewidth=1.2)
        axes.set_xlabel(say("queries answered in all, for %(students)s", students=_students(students)))
        axes.set_ylabel(unit)
        axes.legend(frameon=False, handlelength=3.5)
        return to_svg(
            figure, say("Total cost by number of queries, for %(n)s", n=_students(students)), MIN_WIDTH
        )


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, amount with unit, source) of every input."""
    inputs = found["inputs"]
    unit = UNITS[inputs["unit"]]
    return [
        (
            lookup(_INPUTS[name]),
            shown(value, unit),
            retold(inputs["sources"].get(name, ""), SAID.values()),
        )
        for name, value in inputs["costs"].items()
        if value is not None
    ]


def shown(value: float, unit: str) -> str:
    """An amount as people read it: `135 MFLOPs`, `0.002 USD`."""
    return si(value, unit) if unit == UNITS["flops"] and value >= 1000 else f"{value:.4g} {lookup(unit)}"


def spans(found: dict[str, Any], key: str, what: str) -> list[str]:
    """Segments in words: `distil from 58,203 queries on`."""
    lines, forms = [], _SPANS[what]
    for index, segment in enumerate(found[key]):
        # Things are counted in whole ones: the last that fit before the crossing, the first after it.
        start = count(segment["from"] if not index else math.floor(segment["from"]) + 1)
        end = segment["to"] if segment["to"] is None else math.floor(segment["to"])
        form = forms[(index > 0, end is not None)]
        words = {
            "strategy": lookup(_STRATEGY_WORDS[segment["strategy"]]),
            "start": start,
            "end": end and count(end),
        }
        line = lookup(form) % words
        if same := say(" and ").join(lookup(_STRATEGY_WORDS[name]) for name in segment["ties"]):
            line += say(" (%(others)s: the same)", others=same)
        lines.append(line)
    return lines


_SPANS = {  # what is counted -> (is there a cheaper one before, and after?) -> the sentence
    "queries": {
        (False, False): mark("%(strategy)s for any number of queries"),
        (False, True): mark("%(strategy)s up to %(end)s queries"),
        (True, True): mark("%(strategy)s from %(start)s to %(end)s queries"),
        (True, False): mark("%(strategy)s from %(start)s queries on"),
    },
    "students": {
        (False, False): mark("%(strategy)s for any number of students"),
        (False, True): mark("%(strategy)s up to %(end)s students"),
        (True, True): mark("%(strategy)s from %(start)s to %(end)s students"),
        (True, False): mark("%(strategy)s from %(start)s students on"),
    },
}


def lead(found: dict[str, Any]) -> str:
    """The answer for the point that was asked for."""
    best = say(" or ").join(lookup(_STRATEGY_WORDS[name]) for name in found["cheapest"])
    queries, students = count(found["queries"]), _students(found["students"])
    return say("%(queries)s queries, %(students)s: %(best)s", queries=queries, students=students, best=best)


def _students(number: float) -> str:
    return say("%(n)s student" if number == 1 else "%(n)s students", n=f"{number:g}")


def count(value: float) -> str:
    return f"{value:,.0f}" if value < 1e7 else si(value)


def format_break_even(found: dict[str, Any]) -> str:
    """The answer as text."""
    inputs, unit = found["inputs"], UNITS[found["inputs"]["unit"]]
    where = inputs["run_dir"] or "numbers given"
    device = f" on {inputs['device']}" if inputs["device"] else ""
    totals = [("strategy", unit)]
    totals += [(_STRATEGY_WORDS[n], f"{found['costs'][n]:.4g}") for n in STRATEGIES if n in found["costs"]]
    many = _students(found["students"])
    lines = [
        f"Distil, train directly, or keep calling the teacher ({where}{device})",
        *text_table([("input", "amount", "from"), *rows(found)], text_columns=(0, 2)),
        lead(found),
        *text_table(totals),
        f"For {many}:",
        *(f"  {line}" for line in spans(found, "by_queries", "queries")),
        f"For {count(found['queries'])} queries in all:",
        *(f"  {line}" for line in spans(found, "by_students", "students")),
        f"Directly trained students are cheaper than distilled ones below {found['direct_student_at_most']:.4g} "
        f"{unit} each.",
    ]
    if inputs["accuracy"]:
        shares = ", ".join(f"{n} {100 * a:.1f} %" for n, a in inputs["accuracy"].items() if a is not None)
        lines.append(f"The strategies do not answer equally well: {shares} correct.")
    return "\n".join([*lines, *(f"Note: {note}" for note in inputs["notes"])])
