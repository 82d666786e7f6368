"""What the benchmarks of this folder share as scripts: their options, where results go, errors as lines.

    python recipes/benchmarks/decoding.py --quick --out speed.json

Each benchmark is one file, run by its path. What was measured goes to standard output as text, or as JSON with
`--json`; `--out` writes the JSON to a file too.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.errors import DistillError, UserError


def benchmark_parser(about: str) -> argparse.ArgumentParser:
    """--quick, --rounds, --out and --json; `about` is the script's docstring, whose first line is the help."""
    parser = argparse.ArgumentParser(description=about.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute of it: small models, fewer prompts")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved rounds")
    parser.add_argument("--out", metavar="FILE", help="write the JSON there too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what could only fail at the end, before anything is measured."""
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: at least 1")
    if arguments.out and not Path(arguments.out).resolve().parent.is_dir():
        raise UserError(f"--out {arguments.out}: its folder does not exist; make it first")


def leave(found: dict[str, Any], text: str, arguments: argparse.Namespace) -> None:
    """Print what was found, and write it where `--out` says."""
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2) if arguments.json else text)


def run_script(main: Callable[[], int | None]) -> int:
    """The exit code of `main`; a mistake of the user is a line each instead of a traceback."""
    try:
        return main() or 0
    except DistillError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return error.exit_code
