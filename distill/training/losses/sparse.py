"""Objectives on stored teacher signals: K tokens with log-probabilities or weights instead of V logits.

Storing the whole distribution costs V numbers per token (600 KB at V = 151,936); K = 50 of them cost a few hundred
bytes. What is lost is the tail, and a loss has to say what it does about it: see `tail` below. Units, dtypes and
gradients are those of `distill.training.losses.divergences`, from where these functions are meant to be imported.

    loss = sparse_forward_kl(student_logits, ids, logprobs, tail="tail_bucket").sum() / tokens_in_step
    loss = sampled_cross_entropy(student_logits, ids, weights).sum() / tokens_in_step

Shapes: N kept tokens, V vocabulary, K stored tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.training.losses.rowwise import check_option, kl, log_probs, per_row


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
