"""What sections of a recipe are made of: types and bounds, teacher signals, `student.from`, the objectives.

The recipe section `student.from`: how a student is made from a model before it trains (distill/convert/derive.py).

    student: {from: {model: checkpoints/smollm2, layers: 10, by: angle}}
    student: {from: {model: checkpoints/teacher, experts: {drop: 0.5, how: reap}}}
    student: {from: {model: checkpoints/base, mixture: {experts: 4, experts_per_token: 2}}}

Models are averaged first, then layers are dropped, then widths are cut, then experts are taken out, joined or copied.
What chooses by activation reads prompts of the recipe, with answers that the model itself writes to them.

The objectives a recipe may name, with their options: a table that never imports torch.

A recipe says

    objectives: [{name: forward_kl, weight: 1.0, temperature: 2.0}, {name: cross_entropy, weight: 0.5}]

`problems(spec)` lists what is wrong with one such entry (unknown name, unknown option, wrong type, out of bounds),
`resolve(spec)` returns the entry with every default filled in, which is what a run writes down. The functions, with
definitions and sources, are in `distill.training.losses.divergences` under the same names; options are their
keyword arguments, except `weight`, which the training loop applies.
"""

import difflib
import math
import types
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_serializer, model_validator

# Every number of a recipe is finite and bounded. Where nothing smaller is said, whole numbers end here.
LARGEST = 2**31 - 1
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]  # 0 is off, or none
Seed = Annotated[int, Field(ge=0, lt=2**63)]


# Numbers with scales by the block, emulated (distill/formats.py): all linear layers or the routed experts, inputs too
# or weights alone.
BlockPrecision = Literal[
    "mxfp4-emulated", "mxfp4-emulated-weights", "mxfp4-emulated-experts", "mxfp4-emulated-expert-weights",
    "nvfp4-emulated", "nvfp4-emulated-weights", "nvfp4-emulated-experts", "nvfp4-emulated-expert-weights",
    "mxfp8-emulated", "mxfp8-emulated-weights", "mxfp8-emulated-experts", "mxfp8-emulated-expert-weights",
]  # fmt: skip

# Names that a template can set, and values that it can write.
TemplateArguments = dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], JsonValue]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    later: ClassVar[tuple[str, ...]] = ()  # keys that earlier versions did not have

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, data: Any):
        """What YAML can write and no file, model or file system holds, and a yes or no where a number is asked for."""
        if not isinstance(data, dict):
            return data
        found = [f"`{k}` {p}" for k, v in data.items() if (p := _unstorable(v))]
        for name, its in cls.model_fields.items():
            if name in data and _holds_bool(data[name]) and _asks_numbers(its.annotation):
                found.append(f"`{name}` is {str(data[name]).lower()}, a yes or no; give a number")
            if name in data and (twice := _twice(data[name], its.annotation)):
                found.append(f"`{name}` names {twice} twice; leave one of them out")
        if found:
            raise ValueError("; ".join(found))
        return data

    def identity(self, **how: Any) -> dict[str, Any]:
        """What a stage made by this section depends on, as JSON. `how`: further arguments of `model_dump`.

        A key of `later` is left out while it is at its default: what was made before there was the key is what it was.
        """
        settings = self.model_dump(mode="json", **how)
        self._forget_later(settings)
        return settings

    def _forget_later(self, settings: dict[str, Any]) -> None:
        for name in self.later:
            if name in settings and getattr(self, name) == type(self).model_fields[name].default:
                del settings[name]
        for name in settings:
            if isinstance(inner := getattr(self, name, None), Section):
                inner._forget_later(settings[name])


def _unstorable(value: Any) -> str | None:
    """What is wrong with a value of a recipe, at any depth, as the end of a sentence; None if nothing is."""
    if isinstance(value, str):
        if "\0" in value:
            return "has a NUL character, which no path and no text holds; take it out"
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            return "has half of a surrogate pair, which no file holds; write the character itself"
    elif isinstance(value, bool) or value is None:
        return None
    elif isinstance(value, int) and not -(2**64) < value < 2**64:
        return "is a whole number of more than 64 bits; give a smaller one"
    elif isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; give a finite number"
    elif isinstance(value, dict):
        return next((p for pair in value.items() for v in pair if (p := _unstorable(v))), None)
    elif isinstance(value, list | tuple):
        return next((p for v in value if (p := _unstorable(v))), None)
    return None


def _holds_bool(value: Any) -> bool:
    """Whether it is a bool, or a list or a dict with one: to Python True is 1."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return any(isinstance(v, bool) for v in inside)


def _asks_numbers(annotation: Any) -> bool:
    """Whether a field takes numbers, or lists or dicts of them, and nothing that may be a bool."""
    if get_origin(annotation) is Annotated:
        return _asks_numbers(get_args(annotation)[0])
    inside = get_args(annotation)
    if get_origin(annotation) is dict:
        return _asks_numbers(inside[1])
    if inside:
        return any(map(_asks_numbers, inside)) and bool not in inside
    return annotation in (int, float)


def _twice(value: Any, annotation: Any) -> str | None:
    """A name that a list of names out of a fixed set has twice."""
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        annotation = get_args(annotation)[0]
    named = get_origin(annotation) is list and get_origin(get_args(annotation)[0]) is Literal
    if not named or not isinstance(value, list):
        return None
    return next((str(v) for i, v in enumerate(value) if v in value[:i]), None)


class Signal(Section):
    """What is kept of the teacher's distribution at every completion token, to train without the teacher."""

    kind: Literal["none", "top_k", "sampled", "hidden"] = Field(
        "none",
        description="what is stored. top_k: the likeliest tokens, for sparse_forward_kl. sampled: drawn "
        "tokens, for sampled_cross_entropy, unbiased. hidden: the last hidden states and, once, "
        "the output head. They give the whole distribution, for every dense objective (forward_kl"
        " ...)",
    )
    k: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        32, description="top_k and sampled: how many tokens are kept or drawn at each completion token"
    )
    bits: Literal[8, 16, 32] = Field(
        8,
        description="bits per stored number; 32 is exact. top_k: of a log-probability. hidden: of a number of"
        " a state (8 is taken as 16)",
    )
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="sampled: the temperature at which tokens are drawn from the teacher"
    )

    @model_validator(mode="after")
    def _tempered_by_the_loss(self):
        if self.kind in ("top_k", "hidden") and self.temperature != 1:
            raise ValueError(
                f"{self.kind} is stored at temperature 1; set the temperature of the objective instead"
            )
        return self


# ==== The recipe section `student.from` ====


class Calibration(Section):
    """What a choice by activation reads: the recipe's own prompts, or windows of its documents."""

    rows: Count = Field(64, description="prompts (or windows of text) that are read, drawn by `seed`")
    answers: bool = Field(
        True, description="read the model's own greedy answers too; false: the questions alone"
    )
    max_new_tokens: Count = Field(64, description="most tokens of such an answer")


class Width(Section):
    """Less of every layer, after Minitron (arXiv 2407.14679, section 2.2)."""

    intermediate: Count | None = Field(None, description="neurons to keep in every MLP; empty: all")
    kv_heads: Count | None = Field(
        None,
        description="heads of keys and values to keep, each with its queries; empty: all",
    )
    hidden: Count | None = Field(
        None, description="channels of the hidden states to keep, the same in every layer; empty: all"
    )
    by: Literal["activation", "random"] = Field(
        "activation",
        description="which ones stay. activation: those with the largest mean activation. random: drawn by "
        "`seed`, as a control",
    )

    @model_validator(mode="after")
    def _something(self):
        if not (self.intermediate or self.kv_heads or self.hidden):
            raise ValueError("name what becomes narrower: `intermediate`, `kv_heads` or `hidden`")
        return self


class Experts(Section):
    """Fewer experts in every routed layer; the router keeps the rows of those that stay."""

    drop: Annotated[float, Field(gt=0, lt=1)] = Field(description="share of the experts that is removed")
    how: Literal["reap", "frequency", "random", "merge"] = Field(
        "reap",
        description="which ones stay. reap: those with the largest product of router weight and output norm "
        "(REAP, arXiv 2510.13999). frequency: the most used. random: drawn by `seed`. merge: as "
        "reap, and each removed expert is averaged into the most similar one that stays (REAM, "
        "arXiv 2604.04356)",
    )


class Dense(Section):
    """A mixture made dense: one MLP for the experts of a layer (arXiv 2605.28207)."""

    how: Literal["concatenate", "average"] = Field(
        "concatenate",
        description="concatenate: experts side by side in one wide MLP, each scaled by its mean router "
        "weight. average: one expert, the mean of all, weighted by that",
    )
    experts: Count | None = Field(
        None,
        description="concatenate: how many experts, those with the largest weight; empty: as many as a token "
        "used",
    )


class Mixture(Section):
    """A dense model made a mixture: sparse upcycling (arXiv 2212.05055). It computes what the dense one computed."""

    experts: Annotated[int, Field(ge=2, le=4096)] = Field(4, description="copies of every MLP")
    experts_per_token: Count = Field(2, description="how many of them a new router chooses for every token")
    shared: bool = Field(
        False,
        description="add one more copy that every token uses; this copy and the chosen ones then count half "
        "each",
    )

    @model_validator(mode="after")
    def _enough(self):
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"a token cannot use {self.experts_per_token} of {self.experts} experts; lower `experts_per_token`"
            )
        return self


class From(Section):
    """A student made from a model before it trains (distill/convert/derive.py)."""

    later: ClassVar = ("average", "by", "width", "experts", "dense", "mixture", "calibration")

    model: str = Field(description="folder or hub name of the model it is made from")
    average: tuple[str, ...] = Field(
        (),
        description="further models of the same shape: every weight is the mean of all (model soups, arXiv 2203.05482)",
    )
    layers: Count | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="decoder layers to keep: a number of layers, or a list of their numbers from 0; empty: "
        "all",
    )
    by: Literal["even", "angle"] = Field(
        "even",
        description="if `layers` is a number, which ones stay. even: evenly spaced, with the first and the "
        "last. angle: all but the run of layers that changes the hidden state least (arXiv "
        "2403.17887, section 3.2)",
    )
    width: Width | None = Field(None, description="less of every layer")
    experts: Experts | None = Field(None, description="a mixture with fewer experts")
    dense: Dense | None = Field(None, description="a mixture made dense")
    mixture: Mixture | None = Field(None, description="a dense model made a mixture")
    calibration: Calibration = Field(Calibration(), description="what a choice by activation reads")

    @model_serializer(mode="wrap")
    def _as_before(self, handler):
        """Keys that recipes from before did not have are left out while they are at their default."""
        values = handler(self)
        return {
            key: value
            for key, value in values.items()
            if key not in self.later or getattr(self, key) != type(self).model_fields[key].default
        }

    @model_validator(mode="after")
    def _something_one_way(self):
        asked = [name for name in ("experts", "dense", "mixture") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"`{asked[0]}` and `{asked[1]}` exclude each other; leave one out")
        if self.layers is None and self.width is None and not asked and not self.average:
            raise ValueError(
                "say what becomes of the model: `average`, `layers`, `width`, `experts`, `dense` or `mixture`"
            )
        if self.by == "angle" and not isinstance(self.layers, int):
            raise ValueError("`by: angle` chooses layers: give their number in `layers`")
        return self

    @property
    def reads(self) -> bool:
        """Whether a choice reads the recipe's prompts."""
        by_use = self.experts is not None and self.experts.how != "random"
        by_size = self.width is not None and self.width.by == "activation"
        return self.by == "angle" or by_use or by_size or self.dense is not None

    @property
    def draws(self) -> bool:
        """Whether something is drawn by the recipe's seed."""
        at_random = self.experts is not None and self.experts.how == "random"
        return at_random or self.mixture is not None or (self.width is not None and self.width.by == "random")

    def identity(self, **how: Any) -> dict[str, Any]:
        return self.model_dump(mode="json", **how)


# ==== The objectives a recipe may name, with their options ====

LARGEST_OPTION = 1e6  # of weights, temperatures and margins nobody means more


@dataclass(frozen=True)
class Option:
    """One keyword of an objective: low <= value <= high, strictly where `above` or `below` says so."""

    kind: type
    default: Any
    low: float = -LARGEST_OPTION
    high: float = LARGEST_OPTION
    above: bool = False
    below: bool = False
    choices: tuple[str, ...] = ()

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, as the end of a sentence, or None."""
        if self.kind is list and isinstance(value, (list, tuple)):
            pairs = all(isinstance(p, (list, tuple)) and len(p) == 2 for p in value)
            whole = pairs and all(isinstance(i, int) and not isinstance(i, bool) for p in value for i in p)
            return None if value and whole else "must be pairs [[student layer, teacher layer], ...]"
        if self.kind is list and value not in self.choices:
            return f"must be {' or '.join(self.choices)}, or pairs [[student layer, teacher layer], ...]"
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.kind is bool:
            return None if isinstance(value, bool) else "must be true or false"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
            return "must be a finite number"
        if self.kind is int and value % 1:
            return "must be a whole number"
        low_enough = value < self.high if self.below else value <= self.high
        high_enough = value > self.low if self.above else value >= self.low
        if low_enough and high_enough:
            return None
        shown = self.high < LARGEST_OPTION or value > self.high
        upper = f" and {'below' if self.below else 'at most'} {self.high:g}" if shown else ""
        return f"must be {'above' if self.above else 'at least'} {self.low:g}{upper}"


@dataclass(frozen=True)
class ObjectiveSpec:
    """`signal` is what the function takes after the student's logits.

    "targets": token ids [N] · "dense": the teacher's logits [N, V] · "sparse": ids [N, K] and log-probabilities
    [N, K] of the likeliest tokens · "sampled": ids [N, K] of drawn tokens and their weights [N, K] · "drawn": the
    teacher's logits, the token that the student drew [N] and its log-probability when it did [N] · "aligned":
    logits [N, V'] of a teacher with another tokenizer · "hidden", "routers": what a live teacher does on the way
    to its logits · "own_routers": what the student's routers do, no teacher · "ahead": what a module beside the student
    says of the token after the next, no teacher.
    """

    name: str
    signal: str
    options: MappingProxyType[str, Option] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def live(self) -> bool:
        """Whether a live teacher must read the same batch."""
        return self.signal in ("dense", "drawn", "aligned", "hidden", "routers")


TEMPERED = {
    "temperature": Option(float, 1.0, low=0, above=True),
    "temperature_squared": Option(bool, False),
}
WEIGHT = Option(float, 1.0, low=0, above=True)


LAYERS = Option(list, "uniform", choices=("uniform", "last"))
_TOP = Option(int, 8, low=2)


def _objective(name: str, signal: str, tempered: bool = True, **options: Option) -> tuple[str, ObjectiveSpec]:
    tempered = TEMPERED if tempered and signal in ("dense", "sparse", "sampled") else {}
    return name, ObjectiveSpec(name, signal, MappingProxyType({**tempered, **options}))


OBJECTIVES: MappingProxyType[str, ObjectiveSpec] = MappingProxyType(
    dict(
        (
            _objective("cross_entropy", "targets"),
            _objective("forward_kl", "dense"),
            _objective("reverse_kl", "dense"),
            _objective("generalized_jsd", "dense", beta=Option(float, 0.5, low=0, high=1)),
            _objective("skew_forward_kl", "dense", alpha=Option(float, 0.1, low=0, high=1, below=True)),
            _objective("skew_reverse_kl", "dense", alpha=Option(float, 0.1, low=0, high=1, below=True)),
            _objective("adaptive_kl", "dense", mu=Option(float, 0.5, low=0, high=1)),
            _objective("total_variation", "dense"),
            _objective(
                "alpha_beta_divergence",
                "dense",
                alpha=Option(float, 0.2, low=0),
                beta=Option(float, 0.7, low=0),
            ),
            _objective(
                "sparse_forward_kl",
                "sparse",
                tail=Option(str, "renormalise", choices=("renormalise", "tail_bucket", "zero")),
            ),
            _objective("sampled_cross_entropy", "sampled"),
            _objective("ranking_hinge", "dense", tempered=False, top=_TOP, margin=Option(float, 1.0, low=0)),
            _objective("ranking_logistic", "dense", tempered=False, top=_TOP),
            _objective("top_reverse_kl", "dense", tempered=False, top=Option(int, 16, low=2)),
            _objective("sampled_reverse_kl", "drawn", clip=Option(float, 0.0, low=0, high=1, below=True)),
            _objective("uld", "aligned", temperature=TEMPERED["temperature"]),
            _objective("hidden_cosine", "hidden", layers=LAYERS),
            _objective("hidden_mse", "hidden", layers=LAYERS, normalise=Option(bool, True)),
            _objective("router_distillation", "routers", temperature=TEMPERED["temperature"], layers=LAYERS),
            _objective("sequence_balance", "own_routers"),
            _objective("batch_balance", "own_routers"),
            _objective(
                "multi_token",
                "ahead",
                target=Option(str, "tokens", choices=("tokens", "model")),
                frozen=Option(bool, False),
            ),
        )
    )
)


def _nearest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(str(word), words, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(words)}"


def problems(spec: dict[str, Any]) -> list[str]:
    """Everything wrong with one entry of a recipe's `objectives`, one line each; [] if nothing is."""
    name = spec.get("name")
    if name not in OBJECTIVES:
        return [f"objective {name!r} does not exist{_nearest(name, list(OBJECTIVES))}"]
    known = {"weight": WEIGHT, **OBJECTIVES[name].options}
    found = []
    for key, value in spec.items():
        if key == "name":
            continue
        if key not in known:
            found.append(f"objective {name} has no option {key!r}{_nearest(key, list(known))}")
        elif (trouble := known[key].problem(value)) is not None:
            found.append(f"objective {name}: {key} {trouble}, not {value!r}")
    if not found and name == "alpha_beta_divergence" and not any(resolve(spec)[k] for k in ("alpha", "beta")):
        found.append(f"objective {name}: alpha and beta cannot both be 0; give one a positive value")
    return found


def resolve(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec` (free of problems) with defaults filled in: name, weight, then every option by name."""
    options = OBJECTIVES[spec["name"]].options
    filled = {key: option.default for key, option in options.items()}
    return {"name": spec["name"], "weight": WEIGHT.default, **filled, **spec}
