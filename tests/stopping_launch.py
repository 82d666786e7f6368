"""`distill` that dies in the middle of training, for tests of resuming: after DISTILL_TEST_STOP_AFTER saved steps.

DISTILL_TEST_STOP_HOW: all processes at once (`all`, if not given); process 1 alone, killed (`killed`) or by an error of
its own (`error`).
"""

import os
import signal
import sys

from distill.commands.cli import main
from distill.errors import RunError
from distill.training import train
from distill.training.checkpoint import Saver

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        from fsdp_launch import Sharded

        train.Accelerator = Sharded
    real, how = Saver.save, os.environ.get("DISTILL_TEST_STOP_HOW", "all")

    def save(self, step, *given):
        real(self, step, *given)
        if step != int(os.environ["DISTILL_TEST_STOP_AFTER"]):
            return
        if how == "all":
            os._exit(9)
        if os.environ["RANK"] == "1" and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["RANK"] == "1":
            raise RunError("the memory of this machine is full; take smaller batches")

    Saver.save = save
    sys.exit(main(sys.argv[1:]))
