"""Every key of a recipe with type, bounds, default and meaning, read from the classes that check them.

    for path, section, own in entries(): print(path, [(e.key, e.type, e.default, e.description) for e in own])

Types and bounds come from the annotations, meanings and units from each field's `description` (a test asks for one on
every key), so what is printed cannot say what the program does not do. `distill init` writes its comments from here,
docs/generate/recipes.py the page docs/recipes.md.
"""

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distill.config.objectives import LARGEST_OPTION, Option
from distill.config.recipe import Recipe
from distill.config.section import LARGEST, Section
from distill.config.training import Objective

_NUMBERS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true, false",
    date: "date",
    Any: "anything",
    JsonValue: "anything",
}


@dataclass(frozen=True)
class Entry:
    """One key: its dotted path, type with bounds, default and description, all as text."""

    key: str
    type: str
    default: str
    description: str


def entries(
    section: type[Section] = Recipe, prefix: str = ""
) -> Iterator[tuple[str, type[Section], list[Entry]]]:
    """(path, section class, its own keys), then the same for every section below it, depth first."""
    own, below = [], []
    for name, field in section.model_fields.items():
        name = field.alias or name
        inner = section_of(field.annotation)
        if inner is not None and inner is not Objective:
            many = {dict: ".NAME", list: ".0"}.get(get_origin(field.annotation), "")
            below.append((f"{prefix}{name}{many}", inner))
        else:
            own.append(
                Entry(
                    f"{prefix}{name}",
                    type_text(field.annotation, field.metadata),
                    default_text(field),
                    field.description or "",
                )
            )
    yield prefix.rstrip("."), section, own
    for path, inner in below:
        yield from entries(inner, f"{path}.")


def section_of(annotation: Any) -> type[Section] | None:
    """The section class behind an annotation, looking through Optional and list."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def type_text(annotation: Any, metadata: list[Any] = ()) -> str:
    """An annotation in words: `int` with ge=1 is "whole number, at least 1"."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        further = [m for a in inside[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return type_text(inside[0], [*metadata, *further])
    if origin in (Union, types.UnionType):
        words = [type_text(a) for a in inside if a is not type(None)]
        return ", or ".join([*words, *(["empty"] if type(None) in inside else [])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is list:
        return f"list of: {type_text(inside[0])}"
    if origin is tuple:
        return (
            f"list of: {type_text(inside[0])}"
            if inside[-1] is ...
            else f"{len(inside)} x {type_text(inside[0])}"
        )
    if origin is dict:
        return f"mapping of {type_text(inside[0])} to {type_text(inside[1])}"
    if annotation is Objective:
        return "objective, see [below](#objectives)"
    bounds = bounds_text(metadata)
    return f"{_NUMBERS[annotation]}{f', {bounds}' if bounds else ''}"


def bounds_text(metadata: list[Any]) -> str:
    """ "at least 1", "above 0, at most 5", "0 to 1"."""
    found = {type(m): m for m in metadata if getattr(m, "le", getattr(m, "lt", 0)) < LARGEST}
    low = {Ge: "at least", Gt: "above"}
    high = {Le: "at most", Lt: "below"}
    if Ge in found and Le in found:
        return f"{found[Ge].ge:g} to {found[Le].le:g}"
    parts = [f"{word} {getattr(found[kind], kind.__name__.lower()):g}"
             for kind, word in (low | high).items() if kind in found]  # fmt: skip
    return ", ".join(parts)


def default_text(field: FieldInfo) -> str:
    """The default as YAML would take it; "required" where there is none."""
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "empty"
    if isinstance(value, list) and value and isinstance(value[0], Objective):
        value = [{"name": o.name} for o in value]
    if isinstance(value, str):
        return f"`{value}`" if value else "`''`"
    return f"`{json.dumps(value).replace(chr(34), '')}`"


def option_text(option: Option) -> tuple[str, str]:
    """Type and default of one option of an objective."""
    if option.kind is list:
        kind = (
            f"{', '.join(f'`{c}`' for c in option.choices)}, or pairs [[student layer, teacher layer], ...]"
        )
    elif option.choices:
        kind = ", ".join(f"`{c}`" for c in option.choices)
    else:
        low = (Gt(option.low) if option.above else Ge(option.low),) if option.low > -LARGEST_OPTION else ()
        high = (Lt(option.high) if option.below else Le(option.high),) if option.high < LARGEST_OPTION else ()
        bounds = bounds_text([*low, *high])
        kind = f"{_NUMBERS[option.kind]}{f', {bounds}' if bounds else ''}"
    return kind, f"`{json.dumps(option.default).replace(chr(34), '')}`"
