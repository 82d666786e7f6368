"""Ranking costs against a loop over pairs in float64, their slopes, and what an order must obey."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.training.losses.sparse import hinge_rows, logistic_rows


def hinge(student, teacher, top=4, margin=1.0):
    return hinge_rows(student, teacher, top=top, margin=margin)


def logistic(student, teacher, top=4):
    return logistic_rows(student, teacher, top=top)


COSTS = {
    "hinge": (hinge, lambda gap: max(0.0, 1.0 - gap)),
    "logistic": (logistic, lambda gap: math.log1p(math.exp(-gap))),
}
each_cost = pytest.mark.parametrize("name", COSTS)


def brute_force(student, teacher, cost, top):
    """Mean over pairs, one pair at a time, from the definition."""
    values = []
    for z, t in zip(student.double().tolist(), teacher.double().tolist()):
        best = sorted(range(len(t)), key=lambda i: -t[i])[:top]
        pairs = [(i, j) for i, j in itertools.permutations(best, 2) if t[i] > t[j] > -math.inf]
        values.append(sum(cost(z[i] - z[j]) for i, j in pairs) / len(pairs) if pairs else 0.0)
    return np.array(values)


def logits(seed, rows=5, vocabulary=9, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)


@each_cost
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 6),
    vocabulary=st.integers(1, 30),
    top=st.integers(2, 40),
    scale=st.floats(0.01, 20),
    forbidden=st.integers(0, 4),
)
def test_value_is_the_mean_over_pairs(name, seed, rows, vocabulary, top, scale, forbidden):
    function, cost = COSTS[name]
    student, teacher = logits(seed, rows, vocabulary, scale)
    teacher[:, vocabulary - min(forbidden, vocabulary) :] = -torch.inf
    loss = function(student, teacher, top)
    assert loss.shape == (rows,) and loss.dtype == torch.float64
    np.testing.assert_allclose(loss, brute_force(student, teacher, cost, top), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(function(student.float(), teacher.float(), top), loss, rtol=2e-4, atol=2e-4)


def test_by_hand():
    teacher = torch.tensor([[3.0, 2.0, 1.0]])
    in_order, reversed_order = torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([[0.0, 2.0, 4.0]])
    assert hinge(in_order, teacher).item() == 0
    assert hinge(in_order, teacher, margin=3.0).item() == pytest.approx((1 + 1 + 0) / 3)
    assert hinge(reversed_order, teacher).item() == pytest.approx((3 + 3 + 5) / 3)
    assert logistic(torch.zeros(1, 3), teacher).item() == pytest.approx(math.log(2))


@each_cost
def test_gradcheck(name):
    student, teacher = logits(3, rows=3, vocabulary=7)
    teacher[0, 2:5] = -torch.inf
    assert torch.autograd.gradcheck(lambda s: COSTS[name][0](s, teacher), student.requires_grad_())


@each_cost
def test_teacher_gets_no_gradient_and_pushes_the_first_up(name):
    student, teacher = logits(4)
    student.requires_grad_(), teacher.requires_grad_()
    COSTS[name][0](student, teacher).sum().backward()
    assert teacher.grad is None
    first = student.grad.gather(1, teacher.argmax(1, keepdim=True))
    assert (first <= 0).all() and (first < 0).any()  # descent raises the teacher's favourite
    torch.testing.assert_close(student.grad.sum(1), torch.zeros(5, dtype=torch.float64))  # blind to a shift


@each_cost
def test_ties_are_no_pair_and_a_row_without_pairs_costs_nothing(name):
    function, cost = COSTS[name]
    student = logits(5, rows=2, vocabulary=4)[0].requires_grad_()
    teacher = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, -torch.inf]], dtype=torch.float64)
    loss = function(student, teacher)
    loss.sum().backward()
    assert loss[0] == 0 and not student.grad[0].any() and student.grad[1, 3] == 0
    z = student[1].tolist()
    assert loss[1].item() == pytest.approx((cost(z[0] - z[2]) + cost(z[1] - z[2])) / 2)


@each_cost
def test_only_the_teachers_order_and_top_count(name):
    function = COSTS[name][0]
    student, teacher = logits(6, rows=4, vocabulary=12)
    loss = function(student, teacher)
    torch.testing.assert_close(function(student, teacher**3 + 5 * teacher), loss)  # any increasing map
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(function(student[:, order], teacher[:, order]), loss)
    below = student.scatter(1, teacher.argsort(1)[:, :8], 50.0)  # the tail is not looked at
    torch.testing.assert_close(function(below, teacher), loss)
    torch.testing.assert_close(
        torch.cat([function(student[i : i + 1], teacher[i : i + 1]) for i in range(4)]), loss
    )


@each_cost
def test_infinite_student_outside_of_the_pairs_does_not_spoil_the_gradient(name):
    student, teacher = logits(7, rows=2, vocabulary=6)
    student[:, 4:], teacher[:, 4:] = -torch.inf, -torch.inf
    student.requires_grad_()
    COSTS[name][0](student, teacher, 6).sum().backward()
    assert student.grad.isfinite().all()


def test_nan_of_the_student_stays_nan():
    student, teacher = logits(8, rows=1, vocabulary=4)
    student[0, teacher.argmax()] = torch.nan
    assert hinge(student, teacher).isnan().all() and logistic(student, teacher).isnan().all()


def test_mistakes_are_named():
    a, b = torch.zeros(2, 5), torch.zeros(2, 6)
    with pytest.raises(UserError, match="one vocabulary"):
        hinge(a, b)
    with pytest.raises(UserError, match="at least 2"):
        logistic(a, a, top=1)
    with pytest.raises(UserError, match="margin"):
        hinge(a, a, margin=-0.5)
