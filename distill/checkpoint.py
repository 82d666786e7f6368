"""Training state on disk, for an exact resume after any kill: safetensors and JSON, never pickle.

What must be saved is small by design: trained tensors, buffers (expert bias), optimizer moments, the
step. Batches, dropout and learning rate are pure functions of (seed, step), so they need no state.
A state folder is written under a temporary name and renamed; the previous one goes only after that.

    save_state(folder, step, model, optimizer, extra); step, extra = load_state(folder, model, optimizer)
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from distill.errors import RunError
from distill.shards import read_json, write_json


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training changes: trainable parameters and persistent buffers."""
    persistent = model.state_dict(keep_vars=True)
    return {n: t for n, t in persistent.items() if not isinstance(t, nn.Parameter) or t.requires_grad}


def save_state(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]
) -> None:
    """Write `folder/state-<step>` whole, then delete older states. `extra` is any small JSON value."""
    final = folder / f"state-{step:07d}"
    temporary = folder / f".state.tmp{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"model.{n}": t.detach() for n, t in _tensors(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    # Tied tensors share storage, which safetensors refuses: copies cost little at save time.
    save_file(
        {n: t.contiguous().cpu().clone() for n, t in tensors.items()}, temporary / "tensors.safetensors"
    )
    write_json(temporary / "state.json", {"step": step, **extra})
    os.replace(temporary, final)
    for other in folder.glob("state-*"):
        if other != final:
            shutil.rmtree(other)


def latest_state(folder: Path) -> Path | None:
    return max(folder.glob("state-*"), default=None)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a saved state back into model and optimizer; returns its JSON part with `step`.

    Raises RunError for a damaged file or one that belongs to another model.
    """
    state = read_json(path / "state.json")
    try:
        saved = load_file(path / "tensors.safetensors")
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it to train from the start") from None
    current = _tensors(model)
    if {n for n in saved if n.startswith("model.")} != {f"model.{n}" for n in current}:
        raise RunError(f"{path} belongs to another model; delete it, or rebuild the stage with --redo")
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved[f"model.{name}"])
    for name, parameter in model.named_parameters():
        found = {
            k.split(".")[1]: v
            for k, v in saved.items()
            if k.startswith("optimizer.") and k.split(".", 2)[2] == name
        }
        if found:
            # Adam's step counter stays on the CPU in float32, as torch keeps it.
            optimizer.state[parameter] = {
                k: v.clone() if k == "step" else v.to(parameter.device, copy=True) for k, v in found.items()
            }
    return state


def drop_states(folder: Path) -> None:
    """After the final weights are saved, intermediate states are dead weight."""
    for path in [*folder.glob("state-*"), *folder.glob(".state.tmp*")]:
        shutil.rmtree(path)
