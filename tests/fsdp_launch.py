"""`distill` in a process of an FSDP2 launch over gloo: Accelerate's own preparation, which shards on accelerators only.

Started by `torch.distributed.run tests/fsdp_launch.py train RECIPE ...`. All that differs from `accelerate launch
--config_file recipes/accelerate/fsdp2.yaml` is that a CPU counts as an accelerator.
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
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
            )
            if self.mixed_precision != "no":
                plugin.set_mixed_precision(self.mixed_precision)  # as Accelerate does
            self.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
            assert self.is_fsdp2


if __name__ == "__main__":
    train.Accelerator = Sharded
    sys.exit(main(sys.argv[1:]))
