"""Pairwise ranking over the teacher's order: the student need not match probabilities, only who comes first.

Formulas on chunks of rows, for `distill.rowwise.per_row`, which makes objectives [N, V] -> [N] of them:

    loss = per_row(lambda s, t: hinge_rows(s, t, top=8, margin=1.0), student_logits, teacher_logits)

Pairs (i, j) are taken among the teacher's `top` likeliest tokens wherever its logit of i is strictly above
that of j, and the loss of a row is the mean over its pairs of a function of the student's z_i - z_j:

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

Shapes: n rows of a chunk, V vocabulary, K = min(top, V).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError


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
