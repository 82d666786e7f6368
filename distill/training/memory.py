"""Memory of a training step: what a forward pass keeps for its backward pass, and what to halve when it runs out.

    with saved_for_backward(module) as saved:
        loss = module(batch)
    saved()                                # bytes, while the graph of `loss` is alive

    except OutOfMemory as error: raise memory_advice(error, train, micro_batch_size)

Number formats, adapters and batch shapes act on the activations that are kept; weights, gradients and optimizer state
are counted from the parameters. The figure is measured rather than guessed, and the same on every device, unlike a
peak that depends on the allocator and on what else the process has done. The arithmetic of one step depends on none
of it.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.config.training import Train
from distill.errors import RunError

# What torch raises for an accelerator. A CPU allocation that fails is a RuntimeError of other text, and Linux
# usually kills the process instead; both end the run with the last state saved.
OutOfMemory = torch.OutOfMemoryError


def memory_advice(error: Exception, train: Train, size: int) -> RunError:
    """One line: how much was asked for, and the cheapest things that halve it, none of which changes the loss."""
    asked = str(error).split(".")[0].strip()
    advice = []
    if size > 1:
        advice.append(
            f"train.micro_batch_size={max(1, size // 2)} (same result: gradients are summed over the step), or "
            "train.auto_micro_batch=true to halve it until it fits"
        )
    if not train.gradient_checkpointing:
        advice.append("train.gradient_checkpointing=true (about a third more time)")
    advice.append("filter.max_tokens for shorter rows")
    return RunError(f"out of memory at {size} rows a pass ({asked}); set {'; '.join(advice)}")


class _Held:
    """What autograd keeps instead of the tensor. It dies with the graph, so the living ones are what is kept."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # the tensor itself would hold its own graph, in a circle


@contextmanager
def saved_for_backward(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function: bytes of all storages that graphs made inside still keep, each counted once.

    Parameters and buffers of `module` do not count: they are there anyway. Copies of them in another precision,
    which autocast makes, do. Numbers are not changed. With gradient checkpointing or compiled layers, whose
    own hooks take the tensors first, it sees too little: leave it out there.
    """
    # Of a sharded tensor (FSDP2) this process has its own piece.
    local = [getattr(t, "_local_tensor", t) for t in (*module.parameters(), *module.buffers())]
    own = {t.untyped_storage().data_ptr() for t in local}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held.add(kept := _Held(tensor))
        return kept

    def total() -> int:
        storages = (getattr(kept.tensor, "_local_tensor", kept.tensor).untyped_storage() for kept in held)
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield total
