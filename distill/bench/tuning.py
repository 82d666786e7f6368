"""Fair arms: each is given the best of several learning rates, chosen on seeds and problems that no claim uses.

    distill bench recipes/claims.yaml --tune                   # the grid of rates; writes the file that `tuning` names
    bench, file = load_bench("recipes/claims.yaml"); apply_rates(bench)

Every arm of `tuning.arms` is trained with each of its rates on each tuning seed, and measured on the held-out split
that `tuning.set` names. The rate with the best mean is taken by the arm and those it serves, in every budget. A
best rate that is the first or the last of those tried may not be the best there is: it is called an edge, in the
file, on the console and beside every claim that rests on it.
"""

import statistics
from pathlib import Path
from typing import Any

from distill.bench.grid import Bench, Tuning
from distill.bench.metrics import metric
from distill.errors import UserError
from distill.storage import PROJECT_ROOT, find_file, hash_yaml, read_json

BUDGET = "tuning"
Choice = dict[str, Any]


def tuning_bench(bench: Bench) -> Bench:
    """The grid of learning rates as a bench of its own, with an arm `ARM=RATE` for each. Raises UserError without."""
    section = bench.tuning
    if section is None:
        raise UserError("--tune: this file has no section `tuning` that says which learning rates to try")
    arms = {name: arm.model_dump(exclude_defaults=True) for name, arm in bench.all_arms().items()}
    kept: dict[str, dict] = {}
    for name, tuned in section.arms.items():
        arm = bench.all_arms()[name]
        for rate in tuned.rates:
            own = {"like": name, "set": {**section.set, "train.learning_rate": rate}}
            kept[rate_name(name, rate)] = own | {k: v for k in ("start", "teacher") if (v := getattr(arm, k))}
    # What they start from or are taught by is made as it is in every budget; the rest does not belong here.
    order = {"budgets": {BUDGET: {"seeds": section.seeds}, "other": {"seeds": section.seeds}}}
    others = {name: {**arm, "budget": "other", "seeds": None} for name, arm in arms.items()}
    return Bench.model_validate(
        {
            "title": f"{bench.title}: learning rates",
            "run_dir": f"{bench.run_dir}/tuning",
            "recipe": bench.recipe,
            "set": bench.set,
            "first_seed": section.first_seed,
            "prepare": bench.prepare,
            "arms": {**others, **kept},
            **order,
        }
    )


def rate_name(arm: str, rate: float) -> str:
    return f"{arm}={rate:g}"


def choose(section: Tuning, values: dict[str, dict[int, float]]) -> dict[str, Choice]:
    """{arm: `metric`, `rates` with mean and value of every seed, `chosen`, `edge`, `serves`}.

    `values`: {"ARM=RATE@metric": {seed: value}}.
    """
    found = {}
    for arm, tuned in section.arms.items():
        by = section.metric_of(arm)
        tried = {}
        for rate in sorted(tuned.rates):
            by_seed = values[f"{rate_name(arm, rate)}@{by}"]
            tried[rate] = {
                "mean": statistics.fmean(by_seed.values()),
                "values": {str(seed): value for seed, value in by_seed.items()},
            }
        rates = {f"{rate:g}": of for rate, of in tried.items()}
        chosen = next(rate for rate in tried if f"{rate:g}" == _best(by, rates))
        found[arm] = {
            "metric": by,
            "rates": rates,
            "chosen": chosen,
            "edge": chosen in (min(tried), max(tried)),
            "serves": tuned.serves,
        }
    return found


def apply_rates(bench: Bench) -> dict[str, Any] | None:
    """Give the arms of `bench` the rates that were chosen; what the file says of them, None where nothing was tuned.

    Raises UserError for choices made among other rates, metrics or seeds than the section asks for today.
    """
    section = bench.tuning
    if section is None or not (path := find_file(section.results)).is_file():
        return None
    kept = read_json(path)
    tried = {arm: sorted(map(float, of["rates"])) for arm, of in kept["arms"].items()}
    asked = {arm: sorted(map(float, (f"{r:g}" for r in tuned.rates))) for arm, tuned in section.arms.items()}
    seeds = list(range(section.first_seed, section.first_seed + section.seeds))
    by = {arm: of["metric"] for arm, of in kept["arms"].items()}
    if tried != asked or by != {arm: section.metric_of(arm) for arm in asked} or kept["seeds"] != seeds:
        raise UserError(
            f"{section.results} was made for other learning rates, another metric or other seeds than `tuning` asks "
            "for; run `distill bench FILE --tune` again"
        )
    for arm, of in kept["arms"].items():
        if f"{of['chosen']:g}" != _best(of["metric"], of["rates"]):
            raise UserError(
                f"{section.results} is damaged: the rate chosen for {arm} is not the best of those in it; copy it "
                "again, or run `distill bench FILE --tune` again"
            )
        for name in (arm, *section.arms[arm].serves):
            bench.give_rate(name, of["chosen"])
    return kept


def _best(name: str, rates: dict[str, dict]) -> str:
    """The first of them, from the lowest on, that has the best mean of its seeds' values."""
    best = max if metric(name).unit == "%" else min
    return best(sorted(rates, key=float), key=lambda rate: statistics.fmean(rates[rate]["values"].values()))


def tuning_results(bench: Bench, file: Path, values: dict, about: dict[str, Any]) -> dict[str, Any]:
    """What is written to `tuning.results`."""
    section = bench.tuning
    whole = file.resolve()
    inside = whole.is_relative_to(PROJECT_ROOT)
    return {
        "bench": str(whole.relative_to(PROJECT_ROOT)) if inside else str(file),
        "recipe": hash_yaml(file),
        "seeds": list(range(section.first_seed, section.first_seed + section.seeds)),
        "arms": choose(section, values),
        **about,
    }


def tuning_text(found: dict[str, Any]) -> str:
    """A line per arm for people."""
    lines = []
    for arm, of in found["arms"].items():
        scale = 100 if metric(of["metric"]).unit == "%" else 1
        tried = ", ".join(f"{rate} {scale * at['mean']:.3g}" for rate, at in of["rates"].items())
        edge = " (an edge: the best may lie beyond; give more rates)" if of["edge"] else ""
        lines.append(f"  {arm:24} {of['chosen']:g}{edge}  ({of['metric']}: {tried})")
    return "\n".join(lines)


def edges(kept: dict[str, Any] | None, arms: list[str]) -> list[str]:
    """Of `arms`, those whose chosen rate is the first or the last that was tried."""
    if kept is None:
        return []
    at = {name for arm, of in kept["arms"].items() if of["edge"] for name in (arm, *of["serves"])}
    return [arm for arm in arms if arm in at]
