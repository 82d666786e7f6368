"""Routers in training: use all experts evenly, by a loss or by a bias, and route as the teacher does.

Losses on the routers of a mixture-of-experts student: use all experts evenly, route as the teacher does.

    tap = RouterTap(student)                                   # UserError for a dense model
    logits = model(...); layers = tap.take(batch.attention_mask)
    balance = over_layers(sequence_balance, layers, batch.attention_mask)               # [B]
    loss = per_kept_token(balance, batch.keep)                                          # [N]
    like = router_distillation(mine.logits[keep], theirs.logits[keep], temperature=1.0)                 # [N]

Balance is formed layer by layer and then summed, never pooled: two layers that each use one expert, each
another, look even when their counts are added up (`load_balancing_loss_func` of transformers gives them its
best value).

The value of one layer is 1 where every expert is chosen equally often, and where the router is indifferent;
it is E / k where k experts get everything. 1 is not the minimum: counts and shares that disagree can fall
below it. So over L layers perfect balance is L. Counts have no gradient; it flows through the shares, from
the live logits.

Shapes: B sequences, T time, N kept tokens, E experts (all that the router chooses among), k experts a token.

Expert balancing without an auxiliary loss: the selection bias of DeepSeek-V3, updated by hand.

transformers keeps the bias (`e_score_correction_bias`) as a buffer and never changes it. DeepSeek-V3
(arXiv 2412.19437, section 2.1.2; Wang et al. 2024, arXiv 2408.15664) moves it after every step by a fixed
u: up for experts below the mean load, down for those above, counted over the whole global batch. The
bias only selects experts; the mixing weights do not see it, so no gradient is disturbed.

    balancer = ExpertBiasBalancer(model)      # hooks count tokens per expert
    balancer.mask = attention_mask            # before each forward: padding is not load
    balancer.update(u=0.001, reduce=accelerator.reduce)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import RunError, UserError
from distill.models.hooks import Hooks, Tap
from distill.models.layers import decoder_layers
from distill.models.routers import find_routers, listen
from distill.moe.totals import SCORES, ScoreTotals

_SAMPLE = 1024  # tokens that a layer's score function is told from

# ------------------------------------------------------------------------------------------------ balance


def sequence_balance(scores: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
    """sum_i f_i P_i of each sequence, for one layer. scores [B, T, E], indices [B, T, k], mask [B, T] -> [B].

    f_i = E / (k T) times how often expert i was chosen, P_i the mean over the sequence's T real tokens of the
    scores scaled to sum 1 per token; a sequence without a real token costs 0. Scores are those after the
    score function (softmax, sigmoid), before any selection bias. Perfect balance is 1, one collapsed set of
    experts E / k. Each value depends on its own sequence only, so splitting a batch changes nothing. No
    direction, no temperature, no T^2. Source: the complementary sequence-wise loss of DeepSeek-V3 (arXiv
    2412.19437, equations 17 to 20), without its factor alpha (0.0001 there); f counts the choices that were
    made, which the bias has a part in, where equation 18 prints the top k of the scores alone.
    """
    _check_layer(scores, indices, mask)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    real = mask.to(wide)
    tokens = real.sum(1, keepdim=True).clamp(min=1)
    chosen = torch.zeros(scores.shape, dtype=wide, device=scores.device)
    chosen.scatter_add_(2, indices.long(), real.unsqueeze(-1).expand(indices.shape))
    experts, k = scores.shape[-1], indices.shape[-1]
    loads = chosen.sum(1) * (experts / (k * tokens))
    scores = scores.to(wide)
    shares = scores / scores.sum(-1, keepdim=True)
    # Where the mask is 0 a share may be anything, NaN too.
    means = torch.where(mask.bool().unsqueeze(-1), shares, 0.0).sum(1) / tokens
    return (loads * means).sum(-1)


def batch_balance(scores: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
    """The same sum over all real tokens of a batch as if they were one sequence -> [B], all equal.

    scores [B, T, E], indices [B, T, k], mask [B, T]. Perfect balance is 1 (k in transformers, which does not
    divide by k). It allows sequences to specialise. In training the batch is the whole optimizer step, over
    micro-batches and processes (`balance_part`; arXiv 2501.11873, section 3, where a small batch is shown to
    hinder specialisation), so it does not matter how the step is split. No direction, no temperature, no T^2.
    Source: Switch Transformers (arXiv 2101.03961, equations 4 to 6) without its factor alpha, for k choices
    instead of one.
    """
    chosen, tokens = chosen_experts(scores, indices, mask), mask.sum()
    return balance_part(scores, indices, mask, chosen, tokens).expand(scores.shape[0])


def chosen_experts(scores: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
    """How often the real tokens of mask [B, T] chose each of the E experts, [E] float64; arguments as above."""
    _check_layer(scores, indices, mask)
    real = mask.reshape(-1, 1).double().expand(-1, indices.shape[-1])
    counts = torch.zeros(scores.shape[-1], dtype=torch.float64, device=scores.device)
    return counts.scatter_add_(0, indices.long().flatten(), real.flatten())


def balance_part(scores: Tensor, indices: Tensor, mask: Tensor, chosen: Tensor, tokens: Tensor) -> Tensor:
    """What these tokens add to `batch_balance` of a larger batch, where experts were `chosen` [E] by `tokens` -> [].

    The sum over all parts of the larger batch is its value, and so are the gradients: counts have none, and the mean
    shares are a sum over tokens.
    """
    _check_layer(scores, indices, mask)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    experts, k = scores.shape[-1], indices.shape[-1]
    scores = scores.to(wide)
    shares = scores / scores.sum(-1, keepdim=True)
    # Where the mask is 0 a share may be anything, NaN too.
    sums = torch.where(mask.bool().unsqueeze(-1), shares, 0.0).sum((0, 1))
    tokens = torch.as_tensor(tokens, device=scores.device).to(wide).clamp(min=1)
    return (chosen.to(wide) * (experts / (k * tokens)) * sums / tokens).sum()


def _check_layer(scores: Tensor, indices: Tensor, mask: Tensor) -> None:
    if scores.dim() != 3 or indices.shape[:2] != scores.shape[:2] or mask.shape != scores.shape[:2]:
        raise UserError(
            "balance needs scores [B, T, E], indices [B, T, k] and mask [B, T], not "
            f"{list(scores.shape)}, {list(indices.shape)} and {list(mask.shape)}"
        )


def per_kept_token(values: Tensor, keep: Tensor, places: Tensor | None = None) -> Tensor:
    """Each sequence's value at each of its kept tokens: values [B], keep [B, T] bool -> [N], row-major.

    places: `keep` as numbers [N], where they are known (`Batch.places`).

    Summed over a step and divided by its kept tokens this is the mean over sequences weighted by their kept
    tokens, however the step is split into micro-batches.
    """
    return values.repeat_interleave(keep.sum(1)) if places is None else values[places // keep.shape[1]]


# ------------------------------------------------------------------------------------- the teacher's routing

# log g(z / temperature) up to a constant: the distribution over experts is its softmax.
_LOG_SCORES = {
    "softmax": lambda z, temperature: z / temperature,
    "sigmoid": lambda z, temperature: F.logsigmoid(z / temperature),
    "sqrtsoftplus": lambda z, temperature: F.softplus(z / temperature).clamp(min=1e-30).log() / 2,
    "probabilities": lambda z, temperature: z.clamp(min=1e-30).log() / temperature,
}


def router_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    student_score: str = "softmax",
    teacher_score: str = "softmax",
) -> Tensor:
    """KL(teacher || student) between distributions over experts, in nats. Both logits [N, E] -> [N].

    A distribution is the router's own scores of logits / temperature, scaled to sum 1 per token: "softmax",
    "sigmoid" (the normalised affinities of DeepSeek-V3, arXiv 2412.19437, equation 19), "sqrtsoftplus", or
    "probabilities" (a router that returns them; tempered as a power). Selection biases are left out: they
    move choices, not scores. No T^2. All E experts count, there is no tail. Experts are matched by number, so
    this is for a student whose experts descend from the teacher's. Source: forward KL of Hinton et al. 2015
    (arXiv 1503.02531) on routers, a convention.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise UserError(
            "router distillation needs logits [kept tokens, experts] of as many experts, not "
            f"{list(student_logits.shape)} (student) and {list(teacher_logits.shape)} (teacher)"
        )
    for name in (student_score, teacher_score):
        if name not in _LOG_SCORES:
            raise UserError(f"router scores are one of {', '.join(_LOG_SCORES)}, not {name!r}")
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, not {temperature}")
    wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    p = _LOG_SCORES[teacher_score](teacher_logits.detach().to(wide), temperature).log_softmax(-1)
    q = _LOG_SCORES[student_score](student_logits.to(wide), temperature).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# -------------------------------------------------------------------------------------------- hearing them


@dataclass(frozen=True)
class RoutedLayer:
    """One router in one forward pass: live logits [B, T, E], decisions [B, T, k], its score function."""

    name: str
    score: str
    logits: Tensor
    indices: Tensor

    @property
    def scores(self) -> Tensor:
        """[B, T, E], after the score function and before any bias, mask or renormalisation; with gradient."""
        wide = torch.float64 if self.logits.dtype == torch.float64 else torch.float32
        return SCORES[self.score](self.logits.to(wide))


def over_layers(
    balance: Callable[[Tensor, Tensor, Tensor], Tensor], layers: Sequence[RoutedLayer], mask: Tensor
) -> Tensor:
    """Sum over layers of `balance(scores, indices, mask)` -> [B]; len(layers) at perfect balance."""
    return torch.stack([balance(layer.scores, layer.indices, mask) for layer in layers]).sum(0)


class RouterTap(Tap):
    """The routers' logits, with gradient, and their decisions in the last forward pass of a MoE model.

    Any family whose router `distill.models.routers` can hear, under PEFT and DDP, and under non-re-entrant gradient
    checkpointing without counting twice. A layer's score function is the one that reproduces the weights
    used, found at the first `take` (`distill.moe.totals`); `score` names it where it cannot be told, as
    for one expert per token with weight 1, or for a router that samples in train mode (phimoe: "softmax").
    """

    def __init__(self, model: nn.Module, score: str | None = None):
        """Raises UserError for a dense model, and for a `score` that does not exist."""
        routers = find_routers(model)
        if not routers:
            raise UserError(
                "a router objective needs a mixture-of-experts model, and this one is dense: remove it"
            )
        if score is not None and score not in SCORES:
            raise UserError(f"router scores are one of {', '.join(SCORES)}, not {score!r}")
        super().__init__(decoder_layers(model)[0])
        self._routers = {router.name: router for router in routers}
        self._scores = dict.fromkeys(self._routers, score)
        for router in routers:
            listen(router, self.hooks, lambda: self.gate.running, self._listener(router.name))

    def _listener(self, name: str) -> Callable:
        def emit(logits: Tensor, weights: Tensor, indices: Tensor) -> None:
            if self.heard_already(name):
                raise RunError(f"{name} was routed twice in one forward pass; this model cannot be balanced")
            self.hear(name, (logits, weights.detach(), indices.detach()), f"router {name}")

        return emit

    def take(self, mask: Tensor) -> list[RoutedLayer]:
        """The layers of the last pass over a batch of mask [B, T], in module order; then lets go of them.

        Raises RunError where there was no pass since the last call, where a router's tokens are not the
        batch's, and where a score function cannot be told.
        """
        heard, layers = self.take_heard(), []
        for name in self._routers:
            logits, weights, indices = heard(name, f"router {name}")
            if len(indices) != mask.numel() or len(logits) != mask.numel():
                raise RunError(
                    f"{name} routed {len(indices)} tokens of a batch of {list(mask.shape)}; it cannot be "
                    "told which is which"
                )
            self._scores[name] = self._scores[name] or self._score_of(name, logits, weights, indices)
            shape = (*mask.shape, -1)
            layers.append(
                RoutedLayer(name, self._scores[name], logits.reshape(shape), indices.reshape(shape))
            )
        return layers

    def _score_of(self, name: str, logits: Tensor, weights: Tensor, indices: Tensor) -> str:
        totals = ScoreTotals(self._routers[name])
        totals.add(*(x[:_SAMPLE].detach().cpu() for x in (logits, weights, indices)))
        try:
            return totals.verdict()
        except RunError as error:
            known = ", ".join(SCORES)
            raise RunError(*error.problems, f"name it: RouterTap(model, score=...), one of {known}") from None


# ==== Expert balancing without an auxiliary loss ====


class ExpertBiasBalancer:
    """Counts assignments per expert during forwards, then nudges each router's bias once per step."""

    def __init__(self, model: nn.Module):
        """Raises UserError for a model none of whose routers has a selection bias."""
        self.routers = [r for r in find_routers(model) if r.bias is not None and r.experts is not None]
        if not self.routers:
            raise UserError(
                "train.expert_bias_step needs a MoE model whose routers have a selection bias; set it to 0"
            )
        self.mask: torch.Tensor | None = None
        self.counts = [
            torch.zeros(r.num_experts, dtype=torch.int64, device=r.bias.device) for r in self.routers
        ]
        self.hooks = Hooks()
        for layer, router in enumerate(self.routers):
            self.hooks.before(router.experts, self._counter(layer))

    def _counter(self, layer: int) -> Callable:
        def count(module, args):
            if not module.training:  # a look at held-out rows: not this step's tokens, nor its mask
                return
            # Experts are called with (hidden [N, d], indices [N, k], weights [N, k]), N = B * T flattened.
            # Recomputation under gradient checkpointing counts every expert twice: no sign changes.
            indices = args[1].long()
            real = torch.ones_like(indices[:, 0]) if self.mask is None else self.mask.reshape(-1).long()
            # Not `bincount` of the real ones: the host would wait for how many they are.
            self.counts[layer].scatter_add_(0, indices.reshape(-1), real.repeat_interleave(indices.shape[1]))

        return count

    def forget(self) -> None:
        """Drop what was counted since the last update: the step starts over."""
        for counts in self.counts:
            counts.zero_()

    @torch.no_grad()
    def update(self, u: float, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> torch.Tensor:
        """bias += u * sign(mean load - load) per layer, loads summed over processes by `reduce`.

        Returns the step's largest MaxVio, (max load - mean) / mean (arXiv 2408.15664 eq. 4), as a number that is still
        on the device. u = 0 only counts.
        """
        found = []
        for layer, router in enumerate(self.routers):
            load = reduce(self.counts[layer]).double()
            mean = load.mean()
            router.bias.add_((u * torch.sign(mean - load)).to(router.bias.dtype))
            found.append((load.max() - mean) / mean.clamp(min=1e-9))
            self.counts[layer].zero_()
        return torch.stack(found).max()
