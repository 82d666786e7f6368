"""What a grid is to decide: claims, facts, sentences without an experiment, and the controls of the judge.

    claims:   a hypothesis, the difference between arms that decides it, and the margins
    facts:    what is true by construction or by counting: a number without a verdict
    evidence: sentences that no experiment of this size can decide, with what else is known of them
    controls: nulls and dosed positives, planted to try the judge; they stand outside of every correction

A claim's `hypothesis`, metric, arms and margins are its text. `registered` names the commit in which that text first
stood (distill/bench/registration.py); whatever is changed of it makes another claim. Nothing heavy is imported here.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.bench.metrics import METRICS, is_metric, metric
from distill.config.section import Section
from distill.errors import nearest

Name = Annotated[str, Field(pattern=r"^[\w.+=,-]+$")]
Size = Annotated[float, Field(ge=0)]

# What two arms can have in common; the first three are known before the run.
EQUAL = ("prompts", "steps", "rows", "tokens", "tokens_read", "flops")
HEADLINE, EXPLORATORY = "headline", "exploratory"


def check_metrics(*names: str) -> None:
    """Raises ValueError for a metric that does not exist."""
    for name in filter(None, names):
        if not is_metric(name):
            raise ValueError(f"unknown metric '{name}'{nearest(name, METRICS)}")


class Claim(Section):
    """A sentence, the hypothesis it implies here, and which difference between arms decides."""

    id: Name = Field(description="its name in results and on the page")
    group: str = Field("", description="heading under which the table shows it")
    source: str = Field(
        "article", description="'article': a sentence of the interview; else the paper it is from"
    )
    sentence: str = Field(description="what the article or the paper says")
    hypothesis: str = Field(description="what that means for these arms; written before the run")
    metric: str = Field(description="what is compared; distill/bench/metrics.py has the names")
    second: str = Field("", description="another metric, shown beside it and without a verdict of its own")
    effect: dict[str, float] = Field(
        {}, description="arm: weight, as {student: 1, control: -1}; arm@metric takes another metric"
    )
    factorial: str | None = Field(
        None, description="or an effect of the factorial: a factor, 'a x b', synergy"
    )
    relative: bool = Field(
        False, description="the share by which the arm of weight 1 differs from that of -1"
    )
    expect: Literal["greater", "less", "within"] = Field(
        description="the effect is above 0, below 0, or within +-margin"
    )
    margin: Size = Field(0.0, description="in the metric's unit; a share if relative")
    trivial: Size = Field(
        0.0,
        description="greater and less: an effect shown to be within +-trivial is EQUIVALENT; 0: not asked",
    )
    why: str = Field("", description="the reason for `margin` and `trivial`")
    equal: list[Literal[EQUAL]] = Field(
        ["prompts", "steps"], description="what the arms must have in common: checked, and shown"
    )
    matched: dict[str, Size] = Field(
        {}, description="metric: by how much the arms' means may differ in it, or they are not compared"
    )
    headline: bool = Field(
        False, description="shown in the README's table, and corrected together with the other headlines"
    )
    axis: str = Field("", description="where arms differ in budget on purpose: what is held equal instead")
    scope: str = Field("", description="what it does not speak of, beside what the page finds by itself")
    looked: str = Field("", description="what had been seen before it was written; empty: what the file says")
    first_seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="its first seed; empty: the file's. Fresh ones for a claim written after a look"
    )
    registered: str | None = Field(
        None, description="the commit in which its text first stood (python recipes/register.py fills it in)"
    )
    budget: Name | None = Field(None, description="belongs to this budget and larger ones; empty: to all")

    @model_validator(mode="after")
    def _one_way(self):
        if bool(self.effect) == bool(self.factorial):
            raise ValueError("give either `effect` (arm: weight) or `factorial` (the name of an effect)")
        if self.relative and sorted(self.effect.values()) != [-1, 1]:
            raise ValueError(
                "`relative` compares two arms: one of weight 1, and one of weight -1 to divide by"
            )
        if self.expect == "within" and not self.margin:
            raise ValueError("`expect: within` needs a `margin`")
        if self.expect == "within" and self.trivial:
            raise ValueError("`trivial` is for greater and less; `expect: within` has its `margin`")
        if self.trivial and self.trivial <= self.margin:
            raise ValueError(f"`trivial` ({self.trivial}) must be above `margin` ({self.margin})")
        check_metrics(self.metric, self.second, *self.matched)
        check_metrics(*(t.partition("@")[2] for t in self.effect if "@" in t))
        if not self.equal and not self.axis:
            raise ValueError("arms that need nothing in common are compared on an axis: say which in `axis`")
        return self

    def terms(self, factorial: Any, of: str = "") -> dict[str, float]:
        """{arm@metric: weight}, of the claim's metric or `of`. `factorial`: the grid's, if it has one."""
        weights = factorial.contrasts()[self.factorial] if self.factorial else self.effect
        return {t if "@" in t else f"{t}@{of or self.metric}": weight for t, weight in weights.items()}

    @property
    def family(self) -> str:
        """Which claims share a correction: the headlines, or those of the group, which are exploratory."""
        return HEADLINE if self.headline else f"{EXPLORATORY}: {self.group}"

    @property
    def unit(self) -> str:
        return "%" if self.relative else metric(self.metric).unit


class Fact(Section):
    """What follows by construction or by counting. It has a number and no verdict: nothing could refute it."""

    id: Name = Field(description="its name in results and on the page")
    sentence: str = Field(description="what the article or the paper says")
    statement: str = Field(description="what is counted here")
    because: str = Field(description="why no run could show otherwise")
    metric: str = Field(description="what is counted; distill/bench/metrics.py has the names")
    effect: dict[str, float] = Field(description="arm: weight, as for a claim")
    relative: bool = Field(
        False, description="the share by which the arm of weight 1 differs from that of -1"
    )
    budget: Name | None = Field(None, description="belongs to this budget and larger ones; empty: to all")

    @model_validator(mode="after")
    def _known(self):
        check_metrics(self.metric)
        if self.relative and sorted(self.effect.values()) != [-1, 1]:
            raise ValueError(
                "`relative` compares two arms: one of weight 1, and one of weight -1 to divide by"
            )
        return self


class Evidence(Section):
    """A sentence that no experiment of this size can decide: what evidence there is, and where it ends."""

    sentence: str = Field(description="what the article says")
    evidence: str = Field(description="what is known, with its source")
    ends: str = Field(description="what that does not decide")


class Controls(Section):
    """The judge on trial: claims whose truth is known. None of them enters a correction."""

    metric: str = Field(description="what is compared")
    reference: Name = Field(description="the arm that the doses are set against")
    doses: dict[Name, Annotated[float, Field(gt=0, le=1)]] = Field(
        {},
        description="arm: share of its answers that are spoilt; each must be found worse than the reference",
    )
    nulls: Annotated[int, Field(ge=0)] = Field(
        20, description="claims of no difference: halves of an arm's own seeds, or of its test items"
    )
    arms: list[Name] = Field([], description="whose halves; empty: the reference alone")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the draws")

    @model_validator(mode="after")
    def _known(self):
        check_metrics(self.metric)
        return self

    def named(self) -> list[str]:
        return [self.reference, *self.doses, *self.arms]
