"""Our divergences against TRL's, at equal settings, values and gradients. Skipped where trl is not installed.

Conventions that differ, so that nobody has to find out twice:
- direction of beta: the same, 0 is KL(teacher || student), 1 is KL(student || teacher), and in between
  M = beta teacher + (1 - beta) student, loss = beta KL(teacher || M) + (1 - beta) KL(student || M);
- reduction: ours leaves one number per token and the loop divides the sum by the kept tokens; theirs divides
  inside, by the kept tokens ("batchmean" with labels, or num_items_in_batch), by the rows ("batchmean" without
  labels) or by kept tokens times V ("mean");
- shift: `generalized_jsd_loss` expects logits and labels already shifted, as ours expects kept tokens;
- temperature divides both models' logits in both, and neither multiplies by T^2; but GKDTrainer.compute_loss does
  not hand its temperature on (it only samples with it), and DistillationTrainer does.
"""

import pytest
import torch

from distill.training import losses

trl_gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="trl is not installed")
trl_kernel = pytest.importorskip("trl.kernels.chunked_divergence", reason="trl is older than 1.16")

ROWS, TIME, VOCABULARY, WIDTH = 3, 5, 11, 4


def ours(student, teacher, beta, temperature):
    if beta == 0:
        return losses.forward_kl(student, teacher, temperature=temperature)
    if beta == 1:
        return losses.reverse_kl(student, teacher, temperature=temperature)
    return losses.generalized_jsd(student, teacher, beta=beta, temperature=temperature)


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(ROWS, TIME, VOCABULARY, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_generalized_jsd_of_gkd(beta, temperature):
    """Per kept token, summed and divided by their number: equal in value and in the student's gradient."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    labels = torch.full((ROWS, TIME), -100)
    labels[0, 2:], labels[1, 1:3], labels[2, 4:] = 1, 1, 1
    kept = labels != -100
    theirs = trl_gkd.GKDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta=beta, temperature=temperature
    )
    (their_gradient,) = torch.autograd.grad(theirs, student)
    mine = ours(student[kept], teacher[kept], beta, temperature).sum() / kept.sum()
    (my_gradient,) = torch.autograd.grad(mine, student)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(my_gradient, their_gradient, rtol=1e-5, atol=1e-9)
    assert my_gradient.abs().max() > 1e-3


def test_reductions_of_gkd():
    student, teacher = logits(0), logits(1)
    per_token = losses.generalized_jsd(student.flatten(0, 1), teacher.flatten(0, 1), beta=0.5)
    loss = trl_gkd.GKDTrainer.generalized_jsd_loss
    torch.testing.assert_close(loss(student, teacher, reduction="sum"), per_token.sum())
    torch.testing.assert_close(loss(student, teacher, reduction="batchmean"), per_token.sum() / ROWS)
    torch.testing.assert_close(loss(student, teacher, reduction="mean"), per_token.mean() / VOCABULARY)
    torch.testing.assert_close(loss(student, teacher, num_items_in_batch=7), per_token.sum() / 7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_chunked_divergence_of_the_distillation_trainer(beta, temperature):
    """Per token, with the gradients of the student's hidden states and head."""
    generator = torch.Generator().manual_seed(2)
    hidden, head, hidden_t, head_t = (
        torch.randn(rows, WIDTH, generator=generator)
        for rows in (ROWS * TIME, VOCABULARY, ROWS * TIME, VOCABULARY)
    )
    hidden.requires_grad_(), head.requires_grad_()
    theirs, _ = trl_kernel.ChunkedDivergenceFunction.apply(
        hidden, head, None, hidden_t, head_t, None, beta, temperature
    )
    mine = ours(hidden @ head.t(), hidden_t @ head_t.t(), beta, temperature)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(0.5, 1.5, len(mine))
    expected = torch.autograd.grad((weights * theirs).sum(), (hidden, head))
    found = torch.autograd.grad((weights * mine).sum(), (hidden, head))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
