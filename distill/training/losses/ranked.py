"""Objectives on the order of tokens: pairwise ranking, and ULD, which compares sorted distributions.

    loss = ranking_hinge(student_logits, teacher_logits, top=8, margin=1.0)       # [N, V] twice -> [N]

In ranking the student need not match probabilities, only who comes first. Pairs (i, j) are taken among the
teacher's `top` likeliest tokens wherever its logit of i is strictly above that of j, and the loss of a row is the
mean over its pairs of a function of the student's z_i - z_j:

- hinge:    max(0, margin - (z_i - z_j)), the cost of the ranking SVM (Joachims, KDD 2002). 0 once every pair
            is in order by at least `margin`; margin 0 asks for the order alone.
- logistic: log(1 + exp(-(z_i - z_j))), the cost of RankNet (Burges et al., ICML 2005, section 3) for pairs
            whose order is certain. Never 0: it goes on pushing the pairs apart.

That the pairs are those of a language model's vocabulary is a convention of this project. RLKD (arXiv
2409.12545), which showed that ranking the teacher's peaks helps beside a divergence, uses a differentiable
Spearman correlation over the union of both models' top k instead.

There is no temperature: an order has none, and the margin (in nats, a difference of logits is one of
log-probabilities) sets the scale. The tail of the vocabulary below `top` is not looked at: a token outside
that the student prefers to all of them costs nothing, so use ranking beside a divergence or cross_entropy,
never alone. The student's logits of ranked tokens must be finite.

Universal Logit Distillation (`uld`) compares two distributions over different vocabularies by their shape. Which
positions of two tokenizers may be compared at all is for `distill.training.cross_tokenizer`.

Shapes: N kept tokens, n rows of a chunk, V and V' vocabularies, K = min(top, V).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.training.losses.rowwise import check_dense, check_option, per_row


def hinge_rows(student: Tensor, teacher: Tensor, *, top: int, margin: float) -> Tensor:
    """Mean over pairs of max(0, margin - (z_i - z_j)), in nats. student, teacher logits [n, V] -> [n].

    Pairs in the teacher's order among its `top` likeliest tokens; its -inf (padding of a vocabulary) is in no
    pair, ties (frequent in bfloat16 logits) make none, and a row without pairs costs 0. No temperature, no
    T^2. Source: ranking SVM (Joachims 2002); on vocabularies a convention. `margin` >= 0, `top` >= 2.
    """
    if margin < 0:
        raise UserError(f"ranking: margin must be at least 0, not {margin}")
    gaps, pairs = _gaps(student, teacher, top)
    return _mean_over_pairs(F.relu(margin - gaps), pairs)


def logistic_rows(student: Tensor, teacher: Tensor, *, top: int) -> Tensor:
    """Mean over pairs of log(1 + exp(-(z_i - z_j))), in nats. student, teacher logits [n, V] -> [n].

    Pairs as in `hinge_rows`; log 2 where the student is indifferent. No temperature, no T^2.
    Source: RankNet (Burges et al. 2005), section 3, with certain target orders; on vocabularies a convention.
    """
    gaps, pairs = _gaps(student, teacher, top)
    return _mean_over_pairs(F.softplus(-gaps), pairs)


def _gaps(student: Tensor, teacher: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """z_i - z_j [n, K, K] of the student, and which of them are pairs; tokens in the teacher's order."""
    if student.shape != teacher.shape or student.dim() != 2:
        raise UserError(
            f"ranking needs logits [n, V] of one vocabulary, not {list(student.shape)} (student) and "
            f"{list(teacher.shape)} (teacher)"
        )
    if top < 2:
        raise UserError(f"ranking: top must be at least 2 tokens, or there is no pair to rank, not {top}")
    best, ids = teacher.topk(min(top, teacher.shape[1]), dim=-1)
    chosen = student.gather(1, ids)
    allowed = best > -torch.inf
    pairs = (best.unsqueeze(2) > best.unsqueeze(1)) & allowed.unsqueeze(1)
    # Where there is no pair the gap must not reach a cost: inf - inf would spoil the gradient of the rest.
    return (chosen.unsqueeze(2) - chosen.unsqueeze(1)).masked_fill(~pairs, 0.0), pairs


def _mean_over_pairs(costs: Tensor, pairs: Tensor) -> Tensor:
    total = torch.where(pairs, costs, 0.0).sum((1, 2))
    return total / pairs.sum((1, 2)).clamp(min=1)


# ------------------------------------------------------------------------------------- orders, and other tokens


def ranking_hinge(
    student_logits: Tensor, teacher_logits: Tensor, *, top: int = 8, margin: float = 1.0
) -> Tensor:
    """Mean over pairs of the teacher's `top` tokens of max(0, margin - (z_i - z_j)). Both logits [N, V] -> [N].

    The order alone, no temperature; see `distill.training.losses.ranked` for pairs, ties and sources. Never use it
    alone: a token outside the teacher's top that the student prefers to all of them costs nothing.
    """
    check_option("ranking_hinge", "top", top)
    check_option("ranking_hinge", "margin", margin)
    check_dense(student_logits, teacher_logits)
    return per_row(lambda s, t: hinge_rows(s, t, top=top, margin=margin), student_logits, teacher_logits)


def ranking_logistic(student_logits: Tensor, teacher_logits: Tensor, *, top: int = 8) -> Tensor:
    """Mean over pairs of the teacher's `top` tokens of log(1 + exp(-(z_i - z_j))). Both logits [N, V] -> [N].

    RankNet's cost (Burges et al. 2005, section 3), no temperature; see `distill.training.losses.ranked`.
    """
    check_option("ranking_logistic", "top", top)
    check_dense(student_logits, teacher_logits)
    return per_row(lambda s, t: logistic_rows(s, t, top=top), student_logits, teacher_logits)


def uld(
    student_logits: Tensor, teacher_logits: Tensor, aligned: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """sum |sort(q) - sort(p)| across vocabularies. Logits [N, V] and [N, V'], aligned [N] -> [N], 0 to 2.

    Tokens whose `aligned` is 0 have no counterpart in the teacher's tokens and cost nothing (their row of
    teacher logits is not read into the loss). Universal Logit Distillation (arXiv 2402.12030, section 3); which
    positions are aligned: `distill.training.cross_tokenizer`.
    """
    check_option("uld", "temperature", temperature)

    def formula(student: Tensor, teacher: Tensor, aligned: Tensor) -> Tensor:
        return uld_rows(student, teacher, temperature=temperature) * aligned.to(student.dtype)

    return per_row(formula, student_logits, teacher_logits, aligned)


def uld_rows(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """sum_i |q_(i) - p_(i)|, both sorted from the likeliest down. student [n, V], teacher [n, V'] -> [n].

    q and p are softmax(logits / temperature) over each model's own vocabulary, the shorter padded with zeros;
    -inf logits are probability 0. From 0 to 2. No direction, no T^2, no tail cut. It compares the shapes
    of two distributions, not which tokens they are about: use it beside cross_entropy, as the paper does.
    Source: Universal Logit Distillation (arXiv 2402.12030), optimal transport where all moves cost the same.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise UserError(
            "uld needs logits [n, V] and [n, V'] at the same n positions, not "
            f"{list(student.shape)} (student) and {list(teacher.shape)} (teacher)"
        )
    q = (student / temperature).softmax(-1).sort(-1, descending=True).values
    p = (teacher.detach().to(student.dtype) / temperature).softmax(-1).sort(-1, descending=True).values
    longer = max(q.shape[1], p.shape[1])
    return (F.pad(q, (0, longer - q.shape[1])) - F.pad(p, (0, longer - p.shape[1]))).abs().sum(-1)
