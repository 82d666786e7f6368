"""Distil, train directly, or keep calling the teacher: which is cheapest for how many queries and students.

    distill cost [RUN_DIR] --break-even [--queries N] [--students N] [--out DIR] [--json]
    cheapest(costs, queries=1e6, students=1)            # ["distil"]
    segments(strategy_lines(costs, students=1))         # which is cheapest from how many queries on

Three strategies, each a straight line in the queries Q (all students' together) for a number of students S:

    teacher   P                 + Q * teacher_query          every query is the teacher's
    distil    P + G + S * D     + Q * student_query          the teacher's answers once, then S students from them
    direct            S * X     + Q * direct_query           S students to the same accuracy, with no teacher

P is the teacher's training where it still has to be paid, G its answers, D one distilled student, X one student
trained directly to the same accuracy. Crossings of lines have closed forms, so nothing is searched. The shape is
that of Distillation Scaling Laws (arXiv 2502.08606, abstract and section 5): distil if the teacher exists already
or there are many students, train directly if one student must pay for the teacher; here with queries, and with
your prices. Any one unit does: USD, device-hours, FLOPs. Only ratios matter. Numbers may be floats or Fractions.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from distill.errors import UserError

STRATEGIES = ("teacher", "distil", "direct")  # where costs tie, the earlier: what commits to less


@dataclass(frozen=True)
class Costs:
    """In one unit. `direct_student` None: no direct training is known that reaches the accuracy."""

    teacher_query: float
    student_query: float
    teacher_outputs: float
    distil_student: float
    direct_student: float | None = None
    direct_query: float | None = None  # None: as the distilled student's
    teacher_training: float = 0

    def __post_init__(self):
        wrong = [
            f"--{name.replace('_', '-')} {value}: an amount from 0 up"
            for name, value in asdict(self).items()
            if value is not None and not 0 <= value < float("inf")
        ]
        if wrong:
            raise UserError(*wrong)


class Line(NamedTuple):
    """fixed + slope * x, and the name of the strategy it is the cost of."""

    name: str
    fixed: Any
    slope: Any

    def at(self, x):
        return self.fixed + self.slope * x


class Segment(NamedTuple):
    """`strategy` is cheapest from `start` to `end` (None: for ever); `ties` cost the same all along."""

    strategy: str
    start: Any
    end: Any
    ties: tuple[str, ...] = ()


def strategy_lines(costs: Costs, students) -> list[Line]:
    """The strategies as lines in the number of queries, for so many students."""
    paid = costs.teacher_training
    lines = [
        Line("teacher", paid, costs.teacher_query),
        Line(
            "distil",
            paid + costs.teacher_outputs + students * costs.distil_student,
            costs.student_query,
        ),
    ]
    if costs.direct_student is not None:
        lines.append(Line("direct", students * costs.direct_student, _direct_query(costs)))
    return lines


def student_lines(costs: Costs, queries) -> list[Line]:
    """The strategies as lines in the number of students, for so many queries in all."""
    lines = [
        Line("teacher", costs.teacher_training + queries * costs.teacher_query, 0),
        Line(
            "distil",
            costs.teacher_training + costs.teacher_outputs + queries * costs.student_query,
            costs.distil_student,
        ),
    ]
    if costs.direct_student is not None:
        lines.append(Line("direct", queries * _direct_query(costs), costs.direct_student))
    return lines


def _direct_query(costs: Costs):
    return costs.student_query if costs.direct_query is None else costs.direct_query


def cheapest(costs: Costs, queries, students) -> list[str]:
    """The strategies of least cost at one point, more than one where they tie."""
    found = {line.name: line.at(queries) for line in strategy_lines(costs, students)}
    least = min(found.values())
    return [name for name in STRATEGIES if found.get(name) == least]


def crossing(a: Line, b: Line):
    """Where two lines cost the same, at x >= 0; None where they never do, or always (parallel lines)."""
    if a.slope == b.slope:
        return None
    x = (b.fixed - a.fixed) / (a.slope - b.slope)
    return x if x >= 0 else None


def segments(lines: list[Line], start=0) -> list[Segment]:
    """The lower envelope of the lines from `start` on: which is cheapest from where to where.

    From segment to segment the slope falls: more queries never make the dearer query the cheaper choice.
    """
    # Where costs tie at the start, the flatter line is the cheaper one right after it.
    x, now = start, min(lines, key=lambda line: (line.at(start), line.slope, STRATEGIES.index(line.name)))
    found: list[Segment] = []
    while True:
        ties = tuple(line.name for line in lines if line != now and line[1:] == now[1:])
        # Of lines that meet in one point, the flattest goes on.
        meetings = [
            ((line.fixed - now.fixed) / (now.slope - line.slope), line.slope, line)
            for line in lines
            if line.slope < now.slope
        ]
        if not meetings:
            return [*found, Segment(now.name, x, None, ties)]
        end, _, after = min(meetings, key=lambda meeting: (*meeting[:2], STRATEGIES.index(meeting[2].name)))
        if end > x:
            found.append(Segment(now.name, x, end, ties))
            x = end
        now = after


def direct_allowance(costs: Costs, queries, students):
    """The most that one directly trained student may cost before distilling is cheaper. May be below 0."""
    saved = queries * (costs.student_query - _direct_query(costs))
    return costs.distil_student + (costs.teacher_training + costs.teacher_outputs + saved) / students


def solve(costs: Costs, queries: float, students: float) -> dict[str, Any]:
    """All of it for one point, as JSON: costs, the cheapest, the crossings in queries and in students.

    Keys: `queries`, `students`, `costs.<strategy>`, `cheapest` (names), `by_queries` and `by_students` (segments
    `strategy`, `from`, `to`, `ties`), `crossings` (of every pair, `queries` or null and why) and
    `direct_student_at_most`. Raises UserError for less than no query or less than one student.
    """
    if not (0 <= queries < float("inf") and 1 <= students < float("inf")):
        raise UserError(f"--queries {queries} --students {students}: queries from 0 up, students from 1 up")
    lines = strategy_lines(costs, students)
    pairs = [(a, b) for i, a in enumerate(lines) for b in lines[i + 1 :]]
    return {
        "queries": queries,
        "students": students,
        "costs": {line.name: line.at(queries) for line in lines},
        "cheapest": cheapest(costs, queries, students),
        "by_queries": [_as_json(segment) for segment in segments(lines)],
        "by_students": [_as_json(segment) for segment in segments(student_lines(costs, queries), start=1)],
        "crossings": [_crossing(a, b) for a, b in pairs],
        "direct_student_at_most": direct_allowance(costs, queries, students),
    }


def _as_json(segment: Segment) -> dict[str, Any]:
    return {
        "strategy": segment.strategy,
        "from": segment.start,
        "to": segment.end,
        "ties": list(segment.ties),
    }


def _crossing(a: Line, b: Line) -> dict[str, Any]:
    at = crossing(a, b)
    if at is not None:
        words = f"{min(a, b, key=lambda line: line.slope).name} from here on"
    elif (a.fixed, a.slope) == (b.fixed, b.slope):
        words = "they cost the same"
    else:
        words = f"{min(a, b, key=lambda line: (line.fixed, line.slope)).name} is always cheaper"
    return {"between": [a.name, b.name], "queries": at, "meaning": words}
