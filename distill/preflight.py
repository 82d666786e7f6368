"""Checks of a teacher/student pair before any weight is loaded: mistakes surface in a second, all at once.

check_recipe(recipe, "run")        # raises one UserError with every problem found
"""

from importlib.util import find_spec
from pathlib import Path

from distill.config import Recipe
from distill.devices import pick_device
from distill.endpoint import check_endpoint
from distill.errors import UserError
from distill.models import (
    check_adapter_base,
    check_weights,
    load_config,
    load_tokenizer,
    resolve_model,
    same_vocabulary,
    tokenizer_fingerprint,
)
from distill.precision import resolve_precision
from distill.signals import STORED, SignalFormat, signal_problems
from distill.students import check_student, student_tokenizer
from distill.terms import require


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
        choice = check(resolve_precision, recipe.train.precision, device)
        if choice:
            check(check_student, recipe.student, choice.name, device)
        check(_check_trackers, recipe)
    endpoint = recipe.teacher.endpoint if recipe.teacher else None
    local_teacher = recipe.teacher.model if recipe.teacher and not endpoint else None
    for name in filter(None, (local_teacher, recipe.student.model)):
        check(check_model, name)
    answered = (recipe.path / "generations" / "manifest.json").is_file()
    if endpoint and command in ("run", "generate") and not answered:
        check(check_endpoint, endpoint)
    if command != "evaluate":  # measuring trains nothing
        check(require, recipe)
    if not problems and recipe.teacher:
        problems += _check_pair(recipe)
    elif not problems:
        problems += [
            f"objective {o.name} needs a teacher, and the recipe has none; name one, or use cross_entropy"
            for o in recipe.train.objectives
            if o.live or o.signal in STORED
        ]
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


def _check_trackers(recipe: Recipe) -> None:
    absent = [name for name in recipe.train.trackers if find_spec(name) is None]
    if absent:
        raise UserError(
            f"train.trackers: {', '.join(absent)} not installed; pip install {' '.join(absent)}, or leave it out "
            "(metrics.jsonl is written in any case)"
        )


def _check_pair(recipe: Recipe) -> list[str]:
    """What makes this teacher and this student unfit for the objectives asked for."""
    live = [o.name for o in recipe.train.objectives if o.live]
    on_logits = [o.name for o in recipe.train.objectives if o.live and o.signal != "aligned"]
    found = _check_signals(recipe)
    if live and recipe.teacher.endpoint:
        found.append(
            f"objective {live[0]} needs the model itself, and the endpoint of '{recipe.teacher.model}' gives text "
            "alone; use train.objectives='[{name: cross_entropy}]' (distil the text), or a teacher loaded here"
        )
    elif on_logits and not same_vocabulary(
        load_tokenizer(recipe.teacher.model), student_tokenizer(recipe.student)
    ):
        found.append(
            f"objective {on_logits[0]} compares logits, but teacher '{recipe.teacher.model}' and student "
            f"'{recipe.student.model or 'from scratch'}' have different vocabularies; use "
            "train.objectives='[{name: cross_entropy}]' (distil the text), or a student with the teacher's tokenizer"
        )
    return found


def _check_signals(recipe: Recipe) -> list[str]:
    """What is wrong with keeping the teacher's signals, with scoring given text, or with training on either."""
    signal, given = recipe.generate.signal, recipe.prompts.completion_column
    found = signal_problems(signal.kind, signal.temperature, recipe.train.objectives)
    if recipe.teacher.endpoint:
        asked = {"generate.signal": signal.kind != "none", "prompts.completion_column": given}
        found += [
            f"{key} needs the logits of '{recipe.teacher.model}', and its endpoint gives text alone; leave it "
            "out, or load the teacher here"
            for key in (key for key, wanted in asked.items() if wanted)
        ]
    elif not found and any(o.signal in STORED for o in recipe.train.objectives):
        teacher, student = load_tokenizer(recipe.teacher.model), student_tokenizer(recipe.student)
        form = SignalFormat.from_recipe(signal, len(teacher), tokenizer_fingerprint(teacher))
        found += form.problems(tokenizer_fingerprint(student))
    if given and recipe.prompts.source == "tasks":
        found.append(
            "prompts.completion_column names texts of a file; give the file as prompts.source, or leave it out"
        )
    if given and recipe.generate.samples != 1:
        found.append("prompts.completion_column gives one text to every prompt; set generate.samples=1")
    return found
