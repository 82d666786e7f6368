"""The commands before a run: completion for a shell."""

import argparse

from distill.command import Command
from distill.errors import UserError

# What a word of the usage line stands for, for a shell that completes it.
_FOLDERS = ("DIR",)
_FILES = ("FILE", "PATH", "RECIPE", "MODEL", "STUDENT", "CHECKPOINT", "FOLDER")


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
    Command("completion", "a script that completes commands and options", completion_arguments, completion)
]
