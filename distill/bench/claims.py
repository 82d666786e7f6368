"""What a grid is to decide, and that it was written down before anybody measured it.

What a grid is to decide: claims, facts, sentences without an experiment, and the controls of the judge.

    claims:   a hypothesis, the difference between arms that decides it, and the margins
    facts:    what is true by construction or by counting: a number without a verdict
    evidence: sentences that no experiment of this size can decide, with what else is known of them
    controls: nulls and dosed positives, planted to try the judge; they stand outside of every correction

A claim's `hypothesis`, metric, arms and margins are its text. `registered` names the commit in which that text first
stood; whatever is changed of it makes another claim. Nothing heavy is imported here.

Registered before measured: a claim's text, the commit in which it first stood, and the runs that came after.

    problems = unregistered("recipes/claims.yaml", History(PROJECT_ROOT), seeds, code=None)    # {claim: what is wrong}

A commit cannot hold its own hash. So a claim is written and committed first; the next commit writes that hash beside
it as `registered` (`python recipes/register.py`). Whoever reads it needs no trust: the file as it stood in the named
commit is taken from git, the claim's text is worked out of it, and compared with today's. The text is everything
that decides: hypothesis, metrics, margins, the arms with all their settings and those they start from or are
taught by, what all arms share, how many seeds and which. A changed word is another claim and needs a new registration.

Four things are refused, each with what to do:
- a claim whose text did not stand in the commit that it names;
- a claim registered after the commit whose code measured it (`code`), or in no ancestor of it;
- a claim written when results of the same file were already there, on seeds that those results show;
- a claim without `registered`, in a file where others have it.

Files of users need not register anything: where no claim names a commit, nothing is checked, and the page says so.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from distill.bench.metrics import METRICS, is_metric, metric
from distill.config.section import Section
from distill.errors import nearest
from distill.storage import fingerprint, parse_yaml

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


# ==== Registered before measured ====

RESULTS = "recipes/results"  # where results are committed: what could have been looked at
TEXT = (
    "hypothesis", "metric", "second", "effect", "factorial", "relative", "expect", "margin", "trivial", "matched",
    "equal", "headline", "first_seed",
)  # fmt: skip
ARM = ("start", "teacher", "teachers", "averaged", "checkpoint", "once", "seed_offset", "probes", "seeds")


class History:
    """What git knows of a project. `available` is False outside of a checkout, and where history was cut off."""

    def __init__(self, root: Path):
        self.root = root
        top = self._git("rev-parse", "--show-toplevel")
        inside = top is not None and Path(top.strip()).resolve() == root.resolve()
        self.available = inside and self._git("rev-parse", "--is-shallow-repository") == "false\n"

    def _git(self, *words: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(self.root), *words], capture_output=True, text=True, check=True, timeout=60
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return None

    def head(self) -> str:
        return (self._git("rev-parse", "HEAD") or "").strip()

    def commits_of(self, path: str) -> list[str]:
        """Commits that changed a file, the oldest first."""
        return (self._git("log", "--reverse", "--format=%H", "--", path) or "").split()

    def text(self, commit: str, path: str) -> str | None:
        """A file as it stood in a commit; None if either is unknown."""
        return self._git("show", f"{commit}:{path}")

    def files(self, commit: str, folder: str) -> list[str]:
        return (self._git("ls-tree", "--name-only", commit, f"{folder}/") or "").splitlines()

    def reaches(self, earlier: str, later: str) -> bool:
        """Whether `earlier` is `later` or an ancestor of it."""
        return self._git("merge-base", "--is-ancestor", earlier, later) is not None


def claim_text(data: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    """A fingerprint of what the claim says, worked out of a bench file as parsed and of nothing else."""
    arms = data.get("arms") or {}
    factorial = data.get("factorial") or {}
    found: dict[str, Any] = {key: claim[key] for key in TEXT if claim.get(key) not in (None, "", {}, False)}
    named = {term.partition("@")[0] for term in claim.get("effect") or {}}
    found["arms"] = {name: _arm(arms, name) for name in sorted(_closed(arms, factorial, named, claim))}
    if claim.get("factorial") or named - set(arms):
        found["factors"] = {"factors": factorial.get("factors"), "set": factorial.get("set")}
    for key in ("recipe", "set", "budgets", "prepare", "first_seed", "tuning"):
        found[f"of all {key}"] = data.get(key)
    return fingerprint(found)


def _closed(arms: Mapping, factorial: Mapping, named: Iterable[str], claim: Mapping) -> set[str]:
    """The arms that a claim rests on: those it names, and what they start from or are taught by."""
    found, left = set(), list(named)
    if claim.get("factorial") or set(named) - set(arms):
        levels = [
            changes for levels in (factorial.get("factors") or {}).values() for changes in levels.values()
        ]
        left += [changes["start"] for changes in levels if changes and changes.get("start")]
    while left:
        name = left.pop()
        if name in found or name not in arms:
            continue
        found.add(name)
        own = arms[name] or {}
        left += [own[key] for key in ("start", "teacher", "like") if own.get(key)]
        left += (own.get("teachers") or {}).values()
    return found


def _arm(arms: Mapping[str, Any], name: str) -> dict[str, Any]:
    own = arms.get(name) or {}
    like = _arm(arms, own["like"])["set"] if own.get("like") in arms else {}
    return {"set": {**like, **(own.get("set") or {})}, **{key: own[key] for key in ARM if key in own}}


def texts(content: str) -> dict[str, str]:
    """{claim id: fingerprint of its text} of a bench file's content; {} if it is none."""
    try:
        data = parse_yaml(content)
    except yaml.YAMLError:
        return {}
    claims = data.get("claims") if isinstance(data, dict) else None
    return {c["id"]: claim_text(data, c) for c in claims or [] if isinstance(c, dict) and "id" in c}


def first_stood(history: History, path: str) -> dict[str, str]:
    """{claim id: the oldest commit from which on the text that HEAD holds has stood unchanged}."""
    today = texts(history.text("HEAD", path) or "")
    found: dict[str, str] = {}
    standing = set(today)
    for commit in reversed(history.commits_of(path)):
        then = texts(history.text(commit, path) or "")
        standing = {claim for claim in standing if then.get(claim) == today[claim]}
        found |= dict.fromkeys(standing, commit)
    return found


def seeds_seen(history: History, commit: str, bench: str) -> dict[str, set[int]]:
    """{results file: its seeds} of results that lay beside the bench file `bench` in a commit."""
    found = {}
    for path in history.files(commit, RESULTS):
        if not path.endswith(".json"):
            continue
        results = json.loads(history.text(commit, path) or "{}")
        if isinstance(results, dict) and results.get("bench") == bench:
            shown = (claim["effect"]["per_seed"] for claim in results["claims"])
            found[path] = {int(seed) for seeds in shown for seed in seeds}
    return found


def unregistered(
    path: str,
    history: History,
    seeds: Mapping[str, Iterable[int]],
    code: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, str]:
    """{claim: what is wrong with its registration}; {} where all is well, or where nothing can be checked.

    path: the bench file, from the project's root. seeds: of each claim, all that any budget asks for. code: of each
    claim, the commits whose code trained and measured its runs; HEAD for those about to be made.
    """
    content = (history.root / path).read_text(encoding="utf-8")
    data = parse_yaml(content)
    named = {c["id"]: c.get("registered") for c in data["claims"]}
    if not history.available or not any(named.values()):
        return {}
    today = texts(content)
    found, then, seen = {}, {}, {}
    for claim, commit in named.items():
        if not commit:
            found[claim] = "it names no commit; commit its text, then run `python recipes/register.py`"
            continue
        commit = str(commit)
        if commit not in then:
            then[commit] = texts(history.text(commit, path) or "")
            seen[commit] = seeds_seen(history, commit, path)
        if then[commit].get(claim) != today[claim]:
            found[claim] = f"its text did not stand in {commit}; a changed claim is registered anew"
            continue
        late = [by for by in (code or {}).get(claim, [history.head()]) if not history.reaches(commit, by)]
        if late:
            found[claim] = (
                f"registered in {commit}, after the code that measured it ({late[0]}); measure it again"
            )
            continue
        again = {file: used & set(seeds[claim]) for file, used in seen[commit].items()}
        if clash := {file: used for file, used in again.items() if used}:
            file, used = next(iter(clash.items()))
            found[claim] = (
                f"it was written when {file} could be looked at, and uses its seeds {min(used)} to {max(used)}; "
                "give it fresh ones (first_seed)"
            )
    return found
