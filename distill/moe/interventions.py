"""What a mixture-of-experts model does when its routing is changed: at inference, for as long as a context lasts.

    with use_top_k(model, 1):                       # fewer (or more) experts per token than it was trained with
        rows, _ = answer_problems(model, ...)
    with drop_experts(model, {1: [3]}):             # expert 3 of layer 1 is never chosen, the next best steps in
    with route(model, "random", seed=0):            # a control: do the router's choices matter at all?
    with sample_experts(model, seed=0):             # experts drawn by their scores instead of the best k

The model decides as its own family would: `use_top_k` sets the number that the router itself reads, so its
bias, group limit, renormalisation and scale apply; `drop_experts` masks the scores inside the router's own
top-k; `route` and `how="zero"` rewrite the indices and weights on their way into `experts`, the call that 57 of
the 60 families of transformers 5.24 make. What cannot be done exactly is refused before anything runs.

No parameter, buffer or config is written (gemma4 alone reads k from its config, which is put back): on exit the
model gives the same bits. Prefill, cached decoding, `distill.models.decode`, `generate` and PEFT all pass through the
same modules. Contexts nest; of two that rewrite the same call the inner one acts first, and `record_routing`,
entered before or after, hears what the experts really get.

Shapes: N tokens of one call (B rows of T), E experts (all that the router chooses among), k experts per token.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from distill.errors import RunError, UserError
from distill.models.decode import row_seed, uniforms
from distill.models.hooks import Hooks
from distill.models.load import CACHE_NAMES
from distill.models.routers import Router, bare, bare_model, find_routers
from distill.moe.choice import (
    drawn_choice,
    experts_left,
    groups_of,
    holders_of_k,
    masked_choice,
    without_scores,
)
from distill.moe.recording import is_compiled, real_tokens, routed_backbone
from distill.moe.totals import is_sparsemixer

ROUTES = ("random", "uniform", "shuffled")
_POSITIONS = 2**20  # positions told apart in a token's key; longer texts only repeat draws


# ---------------------------------------------------------------------------------------- how many experts


@contextmanager
def use_top_k(model: nn.Module, k: int) -> Iterator[None]:
    """Every routed layer sends each token to `k` experts, chosen and weighted as by a model built with that k.

    Raises UserError for a dense or compiled model; a k below 1, above the experts there are or above what the
    group limit leaves; and for families that have no k to change: hash layers (deepseek_v4), sparsemixer
    (phimoe), heads that are experts (jetmoe), a config that refuses it (zaya: 1 alone). Raises RunError if
    experts then receive another number.
    """
    routers = _routers_of(model)
    problems = [problem for router in routers if (problem := _top_k_problem(router, k))]
    if problems := problems or _config_problems(bare_model(model).config, k):
        raise UserError(*dict.fromkeys(problems))
    with ExitStack() as undo:
        for holder, name in {(id(h), n): (h, n) for r in routers for h, n in holders_of_k(r)}.values():
            undo.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, k)
        for router in routers:
            if router.source == "experts":
                undo.enter_context(_rewritten(router, _checked(router, k)))
        yield


def _top_k_problem(router: Router, k: int) -> str | None:
    room, groups = router.num_experts, groups_of(router)
    if reason := without_scores(router):
        return f"{router.name}: the number of experts per token is fixed, {reason}; leave top-k as it is"
    if router.source == "sorted_groups":
        return (
            f"{router.name}: the number of experts per token is fixed, since this family has as many query "
            "heads per key head as experts per token; leave top-k as it is"
        )
    if groups:
        room = groups[1] * (router.num_experts // groups[0])
    if k == 1 and hasattr(bare(router.experts or router.block), "identity_expert"):
        return (
            f"{router.name}: the experts of this family (longcat) fail on one expert per token; use 2 or more"
        )
    if not 1 <= k <= room:
        limit = f" in the {groups[1]} of {groups[0]} groups that a token may use" if groups else ""
        return f"{router.name}: top-k {k} is not possible, there are {room} experts{limit}; use 1 to {room}"
    return None


def _config_problems(config, k: int) -> list[str]:
    """What the family's own config says to that k (zaya knows one expert per token only)."""
    changed = copy.deepcopy(config.get_text_config(decoder=True))
    try:
        if hasattr(changed, "num_experts_per_tok"):
            changed.num_experts_per_tok = k
            changed.validate()
    except Exception as error:  # each config class validates in its own way
        reason = str(error).strip().splitlines()[-1].strip()
        return [f"top-k {k} is refused by the config of {config.model_type} ({reason}); use another"]
    return []


def _checked(router: Router, k: int) -> Callable:
    def check(indices, weights):
        if not indices.shape[-1] == weights.shape[-1] == k:
            raise RunError(
                f"{router.name}: asked for {k} experts per token, the router chose {indices.shape[-1]}"
            )
        return indices, weights

    return check


# ---------------------------------------------------------------------------------------- without an expert


@contextmanager
def drop_experts(
    model: nn.Module, drop: Mapping[int | str, Iterable[int]], how: str = "replace"
) -> Iterator[None]:
    """The named experts are never used. `drop`: {decoder layer number or router name: expert numbers from 0}.

    how="replace": its score is -inf where the family selects (in the worth of its group as well), so the next
        best expert steps in; the other scores, and what normalises them, are untouched.
    how="zero": it is chosen as before and its output counts nothing; the other weights are not scaled up.
        (zaya: a choice with weight 0 is recorded as the skip class, if it was expert 0.)

    Raises UserError for a dense or compiled model, an unknown layer or expert, too few experts left for one
    token (also under a group limit), and where a layer cannot do it: "replace" needs a top-k over scores
    (not hash layers, phimoe, doge), "zero" the experts call (not llama4, jetmoe, doge).
    """
    if how not in ("replace", "zero"):
        raise UserError(f"how={how!r}: a dropped expert is replaced by the next best or its output is zero")
    chosen, problems = _named_experts(_routers_of(model), drop)
    for router, experts in chosen:
        problems += _replace_problems(router, experts) if how == "replace" else _call_problems(router)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    with ExitStack() as undo:
        for router, experts in chosen:
            change = masked_choice if how == "replace" else _silenced
            undo.enter_context(change(router, torch.tensor(experts, dtype=torch.long)))
        yield


def layer_number(name: str) -> int | None:
    """The decoder layer in a router's name: 1 of "model.layers.1.mlp"."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def _named_experts(routers: list[Router], drop: Mapping) -> tuple[list[tuple[Router, list[int]]], list[str]]:
    chosen, problems = {}, []
    for layer, experts in drop.items():
        text, experts = str(layer), sorted(set(experts))
        found = [r for r in routers if r.name == text or str(layer_number(r.name)) == text]
        if len(found) > 1:
            names = ", ".join(r.name for r in found)
            problems.append(f"layer {text} has several routers; name one of {names}")
        elif not found:
            numbers = ", ".join(dict.fromkeys(str(layer_number(r.name)) for r in routers))
            problems.append(f"layer {text} routes nothing; layers with experts: {numbers}")
        elif wrong := [e for e in experts if not 0 <= e < found[0].num_experts]:
            problems.append(f"{found[0].name}: no expert {wrong[0]}; it has 0 to {found[0].num_experts - 1}")
        else:
            chosen.setdefault(found[0].name, (found[0], []))[1].extend(experts)
    return [(router, sorted(set(experts))) for router, experts in chosen.values()], problems


def _replace_problems(router: Router, experts: list[int]) -> list[str]:
    if reason := without_scores(router):
        return [f"{router.name}: no other expert can step in, {reason}; drop it with how=zero"]
    if router.source == "product_keys":
        return [
            f"{router.name}: its experts are cells of a product of keys, with no score of their own to mask"
        ]
    left, groups = experts_left(router, experts), groups_of(router)
    if left < router.top_k:
        limit = " in the groups that some token may use" if groups else ""
        return [f"{router.name}: {left} experts are left{limit}, a token needs {router.top_k}; drop fewer"]
    return []


def _silenced(router: Router, experts: torch.Tensor):
    def change(indices, weights):
        return indices, weights.masked_fill(torch.isin(indices, experts.to(indices.device)), 0)

    return _rewritten(router, change)


# ---------------------------------------------------------------------------------------- other decisions


@contextmanager
def route(model: nn.Module, how: str, seed: int = 0) -> Iterator[None]:
    """Controls that replace the routers' decisions in every layer.

    "random": k distinct experts that compute (no null experts), drawn per token and layer from `seed`, the
        token's id and its position alone, so neither batch nor cache changes a draw; they get the token's own
        weights, the largest first. A token that the router skips (zaya) stays skipped.
    "uniform": the token's own experts, each with the mean of its weights. Needs no seed.
    "shuffled": the real tokens of each call exchange their decisions by a permutation drawn from `seed`. It
        depends on the batch by its nature: a cached step of a single row has nobody to exchange with.
        Real is what the attention mask says; pads that `generate` feeds to finished rows have mask 1.

    Raises UserError for a dense or compiled model, an unknown `how`, or a layer without the experts call
    (llama4, jetmoe, doge); RunError where "random" or "shuffled" cannot tell the tokens of a call.
    """
    routers = _routers_of(model)
    problems = [problem for router in routers for problem in _call_problems(router)]
    if how not in ROUTES:
        problems.insert(0, f"route={how!r}: use one of {', '.join(ROUTES)}")
    for router in routers if how == "random" else []:
        if router.num_experts - router.null_experts < router.top_k:
            problems.append(f"{router.name}: fewer experts that compute than experts per token; use uniform")
    if problems:
        raise UserError(*dict.fromkeys(problems))
    tokens = _Tokens(routed_backbone(model, routers))
    with ExitStack() as undo:
        if how != "uniform":
            undo.enter_context(tokens.watched())
        for layer, router in enumerate(routers):
            undo.enter_context(_rewritten(router, _decision(how, router, row_seed((seed, layer)), tokens)))
        yield


def _decision(how: str, router: Router, seed: int, tokens: "_Tokens") -> Callable:
    def uniform(indices, weights):
        return indices, weights.mean(-1, keepdim=True).expand_as(weights).contiguous()

    def random(indices, weights):
        keys, experts = tokens.keys(router, len(indices)), router.num_experts - router.null_experts
        steps = keys[:, None] * router.num_experts + torch.arange(experts, device=keys.device)
        draws = uniforms(torch.full_like(steps, seed), steps)
        drawn = draws.argsort(-1)[:, : indices.shape[-1]].to(indices.dtype)
        ordered = weights.sort(-1, descending=True).values
        if router.null_experts:
            skipped = (weights == 0).all(-1, keepdim=True)
            drawn = torch.where(skipped, indices, drawn)
        return drawn, ordered

    def shuffled(indices, weights):
        slots = torch.arange(len(indices), device=indices.device)
        keys = tokens.keys(router, len(indices)) * _POSITIONS + slots
        real = slots if tokens.valid is None else slots[tokens.valid.to(slots.device)]
        source = slots.clone()
        source[real] = real[uniforms(torch.full_like(keys, seed), keys)[real].argsort()]
        return indices[source], weights[source]

    return {"uniform": uniform, "random": random, "shuffled": shuffled}[how]


class _Tokens:
    """The tokens of the forward pass in progress: a key [N] each, and which of them are real."""

    def __init__(self, backbone: nn.Module):
        self.backbone, self.names = backbone, list(inspect.signature(backbone.forward).parameters)
        self.ids = self.positions = self.valid = None

    def begin(self, _module, args, kwargs) -> None:
        named = dict(zip(self.names, args)) | kwargs
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if ids is None:
            raise RunError(
                "these decisions are drawn by token: call the model with input_ids, not embeddings"
            )
        told = isinstance(mask, torch.Tensor) and mask.ndim == 2
        self.valid = real_tokens(ids, None, mask if told else None, None)
        self.ids, self.positions = ids, _positions(ids, mask if told else None, named)

    def end(self, *_) -> None:
        self.ids = self.positions = self.valid = None

    def keys(self, router: Router, count: int) -> torch.Tensor:
        """int64 [N], a function of token id and position."""
        if self.ids is None or self.ids.numel() != count:
            raise RunError(
                f"{router.name}: {count} tokens are routed and the forward pass in progress has "
                f"{0 if self.ids is None else self.ids.numel()}; route whole forward passes of the model"
            )
        return (self.ids.long() * _POSITIONS + self.positions).reshape(-1)

    @contextmanager
    def watched(self) -> Iterator[None]:
        with Hooks() as hooks:
            hooks.before(self.backbone, self.begin, named=True)
            hooks.after(self.backbone, self.end, always=True)
            yield


def _positions(ids: torch.Tensor, mask: torch.Tensor | None, named: dict) -> torch.Tensor:
    """[B, T]: how many real tokens came before each. A mask of a cached step covers the whole past."""
    if mask is not None:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if (positions := named.get("position_ids")) is not None and positions.ndim == 2:
        return positions.expand_as(ids)
    cache = next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)
    past = int(cache.get_seq_length()) if cache is not None else 0
    return torch.arange(past, past + ids.shape[1], device=ids.device).expand_as(ids)


@contextmanager
def sample_experts(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Each token's k experts are drawn in proportion to the router's scores, one after the other without putting back.

    They are weighted as the family weights chosen experts (knowledge augmentation, arXiv 2502.12947). Where the
    family chooses by probabilities, or by sigmoids plus a bias, those are the scores; the bias counts for nothing.
    Groups that the family rules out for a token stay ruled out. Draws are a function of `seed`, layer, token id and
    position alone, as in `route`.

    Raises UserError for a dense or compiled model, and for families without a top-k over scores.
    """
    routers = _routers_of(model)
    problems = [f"{r.name}: experts cannot be drawn, {why}" for r in routers if (why := without_scores(r))]
    problems += [f"{r.name}: experts cannot be drawn by score" for r in routers if r.source != "experts"]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    tokens = _Tokens(routed_backbone(model, routers))
    with ExitStack() as undo:
        undo.enter_context(tokens.watched())
        for layer, router in enumerate(routers):
            undo.enter_context(drawn_choice(router, row_seed((seed, layer)), tokens.keys))
        yield


# ---------------------------------------------------------------------------------------- what they share


def _routers_of(model: nn.Module) -> list[Router]:
    routers = find_routers(model)
    if not routers:
        raise UserError("a dense model has no routing to change: leave it out, or give a mixture of experts")
    if is_compiled(model):
        raise UserError("compiled code would not see the change: load the model again without compiling it")
    if any(is_sparsemixer(router) and router.block.training for router in routers):
        raise UserError("this model samples its experts in train mode: call model.eval() first")
    return routers


def _call_problems(router: Router) -> list[str]:
    if router.source == "experts":
        return []
    return [
        f"{router.name}: {type(bare(router.block)).__name__} does not hand indices and weights to an experts "
        "module, so they cannot be replaced; use top-k or dropped experts with how=replace"
    ]


@contextmanager
def _rewritten(router: Router, change: Callable) -> Iterator[None]:
    """`experts` receives what `change(indices [N, k], weights [N, k])` returns."""

    def rewrite(_module, args, kwargs):
        given = dict(enumerate(args)) | kwargs
        tensors = [key for key, value in given.items() if isinstance(value, torch.Tensor)][1:]
        indices = next((key for key in tensors if not given[key].is_floating_point()), None)
        weights = next((key for key in tensors if given[key].is_floating_point()), None)
        if indices is None or weights is None:
            raise RunError(f"{router.name}: experts were called without indices and weights")
        given[indices], given[weights] = change(given[indices], given[weights])
        return tuple(given[n] for n in range(len(args))), {name: given[name] for name in kwargs}

    # First in line: a recording entered before this context must hear what the experts get.
    with Hooks() as hooks:
        hooks.before(router.experts, rewrite, named=True, first=True)
        yield
