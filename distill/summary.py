"""Scores of one model from its answer rows: accuracy, pass@k, majority votes, lengths, and what went wrong.

    summarise(rows)["accuracy"]          # with n, standard error, interval, truncated, errors beside it
    by_problem(rows)                     # the rows of each problem together

A problem answered once is right or wrong, and the interval is Wilson's. Of one answered n times only the
share of right answers is known, the n answers are not independent, and every interval is a bootstrap that
draws whole problems (distill/clustered.py); k runs over 1, 2, 4, ... up to n.
"""

from collections.abc import Callable
from typing import Any

from distill.clustered import bootstrap_interval, mean_stderr
from distill.stats import majority_at_k, pass_at_k, score, wilson_interval

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
    """One score of metrics.json (`TaskScore` in distill/metrics_schema.py) from rows of equal samples."""
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
