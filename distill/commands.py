"""The command that describes without a recipe: describe.

Each is a function that adds its arguments and one that runs, listed in `COMMANDS`. Heavy imports stay inside, so that
a mistake in the arguments is told in a fraction of a second.
"""

import argparse
import json

from distill.command import Command, json_argument


def describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_CONFIG_DIR")
    json_argument(parser)


def describe(arguments: argparse.Namespace) -> int:
    from distill.describe import describe, format_description
    from distill.models import quiet_libraries, resolve_model

    quiet_libraries()
    found = describe(resolve_model(arguments.model))
    print(json.dumps(found, indent=2) if arguments.json else format_description(found))
    return 0


COMMANDS = [
    Command(
        "describe",
        "parameters, FLOPs, KV bytes, experts: from the config alone",
        describe_arguments,
        describe,
    ),
]
