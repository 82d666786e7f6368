"""`distill init NAME`: a commented recipe to start from, with every key, read from the classes that check it.

    distill init mine                                                  the embedded pair, as the demo
    distill init mine --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B

Keys that a first recipe sets stand as they are; all others are there as comments with their defaults, explained by
the same descriptions as docs/recipes.md. Apart from the command, since the classes take a while to import.

    for path, section, own in entries(): print(path, [(e.key, e.type, e.default, e.description) for e in own])

Types and bounds come from the annotations, meanings and units from each field's `description` (a test asks for one on
every key), so what is printed cannot say what the program does not do. `write_recipe` writes its comments from here,
docs/generate/recipes.py the page docs/recipes.md.
"""

import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distill.config.recipe import Recipe, load_recipe
from distill.config.section import LARGEST, LARGEST_OPTION, Option, Section
from distill.config.training import Objective
from distill.errors import UserError
from distill.files import file_problem, shown
from distill.storage import write_atomic

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


# ==== `distill init NAME` ====

_EMBEDDED = ("checkpoints/teacher", "checkpoints/base")
_COLUMN = 44  # where comments begin
_ANSWER = 1024  # tokens of an answer with its thinking, where both models have room for that


def write_recipe(name: str, teacher: str | None, student: str | None) -> Path:
    """Write NAME.yaml in the current folder; returns its path. Raises UserError where it is there already."""
    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if problem := file_problem(path):
        raise UserError(f"'{shown(name)}' {problem}")
    if not Path(name).name.removesuffix(".yml").removesuffix(".yaml").strip("."):
        raise UserError(f"'{name}' is no name of a recipe; give one, as mine")
    if path.exists():
        raise UserError(f"{path} is there already; choose another name, or move it away")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; make it first")
    for option, given in (("--teacher", teacher), ("--student", student)):
        if given is not None and not given.strip():
            raise UserError(f"{option} is empty; give a model, or leave it out")
    chosen = (teacher or _EMBEDDED[0], student or _EMBEDDED[1])
    values = _values(path.stem, *chosen)
    text = "\n".join([*_opening(path), *_section(Recipe, values, 0)]) + "\n"
    write_atomic(path, text)
    load_recipe(str(path))  # what is written is a recipe
    return path


def _values(stem: str, teacher: str, student: str) -> dict[str, Any]:
    """What a first recipe of this pair sets."""
    objectives = [{"name": "cross_entropy", "weight": 1.0}]
    own = (teacher, student) == _EMBEDDED
    new = 80 if own else _ANSWER
    if own or _one_vocabulary(teacher, student):
        objectives.append({"name": "forward_kl", "weight": 1.0})
    if not own:
        room = [c for c in map(_context, (teacher, student)) if c]
        new = min([_ANSWER, *(max(1, c // 2) for c in room)])
    return {
        "run_dir": f"checkpoints/{stem}",
        "seed": 0,
        "prompts": {"source": "tasks", "levels": {"easy": 600, "medium": 800, "hard": 2000}},
        "teacher": {"model": teacher},
        "generate": {
            "samples": 2,
            "temperature": 0.7,
            "max_new_tokens": new,
            "batch_size": 256 if own else 32,
        },
        "filter": {"correct_only": True},
        "student": {"model": student, "adapter": "lora", "lora": {"rank": 16, "alpha": 32.0}},
        "train": {
            "objectives": objectives,
            "steps": 400,
            "batch_size": 64,
            "micro_batch_size": 64 if own else 4,
            "learning_rate": 1e-2 if own else 2e-4,
            "precision": "auto",
        },
        "control": {"enabled": True},
        "evaluate": {"levels": {"easy": 210, "medium": 210, "hard": 420}, "max_new_tokens": new},
    }


def _one_vocabulary(teacher: str, student: str) -> bool:
    """Whether logits can be compared; False where a tokenizer is out of reach. UserError for a folder not there."""
    from distill.models.load import load_tokenizer, resolve_model, same_vocabulary

    for model in (teacher, student):
        resolve_model(model)
    try:
        return same_vocabulary(load_tokenizer(teacher), load_tokenizer(student))
    except UserError:
        return False


def _context(model: str) -> int | None:
    from distill.models.load import load_config

    try:
        config = load_config(model).get_text_config(decoder=True)
    except UserError:
        return None
    return getattr(config, "max_position_embeddings", None)


def _opening(path: Path) -> list[str]:
    return [
        f"# {path.stem}: teacher outputs -> student -> evaluation -> report. One page, one experiment.",
        "#",
        f"#   distill doctor {path}               is this pair fit for it? seconds, no weights",
        f"#   distill run {path} --dry-run        what it will take",
        f"#   distill run {path}                  every stage, resuming what is done",
        "#",
        "# Keys behind a # have the value shown. Any key can be changed on the command line, as train.steps=200.",
        "",
    ]


def _section(section: type[Section], values: dict[str, Any], depth: int) -> Iterator[str]:
    """Lines of one section: its keys in order, those not in `values` as comments."""
    for name, field in section.model_fields.items():
        name = field.alias or name
        inner = section_of(field.annotation)
        nested = inner is not None and inner is not Objective
        if nested:
            yield from _nested(name, inner, values.get(name), depth)
            continue
        given = name in values
        shown = _yaml(values[name]) if given else _default(field)
        yield _line(name, shown, field.description or "", depth, commented=not given)


def _nested(name: str, inner: type[Section], values: dict[str, Any] | None, depth: int) -> Iterator[str]:
    words = re.split(r"(?<! al)[.;] ", " ".join((inner.__doc__ or "").split()))[0].rstrip(".")
    if depth == 0:
        yield ""
    if values is None:
        yield _line(name, "", words, depth, commented=True)
        yield from _section(inner, {}, depth + 1)
        return
    yield _line(name, "", words, depth, commented=False)
    yield from _section(inner, values, depth + 1)


def _line(name: str, value: str, words: str, depth: int, commented: bool) -> str:
    text = f"{'  ' * depth}{'# ' if commented else ''}{name}:{f' {value}' if value else ''}"
    return f"{text:<{_COLUMN - 2}}  # {words}" if words else text


def _default(field: Any) -> str:
    shown = default_text(field).strip("`")
    return {"empty": "null", "required": ""}.get(shown, shown)


def _yaml(value: Any) -> str:
    """A value on one line, as YAML."""
    if isinstance(value, float):
        return f"{value:g}" if "e" not in f"{value:g}" else f"{value:.1e}"
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()
    return json.dumps(value) if not isinstance(value, str) else yaml.safe_dump(value).splitlines()[0]
