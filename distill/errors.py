"""The two errors a user meets, and the exit code each becomes.

`UserError`: the recipe, the arguments or a file they name is wrong; nothing was started (exit code 2).
`RunError`: a run that had begun cannot go on; what was finished is kept (exit code 1).
Both carry every problem found, one line each, every line naming its fix. `distill.commands.cli` prints them
without a traceback; code called from Python sees ordinary exceptions.
"""

import difflib
from collections.abc import Iterable


class DistillError(Exception):
    """Base class: `problems` holds one line of text per problem."""

    exit_code = 1

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class UserError(DistillError):
    """Wrong recipe, argument or input file. Nothing was started or overwritten. Exit code 2."""

    exit_code = 2


class RunError(DistillError):
    """A run that had begun cannot continue; finished parts stay on disk. Exit code 1."""

    exit_code = 1


def nearest(name: str, valid: Iterable[str]) -> str:
    """How an error names the valid name closest to a wrong one, or all of them."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; valid: {', '.join(valid)}"
