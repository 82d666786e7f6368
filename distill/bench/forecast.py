"""How long a budget will take, before it begins: from the seconds of runs that were measured.

    forecast(bench, tasks, measured)      # {"work_minutes", "wall_minutes", "jobs", "from", "guessed"}

`measured` are committed results. Those of version 2 have the seconds of every arm (`arm_seconds`); an arm whose steps
changed is scaled. Version 1 kept training seconds and the price of a token, so what a run takes is put together: its
steps at the seconds of a step of its own arm (or of the arm it is like, or of `sequence`), its answers at the measured
tokens a second, worked solutions at a third of the training's time a token, and what a process needs to load. Put to
the the two grids that those results are of, it says 78 and 162 minutes of work, and 77 and 154 were measured
(tests/bench/test_forecast.py).
"""

from pathlib import Path
from typing import Any

from distill.bench.grid import Bench
from distill.bench.plan import Task
from distill.storage import PROJECT_ROOT, read_json

RESULTS = PROJECT_ROOT / "recipes" / "results"
LOAD = 1.5  # seconds of a run that are neither training nor answering
GENERATED = 24.0  # seconds in which the embedded teacher answers 2,000 questions on one thread
PROBES = 5.0  # seconds of the probes of flaws
CROWDED = 1.05  # work shared by as many processes as cores takes a little longer than its part
# Of a task in version 1, in tokens: an answer where nobody measured one, prompt and worked solution together.
ANSWER, SOLUTION = 30.0, 75.0
SPEED = 5000.0  # tokens a second, decoded


def known_results(bench_name: str) -> tuple[dict[str, Any], str] | None:
    """(results, file) of the largest committed grid of a bench file; None if there is none."""
    found = []
    for path in sorted(RESULTS.glob("claims-*.json")):
        results = read_json(path)
        if results.get("bench") == bench_name and "arms" in results and "claims" in results:
            found.append((results["tasks"], path.name, results))
    if not found:
        return None
    _, name, results = max(found, key=lambda f: f[:2])
    return results, name


def forecast(bench: Bench, tasks: dict[str, Task], measured: dict[str, Any], jobs: int = 2) -> dict[str, Any]:
    """What the tasks will take on `jobs` cores: minutes of work and on the wall, and which arms were guessed."""
    guessed: dict[str, None] = {}
    work, longest = 0.0, 0.0
    finish: dict[str, float] = {}
    for name, task in tasks.items():
        seconds = task_seconds(bench, task, measured, guessed)
        work += seconds
        finish[name] = seconds + max((finish.get(need, 0.0) for need in task.needs), default=0.0)
        longest = max(longest, finish[name])
    wall = max(CROWDED * work / jobs, longest)
    return {
        "work_minutes": round(work / 60, 1),
        "wall_minutes": round(wall / 60, 1),
        "jobs": jobs,
        "guessed": list(guessed),
    }


def task_seconds(bench: Bench, task: Task, measured: dict[str, Any], guessed: dict[str, None]) -> float:
    """Seconds of one task. Names of arms that nobody measured go to `guessed`."""
    exact = measured.get("arm_seconds", {})
    key = task.arm or task.kind
    if task.kind == "rows":
        return exact.get(key, 2.0)
    if task.kind == "answers":
        asked = sum(task.recipe.prompts.levels.values()) * task.recipe.generate.samples
        return exact.get(key, LOAD + (GENERATED * asked / 2000 if task.recipe.teacher else 0.0))
    arm = _nearest(bench, task.arm, measured["arms"])
    if arm != task.arm:
        guessed[task.arm] = None
    if arm in exact and not task.checkpoint:
        return exact[arm] * task.recipe.train.steps / _mean(measured["arms"][arm], "train.steps")
    if task.arm in exact:
        return exact[task.arm]
    metrics = measured["arms"][arm]["metrics"]
    train = task.recipe.train
    per_step = (
        0.0
        if task.checkpoint
        else _mean(measured["arms"][arm], "train.seconds") / _mean(measured["arms"][arm], "train.steps")
    )
    if not task.checkpoint and (size := measured["arms"][arm]["budget"].get("rows")):
        per_step *= train.batch_size * _mean(measured["arms"][arm], "train.steps") / size
    seconds = LOAD + (0.0 if task.checkpoint else per_step * train.steps)
    evaluate = task.recipe.evaluate
    asked = 400 if evaluate.source else sum(evaluate.levels.values())
    speed = SPEED
    if "cost.usd_per_million" in metrics and task.recipe.prices.usd_per_device_hour:
        speed = task.recipe.prices.usd_per_device_hour / 3600 / _value(metrics["cost.usd_per_million"]) * 1e6
    answer = _value(metrics["tokens.answer"]) if "tokens.answer" in metrics else ANSWER
    seconds += asked * answer / speed
    for k in evaluate.interventions.top_k:
        seconds += evaluate.interventions.problems * len(evaluate.levels) * answer / speed * (0.8 + 0.1 * k)
    read = sum(min(evaluate.solutions, n) for n in evaluate.levels.values()) if not evaluate.source else 0
    return seconds + read * SOLUTION / (3 * SPEED) + (PROBES if task.probes else 0.0)


def _nearest(bench: Bench, name: str, known: dict[str, Any]) -> str:
    """The measured arm that a run of `name` is most like."""
    arms, at = bench.all_arms(), name
    while at and at not in known:
        arm = arms.get(at)
        at = arm.like if arm and arm.like else ""
    if at:
        return at
    # A cell of a factorial by the cells it was part of, as teacher+moe+lora of teacher+moe+bf16+lora.
    parts = set(name.split("+"))
    wider = [other for other in known if "+" in other and parts <= set(other.split("+"))]
    return wider[0] if wider else "sequence" if "sequence" in known else next(iter(known))


def _value(summary: Any) -> float:
    """A mean: version 1 kept [mean, sd] of an arm, version 2 names them."""
    return summary["mean"] if isinstance(summary, dict) else summary[0]


def _mean(arm: dict[str, Any], name: str) -> float:
    return _value(arm["metrics"][name]) if name in arm["metrics"] else 1.0


def describe(bench: Bench, file: Path, tasks: dict[str, Task]) -> dict[str, Any] | None:
    """The forecast of --dry-run, and which results it is from; None where nothing like it was measured."""
    inside = file.resolve().is_relative_to(PROJECT_ROOT)
    found = known_results(str(file.resolve().relative_to(PROJECT_ROOT))) if inside else None
    if found is None:
        return None
    results, name = found
    return {**forecast(bench, tasks, results), "from": f"recipes/results/{name}", "on": results["device"]}
