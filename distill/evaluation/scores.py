"""Scores from answer rows: of one model (accuracy, pass@k, lengths), and of several on the same problems.

    summarise(rows)["accuracy"]          # with n, standard error, interval, truncated, errors beside it
    by_problem(rows)                     # the rows of each problem together

A problem answered once is right or wrong, and the interval is Wilson's. Of one answered n times only the
share of right answers is known, the n answers are not independent, and every interval is a bootstrap that
draws whole problems (distill/evaluation/stats.py); k runs over 1, 2, 4, ... up to n.

Several models on the same problems are compared: who is better, and what was forgotten on the way.

    compare({"base": rows, "student": rows})      # every pair and task, `Comparison` of metrics.json
    forgetting(rows_of, base="base")              # of what the base solved, the share still solved

One rule for a verdict: BETTER or WORSE, by the sign of the difference, if the p-value, corrected for every
comparison in the file (Holm 1979), is below 1 - level; else INCONCLUSIVE. Problems answered once are compared
by McNemar's exact test with Tango's interval; problems answered several times by flipping the signs of the
per-problem differences, which is the same test with larger numbers, and a paired bootstrap. The bootstrap
interval stands beside either; it draws whole problems.
"""

from collections.abc import Callable
from typing import Any

from distill.evaluation.stats import (
    bootstrap_interval,
    holm,
    majority_at_k,
    mean_stderr,
    paired_comparison,
    pass_at_k,
    score,
    sign_flip_p,
    wilson_interval,
)

_RIGHT = "\0right"  # no answer is spelled like this: right ones are one vote, however they are written


def by_problem(rows: list[dict]) -> list[list[dict]]:
    """Rows in their order, those of one problem together; a problem begins at sample 0."""
    groups: list[list[dict]] = []
    for row in rows:
        if row["sample_idx"] == 0:
            groups.append([])
        groups[-1].append(row)
    return groups


def right(rows: list[dict]) -> list[int]:
    """Per problem, how many of its answers are correct."""
    return [sum(row["verdict"] == "correct" for row in group) for group in by_problem(rows)]


def summarise(rows: list[dict], seed: int = 0) -> dict[str, Any]:
    """One score of metrics.json (`TaskScore` in distill/evaluation/schema.py) from rows of equal samples."""
    groups = by_problem(rows)
    samples = len(groups[0]) if groups else 1
    found = _sampled(groups, samples, seed) if samples > 1 else _single(rows)
    verdicts = [row["verdict"] for row in rows]
    finished = [row for row, verdict in zip(rows, verdicts) if verdict not in ("truncated", "error")]
    thinking = _mean([row["thinking_tokens"] for row in rows])
    tokens = _mean([row["tokens"] for row in rows])
    return {
        **found,
        "samples": samples,
        "truncated": verdicts.count("truncated"),
        "no_answer": verdicts.count("no_answer"),
        "unparsed": sum(row["final"] is None for row in finished),
        "errors": verdicts.count("error"),
        "mean_tokens": tokens,
        "mean_thinking_tokens": thinking,
        "mean_answer_tokens": None if tokens is None else round(tokens - thinking, 2),
    }


def _mean(values: list[int]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None


def _single(rows: list[dict]) -> dict[str, Any]:
    base = score([row["verdict"] == "correct" for row in rows])
    return {**base, "interval": "wilson", "pass_at_k": {"1": base["accuracy"]}}


def _sampled(groups: list[list[dict]], samples: int, seed: int) -> dict[str, Any]:
    ks = [2**i for i in range(samples.bit_length())]
    counts = right([row for group in groups for row in group])
    passed = {k: [pass_at_k(samples, c, k) for c in counts] for k in ks}
    votes = [[_RIGHT if r["verdict"] == "correct" else r["final"] for r in group] for group in groups]
    elected = {k: [majority_at_k(vote, _RIGHT, k) for vote in votes] for k in ks}
    return {
        "n": len(groups),
        "accuracy": sum(passed[1]) / len(groups),
        "stderr": mean_stderr(passed[1]),
        "ci95": problem_interval(passed[1], seed),
        "interval": "bootstrap over problems",
        "pass_at_k": _per_k(passed, lambda values: sum(values) / len(values)),
        "pass_at_k_ci95": _per_k(passed, lambda values: problem_interval(values, seed)),
        "majority_at_k": _per_k(elected, lambda values: sum(values) / len(values)),
        "majority_at_k_ci95": _per_k(elected, lambda values: problem_interval(values, seed)),
    }


def _per_k(values: dict[int, list[float]], of: Callable) -> dict[str, Any]:
    return {str(k): of(v) for k, v in values.items()}


def problem_interval(values: list[float], seed: int = 0) -> list[float] | None:
    """95 % interval of the mean of per-problem values in 0 to 1, by bootstrap over problems.

    Where every problem has 0, or every one 1, resampling knows no doubt; Wilson's interval for that many
    independent problems stands in, which is the honest one.
    """
    if values and (set(values) == {0.0} or set(values) == {1.0}):
        return list(wilson_interval(int(sum(values)), len(values)))
    return bootstrap_interval(values, seed)


def names(rows: list[dict], key: str) -> list[str]:
    """Distinct values in order of difficulty where they are the embedded levels, else of first appearance."""
    found = list(dict.fromkeys(row[key] for row in rows))
    known = ["easy", "medium", "hard"]
    return sorted(found, key=lambda v: known.index(v) if v in known else len(known))


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
