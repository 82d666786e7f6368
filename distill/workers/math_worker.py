r"""Formulas compared as mathematics, one pair after the other, in a process that may be killed at any moment.

Why a process: computer algebra on a model's garbage (`\boxed{9^{9^{9^9}}}`) can run for ever inside a single
C call, where no exception and no Python signal handler can stop it; the default action of a signal can.
`distill.tasks.formulas` starts this file; the protocol is one JSON line `[answer, reference]` in, `1` or `0` out.

The package is imported once. The comparing is done by a child, which ends itself after SECONDS; the parent then says
`0` for it and forks the next child in milliseconds, where a new process would spend a second on imports.
"""

import json
import logging
import os
import resource
import signal
import sys

SECONDS = 0.8  # of CPU time for one comparison; most take milliseconds
MEMORY = 4 << 30  # bytes of address space


def equal(answer: str, reference: str) -> bool:
    """Whether both parse as mathematics, as a whole, and are equal. Exceptions of the parser mean no.

    What is infinite or undefined equals the same alone: sympy simplifies 31415926 + 9 oo to 0 once in a hundred times.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # One reading: the formula as it stands, and not a number found somewhere in it.
    whole = {
        "extraction_config": [LatexExtractionConfig()],
        "fallback_mode": "no_fallback",
        "parsing_timeout": None,
    }
    try:
        wanted = parse(reference, **whole)
        found = parse(answer, **whole)
        if wanted and found and (numbers := _numbers([*wanted, *found])) and any(map(_endless, numbers)):
            return not set(_numbers(wanted)).isdisjoint(_numbers(found))
        return bool(wanted and found and verify(wanted, found, timeout_seconds=None))
    except Exception:  # a parser over garbage raises anything; whatever it was, the answer is not equal
        return False


def _numbers(parsed: list) -> list:
    """What was parsed, worked out; of an equation its right side. [] where one is no number: a set, an interval."""
    from sympy import Eq, Expr

    sides = [value.rhs if isinstance(value, Eq) else value for value in parsed]
    return [side.doit() for side in sides] if all(isinstance(side, Expr) for side in sides) else []


def _endless(number) -> bool:
    from sympy import S

    return number.has(S.Infinity, S.NegativeInfinity, S.ComplexInfinity, S.NaN)


def serve() -> None:
    """Compare the pairs that come in, until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while line := _line():
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        same = equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(1, b"1\n" if same else b"0\n")


def _line() -> bytes:
    """The next line. One is asked at a time, so nothing that another child should have is read with it."""
    line = b""
    while not line.endswith(b"\n") and (more := os.read(0, 65536)):
        line += more
    return line


def main() -> None:
    logging.disable(logging.CRITICAL)
    equal("$1$", "$1$")  # pays for the imports
    os.write(1, b"ready\n")
    while True:
        child = os.fork()
        if not child:
            serve()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # the input ended
            sys.exit(os.WEXITSTATUS(status))
        os.write(1, b"0\n")  # killed over the pair that it had


if __name__ == "__main__":
    main()
