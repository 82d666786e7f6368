"""The commands that train nothing: init writes a recipe, doctor examines it, cost counts, completion teaches a shell.

    distill init mine --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B
    distill doctor mine.yaml
    distill cost [deepseek-v3 | deepseek-r1 | RUN_DIR | RECIPE [key=value ...]] [--usd-per-hour USD] [--json]
    distill cost [RUN_DIR | RECIPE] --break-even [--queries N] [--students N] [--out DIR] [--lang zh] [--json]
    distill completion bash

`cost` prints a published bill, the ledger of a run, or the break-even between distilling and its alternatives.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from distill import console
from distill.commands.command import (
    Command,
    amount,
    json_argument,
    language_argument,
    pair_arguments,
    recipe_arguments,
    with_pair,
)
from distill.errors import UserError, nearest
from distill.files import check_targets, like_it, shown

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
    from distill.doctor.pair import as_json, format_findings
    from distill.training.arms import planned_base

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


# ==== what it costs ====

_BILLS = ("deepseek-v3", "deepseek-r1")


# Options that replace one number of the break-even: distill/cost/break_even.py says what each is.
_AMOUNTS = {
    "teacher_query": "one answer of the teacher",
    "student_query": "one answer of the distilled student",
    "direct_query": "one answer of the directly trained one, if another",
    "teacher_outputs": "the teacher's answers to train on, once for all students",
    "distil_student": "distilling one student",
    "direct_student": "training one student directly to the same accuracy",
    "teacher_training": "training the teacher, where that must be paid",
}


def cost_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", nargs="?", metavar="deepseek-v3 | deepseek-r1 | RUN_DIR | RECIPE")
    add(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="with a RECIPE, as prices.usd_per_device_hour=2",
    )
    add("--usd-per-hour", type=amount, metavar="USD", help="price of one device-hour, before the recipe's")
    add("--break-even", action="store_true", help="distil, train directly, or keep calling the teacher")
    group = parser.add_argument_group("with --break-even", "amounts in one unit; a run tells most of them")
    add = group.add_argument
    add("--queries", type=amount, metavar="N", help="answered in all, 1,000,000")
    add("--students", type=amount, metavar="N", help="made from the same teacher, 1")
    add("--unit", choices=["usd", "device_hours", "flops"], help="default: usd where a price is known")
    for name, words in _AMOUNTS.items():
        add(f"--{name.replace('_', '-')}", type=amount, metavar="X", help=words)
    add("--direct-multiple", type=amount, metavar="M",
        help="direct training takes M times the control arm to be as accurate")  # fmt: skip
    add("--out", metavar="DIR", help="write break_even.html and break_even.json there")
    language_argument(parser)
    json_argument(parser)


def cost(arguments: argparse.Namespace) -> int:
    what = arguments.what
    if arguments.overrides and not str(what).endswith((".yaml", ".yml")):
        raise UserError(f"'{arguments.overrides[0]}': key=value goes with a RECIPE")
    check_targets(folder_out=arguments.out)
    if arguments.break_even:
        found, text = _break_even(arguments)
    else:
        found, text = _bill(arguments)
    print(json.dumps(found, indent=2) if arguments.json else text(found))
    if arguments.break_even and arguments.out:
        from distill.cost.page import write_page

        page = write_page(found, Path(arguments.out), arguments.lang)
        if not arguments.json:
            print(f"page: {page}")
    return 0


def _bill(arguments: argparse.Namespace):
    """(what was found, how it prints) of a published bill or a run."""
    asked = (*_AMOUNTS, "direct_multiple", "queries", "students", "unit", "out")
    unused = [name for name in asked if getattr(arguments, name) is not None]
    if unused:
        raise UserError(f"--{unused[0].replace('_', '-')} goes with --break-even")
    if arguments.what in (None, "deepseek-v3"):
        from distill.cost.published import deepseek_v3_bill, format_bill

        return deepseek_v3_bill(arguments.usd_per_hour), format_bill
    if arguments.what == "deepseek-r1":
        from distill.cost.published import deepseek_r1_bill, format_r1

        return deepseek_r1_bill(arguments.usd_per_hour), format_r1
    from distill.data.ledger import format_ledger, run_ledger

    run_dir, prices = _run_and_prices(arguments)
    return run_ledger(run_dir, prices), format_ledger


def _run_and_prices(arguments: argparse.Namespace) -> tuple[Path, dict[str, float] | None]:
    """The run folder, and the prices of its recipe; --usd-per-hour goes before the recipe's."""
    if arguments.what.endswith((".yaml", ".yml")):
        from distill.config.recipe import load_recipe

        recipe = load_recipe(arguments.what, arguments.overrides)
        run_dir = recipe.path
        prices = {key: value for key, value in recipe.prices.model_dump().items() if value is not None}
    else:
        from distill.data.ledger import recipe_prices

        run_dir = Path(arguments.what)
        if not run_dir.is_dir():
            raise UserError(
                f"'{shown(arguments.what)}' is no folder of a run, and no published bill"
                f"{like_it(run_dir) or nearest(arguments.what, _BILLS)}"
            )
        prices = recipe_prices(run_dir) or {}
    if arguments.usd_per_hour is not None:
        prices["usd_per_device_hour"] = arguments.usd_per_hour
    return run_dir, prices or None


def _break_even(arguments: argparse.Namespace):
    from distill.cost.break_even import Costs, break_even, from_run
    from distill.cost.page import format_break_even

    given = {name: getattr(arguments, name) for name in _AMOUNTS}
    if arguments.what in _BILLS:
        raise UserError(f"--break-even goes with a RUN_DIR, a RECIPE or numbers, not with {arguments.what}")
    if arguments.what:
        run_dir, prices = _run_and_prices(arguments)
        inputs = from_run(run_dir, prices, arguments.unit, arguments.direct_multiple, given)
    else:
        inputs = _without_a_run(arguments, given)
    costs = Costs(**inputs["costs"])
    queries = 1e6 if arguments.queries is None else arguments.queries
    students = 1 if arguments.students is None else arguments.students
    found: dict[str, Any] = {**break_even(costs, queries, students), "inputs": inputs}
    return found, format_break_even


def _without_a_run(arguments: argparse.Namespace, given: dict[str, float | None]) -> dict[str, Any]:
    """Numbers from options; with none of them, the committed measurement of the demo."""
    from distill.cost.break_even import from_options, measured_inputs

    need_run = [n for n in ("direct_multiple", "usd_per_hour") if getattr(arguments, n) is not None]
    if need_run:
        raise UserError(f"--{need_run[0].replace('_', '-')} with --break-even needs a RUN_DIR; name one")
    if any(value is not None for value in given.values()) or arguments.unit:
        return from_options(given, arguments.unit)
    return measured_inputs()


COMMANDS = [
    Command("init", "write a commented recipe NAME.yaml to start from", init_arguments, init),
    Command(
        "doctor", "is this pair fit for this recipe? before any weight is loaded", doctor_arguments, doctor
    ),
    Command("completion", "a script that completes commands and options", completion_arguments, completion),
    Command(
        "cost", "DeepSeek's published bills, a run's ledger, or when distilling pays", cost_arguments, cost
    ),
]
