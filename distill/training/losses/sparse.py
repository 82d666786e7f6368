"""Objectives on a part of the vocabulary: stored signals of K tokens, and the order of the likeliest tokens.

Objectives on stored teacher signals: K tokens with log-probabilities or weights instead of V logits.

Storing the whole distribution costs V numbers per token (600 KB at V = 151,936); K = 50 of them cost a few hundred
bytes. What is lost is the tail, and a loss has to say what it does about it: see `tail` below. Units, dtypes and
gradients are those of `distill.training.losses.divergences`, from where these functions are meant to be imported.

    loss = sparse_forward_kl(student_logits, ids, logprobs, tail="tail_bucket").sum() / tokens_in_step
    loss = sampled_cross_entropy(student_logits, ids, weights).sum() / tokens_in_step

Shapes: N kept tokens, V vocabulary, K stored tokens.

Objectives on the order of tokens: pairwise ranking, and ULD, which compares sorted distributions.

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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.training.losses.rowwise import check_dense, check_option, kl, log_probs, per_row


def _check_shapes(shape: tuple[int, ...], ids: Tensor, values: Tensor) -> None:
    if len(shape) != 2 or ids.dim() != 2 or ids.shape != values.shape:
        raise UserError(
            "stored signals need logits [N, V], ids [N, K] and their logprobs or weights [N, K], not "
            f"{list(shape)}, {list(ids.shape)} and {list(values.shape)}"
        )
    if ids.shape[0] != shape[0]:
        raise UserError(f"{shape[0]} student rows against {ids.shape[0]} stored: select the same tokens")


_checked: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def already_checked() -> Iterator[None]:
    """Inside, stored signals are taken as they are: somebody has looked at all of them."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def _outside(shape: tuple[int, ...], ids: Tensor) -> str:
    return (
        f"stored ids run from {ids.min().item()} to {ids.max().item()} but the student has "
        f"{shape[1]} logits: the signals come from another tokenizer; store them again"
    )


def check_stored(shape: tuple[int, ...], ids: Tensor, logprobs: Tensor) -> None:
    """Refuse what would give a wrong number silently; `shape` is that of the logits, (N, V).

    One transfer of three flags from the device, which a training step spares itself (`already_checked`).
    """
    if _checked.get():
        return
    _check_shapes(shape, ids, logprobs)
    if ids.numel() == 0:
        return
    absent = logprobs == -torch.inf
    position = torch.arange(ids.shape[1], device=ids.device)
    ordered = torch.where(absent, -1 - position, ids).sort(-1).values
    outside = (ids < 0).any() | (ids >= shape[1]).any()
    repeated = (ordered.diff(dim=-1) == 0).any()
    too_much = (logprobs.float().exp().sum(-1) > 1.02).any()
    outside, repeated, too_much = torch.stack([outside, repeated, too_much]).tolist()
    found = []
    if outside:
        found.append(_outside(shape, ids))
    if repeated:
        found.append("a stored row names one id twice: add the probabilities up and store each id once")
    if too_much:
        found.append(
            "stored probabilities of one token sum above 1: store natural log-probabilities, not logits"
        )
    if found:
        raise UserError(*found)


def check_sampled(shape: tuple[int, ...], ids: Tensor, weights: Tensor) -> None:
    """The same for sampled tokens."""
    if _checked.get():
        return
    _check_shapes(shape, ids, weights)
    if ids.numel():
        outside = (ids < 0).any() | (ids >= shape[1]).any()
        outside, negative = torch.stack([outside, ~(weights >= 0).all()]).tolist()
        found = [_outside(shape, ids)] if outside else []
        if negative:
            found.append(
                "a stored weight is negative or NaN: sampled_cross_entropy takes weights, not logarithms"
            )
        if found:
            raise UserError(*found)


def sparse_forward_kl(
    student_logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    tail: str = "renormalise",
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """forward_kl from K stored teacher tokens. student_logits [N, V], ids and logprobs [N, K] -> [N].

    `logprobs` are natural logs of the teacher's probabilities at temperature 1. An entry of -inf is absent
    (padding of a shorter row; any valid id); otherwise no id may occur twice in a row. Of the rest of the
    vocabulary only the total probability is known, and `tail` says what becomes of it:

    - "renormalise": p is softmax(logprobs / T) over the stored tokens, q the student's full softmax. Never
      negative, but 0 only for a student that puts nothing outside the stored set: it learns a sharper
      distribution than the teacher's unless the tokens were sampled (arXiv 2503.16870).
    - "tail_bucket": both distributions are reduced to K + 1 outcomes, the last being "any other token", then
      tempered and compared by KL. Never negative, 0 at agreement; at T = 1 a lower bound of the dense KL.
    - "zero": the stored terms of the dense sum alone, sum over K of p (log p - log q), the rest dropped. It
      can be negative. At T != 1 the stored probabilities are tempered among themselves and keep their total.

    With every token stored (K = V) all three are forward_kl.
    """
    check_option("sparse_forward_kl", "temperature", temperature)
    check_option("sparse_forward_kl", "tail", tail)
    check_stored(student_logits.shape, ids, logprobs)

    def formula(student: Tensor, ids: Tensor, stored: Tensor) -> Tensor:
        stored = stored.to(student.dtype)
        if tail != "tail_bucket" or ids.shape[1] == student.shape[1]:
            p = log_probs(stored, temperature)
            if tail == "zero":
                p = p + torch.logsumexp(stored, dim=-1, keepdim=True)
            return kl(p, log_probs(student, temperature).gather(1, ids))
        q = F.log_softmax(student, dim=-1)
        absent = stored == -torch.inf
        # Adding 0 or -inf, not assigning it: an absent entry may carry the id of one that is present.
        other_q = q.scatter_add(1, ids, torch.zeros_like(stored).masked_fill(~absent, -torch.inf))
        other_p = (1 - stored.exp().sum(-1, keepdim=True)).clamp(min=0).log()
        p = torch.cat([stored, other_p], dim=-1)
        q = torch.cat([q.gather(1, ids).masked_fill(absent, -torch.inf), other_q.logsumexp(-1, True)], dim=-1)
        return kl(log_probs(p, temperature), log_probs(q, temperature))

    loss = per_row(formula, student_logits, ids, logprobs)
    return loss * temperature**2 if temperature_squared else loss


def sampled_cross_entropy(
    student_logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """Cross-entropy to a teacher known by sampled tokens. student_logits [N, V], ids, weights [N, K] -> [N].

        loss = - sum over K of weights * log q(ids),    q = softmax(student_logits / temperature)

    Random sampling distillation (arXiv 2503.16870): where E[sum of weights at id i] is the teacher's
    probability of i, the expectation of the loss is the cross-entropy H(p, q) = forward_kl + H(p), and that
    of its gradient is the gradient of the dense forward_kl, whatever K. So for draws from the teacher
    (weights 1 / K each), and for draws from any proposal g with importance weights p / (K g). An id may
    stand several times; an entry of weight 0 is absent.

    p is the teacher's distribution at the temperature the tokens were drawn at, and `temperature` must be the
    same: a sample cannot be tempered afterwards.
    """
    check_option("sampled_cross_entropy", "temperature", temperature)
    check_sampled(student_logits.shape, ids, weights)

    def formula(student: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return -(weights.to(student.dtype) * log_probs(student, temperature).gather(1, ids)).sum(-1)

    loss = per_row(formula, student_logits, ids, weights)
    return loss * temperature**2 if temperature_squared else loss


# ==== Objectives on the order of tokens ====


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

    The order alone, no temperature; see `distill.training.losses.sparse` for pairs, ties and sources. Never use it
    alone: a token outside the teacher's top that the student prefers to all of them costs nothing.
    """
    check_option("ranking_hinge", "top", top)
    check_option("ranking_hinge", "margin", margin)
    check_dense(student_logits, teacher_logits)
    return per_row(lambda s, t: hinge_rows(s, t, top=top, margin=margin), student_logits, teacher_logits)


def ranking_logistic(student_logits: Tensor, teacher_logits: Tensor, *, top: int = 8) -> Tensor:
    """Mean over pairs of the teacher's `top` tokens of log(1 + exp(-(z_i - z_j))). Both logits [N, V] -> [N].

    RankNet's cost (Burges et al. 2005, section 3), no temperature; see `distill.training.losses.sparse`.
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
