"""Where the routers of a mixture-of-experts model are, and how to hear each of their decisions.

    for router in find_routers(model):
        print(router.name, router.num_experts, router.top_k, router.bias)

Nearly every MoE of transformers is a block with an `experts` child beside a `gate` or `router`, and ends in
the call `experts(hidden, indices, weights)`. That call is where decisions are read: whatever made them
(bias, group limits, hash tables), these are the ones that were used. The few that differ (llama4, jetmoe,
doge) are recognised by their own structure; a MoE that fits none raises `UserError`. No list of class or
model names is kept.

Shapes: N tokens of one call, E experts (all that the router chooses among), k experts per token.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from distill.errors import RunError, UserError
from distill.models.hooks import Hooks

_BIAS = re.compile(r"(^|\.)(e_score_correction_bias|expert_bias|balancing_biases)$")
_MOE_CLASS = re.compile(r"Router|Experts|SparseMoe|TopK")


@dataclass(frozen=True)
class Router:
    """One routed layer. `name` is the block's qualified name in the bare causal LM (no PEFT or DDP prefix).

    `num_experts` counts every class the router chooses among; the last `null_experts` of them compute nothing
    (zaya's skip, longcat's identity experts). `bias` is the selection-only expert bias [E], None where the
    family has none; it shares the model's memory, so writing to it changes the model.
    `source` says where the decisions are read: `experts` call, or `dense_scores` (llama4), `sorted_groups`
    (jetmoe), `product_keys` (doge). `router` or `experts` is None where the block has no such child.
    """

    name: str
    block: nn.Module
    router: nn.Module | None
    experts: nn.Module | None
    num_experts: int
    top_k: int
    bias: torch.Tensor | None
    null_experts: int = 0
    source: str = "experts"


# ---------------------------------------------------------------------- finding routers


def find_routers(model: nn.Module) -> list[Router]:
    """Every routed layer in module order, `[]` for a dense model. Looks through PEFT, DDP and torch.compile.

    Raises UserError for a MoE whose blocks have none of the known structures, rather than calling it dense.
    """
    base = bare_model(model)
    modules = dict(base.named_modules())
    routers = [router for name, module in modules.items() if (router := _router_of(name, module))]
    if not routers:
        suspects = sorted({type(m).__name__ for m in modules.values() if _MOE_CLASS.search(type(m).__name__)})
        if suspects:
            raise UserError(
                f"{type(base).__name__} looks like a mixture of experts ({', '.join(suspects)}) but no block "
                "has an `experts` child beside a `gate` or `router`: this structure cannot be recorded"
            )
    return routers


def bare_model(model: nn.Module) -> nn.Module:
    """The transformers model under torch.compile, PEFT and DDP, in whatever order they were put on."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def bare(module: nn.Module) -> nn.Module:
    """The module under PEFT's wrappers (LoRA on a parameter, or the trained copy of `modules_to_save`)."""
    while True:
        if hasattr(module, "base_layer"):
            module = module.base_layer
        elif hasattr(module, "original_module"):
            copies = [
                module.modules_to_save[a] for a in module.active_adapters if a in module.modules_to_save
            ]
            module = copies[0] if copies and not module.disable_adapters else module.original_module
        else:
            return module


def _router_of(name: str, block: nn.Module) -> Router | None:
    child = dict(block.named_children())
    router, experts = child.get("gate", child.get("router")), child.get("experts")
    if router is not None and experts is not None:
        if isinstance(experts, nn.ModuleList | nn.ModuleDict):
            raise UserError(
                f"{name}: experts in a {type(experts).__name__} are never called as one module, so their "
                "routing cannot be read; load the model with the implementation that transformers ships"
            )
        takes = inspect.signature(bare(experts).forward).parameters
        source = "experts" if len(takes) > 1 else "dense_scores"
    elif router is not None and "input_linear" in child and "output_linear" in child:
        source = "sorted_groups"
    elif "router_gate" in child and "down_embed" in child and "up_embed" in child:
        source = "product_keys"
    else:
        return None
    holders = [bare(module) for module in (router, experts, block) if module is not None]
    holders += [holder.config for holder in holders if hasattr(holder, "config")]
    bias, top_k = _bias_of(block, router), _integer(holders, "top_k", "top_k_experts")
    real = block.num_keys**2 if source == "product_keys" else _integer(holders, "num_experts")
    num_experts = real if bias is None else bias.numel()
    if top_k is None or num_experts is None:
        raise UserError(
            f"{name}: cannot tell how many experts {type(block).__name__} has, or how many a token uses"
        )
    null_experts = num_experts - real if real else 0
    return Router(name, block, router, experts, num_experts, top_k, bias, null_experts, source)


def _integer(holders: list, *names: str) -> int | None:
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _bias_of(block: nn.Module, router: nn.Module | None) -> torch.Tensor | None:
    """The bias on the router or on the block itself; other children of the block have biases of their own."""
    own = [*block.named_buffers(recurse=False), *block.named_parameters(recurse=False)]
    if router is not None:
        own += [*bare(router).named_buffers(), *bare(router).named_parameters()]
    # A view, so that writing to it writes to the model (ernie stores [1, E]).
    return next((tensor.detach().view(-1) for name, tensor in own if _BIAS.search(name)), None)


# ---------------------------------------------------------------------- hearing them


def listen(router: Router, hooks: Hooks, running: Callable[[], bool], emit: Callable) -> None:
    """Call `emit(logits [N, E], weights [N, k], indices [N, k])` at each call of the block while `running()`.

    The hooks are added to `hooks`, which the caller closes. The model is not changed.
    """
    held = {}  # the router's logits, until the experts are called with its decisions

    def logits_of(_module, _args, output):
        if running():
            held["logits"] = output[0] if isinstance(output, tuple) else output

    def experts_called(_module, args, kwargs):
        if not running():
            return
        tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)][1:]
        indices = next((x for x in tensors if not x.is_floating_point()), None)
        weights = next((x for x in tensors if x.is_floating_point()), None)
        logits = held.pop("logits", None)
        if indices is None or weights is None or logits is None:
            raise RunError(
                f"{router.name}: {type(bare(router.experts)).__name__} was called without indices and "
                "weights, or before its router: this block cannot be recorded"
            )
        if router.null_experts:  # zaya hands a skipped token on as expert 0 with weight 0
            indices = torch.where((weights == 0) & (indices == 0), router.num_experts - 1, indices)
        emit(logits, weights, indices)

    def adapted(_module, _args, output):
        if running():
            emit(*_ADAPTERS[router.source](router, output))

    if router.source == "experts":
        hooks.after(router.router, logits_of)
        hooks.before(router.experts, experts_called, named=True)
    else:
        hooks.after(router.router or router.block, adapted)


def _dense_scores(router: Router, output) -> tuple:
    """llama4: the router returns scores that are 0 outside of the top k, and the logits."""
    weights, logits = output
    # Detached, here and below: gradient checkpointing refuses hooks that save what its second run does not.
    weights, indices = weights.detach().topk(router.top_k, dim=-1)
    return logits, weights, indices


def _sorted_groups(router: Router, output) -> tuple:
    """jetmoe: the assignments come sorted by expert, `order` being their places in the flattened [N, k]."""
    order, _, gates, sizes, logits = output
    indices, weights = torch.empty_like(order), torch.empty_like(gates)
    indices[order] = torch.repeat_interleave(torch.tensor(sizes, device=order.device))
    weights[order] = gates.detach()
    return logits, weights.view(len(logits), -1), indices.view(len(logits), -1)


def _product_keys(router: Router, output) -> tuple:
    """doge: expert (x, y) has logit x + y; the block returns both halves, and its choice is their top k."""
    halves = output[1]
    logits = (halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)).flatten(1)
    best, indices = logits.detach().topk(router.top_k, dim=-1)
    return logits, best.softmax(-1), indices


_ADAPTERS = {"dense_scores": _dense_scores, "sorted_groups": _sorted_groups, "product_keys": _product_keys}
