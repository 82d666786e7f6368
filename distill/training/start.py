"""The stage `base/`: a student made from a model (`student.from`), as a folder that everything after it starts from.

    student: {from: {model: checkpoints/smollm2, layers: 10}, adapter: full}
    student: {from: {model: checkpoints/teacher, experts: {drop: 0.5, how: reap}}, adapter: full}

The folder is an ordinary checkpoint with card and manifest, and `student.model` of the recipe is its path: training,
evaluation (as `base`), the play page and provenance take it as they take any other. It is made before anything else,
in seconds; a choice by activation reads the recipe's prompts, which are drawn for it. `distill doctor` and `--dry-run`
look at a copy without weights (`planned_base`).
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distill.config.recipe import BASE_FOLDER, Recipe
from distill.convert.calibrate import calibration_of
from distill.convert.derive import Made, derived, derived_config
from distill.data.prompts import source_hash
from distill.data.provenance import model_source
from distill.data.terms import card_metadata
from distill.errors import UserError
from distill.models.load import check_model, load_config, load_model, load_tokenizer, resolve_model
from distill.models.student import save_student
from distill.stages import Stage

_KEPT = ("license", "license_name", "license_link", "language")  # of the card of the model it is made from


def make_base(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage; returns its manifest. Raises UserError for a model that cannot be cut so."""
    section = recipe.student.made_from
    for name in (section.model, *section.average):
        check_source(name)
    source, *others = (model_source(name) for name in (section.model, *section.average))
    config = {**recipe.base_identity, "source": source.get("files") or source.get("revision")}
    if others:
        config["averaged"] = [other.get("files") or other.get("revision") for other in others]
    if section.reads and recipe.prompts.source != "tasks":
        config["source_hash"] = source_hash(recipe.prompts.source)
    stage = Stage(recipe.path, BASE_FOLDER, config, inputs={})
    if stage.done(redo):
        return stage.manifest
    whole = load_model(section.model, "fp32", training=True)
    tokenizer = load_tokenizer(section.model, recipe.student.chat_template_kwargs)
    before = _parameters(whole)
    made = derived(whole, section, calibration_of(recipe, whole, tokenizer))
    del whole
    counts = {"rows": 0, "errors": 0, "parameters_before": before, "parameters": _parameters(made.model)}
    stage.begin(redo)
    save_student(
        made.model, tokenizer, stage.folder, base_card(recipe.path.name, section.model, made, counts)
    )
    return stage.finish(counts, device="cpu", base_source=source, did=made.did, **made.chosen)


def check_source(name: str) -> None:
    """A whole model, no adapter. Raises UserError."""
    if (Path(resolve_model(name)) / "adapter_config.json").is_file():
        raise UserError(f"student.from.model '{name}' is an adapter; merge it first (distill merge)")
    check_model(name)


@contextlib.contextmanager
def planned_base(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with a base that has config and tokenizer but no weights, where the real one is not there yet."""
    section = recipe.student.made_from
    if section is None or (recipe.path / BASE_FOLDER / "config.json").is_file():
        yield recipe
        return
    check_source(section.model)
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        base = Path(folder) / BASE_FOLDER
        derived_config(load_config(section.model), section).save_pretrained(base)
        load_tokenizer(section.model, recipe.student.chat_template_kwargs).save_pretrained(base)
        student = recipe.student.model_copy(update={"model": str(base)})
        yield recipe.model_copy(update={"student": student})


def base_card(name: str, source: str, made: Made, counts: dict[str, int]) -> str:
    """The model card: what it was made from, how, and that it is not trained since."""
    given = card_metadata(source)
    front = {key: given[key] for key in _KEPT if key in given}
    front |= {"base_model": given.get("base_model", source), "library_name": "transformers"}
    front["pipeline_tag"] = "text-generation"
    share = counts["parameters"] / counts["parameters_before"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {name}: base",
        "",
        f"Made from `{source}`: {'; '.join(made.did)}.",
        "",
        f"- parameters: {counts['parameters_before']:,} before, {counts['parameters']:,} after ({share:.0%})",
        *(f"- {key}: {shown}" for key, shown in _choices(made.chosen)),
        "- not trained since: what was left out is missing until it is",
        "- terms: those of the model that it was made from",
        "",
    ]
    return "\n".join(lines)


def _choices(chosen: dict[str, Any]) -> list[tuple[str, str]]:
    """What was kept, for the card."""
    found = [("layers kept", ", ".join(map(str, chosen["layers"])))] if "layers" in chosen else []
    for key in ("experts", "dense"):
        for layer, experts in chosen.get(key, {}).get("experts", {}).items():
            found.append((f"experts of {layer}", ", ".join(map(str, experts))))
    return found


def _parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())
