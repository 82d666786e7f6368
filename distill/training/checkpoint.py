"""Training state on disk, for an exact resume after any kill: safetensors and JSON, never pickle.

What must be saved is small by design: trained tensors, buffers (expert bias), optimizer moments, the
step. Batches, dropout and learning rate are pure functions of (seed, step), so they need no state.
A state folder is written under a temporary name and renamed; older ones go only after that.

    save_state(folder, step, module, optimizer, extra); state = load_state(path, module, optimizer)

`module` is the trained module (`StudentStep`), after `accelerator.prepare`. Tensors that FSDP2 has sharded are
gathered on saving and dealt out on loading, so a run may go on with another number of processes; every process
calls these functions, the main one writes.

SIGTERM during training (schedulers and spot machines send it) finishes the optimizer step, saves its state, leaves.

    with Interrupts() as interrupts:
        for step in ...:
            ...
            if any process has interrupts.told: save the state; interrupts.leave(step, steps)

The signal only raises a flag, since a half-done step cannot be saved; the loop looks at the flags of all
processes once a step. A second SIGTERM, or SIGINT (Ctrl-C), stops at once: the last saved state is then kept.
"""

import hashlib
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.errors import DistillError, RunError
from distill.files import remove, replacing, sync, sync_all, temporary_of, writing
from distill.storage import hash_file, read_json, write_sealed

BEST = "best.safetensors"
TENSORS = "tensors.safetensors"


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes: trainable parameters and persistent buffers."""
    persistent = module.state_dict(keep_vars=True)
    return {n: t for n, t in persistent.items() if not isinstance(t, nn.Parameter) or t.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU. For a sharded one every process must ask."""
    found = tensor.detach()
    return (found.full_tensor() if isinstance(found, DTensor) else found).contiguous().cpu()


def whole_state_dict(module: nn.Module) -> dict[str, Tensor] | None:
    """What `save_pretrained(state_dict=...)` needs of a sharded module; None where nothing is sharded.

    A weight of two names (a head tied to its embedding) is one tensor here too, or it would be saved twice.
    """
    tensors = module.state_dict(keep_vars=True)
    if not any(isinstance(t, DTensor) for t in tensors.values()):
        return None
    found: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in found:
            found[id(tensor)] = whole(tensor)
    return {name: found[id(tensor)] for name, tensor in tensors.items()}


def put(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        tensor.copy_(value)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each whole and with a storage of its own: safetensors takes no others.

    Copied is only what needs it, as tied weights: all of them would be the training state a second time in memory.
    """
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        alone = (
            tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        )
        found[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    return found


def save_state(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    keep: int = 1,
    write: bool = True,
) -> None:
    """Write `folder/state-<step>` whole, then delete all but the newest `keep`. `extra` is any small JSON value."""
    tensors = {f"model.{n}": whole(t) for n, t in trained_tensors(module).items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = whole(torch.as_tensor(value))
    if not write:
        return
    final = folder / f"state-{step:07d}"
    temporary = temporary_of(folder / "state")
    size = sum(t.nbytes for t in tensors.values())
    try:
        with writing(folder, size):
            remove(temporary)
            temporary.mkdir(parents=True)
            save_file(apart(tensors), temporary / TENSORS)
            weights = hash_file(temporary / TENSORS)
            write_sealed(temporary / "state.json", {"step": step, "hash": weights, **extra})
            sync_all(temporary)
            os.replace(temporary, final)
            sync(folder)
    except BaseException:
        remove(temporary)
        raise
    for other in sorted(folder.glob("state-*"))[:-keep]:
        shutil.rmtree(other)


def latest_state(folder: Path) -> Path | None:
    return max(folder.glob("state-*"), default=None)


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a saved state back into module and optimizer; returns its JSON part with `step`.

    Raises RunError for a damaged file or one that belongs to another model.
    """
    state = read_json(path / "state.json")
    if state.get("hash") not in (None, hash_file(path / TENSORS)):
        raise RunError(_damaged(path / TENSORS, "its hash is not the one recorded when it was saved"))
    saved = load_trained(path / TENSORS, module)
    # Adam's step counter is on the CPU, except where the update is one kernel and reads it on the device.
    on_device = {
        p
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for p in group["params"]
    }
    for name, parameter in module.named_parameters():
        found = {
            k.split(".")[1]: v
            for k, v in saved.items()
            if k.startswith("optimizer.") and k.split(".", 2)[2] == name
        }
        if found:
            where = parameter.device if parameter in on_device else torch.device("cpu")
            optimizer.state[parameter] = {
                k: v.to(where).clone() if k == "step" else _moment(v, parameter) for k, v in found.items()
            }
    return state


def _moment(value: Tensor, parameter: Tensor) -> Tensor:
    moment = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    put(moment, value)
    return moment


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}); delete {path.parent} to train from the start"


def hash_tensors(tensors: dict[str, Tensor], step: str = "") -> str:
    """Of the step, names and bytes, in the order of names."""
    digest = hashlib.blake2b(step.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself besides its tensors; {} where there is no whole file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def save_trained(path: Path, module: nn.Module, step: int, write: bool = True) -> None:
    """The trained tensors alone after `step`, without the optimizer: the best so far. Atomic, with its own hash."""
    tensors = apart({f"model.{n}": whole(t) for n, t in trained_tensors(module).items()})
    if write:
        with replacing(path, sum(t.nbytes for t in tensors.values())) as temporary:
            save_file(tensors, temporary, {"step": str(step), "hash": hash_tensors(tensors, str(step))})


def saved_step(path: Path) -> int | None:
    """The step of a file of `save_trained`; None where there is none. RunError for a damaged one."""
    if not path.is_file():
        return None
    said = metadata_of(path)
    try:
        if said["hash"] == hash_tensors(load_file(path), said["step"]):
            return int(said["step"])
    except (KeyError, SafetensorError, OSError):
        pass
    raise RunError(_damaged(path, "its hash is not the one recorded when it was saved"))


def load_trained(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Put saved tensors back into `module`; returns everything the file holds. RunError as `load_state`."""
    try:
        saved = load_file(path)
        said = metadata_of(path)
    except (SafetensorError, OSError) as error:
        raise RunError(_damaged(path, str(error))) from None
    if said and said.get("hash") != hash_tensors(saved, said.get("step", "")):
        raise RunError(_damaged(path, "its hash is not the one recorded when it was saved"))
    current = trained_tensors(module)
    if {n for n in saved if n.startswith("model.")} != {f"model.{n}" for n in current}:
        raise RunError(f"{path} belongs to another model; delete it, or rebuild the stage with --redo")
    for name, tensor in current.items():
        put(tensor, saved[f"model.{name}"])
    return saved


def drop_states(folder: Path) -> None:
    """After the final weights are saved, intermediate states are dead weight."""
    for path in [*folder.glob("state-*"), *folder.glob(".state.tmp*"), folder / BEST]:
        remove(path)


class Saver:
    """The whole state of a run, to disk and back: trained tensors, optimizer, scaler, source, validation."""

    def __init__(
        self, folder: Path, module: nn.Module, optimizer, accelerator: Accelerator, source, validator
    ):
        self.folder, self.module, self.optimizer = folder, module, optimizer.optimizer
        self.accelerator, self.source, self.validator = accelerator, source, validator
        self.log: str | None = None  # hash of the step log that belongs to the restored state
        self.saved_bytes: int | None = None  # what the run's first micro-batch kept for its backward pass

    def restore(self) -> tuple[int, int, int, int]:
        """(steps done, tokens trained, read, counted) of the newest state; zeros where there is none."""
        state = latest_state(self.folder)
        if state is None:
            return 0, 0, 0, 0
        saved = load_state(state, self.module, self.optimizer)
        self.log, self.saved_bytes = saved.get("log"), saved.get("saved_bytes")
        self.source.restore(saved["source"])
        self.validator.restore(saved["validation"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        return saved["step"], saved["tokens"], saved["read"], saved.get("counted", 0)

    def save(
        self, step: int, tokens: int, read: int, counted: int, keep: int, log: str | None = None
    ) -> None:
        """After `step` steps. Every process calls it; the main one writes. log: the hash of the step log."""
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        extra = {"tokens": tokens, "read": read, "counted": counted, "scaler": scaler, "log": log}
        extra["saved_bytes"] = self.saved_bytes
        extra["validation"] = self.validator.state()
        extra["source"] = self.source.state()  # of all processes: asked for on each of them
        main = self.accelerator.is_main_process
        save_state(self.folder, step, self.module, self.optimizer, extra, keep, write=main)
        self.accelerator.wait_for_everyone()


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
