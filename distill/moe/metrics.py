"""Metrics of mixture-of-experts routing: pure functions on counts and decisions, no model in sight.

What: load balance (does every expert work?), router certainty (does the router have an opinion?), and
structure (which experts fire together, which belong to one kind of text). `distill.moe.recording` records the
inputs and calls these; they serve as well on counts from any other source, or on counts summed over ranks
(sum the counts first, form the ratios after).

Shapes: T tokens, E experts, k experts per token, G groups, B batches. `counts` is [E]: how many times each
expert was chosen, so `counts.sum() == T * k`. All functions compute in float64.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

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


def max_violation_per_batch(counts: torch.Tensor) -> torch.Tensor:
    """[B, E] -> [B], MaxVio of each batch alone: MaxVio_batch of arXiv 2408.15664, section 4.1.

    A layer can be even over a data set and uneven in every batch (experts taking turns by topic); the reverse
    cannot happen. Small batches are uneven by chance: read it beside the noise floor of their size.
    """
    counts = counts.double()
    if (counts.sum(-1) <= 0).any():
        raise ValueError("every batch needs at least one assignment")
    return counts.amax(-1) / counts.mean(-1) - 1


@functools.lru_cache(maxsize=4096)  # a decoding loop asks for the same few batch sizes again and again
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


def token_drop(counts: torch.Tensor, capacity_factor: float | torch.Tensor) -> torch.Tensor:
    """[..., E] -> [...], assignments that experts of limited capacity would drop, as a whole number.

    sum_i max(0, c_i - ceil(F * T * k / E)) with F the capacity factor (Switch Transformers, arXiv 2101.03961,
    section 2.2; GShard, 2006.16668, section 2.2); T*k is the sum of the counts, and divides this for the
    dropped share. A tensor of factors broadcasts against counts [..., E]. A simulation: models in transformers
    have no capacity and drop nothing, as DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) does not.
    """
    counts, factor = torch.as_tensor(counts).double(), torch.as_tensor(capacity_factor, dtype=torch.float64)
    if (factor <= 0).any():
        raise ValueError("need capacity_factor > 0")
    # Rounded first, so that a float's last digit does not make 50 * 1.1 / 5 the capacity 12.
    capacity = (counts.sum(-1, keepdim=True) * factor / counts.shape[-1]).round(decimals=9).ceil()
    return (counts - capacity).clamp(min=0).sum(-1).long()


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


def pair_counts(indices: torch.Tensor, experts: int) -> torch.Tensor:
    """[T, k] -> [E, E] int64, N_ij: tokens that reach experts i and j both. Symmetric, zeros on the diagonal.

    Over all pairs of a token's (distinct) experts. Counts of parts add up, so memory never grows with T.
    """
    first, second = torch.triu_indices(indices.shape[-1], indices.shape[-1], 1, device=indices.device)
    pairs = torch.zeros(experts * experts, dtype=torch.int64, device=indices.device)
    for part in indices.long().split(65536):
        keys = part[:, first] * experts + part[:, second]
        pairs += torch.bincount(keys.flatten(), minlength=len(pairs))
    pairs = pairs.view(experts, experts)
    return (pairs + pairs.T).fill_diagonal_(0)


def coactivation(pairs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[E, E] of `pair_counts`, [E] -> [E, E], C_ij = N_ij / N_i: of the tokens at expert i, the share at j too.

    Rows sum to k - 1; without structure every entry is near (k - 1) / (E - 1). The diagonal and the rows of
    dead experts are 0. OLMoE (arXiv 2409.02060, section 5.2) over all pairs, where its released script counts
    only neighbours in rank (a quarter of the pairs at k = 8).
    """
    return pairs.double() / counts.double().clamp(min=1)[:, None]


def strongest_pairs(pairs: torch.Tensor, counts: torch.Tensor, limit: int, seen: int = 10) -> list[list]:
    """The `limit` largest C_ij as [i, j, C_ij], strongest first, of experts i that `seen` tokens have reached.

    An expert seen once has C_ij = 1 with all its partners and means nothing, hence `seen`.
    """
    shares = coactivation(pairs, counts)
    shares[counts < seen] = 0
    values, places = shares.flatten().topk(min(limit, shares.numel()))
    size = len(counts)
    return [
        [place // size, place % size, value]
        for value, place in zip(values.tolist(), places.tolist())
        if value
    ]


def whole_model(layers: dict[str, dict]) -> dict[str, Any]:
    """One figure for a model from the metrics of its layers (`Recording.summary()["layers"]`).

    Never from pooled counts: layer 1 all on expert 0 and layer 2 all on expert 1 would look even (the
    auxiliary loss of transformers pools, and calls that perfect). So load figures are means over layers
    weighted by assignments (tokens * k), `router_entropy_normalised` (router entropy / ln E) and `confidence`
    by tokens: plain means wherever all layers route alike. `max_violation_worst` and `max_violation_batch_max`
    are the worst layer's, `experts` and `dead_experts` sums. A mean is None where a layer lacks the figure.
    """

    found = list(layers.values())

    def mean(value: Callable[[dict], float | None], weight: Callable[[dict], int]) -> float | None:
        values = [value(layer) for layer in found]
        if None in values:
            return None
        return sum(v * weight(layer) for v, layer in zip(values, found)) / sum(map(weight, found))

    def assignments(layer: dict) -> int:
        return layer["tokens"] * layer["experts_per_token"]

    def load(key: str) -> float:
        return mean(lambda layer: layer[key], assignments)

    def drop(key: str) -> dict[str, float]:
        return {factor: mean(lambda layer: layer[key][factor], assignments) for factor in found[0][key]}  # noqa: B023

    def certainty(value: Callable[[dict], float | None]) -> float | None:
        return mean(value, lambda layer: layer["tokens"])

    def entropy(layer: dict) -> float | None:
        known = layer["router_entropy"] is not None
        return layer["router_entropy"] / math.log(max(layer["experts"], 2)) if known else None

    worst = max(layers, key=lambda name: layers[name]["max_violation"])
    return {
        "routed_layers": len(found),
        "experts": sum(layer["experts"] for layer in found),
        "dead_experts": sum(layer["dead_experts"] for layer in found),
        "max_violation": load("max_violation"),
        "max_violation_noise_floor": load("max_violation_noise_floor"),
        "max_violation_worst": layers[worst]["max_violation"],
        "max_violation_worst_layer": worst,
        "max_violation_batch_mean": load("max_violation_batch_mean"),
        "max_violation_batch_max": max(layer["max_violation_batch_max"] for layer in found),
        "max_violation_batch_noise_floor": load("max_violation_batch_noise_floor"),
        "load_entropy_normalised": load("load_entropy_normalised"),
        "load_cv": load("load_cv"),
        "token_drop": drop("token_drop"),
        "token_drop_batch": drop("token_drop_batch"),
        "router_entropy_normalised": certainty(entropy),
        "confidence": certainty(lambda layer: layer["confidence"]),
    }


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[T, k], [T, k] -> [T], |S_a & S_b| / k: the share of a token's experts that two routers agree on.

    Its mean over the same tokens at two checkpoints of one run is the router saturation of OLMoE
    (arXiv 2409.02060, section 5.1); two random routers agree on k / E. At k = 1 it is the agreement on the one.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"decisions on the same tokens are compared, not {list(a.shape)} and {list(b.shape)}"
        )
    return (a[:, :, None] == b[:, None, :]).any(-1).double().mean(-1)


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
