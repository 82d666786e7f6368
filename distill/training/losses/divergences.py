"""Distillation objectives: how far the student's next-token distribution is from the teacher's, per token.

Every function takes the student's logits at the N kept tokens and returns a tensor [N] in nats, float32
whatever the logits are (float64 if they are float64). Nothing here shifts, masks, averages or weighs: the
collator has done the first two, the loop sums and divides by the valid tokens of the whole optimizer step.

    loss = forward_kl(student_logits, teacher_logits, temperature=2.0).sum() / tokens_in_step

Notation: p teacher, q student, both softmax(logits / temperature); sums run over the vocabulary.
- `temperature` divides both models' logits. Gradients then shrink by about T^2; `temperature_squared=True`
  multiplies the loss by T^2 to undo that (Hinton et al. 2015, arXiv 1503.02531, section 2). It is off by
  default: a recipe that wants it says so.
- 0 log 0 = 0. A token whose logit is -inf counts as log-probability `FORBIDDEN` = -100 (probability 4e-44),
  so that KL(student || teacher), infinite where the teacher forbids what the student allows, stays a finite
  and strong push away from such tokens. Finite logits, however small, are never clipped.
- The teacher never receives a gradient.
- Memory: logits are read a few rows at a time (rowwise.py), so one [N, V] tensor of the student's type is all
  that stays until `backward`. There are no second derivatives.

Shapes: N kept tokens, V vocabulary, K stored tokens; n rows of a chunk. Names and options that a recipe
may use are in `distill.config.section`, under the names of the functions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.training.losses.rowwise import check_dense, check_option, kl, log_probs, per_row
from distill.training.losses.sparse import (
    ranking_hinge,
    ranking_logistic,
    sampled_cross_entropy,
    sparse_forward_kl,
    uld,
)

__all__ = [
    "adaptive_kl",
    "alpha_beta_divergence",
    "cross_entropy",
    "forward_kl",
    "generalized_jsd",
    "ranking_hinge",
    "ranking_logistic",
    "reverse_kl",
    "sampled_cross_entropy",
    "sampled_reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "sparse_forward_kl",
    "top_reverse_kl",
    "total_variation",
    "uld",
]


def _mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """log(weight * exp(a) + (1 - weight) * exp(b)) for 0 <= weight < 1."""
    if weight == 0:
        return b
    return torch.logaddexp(a + math.log(weight), b + math.log1p(-weight))


def _divergence(
    formula: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    temperature_squared: bool,
) -> Tensor:
    """Apply `formula(teacher log-probabilities, student log-probabilities) -> [n]` to all rows."""
    check_option("forward_kl", "temperature", temperature)
    check_dense(student_logits, teacher_logits)

    def tempered(student: Tensor, teacher: Tensor) -> Tensor:
        return formula(log_probs(teacher.to(student.dtype), temperature), log_probs(student, temperature))

    loss = per_row(tempered, student_logits, teacher_logits)
    return loss * temperature**2 if temperature_squared else loss


# ---------------------------------------------------------------------------------------- without a teacher


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """-log q[target]. student_logits [N, V], targets [N] token ids -> [N].

    There is no ignored label: a negative target is an error (IndexError or RuntimeError of torch), because
    rows that do not count must not reach a loss.
    """
    if student_logits.dim() != 2 or targets.shape != student_logits.shape[:1]:
        raise UserError(
            f"cross_entropy needs logits [N, V] and targets [N], not {list(student_logits.shape)} and "
            f"{list(targets.shape)}: select the kept tokens of both first"
        )

    def formula(student: Tensor, target: Tensor) -> Tensor:
        return -F.log_softmax(student, dim=-1).gather(1, target[:, None]).squeeze(1)

    return per_row(formula, student_logits, targets)


# ------------------------------------------------------------------------------------ dense teacher signals


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """KL(teacher || student) = sum p (log p - log q). Both logits [N, V] -> [N].

    Equal to the soft-label cross-entropy minus the teacher's entropy, so it is 0 when the two agree
    (Hinton et al. 2015, arXiv 1503.02531).
    """
    return _divergence(kl, student_logits, teacher_logits, temperature, temperature_squared)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """KL(student || teacher) = sum q (log q - log p), with its exact gradient over the vocabulary.

    Both logits [N, V] -> [N]. Token-level form of MiniLLM's objective (arXiv 2306.08543, section 2.1).
    """
    return _divergence(
        lambda p, q: kl(q, p), student_logits, teacher_logits, temperature, temperature_squared
    )


def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Both logits [N, V] -> [N].

    Generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649, section 2, equation 1), symmetric at
    beta = 1/2. As beta -> 0 the value goes to 0 while value / beta goes to KL(p || q); beta = 0 is therefore
    *defined* as forward_kl and beta = 1 as reverse_kl, and the loss jumps there.
    """
    check_option("generalized_jsd", "beta", beta)

    def formula(p: Tensor, q: Tensor) -> Tensor:
        if beta == 0:
            return kl(p, q)
        if beta == 1:
            return kl(q, p)
        m = _mixture(p, q, beta)
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return _divergence(formula, student_logits, teacher_logits, temperature, temperature_squared)


def skew_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q). Both logits [N, V] -> [N].

    DistiLLM's skew KL (arXiv 2402.03898, section 3.1; alpha = 0.1 there), 0 <= alpha < 1; 0 is forward_kl.
    """
    check_option("skew_forward_kl", "alpha", alpha)

    def formula(p: Tensor, q: Tensor) -> Tensor:
        return kl(p, _mixture(p, q, alpha))

    return _divergence(formula, student_logits, teacher_logits, temperature, temperature_squared)


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p). Both logits [N, V] -> [N].

    DistiLLM's skew reverse KL (arXiv 2402.03898, section 3.1), 0 <= alpha < 1; 0 is reverse_kl.
    """
    check_option("skew_reverse_kl", "alpha", alpha)

    def formula(p: Tensor, q: Tensor) -> Tensor:
        return kl(q, _mixture(q, p, alpha))

    return _divergence(formula, student_logits, teacher_logits, temperature, temperature_squared)


def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), with w the share of sum |p - q| that lies in the teacher's head.

    Both logits [N, V] -> [N]. AKL (arXiv 2404.02657): the head is the teacher's most likely tokens
    while their summed probability is at most mu, and in any case the first. As in the authors' code, w
    carries no gradient; where p = q, w = 1/2.
    """
    check_option("adaptive_kl", "mu", mu)

    def formula(p: Tensor, q: Tensor) -> Tensor:
        with torch.no_grad():
            sorted_p, order = p.exp().sort(dim=-1, descending=True)
            gap = (sorted_p - q.exp().gather(-1, order)).abs()
            head = sorted_p.cumsum(-1) <= mu
            head[:, 0] = True
            total = gap.sum(-1)
            share = torch.where(total > 0, (gap * head).sum(-1) / total, 0.5)
        return share * kl(p, q) + (1 - share) * kl(q, p)

    return _divergence(formula, student_logits, teacher_logits, temperature, temperature_squared)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """sum |p - q| / 2, between 0 and 1. Both logits [N, V] -> [N] (sequence level: arXiv 2307.15190)."""

    def formula(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() - q.exp()).abs().sum(-1) / 2

    return _divergence(formula, student_logits, teacher_logits, temperature, temperature_squared)


def alpha_beta_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """sum [a/(a+b) p^(a+b) + b/(a+b) q^(a+b) - p^a q^b] / (a b). Both logits [N, V] -> [N].

    The alpha-beta divergence of Cichocki, Cruces and Amari (Entropy 13, 2011) that ABKD distils with (arXiv
    2505.04560), for alpha, beta >= 0, not both 0. A zero is the limit of the formula: for beta = 0
    sum [p^a log(p^a / q^a) - p^a + q^a] / a^2, for alpha = 0 the same in b with p and q exchanged. So (1, 0)
    is forward_kl, (0, 1) reverse_kl, (1, 1) half the squared distance and (1/2, 1/2) four times the squared
    Hellinger distance sum (sqrt p - sqrt q)^2 / 2. ABKD's code divides the two limits by a and b instead
    of their squares; the limit of the formula itself is kept here, so that the loss does not jump.
    """
    check_option("alpha_beta_divergence", "alpha", alpha)
    check_option("alpha_beta_divergence", "beta", beta)
    if alpha + beta == 0:
        raise UserError("alpha_beta_divergence: alpha and beta cannot both be 0; give one a positive value")

    def limit(p: Tensor, q: Tensor, power: float) -> Tensor:
        powered = (power * p).exp()
        return (powered * power * (p - q) - powered + (power * q).exp()).sum(-1) / power**2

    def formula(p: Tensor, q: Tensor) -> Tensor:
        if beta == 0:
            return limit(p, q, alpha)
        if alpha == 0:
            return limit(q, p, beta)
        total = alpha + beta
        own = alpha / total * (total * p).exp() + beta / total * (total * q).exp()
        return (own - (alpha * p + beta * q).exp()).sum(-1) / (alpha * beta)

    return _divergence(formula, student_logits, teacher_logits, temperature, temperature_squared)


# --------------------------------------------------- estimators of reverse_kl on what the student wrote


def top_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, top: int = 16) -> Tensor:
    """reverse_kl over the `top` tokens that the teacher finds likeliest, both made to sum to 1 over these.

    Both logits [N, V] -> [N]. Never negative, and 0 where the two agree among these tokens; what the student gives to
    all others it does not see, so top = V alone is reverse_kl. A teacher behind a server can say so much. After the
    truncated reverse KL over the teacher's support of arXiv 2603.25562.
    """
    check_option("top_reverse_kl", "top", top)
    check_dense(student_logits, teacher_logits)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        said, ids = teacher.to(student.dtype).topk(min(top, teacher.shape[-1]), dim=-1)
        return kl(log_probs(student.gather(-1, ids)), log_probs(said))

    return per_row(formula, student_logits, teacher_logits)


def sampled_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, drawn: Tensor, *, clip: float = 0.0
) -> Tensor:
    """reverse_kl known by one token: the one that the student drew, with log p - log q of it as its advantage.

        loss = - r A,    r = q[target] / exp(drawn),    A = log p[target] - drawn

    Both logits [N, V], targets [N] token ids, drawn [N] their log-probabilities when they were drawn -> [N]. Where
    student is still what drew them (r = 1) the value is log q - log p and its gradient -A grad log q: their means over
    draws are reverse_kl and its gradient (the mean of grad log q is 0). Later r weighs for what has changed
    since. clip > 0: PPO's bound, the larger of the loss and that with r held to 1 - clip .. 1 + clip
    (arXiv 1707.06347, equation 7). As an advantage in a policy gradient: Thinking Machines, "On-Policy Distillation",
    2025; reverse_kl is its Rao-Blackwellised form (arXiv 2504.10637), of the same mean and less variance.
    """
    check_option("sampled_reverse_kl", "clip", clip)
    check_dense(student_logits, teacher_logits)
    if targets.shape != drawn.shape or targets.shape != student_logits.shape[:1]:
        raise UserError(
            f"sampled_reverse_kl needs a token and its log-probability for each of {len(student_logits)} rows, not "
            f"{list(targets.shape)} and {list(drawn.shape)}"
        )

    def formula(student: Tensor, teacher: Tensor, target: Tensor, drawn: Tensor) -> Tensor:
        q, p = (
            log_probs(logits.to(student.dtype)).gather(1, target[:, None]).squeeze(1)
            for logits in (student, teacher)
        )
        drawn = drawn.to(student.dtype)
        ratio, advantage = (q - drawn).exp(), p - drawn
        loss = -ratio * advantage
        return torch.maximum(loss, -ratio.clamp(1 - clip, 1 + clip) * advantage) if clip else loss

    return per_row(formula, student_logits, teacher_logits, targets, drawn)
