"""One process of the FSDP2 test: two SGD steps of a sharded student over gloo, its state saved, read and gathered.

Run by tests/launches/test_sharded.py under `torch.distributed.run`; rank 0 writes what it found to the file named.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from step_example import MIXED, build, rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distill.training.checkpoint import load_state, save_state, whole
from distill.training.live_teachers import FrozenTeacher
from distill.training.step import StudentStep


def main(out: Path, world: int) -> None:
    torch.set_num_threads(1)
    rank = 0
    step, teacher = StudentStep(build("qwen3 tied"), MIXED), FrozenTeacher(build("qwen3", seed=1).eval())
    if world > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        mesh = init_device_mesh("cpu", (world,))
        for layer in step.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(step, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in step.parameters())
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    data, share = rows(n=8), np.arange(8)[rank::world]
    tokens = int(data.completion_lengths.sum())
    for number in (1, 2):
        batch = data.collate(share, 0)
        total, _ = step(batch, teacher(batch))
        (total * world / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        save_state(out, number, step, optimizer, {}, write=rank == 0)
        if world > 1:
            dist.barrier()
        # Forget everything, and take it back from the file.
        with torch.no_grad():
            for p in step.parameters():
                p.zero_()
        optimizer.state.clear()
        load_state(out / f"state-{number:07d}", step, optimizer)
    found = {name: whole(p).clone() for name, p in step.named_parameters()}
    if rank == 0:
        save_file(found, out / "final.safetensors")
    if world > 1:
        dist.barrier()  # a group torn down under a process that still works ends it with SIGABRT
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
