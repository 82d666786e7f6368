"""Several models on the same problems: who is better, and what was forgotten on the way.

    compare({"base": rows, "student": rows})      # every pair and task, `Comparison` of metrics.json
    forgetting(rows_of, base="base")              # of what the base solved, the share still solved

One rule for a verdict: BETTER or WORSE, by the sign of the difference, if the p-value, corrected for every
comparison in the file (Holm 1979), is below 1 - level; else INCONCLUSIVE. Problems answered once are compared
by McNemar's exact test with Tango's interval; problems answered several times by flipping the signs of the
per-problem differences, which is the same test with larger numbers, and a paired bootstrap. The bootstrap
interval stands beside either; it draws whole problems.
"""

from typing import Any

from distill.clustered import bootstrap_interval, sign_flip_p
from distill.measure import names
from distill.stats import holm, paired_comparison, wilson_interval
from distill.summary import by_problem, problem_interval, right


def compare(rows_of: dict[str, list[dict]], level: float = 0.95, seed: int = 0) -> list[dict[str, Any]]:
    """Every pair of models on the same problems, per task; the verdict is about b.

    `difference` is accuracy of b minus accuracy of a. Raises UserError where two models answered different
    numbers of problems.
    """
    models = list(rows_of)
    found = []
    for i, a in enumerate(models):
        for b in models[i + 1 :]:
            for task in names(rows_of[a], "level"):
                both = [[r for r in rows_of[m] if r["level"] == task] for m in (a, b)]
                found.append({"a": a, "b": b, "task": task, **_pair(*both, seed)})
    for item, corrected in zip(found, holm([item["p_value"] for item in found])):
        item |= {
            "p_value_holm": corrected,
            "correction": "holm",
            "family_size": len(found),
            "level": level,
            "verdict": "INCONCLUSIVE",
        }
        if corrected is not None and corrected < 1 - level:
            item["verdict"] = "BETTER" if item["difference"] > 0 else "WORSE"
    return found


def _pair(rows_a: list[dict], rows_b: list[dict], seed: int) -> dict[str, Any]:
    samples = len(by_problem(rows_a)[0])
    a, b = right(rows_a), right(rows_b)
    # It refuses lists of different lengths, and judges its first argument against its second.
    once = paired_comparison([c > 0 for c in b], [c > 0 for c in a])
    differences = [y - x for x, y in zip(a, b)]
    resampled = bootstrap_interval([d / samples for d in differences], seed)
    shared = {"n": len(a), "bootstrap_ci95": resampled}
    if samples == 1:
        kept = {key: once[key] for key in ("difference", "ci95", "p_value")}
        return {**shared, **kept, "interval": "tango", "test": "mcnemar exact"}
    return {
        **shared,
        "difference": sum(differences) / samples / len(a),
        "ci95": resampled,
        "interval": "bootstrap over problems",
        "p_value": sign_flip_p(differences),
        "test": "sign flips over problems, exact",
    }


def forgetting(rows_of: dict[str, list[dict]], base: str, seed: int = 0) -> dict[str, Any]:
    """`Forgetting` of metrics.json for every model of `rows_of` but the base.

    A problem counts as solved by the base if at least half of its answers there are right. A model that is
    merely as good as the base, with errors of its own, also loses some of these problems and gains others:
    read `kept` beside `gained`.
    """
    found: dict[str, dict] = {}
    for name, rows in rows_of.items():
        if name == base:
            continue
        tasks = {task: {task} for task in names(rows, "level")}
        if len(tasks) > 1:
            tasks["all"] = set(tasks)
        found[name] = {
            task: _kept(*([r for r in rows_of[m] if r["level"] in levels] for m in (base, name)), seed)
            for task, levels in tasks.items()
        }
    return {"base": base, "models": found}


def _kept(base_rows: list[dict], rows: list[dict], seed: int) -> dict[str, Any]:
    samples = len(by_problem(rows)[0])
    solved = [2 * c >= samples for c in right(base_rows)]
    shares = [c / samples for c in right(rows)]
    old = [share for share, before in zip(shares, solved) if before]
    new = [share for share, before in zip(shares, solved) if not before]
    interval = wilson_interval(int(sum(old)), len(old)) if samples == 1 else problem_interval(old, seed)
    return {
        "n": len(old),
        "kept": sum(old) / len(old) if old else None,
        "ci95": None if interval is None else list(interval),
        "gained": sum(new) / len(new) if new else None,
        "gained_n": len(new),
    }
