"""reverse_kl by the teacher's likeliest tokens and by the token drawn: their means over all draws, in float64.

No sampling here: an expectation is the sum over the whole vocabulary, weighted by the student's own probabilities.
"""

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.training import losses

V = 9


def pair(seed: int, tokens: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(2.0 * np.random.default_rng(seed).standard_normal((2, tokens, V))))


def test_the_teachers_likeliest_tokens_by_their_definition():
    student, teacher = pair(0)
    for top in (2, 5):
        expected = []
        for q, p in zip(student.numpy(), teacher.numpy()):
            kept = sorted(range(V), key=lambda i: -p[i])[:top]
            a, b = np.exp(q[kept]), np.exp(p[kept])
            a, b = a / a.sum(), b / b.sum()
            expected.append(sum(x * np.log(x / y) for x, y in zip(a, b)))
        found = losses.top_reverse_kl(student, teacher, top=top)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    whole = losses.top_reverse_kl(student, teacher, top=V)
    torch.testing.assert_close(whole, losses.reverse_kl(student, teacher))
    assert torch.autograd.gradcheck(
        lambda s: losses.top_reverse_kl(s, teacher, top=3), student.requires_grad_()
    )
    (slope,) = torch.autograd.grad(losses.top_reverse_kl(student, teacher, top=3).sum(), student)
    outside = torch.ones_like(teacher, dtype=bool).scatter(1, teacher.topk(3).indices, False)
    assert not slope[outside].any() and slope[~outside].all()


def by_every_token(student, teacher, of, clip=0.0):
    """sum over y of of(y) loss(y) for a weight of(y) [tokens, V], and its gradient with of held as it is."""
    student = student.clone().requires_grad_()
    drawn = student.detach().log_softmax(-1)
    total = 0
    for y in range(V):
        targets = torch.full((len(student),), y)
        one = losses.sampled_reverse_kl(student, teacher, targets, drawn[:, y], clip=clip)
        total = total + of[:, y] * one
    return total.detach(), torch.autograd.grad(total.sum(), student)[0]


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_the_mean_over_draws_is_reverse_kl_with_its_gradient(clip):
    """The student is still what drew: the ratio is 1, and clipping has nothing to hold."""
    student, teacher = pair(1)
    value, slope = by_every_token(student, teacher, student.softmax(-1), clip)
    exact = student.clone().requires_grad_()
    torch.testing.assert_close(value, losses.reverse_kl(student, teacher), rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(losses.reverse_kl(exact, teacher).sum(), exact)
    torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)


def test_a_changed_student_is_weighed_by_what_it_would_draw_now():
    """Tokens of an older student b: the mean over b of the gradient is that of sum q (log b - log p), A held."""
    student, teacher = pair(2)
    older = student + 0.3 * torch.randn(student.shape, generator=torch.Generator().manual_seed(0)).double()
    b, p = older.log_softmax(-1), teacher.log_softmax(-1)
    now = student.clone().requires_grad_()
    total = sum(
        b[:, y].exp() * losses.sampled_reverse_kl(now, teacher, torch.full((4,), y), b[:, y])
        for y in range(V)
    )
    wanted = (now.softmax(-1) * (b - p)).sum(-1)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(x.sum(), now, retain_graph=True)[0] for x in (total, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_clipping_stops_what_has_moved_far_enough_and_only_that_way():
    """PPO: a token with a positive advantage whose ratio is above 1 + clip pulls no more; one below it still does."""
    teacher = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]).double()
    student = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    wider, lower = np.log(1 / 3) - np.log(1.5), np.log(1 / 3) - np.log(0.5)  # drawn: ratios 1.5 and 0.5
    drawn = torch.tensor([wider, lower, wider, lower])
    targets = torch.zeros(4, dtype=torch.long)
    found = losses.sampled_reverse_kl(student, teacher, targets, drawn, clip=0.2)
    (slope,) = torch.autograd.grad(found.sum(), student)
    assert slope.abs().sum(-1).gt(0).tolist() == [False, True, True, False]
    advantage = teacher.log_softmax(-1)[:, 0] - drawn
    bounded = -torch.tensor([1.2, 0.5, 1.5, 0.8]).double() * advantage
    torch.testing.assert_close(found.detach(), bounded)
    free = losses.sampled_reverse_kl(student, teacher, targets, drawn)
    torch.testing.assert_close(free.detach(), -torch.tensor([1.5, 0.5, 1.5, 0.5]).double() * advantage)
    with pytest.raises(UserError, match="for each of 4 rows"):
        losses.sampled_reverse_kl(student, teacher, targets[:2], drawn)
