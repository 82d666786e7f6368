"""What one router thinks of its experts: which score function it has, how certain it is. Summed as tokens pass.

The score function (softmax, sigmoid, ...) is not looked up by name: it is the one whose scores reproduce the
ratios of the weights that were used. A sample of each digest is enough for that verdict; entropy and confidence
are then taken over all tokens. If no function fits, or more than one, `verdict` raises RunError.

Shapes: N tokens of one digest, E experts (all that the router chooses among), k experts per token.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from distill.errors import RunError
from distill.routers import Router, bare
from distill.routing_load import largest

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
    "probabilities": lambda logits: logits.clamp(min=0),  # gemma4's router returns probabilities, not logits
}
_SAMPLE = 256  # tokens per digest that the score function is judged by,
_SETTLED = 16  # and digests after which a function without rivals is not judged again


class ScoreTotals:
    """Running totals of one layer's scores. `tokens` seen, of which `broken` had NaN for logits or weights."""

    def __init__(self, router: Router):
        self.router = router
        self.tokens = self.broken = self.digests = 0
        self.tolerance = 1e-3  # on the spread of log(weight / score)
        # Per candidate function: n, sum and sum of squares of log(weight / score), which give its verdict.
        self.fit = {rule: torch.zeros(3, dtype=torch.float64) for rule in SCORES}
        # And the two sums, of entropy and confidence, that count once it has been found to be the one.
        self.opinion = {rule: torch.zeros(2, dtype=torch.float64) for rule in SCORES}

    def add(self, logits: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> None:
        """One digest: [N, E], [N, k] as applied to the expert outputs, [N, k]; all on one device."""
        if not len(logits):
            return
        self.tokens += len(logits)
        if max(torch.finfo(x.dtype).eps for x in (logits, weights)) > 1e-4:
            self.tolerance = 2e-2  # half precision rounds weights to two or three digits
        logits, weights, indices = logits.float(), weights.float(), indices.long()
        if not (logits.sum() + weights.sum()).isfinite():  # cheap; a real infinity is not yet a NaN
            self.broken += int((logits.isnan().any(-1) | weights.isnan().any(-1)).sum())
        self.digests += 1
        if len(self.fit) > 1 or self.digests <= _SETTLED:
            self._judge(logits, weights, indices)
        self.opinion = {
            rule: self.opinion[rule] + _opinion(SCORES[rule](logits), indices).cpu() for rule in self.fit
        }

    def _judge(self, logits: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> None:
        sample = slice(None, None, -(-len(logits) // _SAMPLE))
        evidence = _evidence(
            self.router, list(self.fit), logits[sample].double(), weights[sample].double(), indices[sample]
        )
        self.fit = {rule: sums + evidence[rule].cpu() for rule, sums in self.fit.items()}
        spread = self._spread()
        # Candidates beyond this would cost time to the end and cannot win.
        limit = max(3 * min(spread.values()), self.tolerance)
        self.fit = {rule: sums for rule, sums in self.fit.items() if spread[rule] <= limit}

    def verdict(self) -> str:
        """Name of the function in SCORES whose scores reproduce the ratios of the weights that were used.

        Raises RunError for NaN, or if no function does, or more than one (equal logits; one expert per token
        with weight 1).
        """
        name = self.router.name
        if self.broken:
            raise RunError(
                f"{name}: router logits or weights are NaN for {self.broken} of {self.tokens} tokens; the "
                "weights are damaged, or overflow in this precision (try dtype fp32 or bf16)"
            )
        spread = self._spread()
        best, *others = sorted(spread, key=spread.get) or [None]
        rival = spread[others[0]] if others else math.inf
        if best is None or spread[best] > self.tolerance or rival < max(3 * spread[best], 1e-5):
            found = ", ".join(f"{rule} {value:.1e}" for rule, value in spread.items())
            raise RunError(
                f"{name}: cannot tell the score function of {type(self.router.block).__name__} "
                f"from {self.tokens} tokens (spread of log(weight / score): {found or 'none fits'}); "
                "the counts hold"
            )
        return best

    def means(self) -> dict[str, float]:
        """Mean router entropy (nats) and confidence over all tokens. RunError as in `verdict`."""
        entropy, confidence = (self.opinion[self.verdict()] / self.tokens).tolist()
        return {"router_entropy": entropy, "confidence": confidence}

    def reduce(self, total: Callable[[torch.Tensor], torch.Tensor], rank: int, world: int) -> None:
        """Make these the totals of all processes; a candidate that one of them has ruled out is out."""
        self.tokens, self.broken = total(torch.tensor([self.tokens, self.broken])).tolist()
        out = torch.full((5,), math.nan, dtype=torch.float64)
        table = [
            torch.cat([self.fit[rule], self.opinion[rule]]) if rule in self.fit else out for rule in SCORES
        ]
        rows = dict(zip(SCORES, total(torch.stack(table))))
        self.fit = {rule: row[:3] for rule, row in rows.items()}  # NaN: out, with an infinite spread
        self.opinion = {rule: row[3:] for rule, row in rows.items()}
        self.tolerance = largest(self.tolerance, total, rank, world)

    def _spread(self) -> dict[str, float]:
        """Standard deviation of log(weight / score) under each candidate; infinite where there is none."""
        spread = {}
        for rule, (n, sums, squares) in self.fit.items():
            variance = float(squares / n - (sums / n) ** 2) if n else math.nan
            spread[rule] = math.sqrt(max(variance, 0)) if math.isfinite(variance) else math.inf
        return spread


def _opinion(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Sums over tokens of `metrics.router_entropy` and `metrics.confidence`, in one float32 pass.

    H = ln S - sum_i s_i ln s_i / S with S = sum_i s_i, equal to the entropy of s / S: a third of the time at 64
    experts, and off by 1e-7 a token.
    """
    total = scores.sum(-1)
    entropy = total.log() - (scores * scores.clamp(min=1e-30).log()).sum(-1) / total
    confidence = scores.gather(-1, indices).sum(-1) / total
    return torch.stack([entropy, confidence]).sum(-1, dtype=torch.float64)


def _evidence(router: Router, rules: list[str], logits, weights, indices) -> dict[str, torch.Tensor]:
    """Per candidate: n, sum and sum of squares of log(weight / score)."""
    weights = _without_family_factor(router, logits, weights, indices)
    # Below 1e-4 of the largest, fp16 has no digits left; zaya gives a skipped token the weight 0.
    used = weights > 1e-4 * weights.amax(-1, keepdim=True)
    if router.top_k > 1:
        used &= (used.sum(-1) > 1)[:, None]
    sums = {}
    for rule in rules:
        scores = SCORES[rule](logits).clamp(min=1e-300)
        ratio = torch.where(used, weights.clamp(min=1e-300).log() - scores.gather(-1, indices).log(), 0.0)
        if router.top_k > 1:  # weights may be renormalised within a token, so only their ratios there count
            ratio -= ratio.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp(min=1)
        ratio = ratio[used]
        sums[rule] = torch.stack([used.sum(), ratio.sum(), ratio.square().sum()])
    return sums


def _without_family_factor(router: Router, logits, weights, indices) -> torch.Tensor:
    """The weights without what two families multiply in that is not a function of the chosen score alone."""
    inner = None if router.router is None else bare(router.router)
    if hasattr(inner, "per_expert_scale"):  # gemma4
        return weights / inner.per_expert_scale.detach().double()[indices]
    if is_sparsemixer(router):  # each choice is a softmax over its near rivals among those left
        factor, left = [], logits
        for choice in indices.T:
            top = left.amax(-1, keepdim=True)
            near = (top - logits) / logits.abs().clamp(min=top) <= 2 * inner.router_jitter_noise
            factor.append(left.masked_fill(~near, -math.inf).logsumexp(-1) - logits.logsumexp(-1))
            left = left.scatter(-1, choice[:, None], -math.inf)
        return weights * torch.stack(factor, -1).exp()
    return weights


def is_sparsemixer(router: Router) -> bool:
    """phimoe (arXiv 2409.12136)."""
    return router.router is not None and hasattr(bare(router.router), "router_jitter_noise")
