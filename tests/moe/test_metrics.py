"""Routing metrics against values worked out by hand, by simulation, and against their own invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.moe import metrics

SKEWED = torch.tensor([6, 2, 0, 0])


def test_load_metrics_of_a_skewed_layer_by_hand():
    assert metrics.load_fraction(SKEWED).tolist() == [0.75, 0.25, 0, 0]
    assert metrics.max_violation(SKEWED) == 2.0  # (6 - 2) / 2
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics.load_entropy(SKEWED) == pytest.approx(entropy)
    assert metrics.load_entropy(SKEWED, normalised=True) == pytest.approx(entropy / math.log(4))
    assert metrics.effective_experts(SKEWED) == pytest.approx(4 / 27**0.25)  # 1.7548
    assert metrics.coefficient_of_variation(SKEWED) == pytest.approx(math.sqrt(6) / 2)
    assert metrics.dead_experts(SKEWED) == 2


@pytest.mark.parametrize("experts, k", [(8, 2), (64, 6), (2, 1)])
def test_the_two_ends_even_and_collapsed(experts, k):
    even, collapsed = torch.full((experts,), 5), torch.tensor([9] * k + [0] * (experts - k))
    for counts, violation, effective, dead in [
        (even, 0, experts, 0),
        (collapsed, experts / k - 1, k, experts - k),
    ]:
        assert metrics.max_violation(counts) == pytest.approx(violation)
        assert metrics.effective_experts(counts) == pytest.approx(effective)
        assert metrics.load_entropy(counts) == pytest.approx(math.log(effective))
        assert metrics.dead_experts(counts) == dead
    assert metrics.load_entropy(even, normalised=True) == pytest.approx(1)
    assert metrics.coefficient_of_variation(even) == 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any), st.integers(2, 9), st.randoms())
def test_load_metrics_ignore_expert_names_and_token_count(counts, factor, random):
    shuffled = [factor * count for count in counts]
    random.shuffle(shuffled)
    a, b = torch.tensor(counts), torch.tensor(shuffled)
    for metric in (
        metrics.max_violation,
        metrics.load_entropy,
        metrics.effective_experts,
        metrics.coefficient_of_variation,
        metrics.dead_experts,
    ):
        assert metric(a) == pytest.approx(metric(b), abs=1e-9)
    assert float(metrics.load_fraction(a).sum()) == pytest.approx(1)
    assert metrics.effective_experts(a) <= len(counts) + 1e-9


@pytest.mark.parametrize("counts", [[0, 0], [], [[1, 2]], [3, -1]])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ValueError, match="one non-negative number per expert"):
        metrics.load_fraction(torch.tensor(counts))


@pytest.mark.parametrize(
    "tokens, experts, k",
    [(1024, 8, 2), (10, 8, 2), (200, 256, 8), (32, 64, 2), (128, 64, 6), (50, 2, 1), (4096, 4, 1)],
)
def test_noise_floor_is_what_a_uniform_router_shows(tokens, experts, k):
    draws, generator = 150, torch.Generator().manual_seed(0)
    seen = []
    for _ in range(draws):
        chosen = torch.rand(tokens, experts, generator=generator).topk(k).indices
        seen.append(metrics.max_violation(torch.bincount(chosen.flatten(), minlength=experts)))
    seen = torch.tensor(seen)
    error = 3 * float(seen.std()) / math.sqrt(draws)
    assert metrics.max_violation_noise_floor(tokens, experts, k) == pytest.approx(
        float(seen.mean()), rel=0.05, abs=error
    )


def test_noise_floor_at_its_ends():
    assert metrics.max_violation_noise_floor(100, 8, 8) == 0  # no choice, no noise
    assert metrics.max_violation_noise_floor(1, 256, 8) == pytest.approx(256 / 8 - 1, rel=0.01)  # one token
    # A million tokens: the normal limit, sqrt((E - k) / (k T)) times the mean maximum of 8 normals, 1.4236.
    limit = 1.4236 * math.sqrt(8 / 7) * math.sqrt(6 / 2 / 1e6)
    assert metrics.max_violation_noise_floor(10**6, 8, 2) == pytest.approx(limit, rel=0.01)
    with pytest.raises(ValueError, match="experts_per_token"):
        metrics.max_violation_noise_floor(10, 4, 5)


def test_router_entropy_and_confidence_by_hand():
    scores = torch.tensor(
        [[0.5, 0.25, 0.25, 0.0], [0.9, 0.9, 0.9, 0.9]]
    )  # a softmax row, an indifferent sigmoid row
    assert metrics.router_entropy(scores).tolist() == pytest.approx([1.5 * math.log(2), math.log(4)])
    chosen = torch.tensor([[0, 1], [2, 3]])
    assert metrics.confidence(scores, chosen).tolist() == pytest.approx([0.75, 0.5])
    assert torch.allclose(metrics.router_entropy(scores), metrics.router_entropy(7 * scores))


def test_coactivation_counts_all_pairs():
    chosen = torch.tensor(
        [[0, 1, 2], [0, 2, 3], [4, 2, 0]]
    )  # rank order must not matter: 0 and 2 always meet
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for i, row in {
        0: {1: 1 / 3, 2: 1, 3: 1 / 3, 4: 1 / 3},
        1: {0: 1, 2: 1},
        2: {0: 1, 1: 1 / 3, 3: 1 / 3, 4: 1 / 3},
        3: {0: 1, 2: 1},
        4: {0: 1, 2: 1},
    }.items():
        for j, share in row.items():
            expected[i, j] = share
    counts = torch.bincount(chosen.flatten(), minlength=6)
    got = metrics.coactivation(metrics.pair_counts(chosen, 6), counts)
    torch.testing.assert_close(got, expected)
    assert got.sum(1)[:5].tolist() == pytest.approx([2] * 5) and got[5].sum() == 0


def test_coactivation_of_many_tokens_equals_a_loop():
    chosen = (
        torch.rand(70000, 6, generator=torch.Generator().manual_seed(0)).topk(3).indices
    )  # more than one part
    member = torch.zeros(70000, 6, dtype=torch.float64).scatter_(1, chosen, 1.0)
    pairs = member.T @ member
    expected = (pairs / pairs.diagonal()[:, None]).fill_diagonal_(0)
    got = metrics.pair_counts(chosen, 6)
    torch.testing.assert_close(got.double(), pairs.clone().fill_diagonal_(0))
    torch.testing.assert_close(metrics.coactivation(got, pairs.diagonal()), expected)


def test_strongest_pairs_leave_out_experts_hardly_seen():
    pairs = torch.tensor([[0, 30, 10, 0], [30, 0, 10, 0], [10, 10, 0, 2], [0, 0, 2, 0]])
    counts = torch.tensor([40, 40, 22, 2])  # expert 3 always meets 2, but was seen twice
    got = metrics.strongest_pairs(pairs, counts, limit=3)
    assert got[:2] == [[0, 1, 0.75], [1, 0, 0.75]] and got[2][0] == 2
    assert [3, 2, 1.0] in metrics.strongest_pairs(pairs, counts, limit=3, seen=1)
    assert metrics.strongest_pairs(torch.zeros(2, 2), torch.tensor([50, 50]), limit=9) == []


def test_violation_per_batch_by_hand_and_experts_that_take_turns():
    per_batch = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])
    assert metrics.max_violation_per_batch(per_batch).tolist() == [2.0, 0.0]
    turns = torch.tensor([[8, 0], [0, 8]])  # even over both batches, as uneven as can be in each
    assert metrics.max_violation(turns.sum(0)) == 0
    assert metrics.max_violation_per_batch(turns).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="at least one assignment"):
        metrics.max_violation_per_batch(torch.zeros(1, 4))


@pytest.mark.parametrize(
    "counts, factor, dropped",
    [
        ([6, 2, 0, 0], 1.0, 4),  # capacity 2
        ([6, 2, 0, 0], 1.25, 3),  # ceil(2.5) = 3
        ([6, 2, 0, 0], 2.0, 2),
        ([6, 2, 0, 0], 3.0, 0),
        ([5, 4, 3, 3], 1.0, 1),  # 15 assignments: capacity ceil(3.75) = 4
        ([12, 12, 10, 8, 8], 1.1, 2),  # capacity 11: 50 * 1.1 / 5 is 11.000000000000002 in floating point
    ],
)
def test_token_drop_by_hand(counts, factor, dropped):
    assert int(metrics.token_drop(torch.tensor(counts), factor)) == dropped


def test_token_drop_of_many_batches_and_factors_is_that_of_each():
    counts = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2], [7, 0, 7, 2]])
    factors = [1.0, 1.25, 2.0]
    got = metrics.token_drop(counts, torch.tensor(factors).view(-1, 1, 1))
    assert got.tolist() == [[int(metrics.token_drop(row, f)) for row in counts] for f in factors]
    with pytest.raises(ValueError, match="capacity_factor"):
        metrics.token_drop(counts, 0)


def test_overlap_by_hand():
    a, b = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[1, 0], [3, 7], [6, 7]])
    assert metrics.overlap(a, b).tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="same tokens"):
        metrics.overlap(a, b[:2])


def test_overlap_of_unrelated_routers_is_k_over_e():
    first, second = (
        torch.rand(20000, 16, generator=torch.Generator().manual_seed(seed)).topk(4).indices
        for seed in (0, 1)
    )
    assert float(metrics.overlap(first, second).mean()) == pytest.approx(4 / 16, abs=0.005)


def layer(**changes) -> dict:
    same = {"tokens": 100, "experts": 4, "experts_per_token": 1, "dead_experts": 0, "router_entropy": 0.7}
    keys = (
        "max_violation",
        "max_violation_noise_floor",
        "max_violation_batch_mean",
        "max_violation_batch_max",
    )
    keys += ("max_violation_batch_noise_floor", "load_entropy_normalised", "load_cv", "confidence")
    drop = {"token_drop": {"1.0": 0.0}, "token_drop_batch": {"1.0": 0.0}}
    return same | dict.fromkeys(keys, 0.0) | drop | changes


def test_whole_model_does_not_pool_layers():
    """Two collapsed layers on different experts: pooled counts are even, as the auxiliary loss sees them."""
    first, second = torch.tensor([100, 0]), torch.tensor([0, 100])
    assert metrics.max_violation(first + second) == 0
    layers = {
        name: layer(experts=2, max_violation=metrics.max_violation(counts), dead_experts=1)
        for name, counts in (("a", first), ("b", second))
    }
    found = metrics.whole_model(layers)
    assert found["max_violation"] == 1 and found["dead_experts"] == 2 and found["routed_layers"] == 2


def test_whole_model_weighs_by_assignments_and_tokens():
    layers = {
        "a": layer(tokens=100, experts_per_token=3, load_cv=1.0, confidence=0.5, max_violation=2.0),
        "b": layer(tokens=500, load_cv=2.0, confidence=0.9, max_violation=3.0, router_entropy=1.4),
    }
    layers["b"]["token_drop"] = {"1.0": 0.5}
    found = metrics.whole_model(layers)
    assert found["load_cv"] == pytest.approx((300 * 1 + 500 * 2) / 800)
    assert found["token_drop"]["1.0"] == pytest.approx(500 * 0.5 / 800)
    assert found["confidence"] == pytest.approx((100 * 0.5 + 500 * 0.9) / 600)
    assert found["router_entropy_normalised"] == pytest.approx((0.7 + 5 * 1.4) / 6 / math.log(4))
    assert (found["max_violation_worst"], found["max_violation_worst_layer"]) == (3.0, "b")
    layers["a"] |= {"router_entropy": None, "confidence": None}
    unknown = metrics.whole_model(layers)
    assert unknown["router_entropy_normalised"] is None and unknown["load_cv"] == found["load_cv"]


def test_specialisation_by_hand():
    chosen, groups = torch.tensor([[0, 1], [0, 2], [3, 2]]), torch.tensor([0, 0, 2])
    got = metrics.specialisation(chosen, groups, experts=4, n_groups=3)
    assert got.tolist() == [[1, 0.5, 0.5, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    with pytest.raises(ValueError, match="3 routed tokens but 2 group labels"):
        metrics.specialisation(chosen, groups[:2], experts=4, n_groups=3)
