"""Precision is one explicit value, and what a device cannot do is refused with the reason.

| value | matmuls            | weights and optimizer | needs |
|-------|--------------------|-----------------------|-------|
| fp32  | float32            | float32               | nothing |
| bf16  | bfloat16 autocast  | float32               | any CPU; a GPU of compute capability 8.0 (Ampere) or later |
| fp16  | float16 + scaler   | float32               | CUDA: on CPU, Accelerate would silently run float32 |
| fp8   | float8 (torchao)   | float32               | CUDA capability 8.9 (Ada, Hopper) or later and torchao |

    choice = resolve_precision("bf16", torch.device("cpu")); print(choice.reason)
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from distill.errors import UserError


@dataclass(frozen=True)
class Precision:
    name: str
    accelerate: str  # what `Accelerator(mixed_precision=...)` is given
    reason: str  # printed and kept in the manifest

    def handlers(self) -> list:
        """Accelerate's recipe objects: only fp8 has one."""
        if self.name != "fp8":
            return []
        from accelerate.utils import AORecipeKwargs

        return [AORecipeKwargs()]


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision `name` on `device`. Raises UserError with the reason where the device lacks it."""
    kind = device.type
    if name == "fp32":
        return Precision(name, "no", "float32 everywhere")
    if name == "bf16":
        if kind == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(
                f"precision bf16: {torch.cuda.get_device_name(device)} has no bfloat16 units; "
                "set train.precision=fp16 (or fp32)"
            )
        note = (
            ""
            if kind != "cpu" or _cpu_has_bf16()
            else " (emulated: this CPU has no bf16 units, expect no gain)"
        )
        return Precision(name, "bf16", f"bfloat16 matmuls by autocast{note}, weights and optimizer float32")
    if name == "fp16":
        if kind == "cpu":
            raise UserError(
                "precision fp16: no CPU path (Accelerate would silently compute in float32, and real float16 "
                "is tens of times slower); set train.precision=bf16 or fp32"
            )
        return Precision(name, "fp16", "float16 matmuls by autocast with loss scaling, weights float32")
    if kind != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"precision fp8: needs a CUDA GPU of compute capability 8.9 or later, this is {kind}; "
            "set train.precision=bf16"
        )
    if find_spec("torchao") is None:
        raise UserError(
            "precision fp8: torchao is not installed; pip install torchao, or set train.precision=bf16"
        )
    return Precision(
        name,
        "fp8",
        "float8 matmuls in nn.Linear layers by torchao; first and last Linear, embedding, norms, attention "
        "operators, router and fused experts stay high",
    )


def _cpu_has_bf16() -> bool:
    """Whether bf16 matmuls have hardware (AVX512-BF16 or AMX) on this CPU."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
