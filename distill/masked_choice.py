"""A router's own choice with some experts taken out, and what can be known of that choice beforehand.

    with masked_choice(router, torch.tensor([3])):
        model(**batch)                  # the family selects as ever, with expert 3 at a score of -inf

The module that chooses (the one that holds k) runs under a mode that masks what its top-k sees, so bias, group
limit, renormalisation and scale stay the family's own, and the scores that become weights are not touched.

Shapes: N tokens of one call, E experts (all that the router chooses among), k experts per token.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from distill.errors import RunError, UserError
from distill.routers import Router, bare
from distill.routing_scores import is_sparsemixer

_WORTH = (torch.topk, torch.Tensor.topk, torch.max, torch.Tensor.max)  # of a group, over the scores in it


def holders_of_k(router: Router) -> list[tuple[object, str]]:
    """Where the family keeps its k: on router and block as `top_k`, or else (gemma4) in the router's config."""
    modules = [bare(module) for module in (router.router, router.experts, router.block) if module is not None]
    if own := [(m, "top_k") for m in modules if isinstance(vars(m).get("top_k"), int)]:
        return own
    configs = [module.config for module in modules if hasattr(module, "config")]
    return [
        (c, n) for c in configs for n in ("top_k", "top_k_experts") if isinstance(getattr(c, n, None), int)
    ]


def without_scores(router: Router) -> str | None:
    """Why this router has no top-k over scores, if it has none."""
    if router.router is not None:
        if any(not b.is_floating_point() and b.ndim == 2 for b in bare(router.router).buffers()):
            return "the experts of each token id are in a table (hash routing)"
        if is_sparsemixer(router):
            return "sparsemixer takes two maxima, one after the other, and no top-k"
    return None


def groups_of(router: Router) -> tuple[int, int] | None:
    """(groups, groups a token may use) where the router limits them."""
    inner = None if router.router is None else bare(router.router)
    groups, usable = getattr(inner, "num_group", None), getattr(inner, "topk_group", None)
    limits = isinstance(groups, int) and isinstance(usable, int) and usable < groups
    return (groups, usable) if limits and getattr(inner, "topk_method", "") != "greedy" else None


def experts_left(router: Router, experts: list[int]) -> int:
    """How many experts every token can still choose among, in the worst case, without those."""
    groups = groups_of(router)
    if not groups:
        return router.num_experts - len(experts)
    # A token's groups may be those with the fewest left; one without a second best has no worth to "top 2".
    size = router.num_experts // groups[0]
    alive = [size - sum(e // size == g for e in experts) for g in range(groups[0])]
    if sum(n >= min(2, size) for n in alive) < groups[1]:
        return 0
    return sum(sorted(n for n in alive if n)[: groups[1]])


@contextmanager
def masked_choice(router: Router, experts: torch.Tensor) -> Iterator[None]:
    """Run the choosing module under a mode that masks the scores its top-k sees."""
    holders = [holder for holder, _ in holders_of_k(router)]
    inner = None if router.router is None else bare(router.router)
    # dbrx's router only makes logits: who has the k is who chooses.
    by_router = inner in holders or getattr(inner, "config", None) in holders
    module = router.router if by_router else router.block
    masked, original, own = _MaskedChoice(router, experts), module.forward, vars(module).get("forward")

    def forward(*args, **kwargs):
        masked.seen = False
        with masked:
            output = original(*args, **kwargs)
        if not masked.seen:
            raise RunError(
                f"{router.name}: {type(inner).__name__} made no top-k over {router.num_experts} scores, so no "
                "expert can be taken out of it; drop it with how=zero"
            )
        return output

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _MaskedChoice(TorchFunctionMode):
    """Every top-k over E scores, and the one or the maximum inside groups of them, sees -inf for some experts."""

    def __init__(self, router: Router, experts: torch.Tensor):
        super().__init__()
        self.experts, self.num_experts, self.seen = experts, router.num_experts, False
        self.name, self.left = router.name, experts_left(router, experts.tolist())
        groups = groups_of(router)
        self.grouped = (groups[0], router.num_experts // groups[0]) if groups else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk) and args[0].shape[-1] == self.num_experts:
            k = args[1] if len(args) > 1 else kwargs["k"]
            if k > self.left:  # another context may have raised it
                raise UserError(f"{self.name}: {self.left} experts are left, a token needs {k}; drop fewer")
            self.seen = True
            args = (self._masked(args[0], (self.num_experts,)), *args[1:])
        elif func in _WORTH and args[0].ndim == 3 and args[0].shape[-2:] == self.grouped:
            args = (self._masked(args[0], self.grouped), *args[1:])
        return func(*args, **kwargs)

    def _masked(self, scores: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        mask = torch.zeros(self.num_experts, dtype=torch.bool, device=scores.device)
        mask[self.experts.to(scores.device)] = True
        return scores.masked_fill(mask.view(shape), -math.inf)
