"""Group shares: OLMoE's definition, and a guard that finds planted specialists and nothing in noise."""

import math
from statistics import NormalDist

import pytest
import torch

from distill.moe import metrics
from distill.moe.totals import FALSE_ENTRY_RATE, GroupShares, critical


def uniform_choices(tokens: int, experts: int, k: int, seed: int) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(k).indices


def overall(indices: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.bincount(indices.flatten(), minlength=experts).double() / len(indices)


def test_the_critical_value_is_two_sided_and_shared_by_all_comparisons():
    for comparisons in (1, 24, 1000):
        beyond = 2 * (1 - NormalDist().cdf(critical(comparisons)))
        assert beyond * comparisons == pytest.approx(FALSE_ENTRY_RATE, rel=1e-6)
    assert critical(0) == critical(1)


def test_shares_by_hand_and_in_parts():
    table = GroupShares(4, 2, ["a", "b", "c"])
    indices = torch.tensor([[0, 1], [0, 2], [3, 2], [1, 2]])
    table.add(indices[:2], torch.tensor([0, 0]), torch.tensor([0, 0]))
    table.add(indices[2:], torch.tensor([2, -1]), torch.tensor([1, 1]))  # -1: of no group
    assert table.shares().tolist() == [[1, 0.5, 0.5, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert table.tokens.tolist() == [2, 0, 1] and table.answers.tolist() == [1, 0, 1]
    whole = metrics.specialisation(indices[:3], torch.tensor([0, 0, 2]), 4, 3)
    torch.testing.assert_close(table.shares(), whole)


def test_z_is_the_cluster_formula():
    """Three groups of 12 answers each, compared with a loop over answers written from the definition."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 9, (36,), generator=generator).tolist()
    answers = torch.repeat_interleave(torch.arange(36), torch.tensor(lengths))
    indices = uniform_choices(len(answers), 5, 2, seed=4)
    indices[answers % 3 == 0] = torch.tensor([4, 2])
    table = GroupShares(5, 2, ["x", "y", "z"])
    table.add(indices, answers % 3, answers)
    base = overall(indices, 5)
    distance, z = table.deviations(base)
    for group in range(3):
        members = [r for r in range(36) if r % 3 == group]
        for expert in range(5):
            reached = [int((indices[answers == r] == expert).sum()) for r in members]
            size = [lengths[r] for r in members]
            n, p = sum(size), sum(reached) / sum(size)
            nulls = [2 / 5, float(base[expert])]
            null = min(nulls, key=lambda v: abs(p - v))
            d = p - null if (p - nulls[0]) * (p - nulls[1]) > 0 else 0.0
            robust = 12 / 11 * sum((c - p * m) ** 2 for c, m in zip(reached, size)) / n**2
            error = math.sqrt(max(robust, null * (1 - null) / n))
            assert float(distance[group, expert]) == pytest.approx(d, abs=1e-12)
            assert float(z[group, expert]) == pytest.approx(d / error if error else 0, abs=1e-9)


def test_a_planted_specialist_is_found_and_first():
    answers = torch.arange(40).repeat_interleave(25)
    labels = answers % 4
    indices = uniform_choices(1000, 8, 2, seed=0)
    mine = labels == 2
    indices[mine, 0] = 5
    indices[mine & (indices[:, 1] == 5), 1] = 6
    table = GroupShares(8, 2, ["a", "b", "c", "d"])
    table.add(indices, labels, answers)
    found = table.summary(overall(indices, 8))
    assert found["baseline"] == 0.25 and found["groups"] == ["a", "b", "c", "d"]
    first = found["strongest"][0]
    assert (first["group"], first["expert"], first["share"]) == ("c", 5, 1.0) and first["z"] > found[
        "critical_z"
    ]
    preferred = table.preferred(overall(indices, 8))
    assert {"expert": 5, "group": "c", "share": 1.0, "n": 250}.items() <= preferred[0].items()


def test_noise_an_imbalance_and_lumpy_answers_are_no_specialisation():
    answers = torch.arange(60).repeat_interleave(20)
    labels = answers % 3
    even = uniform_choices(1200, 8, 2, seed=1)
    # Everybody uses expert 0: far from k / E in every group, and still nobody's specialist.
    collapsed = torch.stack([torch.zeros(1200, dtype=torch.long), 1 + even[:, 0] % 7], 1)
    # Each answer keeps to one pair of experts: 20 tokens count for one, whatever the binomial error says.
    lumpy = uniform_choices(60, 8, 2, seed=2).repeat_interleave(20, 0)
    for indices in (even, collapsed, lumpy):
        table = GroupShares(8, 2, ["a", "b", "c"])
        table.add(indices, labels, answers)
        found = table.summary(overall(indices, 8))
        assert found["strongest"] == []
        assert table.preferred(overall(indices, 8)) == []
    binomial = (table.shares() - 0.25).abs() / math.sqrt(0.25 * 0.75 / 400)
    assert float(binomial.max()) > critical(24)  # as draws of single tokens, the lumps would pass for one


def test_groups_seen_in_few_answers_are_not_judged():
    table = GroupShares(4, 1, ["rare", "common"])
    answers = torch.arange(40).repeat_interleave(5)
    labels = (answers >= 9).long()  # 9 answers: one short
    table.add(torch.where(labels == 0, 3, answers % 3)[:, None], labels, answers)
    assert all(entry["group"] == "common" for entry in table.summary(torch.full((4,), 0.25))["strongest"])


def test_many_experts_have_no_matrix_but_a_list():
    table = GroupShares(200, 1, ["a", "b"])
    answers = torch.arange(40).repeat_interleave(5)
    table.add((answers % 2 * 150)[:, None], answers % 2, answers)
    found = table.summary(torch.full((200,), 1 / 200))
    assert found["share"] is None and {e["expert"] for e in found["strongest"]} == {0, 150}
