"""The commands that run stages of a recipe: demo, run, generate, filter, train, report.

`distill evaluate RECIPE` (distill/evaluate_command.py) ends in `run_recipe` too.
"""

import argparse
from pathlib import Path

from distill import console
from distill.command import Command, override_arguments, recipe_arguments, run_arguments, with_pair


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    override_arguments(parser)
    run_arguments(parser)


def demo(arguments: argparse.Namespace) -> int:
    return run_recipe("run", "recipes/demo.yaml", with_pair(arguments.overrides, arguments), arguments)


def stage_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    run_arguments(parser)


def stage(arguments: argparse.Namespace) -> int:
    """The command is the name of what is run."""
    overrides = with_pair(arguments.overrides, arguments)
    return run_recipe(arguments.command, arguments.recipe, overrides, arguments)


def filter_arguments(parser: argparse.ArgumentParser) -> None:
    stage_arguments(parser)
    parser.add_argument("--explain", action="store_true", help="per rule: its count and examples")


def filter_rows(arguments: argparse.Namespace) -> int:
    code = stage(arguments)
    if arguments.explain and not arguments.dry_run and console.first_process():
        from distill.config import load_recipe
        from distill.filter import explain

        print(explain(load_recipe(arguments.recipe, with_pair(arguments.overrides, arguments)).path))
    return code


def run_recipe(command: str, path: str, overrides: list[str], arguments: argparse.Namespace) -> int:
    """One command's stages of the recipe at `path`; returns the exit code."""
    from distill.config import load_recipe

    recipe = load_recipe(path, overrides)
    from distill import pipeline
    from distill.models import quiet_libraries

    quiet_libraries()
    if arguments.dry_run:
        from distill.plan import derived

        print(pipeline.resolved(recipe))
        for name, value in derived(recipe).items():
            print(f"# {name}: {_shown(value)}")
        return 0
    if command != "report":
        from distill.preflight import check_recipe
        from distill.shards import write_atomic

        check_recipe(recipe, command)
        if console.first_process():
            write_atomic(recipe.path / "recipe.yaml", pipeline.resolved(recipe))
        pipeline.run(recipe, command, arguments.redo, say=console.say)
    if command in ("run", "report"):
        _report(recipe.path)
    return 0


def _shown(value: object) -> str:
    """A forecast for people; what nothing tells is unknown."""
    return "unknown" if value is None else value if isinstance(value, str) else f"{value:,}"


def _report(run_dir: Path) -> None:
    from distill.dossier import build_dossier
    from distill.report import build_report, summary_table
    from distill.shards import read_json

    page = build_report(run_dir)
    print()
    print(summary_table(read_json(run_dir / "eval" / "metrics.json")))
    print(f"\nreport: {page}\ndossier of the checkpoints: {build_dossier(run_dir / 'eval')}")


COMMANDS = [
    Command("demo", "the whole story on this machine, no download (recipes/demo.yaml)", demo_arguments, demo),
    Command("run", "every stage of the recipe, resuming what is done", stage_arguments, stage),
    Command("generate", "the teacher answers the training prompts", stage_arguments, stage),
    Command("filter", "keep what the verifier accepts, as a training set", filter_arguments, filter_rows),
    Command("train", "train the student, and the control arm without a teacher", stage_arguments, stage),
    Command("report", "one self-contained report.html from a run folder", stage_arguments, stage),
]
