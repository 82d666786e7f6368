"""Checks of a teacher/student pair before any weight is loaded: mistakes surface in a second, all at once.

check_recipe(recipe, "run")        # raises one UserError with every problem found
"""

from pathlib import Path

from distill.config import Recipe
from distill.devices import pick_device
from distill.errors import UserError
from distill.models import (
    check_adapter_base,
    check_weights,
    load_config,
    load_tokenizer,
    resolve_model,
    same_vocabulary,
)
from distill.precision import resolve_precision
from distill.students import student_tokenizer


def check_recipe(recipe: Recipe, command: str) -> None:
    """Everything that can be known without loading weights. Raises UserError with all problems."""
    problems: list[str] = []

    def check(function, *arguments):
        try:
            return function(*arguments)
        except UserError as error:
            problems.extend(error.problems)
            return None

    device = check(pick_device, recipe.device, recipe.threads)
    if device is not None and command in ("run", "train"):
        check(resolve_precision, recipe.train.precision, device)
    names = {"teacher": recipe.teacher.model if recipe.teacher else None, "student": recipe.student.model}
    for name in filter(None, names.values()):
        check(check_model, name)
    if not problems and recipe.teacher:
        problems += _check_pair(recipe)
    if problems:
        raise UserError(*dict.fromkeys(problems))


def check_model(name: str) -> None:
    """A model (or adapter and its base) that can be loaded: config, whole weights, tokenizer."""
    folder = Path(resolve_model(name))
    if folder.is_dir():
        check_weights(folder)
        if (folder / "adapter_config.json").is_file():
            check_adapter_base(folder)
        else:
            load_config(name)
    load_tokenizer(name)


def _check_pair(recipe: Recipe) -> list[str]:
    """What makes this teacher and this student unfit for the objectives asked for."""
    on_logits = [o.name for o in recipe.train.objectives if o.signal == "dense"]
    stored = [o.name for o in recipe.train.objectives if o.signal == "sparse"]
    found = []
    if stored:
        found.append(
            f"objective {stored[0]} needs stored teacher signals, which no stage writes yet; use forward_kl"
        )
    if on_logits and not same_vocabulary(
        load_tokenizer(recipe.teacher.model), student_tokenizer(recipe.student)
    ):
        found.append(
            f"objective {on_logits[0]} compares logits, but teacher '{recipe.teacher.model}' and student "
            f"'{recipe.student.model or 'from scratch'}' have different vocabularies; use "
            "train.objectives='[{name: cross_entropy}]' (distil the text), or a student with the teacher's tokenizer"
        )
    return found
