"""The commands before a run: init writes a recipe, doctor examines it, completion teaches a shell.

distill init mine --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B
distill doctor mine.yaml
distill completion bash
"""

import argparse
import json

from distill import console
from distill.commands.command import Command, json_argument, pair_arguments, recipe_arguments, with_pair
from distill.errors import UserError

# What a word of the usage line stands for, for a shell that completes it.
_FOLDERS = ("DIR",)
_FILES = ("FILE", "PATH", "RECIPE", "MODEL", "STUDENT", "CHECKPOINT", "FOLDER")


def init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the recipe: NAME.yaml, run folder checkpoints/NAME")
    pair_arguments(parser)


def init(arguments: argparse.Namespace) -> int:
    from distill.commands.scaffold import write_recipe

    if arguments.teacher or arguments.student:
        console.quiet_libraries()
    path = write_recipe(arguments.name, arguments.teacher, arguments.student)
    print(f"{path}: a recipe with every key explained; next: distill doctor {path}, then distill run {path}")
    return 0


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    json_argument(parser)


def doctor(arguments: argparse.Namespace) -> int:
    from distill.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, with_pair(arguments.overrides, arguments))
    console.quiet_libraries()
    from distill.doctor.checks import examine
    from distill.doctor.findings import as_json, format_findings
    from distill.training.start import planned_base

    with planned_base(recipe) as planned:
        findings = examine(planned)
    report = as_json(findings)
    print(json.dumps(report, indent=2) if arguments.json else format_findings(findings))
    return 0 if report["ok"] else UserError.exit_code


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def completion(arguments: argparse.Namespace) -> int:
    """Prints a script made from the parsers themselves, so that completing never starts Python."""
    try:
        import shtab
    except ImportError:
        raise UserError("completion is written by shtab, which is not installed; pip install shtab") from None
    parser = arguments.parser
    for command in next(a.choices for a in parser._actions if a.dest == "command").values():
        for action in command._actions:
            words = str(action.metavar or "")
            if action.choices is None and any(word in words for word in (*_FOLDERS, *_FILES)):
                folder = any(word in words for word in _FOLDERS) and not any(w in words for w in _FILES)
                action.complete = shtab.DIRECTORY if folder else shtab.FILE
    print(shtab.complete(parser, arguments.shell))
    return 0


COMMANDS = [
    Command("init", "write a commented recipe NAME.yaml to start from", init_arguments, init),
    Command(
        "doctor", "is this pair fit for this recipe? before any weight is loaded", doctor_arguments, doctor
    ),
    Command("completion", "a script that completes commands and options", completion_arguments, completion),
]
