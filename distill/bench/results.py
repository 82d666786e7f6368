"""The results of a grid: claims with verdicts, what each arm used, curves; as JSON, Parquet and a page.

    results = collect_results(bench, "small", file, tasks, clock, jobs=2)      # from finished run folders alone
    write_results(results, table, Path("checkpoints/claims"))

results.json, version 2: `claims` (distill/bench/judge.py says what a row has), `controls`
(distill/bench/judge.py), `facts`, `evidence`, `arms` (`about`, `metrics` with mean, sd and the value of every seed,
`budget`), `curves`, and what they rest on: `bench`, `recipes` (hashes of the files), `commit` (whose code judged) and
`commits` (whose code trained and measured), `registration`, `tuning`, `device`, `versions`, `seconds`, `arm_seconds`.
items.parquet has every answer. Version 1 had no registration, controls, facts and evidence, and corrected all claims
together; pages show it as it is.
"""

import math
import os
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.bench.claims import Controls, Fact, History, unregistered
from distill.bench.grid import Bench, Curve, arms_within
from distill.bench.items import ITEMS, Records, Table, counts, read_items, write_items
from distill.bench.judge import EQUAL_AFTER, Measured, decide, judge_claim, judge_controls
from distill.bench.metrics import metric
from distill.bench.plan import Task, apply_rates, known_budget, runs_of
from distill.bench.verdicts import fit_curve, pareto_front
from distill.errors import UserError
from distill.files import replacing
from distill.stages import versions
from distill.storage import PROJECT_ROOT, find_file, hash_yaml, read_json, write_json, write_sealed

RESULTS_VERSION = 2
CLOCK = "clock.json"  # seconds of every task and of every budget's invocations


def collect_results(
    bench: Bench,
    budget: str,
    file: Path,
    tasks: dict[str, Task],
    clock: dict[str, Any],
    records: Records,
    jobs: int,
) -> tuple[dict[str, Any], Table]:
    """(results, single answers) of finished tasks. Raises UserError where a claim came too late."""
    measured = measure_arms(bench, budget, tasks, clock, records)
    claims = [claim for claim in bench.claims if bench.within(budget, claim)]
    code = {claim.id: code_of(bench, claim.terms(bench.factorial), budget, tasks, clock) for claim in claims}
    registration = check_registration(bench, file, code)
    tuning = apply_rates(bench)
    rows = [judge_claim(bench, claim, budget, measured, tuning) for claim in claims]
    decide(rows)
    recipe = find_file(bench.recipe) if isinstance(bench.recipe, str) else None
    arms = arms_within(bench, budget)
    device = next(records[task].device for task in tasks.values() if task.kind == "run")
    controls = _controls_within(bench.controls, arms)
    seeds = {name: bench.seeds_of(name, budget) for name in arms}
    known = clock["tasks"]
    results = {
        "schema_version": RESULTS_VERSION,
        "title": bench.title,
        "bench": shown_path(file),
        "recipes": {shown_path(path): hash_yaml(path) for path in filter(None, (file, recipe))},
        "budget": budget,
        "seeds": bench.budgets[budget].seeds,
        "first_seed": bench.first_seed,
        "commit": commit(),
        "commits": sorted({known[n]["commit"] for n in tasks if known.get(n, {}).get("commit")}),
        "registration": registration,
        "tuning": tuning,
        "device": device,
        "jobs": jobs,
        "versions": versions(),
        "seconds": {
            "wall": _wall(bench, budget, clock),
            "work": round(sum(measured.seconds[n] for n in tasks if n in measured.seconds), 1),
        },
        "arm_seconds": arm_seconds(tasks, measured.seconds),
        "tasks": len(tasks),
        "claims": rows,
        "controls": judge_controls(controls, measured.values, measured.counts, measured.table, seeds)
        if controls
        else None,
        "facts": [_fact(f, measured.values) for f in bench.facts if bench.within(budget, f)],
        "evidence": [evidence.model_dump() for evidence in bench.evidence],
        "arms": {name: _arm(arms[name].about, name, measured.values, measured.budgets) for name in arms},
        "curves": [_curve(c, measured.values) for c in bench.curves if bench.within(budget, c)],
    }
    return results, measured.table


def check_registration(
    bench: Bench, file: Path, code: dict[str, Iterable[str]] | None = None
) -> dict[str, Any]:
    """{"checked", "claims"}: whether history could be asked, and how many claims name a commit.

    `code`: of each claim the commits that measured it; None before any run. Raises UserError with every claim
    that was not registered before.
    """
    named = sum(claim.registered is not None for claim in bench.claims)
    path, history = shown_path(file), History(PROJECT_ROOT)
    checked = bool(named and history.available and not path.startswith(".."))
    if checked and (PROJECT_ROOT / path).is_file():
        last = list(bench.budgets)[-1]
        seeds = {claim.id: bench.claim_seeds(claim, last) for claim in bench.claims}
        if problems := unregistered(path, history, seeds, code):
            raise UserError(
                *(f"claim {claim}: {why}" for claim, why in problems.items()),
                f"to try something without a registration, copy {path} out of the project",
            )
    return {"checked": checked, "claims": named}


def code_of(
    bench: Bench, terms: Iterable[str], budget: str, tasks: dict[str, Task], clock: dict[str, Any]
) -> list[str]:
    """The commits whose code made the runs of these arms, and what those runs rest on."""
    arms, found = arms_within(bench, budget), set()
    names = {term.partition("@")[0] for term in terms}
    left = [runs_of(bench, arm, seed, arms) for arm in names for seed in bench.seeds_of(arm, budget)]
    seen: set[str] = set()
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += tasks[name].needs
            found.add(clock["tasks"].get(name, {}).get("commit") or "an unknown commit")
    return sorted(found)


def measure_arms(
    bench: Bench, budget: str, tasks: dict[str, Task], clock: dict[str, Any], records: Records
) -> Measured:
    """What the finished runs of a budget have."""
    values, budgets = read_values(bench, budget, tasks, records)
    arms = arms_within(bench, budget)
    runs = {
        name: {seed: tasks[runs_of(bench, name, seed, arms)] for seed in bench.seeds_of(name, budget)}
        for name in arms
    }
    table = read_items(runs, records)
    seconds = {name: kept["seconds"] for name, kept in clock["tasks"].items()}
    return Measured(tasks, values, counts(table), table, budgets, seconds)


def _controls_within(section: Controls | None, arms: Iterable[str]) -> Controls | None:
    """What of the controls a budget has arms for; None without the reference."""
    if section is None or section.reference not in arms:
        return None
    doses = {arm: share for arm, share in section.doses.items() if arm in arms}
    return section.model_copy(update={"doses": doses, "arms": [arm for arm in section.arms if arm in arms]})


def arm_seconds(tasks: dict[str, Task], seconds: dict[str, float]) -> dict[str, float]:
    """Median seconds of a task by arm, and of `answers` and `rows`: of which the next forecast is made."""
    found: dict[str, list[float]] = {}
    for name, task in tasks.items():
        if name in seconds:
            found.setdefault(task.arm or task.kind, []).append(seconds[name])
    return {arm: round(statistics.median(of), 2) for arm, of in found.items()}


def _fact(fact: Fact, values: dict) -> dict[str, Any]:
    """A number without a verdict: the mean, and the least and the most of the seeds."""
    terms = {t if "@" in t else f"{t}@{fact.metric}": weight for t, weight in fact.effect.items()}
    reference = next((t for t, w in terms.items() if w == -1), None) if fact.relative else None
    seeds = sorted(set.intersection(*(set(values.get(t, {})) for t in terms)))
    each = [math.fsum(w * values[t][s] for t, w in terms.items()) for s in seeds]
    if reference:
        each = [total / values[reference][s] for s, total in zip(seeds, each)]
    return {
        **fact.model_dump(include={"id", "sentence", "statement", "because", "metric", "relative"}),
        "unit": "%" if fact.relative else metric(fact.metric).unit,
        "terms": terms,
        "mean": statistics.fmean(each) if each else None,
        "range": [min(each), max(each)] if each else None,
        "n": len(each),
    }


def _wall(bench: Bench, budget: str, clock: dict[str, Any]) -> float:
    """Seconds on the wall of this budget and of the smaller ones whose runs it took over."""
    order = list(bench.budgets)
    return round(sum(clock["wall"].get(name, 0.0) for name in order[: order.index(budget) + 1]), 1)


def read_values(
    bench: Bench, budget: str, tasks: dict[str, Task], records: Records
) -> tuple[dict[str, dict[int, float]], dict[str, dict[str, Any]]]:
    """({"arm@metric": {seed: value}}, {arm: what its runs used, means over seeds}) of finished runs."""
    arms = arms_within(bench, budget)
    values: dict[str, dict[int, float]] = {}
    budgets: dict[str, dict[str, Any]] = {}
    for name in arms:
        seeds = bench.seeds_of(name, budget)
        runs = [tasks[runs_of(bench, name, seed, arms)] for seed in seeds]
        for seed, task in zip(seeds, runs):
            for key, value in records[task].values.items():
                values.setdefault(f"{name}@{key}", {})[seed] = value
        used = [_used(task, records) for task in runs]
        budgets[name] = {
            key: [u[key] for u in used] for key in used[0]
        }  # one entry a seed; prompts are fingerprints
    return values, budgets


def _used(task: Task, records: Records) -> dict[str, Any]:
    used = records[task].used
    if used is None:
        return dict.fromkeys(("prompts", "steps", "rows", *EQUAL_AFTER))
    return {**known_budget(task), **used}


def _arm(about: str, name: str, values: dict, budgets: dict) -> dict[str, Any]:
    own = {t.partition("@")[2]: by_seed for t, by_seed in values.items() if t.partition("@")[0] == name}
    used = {
        key: (statistics.fmean(column) if isinstance(column[0], int | float) else column[0])
        for key, column in budgets[name].items()
    }
    return {"about": about, "metrics": {m: _summary(v) for m, v in own.items()}, "budget": used}


def _summary(by_seed: dict[int, float]) -> dict[str, Any]:
    sample = list(by_seed.values())
    return {
        "mean": statistics.fmean(sample),
        "sd": statistics.stdev(sample) if len(sample) > 1 else None,
        "values": {str(seed): value for seed, value in by_seed.items()},
    }


def _curve(curve: Curve, values: dict) -> dict[str, Any]:
    series = {}
    for label, arms in curve.series.items():
        keys = []
        for arm, _, k in (name.partition("@") for name in arms):
            prefix = f"{arm}@{k + '.' if k else ''}"
            keys.append((prefix + curve.x, prefix + curve.y))
        there = [arm for arm, (kx, ky) in zip(arms, keys) if values.get(kx) and values.get(ky)]
        points = [
            (_summary(values[kx]), _summary(values[ky])) for arm, (kx, ky) in zip(arms, keys) if arm in there
        ]
        x = [v for px, py in points for v in px["values"].values()]
        y = [v for px, py in points for v in py["values"].values()]
        series[label] = {
            "arms": there,
            "x": [px["mean"] for px, _ in points],
            "y": [py["mean"] for _, py in points],
            "y_sd": [py["sd"] for _, py in points],
            "fit": fit_curve(x, y) if curve.fit else None,
        }
    found = {**curve.model_dump(include={"title", "x", "y", "log_x"}), "series": series}
    if curve.front:
        points = {arm: (x, y) for s in series.values() for arm, x, y in zip(s["arms"], s["x"], s["y"])}
        found["front"] = pareto_front(points)
    return found


class Clock:
    """Seconds of every task over all invocations, and of each budget on the wall; kept in the bench's folder."""

    def __init__(self, root: Path, budget: str, records: Records):
        self.path, self.budget, self.records = root / CLOCK, budget, records
        self.data: dict[str, Any] = {"tasks": {}, "wall": {}}
        if self.path.is_file():
            self.data = read_json(self.path)
        self._begun = time.perf_counter()
        self._commit = (commit() or {}).get("id")

    def begin(self, task: Task) -> None:
        """What was measured of a folder that somebody removed says nothing of the one that takes its place."""
        if not task.folder.exists():
            self.data["tasks"].pop(task.name, None)

    def add(self, task: Task, seconds: float, redone: bool = False) -> None:
        """`commit` is that of the code which began the task: a claim written later does not count as registered."""
        known = self.data["tasks"]
        made = {"arm": task.arm or task.kind, "seconds": 0.0, "commit": self._commit}
        kept = known.setdefault(task.name, made)
        if redone:
            kept |= {"commit": self._commit}
        kept["seconds"] = round(kept["seconds"] + seconds, 2)
        now = time.perf_counter()
        wall = self.data["wall"]
        wall[self.budget] = round(wall.get(self.budget, 0.0) + now - self._begun, 1)
        self._begun = now
        write_sealed(self.path, self.data)

    def take_over(self, task: Task) -> None:
        """What a record says of a task that was made elsewhere."""
        of = self.records[task]
        made = {"arm": task.arm or task.kind, "seconds": of.seconds, "commit": of.commit}
        self.data["tasks"][task.name] = made

    def seconds(self, name: str) -> float:
        return self.data["tasks"][name]["seconds"]

    def known(self, tasks: dict[str, Task]) -> list[str]:
        return [name for name in tasks if name in self.data["tasks"]]

    def estimate(self, left: list[Task]) -> float | None:
        """Seconds of work in `left`: each as its own arm's finished runs, else as the mean of all; None at first.

        Tasks that an earlier call of the command finished take none.
        """
        by_arm: dict[str, list[float]] = {}
        for kept in self.data["tasks"].values():
            by_arm.setdefault(kept["arm"], []).append(kept["seconds"])
        runs = [s for arm, of in by_arm.items() if arm not in ("answers", "rows") for s in of]
        if not runs:
            return None
        mean = statistics.fmean(runs)
        return sum(
            statistics.fmean(by_arm.get(t.arm or t.kind, [mean if t.kind == "run" else 5.0]))
            for t in left
            if t.name not in self.data["tasks"]
        )


# -------------------------------------------------------------------------------------------- what it rests on


def commit() -> dict[str, Any] | None:
    """{"id", "clean"} of the project's checkout; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PROJECT_ROOT), *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD")[:12], "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return None


def shown_commit(results: dict[str, Any]) -> str:
    """For people: the commit, and whether files lay over it that it does not have."""
    found = results.get("commit")
    return "unknown" if not found else found["id"] + ("" if found["clean"] else " with uncommitted files")


def shown_path(path: Path) -> str:
    """A file of the project by its path in it, any other by its own."""
    whole = path.resolve()
    return (
        str(whole.relative_to(PROJECT_ROOT)) if whole.is_relative_to(PROJECT_ROOT) else os.path.relpath(path)
    )


def write_results(results: dict[str, Any], table: Table, root: Path, language: str = "en") -> None:
    """results.json, results.parquet, items.parquet and bench.html in `root`; the page in `language`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from distill.bench.page import build_bench_page

    write_json(root / "results.json", results)
    rows = [
        {"arm": arm, "seed": int(seed), "metric": key, "value": float(value)}
        for arm, about in results["arms"].items()
        for key, summary in about["metrics"].items()
        for seed, value in summary["values"].items()
    ]
    schema = pa.schema(
        [("arm", pa.string()), ("seed", pa.int32()), ("metric", pa.string()), ("value", pa.float64())]
    )
    found = pa.Table.from_pylist(rows, schema=schema)
    with replacing(root / "results.parquet", found.nbytes) as temporary:
        pq.write_table(found, temporary)
    write_items(table, root / ITEMS)
    build_bench_page(results, root / "bench.html", language)
