"""Where one router's tokens went, summed as they pass: counts, pairs of experts, and every forward pass on its own.

    load = LoadTotals(experts=8, experts_per_token=2)
    load.add(indices, sizes=[64, 64])        # [128, 2]: two forward passes of 64 tokens
    load.summary()                           # load, MaxVio global and per batch, entropy, drop, co-activation

Nothing here grows with the number of tokens. Over several processes the totals are summed first and ratios
formed after (`reduce`), because a mean of the ranks' MaxVio is not the MaxVio of all tokens.

Shapes: T tokens, E experts, k experts per token, B forward passes.
"""

from collections.abc import Callable
from typing import Any

import torch

from distill import routing_metrics as metrics

CAPACITY_FACTORS = (1.0, 1.25, 1.5, 2.0)
_FACTORS = torch.tensor(CAPACITY_FACTORS, dtype=torch.float64).view(-1, 1, 1)  # against counts [B, E]
FULL_MATRIX = 128  # experts up to which the whole co-activation matrix is reported
STRONGEST = 64  # pairs reported beyond that


class LoadTotals:
    """Running totals of one layer. `counts` [E]; `pairs` [E, E], tokens that reach both; `batches`, a number."""

    def __init__(self, experts: int, experts_per_token: int):
        self.experts, self.k = experts, experts_per_token
        self.tokens = self.batches = 0
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.pairs = torch.zeros(experts, experts, dtype=torch.int64)
        self.dropped = torch.zeros(
            len(CAPACITY_FACTORS), dtype=torch.int64
        )  # each pass with its own capacity
        self.violation = self.floor = self.worst = (
            0.0  # sums over passes of MaxVio and its floor, largest MaxVio
        )

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
        self.violation += float(violations.sum())
        self.worst = max(self.worst, float(violations.max()))
        self.floor += sum(metrics.max_violation_noise_floor(size, self.experts, self.k) for size in sizes)
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
        self.violation, self.floor = total(
            torch.tensor([self.violation, self.floor], dtype=torch.float64)
        ).tolist()
        self.worst = largest(self.worst, total, rank, world)

    def summary(self) -> dict[str, Any]:
        """Plain numbers; the definitions and their sources are those of `distill.routing_metrics`.

        max_violation is MaxVio_global, max_violation_batch_* MaxVio_batch over the B forward passes, each with
        what a uniform router would show on as many independent tokens. token_drop takes all T tokens as one
        batch, token_drop_batch gives every forward pass its own capacity: both are shares of the assignments.
        """
        counts, assignments = self.counts, self.tokens * self.k
        whole = {str(f): int(metrics.token_drop(counts, f)) / assignments for f in CAPACITY_FACTORS}
        matrix = metrics.coactivation(self.pairs, counts)
        return {
            "load": metrics.load_fraction(counts).tolist(),
            "max_violation": metrics.max_violation(counts),
            "max_violation_noise_floor": metrics.max_violation_noise_floor(self.tokens, self.experts, self.k),
            "batches": self.batches,
            "max_violation_batch_mean": self.violation / self.batches,
            "max_violation_batch_max": self.worst,
            "max_violation_batch_noise_floor": self.floor / self.batches,
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
                "strongest": metrics.strongest_pairs(self.pairs, counts, STRONGEST),
            },
        }


def largest(value: float, total: Callable[[torch.Tensor], torch.Tensor], rank: int, world: int) -> float:
    """The maximum over processes, by means of a sum: each writes into a slot of its own."""
    slots = torch.zeros(world, dtype=torch.float64)
    slots[rank] = value
    return float(total(slots).max())
