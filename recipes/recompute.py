"""Every number of a grid's table worked out again, by code that shares nothing with the toolkit.

    python recipes/recompute.py recipes/results/claims-full.json recipes/results/claims-full-items.parquet
    python recipes/recompute.py checkpoints/claims/results.json checkpoints/claims/items.parquet

It imports numpy, scipy and pyarrow, and nothing of `distill`. From the single answers come the values of every arm and
seed; from those the effects, intervals, p-values, corrections and verdicts; from those the words of the table. What
differs from the file is printed, and the exit status is then 1. With `--page docs/claims.md` the effects must also
stand on that page. The rules are those that docs/claims.md states in words:

- an effect is a contrast within each seed; its interval is Student's over seeds, relative effects as logarithms;
- where that of counted shares has no width or leaves the possible, the standard error is at least
  sqrt(sum w^2 q (1 - q) / (n + 2)) with q = (right + 1) / (n + 2) over all seeds, and the interval at least that of
  Wilson's bounds put together;
- greater, less: two-sided against the margin; within: two one-sided tests; both after Holm in the claim's family;
- a directional claim that is not decided is EQUIVALENT where two one-sided tests at its trivial size are, after Holm.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pyarrow.parquet as pq
from scipy import optimize, stats

NEAR = 1e-9
Z = stats.norm.ppf(0.975)


class Checks:
    """Counts comparisons and keeps those that failed."""

    def __init__(self):
        self.done, self.wrong = 0, []

    def same(self, where, mine, theirs, near=NEAR):
        self.done += 1
        if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(mine) == len(theirs):
            for a, b in zip(mine, theirs):
                self.same(where, a, b, near)
        elif isinstance(mine, float) and isinstance(theirs, (int, float)):
            if not math.isclose(mine, theirs, rel_tol=near, abs_tol=near):
                self.wrong.append(f"{where}: {theirs!r} in the file, {mine!r} here")
        elif mine != theirs:
            self.wrong.append(f"{where}: {theirs!r} in the file, {mine!r} here")


# ------------------------------------------------------------------------------------------- single answers


def read_answers(path):
    """{(arm, seed, kind): {"item", "right", "nats", "tokens"}}, items in order."""
    table = pq.read_table(path)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    found = defaultdict(list)
    for arm, seed, kind, item, right, nats, tokens in zip(
        *(columns[k] for k in ("arm", "seed", "kind", "item", "right", "nats", "nats_tokens"))
    ):
        found[arm, seed, kind].append((item, right, nats, tokens))
    return {key: sorted(rows) for key, rows in found.items()}


def values_of(answers):
    """{(arm, metric): {seed: value}} that follow from single answers, and {..: {seed: (right, n)}}."""
    values, counts = defaultdict(dict), defaultdict(dict)
    levels = defaultdict(list)
    for (arm, seed, kind), rows in answers.items():
        right = sum(row[1] for row in rows)
        flaw = kind.startswith("flaw.")
        name = kind if flaw else f"accuracy.{kind}"
        values[arm, name][seed], counts[arm, name][seed] = right / len(rows), (right, len(rows))
        if not flaw:
            levels[arm, seed].append(right / len(rows))
        read = [row for row in rows if row[2] is not None]
        if read:
            values[arm, f"nll.{kind}"][seed] = sum(r[2] for r in read) / sum(r[3] for r in read)
    for (arm, seed), shares in levels.items():
        values[arm, "accuracy.mean"][seed] = fmean(shares)
    return values, counts


# ------------------------------------------------------------------------------------------------ one effect


def wilson(right, n):
    centre = (right + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * math.sqrt(right * (n - right) / n + Z**2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def contrast(terms, values, seeds, relative=False, share=False, counts=None):
    """What `effect` of a claim should be."""
    base = next((t for t, w in terms.items() if w == -1), None) if relative else None
    seeds = [s for s in seeds if all(s in values.get(t, {}) for t in terms)]
    each = {}
    for seed in seeds:
        total = math.fsum(w * values[t][seed] for t, w in terms.items())
        each[seed] = total / values[base][seed] if relative else total
    found = {"n": len(seeds), "per_seed": each, "mean": None, "ci95": None, "p_value": None}
    if not seeds:
        return found
    log = relative and all(v > -1 for v in each.values())
    sample = [math.log1p(v) if log else v for v in each.values()]
    back = math.expm1 if log else float
    mean = fmean(sample)
    found |= {"mean": back(mean), "log": log, "at": mean}
    if len(sample) < 2:
        return found
    df = len(sample) - 1
    error = stdev(sample) / math.sqrt(len(sample))
    low, high = (mean + side * stats.t.ppf(0.975, df) * error for side in (-1, 1))
    least, most = (math.fsum(w for w in terms.values() if side * w > 0) for side in (-1, 1))
    if share and (low == high or low < least or high > most):
        if counts and all(t in counts for t in terms):
            below = above = floor = 0.0
            for t, w in terms.items():
                right, n = (sum(counts[t][s][i] for s in seeds) for i in (0, 1))
                down, up = wilson(right, n)
                p, q = right / n, (right + 1) / (n + 2)
                below += (w * (p - down if w > 0 else up - p)) ** 2
                above += (w * (up - p if w > 0 else p - down)) ** 2
                floor += w * w * q * (1 - q) / (n + 2)
            error = max(error, math.sqrt(floor))
            half = stats.t.ppf(0.975, df) * error
            low = min(low, mean - half, mean - math.sqrt(below))
            high = max(high, mean + half, mean + math.sqrt(above))
        low, high = max(low, least), min(high, most)
    found |= {"ci95": [back(low), back(high)], "error": error, "df": df}
    found["p_value"] = two_sided(found, 0.0)
    return found


def upper(found, bound):
    """One-sided p that the effect is not above `bound` of the effect's own unit."""
    at = math.log1p(bound) if found["log"] else bound
    if found["error"] == 0:
        return 0.5 if found["at"] == at else float(found["at"] < at)
    return float(stats.t.sf((found["at"] - at) / found["error"], found["df"]))


def lower(found, bound):
    at = math.log1p(bound) if found["log"] else bound
    if found["error"] == 0:
        return 0.5 if found["at"] == at else float(found["at"] > at)
    return float(stats.t.cdf((found["at"] - at) / found["error"], found["df"]))


def two_sided(found, bound):
    return min(1.0, 2 * min(upper(found, bound), lower(found, bound)))


def tost(found, margin):
    return max(upper(found, -margin), lower(found, margin))


def p_of(found, expect, margin):
    if found["ci95"] is None or found["n"] < 3:
        return None
    if expect == "within":
        inside = abs(found["mean"]) < margin
        return tost(found, margin) if inside else two_sided(found, math.copysign(margin, found["mean"]))
    return two_sided(found, margin if expect == "greater" else -margin)


def verdict_of(found, expect, margin, p, trivial_p):
    if found["ci95"] is None or found["n"] < 3 or p is None:
        return "INCONCLUSIVE"
    low, high = found["ci95"]
    if p < 0.05:
        if expect == "within":
            if abs(found["mean"]) < margin:
                return "EQUIVALENT"
            if low > margin or high < -margin:
                return "NOT SUPPORTED"
        else:
            low, high = (low, high) if expect == "greater" else (-high, -low)
            if low > margin:
                return "SUPPORTED"
            if high < margin:
                return "NOT SUPPORTED"
    return "EQUIVALENT" if trivial_p is not None and trivial_p < 0.05 else "INCONCLUSIVE"


def holm(ps):
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    out, worst = [None] * len(ps), 0.0
    for rank, (p, i) in enumerate(order):
        worst = max(worst, min(1.0, p * (len(order) - rank)))
        out[i] = worst
    return out


def reach_of(found, expect, margin, level):
    """The effect that is found four times in five."""
    if found["ci95"] is None or found["n"] < 3:
        return None
    back = math.expm1 if found["log"] else float
    df, error = found["df"], found["error"]
    if expect == "within":
        return back(error * (stats.t.ppf(1 - level, df) + stats.t.ppf(0.9, df)))
    edge = stats.t.ppf(1 - level / 2, df)
    shift = optimize.brentq(lambda d: stats.nct.sf(edge, df, d) - 0.8, 0.0, 10 * edge + 20)
    return back((math.log1p(margin) if found["log"] else margin) + shift * error)


# ------------------------------------------------------------------------------------------- the whole table


def paired_noise(terms, answers, seeds):
    """(n, standard error) of the mean effect from the choice of problems alone; None where it is not defined."""
    variance, n = 0.0, 0
    for seed in seeds:
        total, first = 0.0, None
        for term, weight in terms.items():
            arm, metric = term.split("@", 1)
            kind = metric if metric.startswith("flaw.") else metric.partition(".")[2]
            rows = answers.get((arm, seed, kind))
            if rows is None or metric.partition(".")[0] not in ("flaw", "accuracy", "nll"):
                return None
            if metric.startswith("nll."):
                rows = [r for r in rows if r[2] is not None]
                x = np.array([r[2] for r in rows]) / np.mean([r[3] for r in rows]) if rows else np.array([])
            else:
                x = np.array([float(r[1]) for r in rows])
            items = [r[0] for r in rows]
            if len(items) < 2 or (first is not None and items != first):
                return None
            first, total = items, total + weight * x
        variance += float(np.var(total, ddof=1)) / len(first)
        n += len(first)
    return (n, math.sqrt(variance) / len(seeds)) if seeds else None


def check_effect(checks, where, mine, theirs):
    checks.same(f"{where} n", mine["n"], theirs["n"])
    for seed, value in mine["per_seed"].items():
        checks.same(f"{where} seed {seed}", value, theirs["per_seed"][str(seed)])
    for key in ("mean", "ci95", "p_value"):
        checks.same(f"{where} {key}", mine[key], theirs[key], 1e-7)


def check_claims(checks, results, values, counts, answers, shares):
    by_family = defaultdict(list)
    for claim in results["claims"]:
        terms, seeds = claim["terms"], claim["seeds"]
        share = not claim["relative"] and all(t.split("@", 1)[1] in shares for t in terms)
        found = contrast(terms, values, seeds, claim["relative"], share, counts)
        where = f"claim {claim['id']}"
        check_effect(checks, where, found, claim["effect"])
        expect, margin, trivial = claim["expect"], claim["margin"], claim["trivial"]
        compared = claim["comparable"]
        p = p_of(found, expect, margin) if compared else None
        trivial_p = tost(found, trivial) if compared and trivial and p is not None else None
        checks.same(f"{where} p", p, claim["p_value"], 1e-6)
        checks.same(f"{where} p of equivalence", trivial_p, claim["p_value_equivalent"], 1e-6)
        alone = verdict_of(found, expect, margin, p, trivial_p) if compared else "NOT COMPARABLE"
        checks.same(f"{where} alone", alone, claim["alone"])
        for term, mean in claim["means"].items():
            mine = fmean(values[term][s] for s in seeds if s in values[term])
            checks.same(f"{where} mean of {term}", mine, mean)
        if claim["second"]:
            second = claim["second"]
            share = all(t.split("@", 1)[1] in shares for t in second["terms"])
            beside = contrast(second["terms"], values, seeds, False, share, counts)
            check_effect(checks, f"{where} second", beside, second["effect"])
        noise = paired_noise(terms, answers, seeds)
        checks.same(f"{where} items", noise is not None, claim["items"] is not None)
        if noise and claim["items"]:
            checks.same(f"{where} items", noise, (claim["items"]["n"], claim["items"]["stderr"]), 1e-5)
        by_family[claim["family"]].append((claim, found, p, trivial_p))
    for family, members in by_family.items():
        level = 0.05 / max(1, sum(m[2] is not None for m in members))
        corrected = zip(members, holm([m[2] for m in members]), holm([m[3] for m in members]))
        for (claim, found, *_), p_family, trivial_family in corrected:
            where, expect, margin = f"claim {claim['id']}", claim["expect"], claim["margin"]
            checks.same(f"{where} in {family}", p_family, claim["p_value_holm"], 1e-6)
            if claim["comparable"]:
                verdict = verdict_of(found, expect, margin, p_family, trivial_family)
                checks.same(f"{where} verdict", verdict, claim["verdict"])
                checks.same(
                    f"{where} detectable", reach_of(found, expect, margin, level), claim["detectable"], 1e-5
                )


def check_controls(checks, results, values, counts, answers):
    controls = results["controls"]
    if not controls:
        return
    share = controls["unit"] == "%"
    for number, null in enumerate(controls["nulls"]):
        term, known = f"{null['arm']}@{controls['metric']}", None
        if null["halves"] == "seeds":
            halves = {h: {i: values[term][s] for i, s in enumerate(null[h])} for h in "ab"}
            known = (
                {h: {i: counts[term][s] for i, s in enumerate(null[h])} for h in "ab"}
                if term in counts
                else None
            )
            checks.same(f"null {number}: halves share a seed", set(null["a"]) & set(null["b"]), set())
        else:
            halves, known = halved_problems(results, controls, null, number, answers)
        found = contrast({"a": 1, "b": -1}, halves, sorted(halves["a"]), False, share, known)
        check_effect(checks, f"null {number}", found, null["effect"])
        p = p_of(found, "greater", 0.0)
        checks.same(f"null {number}", verdict_of(found, "greater", 0.0, p, None), null["verdict"])
    called = sum(null["verdict"] in ("SUPPORTED", "NOT SUPPORTED") for null in controls["nulls"])
    checks.same("nulls called", called, controls["called"])
    if controls["nulls"]:
        checks.same("nulls called, interval", wilson(called, len(controls["nulls"])), controls["called_ci95"])
    reach = []
    for dose in controls["doses"]:
        seeds = sorted(int(s) for s in dose["effect"]["per_seed"])
        found = contrast(dose["terms"], values, seeds, False, share, counts)
        check_effect(checks, f"dose {dose['arm']}", found, dose["effect"])
        p = p_of(found, dose["expect"], 0.0)
        checks.same(f"dose {dose['arm']}", verdict_of(found, dose["expect"], 0.0, p, None), dose["verdict"])
        reach.append(reach_of(found, dose["expect"], 0.0, 0.05))
        checks.same(f"dose {dose['arm']} detectable", reach[-1], dose["detectable"], 1e-5)
    known = [r for r in reach if r is not None]
    checks.same("detection limit", max(known) if known else None, controls["limit"]["effect"], 1e-5)


def halved_problems(results, controls, null, number, answers):
    """The draw of a null over problems: a permutation of each seed's problems, from (seed of the controls, number)."""
    rng = np.random.default_rng([controls.get("seed", 0), number])
    kind = controls["metric"].partition(".")[2]
    seeds = sorted(int(s) for s in results["arms"][null["arm"]]["metrics"][controls["metric"]]["values"])
    halves, known = {"a": {}, "b": {}}, {"a": {}, "b": {}}
    for seed in seeds:
        rows = answers[null["arm"], seed, kind]
        if controls["metric"].startswith("nll."):
            rows = [r for r in rows if r[2] is not None]
            x = np.array([r[2] for r in rows]) / np.mean([r[3] for r in rows])
        else:
            x = np.array([float(r[1]) for r in rows])
        order, half = rng.permutation(len(x)), len(x) // 2
        for name, own in (("a", order[:half]), ("b", order[half : 2 * half])):
            halves[name][seed] = float(x[own].mean())
            known[name][seed] = (round(float(x[own].sum())), half)
    return halves, known


def words(value, unit, sign=False):
    """A number as the tables write it."""
    scaled = 100 * value if unit == "%" else value
    if unit == "nats/token":
        return f"{value:{'+' if sign else ''}.3f}"
    size = abs(scaled)
    digits = 1 if size >= 1 or size == 0 else 2 if size >= 0.1 else 3 if size >= 0.01 else 4
    return f"{scaled:{'+' if sign else ''}.{digits}f}"


def shown(claim):
    """The effect of a row of the table: `+20.8 [19.3, 22.3]`; None for sizes that are written with a prefix."""
    effect, unit = claim["effect"], claim["unit"]
    if effect["ci95"] is None or (unit != "%" and abs(effect["mean"]) >= 10_000):
        return None
    low, high = (words(bound, unit) for bound in effect["ci95"])
    return f"{words(effect['mean'], unit, True)} [{low}, {high}]".replace("-", "−")


def recompute(results, answers):
    """A `Checks` of the whole file."""
    checks = Checks()
    mine, counted = values_of(answers)
    values = {}
    for arm, about in results["arms"].items():
        for metric, summary in about["metrics"].items():
            theirs = {int(seed): value for seed, value in summary["values"].items()}
            values[f"{arm}@{metric}"] = theirs
            checks.same(f"{arm} {metric} mean", fmean(theirs.values()), summary["mean"])
            sd = stdev(theirs.values()) if len(theirs) > 1 else None
            checks.same(f"{arm} {metric} sd", sd, summary["sd"])
            for seed, value in mine.get((arm, metric), {}).items():
                checks.same(f"{arm} {metric} seed {seed}", float(value), theirs[seed], 1e-5)
    counts = {f"{arm}@{metric}": by_seed for (arm, metric), by_seed in counted.items()}
    shares = {term.split("@", 1)[1] for term in values if _share(term.split("@", 1)[1])}
    check_claims(checks, results, values, counts, answers, shares)
    check_controls(checks, results, values, counts, answers)
    for fact in results["facts"]:
        base = next((t for t, w in fact["terms"].items() if w == -1), None) if fact["relative"] else None
        seeds = set.intersection(*(set(values[t]) for t in fact["terms"]))
        each = [math.fsum(w * values[t][s] for t, w in fact["terms"].items()) for s in sorted(seeds)]
        each = [x / values[base][s] for x, s in zip(each, sorted(seeds))] if base else each
        checks.same(f"fact {fact['id']}", [fmean(each), min(each), max(each)], [fact["mean"], *fact["range"]])
    return checks


def _share(metric):
    return ".accuracy." in f".{metric}" or metric.startswith("flaw.") or metric == "moe.family_spread"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results")
    parser.add_argument("items")
    parser.add_argument("--page", help="a page on which every effect must stand as computed here")
    arguments = parser.parse_args()
    results = json.loads(Path(arguments.results).read_text(encoding="utf-8"))
    checks = recompute(results, read_answers(arguments.items))
    page = Path(arguments.page).read_text(encoding="utf-8") if arguments.page else None
    for claim in results["claims"]:
        text = shown(claim)
        print(f"{claim['verdict']:14} {claim['id']:26} {text or claim['effect']['mean']}")
        if page is not None and text and text not in page:
            checks.wrong.append(f"claim {claim['id']}: {text} does not stand on {arguments.page}")
    for line in checks.wrong:
        print(line)
    print(f"{checks.done} numbers worked out again, {len(checks.wrong)} differ")
    return 1 if checks.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
