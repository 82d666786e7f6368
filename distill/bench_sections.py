"""Bench recipes: one page of arms, budgets and claims over an ordinary recipe. Typed, every problem at once.

A bench file is told from a recipe by its key `arms`. Its runs are ordinary recipes: the file named by `recipe`
(or written in place), changed by `set` of the bench and of the arm. See recipes/claims.yaml, the reference of
all keys in docs/recipes.md, and distill/bench.py for what is done with them.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.bench_metrics import METRICS, is_metric
from distill.errors import nearest
from distill.sections import Count, Section
from distill.verdicts import factorial_contrasts

Name = Annotated[str, Field(pattern=r"^[\w.+=,-]+$")]
# What two arms can have in common; the first three are known before the run.
EQUAL = ("prompts", "steps", "rows", "tokens", "tokens_read", "flops")


class Budget(Section):
    """How much of the grid is run. A larger budget contains the smaller one: its finished runs are kept."""

    seeds: Count = Field(3, description="seeds 0 to n - 1 of every arm that belongs to this budget")


class Prepared(Section):
    """Files made before the first run."""

    flaws: str = Field(description="folder for the questions, flaws and probes of distill/flaws.py")


class Arm(Section):
    """One way to make a student; every seed of it is an ordinary run folder."""

    about: str = Field("", description="what differs, in words")
    like: Name | None = Field(None, description="start from the `set` of this arm")
    set: dict[str, Any] = Field({}, description="keys of the recipe, as {train.steps: 100}")
    start: Name | None = Field(
        None, description="the student starts where this arm's ended (same seed, adapter merged)"
    )
    teacher: Name | None = Field(None, description="the teacher is what this arm's training made")
    checkpoint: str | None = Field(None, description="measure this model as it is; nothing is trained")
    once: bool = Field(False, description="one run, of seed 0, for all seeds")
    seeds: Count | None = Field(None, description="at most so many seeds, whatever the budget")
    seed_offset: Annotated[int, Field(ge=0)] = Field(
        0, description="added to the seed: the same recipe again"
    )
    budget: Name | None = Field(None, description="belongs to this budget and larger ones; empty: to all")
    probes: str | None = Field(
        None, description="'embedded' or a JSONL file: how often the student shows each flaw"
    )


class Factorial(Section):
    """All combinations of two-level factors as arms named by their levels, as `distil+moe+bf16+lora`."""

    factors: dict[str, dict[Name, dict[str, Any]]] = Field(
        description="factor: {level on: changes, level off: changes}; `start` names an arm among the changes"
    )
    set: dict[str, Any] = Field({}, description="keys of the recipe for all its arms")
    seeds: Count | None = Field(None, description="at most so many seeds, whatever the budget")
    budget: Name | None = Field(None, description="belongs to this budget and larger ones; empty: to all")

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
        """{effect: {arm: weight}}, see distill.verdicts.factorial_contrasts."""
        levels = {name: list(of) for name, of in self.factors.items()}
        return {
            name: {"+".join(cell): weight for cell, weight in cells.items()}
            for name, cells in factorial_contrasts(levels).items()
        }


class Claim(Section):
    """A sentence, the hypothesis it implies here, and which difference between arms decides."""

    id: Name = Field(description="its name in results and on the page")
    group: str = Field("", description="heading under which the table shows it")
    sentence: str = Field(description="what the article says")
    hypothesis: str = Field(description="what that means for these arms; written before the run")
    metric: str = Field(description="what is compared; distill/bench_metrics.py has the names")
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
    budget: Name | None = Field(None, description="belongs to this budget and larger ones; empty: to all")

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
    x: str = Field(description="metric along the bottom; distill/bench_metrics.py has the names")
    y: str = Field(description="metric up the side")
    series: dict[str, list[str]] = Field(
        description="label: arms in order; arm@kN takes both metrics with N experts per token"
    )
    log_x: bool = Field(False, description="logarithmic x")
    fit: bool = Field(False, description="a logistic in log10 x through each series")
    front: bool = Field(
        False, description="join the points that no other beats: less x and no less y (Pareto)"
    )
    budget: Name | None = Field(None, description="belongs to this budget and larger ones; empty: to all")

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
    budgets: dict[Name, Budget] = Field({"full": Budget()}, description="from small to large")
    prepare: Prepared | None = None
    arms: dict[Name, Arm]
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
