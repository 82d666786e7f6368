"""The runs that a grid asks for: which there are, how long they will take, and at which learning rates.

The runs that a grid asks for: which recipe each is, what it needs first, what may be shared.

    bench, file = load_bench("recipes/claims.yaml")
    tasks = plan(bench, "small", file)               # in an order in which each finds what it needs

Four kinds of tasks: `base` (a student made from a model, `student.from`), `answers` (prompts and what a teacher says of
them), `rows` (the training set made of those) and `run` (training and measuring). Runs whose recipes agree on
everything that a teacher's answers depend on share them, and so with rows and bases: one generation serves all arms of
a seed. Nothing heavy is imported here.

How long a budget will take, before it begins: from the seconds of runs that were measured.

    forecast(bench, tasks, measured)      # {"work_minutes", "wall_minutes", "jobs", "from", "guessed"}

`measured` are committed results. Those of version 2 have the seconds of every arm (`arm_seconds`); an arm whose steps
changed is scaled. Version 1 kept training seconds and the price of a token, so what a run takes is put together: its
steps at the seconds of a step of its own arm (or of the arm it is like, or of `sequence`), its answers at the measured
tokens a second, worked solutions at a third of the training's time a token, and what a process needs to load. Put to
the two grids that those results are of, it says 78 and 162 minutes of work, and 77 and 154 were measured
(tests/bench/test_plan_forecast.py).

Fair arms: each is given the best of several learning rates, chosen on seeds and problems that no claim uses.

    distill bench recipes/claims.yaml --tune                   # the grid of rates; writes the file that `tuning` names
    bench, file = load_bench("recipes/claims.yaml"); apply_rates(bench)

Every arm of `tuning.arms` is trained with each of its rates on each tuning seed, and measured on the held-out split
that `tuning.set` names. The rate with the best mean is taken by the arm and those it serves, in every budget. A
best rate that is the first or the last of those tried may not be the best there is: it is called an edge, in the
file, on the console and beside every claim that rests on it.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.bench.claims import Claim
from distill.bench.grid import Arm, Bench, Tuning, arms_within
from distill.bench.metrics import MODEL, metric
from distill.config.recipe import BASE_FOLDER, Recipe, make_recipe, read_recipe
from distill.errors import UserError
from distill.storage import PROJECT_ROOT, find_file, fingerprint, hash_yaml, read_json

MADE = "student.from"  # as an arm's `checkpoint`: what the recipe makes its student from, before training
KNOWN_BEFORE = ("prompts", "steps", "rows")  # of distill.bench.claims.EQUAL: recipes settle these


@dataclass
class Task:
    kind: str  # "base", "answers", "rows" or "run"
    name: str
    folder: Path
    recipe: Recipe  # with run_dir = folder
    needs: list[str] = field(default_factory=list)
    arm: str = ""
    seed: int = 0
    rows: Path | None = None  # run: whose dataset it trains on; rows: whose answers it is made from
    checkpoint: str | None = None  # run: measured as it is
    merged: bool = False  # run: another run starts from its student
    probes: str | None = None


def plan(bench: Bench, budget: str, file: Path) -> dict[str, Task]:
    """{name: task} of a budget. Raises UserError for recipes that do not hold, or claims between unequal arms."""
    arms = arms_within(bench, budget)
    problems: list[str] = []
    tasks: dict[str, Task] = {}
    root = Path(bench.run_dir)
    wanted = {arm.start for arm in arms.values() if arm.start}
    for name, arm in arms.items():
        for seed in [bench.first_seed] if arm.once else bench.seeds_of(name, budget):
            try:
                run = _run(bench, name, arm, seed, root, arms, file)
            except UserError as error:
                problems += [f"arm {name}: {line}" for line in error.problems]
                break
            run.merged = name in wanted
            _made(run, root, tasks)
            if not arm.checkpoint:
                first = name
                while arms[first].start:
                    first = arms[first].start
                begun = run if first == name else _run(bench, first, arms[first], seed, root, arms, file)
                _made(begun, root, tasks)
                _share(run, begun, root, tasks, arms)
            tasks[run.name] = run
    if not problems:
        problems = [
            p for claim in bench.claims if bench.within(budget, claim) for p in _unequal(bench, claim, tasks)
        ]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return tasks


def run_name(arm: str, seed: int) -> str:
    return f"{arm}-{seed}"


def runs_of(bench: Bench, arm: str, seed: int, arms: dict[str, Arm]) -> str:
    """The run that stands for `arm` in `seed`: its own, or the one that serves all seeds."""
    return run_name(arm, bench.first_seed if arms[arm].once else seed)


def _run(bench: Bench, name: str, arm: Arm, seed: int, root: Path, arms: dict[str, Arm], file: Path) -> Task:
    changes = {**bench.set, **bench.changes(name)}
    needs, folder = [], root / run_name(name, seed)
    if arm.start:
        needs.append(runs_of(bench, arm.start, seed, arms))
        changes["student.model"] = str(root / needs[-1] / "start")
    if arm.teacher:
        needs.append(runs_of(bench, arm.teacher, seed, arms))
        changes["teacher.model"] = str(root / needs[-1] / "student")
    if arm.teachers:
        made = {tag: runs_of(bench, other, seed, arms) for tag, other in arm.teachers.items()}
        needs += dict.fromkeys(made.values())
        places = {tag: str(root / run / "student") for tag, run in made.items()}
        changes["train.teachers.models"] = places
        if arm.averaged:
            first, *others = dict.fromkeys(places.values())
            changes |= {"student.from": {"model": first, "average": others}, "student.model": None}
            changes.pop("train.teachers.models")
    if arm.checkpoint and arm.checkpoint != MADE:
        changes |= {"student.model": arm.checkpoint, "student.config": None, "student.from": None}
    fixed = {"run_dir": str(folder), "seed": seed + arm.seed_offset, "control.enabled": False}
    if "teacher" not in changes.get("evaluate.models", ()):
        fixed["evaluate.models"] = [MODEL]
    if isinstance(bench.recipe, str):
        where, data = read_recipe(bench.recipe)
    else:
        where, data = file, json.loads(json.dumps(bench.recipe))
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**changes, **fixed}.items()]
    recipe = make_recipe(data, overrides, where)
    return Task(
        "run", folder.name, folder, recipe, needs, name, seed, checkpoint=arm.checkpoint, probes=arm.probes
    )


def _made(run: Task, root: Path, tasks: dict[str, Task]) -> None:
    """A student that is made from a model is made once, for all runs that start from the same."""
    student = run.recipe.student
    if student.made_from is None:
        return
    made = run.recipe.base_identity
    key = fingerprint([made if len(made) > 1 else made["from"], student.chat_template_kwargs])
    name = f"base-{key[:12]}"
    folder = root / "shared" / name
    base = student.model_copy(update={"model": str(folder / BASE_FOLDER)})
    if name not in tasks:
        recipe = run.recipe.model_copy(update={"run_dir": str(folder), "student": base})
        tasks[name] = Task("base", name, folder, recipe, list(run.needs))
    run.recipe = run.recipe.model_copy(update={"student": base.model_copy(update={"made_from": None})})
    run.needs = [*run.needs, name]
    if run.checkpoint == MADE:
        run.checkpoint = base.model


def _share(run: Task, begun: Task, root: Path, tasks: dict[str, Task], arms: dict[str, Arm]) -> None:
    """The tasks that make the run's training set, new ones where no other run has asked for the same.

    `begun`: the run that this one's chain of `start` begins with. Rows are in its student's tokenizer, and that student
    is there before anything has been trained.
    """
    recipe, origin = run.recipe, begun.recipe.student
    made_bases = [need for need in begun.needs if need in tasks and tasks[need].kind == "base"]
    whole: dict[str, Any] = {
        "prompts": recipe.prompts.identity(),
        "seed": recipe.seed,
        "teacher": recipe.teacher.identity() if recipe.teacher else None,
        "generate": recipe.generate.identity() if recipe.teacher else None,
    }
    if recipe.generate.by_tag:
        whole["teachers"] = recipe.train.teachers.models
    arm = arms[run.arm]
    teachers = {arm.teacher, *(arm.teachers.values() if recipe.generate.by_tag else ())} - {None}
    taught = [need for need in run.needs if need.rpartition("-")[0] in teachers]
    answers = _shared("answers", fingerprint(whole), run, root, tasks, taught)
    tokenizer = origin.model or origin.tokenizer
    made = {**whole, "filter": recipe.filter.model_dump(mode="json"), "tokenizer": tokenizer}
    if recipe.evaluate.source or recipe.filter.decontaminate:
        made["held_out"] = recipe.evaluate.model_dump(mode="json")
    rows = _shared("rows", fingerprint(made), run, root, tasks, [answers.name, *made_bases])
    rows.recipe = rows.recipe.model_copy(update={"student": origin})
    rows.rows = answers.folder
    run.rows = rows.folder
    run.needs = [*run.needs, rows.name]


def _shared(kind: str, key: str, run: Task, root: Path, tasks: dict[str, Task], needs: list[str]) -> Task:
    name = f"{kind}-{key[:12]}"
    if name not in tasks:
        folder = root / "shared" / name
        recipe = run.recipe.model_copy(update={"run_dir": str(folder)})
        tasks[name] = Task(kind, name, folder, recipe, needs)
    return tasks[name]


def _unequal(bench: Bench, claim: Claim, tasks: dict[str, Task]) -> list[str]:
    """What the arms of a claim should have in common and their recipes say they do not."""
    arms = dict.fromkeys(term.partition("@")[0] for term in claim.terms(bench.factorial))
    first = [next((t for t in tasks.values() if t.arm == arm), None) for arm in arms]
    trained = [task for task in first if task is not None and not task.checkpoint]
    problems = []
    for key in (key for key in claim.equal if key in KNOWN_BEFORE):
        values = {task.arm: known_budget(task)[key] for task in trained}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{arm} {value}" for arm, value in values.items())
            problems.append(
                f"claim {claim.id}: arms differ in {key} ({shown}), so the comparison is not of the technique alone; "
                f"make them equal, or take {key} out of `equal` and say in `axis` what is held equal instead"
            )
    return problems


def known_budget(task: Task) -> dict[str, Any]:
    """What a recipe settles of a run's budget: which prompts (a fingerprint), steps, rows of all steps."""
    train = task.recipe.train
    # The worked solutions of the embedded tasks are another text for the same prompts.
    prompts = task.recipe.prompts.identity(exclude={"solutions"})
    return {
        "prompts": fingerprint([prompts, task.seed])[:8],
        "steps": train.steps,
        "rows": train.steps * train.batch_size,
    }


# ==== How long a budget will take, before it begins ====

RESULTS = PROJECT_ROOT / "recipes" / "results"
LOAD = 1.5  # seconds of a run that are neither training nor answering
GENERATED = 24.0  # seconds in which the embedded teacher answers 2,000 questions on one thread
PROBES = 5.0  # seconds of the probes of flaws
MADE_OF = 1.6  # seconds in which a student is made of a model: the mean of 66, of the embedded pair
CROWDED = 1.05  # work shared by as many processes as cores takes a little longer than its part
# Of a task in version 1, in tokens: an answer where nobody measured one, prompt and worked solution together.
ANSWER, SOLUTION = 30.0, 75.0
SPEED = 5000.0  # tokens a second, decoded


def known_results(bench_name: str) -> tuple[dict[str, Any], str] | None:
    """(results, file) of the largest committed grid of a bench file; None if there is none."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        results = read_json(path)
        known = isinstance(results, dict) and results.get("bench") == bench_name
        if known and "arms" in results and "claims" in results:
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
    if task.kind == "base":
        return MADE_OF
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
    if wider or "sequence" in known:
        return wider[0] if wider else "sequence"
    # Nothing says what it is like: a trained arm in the middle of those that were measured.
    trained = [other for other in known if "train.steps" in known[other]["metrics"]] or list(known)
    return sorted(trained, key=lambda other: _mean(known[other], "train.seconds"))[len(trained) // 2]


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


# ==== Fair arms ====

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
