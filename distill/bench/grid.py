"""Bench recipes: one page of arms, budgets and claims over an ordinary recipe. Typed, every problem at once.

A bench file is told from a recipe by its key `arms`. Its runs are ordinary recipes: the file named by `recipe`
(or written in place), changed by `set` of the bench and of the arm. See recipes/claims.yaml, the reference of
all keys in docs/recipes.md, and distill/bench/plan.py for the runs that follow from it. Nothing heavy is imported here.

    bench, file = load_bench("recipes/claims.yaml")
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from distill.bench.claims import Claim, Controls, Evidence, Fact, check_metrics
from distill.bench.verdicts import factorial_contrasts
from distill.config.recipe import explain_error, read_recipe
from distill.config.section import Count, Section
from distill.errors import UserError, nearest

ArmName = Annotated[str, Field(pattern=r"^[\w.+=,-]+$")]


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
    teachers: dict[str, ArmName] = Field(
        {}, description="tag -> arm: `train.teachers.models` are what these arms' training made"
    )
    averaged: bool = Field(
        False,
        description="with `teachers`: none of them teaches; the student starts from the mean of their weights",
    )
    checkpoint: str | None = Field(
        None,
        description="measure this model as it is; nothing is trained. 'student.from': what the student is made from it",
    )
    once: bool = Field(False, description="one run, of the first seed, for all seeds")
    seeds: Count | dict[ArmName, Count] | None = Field(
        None, description="so many seeds instead of the budget's, or {budget: so many}"
    )
    seed_offset: Annotated[int, Field(ge=0)] = Field(
        0, description="added to the seed: the same recipe again"
    )
    budget: ArmName | None = Field(None, description="belongs to this budget and larger ones; empty: to all")
    probes: str | None = Field(
        None, description="'embedded' or a JSONL file: how often the student shows each flaw"
    )

    @property
    def rests_on(self) -> list[tuple[str, str]]:
        """(key, arm) of the arms whose training must have ended before this one begins."""
        named = [("start", self.start), ("teacher", self.teacher)]
        named += [("teachers", name) for name in dict.fromkeys(self.teachers.values())]
        return [(key, name) for key, name in named if name]


class Factorial(Section):
    """All combinations of two-level factors as arms named by their levels, as `distil+moe+bf16+lora`."""

    factors: dict[str, dict[ArmName, dict[str, Any]]] = Field(
        description="factor: {level on: changes, level off: changes}; `start` names an arm among the changes"
    )
    set: dict[str, Any] = Field({}, description="keys of the recipe for all its arms")
    seeds: Count | dict[ArmName, Count] | None = Field(
        None, description="so many seeds instead of the budget's, or {budget: so many}"
    )
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


class Tuned(Section):
    """Learning rates to try for one arm."""

    rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=3,
        description="learning rates, three at least: the best should not be the first or the last",
    )
    serves: list[ArmName] = Field([], description="other arms that take over what is best for this one")
    metric: str | None = Field(None, description="what is best for this arm; the section's if not given")


class Tuning(Section):
    """Fair arms: each with the best of several learning rates, on seeds and problems that nothing else uses."""

    seeds: Count = Field(2, description="how many")
    first_seed: Annotated[int, Field(ge=0)] = Field(900, description="of them; no claim uses these")
    metric: str = Field(description="what is best: the lowest of a loss, the highest of an accuracy")
    set: dict[str, Any] = Field({}, description="keys of the recipe while tuning, as another held-out split")
    arms: dict[ArmName, Tuned] = Field(description="arm: learning rates to try")
    results: str = Field(description="where the choice is kept, and read from by every budget")

    def metric_of(self, arm: str) -> str:
        return self.arms[arm].metric or self.metric

    @model_validator(mode="after")
    def _known(self):
        check_metrics(self.metric, *(tuned.metric for tuned in self.arms.values() if tuned.metric))
        served = [*self.arms, *(name for tuned in self.arms.values() for name in tuned.serves)]
        if twice := {name for name in served if served.count(name) > 1}:
            raise ValueError(f"two learning rates are chosen for {', '.join(sorted(twice))}")
        return self


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
        check_metrics(self.x, self.y)
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
    first_seed: Annotated[int, Field(ge=0)] = Field(
        0, description="the seeds are this one and those after it"
    )
    looked: str = Field("", description="what had been looked at before the claims were written")
    prepare: Prepared | None = None
    arms: dict[ArmName, Arm]
    factorial: Factorial | None = None
    tuning: Tuning | None = None
    controls: Controls | None = None
    claims: list[Claim] = []
    facts: list[Fact] = []
    evidence: list[Evidence] = []
    curves: list[Curve] = []
    # Chosen learning rates by arm (distill/bench/plan.py).
    _rates: dict[str, float] = PrivateAttr({})
    _seed_cache: dict[str, Any] = PrivateAttr({})

    @model_validator(mode="after")
    def _consistent(self):
        problems = []
        arms = self.all_arms()
        for name, arm in arms.items():
            for key, other in (("like", arm.like), *arm.rests_on):
                if other is not None and other not in arms:
                    problems.append(f"arm {name}: {key} names no arm: '{other}'{nearest(other, arms)}")
            trains = [key for key in arm.set if not key.startswith(("evaluate.", "prices."))]
            if arm.checkpoint and (trains or arm.like or (arm.rests_on and not arm.averaged)):
                problems.append(
                    f"arm {name}: a checkpoint is measured as it is; of its keys leave `set` of `evaluate` alone"
                )
        for of in [*arms.values(), *self.claims, *self.facts, *self.curves]:
            if of.budget is not None and of.budget not in self.budgets:
                problems.append(f"unknown budget '{of.budget}'{nearest(of.budget, self.budgets)}")
        for claim in self.claims:
            known = self.factorial.contrasts() if self.factorial else {}
            if claim.factorial and claim.factorial not in known:
                problems.append(
                    f"claim {claim.id}: no effect '{claim.factorial}'{nearest(claim.factorial, known)}"
                )
                continue
            problems += _unknown(f"claim {claim.id}", claim.terms(self.factorial), arms)
        for fact in self.facts:
            problems += _unknown(f"fact {fact.id}", fact.effect, arms)
        problems += _unknown("controls", self.controls.named() if self.controls else (), arms)
        for name, tuned in (self.tuning.arms if self.tuning else {}).items():
            problems += _unknown("tuning", [name, *tuned.serves], arms)
        if len({c.id for c in self.claims}) < len(self.claims):
            problems.append("claims: two have the same id")
        for curve in self.curves:
            named = [a.partition("@")[0] for arms_of in curve.series.values() for a in arms_of]
            for arm in [a for a in named if a not in arms]:
                problems.append(f"curve '{curve.title}': no arm '{arm}'{nearest(arm, arms)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @cached_property
    def _all_arms(self) -> dict[str, Arm]:
        return {**self.arms, **(self.factorial.arms() if self.factorial else {})}

    def all_arms(self) -> dict[str, Arm]:
        return self._all_arms

    def changes(self, name: str) -> dict[str, Any]:
        """All `set` of an arm, those it is like first, and the learning rate that was chosen for it."""
        rate = {"train.learning_rate": self._rates[name]} if name in self._rates else {}
        return {**self._inherited(name), **rate}

    def give_rate(self, arm: str, rate: float) -> None:
        """The learning rate that tuning has chosen for an arm."""
        self._rates[arm] = rate

    def _inherited(self, name: str) -> dict[str, Any]:
        arm = self.all_arms()[name]
        return {**(self._inherited(arm.like) if arm.like else {}), **arm.set}

    def seeds_of(self, arm: str, budget: str) -> list[int]:
        """The seeds in which an arm has a value: all of them for one that is run once."""
        return sorted(self._seeds(budget)[arm])

    def claim_seeds(self, claim: Claim, budget: str) -> list[int]:
        """The seeds that decide a claim: those of its own that all of its arms have."""
        arms = {term.partition("@")[0] for term in claim.terms(self.factorial)}
        found = set.intersection(*(set(self._own_seeds(self.all_arms()[a], claim, budget)) for a in arms))
        return sorted(found)

    def _own_seeds(self, arm: Arm, claim: Claim | None, budget: str) -> range:
        first = self.first_seed if claim is None or claim.first_seed is None else claim.first_seed
        asked = self.budgets[budget].seeds
        if isinstance(arm.seeds, dict):
            upto = list(self.budgets)[: list(self.budgets).index(budget) + 1]
            asked = next((arm.seeds[name] for name in reversed(upto) if name in arm.seeds), asked)
        elif arm.seeds:
            asked = arm.seeds
        return range(first, first + asked)

    def _seeds(self, budget: str) -> Mapping[str, Iterable[int]]:
        """{arm: seeds}: its own, those of claims with seeds of their own, those of arms that rest on it."""
        if budget in self._seed_cache:
            return self._seed_cache[budget]
        arms = self.all_arms()
        found = {name: set(self._own_seeds(arm, None, budget)) for name, arm in arms.items()}
        for claim in (c for c in self.claims if c.first_seed is not None and self.within(budget, c)):
            for arm in {term.partition("@")[0] for term in claim.terms(self.factorial)}:
                found[arm] |= set(self._own_seeds(arms[arm], claim, budget))
        while True:
            before = sum(map(len, found.values()))
            for name, arm in arms.items():
                if self.within(budget, arm):
                    for _, other in arm.rests_on:
                        found[other] |= found[name]
            if sum(map(len, found.values())) == before:
                return self._seed_cache.setdefault(budget, found)

    def within(self, budget: str, of: Arm | Claim | Fact | Curve) -> bool:
        """Whether something belongs to `budget`: budgets are listed from small to large."""
        order = list(self.budgets)
        return of.budget is None or order.index(of.budget) <= order.index(budget)


def _unknown(where: str, terms: Iterable[str], arms: dict[str, Arm]) -> list[str]:
    named = dict.fromkeys(term.partition("@")[0] for term in terms)
    return [f"{where}: no arm '{arm}'{nearest(arm, arms)}" for arm in named if arm not in arms]


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
