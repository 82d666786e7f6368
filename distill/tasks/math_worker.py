r"""Answers compared as mathematics, one after the other, in a process that may be killed at any moment.

Why a process: computer algebra on a model's garbage (`\boxed{9^{9^{9^9}}}`) can run for ever inside a single
C call, where no exception and no Python signal handler can stop it; the default action of a signal can.
`distill.tasks.verify` starts this file; the protocol is one JSON line `[answer, reference]` in, `1` or `0` out.
"""

import json
import logging
import resource
import signal
import sys

SECONDS = 3.0  # of CPU time for one comparison; most take milliseconds
MEMORY = 4 << 30  # bytes of address space


def equal(answer: str, reference: str) -> bool:
    """Whether both parse as mathematics and are equal. Exceptions of the parser mean no."""
    from math_verify import parse, verify

    try:
        wanted = parse(reference, parsing_timeout=None)
        found = parse(answer, parsing_timeout=None)
        return bool(wanted and found and verify(wanted, found, timeout_seconds=None))
    except Exception:  # a parser over garbage raises anything; whatever it was, the answer is not equal
        return False


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    equal("1", "1")  # pays for the imports
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        same = equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(same), flush=True)


if __name__ == "__main__":
    main()
