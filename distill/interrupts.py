"""SIGTERM during training: finish the optimizer step, save its state, leave. Schedulers and spot machines send it.

    with Interrupts() as interrupts:
        for step in ...:
            ...
            if any process has interrupts.told: save the state; interrupts.leave(step, steps)

The signal only raises a flag, since a half-done step cannot be saved; the loop looks at the flags of all
processes once a step. A second SIGTERM, or SIGINT (Ctrl-C), stops at once: the last saved state is then kept.
"""

import signal
import threading

from distill.errors import DistillError


class Interrupted(DistillError):
    """Training was told to stop and did, with its state saved. Exit code 143, as of a process that SIGTERM ends."""

    exit_code = 143


class Interrupts:
    def __init__(self):
        self.told = False
        self._before = None

    def __enter__(self) -> "Interrupts":
        # Only the main thread may install handlers; elsewhere (a server, a notebook's worker) nothing changes.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_exc) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, *_args) -> None:
        self.told = True
        signal.signal(signal.SIGTERM, self._before)

    def leave(self, step: int, steps: int) -> None:
        """Raises Interrupted: one line for the user."""
        raise Interrupted(
            f"stopped by SIGTERM after step {step} of {steps}, state saved; the same command continues there"
        )
