"""The whole story in order: prompts -> generations -> dataset -> student, control -> eval -> report.html.

Every stage reads finished folders of the run and writes one, and is skipped where its folder already matches
its inputs, so `run` after an interruption continues, and `run` after a change says what changed.
"""

from collections.abc import Callable
from pathlib import Path

from distill.config.recipe import Recipe, resolved
from distill.stages import RECIPE, stored_date, write_record
from distill.storage import read_json


def stages(recipe: Recipe) -> list[tuple[str, Callable[[Recipe, bool], object]]]:
    """(folder or file it leaves, function) in order. Imported here: each pulls in torch."""
    from distill.data.filter import make_dataset
    from distill.data.generate import generate
    from distill.data.prompts import make_prompts
    from distill.evaluation.evaluate import evaluate_recipe
    from distill.training.arms import make_base, train_arms

    asked = [("generations", generate)] if recipe.teacher and not recipe.prompts.documents else []
    made = [("base", make_base)] if recipe.student.made_from else []
    return [
        *made,
        ("prompts", make_prompts),
        *asked,
        ("dataset", make_dataset),
        ("student", train_arms),
        ("eval", evaluate_recipe),
    ]


# Stages that all processes of a launch work on; the others are the main process's alone.
_SHARED = ("generations", "student", "eval")

# What each command of the CLI runs: the stage itself and, for `generate`, the prompts it needs.
STAGES_OF = {
    "base": ("base",),
    "generate": ("prompts", "generations"),
    "filter": ("dataset",),
    "train": ("student",),
    "evaluate": ("eval",),
    "run": ("prompts", "generations", "dataset", "student", "eval"),
}


def run(recipe: Recipe, command: str, redo: bool, say: Callable[[str], None]) -> None:
    """Run the stages of one command. `say` prints a line; errors are UserError and RunError."""
    from distill.devices import pick_device, processes
    from distill.models.chat import fix_date

    fix_date(recipe.date or stored_date(recipe.path))
    ranks = processes(pick_device(recipe.device, recipe.threads))
    for folder, function in stages(recipe):
        if folder not in STAGES_OF[command]:
            continue
        was_done = (recipe.path / folder / "manifest.json").is_file()
        if ranks.is_main_process or folder in _SHARED:
            function(recipe, redo)
        ranks.wait_for_everyone()
        names = ["student", "control"] if folder == "student" and recipe.control.enabled else [folder]
        for name in names:
            say(stage_line(recipe.path / name, "done before" if was_done else "done"))
    if command == "run" and ranks.is_main_process:
        write_record(
            recipe.path / RECIPE, resolved(recipe)
        )  # every stage agrees with it, also where none began


def stage_line(folder: Path, state: str) -> str:
    """One finished stage in one line: what it holds and how long it took."""
    path = folder / "manifest.json"
    if not path.is_file():
        return f"{folder.name}: {state}"
    manifest = read_json(path)
    counts = manifest["counts"]
    if "parameters_before" in counts:
        did = manifest.get("did") or [f"{len(manifest['layers'])} layers"]
        kept = f"{'; '.join(did)} of {manifest['config']['from']['model']}"
        sizes = f"{counts['parameters_before']:,} parameters before, {counts['parameters']:,} after"
        return f"{folder.name}: {state}, {kept}, {sizes}"
    shown = [f"{counts['rows']:,} rows", f"{counts['tokens']:,} tokens" if counts.get("tokens") else ""]
    if counts.get("dropped"):
        rules = ", ".join(f"{v:,} {k}" for k, v in counts["dropped_by_rule"].items())
        shown.append(f"dropped {counts['dropped']:,} ({rules})")
    if counts.get("errors"):
        shown.append(f"{counts['errors']:,} errors")
    return f"{folder.name}: {state}, {', '.join(filter(None, shown))}, {manifest['seconds']:.0f} s"
