"""Memory of a training step: what a forward pass keeps for its backward pass, less of it, and what to halve at the end.

    with saved_for_backward(module) as saved:
        loss = module(batch)
    saved()                                # bytes, while the graph of `loss` is alive

    lean = Lean(model)                     # once, before anything wraps the model
    with lean: ...forward and backward...

    except OutOfMemory as error: raise memory_advice(error, train, micro_batch_size)

Number formats, adapters and batch shapes act on the activations that are kept; weights, gradients and optimizer state
are counted from the parameters. The figure is measured rather than guessed, and the same on every device, unlike a
peak that depends on the allocator and on what else the process has done. The arithmetic of one step depends on none
of it.

Autograd keeps the result of each operation that the next one needs. Of an RMSNorm (arXiv 1910.07467) that is its input
and the normalised input; of a gated MLP (SwiGLU, arXiv 2002.05202) the gate before and after its activation, the other
half, and their product. All but the inputs are quickly made again, so `Lean` keeps the inputs alone. The numbers of the
forward pass are the same to the last bit, which is tried for each module first; one that computes anything else, or
that has a forward of its own, is left as it is. Gradients agree to rounding.

PEFT adds to the product of a layer that of its LoRA adapter (arXiv 2106.09685), scales it, and under autocast casts the
input for both. Here one pass adds into the product, the scale is of the r inner numbers, and the layers that read one
input share its cast. In float32 the bits are the same where the scale is a power of two; in 16 bits the sum is rounded
once instead of three times.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from distill.config.training import Train
from distill.errors import RunError
from distill.models.hooks import replaced_forward
from distill.models.packed import plain_adapter

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


# ---- less to keep ----


class Lean:
    """A context inside which norms, gated MLPs and LoRA layers of `model` keep less for the backward pass."""

    def __init__(self, model: nn.Module):
        self._cast = _Cast()
        found = [
            (module, self._instead(module)) for module in model.modules() if "forward" not in vars(module)
        ]
        self.instead = [(module, forward) for module, forward in found if forward]

    def _instead(self, module: nn.Module) -> Callable | None:
        return partial(_lora, module, self._cast) if _fusable(module) else _lean_forward(module)

    def __enter__(self) -> "Lean":
        self._stack = ExitStack()
        for module, forward in self.instead:
            self._stack.enter_context(replaced_forward(module, forward))
        return self

    def __exit__(self, *raised) -> None:
        self._stack.close()


def _lean_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What computes the same as `module` to the last bit, or None. No product with its matrices is tried."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if names == {"weight"} and module.weight.ndim == 1 and isinstance(eps, float):
        form = next((form for form in _NORMS if _same_bits(partial(_both_norms, module, eps, form))), None)
        return form and partial(_norm, module, eps, form)
    if all(isinstance(getattr(module, name, None), nn.Module) for name in (*_GATED, "act_fn")):
        return partial(_gated_mlp, module) if _same_bits(partial(_both_gates, module)) else None
    return None


@torch.no_grad()
def _same_bits(both: Callable[[torch.dtype, float], tuple[Tensor, Tensor]]) -> bool:
    """Whether both give the same for random inputs of either dtype, also where an epsilon counts."""
    try:
        return all(
            torch.equal(*both(dtype, size))
            for dtype in (torch.float32, torch.bfloat16)
            for size in (1.0, 1e-3)
        )
    except Exception:  # a module that wants other arguments is none of these
        return False


def _drawn(like: Tensor, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(like.device) for _ in range(3)]


def _both_norms(module: nn.Module, eps: float, form: str, dtype: torch.dtype, size: float):
    """With a drawn weight: weights that nobody has trained are all one, or all zero, and many forms agree there."""
    x, weight, _ = _drawn(module.weight, 3, len(module.weight))
    x, weight = (size * x).to(dtype), weight[0].to(module.weight.dtype)
    return functional_call(module, {"weight": weight}, (x,)), _RMSNorm.apply(x, weight, eps, form)


def _both_gates(module: nn.Module, dtype: torch.dtype, size: float):
    """With known numbers instead of the products, of which the last hands on what it is given."""
    x, gate, up = ((size * t).to(dtype) for t in _drawn(next(module.parameters()), 3, 8))
    with ExitStack() as stack:
        for name, instead in zip(_GATED, (lambda _: gate, lambda _: up, lambda x: x)):
            stack.enter_context(replaced_forward(getattr(module, name), instead))
        return module.forward(x), _gated_mlp(module, x)


_GATED = ("gate_proj", "up_proj", "down_proj")


def _gated_mlp(module: nn.Module, x: Tensor) -> Tensor:
    return module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x), module.act_fn))


class _Gate(torch.autograd.Function):
    """act(gate) * up, of any shape."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.act(leaf)
        (to_gate,) = torch.autograd.grad(active, leaf, grad * up)
        return to_gate, grad * active.detach(), None


# How a family scales what it has normalised: (normalised in float32, weight, dtype of the input) -> output.
_NORMS = {
    "rounded first": lambda normal, weight, dtype: weight * normal.to(dtype),  # Llama and most others
    "rounded last": lambda normal, weight, dtype: (weight * normal).to(dtype),
    "plus one": lambda normal, weight, dtype: (normal * (1.0 + weight.float())).to(dtype),  # Gemma
}


def _norm(module: nn.Module, eps: float, form: str, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, eps, form)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps), scaled; x [..., d], weight [d]. Arithmetic and gradients in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.form = form
        return _NORMS[form](wide * scale, weight, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, normal, to_weight, to_x = grad.float(), x.float() * scale, None, None
        if ctx.needs_input_grad[1]:
            to_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = grad * (weight.float() + 1.0 if ctx.form == "plus one" else weight.float())
            mean = (inner * normal).mean(-1, keepdim=True)
            to_x = inner.addcmul_(normal, mean, value=-1.0).mul_(scale).to(x.dtype)
        return to_x, to_weight, None, None


def _fusable(module: nn.Module) -> bool:
    """A plain LoRA layer of which the adapter alone trains, without dropout."""
    if not plain_adapter(module):
        return False
    (name,) = module.active_adapters
    frozen = not any(p.requires_grad for p in module.base_layer.parameters())
    return frozen and isinstance(module.lora_dropout[name], nn.Identity) and name in module.lora_A


class _Cast:
    """The last tensor that was cast, for as long as it lives, and what became of it."""

    def __init__(self):
        self._of: tuple | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x.detach()
        if self._of is not None:
            last, version, cast = self._of
            if last() is x and version == x._version and cast.dtype == dtype:
                return cast
        self._of = weakref.ref(x, self._forget), x._version, x.detach().to(dtype)
        return self._of[2]

    def _forget(self, dead: weakref.ref) -> None:
        if self._of is not None and self._of[0] is dead:
            self._of = None


def _lora(module: nn.Module, cast: _Cast, x: Tensor, *args, **kwargs) -> Tensor:
    (name,) = module.active_adapters
    told = args or kwargs or module.disable_adapters or module.merged
    if told or not torch.is_grad_enabled():
        return type(module).forward(module, x, *args, **kwargs)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    base, down, up = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
    return _LoraSum.apply(x, cast(x, dtype), base.weight, base.bias, down, up, module.scaling[name])


class _LoraSum(torch.autograd.Function):
    """x W' + b + scale * (x A') B' with W [out, in], A [r, in], B [out, r]; A and B alone train.

    `same` is x in the dtype of the products.
    """

    @staticmethod
    def forward(ctx, x: Tensor, same: Tensor, weight: Tensor, bias, down: Tensor, up: Tensor, scale: float):
        rows, dtype = same.flatten(0, -2), same.dtype
        ctx.dtypes, ctx.scale, ctx.shape = (x.dtype, down.dtype, up.dtype), scale, x.shape
        weight, bias, down, up = (t if t is None else t.to(dtype) for t in (weight, bias, down, up))
        inner = (rows @ down.T).mul_(scale)
        out = torch.nn.functional.linear(rows, weight, bias).addmm_(inner, up.T)
        ctx.save_for_backward(rows, inner, weight, down, up)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, inner, weight, down, up = ctx.saved_tensors
        of_x, of_down, of_up = ctx.dtypes
        grad = grad.flatten(0, -2)
        to_inner = (grad @ up).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ weight).addmm_(to_inner, down).to(of_x).view(ctx.shape)
        return to_x, None, None, None, (to_inner.T @ rows).to(of_down), (grad.T @ inner).to(of_up), None
