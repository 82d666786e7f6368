"""The results of a grid: claims with verdicts, what each arm used, curves; as JSON, Parquet and a page.

    results = collect(bench, "small", file, tasks, clock, jobs=2)      # from finished run folders alone
    write_results(results, Path("checkpoints/claims"))

results.json: `claims` (sentence, hypothesis, terms, `effect` with n, per_seed, mean, ci95, p_value of no effect;
`p_value` of the verdict, `p_value_holm`, `verdict`, `alone`, `equal`, `comparable`, `cost`), `arms` (`about`, `metrics`
with mean, sd, values by seed, and `budget`), `curves`, and what they rest on: `bench`, `recipes` (hashes of the files),
`commit`, `device`, `versions`, `seconds`.

One in twenty true nulls passes a test by its own 95 % interval, so with sixty claims a few would be called by chance:
a verdict also needs the claim's p-value below 0.05 after Holm's correction for all claims of the file. `alone` is
what its interval alone would say. Arms that do not have in common what the claim says they have get NOT COMPARABLE.
"""

import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from distill.bench.grid import (
    EQUAL,
    KNOWN_BEFORE,
    Bench,
    Claim,
    Curve,
    Task,
    arms_within,
    known_budget,
    runs_of,
)
from distill.bench.metrics import metric, read_metrics
from distill.bench.verdicts import (
    INCONCLUSIVE,
    effect,
    fit_curve,
    hypothesis_verdict,
    pareto_front,
    verdict_p,
)
from distill.evaluation.stats import holm
from distill.files import replacing
from distill.stages import versions
from distill.storage import MANIFEST, PROJECT_ROOT, find_file, hash_yaml, read_json, write_json

RESULTS_VERSION = 1
NOT_COMPARABLE = "NOT COMPARABLE"
SAME = (
    0.02  # trained tokens and FLOPs count as equal up to this share: answers differ by a token here and there
)
EQUAL_AFTER = tuple(key for key in EQUAL if key not in KNOWN_BEFORE)


def collect_results(
    bench: Bench, budget: str, file: Path, tasks: dict[str, Task], clock: dict[str, Any], jobs: int
) -> dict[str, Any]:
    """The results of finished runs. Raises UserError where one is missing."""
    values, budgets = read_values(bench, budget, tasks)
    seconds = {name: kept["seconds"] for name, kept in clock["tasks"].items()}
    claims = [
        judge_claim(bench, claim, budget, tasks, values, budgets, seconds)
        for claim in bench.claims
        if bench.within(budget, claim)
    ]
    _decide(claims)
    recipe = find_file(bench.recipe) if isinstance(bench.recipe, str) else None
    arms = arms_within(bench, budget)
    device = next(_manifests(t, "eval")["device"] for t in tasks.values() if t.kind == "run")
    return {
        "schema_version": RESULTS_VERSION,
        "title": bench.title,
        "bench": _shown(file),
        "recipes": {_shown(path): hash_yaml(path) for path in filter(None, (file, recipe))},
        "budget": budget,
        "seeds": bench.budgets[budget].seeds,
        "commit": commit(),
        "device": device,
        "jobs": jobs,
        "versions": versions(),
        "seconds": {
            "wall": _wall(bench, budget, clock),
            "work": round(sum(seconds[n] for n in tasks if n in seconds), 1),
        },
        "tasks": len(tasks),
        "claims": claims,
        "arms": {name: _arm(arms[name].about, name, values, budgets) for name in arms},
        "curves": [_curve(c, values) for c in bench.curves if bench.within(budget, c)],
    }


def _decide(claims: list[dict[str, Any]]) -> None:
    """Verdicts of claims judged together: `verdict` in place of what each would be `alone`."""
    for claim, corrected in zip(claims, holm([claim["p_value"] for claim in claims])):
        claim["p_value_holm"] = corrected
        if claim["comparable"]:
            claim["verdict"] = hypothesis_verdict(
                claim["effect"], claim["expect"], claim["margin"], corrected
            )


def _wall(bench: Bench, budget: str, clock: dict[str, Any]) -> float:
    """Seconds on the wall of this budget and of the smaller ones whose runs it took over."""
    order = list(bench.budgets)
    return round(sum(clock["wall"].get(name, 0.0) for name in order[: order.index(budget) + 1]), 1)


def read_values(
    bench: Bench, budget: str, tasks: dict[str, Task]
) -> tuple[dict[str, dict[int, float]], dict[str, dict[str, Any]]]:
    """({"arm@metric": {seed: value}}, {arm: what its runs used, means over seeds}) of finished runs."""
    arms = arms_within(bench, budget)
    values: dict[str, dict[int, float]] = {}
    budgets: dict[str, dict[str, Any]] = {}
    for name in arms:
        seeds = bench.seeds_of(name, budget)
        runs = [tasks[runs_of(bench, name, seed, arms)] for seed in seeds]
        for seed, task in zip(seeds, runs):
            for key, value in read_metrics(task.folder).items():
                values.setdefault(f"{name}@{key}", {})[seed] = value
        used = [_used(task) for task in runs]
        budgets[name] = {
            key: [u[key] for u in used] for key in used[0]
        }  # one entry a seed; prompts are fingerprints
    return values, budgets


def _used(task: Task) -> dict[str, Any]:
    if task.checkpoint:
        return dict.fromkeys(("prompts", "steps", "rows", *EQUAL_AFTER))
    manifest = _manifests(task, "student")
    counts = manifest["counts"]
    known = known_budget(task)
    return {
        **known,
        "steps": counts["steps"],
        "rows": counts["rows"],
        "tokens": counts["tokens"],
        "tokens_read": counts["tokens_read"],
        "flops": manifest["flops"],
    }


def _manifests(task: Task, stage: str) -> dict[str, Any]:
    return read_json(task.folder / stage / MANIFEST)


def judge_claim(
    bench: Bench,
    claim: Claim,
    budget: str,
    tasks: dict[str, Task],
    values: dict,
    budgets: dict,
    seconds: dict,
) -> dict[str, Any]:
    """One row of the claims table, its `verdict` still without the others'."""
    terms = claim.terms(bench.factorial)
    reference = next(t for t, w in terms.items() if w == -1) if claim.relative else None
    found = effect(terms, {**{t: {} for t in terms}, **values}, reference)
    names = list(dict.fromkeys(term.partition("@")[0] for term in terms))
    unequal = [f"{key}: {why}" for key in claim.equal if (why := _differ(key, names, budgets))]
    arms = arms_within(bench, budget)
    runs = {runs_of(bench, arm, seed, arms) for arm in names for seed in bench.seeds_of(arm, budget)}
    flops = sum(_manifests(tasks[r], "student")["flops"] for r in runs if not tasks[r].checkpoint)
    return {
        **claim.model_dump(
            include={
                "id",
                "group",
                "sentence",
                "hypothesis",
                "metric",
                "expect",
                "margin",
                "relative",
                "headline",
            }
        ),
        "unit": "%" if claim.relative else metric(claim.metric).unit,
        "terms": terms,
        "effect": found,
        "verdict": NOT_COMPARABLE if unequal else INCONCLUSIVE,
        "alone": NOT_COMPARABLE if unequal else hypothesis_verdict(found, claim.expect, claim.margin),
        "p_value": None if unequal else verdict_p(found, claim.expect, claim.margin),
        "means": {term: statistics.fmean(values[term].values()) for term in terms if values.get(term)},
        "equal": claim.equal,
        "axis": claim.axis,
        "unequal": unequal,
        "comparable": not unequal,
        "cost": {
            "runs": len(runs),
            "seconds": round(sum(seconds.get(r, 0.0) for r in runs), 1),
            "flops": flops,
        },
    }


def _differ(key: str, arms: list[str], budgets: dict[str, dict[str, list]]) -> str | None:
    """How the arms' values of a budget key differ, seed by seed; None if they do not. Checkpoints have none."""
    columns = {arm: budgets[arm][key] for arm in arms if budgets[arm][key][0] is not None}
    for row in zip(*columns.values()):
        low, high = min(row), max(row)
        same = low == high if key not in EQUAL_AFTER else high - low <= SAME * high
        if not same:
            return ", ".join(f"{arm} {value}" for arm, value in zip(columns, row))
    return None


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


def _shown(path: Path) -> str:
    """A file of the project by its path in it, any other by its own."""
    whole = path.resolve()
    return (
        str(whole.relative_to(PROJECT_ROOT)) if whole.is_relative_to(PROJECT_ROOT) else os.path.relpath(path)
    )


def write_results(results: dict[str, Any], root: Path) -> None:
    """results.json, results.parquet and bench.html in `root`."""
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
    table = pa.Table.from_pylist(rows, schema=schema)
    with replacing(root / "results.parquet", table.nbytes) as temporary:
        pq.write_table(table, temporary)
    build_bench_page(results, root / "bench.html")
