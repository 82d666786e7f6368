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

The numbers come from a run's ledger and metrics, from a committed measurement, or from options.

    inputs = from_run("checkpoints/demo", {"usd_per_device_hour": 0.05})
    inputs["costs"]["teacher_query"], inputs["sources"]["teacher_query"]

Every number has a sentence in `sources` that says where it is from. Units: USD where a price is given, else
device-hours (of devices that count alike), or FLOPs, which no other load on the machine can change. What a run
does not tell (the teacher's training, an accuracy that its control does not reach) has to be given, or is left
out and said to be. Imports no torch.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from distill.data.ledger import run_ledger
from distill.errors import UserError
from distill.report.pages import mark
from distill.storage import find_file, read_json

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


def break_even(costs: Costs, queries: float, students: float) -> dict[str, Any]:
    """All of it for one point, as JSON: costs, the cheapest, the crossings in queries and in students.

    Keys: `queries`, `students`, `costs.<strategy>`, `cheapest` (names), `by_queries` and `by_students` (segments
    `strategy`, `from`, `to`, `ties`), `crossings` (of every pair, `queries` or null and why) and
    `direct_student_at_most`. Raises UserError for less than no query or less than one student.
    """
    if not (0 <= queries < float("inf") and 1 <= students < float("inf")):
        raise UserError(
            f"--queries {queries} --students {students}: give queries from 0 up, students from 1 up"
        )
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


UNITS = {"usd": "USD", "device_hours": mark("device-hours"), "flops": "FLOPs"}
NAMES = tuple(field.name for field in fields(Costs))
REQUIRED = ("teacher_query", "student_query", "teacher_outputs", "distil_student")
MEASURED_INPUTS = "recipes/results/break_even.json"


# How many points (of accuracy, as a share) the student may lead by for the control to count as equally good.
MARGIN = 0.05


def from_options(given: dict[str, float | None], unit: str | None) -> dict[str, Any]:
    """All by hand. Raises UserError naming what is missing, one line each."""
    costs = {name: value for name, value in given.items() if value is not None}
    missing = [name for name in REQUIRED if name not in costs]
    if missing:
        raise UserError(*(f"--{n.replace('_', '-')} is missing; give it, or a RUN_DIR" for n in missing))
    return {
        "unit": unit or "usd",
        "run_dir": None,
        "device": None,
        "costs": costs,
        "sources": dict.fromkeys(costs, SAID["given"]),
        "accuracy": {},
        "notes": [] if "direct_student" in costs else [SAID["no_direct"]],
    }


# Sentences that stand in a JSON file, in English; a page says them in its language (distill.report.pages.retold).
SAID = {
    "given": mark("given"),
    "no_direct": mark(
        "direct training is left out: give --direct-student, what one costs to the same accuracy"
    ),
    "left_out": mark("direct training is left out: %(why)s; give --direct-student or --direct-multiple"),
    "teacher_exists": mark("the teacher exists: its training is not charged (--teacher-training charges it)"),
    "outputs": mark("stages prompts, generations and dataset of this run"),
    "student": mark("stage student of this run"),
    "control": mark("stage control of this run, %(why)s"),
    "multiple": mark("%(times)s x stage %(stage)s"),
    "flops": mark("%(length)s tokens written and its prompt, %(flops)s FLOPs each"),
    "speed": mark("%(length)s tokens an answer at %(speed)s tokens/s, in batches of %(rows)s"),
    "bought": mark("stage generations of this run, %(rows)s answers"),
    "not_compared": mark("no comparison of control and student was measured"),
    "reached": mark("whose accuracy is the student's to %(points)s points"),
    "behind": mark(
        "the control does not reach the student's accuracy (behind by up to %(points)s points, %(task)s)"
    ),
}


def measured_inputs() -> dict[str, Any]:
    """The committed measurement of the demo: the inputs of `distill cost RUN_DIR --break-even --json`."""
    return read_json(find_file(MEASURED_INPUTS))["inputs"]


def with_options(inputs: dict[str, Any], given: dict[str, float | None]) -> dict[str, Any]:
    """The same with some numbers replaced by options."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return {
        **inputs,
        "costs": inputs["costs"] | chosen,
        "sources": inputs["sources"] | dict.fromkeys(chosen, SAID["given"]),
        "notes": [n for n in inputs["notes"] if not ("direct_student" in chosen and n.startswith("direct"))],
    }


def from_run(
    run_dir: str | Path,
    prices: dict[str, float] | None,
    unit: str | None = None,
    direct_multiple: float | None = None,
    given: dict[str, float | None] | None = None,
) -> dict[str, Any]:
    """Read a finished run. Keys: `unit`, `run_dir`, `device`, `costs`, `sources`, `accuracy`, `notes`.

    given: options that replace what the run says, so that it need not say it. direct_multiple: training directly
    to the student's accuracy takes so many times the compute of the control arm. Without it the control's own
    cost stands for direct training if in no task the 95 % interval of the student's lead goes beyond `MARGIN`.
    Raises UserError where the run lacks a number, naming the option that gives it.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    unit = unit or ("usd" if prices else "device_hours")
    ledger = run_ledger(run_dir, prices)
    path = Path(run_dir) / "eval" / "metrics.json"
    metrics = read_json(path) if path.is_file() else {"models": {}, "comparisons": []}
    stages, notes = ledger["stages"], []

    costs: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def put(name: str, value: float | None, source: str) -> None:
        if name not in given and value is not None:
            costs[name], sources[name] = value, source

    per_hour = (prices or {}).get("usd_per_device_hour")
    for name, model in (("teacher_query", "teacher"), ("student_query", "student")):
        put(name, *_answer(metrics["models"].get(model), stages.get("eval"), unit, per_hour))
    if "teacher_query" not in costs:
        put("teacher_query", *_bought(Path(run_dir), stages.get("generations"), unit))
    parts = [stages[s][unit] for s in ("prompts", "generations", "dataset") if s in stages]
    known = "generations" in stages and stages["generations"][unit] is not None
    outputs = sum(part for part in parts if part is not None) if known else None
    put("teacher_outputs", outputs, SAID["outputs"])
    put("distil_student", stages.get("student", {}).get(unit), SAID["student"])

    reached, words = _control_reaches(metrics)
    base = stages.get("control" if "control" in stages else "student", {}).get(unit)
    which = "control" if "control" in stages else "student"
    if direct_multiple is not None:
        times = SAID["multiple"] % {"times": f"{direct_multiple:g}", "stage": which}
        put("direct_student", base and base * direct_multiple, times)
    elif reached:
        put("direct_student", base, SAID["control"] % {"why": words})
    elif "direct_student" not in given:
        notes.append(SAID["left_out"] % {"why": words})
    if "teacher_training" not in given:
        notes.append(SAID["teacher_exists"])

    missing = [name for name in REQUIRED if name not in costs and name not in given]
    if missing:
        raise UserError(
            *(
                f"{run_dir} does not tell {n} in {UNITS[unit]}; give --{n.replace('_', '-')}"
                + (", or a price" if unit == "usd" else "")
                for n in missing
            )
        )
    found = {
        "unit": unit,
        "run_dir": str(run_dir),
        "device": stages.get("student", {}).get("device"),
        "costs": costs,
        "sources": sources,
        "accuracy": {name: _accuracy(model) for name, model in metrics["models"].items()},
        "notes": notes,
    }
    return with_options(found, given)


def _answer(model: dict | None, stage: dict | None, unit: str, per_hour: float | None):
    """(amount of one answer, source) as the evaluation measured it: in its batches, at its lengths."""
    if model is None or stage is None:
        return None, ""
    answers = sum(task["n"] * task.get("samples", 1) for task in model["tasks"].values())
    cost = model["cost"]
    length = cost["generated_tokens"] / answers
    if unit == "flops":
        flops = model["model"]["flops_per_token"]
        source = SAID["flops"] % {"length": f"{length:.1f}", "flops": f"{flops:.3g}"}
        return cost["flops"] / answers, source
    hours = cost["seconds"] / answers / 3600 * stage["devices"]
    amount = hours if unit == "device_hours" else per_hour and hours * per_hour
    speed = cost["decode_tokens_per_second"]
    words = {"length": f"{length:.1f}", "speed": f"{speed:,.0f}", "rows": cost["batch_size"]}
    return amount, SAID["speed"] % words


def _bought(run_dir: Path, stage: dict | None, unit: str):
    """(amount of one of the teacher's answers, source) where it was not evaluated, as behind a server."""
    if stage is None or stage[unit] is None:
        return None, ""
    rows = read_json(run_dir / "generations" / "manifest.json")["counts"].get("rows")
    return (stage[unit] / rows if rows else None), SAID["bought"] % {"rows": f"{rows or 0:,}"}


def _accuracy(model: dict) -> float | None:
    """Over all problems of all tasks."""
    tasks = [task for task in model["tasks"].values() if task["accuracy"] is not None]
    n = sum(task["n"] for task in tasks)
    return sum(task["n"] * task["accuracy"] for task in tasks) / n if n else None


def _control_reaches(metrics: dict) -> tuple[bool, str]:
    """Whether the control is as good as the student, to `MARGIN`; and in words."""
    leads = []
    for item in metrics["comparisons"]:
        if item["ci95"] and {item["a"], item["b"]} == {"control", "student"}:
            low, high = item["ci95"]
            leads.append((item["task"], high if item["b"] == "student" else -low))
    if not leads:
        return False, SAID["not_compared"]
    task, most = max(leads, key=lambda lead: lead[1])
    if most <= MARGIN:
        return True, SAID["reached"] % {"points": f"{100 * MARGIN:g}"}
    return False, SAID["behind"] % {"points": f"{100 * most:.0f}", "task": task}
