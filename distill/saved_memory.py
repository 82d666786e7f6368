"""How much memory a forward pass leaves behind for its backward pass: the activations, measured rather than guessed.

    with saved_for_backward(module) as saved:
        loss = module(batch)
    saved()                                # bytes, while the graph of `loss` is alive

Number formats, adapters and batch shapes act on this part of a step's memory; weights, gradients and optimizer
state are counted from the parameters. It is the same on every device, unlike a peak that depends on the allocator
and on what else the process has done.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held.add(kept := _Held(tensor))
        return kept

    def total() -> int:
        storages = (kept.tensor.untyped_storage() for kept in held)
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield total
