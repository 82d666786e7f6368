"""What every section of a recipe is made of, and the section about teacher signals. See distill/config/recipe.py."""

import math
import types
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

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
        for name, field in cls.model_fields.items():
            if name in data and _holds_bool(data[name]) and _asks_numbers(field.annotation):
                found.append(f"`{name}` is {str(data[name]).lower()}, a yes or no; give a number")
            if name in data and (twice := _twice(data[name], field.annotation)):
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
        if any("\ud800" <= c <= "\udfff" for c in value):
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
        description="top_k: for sparse_forward_kl; sampled: for sampled_cross_entropy, unbiased; hidden: the last "
        "hidden states and the head once, which are the whole distribution: for every dense objective (forward_kl ...)",
    )
    k: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        32, description="tokens kept, or drawn, per completion token"
    )
    bits: Literal[8, 16, 32] = Field(
        8,
        description="top_k: of a log-probability, 32 is exact; hidden: of a number of a state, 16 unless 32 (exact)",
    )
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="sampled: the teacher's, for the draws"
    )

    @model_validator(mode="after")
    def _tempered_by_the_loss(self):
        if self.kind in ("top_k", "hidden") and self.temperature != 1:
            raise ValueError(
                f"{self.kind} is stored at temperature 1; set the temperature of the objective instead"
            )
        return self
