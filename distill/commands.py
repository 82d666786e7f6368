"""The commands that measure or describe without a recipe: bench, describe.

Each is a function that adds its arguments and one that runs, listed in `COMMANDS`. Heavy imports stay inside, so that
a mistake in the arguments is told in a fraction of a second.
"""

import argparse
import json
import sys
from pathlib import Path

from distill.command import Command, json_argument
from distill.errors import UserError


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", choices=["speed"])
    add("--only", choices=["generate", "train"], default="generate", help="which benchmark")
    add("--quick", action="store_true", help="a minute of it: small models, fewer prompts")
    add("--rounds", type=int, metavar="N", help="interleaved rounds (generate 3, train 1)")
    add("--peer-python", metavar="PATH", help="train: an interpreter that can import trl")
    add("--out", metavar="FILE", help="write the JSON there too")
    json_argument(parser)


def bench(arguments: argparse.Namespace) -> int:
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: at least 1")
    if arguments.out and not Path(arguments.out).resolve().parent.is_dir():
        raise UserError(f"--out {arguments.out}: its folder does not exist; make it first")
    rounds = {} if arguments.rounds is None else {"rounds": arguments.rounds}
    if arguments.only == "train":
        from distill.train_speed import format_training_speed, training_speed

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        found = training_speed(arguments.quick, peer_python=arguments.peer_python, say=say, **rounds)
        table = format_training_speed
    else:
        from distill.speed import format_speed, generation_speed

        quick = {"prompts": 64, "rounds": 1} if arguments.quick else {}
        found, table = generation_speed(**{**quick, **rounds}), format_speed
    text = json.dumps(found, indent=2)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else table(found))
    return 0


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
    Command("bench", "how fast it is here, against its peers in the same run", bench_arguments, bench),
    Command(
        "describe",
        "parameters, FLOPs, KV bytes, experts: from the config alone",
        describe_arguments,
        describe,
    ),
]
