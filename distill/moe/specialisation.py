"""Which experts belong to one kind of token: shares per group with a guard against chance.

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

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch

from distill.config.evaluation import SEEN
from distill.moe.totals import FULL_MATRIX

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
