"""The `distill` command. Parses arguments, calls one function, turns errors into lines and exit codes.

Exit codes: 0 done; 2 the recipe or the arguments are wrong (every problem on a line, with its fix); 1 the run
failed after it had begun (what was finished is kept). Nothing heavy is imported before it is needed. The commands
themselves stand in the modules named below, each a parser and a function side by side.
"""

import argparse
import os
import sys
import traceback

from distill import __version__, console
from distill.commands import artifacts, recipe, setup
from distill.commands.command import Command
from distill.errors import DistillError, UserError, nearest

_MODULES = (recipe, setup, artifacts)
COMMANDS: dict[str, Command] = {c.name: c for module in _MODULES for c in module.COMMANDS}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill",
        description="Teacher outputs -> student (LoRA, bf16) -> MoE-aware evaluation -> one report.",
    )
    _global_options(parser, default=0)
    added = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        own = added.add_parser(command.name, help=command.help, description=_sentence(command.help))
        command.arguments(own)
        _global_options(own, default=argparse.SUPPRESS)  # absent here, what stood before the command counts
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _global_options(parser: argparse.ArgumentParser, default: int | str) -> None:
    """Accepted before and after the command."""
    parser.add_argument("--version", action="version", version=f"distill {__version__}")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument(
        "-q", "--quiet", dest="verbosity", action="store_const", const=-1, default=default,
        help="results, warnings and errors only: no progress",
    )  # fmt: skip
    how_much.add_argument(
        "-v", "--verbose", dest="verbosity", action="store_const", const=1, default=default,
        help="also notes, what the libraries say, and tracebacks",
    )  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments with options and key=value overrides in any order (argparse alone stops at the first option)."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    if any("\0" in word for word in words):
        parser.error("an argument has a NUL character, which no path and no text holds; take it out")
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        parser.error(f"there is no command '{command}'{nearest(command, COMMANDS)}")
    arguments, rest = parser.parse_known_args(words)
    collects = next((name for name in ("overrides", "targets") if hasattr(arguments, name)), None)
    unknown = [word for word in rest if word.startswith("-") or collects is None]
    if unknown:
        parser.error(_unrecognized(parser, arguments.command, unknown))
    if collects:
        setattr(arguments, collects, [*getattr(arguments, collects), *rest])
    arguments.parser = parser  # the whole of it, for `completion`
    return arguments


def _unrecognized(parser: argparse.ArgumentParser, command: str, words: list[str]) -> str:
    own = next(a.choices for a in parser._actions if a.dest == "command")[command]
    options = [o for action in own._actions for o in action.option_strings]
    close = nearest(words[0].partition("=")[0], options)
    hint = close if "did you mean" in close else f" (see distill {command} --help)"
    return f"unrecognized arguments: {' '.join(words)}{hint}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = parse(argv)
    console.set_verbosity(arguments.verbosity)
    console.hush_foreign_bars()
    try:
        command = COMMANDS[arguments.command]
        if console.launched() > 1 and not command.shared:
            raise UserError(
                f"`distill {command.name}` is the work of one process; start it without accelerate launch (torchrun)"
            )
        return command.run(arguments)
    except DistillError as error:
        if console.verbose():
            traceback.print_exception(error)
        # What a user wrote may be of any length; the fix stands at the end.
        console.fail([p if len(p) <= 1000 else f"{p[:600]} ... {p[-380:]}" for p in error.problems])
        return error.exit_code
    except KeyboardInterrupt:
        print("\ndistill: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        from distill.files import system_problem

        if _left_alone(error):
            console.warn(
                "another process of this launch has ended: what it said, here or on its machine, is the reason; then "
                "the same command goes on from what was saved"
            )
            return 1
        if (problem := system_problem(error)) is None:
            raise  # a bug of ours, which should look like one
        if console.verbose():
            traceback.print_exception(error)
        console.fail([problem])
        return 1


def _left_alone(error: Exception) -> bool:
    """Whether a process of a launch has lost the others: what a collective raises when one of them is gone."""
    text = str(error)
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "ncclRemoteError")
    return isinstance(error, RuntimeError) and console.launched() > 1 and any(words in text for words in gone)
