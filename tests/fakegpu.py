"""A pretend accelerator: tensors that say device `gpu:0`, live on the CPU, and refuse to mix with CPU tensors.

    with pretend() as waits:                     # for the life of a process: start one for it
        model = to_device(model)                 # the same module, its tensors on `gpu:0`
        ...the code under test...
        waits.total, waits.places                # how often, and where, the host had to wait for the device

Numbers are the CPU's, so results can be compared with it. A *wait* is what makes a real host stand still until the
device has caught up: a value brought back (`item`, `tolist`, `cpu`), a result whose size depends on values (`nonzero`,
indexing with a mask, `unique`, `bincount`, `repeat_interleave` without a size), and a copy to the device that does not
say `non_blocking`. What it cannot show: kernels, autocast, memory, time, and races of copies that do not wait.

It stands on torch's backend for Python (PrivateUse1) and changes `torch.tensor` and `torch.inference_mode`, which a
subclass of Tensor cannot live in: hence a process of its own (tests/fakegpu_worker.py).
"""

import contextlib
import functools
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# Now, before anything is imported that is decorated with it.
torch.inference_mode = torch.no_grad
_setup_privateuseone_for_python_backend("gpu")

_SIZED_BY_VALUES = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::equal", "aten::is_nonzero", "aten::_local_scalar_dense",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
_MAY_MIX = {"aten::copy_", "aten::_to_copy", *_INDEXING}


class Waits:
    """`places`: (what, file:line of our own code) -> times."""

    def __init__(self) -> None:
        self.places: Counter = Counter()

    @property
    def total(self) -> int:
        return sum(self.places.values())

    def add(self, what: str) -> None:
        stack = [f for f in traceback.extract_stack() if f.filename != __file__]
        own = [f for f in stack if "/distill/" in f.filename] or stack
        self.places[what, f"{own[-1].filename.split('/distill/')[-1]}:{own[-1].lineno}"] += 1

    def take(self) -> int:
        """How many since the last call; forgets them."""
        total = self.total
        self.last, self.places = self.places, Counter()
        return total


WAITS = Waits()


class Held:
    """Bytes of the device: `now`, and `peak` since the last `reset`. A storage counts while any tensor of it lives."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._tensors: Counter = Counter()

    def add(self, tensor: torch.Tensor, raw: torch.Tensor) -> None:
        storage = raw.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._tensors[key]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._tensors[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.now -= size

    def reset(self) -> int:
        self.peak = self.now
        return self.now


HELD = Held()


class OnDevice(torch.Tensor):
    """A tensor on `gpu:0`, whose data is the CPU tensor `raw`."""

    @staticmethod
    def __new__(cls, raw, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            layout=raw.layout, device=torch.device("gpu", 0), requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, raw, requires_grad=False):
        self.raw = raw
        HELD.add(self, raw)

    def __repr__(self):
        return f"OnDevice({self.raw!r})"

    def tolist(self):
        WAITS.add("tolist")
        return self.raw.tolist()

    def numpy(self, *_args, **_named):
        raise TypeError("can't convert a tensor of the device to numpy: call .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Everywhere(TorchDispatchMode):
    """Also for calls that have no such tensor yet, as `torch.zeros(..., device=...)`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _is_device(device) -> bool:
    return device is not None and torch.device(device).type == "gpu"


@functools.cache
def _known(function) -> tuple[str, bool]:
    """(name without its overload, whether the result is a view of what was given) of an operator."""
    aliases = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
    return function.name().split(".")[0], bool(aliases) and not any(a.is_write for a in aliases)


def _leaves(given, found: list) -> list[torch.Tensor]:
    """All tensors of an operator's arguments: they lie in lists and tuples, never deeper than that."""
    for value in given:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            _leaves(value, found)
    return found


def _changed(change: Callable[[torch.Tensor], object], value):
    """The same arguments or results with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_changed(change, item) for item in value])
    return value


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.raw if isinstance(tensor, OnDevice) else tensor


def _count(name: str, args, target, here: list, away: list, named: dict) -> None:
    """Note what of this call makes a host wait. Raises RuntimeError where two devices meet."""
    if here and name not in _MAY_MIX and any(t.dim() for t in away):
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} mixes gpu:0 with cpu")
    if here and name in _INDEXING:
        for index in _leaves(args[1], []):
            if index.dtype in (torch.bool, torch.uint8):
                WAITS.add("index with a mask")
            elif index.dim() and not isinstance(index, OnDevice):
                WAITS.add("index copied to the device")
    if here and name in _SIZED_BY_VALUES:
        WAITS.add(name)
    if here and name == "aten::repeat_interleave" and named.get("output_size") is None:
        WAITS.add(name)
    crosses = name == "aten::_to_copy" and target is not None and _is_device(target) != bool(here)
    if crosses and (here or not named.get("non_blocking")):
        WAITS.add("copied to the host" if here else "copied to the device")
    if name == "aten::copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        silent = (len(args) > 2 and args[2]) or named.get("non_blocking")
        if not isinstance(args[0], OnDevice) or not silent:
            WAITS.add("copied to the device" if isinstance(args[0], OnDevice) else "copied to the host")


def _run(function, args, named):
    name, view = _known(function)
    tensors = _leaves(named.values(), _leaves(args, []))
    here = [t for t in tensors if isinstance(t, OnDevice)]
    target = named.get("device")
    if not here and not _is_device(target):
        return function(*args, **named)
    _count(name, args, target, here, [t for t in tensors if not isinstance(t, OnDevice)], named)
    on_device = bool(here) if target is None else _is_device(target)
    if name == "aten::copy_":
        on_device = isinstance(args[0], OnDevice)
    plain = {key: _changed(_raw, value) for key, value in named.items()}
    if _is_device(target):
        plain["device"] = torch.device("cpu")
    given = _changed(_raw, args)
    # CUDA counts whole numbers, the CPU does not.
    if name == "aten::histc" and not given[0].is_floating_point():
        given = (given[0].float(), *given[1:])
    out = function(*given, **plain)
    if not on_device:
        return out
    known = {id(t.raw): t for t in here}  # written in place: hand back the tensor that was given
    result = _changed(lambda t: known.get(id(t)) if id(t) in known else OnDevice(t), out)
    if here and isinstance(result, torch.Tensor) and view and name != "aten::_to_copy":
        with contextlib.suppress(Exception):
            return return_and_correct_aliasing(function, args, named, result)
    return result


def to_device(module: nn.Module) -> nn.Module:
    """The module itself, its parameters and buffers on the device; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None and not isinstance(p.data, OnDevice):
                if id(p) not in moved:
                    moved[id(p)] = nn.Parameter(OnDevice(p.detach()), requires_grad=p.requires_grad)
                part._parameters[name] = moved[id(p)]
        for name, b in list(part._buffers.items()):
            if b is not None and not isinstance(b, OnDevice):
                part._buffers[name] = OnDevice(b)
    return module


@contextlib.contextmanager
def pretend() -> Iterator[Waits]:
    """Count, and let tensors be made there. What reading this module did cannot be undone."""
    plain_tensor = torch.tensor

    def tensor(*args, device=None, **named):
        made = plain_tensor(*args, **named)
        if not _is_device(device):
            return made
        WAITS.add("torch.tensor")
        return OnDevice(made)

    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch.gpu.is_autocast_enabled = lambda: False
    torch.tensor = tensor
    try:
        with _Everywhere():
            yield WAITS
    finally:
        torch.tensor = plain_tensor
