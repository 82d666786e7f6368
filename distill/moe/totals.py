"""What is summed of one router as its tokens pass, and which experts belong to one kind of token.

What is summed of one router as its tokens pass: where they went, and how certain the router was.

    load = LoadTotals(experts=8, experts_per_token=2)
    load.add(indices, sizes=[64, 64])        # [128, 2]: two forward passes of 64 tokens
    load.summary()                           # load, MaxVio global and per batch, entropy, drop, co-activation

`LoadTotals` counts tokens, pairs of experts, and every forward pass on its own. Nothing in it grows with the number
of tokens but a few numbers a digest. Over several processes the totals are summed first and ratios formed after
(`reduce`), because a mean of the ranks' MaxVio is not the MaxVio of all tokens. What is not a count is added exactly
(`ExactSum`), so that the result does not depend on who saw which tokens.

`ScoreTotals` finds which score function a router has (softmax, sigmoid, ...) and how certain it is. The function is
not looked up by name: it is the one whose scores reproduce the ratios of the weights that were used. A sample of each
digest is enough for that verdict; entropy and confidence are then taken over all tokens. If no function fits, or more
than one, `verdict` raises RunError.

Shapes: N tokens of one digest (T over all), E experts (all that the router chooses among), k experts per token,
B forward passes.

Which experts belong to one kind of token: shares per group with a guard against chance.

    table = GroupShares(experts=8, experts_per_token=2, groups=["addition", "sorting"])
    table.add(indices, labels, answers)                    # [N, k], [N] places in `groups`, [N] whose answer
    table.summary(overall, comparisons)                    # shares [G, E] and the deviations that hold

The measure is OLMoE's (arXiv 2409.02060, section 5.3; 5.4 with a token id as the group): of the tokens of group
D, the share N_(i,D) / N_D whose top k hold expert i. A router without preference gives k / E, and the shares of
one group sum to k.

The guard. Tokens of one answer are alike, so they are no independent draws, and a plain binomial interval would
find specialisation everywhere. The answer is the unit: with n_r of the N_r tokens of group D in answer r at
expert i, and share p, the variance is R / (R - 1) * sum_r (n_r - p N_r)^2 / N_D^2 (the cluster-robust variance
of a ratio; Cochran, Sampling Techniques, 1977, section 6.3), or the binomial one where that is larger. z is the
distance from k / E *or* from the layer's overall share, whichever is nearer, over that error: an expert that
everybody uses is an imbalance of the layer and not a specialist. A deviation is listed if |z| is beyond the
two-sided 5 % point divided by the number of comparisons (Bonferroni), with 10 answers and 10 tokens at least.
The error of the overall share itself is ignored, and with few answers the normal point is a little lenient.

Shapes: N tokens, E experts, k experts per token, G groups, R answers.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from distill.config.evaluation import SEEN
from distill.errors import RunError
from distill.models.routers import Router, bare
from distill.moe import metrics

CAPACITY_FACTORS = (1.0, 1.25, 1.5, 2.0)
_FACTORS = torch.tensor(CAPACITY_FACTORS, dtype=torch.float64).view(-1, 1, 1)  # against counts [B, E]
FULL_MATRIX = 128  # experts up to which the whole co-activation matrix is reported
PAIRS_REPORTED = 64  # pairs reported beyond that


class ExactSum:
    """Sums of columns [m], correctly rounded: the same in any order and over any number of processes.

    The rows are kept, one a digest, and added by `math.fsum`: a running float would owe its last bit to the order.
    """

    def __init__(self, columns: int):
        self.columns = columns
        self.rows: list[list[float]] = []

    def totals(self) -> list[float]:
        return [math.fsum(column) for column in zip(*self.rows)] or [0.0] * self.columns

    def reduce(self, total: Callable[[torch.Tensor], torch.Tensor], rank: int, world: int) -> None:
        """Gather the rows of all processes by means of a sum: each writes into slots of its own."""
        lengths = torch.zeros(world, dtype=torch.int64)
        lengths[rank] = len(self.rows)
        lengths = total(lengths).tolist()
        slots = torch.zeros(world, max(lengths), self.columns, dtype=torch.float64)
        if self.rows:
            slots[rank, : len(self.rows)] = torch.tensor(self.rows, dtype=torch.float64)
        self.rows = [row for slot, n in zip(total(slots).tolist(), lengths) for row in slot[:n]]


class LoadTotals:
    """Running totals of one layer. `counts` [E]; `pairs` [E, E], tokens that reach both; `batches`, a number."""

    def __init__(self, experts: int, experts_per_token: int):
        self.experts, self.k = experts, experts_per_token
        self.tokens = self.batches = 0
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.pairs = torch.zeros(experts, experts, dtype=torch.int64)
        # Each pass with its own capacity.
        self.dropped = torch.zeros(len(CAPACITY_FACTORS), dtype=torch.int64)
        self.sums = ExactSum(2)  # over passes, of MaxVio and its floor
        self.worst = 0.0  # the largest MaxVio

    def add(self, indices: torch.Tensor, sizes: list[int]) -> None:
        """indices [T, k] of B consecutive forward passes with `sizes[b]` tokens each, sum(sizes) == T."""
        sizes = [size for size in sizes if size]
        if not sizes:
            return
        indices = indices.long()
        batch = torch.repeat_interleave(torch.tensor(sizes)).to(indices.device)
        keys = (batch[:, None] * self.experts + indices).flatten()
        per_batch = torch.bincount(keys, minlength=len(sizes) * self.experts).view(-1, self.experts).cpu()
        self.tokens += len(indices)
        self.batches += len(sizes)
        # Not in place: what was made in inference mode may be added to outside of it.
        self.counts = self.counts + per_batch.sum(0)
        if self.k > 1:
            self.pairs = self.pairs + metrics.pair_counts(indices, self.experts).cpu()
        violations = metrics.max_violation_per_batch(per_batch)
        self.worst = max(self.worst, float(violations.max()))
        floor = sum(metrics.max_violation_noise_floor(size, self.experts, self.k) for size in sizes)
        self.sums.rows.append([float(violations.sum()), floor])
        self.dropped = self.dropped + metrics.token_drop(per_batch, _FACTORS).sum(-1)

    def reduce(self, total: Callable[[torch.Tensor], torch.Tensor], rank: int, world: int) -> None:
        """Make these the totals of all processes. `total` sums a CPU tensor over them."""
        whole = torch.cat(
            [torch.tensor([self.tokens, self.batches]), self.counts, self.dropped, self.pairs.flatten()]
        )
        whole = total(whole)
        self.tokens, self.batches = whole[:2].tolist()
        self.counts, self.dropped, pairs = whole[2:].split(
            [self.experts, len(self.dropped), self.pairs.numel()]
        )
        self.pairs = pairs.view(self.experts, self.experts)
        self.sums.reduce(total, rank, world)
        self.worst = largest(self.worst, total, rank, world)

    def summary(self) -> dict[str, Any]:
        """Plain numbers; the definitions and their sources are those of `distill.moe.metrics`.

        max_violation is MaxVio_global, max_violation_batch_* MaxVio_batch over the B forward passes, each with
        what a uniform router would show on as many independent tokens. token_drop takes all T tokens as one
        batch, token_drop_batch gives every forward pass its own capacity: both are shares of the assignments.
        """
        counts, assignments = self.counts, self.tokens * self.k
        whole = {str(f): int(metrics.token_drop(counts, f)) / assignments for f in CAPACITY_FACTORS}
        matrix = metrics.coactivation(self.pairs, counts)
        violation, floor = self.sums.totals()
        return {
            "load": metrics.load_fraction(counts).tolist(),
            "max_violation": metrics.max_violation(counts),
            "max_violation_noise_floor": metrics.max_violation_noise_floor(self.tokens, self.experts, self.k),
            "batches": self.batches,
            "max_violation_batch_mean": violation / self.batches,
            "max_violation_batch_max": self.worst,
            "max_violation_batch_noise_floor": floor / self.batches,
            "load_entropy": metrics.load_entropy(counts),
            "load_entropy_normalised": metrics.load_entropy(counts, normalised=True),
            "effective_experts": metrics.effective_experts(counts),
            "load_cv": metrics.coefficient_of_variation(counts),
            "dead_experts": metrics.dead_experts(counts),
            "token_drop": whole,
            "token_drop_batch": {
                str(f): int(n) / assignments for f, n in zip(CAPACITY_FACTORS, self.dropped)
            },
            "coactivation": {
                "uniform": (self.k - 1) / (self.experts - 1) if self.experts > 1 else 0.0,
                "matrix": matrix.round(decimals=4).tolist() if self.experts <= FULL_MATRIX else None,
                "strongest": metrics.strongest_pairs(self.pairs, counts, PAIRS_REPORTED),
            },
        }


def largest(value: float, total: Callable[[torch.Tensor], torch.Tensor], rank: int, world: int) -> float:
    """The maximum over processes, by means of a sum: each writes into a slot of its own."""
    slots = torch.zeros(world, dtype=torch.float64)
    slots[rank] = value
    return float(total(slots).max())


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
        self.eps = 0.0  # of the coarsest number format that was seen
        # Per candidate function: n, sum and sum of squares of log(weight / score), which give its verdict.
        self.fit = {rule: torch.zeros(3, dtype=torch.float64) for rule in SCORES}
        # And the two sums each, of entropy and confidence, that count once it has been found to be the one.
        self.opinion = ExactSum(2 * len(SCORES))

    def add(self, logits: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> None:
        """One digest: [N, E], [N, k] as applied to the expert outputs, [N, k]; all on one device."""
        if not len(logits):
            return
        self.tokens += len(logits)
        self.eps = max(self.eps, *(torch.finfo(x.dtype).eps for x in (logits, weights)))
        if self.eps > 1e-4:
            self.tolerance = 2e-2  # half precision rounds weights to two or three digits
        logits, weights, indices = logits.float(), weights.float(), indices.long()
        if not (logits.sum() + weights.sum()).isfinite():  # cheap; a real infinity is not yet a NaN
            self.broken += int((logits.isnan().any(-1) | weights.isnan().any(-1)).sum())
        self.digests += 1
        if len(self.fit) > 1 or self.digests <= _SETTLED:
            self._judge(logits, weights, indices)
        none = logits.new_zeros(2, dtype=torch.float64)
        opinions = [_opinion(SCORES[r](logits), indices) if r in self.fit else none for r in SCORES]
        self.opinion.rows.append(torch.cat(opinions).tolist())

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
        apart = 3.0
        floor = max(1e-5, self.eps / 3)  # rounding alone can be so much: a rival must be off by more
        if best and spread[best] <= self.eps / 2:
            # Off by rounding alone. What a rival is off besides is certain with ratios enough: a spread of n of them is
            # known to about 1 / sqrt(2 n) of itself.
            apart = min(apart, max(1.25, 1 + 10 / math.sqrt(float(self.fit[best][0]))))
        if best is None or spread[best] > self.tolerance or rival < max(apart * spread[best], floor):
            found = ", ".join(f"{rule} {value:.1e}" for rule, value in spread.items())
            raise RunError(
                f"{name}: cannot tell the score function of {type(self.router.block).__name__} "
                f"from {self.tokens} tokens (spread of log(weight / score): {found or 'none fits'}); "
                "the counts hold"
            )
        return best

    def means(self) -> dict[str, float]:
        """Mean router entropy (nats) and confidence over all tokens. RunError as in `verdict`."""
        place = 2 * list(SCORES).index(self.verdict())
        entropy, confidence = self.opinion.totals()[place : place + 2]
        return {"router_entropy": entropy / self.tokens, "confidence": confidence / self.tokens}

    def reduce(self, total: Callable[[torch.Tensor], torch.Tensor], rank: int, world: int) -> None:
        """Make these the totals of all processes; a candidate that one of them has ruled out is out."""
        self.tokens, self.broken = total(torch.tensor([self.tokens, self.broken])).tolist()
        out = torch.full((3,), math.nan, dtype=torch.float64)
        table = torch.stack([self.fit.get(rule, out) for rule in SCORES])
        self.fit = dict(zip(SCORES, total(table)))  # NaN: out, with an infinite spread
        self.opinion.reduce(total, rank, world)
        self.tolerance, self.eps = (largest(x, total, rank, world) for x in (self.tolerance, self.eps))

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


# ==== Which experts belong to one kind of token ====

FALSE_ENTRY_RATE = (
    0.05  # chance of any false entry in one table of one layer or, with `comparisons`, in all of them
)
ENTRIES_PER_TABLE = 12  # entries per table
PER_EXPERT = 5  # groups listed per expert in `preferred`
EXPERTS = 64  # experts listed in `preferred`, the most loaded


class GroupShares:
    """Running totals of one layer and one labelling; nothing grows with N. `tokens` [G], `reached` [G, E]."""

    def __init__(self, experts: int, experts_per_token: int, groups: list):
        self.experts, self.k, self.groups = experts, experts_per_token, list(groups)
        size = (len(self.groups), experts)
        self.tokens, self.tokens_squared, self.answers = torch.zeros(3, len(self.groups), dtype=torch.float64)
        self.reached, self.squared, self.crossed = (torch.zeros(size, dtype=torch.float64) for _ in range(3))

    def add(self, indices: torch.Tensor, labels: torch.Tensor, answers: torch.Tensor) -> None:
        """indices [N, k]; labels [N], places in `groups`, -1 for none; answers [N], all tokens of one at once."""
        known = labels >= 0
        indices, labels, answers = indices[known], labels[known], answers[known]
        if not len(labels):
            return
        cells, cell = torch.unique(answers * len(self.groups) + labels, return_inverse=True)
        keys = (cell[:, None] * self.experts + indices).flatten()
        reached = torch.bincount(keys, minlength=len(cells) * self.experts).view(-1, self.experts).double()
        tokens, group = torch.bincount(cell, minlength=len(cells)).double(), cells % len(self.groups)
        self.answers += torch.bincount(group, minlength=len(self.groups))
        self.tokens.index_add_(0, group, tokens)
        self.tokens_squared.index_add_(0, group, tokens**2)
        self.reached.index_add_(0, group, reached)
        self.squared.index_add_(0, group, reached**2)
        self.crossed.index_add_(0, group, reached * tokens[:, None])

    def reduce(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Make these the totals of all processes, each of which saw answers of its own. Whole numbers: exact."""
        for name in ("tokens", "tokens_squared", "answers", "reached", "squared", "crossed"):
            setattr(self, name, total(getattr(self, name)))

    def shares(self) -> torch.Tensor:
        """[G, E], N_(i,D) / N_D; rows of empty groups are 0."""
        return self.reached / self.tokens.clamp(min=1)[:, None]

    def deviations(self, overall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(distance [G, E] from k / E or from `overall` [E], the nearer, 0 between the two; its z [G, E])."""
        p, uniform = self.shares(), self.k / self.experts
        nulls = torch.stack([torch.full_like(p, uniform), overall.double().expand_as(p)])
        away = p - nulls
        nearer = away.abs().argmin(0, keepdim=True)
        distance, null = away.gather(0, nearer)[0], nulls.gather(0, nearer)[0]
        distance = torch.where(away[0] * away[1] > 0, distance, 0.0)
        n, r = self.tokens.clamp(min=1)[:, None], self.answers[:, None]
        spread = self.squared - 2 * p * self.crossed + p**2 * self.tokens_squared[:, None]
        robust = r / (r - 1).clamp(min=1) * spread.clamp(min=0) / n**2
        error = torch.maximum(robust, null * (1 - null) / n).sqrt()
        told = (self.answers >= SEEN) & (self.tokens >= SEEN)
        return distance, torch.where(told[:, None] & (error > 0), distance / error, 0.0)

    def summary(self, overall: torch.Tensor, comparisons: int | None = None) -> dict[str, Any]:
        """overall [E]: the layer's share of tokens per expert. comparisons: tests made in all, G * E if None.

        share is None beyond FULL_MATRIX experts; `strongest` has the largest distances that the guard lets pass.
        """
        distance, z = self.deviations(overall)
        limit = critical(comparisons or z.numel())
        shares = self.shares()
        held = torch.where(z.abs() > limit, distance.abs(), 0.0).flatten()
        places = [
            place for place in held.argsort(descending=True, stable=True)[:ENTRIES_PER_TABLE] if held[place]
        ]
        return {
            "groups": self.groups,
            "tokens": self.tokens.long().tolist(),
            "answers": self.answers.long().tolist(),
            "baseline": self.k / self.experts,
            "share": shares.round(decimals=4).tolist() if self.experts <= FULL_MATRIX else None,
            "critical_z": limit,
            "strongest": [
                {
                    "group": self.groups[g],
                    "expert": e,
                    "share": float(shares[g, e]),
                    "overall": float(overall[e]),
                    "z": float(z[g, e]),
                }
                for g, e in (divmod(int(place), self.experts) for place in places)
            ],
        }

    def preferred(self, overall: torch.Tensor, comparisons: int | None = None) -> list[dict[str, Any]]:
        """For each expert the groups it gets most of, above both baselines by the guard: expert, group, share, n, z."""
        distance, z = self.deviations(overall)
        held = torch.where((z > critical(comparisons or z.numel())) & (distance > 0), self.shares(), 0.0)
        found = []
        for expert in sorted(overall.argsort(descending=True, stable=True)[:EXPERTS].tolist()):
            column = held[:, expert]
            for g in column.argsort(descending=True, stable=True)[:PER_EXPERT].tolist():
                if column[g]:
                    share, n = float(column[g]), int(self.tokens[g])
                    entry = {"expert": expert, "group": self.groups[g], "share": share, "n": n}
                    found.append({**entry, "z": float(z[g, expert])})
        return found


def critical(comparisons: int) -> float:
    """|z| beyond which an entry counts, if so many are looked at (Bonferroni, two-sided, LEVEL in all)."""
    return NormalDist().inv_cdf(1 - FALSE_ENTRY_RATE / (2 * max(comparisons, 1)))
