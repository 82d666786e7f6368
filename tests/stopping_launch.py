"""`distill` that dies in the middle of training, for tests of resuming: after DISTILL_TEST_STOP_AFTER saved steps."""

import os
import sys

from distill.commands.cli import main
from distill.training.checkpoint import Saver

if __name__ == "__main__":
    real = Saver.save

    def save(self, step, *given):
        real(self, step, *given)
        if step == int(os.environ["DISTILL_TEST_STOP_AFTER"]):
            os._exit(9)

    Saver.save = save
    sys.exit(main(sys.argv[1:]))
