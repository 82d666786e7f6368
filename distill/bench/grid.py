"""Bench recipes: one page of arms, budgets and claims over an ordinary recipe. Typed, every problem at once.

A bench file is told from a recipe by its key `arms`. Its runs are ordinary recipes: the file named by `recipe`
(or written in place), changed by `set` of the bench and of the arm. See recipes/claims.yaml, the reference of
all keys in docs/recipes.md, and distill/bench/run.py for what is done with them.

From it follow the runs it asks for: which recipe each is, what it needs first, what may be shared.

    bench, file = load_bench("recipes/claims.yaml")
    tasks = plan(bench, "small", file)               # in an order in which each finds what it needs

Three kinds of tasks: `answers` (prompts and what a teacher says of them), `rows` (the training set made of
those) and `run` (training and measuring). Runs whose recipes agree on everything that a teacher's answers depend
on share them, and so with rows: one generation serves all arms of a seed. Nothing heavy is imported here.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from distill.bench.metrics import METRICS, MODEL, is_metric
from distill.bench.verdicts import factorial_contrasts
from distill.config.recipe import Recipe, explain_error, make_recipe, read_recipe
from distill.config.section import Count, Section
from distill.config.training import StudentSection
from distill.errors import UserError, nearest
from distill.storage import fingerprint

ArmName = Annotated[str, Field(pattern=r"^[\w.+=,-]+$")]


# What two arms can have in common; the first three are known before the run.
EQUAL = ("prompts", "steps", "rows", "tokens", "tokens_read", "flops")


class Budget(Section):
    """How much of the grid is run. A larger budget contains the smaller one: its finished runs are kept."""

    seeds: Count = Field(3, description="seeds 0 to n - 1 of every arm that belongs to this budget")


class Prepared(Section):
    """Files made before the first run."""

    flaws: str = Field(description="folder for the questions, flaws and probes of distill/tasks/flaws.py")


class Arm(Section):
    """One way to make a student; every seed of it is an ordinary run folder."""

    about: str = Field("", description="what differs, in words")
    like: ArmName | None = Field(None, description="start from the `set` of this arm")
    set: dict[str, Any] = Field({}, description="keys of the recipe, as {train.steps: 100}")
    start: ArmName | None = Field(
        None, description="the student starts where this arm's ended (same seed, adapter merged)"
    )
    teacher: ArmName | None = Field(None, description="the teacher is what this arm's training made")
    checkpoint: str | None = Field(None, description="measure this model as it is; nothing is trained")
    once: bool = Field(False, description="one run, of seed 0, for all seeds")
    seeds: Count | None = Field(None, description="at most so many seeds, whatever the budget")
    seed_offset: Annotated[int, Field(ge=0)] = Field(
        0, description="added to the seed: the same recipe again"
    )
    budget: ArmName | None = Field(None, description="belongs to this budget and larger ones; empty: to all")
    probes: str | None = Field(
        None, description="'embedded' or a JSONL file: how often the student shows each flaw"
    )


class Factorial(Section):
    """All combinations of two-level factors as arms named by their levels, as `distil+moe+bf16+lora`."""

    factors: dict[str, dict[ArmName, dict[str, Any]]] = Field(
        description="factor: {level on: changes, level off: changes}; `start` names an arm among the changes"
    )
    set: dict[str, Any] = Field({}, description="keys of the recipe for all its arms")
    seeds: Count | None = Field(None, description="at most so many seeds, whatever the budget")
    budget: ArmName | None = Field(None, description="belongs to this budget and larger ones; empty: to all")

    @model_validator(mode="after")
    def _two_levels(self):
        for name, levels in self.factors.items():
            if len(levels) != 2:
                raise ValueError(
                    f"factor {name} has {len(levels)} levels, and a factorial here needs two: on, off"
                )
        return self

    def arms(self) -> dict[str, Arm]:
        from itertools import product

        found = {}
        for cell in product(*(levels.items() for levels in self.factors.values())):
            changes = {key: value for _, level in cell for key, value in level.items()}
            start = next((changes.pop(key) for key in ("start",) if key in changes), None)
            about = ", ".join(level for level, _ in cell)
            name = "+".join(level for level, _ in cell)
            found[name] = Arm(
                about=about, set={**self.set, **changes}, start=start, seeds=self.seeds, budget=self.budget
            )
        return found

    def contrasts(self) -> dict[str, dict[str, float]]:
        """{effect: {arm: weight}}, see distill.bench.verdicts.factorial_contrasts."""
        levels = {name: list(of) for name, of in self.factors.items()}
        return {
            name: {"+".join(cell): weight for cell, weight in cells.items()}
            for name, cells in factorial_contrasts(levels).items()
        }


class Claim(Section):
    """A sentence, the hypothesis it implies here, and which difference between arms decides."""

    id: ArmName = Field(description="its name in results and on the page")
    group: str = Field("", description="heading under which the table shows it")
    sentence: str = Field(description="what the article says")
    hypothesis: str = Field(description="what that means for these arms; written before the run")
    metric: str = Field(description="what is compared; distill/bench/metrics.py has the names")
    effect: dict[str, float] = Field(
        {}, description="arm: weight, as {student: 1, control: -1}; arm@metric takes another metric"
    )
    factorial: str | None = Field(
        None, description="or an effect of the factorial: a factor, 'a x b', synergy"
    )
    relative: bool = Field(False, description="divide by the arm of weight -1")
    expect: Literal["greater", "less", "within"] = Field(
        description="the effect is above 0, below 0, or within +-margin"
    )
    margin: Annotated[float, Field(ge=0)] = Field(
        0.0, description="in the metric's unit; a share if relative"
    )
    equal: list[Literal[EQUAL]] = Field(
        ["prompts", "steps"], description="what the arms must have in common: checked, and shown"
    )
    headline: bool = Field(False, description="shown in the README's table")
    axis: str = Field("", description="where arms differ in budget on purpose: what is held equal instead")
    budget: ArmName | None = Field(None, description="belongs to this budget and larger ones; empty: to all")

    @model_validator(mode="after")
    def _one_way(self):
        if bool(self.effect) == bool(self.factorial):
            raise ValueError("give either `effect` (arm: weight) or `factorial` (the name of an effect)")
        if self.relative and sum(w == -1 for w in self.effect.values()) != 1:
            raise ValueError("`relative` needs one arm of weight -1 in `effect`, to divide by")
        if self.expect == "within" and not self.margin:
            raise ValueError("`expect: within` needs a `margin`")
        for metric in [self.metric, *(t.partition("@")[2] for t in self.effect if "@" in t)]:
            if not is_metric(metric):
                raise ValueError(f"unknown metric '{metric}'{nearest(metric, METRICS)}")
        if not self.equal and not self.axis:
            raise ValueError("arms that need nothing in common are compared on an axis: say which in `axis`")
        return self

    def terms(self, factorial: Factorial | None) -> dict[str, float]:
        """{arm@metric: weight}."""
        weights = factorial.contrasts()[self.factorial] if self.factorial else self.effect
        return {t if "@" in t else f"{t}@{self.metric}": weight for t, weight in weights.items()}


class Curve(Section):
    """A figure of the page: one metric against another, a line of arms per series."""

    title: str = Field(description="of the figure")
    x: str = Field(description="metric along the bottom; distill/bench/metrics.py has the names")
    y: str = Field(description="metric up the side")
    series: dict[str, list[str]] = Field(
        description="label: arms in order; arm@kN takes both metrics with N experts per token"
    )
    log_x: bool = Field(False, description="logarithmic x")
    fit: bool = Field(False, description="a logistic in log10 x through each series")
    front: bool = Field(
        False, description="join the points that no other beats: less x and no less y (Pareto)"
    )
    budget: ArmName | None = Field(None, description="belongs to this budget and larger ones; empty: to all")

    @model_validator(mode="after")
    def _known(self):
        for metric in (self.x, self.y):
            if not is_metric(metric):
                raise ValueError(f"unknown metric '{metric}'{nearest(metric, METRICS)}")
        return self


class Bench(Section):
    """Arms x seeds over one recipe, and what they are to decide."""

    title: str = Field(description="of the page")
    run_dir: str = Field(description="the grid lives here: one run folder per arm and seed")
    recipe: str | dict[str, Any] = Field(
        description="what all arms have in common: a recipe's path, or its keys"
    )
    set: dict[str, Any] = Field({}, description="changes to it for all arms")
    budgets: dict[ArmName, Budget] = Field({"full": Budget()}, description="from small to large")
    prepare: Prepared | None = None
    arms: dict[ArmName, Arm]
    factorial: Factorial | None = None
    claims: list[Claim] = []
    curves: list[Curve] = []

    @model_validator(mode="after")
    def _consistent(self):
        problems = []
        arms = self.all_arms()
        for name, arm in arms.items():
            for key in ("like", "start", "teacher"):
                other = getattr(arm, key)
                if other is not None and other not in arms:
                    problems.append(f"arm {name}: {key} names no arm: '{other}'{nearest(other, arms)}")
            trains = [key for key in arm.set if not key.startswith(("evaluate.", "prices."))]
            if arm.checkpoint and (trains or arm.start or arm.like or arm.teacher):
                problems.append(
                    f"arm {name}: a checkpoint is measured as it is; of its keys leave `set` of `evaluate` alone"
                )
        for of in [*arms.values(), *self.claims, *self.curves]:
            if of.budget is not None and of.budget not in self.budgets:
                problems.append(f"unknown budget '{of.budget}'{nearest(of.budget, self.budgets)}")
        for claim in self.claims:
            if claim.factorial and (
                self.factorial is None or claim.factorial not in self.factorial.contrasts()
            ):
                known = self.factorial.contrasts() if self.factorial else {}
                problems.append(
                    f"claim {claim.id}: no effect '{claim.factorial}'{nearest(claim.factorial, known)}"
                )
                continue
            for term in claim.terms(self.factorial):
                arm = term.partition("@")[0]
                if arm not in arms:
                    problems.append(f"claim {claim.id}: no arm '{arm}'{nearest(arm, arms)}")
        if len({c.id for c in self.claims}) < len(self.claims):
            problems.append("claims: two have the same id")
        for curve in self.curves:
            named = [a.partition("@")[0] for arms_of in curve.series.values() for a in arms_of]
            for arm in [a for a in named if a not in arms]:
                problems.append(f"curve '{curve.title}': no arm '{arm}'{nearest(arm, arms)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def all_arms(self) -> dict[str, Arm]:
        return {**self.arms, **(self.factorial.arms() if self.factorial else {})}

    def changes(self, name: str) -> dict[str, Any]:
        """All `set` of an arm, those it is like first."""
        arm = self.all_arms()[name]
        inherited = self.changes(arm.like) if arm.like else {}
        return {**inherited, **arm.set}

    def seeds_of(self, arm: str, budget: str) -> range:
        """The seeds in which an arm has a value: all of the budget's for one that is run once."""
        asked, of = self.budgets[budget].seeds, self.all_arms()[arm]
        return range(min(asked, of.seeds) if of.seeds and not of.once else asked)

    def within(self, budget: str, of: Arm | Claim | Curve) -> bool:
        """Whether something belongs to `budget`: budgets are listed from small to large."""
        order = list(self.budgets)
        return of.budget is None or order.index(of.budget) <= order.index(budget)


KNOWN_BEFORE = ("prompts", "steps", "rows")  # of distill.bench.grid.EQUAL: recipes settle these


@dataclass
class Task:
    kind: str  # "answers", "rows" or "run"
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


def load_bench(path: str) -> tuple[Bench, Path]:
    """Read and check a bench file. Raises UserError with every problem on a line."""
    file, data = read_recipe(path)
    if "arms" not in data:
        raise UserError(
            f"{file} is one recipe and has no arms to compare; see recipes/claims.yaml for a grid, or use `distill run`"
        )
    try:
        return Bench.model_validate(data), file
    except ValidationError as error:
        raise UserError(*(explain_error(e, file, Bench) for e in error.errors())) from None


def pick_budget(bench: Bench, name: str | None) -> str:
    """The budget asked for, else the smallest. Raises UserError for an unknown one."""
    if name is not None and name not in bench.budgets:
        raise UserError(f"--budget {name}: unknown{nearest(name, bench.budgets)}")
    return name or next(iter(bench.budgets))


def arms_within(bench: Bench, budget: str) -> dict[str, Arm]:
    """The arms of a budget, and those that they start from or are taught by."""
    arms = bench.all_arms()
    wanted = {name for name, arm in arms.items() if bench.within(budget, arm)}
    while more := {getattr(arms[n], key) for n in wanted for key in ("start", "teacher")} - wanted - {None}:
        wanted |= more
    return {name: arm for name, arm in arms.items() if name in wanted}


def plan(bench: Bench, budget: str, file: Path) -> dict[str, Task]:
    """{name: task} of a budget. Raises UserError for recipes that do not hold, or claims between unequal arms."""
    arms = arms_within(bench, budget)
    problems: list[str] = []
    tasks: dict[str, Task] = {}
    root = Path(bench.run_dir)
    wanted = {arm.start for arm in arms.values() if arm.start}
    for name, arm in arms.items():
        for seed in [0] if arm.once else bench.seeds_of(name, budget):
            try:
                run = _run(bench, name, arm, seed, root, arms, file)
            except UserError as error:
                problems += [f"arm {name}: {line}" for line in error.problems]
                break
            run.merged = name in wanted
            if not arm.checkpoint:
                first = name
                while arms[first].start:
                    first = arms[first].start
                begun = run if first == name else _run(bench, first, arms[first], seed, root, arms, file)
                _share(run, begun.recipe.student, root, tasks, arms)
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
    return run_name(arm, 0 if arms[arm].once else seed)


def _run(bench: Bench, name: str, arm: Arm, seed: int, root: Path, arms: dict[str, Arm], file: Path) -> Task:
    changes = {**bench.set, **bench.changes(name)}
    needs, folder = [], root / run_name(name, seed)
    if arm.start:
        needs.append(runs_of(bench, arm.start, seed, arms))
        changes["student.model"] = str(root / needs[-1] / "start")
    if arm.teacher:
        needs.append(runs_of(bench, arm.teacher, seed, arms))
        changes["teacher.model"] = str(root / needs[-1] / "student")
    if arm.checkpoint:
        changes |= {"student.model": arm.checkpoint, "student.config": None}
    fixed = {
        "run_dir": str(folder), "seed": seed + arm.seed_offset, "control.enabled": False, "evaluate.models": [MODEL]
    }  # fmt: skip
    if isinstance(bench.recipe, str):
        where, data = read_recipe(bench.recipe)
    else:
        where, data = file, json.loads(json.dumps(bench.recipe))
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**changes, **fixed}.items()]
    recipe = make_recipe(data, overrides, where)
    return Task(
        "run", folder.name, folder, recipe, needs, name, seed, checkpoint=arm.checkpoint, probes=arm.probes
    )


def _share(
    run: Task, origin: StudentSection, root: Path, tasks: dict[str, Task], arms: dict[str, Arm]
) -> None:
    """The tasks that make the run's training set, new ones where no other run has asked for the same.

    `origin`: the student that the run's chain of `start` begins with. Rows are in its tokenizer, and it is there
    before anything has been trained.
    """
    recipe = run.recipe
    whole: dict[str, Any] = {
        "prompts": recipe.prompts.identity(),
        "seed": recipe.seed,
        "teacher": recipe.teacher.identity() if recipe.teacher else None,
        "generate": recipe.generate.model_dump(mode="json") if recipe.teacher else None,
    }
    taught = [
        need for need in run.needs if arms[run.arm].teacher and need.startswith(f"{arms[run.arm].teacher}-")
    ]
    answers = _shared("answers", fingerprint(whole), run, root, tasks, taught)
    tokenizer = origin.model or origin.tokenizer
    made = {**whole, "filter": recipe.filter.model_dump(mode="json"), "tokenizer": tokenizer}
    if recipe.evaluate.source or recipe.filter.decontaminate:
        made["held_out"] = recipe.evaluate.model_dump(mode="json")
    rows = _shared("rows", fingerprint(made), run, root, tasks, [answers.name])
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
