"""What a command of `distill` is, and the options that several commands share. Nothing heavy is imported here.

A new command is one function that adds its arguments, one that runs, and an entry in `COMMANDS` of the module they
stand in (distill/commands/recipe.py, setup.py, artifacts.py, or the folder of the command):

    COMMANDS = [Command("cost", "the bill of a run", cost_arguments, cost)]
"""

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """`run` takes the parsed arguments and returns the exit code; it imports what it needs when it is called."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    shared: bool = False  # whether the processes of a launch do it together


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE [key=value ...] with the short forms for teacher and student."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, for example recipes/demo.yaml")
    override_arguments(parser)


def override_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # with one, argparse does not count it among the arguments that are required
        metavar="key=value",
        help="override any key, as train.steps=200",
    )
    pair_arguments(parser)


def pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", metavar="PATH", help="short for teacher.model=PATH")
    parser.add_argument("--student", metavar="PATH", help="short for student.model=PATH")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """For what writes a run folder."""
    parser.add_argument("--redo", action="store_true", help="rebuild what was made from other inputs")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and what follows from it"
    )


def language_argument(parser: argparse.ArgumentParser) -> None:
    """For what writes or shows a page. A matter of who reads it, so no key of the recipe."""
    parser.add_argument("--lang", choices=["en", "zh"], default="en", help="language of the pages, en")


def json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def with_pair(overrides: list[str], arguments: argparse.Namespace) -> list[str]:
    """The overrides, and those that --teacher and --student are short for."""
    named = [("teacher.model", arguments.teacher), ("student.model", arguments.student)]
    return [*overrides, *(f"{key}={value}" for key, value in named if value)]


def is_override(word: str) -> bool:
    """Whether a word is key=value, rather than a path that has an equals sign."""
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None and not os.path.exists(word)


def whole(text: str) -> int:
    """A whole number from 0 up, for an option; its own lower bound is told by whoever reads it."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) > 2**31 - 1:
        raise argparse.ArgumentTypeError(
            f"'{text[:40]}' is not a whole number from 0 to 2,147,483,647; give one"
        )
    return int(text)


def seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 19 or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not a whole number from 0 to 2^63 - 1; give one")
    return int(text)


def amount(text: str) -> float:
    """A finite number from 0 up, for an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e30:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not a number from 0 to 1e30; give one")
    return value


def comma_separated(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
