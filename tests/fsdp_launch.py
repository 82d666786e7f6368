"""`distill` in a process of an FSDP2 launch over gloo: Accelerate's own preparation, which shards on accelerators only.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 tests/fsdp_launch.py train RECIPE

All that differs from `-m distill train RECIPE` is that a CPU counts as an accelerator: what the file says of sharding
comes from it, as Accelerate reads it.
"""

import sys

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from distill.commands.cli import main
from distill.training import train


class Sharded(Accelerator):
    def __init__(self, **how):
        super().__init__(**how)
        if self.num_processes > 1:
            plugin = FullyShardedDataParallelPlugin()  # of the launch file, by its environment
            if self.mixed_precision != "no":
                plugin.set_mixed_precision(self.mixed_precision)  # as Accelerate does
            self.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
            assert self.is_fsdp2


if __name__ == "__main__":
    train.Accelerator = Sharded
    sys.exit(main(sys.argv[1:]))
