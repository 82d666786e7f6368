"""Training state on disk, for an exact resume after any kill: safetensors and JSON, never pickle.

What must be saved is small by design: trained tensors, buffers (expert bias), optimizer moments, the
step. Batches, dropout and learning rate are pure functions of (seed, step), so they need no state.
A state folder is written under a temporary name and renamed; older ones go only after that.

    save_state(folder, step, module, optimizer, extra); state = load_state(path, module, optimizer)

`module` is the trained module (`StudentStep`), after `accelerator.prepare`. Tensors that FSDP2 has sharded are
gathered on saving and dealt out on loading, so a run may go on with another number of processes; every process
calls these functions, the main one writes.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.errors import RunError
from distill.shards import read_json, write_json


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes: trainable parameters and persistent buffers."""
    persistent = module.state_dict(keep_vars=True)
    return {n: t for n, t in persistent.items() if not isinstance(t, nn.Parameter) or t.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU. For a sharded one every process must ask."""
    found = tensor.detach()
    return (found.full_tensor() if isinstance(found, DTensor) else found).contiguous().cpu()


def whole_state_dict(module: nn.Module) -> dict[str, Tensor] | None:
    """What `save_pretrained(state_dict=...)` needs of a sharded module; None where nothing is sharded."""
    tensors = module.state_dict()
    if not any(isinstance(t, DTensor) for t in tensors.values()):
        return None
    return {name: whole(tensor) for name, tensor in tensors.items()}


def put(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        tensor.copy_(value)


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
    temporary = folder / f".state.tmp{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # Tied tensors share storage, which safetensors refuses: copies cost little at save time.
    save_file({n: t.clone() for n, t in tensors.items()}, temporary / "tensors.safetensors")
    write_json(temporary / "state.json", {"step": step, **extra})
    os.replace(temporary, final)
    for other in sorted(folder.glob("state-*"))[:-keep]:
        shutil.rmtree(other)


def latest_state(folder: Path) -> Path | None:
    return max(folder.glob("state-*"), default=None)


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a saved state back into module and optimizer; returns its JSON part with `step`.

    Raises RunError for a damaged file or one that belongs to another model.
    """
    state = read_json(path / "state.json")
    saved = load_trained(path / "tensors.safetensors", module)
    for name, parameter in module.named_parameters():
        found = {
            k.split(".")[1]: v
            for k, v in saved.items()
            if k.startswith("optimizer.") and k.split(".", 2)[2] == name
        }
        if found:
            optimizer.state[parameter] = {k: _moment(k, v, parameter) for k, v in found.items()}
    return state


def _moment(key: str, value: Tensor, parameter: Tensor) -> Tensor:
    if key == "step":  # Adam's step counter stays on the CPU in float32, as torch keeps it
        return value.clone()
    moment = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    put(moment, value)
    return moment


def save_trained(path: Path, module: nn.Module, write: bool = True) -> None:
    """The trained tensors alone, without the optimizer: the best so far. Atomic."""
    tensors = {f"model.{n}": whole(t).clone() for n, t in trained_tensors(module).items()}
    if write:
        temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
        save_file(tensors, temporary)
        os.replace(temporary, path)


def load_trained(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Put saved tensors back into `module`; returns everything the file holds. RunError as `load_state`."""
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); delete {path.parent} to train from the start") from None
    current = trained_tensors(module)
    if {n for n in saved if n.startswith("model.")} != {f"model.{n}" for n in current}:
        raise RunError(f"{path} belongs to another model; delete it, or rebuild the stage with --redo")
    for name, tensor in current.items():
        put(tensor, saved[f"model.{name}"])
    return saved


def drop_states(folder: Path) -> None:
    """After the final weights are saved, intermediate states are dead weight."""
    for path in [*folder.glob("state-*"), *folder.glob(".state.tmp*")]:
        shutil.rmtree(path)
    (folder / BEST).unlink(missing_ok=True)


BEST = "best.safetensors"
