"""docs/recipes.md: every key of a recipe with type, default and meaning, written from the classes that check them.

    python -m distill.recipe_reference            # rewrites docs/recipes.md; a test compares the two

Types and bounds are read from the annotations, meanings and units from each field's `description` (a test asks
for one on every key), so the page cannot say what the program does not do. `entries` gives the same as data.
"""

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distill.bench_sections import Bench
from distill.config import PROJECT_ROOT, Recipe
from distill.objectives import OBJECTIVES, WEIGHT, Option
from distill.sections import Section
from distill.shards import write_atomic
from distill.train_sections import Objective

PAGE = PROJECT_ROOT / "docs" / "recipes.md"
_SIGNAL_MEANING = {
    "targets": "the teacher's text",
    "dense": "logits of a live teacher",
    "sparse": "stored `top_k` signals",
    "sampled": "stored `sampled` signals",
    "aligned": "logits of a live teacher with another tokenizer",
    "hidden": "hidden states of a live teacher",
    "routers": "routers of a live MoE teacher",
    "own_routers": "the student's own routers, no teacher",
}
_NUMBERS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true, false",
    date: "date",
    Any: "anything",
}
_OPENING = """# Recipe reference

Every key of a recipe, written by `python -m distill.recipe_reference` from the classes that check it: edit those, not
this page. A recipe is YAML; any key can be overridden on the command line as `key.sub=value`, a list element by its
number (`train.objectives.0.weight=0.5`). *empty* is YAML's `null`. An unknown key, a wrong type, a value out of bounds
and a contradiction are told all at once, one line each, before anything is loaded.

```yaml
run_dir: checkpoints/mine                  # where the run lives: one folder per stage
student: {model: checkpoints/base}         # who learns
teacher: {model: checkpoints/teacher}      # from whom; or prompts.solutions, to train on worked steps
```

is a whole recipe; everything else has a default. `distill run RECIPE --dry-run` prints the recipe with all of them
filled in.
"""


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
    found = {type(m): m for m in metadata}
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
        low = (Gt(option.low) if option.above else Ge(option.low),) if option.low > float("-inf") else ()
        high = (Lt(option.high) if option.below else Le(option.high),) if option.high < float("inf") else ()
        bounds = bounds_text([*low, *high])
        kind = f"{_NUMBERS[option.kind]}{f', {bounds}' if bounds else ''}"
    return kind, f"`{json.dumps(option.default).replace(chr(34), '')}`"


def page() -> str:
    """The whole of docs/recipes.md."""
    lines = [
        _OPENING,
        *_tables(Recipe, "Top level"),
        _objectives(),
        *_tables(Bench, "A grid of `distill bench`"),
    ]
    return "\n".join(lines) + "\n"


def _tables(root: type[Section], title: str) -> Iterator[str]:
    """Heading, docstring and keys of a file's top level and of every section below it."""
    for path, section, own in entries(root):
        yield f"\n## {f'`{path}`' if path else title}\n"
        yield " ".join((section.__doc__ or "").split()) + "\n"
        if own:
            yield "| key | type | default | |\n|---|---|---|---|"
            yield from (
                f"| `{e.key}` | {_cell(e.type)} | {_cell(e.default)} | {_cell(e.description)} |" for e in own
            )


def _objectives() -> str:
    """The table of `train.objectives`: what each compares the student with, and its options."""
    lines = [
        "\n## Objectives\n",
        "An entry of `train.objectives` is `{name: ..., weight: ...}` and the options of that name. `weight` "
        f"(number, {bounds_text([Gt(WEIGHT.low)])}; default {WEIGHT.default:g}) multiplies its loss before the sum. "
        "Definitions, directions and sources: [api.md](api.md#distilllosses); which one to take: "
        "[objectives.md](objectives.md).\n",
        "| name | compares with | option | type | default |",
        "|---|---|---|---|---|",
    ]
    for name, objective in OBJECTIVES.items():
        with_what = _SIGNAL_MEANING[objective.signal]
        rows = [(f"`{o}`", *option_text(option)) for o, option in objective.options.items()] or [("", "", "")]
        for number, (option, kind, default) in enumerate(rows):
            first = (f"`{name}`", with_what) if number == 0 else ("", "")
            lines.append(f"| {' | '.join([*first, option, _cell(kind), default])} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    write_atomic(PAGE, page())
    keys = sum(len(own) for root in (Recipe, Bench) for _, _, own in entries(root))
    print(f"{PAGE.relative_to(PROJECT_ROOT)}: {keys} keys, {len(OBJECTIVES)} objectives", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
