"""Where the break-even's numbers come from: a run's ledger and metrics, a committed measurement, or options.

    inputs = from_run("checkpoints/demo", {"usd_per_device_hour": 0.05})
    inputs["costs"]["teacher_query"], inputs["sources"]["teacher_query"]

Every number has a sentence in `sources` that says where it is from. Units: USD where a price is given, else
device-hours (of devices that count alike), or FLOPs, which no other load on the machine can change. What a run
does not tell (the teacher's training, an accuracy that its control does not reach) has to be given, or is left
out and said to be. Imports no torch.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from distill.break_even import Costs
from distill.config import find_file
from distill.errors import UserError
from distill.ledger import run_ledger
from distill.shards import read_json

UNITS = {"usd": "USD", "device_hours": "device-hours", "flops": "FLOPs"}
NAMES = tuple(field.name for field in fields(Costs))
REQUIRED = ("teacher_query", "student_query", "teacher_outputs", "distil_student")
MEASURED = "recipes/results/break_even.json"
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
        "sources": dict.fromkeys(costs, "given"),
        "accuracy": {},
        "notes": [] if "direct_student" in costs else [_NO_DIRECT],
    }


_NO_DIRECT = "direct training is left out: give --direct-student, what one costs to the same accuracy"


def measured() -> dict[str, Any]:
    """The committed measurement of the demo: the inputs of `distill cost RUN_DIR --break-even --json`."""
    return read_json(find_file(MEASURED))["inputs"]


def with_options(inputs: dict[str, Any], given: dict[str, float | None]) -> dict[str, Any]:
    """The same with some numbers replaced by options."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return {
        **inputs,
        "costs": inputs["costs"] | chosen,
        "sources": inputs["sources"] | dict.fromkeys(chosen, "given"),
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
    put("teacher_outputs", outputs, "stages prompts, generations and dataset of this run")
    put("distil_student", stages.get("student", {}).get(unit), "stage student of this run")

    reached, words = _control_reaches(metrics)
    base = stages.get("control" if "control" in stages else "student", {}).get(unit)
    which = "control" if "control" in stages else "student"
    if direct_multiple is not None:
        put("direct_student", base and base * direct_multiple, f"{direct_multiple:g} x stage {which}")
    elif reached:
        put("direct_student", base, f"stage control of this run, {words}")
    elif "direct_student" not in given:
        notes.append(f"direct training is left out: {words}; give --direct-student or --direct-multiple")
    if "teacher_training" not in given:
        notes.append("the teacher exists: its training is not charged (--teacher-training charges it)")

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
        return cost["flops"] / answers, f"{length:.1f} tokens written and its prompt, {flops:.3g} FLOPs each"
    hours = cost["seconds"] / answers / 3600 * stage["devices"]
    amount = hours if unit == "device_hours" else per_hour and hours * per_hour
    speed = cost["decode_tokens_per_second"]
    return (
        amount,
        f"{length:.1f} tokens an answer at {speed:,.0f} tokens/s, in batches of {cost['batch_size']}",
    )


def _bought(run_dir: Path, stage: dict | None, unit: str):
    """(amount of one of the teacher's answers, source) where it was not evaluated, as behind a server."""
    if stage is None or stage[unit] is None:
        return None, ""
    rows = read_json(run_dir / "generations" / "manifest.json")["counts"].get("rows")
    return (stage[unit] / rows if rows else None), f"stage generations of this run, {rows or 0:,} answers"


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
        return False, "no comparison of control and student was measured"
    task, most = max(leads, key=lambda lead: lead[1])
    if most <= MARGIN:
        return True, f"whose accuracy is the student's to {100 * MARGIN:g} points"
    return (
        False,
        f"the control does not reach the student's accuracy (behind by up to {100 * most:.0f} points, {task})",
    )
