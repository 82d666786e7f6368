"""`distill bench`: a grid of arms and seeds with verdicts, or speed against peers."""

import argparse
import json
import sys
from pathlib import Path

from distill import console
from distill.command import Command, json_argument
from distill.errors import UserError

_OF_SPEED = {"only": "generate", "quick": False, "rounds": None, "peer_python": None}
_OF_A_GRID = {"budget": None, "jobs": 0, "redo": False, "dry_run": False}


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", metavar="RECIPE | speed", help="a grid as recipes/claims.yaml, or the word speed")
    add(
        "--budget",
        metavar="NAME",
        help="grid: which of its budgets, as small or full; the first if not given",
    )
    add("--jobs", type=int, default=0, metavar="N", help="grid: runs at a time; one per core if not given")
    add("--redo", action="store_true", help="grid: rebuild what was made from other inputs")
    add("--dry-run", action="store_true", help="grid: print the runs it would make, and what they share")
    add("--only", choices=["generate", "train"], default="generate", help="speed: which benchmark")
    add("--quick", action="store_true", help="speed: a minute of it: small models, fewer prompts")
    add("--rounds", type=int, metavar="N", help="speed: interleaved rounds (generate 3, train 1)")
    add("--peer-python", metavar="PATH", help="speed: train: an interpreter that can import trl")
    add("--out", metavar="FILE", help="write the JSON there too")
    json_argument(parser)


def bench(arguments: argparse.Namespace) -> int:
    speed = arguments.what == "speed"
    foreign = _OF_A_GRID if speed else _OF_SPEED
    given = [name for name, default in foreign.items() if getattr(arguments, name) != default]
    if given:
        option = given[0].replace("_", "-")
        raise UserError(
            f"--{option} goes with `distill bench {'RECIPE' if speed else 'speed'}`; leave it out"
        )
    if arguments.out and not Path(arguments.out).resolve().parent.is_dir():
        raise UserError(f"--out {arguments.out}: its folder does not exist; make it first")
    found, text = _speed(arguments) if speed else _grid(arguments)
    if arguments.out and not arguments.dry_run:
        Path(arguments.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2) if arguments.json else text)
    return 0


def _grid(arguments: argparse.Namespace) -> tuple[dict, str]:
    if arguments.jobs < 0:
        raise UserError(f"--jobs {arguments.jobs}: at least 1")
    from distill.bench import bench as run
    from distill.bench import describe_plan
    from distill.bench_page import claims_text

    if arguments.dry_run:
        import yaml

        found = describe_plan(arguments.what, arguments.budget)
        return found, yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip()
    # With --json, standard output is the JSON alone.
    say = (lambda line: print(line, file=sys.stderr, flush=True)) if arguments.json else console.say
    found = run(arguments.what, arguments.budget, arguments.jobs, arguments.redo, say)
    return found, claims_text(found)


def _speed(arguments: argparse.Namespace) -> tuple[dict, str]:
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: at least 1")
    rounds = {} if arguments.rounds is None else {"rounds": arguments.rounds}
    if arguments.only == "train":
        from distill.train_speed import format_training_speed, training_speed

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        found = training_speed(arguments.quick, peer_python=arguments.peer_python, say=say, **rounds)
        return found, format_training_speed(found)
    from distill.speed import format_speed, generation_speed

    quick = {"prompts": 64, "rounds": 1} if arguments.quick else {}
    found = generation_speed(**{**quick, **rounds})
    return found, format_speed(found)


COMMANDS = [
    Command(
        "bench",
        "arms and seeds with verdicts (RECIPE), or speed against peers (speed)",
        bench_arguments,
        bench,
    )
]
