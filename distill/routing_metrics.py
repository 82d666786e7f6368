"""Metrics of mixture-of-experts routing: pure functions on counts and decisions, no model in sight.

What: load balance (does every expert work?), router certainty (does the router have an opinion?), and
structure (which experts fire together, which belong to one kind of text). `distill.routing` records the
inputs and calls these; they serve as well on counts from any other source, or on counts summed over ranks
(sum the counts first, form the ratios after).

Shapes: T tokens, E experts, k experts per token, G groups. `counts` is [E]: how many times each expert was
chosen, so `counts.sum() == T * k`. All functions compute in float64.
"""

import math

import torch


def _counts(counts: torch.Tensor) -> torch.Tensor:
    counts = torch.as_tensor(counts).double()
    if counts.ndim != 1 or counts.numel() == 0 or (counts < 0).any() or counts.sum() <= 0:
        raise ValueError("counts must be one non-negative number per expert, not all zero")
    return counts


def load_fraction(counts: torch.Tensor) -> torch.Tensor:
    """[E] -> [E], share of all assignments that each expert got, f_i = c_i / sum c. Uniform is 1/E.

    OLMoE (arXiv 2409.02060, section 5) plots k * f_i, the share of *tokens* that reach expert i.
    """
    counts = _counts(counts)
    return counts / counts.sum()


def max_violation(counts: torch.Tensor) -> float:
    """MaxVio = (max_i c_i - mean c) / mean c, from 0 (even) to E/k - 1 (all tokens to the same k experts).

    Auxiliary-loss-free load balancing (arXiv 2408.15664, Eq. 4): its MaxVio_global, over all tokens counted.
    """
    counts = _counts(counts)
    return float(counts.max() / counts.mean() - 1)


def max_violation_noise_floor(tokens: int, experts: int, experts_per_token: int) -> float:
    """Expected MaxVio of a perfectly uniform router on this many tokens: what the sample alone would give.

    Analytic, no simulation. Each count is exactly Binomial(T, k/E); E[max] = sum_x 1 - F(x)^E is that of E
    independent copies, and its distance to the mean is stretched by sqrt(E/(E-1)), which is what the
    constraint sum c = T*k does to exchangeable counts. Within 5 % of simulation from 10 tokens on.
    """
    if not (tokens > 0 and 0 < experts_per_token <= experts):
        raise ValueError("need tokens > 0 and 0 < experts_per_token <= experts")
    if experts_per_token == experts:
        return 0.0
    p = experts_per_token / experts
    mean, sigma = tokens * p, math.sqrt(tokens * p * (1 - p))
    # 12 sigma and 60 counts on both sides: all the mass that float64 can see, also where T*k/E is tiny.
    low, high = max(0, int(mean - 12 * sigma - 60)), min(tokens, int(mean + 12 * sigma + 60))
    x = torch.arange(low, high + 1, dtype=torch.float64)
    log_pmf = math.lgamma(tokens + 1) - torch.lgamma(x + 1) - torch.lgamma(tokens - x + 1)
    cdf = (log_pmf + x * math.log(p) + (tokens - x) * math.log1p(-p)).exp().cumsum(0).clamp(max=1)
    expected_max = low + float((1 - cdf**experts).sum())
    return (expected_max - mean) * math.sqrt(experts / (experts - 1)) / mean


def load_entropy(counts: torch.Tensor, *, normalised: bool = False) -> float:
    """Entropy of the load, H = -sum f ln f, in nats: ln E when even, ln k when collapsed on k experts.

    `normalised` divides by ln E (1 is even). Shannon's entropy of the load; a convention, no single paper.
    """
    load = load_fraction(counts)
    if normalised and load.numel() == 1:
        return 1.0
    return float(torch.special.entr(load).sum()) / (math.log(load.numel()) if normalised else 1.0)


def effective_experts(counts: torch.Tensor) -> float:
    """exp(load entropy), from 1 to E: how many evenly used experts have this entropy (its perplexity)."""
    return math.exp(load_entropy(counts))


def coefficient_of_variation(counts: torch.Tensor) -> float:
    """std(c) / mean(c), population standard deviation; 0 is even.

    Its square is the balance loss of the sparsely-gated layer (Shazeer et al., arXiv 1701.06538, section 4).
    """
    counts = _counts(counts)
    return float(counts.std(correction=0) / counts.mean())


def dead_experts(counts: torch.Tensor) -> int:
    """Experts never chosen. Read it with the token count: if T*k is near E, an even router has some too."""
    return int((_counts(counts) == 0).sum())


def router_entropy(scores: torch.Tensor) -> torch.Tensor:
    """[T, E] -> [T], entropy in nats of each token's distribution over experts; ln E if indifferent.

    Rows are scaled to sum 1: softmax scores stay, sigmoid scores become s / sum s, the share that DeepSeek-V3
    balances (arXiv 2412.19437, Eq. 19). Scores with a selection bias are not a distribution: pass none.
    """
    p = scores.double()
    return torch.special.entr(p / p.sum(-1, keepdim=True)).sum(-1)


def confidence(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[T, E], [T, k] -> [T], share of a token's scores that its chosen experts hold; k/E if indifferent.

    Taken before renormalisation: the weights as applied sum to a constant in most families and tell nothing.
    """
    p = scores.double()
    return p.gather(-1, indices).sum(-1) / p.sum(-1)


def coactivation(indices: torch.Tensor, experts: int) -> torch.Tensor:
    """[T, k] -> [E, E], C_ij = N_ij / N_i: of the tokens that reach expert i, the share that reaches j too.

    Over all pairs of a token's (distinct) experts, not only neighbours in rank: rows sum to k - 1. The
    diagonal and the rows of dead experts are 0. OLMoE (arXiv 2409.02060, section 5.2).
    """
    pairs = torch.zeros(experts * experts, dtype=torch.int64)
    for part in indices.long().cpu().split(65536):
        pairs += torch.bincount(
            (part[:, :, None] * experts + part[:, None, :]).flatten(), minlength=len(pairs)
        )
    pairs = pairs.view(experts, experts)
    times = pairs.diagonal().clone()
    return pairs.fill_diagonal_(0).double() / times.clamp(min=1)[:, None]


def specialisation(indices: torch.Tensor, groups: torch.Tensor, experts: int, n_groups: int) -> torch.Tensor:
    """[T, k], [T] -> [G, E], share of each group's tokens that reach each expert; uniform is k/E.

    Rows sum to k; those of empty groups are 0. With the domain of each token as its group this is the domain
    specialisation of OLMoE (arXiv 2409.02060, section 5.3), with its id the vocabulary specialisation (5.4).
    """
    indices, groups = indices.long().cpu(), groups.long().cpu()
    if len(indices) != len(groups):
        raise ValueError(f"{len(indices)} routed tokens but {len(groups)} group labels")
    reached = torch.bincount((groups[:, None] * experts + indices).flatten(), minlength=n_groups * experts)
    members = torch.bincount(groups, minlength=n_groups)
    return reached.view(n_groups, experts).double() / members.clamp(min=1)[:, None]
