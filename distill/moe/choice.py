"""What stands between a router and its top-k: experts taken out of the choice, or drawn instead of the best.

    with masked_choice(router, torch.tensor([3])):
        model(**batch)                  # the family selects as ever, with expert 3 at a score of -inf
    with drawn_choice(router, seed, keys):
        model(**batch)                  # the k experts are drawn in proportion to their scores

The module that chooses (the one that holds k) runs under a mode that changes what its top-k sees, so bias, group
limit, renormalisation and scale stay the family's own, and the scores that become weights are not touched.

Shapes: N tokens of one call, E experts (all that the router chooses among), k experts per token.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from distill.errors import RunError, UserError
from distill.models.decode import uniforms
from distill.models.hooks import replaced_forward
from distill.models.routers import Router, bare
from distill.moe.totals import is_sparsemixer

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
    with _choosing_under(router, _MaskedChoice(router, experts), "be taken out of it; drop it with how=zero"):
        yield


@contextmanager
def _choosing_under(router: Router, mode: "_Choice", what: str) -> Iterator[None]:
    holders = [holder for holder, _ in holders_of_k(router)]
    inner = None if router.router is None else bare(router.router)
    # dbrx's router only makes logits: who has the k is who chooses.
    by_router = inner in holders or getattr(inner, "config", None) in holders
    module = router.router if by_router else router.block
    original = module.forward

    def forward(*args, **kwargs):
        mode.seen = False
        with mode:
            output = original(*args, **kwargs)
        if not mode.seen:
            raise RunError(
                f"{router.name}: {type(inner).__name__} made no top-k over {router.num_experts} scores, so no "
                f"expert can {what}"
            )
        return output

    with replaced_forward(module, forward):
        yield


@contextmanager
def drawn_choice(router: Router, seed: int, keys: Callable) -> Iterator[None]:
    """Run the choosing module under a mode that draws experts; `keys(router, N)` tells the tokens apart [N]."""
    with _choosing_under(router, _DrawnChoice(router, seed, keys), "be drawn"):
        yield


class _Choice(TorchFunctionMode):
    """What stands between a family's code and its top-k. `seen`: whether there was one."""

    seen = False


class _DrawnChoice(_Choice):
    """The top-k over E scores becomes a draw: the k largest log scores + Gumbel noise (arXiv 1903.06059)."""

    def __init__(self, router: Router, seed: int, keys: Callable):
        super().__init__()
        self.router, self.seed, self.keys = router, seed, keys

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        k = args[1] if len(args) > 1 else kwargs.get("k")
        e = self.router.num_experts
        if func not in (torch.topk, torch.Tensor.topk) or args[0].shape[-1] != e or k != self.router.top_k:
            return func(*args, **kwargs)
        self.seen = True
        scores = args[0]
        drawn = (self._logs(scores.reshape(-1, e).float()) + self._noise(scores)).topk(k, dim=-1).indices
        drawn = drawn.view(*scores.shape[:-1], k)
        return torch.return_types.topk((scores.gather(-1, drawn), drawn))

    def _logs(self, scores: torch.Tensor) -> torch.Tensor:
        """[N, E]: logits as they are, else the logarithm of scores, -inf where the family has ruled one out."""
        allowed = scores.isfinite()
        if self.router.bias is not None:
            scores = scores - self.router.bias.float().to(scores.device)
        elif bool((scores[allowed] < 0).any()):
            return scores
        return scores.clamp(min=1e-9).log().masked_fill(~allowed, -math.inf)

    def _noise(self, scores: torch.Tensor) -> torch.Tensor:
        e = self.router.num_experts
        steps = self.keys(self.router, scores.numel() // e)[:, None] * e
        steps = steps + torch.arange(e, device=steps.device)
        uniform = uniforms(torch.full_like(steps, self.seed), steps).clamp(1e-12, 1 - 1e-12)
        return -(-uniform.log()).log().float()


class _MaskedChoice(_Choice):
    """Every top-k over E scores, and the one or the maximum inside groups of them, sees -inf for some experts."""

    def __init__(self, router: Router, experts: torch.Tensor):
        super().__init__()
        self.experts, self.num_experts = experts, router.num_experts
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
