"""Linear layers whose weights lie in the order that a CPU's products read, for as long as text is decoded.

    with packed_linears(model): ...     # inference alone; the model is given back as it was

A product of a few rows reads the whole weight, and oneDNN puts it into its own order first, at every call. Decoding
reads the same weights hundreds of times, so the order is made once here: a layer of SmolLM2 takes 0.75 of its time at
32 rows, 0.5 at 8 and 0.75 in a prompt of 3,000 tokens. In bfloat16 the result is the same to the last bit, in float32
to rounding. Under autocast the weights are cast once as well.

A layer with a LoRA adapter multiplies once instead of three times where both are float32: the sum is packed, and the
weights stay as they are. 210 answers of the demo's student take 0.76 of the time.

The price is a second copy of the weights, so nothing is packed where memory is short.

The two operators are those that torch.compile packs weights with on a CPU (torch/_inductor/fx_passes/mkldnn_fusion.py).
They are not public: where a version of torch lacks them, or refuses, the layer works as it did.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from distill.devices import free_memory
from distill.models.hooks import replaced_forward

LEAST_WEIGHTS = 2**14  # of a layer: in a smaller one the call costs more than the product
ROWS = 32  # that the order is made for; it was the same for 1 to 1,024 rows
SHARE = 1 / 3  # of the free memory that packed weights may take
_DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes without gradient use packed weights; those are made when a layer is first called.

    The weights must not change meanwhile. Layers that something else has changed (quantized, parametrized, with a
    forward of its own) are left alone, and so is a model on another device, or one that torch.compile has seen.
    """
    with ExitStack() as stack:
        instead = [(layer, _PackedForward(layer)) for layer in _packable(model, LEAST_WEIGHTS)]
        instead += [(layer, _PackedSum(layer)) for layer in _adapters(model)]
        for layer, forward in instead:
            stack.enter_context(replaced_forward(layer, forward))
        yield


def _packable(model: nn.Module, least: int) -> list[nn.Linear]:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return []
    if any(_compiled(module) for module in model.modules()):  # it packs by itself, and traces what it finds
        return []
    found = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in _DTYPES
        and layer.weight.numel() >= least
    ]
    free, local = free_memory(torch.device("cpu")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = sum(layer.weight.nbytes for layer in found)
    return found if free is None or needed * local <= SHARE * free else []


def _adapters(model: nn.Module) -> list[nn.Module]:
    plain = {id(layer) for layer in _packable(model, 1)} if hasattr(model, "peft_config") else set()
    return [m for m in model.modules() if plain and plain_adapter(m) and id(m.base_layer) in plain]


def plain_adapter(module: nn.Module) -> bool:
    """Whether this is PEFT's plain LoRA around a plain layer, with one adapter that nobody listens to from inside."""
    if not hasattr(module, "lora_A"):
        return False
    from peft.tuners.lora.layer import Linear

    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and not any("forward" in vars(m) for m in (module, module.base_layer))
        and len(module.active_adapters) == 1
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module)
    )


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


class _PackedForward:
    """What a linear layer does instead, with its weight packed for each dtype that it multiplies in."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer
        self.packed: dict[torch.dtype, Tensor | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
        if (
            torch.is_grad_enabled()
            or not x.numel()
            or not (cast or dtype == weight.dtype)
            or x.dtype not in _DTYPES
        ):
            return linear(x, weight, bias)
        if dtype not in self.packed:
            self.packed[dtype] = _pack(weight, dtype)
        if (packed := self.packed[dtype]) is None:
            return linear(x, weight, bias)
        bias = bias if bias is None else bias.to(dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")


class _PackedSum:
    """What a layer with an adapter does instead: one product with the sum of both, packed, where all is float32."""

    def __init__(self, adapter: nn.Module):
        self.adapter, self.active = adapter, adapter.active_adapters
        self.packed: Tensor | None = None
        self.tried = False

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter, base = self.adapter, self.adapter.base_layer
        told = args or kwargs or adapter.disable_adapters or adapter.merged or adapter.training
        other = torch.is_autocast_enabled("cpu") or not x.dtype == base.weight.dtype == torch.float32
        if (
            told
            or other
            or torch.is_grad_enabled()
            or not x.numel()
            or adapter.active_adapters != self.active
        ):
            return type(adapter).forward(adapter, x, *args, **kwargs)
        if not self.tried:
            self.tried = True
            self.packed = _pack(base.weight + adapter.get_delta_weight(self.active[0]), x.dtype)
        if self.packed is None:
            return type(adapter).forward(adapter, x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, base.bias, "none", [], "")


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """None where this torch or this dtype cannot."""
    if dtype not in _DTYPES:
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), ROWS)
    except (AttributeError, RuntimeError):
        return None
