"""The objectives a recipe may name, with their options: a table that never imports torch.

A recipe says

    objectives: [{name: forward_kl, weight: 1.0, temperature: 2.0}, {name: cross_entropy, weight: 0.5}]

`problems(spec)` lists what is wrong with one such entry (unknown name, unknown option, wrong type, out of bounds),
`resolve(spec)` returns the entry with every default filled in, which is what a run writes down. The functions, with
definitions and sources, are in `distill.training.losses.divergences` under the same names; options are their
keyword arguments, except `weight`, which the training loop applies.
"""

import difflib
import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

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
