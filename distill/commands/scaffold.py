"""`distill init NAME`: a commented recipe to start from, every key with its meaning, written from the classes.

    distill init mine                                                  the embedded pair, as the demo
    distill init mine --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B

Keys that a first recipe sets stand as they are; all others are there as comments with their defaults, explained by
the same descriptions as docs/recipes.md. Apart from the command, since the classes take a while to import.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distill.config.recipe import Recipe, load_recipe
from distill.config.reference import default_text, section_of
from distill.config.section import Section
from distill.config.training import Objective
from distill.errors import UserError
from distill.files import file_problem, shown
from distill.storage import write_atomic

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
