"""Closed forms of the objectives that carry most training: value and gradient in one pass over a row.

`distill.losses` states every objective as a formula and lets autograd differentiate it, which reads a row of
150,000 logits about twice as often as the arithmetic needs. For the objectives below the gradient with respect
to the student's logits z is known; with q = softmax(z / T) and p the teacher's,

    cross_entropy     (q - onehot)                      forward_kl   (q - p) / T
    reverse_kl        q (r - <q, r>) / T with r = log q - log p
    generalized_jsd   q (r - <q, r>) / T with r = (1 - beta) (log q - log m), m = beta p + (1 - beta) q
    sparse_forward_kl, sampled_cross_entropy   (q sum w - w) / T, w the stored probabilities or weights, 0 elsewhere

    rows = Rows(student_logits, {"dense": (teacher_logits,)})      # a chunk, float32 or float64
    value, gradient = closed("forward_kl", {"temperature": 2.0, "temperature_squared": False})(rows)

A row whose value is not finite (a logit of -inf somewhere) is for the formula, which knows what to do with it;
`distill.fused` asks it then. tests/test_fused.py holds both forms to each other.

Shapes: n rows of a chunk, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.rowwise import FORBIDDEN, log_probs


class Rows:
    """A chunk of the student's logits [n, V] and what the teacher says of the same tokens, by signal form.

    Softmaxes are computed once per temperature, whatever the number of objectives that read them.
    """

    def __init__(self, student: Tensor, given: dict[str, tuple[Tensor, ...]]):
        self.student, self.given = student, given
        self._logs: dict[tuple[str, float], tuple[Tensor, Tensor]] = {}

    def _pair(self, who: str, temperature: float) -> tuple[Tensor, Tensor]:
        if (who, temperature) not in self._logs:
            logits = self.student if who == "student" else self.given["dense"][0].to(self.student.dtype)
            scaled = logits if temperature == 1 else logits / temperature
            probabilities = F.softmax(scaled, dim=-1)
            # log q = z - max z + log max q: no second exponential over the row, which takes longer than the softmax.
            logs = scaled - scaled.amax(-1, keepdim=True)
            logs += probabilities.amax(-1, keepdim=True).log()
            if who == "teacher" and logs.numel() and logs[0, -1] == -torch.inf:
                # A vocabulary padded to the student's width (distill/fused.py) counts as the formulas count it.
                logs.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=FORBIDDEN)
            self._logs[who, temperature] = logs, probabilities
        return self._logs[who, temperature]

    def q(self, temperature: float) -> tuple[Tensor, Tensor]:
        """(log q, q) of the student [n, V]; not to be written to."""
        return self._pair("student", temperature)

    def p(self, temperature: float) -> tuple[Tensor, Tensor]:
        """(log p, p) of the teacher [n, V]; not to be written to."""
        return self._pair("teacher", temperature)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product [n, V], [n, V] -> [n] without a product of that size."""
    if len(a) == 1:  # the usual case on a CPU with a large vocabulary: one row fills the cache
        return torch.dot(a[0], b[0])[None]
    return torch.linalg.vecdot(a, b)


def _cross_entropy(rows: Rows) -> tuple[Tensor, Tensor]:
    logs, q = rows.q(1.0)
    targets = rows.given["targets"][0][:, None]
    gradient = q.clone()
    gradient.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=q.dtype))
    return -logs.gather(1, targets).squeeze(1), gradient


def _forward_kl(rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    (log_q, q), (log_p, p) = rows.q(temperature), rows.p(temperature)
    return _dot(p, log_p - log_q), q - p


def _reverse_kl(rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    (log_q, q), (log_p, _) = rows.q(temperature), rows.p(temperature)
    ratio = log_q - log_p
    value = _dot(q, ratio)
    return value, ratio.sub_(value[:, None]).mul_(q)


def _generalized_jsd(rows: Rows, temperature: float, beta: float) -> tuple[Tensor, Tensor]:
    if beta == 0:
        return _forward_kl(rows, temperature)
    if beta == 1:
        return _reverse_kl(rows, temperature)
    (log_q, q), (log_p, p) = rows.q(temperature), rows.p(temperature)
    # A probability that underflows multiplies whatever stands here by 0; only its logarithm must be finite.
    log_m = torch.lerp(q, p, beta).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    from_p = _dot(p, log_p - log_m)
    ratio = torch.sub(log_q, log_m, out=log_m).mul_(1 - beta)
    from_q = _dot(q, ratio)
    return beta * from_p + from_q, ratio.sub_(from_q[:, None]).mul_(q)


def _sparse_forward_kl(rows: Rows, temperature: float, tail: str) -> tuple[Tensor, Tensor]:
    (log_q, q), (ids, stored) = rows.q(temperature), rows.given["sparse"]
    stored = stored.to(q.dtype)
    log_p = log_probs(stored, temperature)
    if tail == "zero":
        log_p = log_p + stored.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    value = (p * (log_p - log_q.gather(1, ids))).sum(-1)
    return value, (q * p.sum(-1, keepdim=True)).scatter_add_(1, ids, -p)


def _sampled_cross_entropy(rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    (log_q, q), (ids, weights) = rows.q(temperature), rows.given["sampled"]
    weights = weights.to(q.dtype)
    value = -(weights * log_q.gather(1, ids)).sum(-1)
    return value, (q * weights.sum(-1, keepdim=True)).scatter_add_(1, ids, -weights)


_CLOSED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "generalized_jsd": _generalized_jsd,
    "sparse_forward_kl": _sparse_forward_kl,
    "sampled_cross_entropy": _sampled_cross_entropy,
}


def closed(name: str, options: dict[str, Any]) -> Callable[[Rows], tuple[Tensor, Tensor]] | None:
    """The closed form of an objective with its options: rows -> (value [n], gradient [n, V]), or None.

    The gradient is a fresh tensor, with respect to the logits before the temperature.
    """
    if name not in _CLOSED or options.get("tail") == "tail_bucket":
        return None
    if name == "cross_entropy":
        return _cross_entropy
    options = dict(options)
    temperature, squared = options["temperature"], options.pop("temperature_squared")
    function = partial(_CLOSED[name], **options)
    if temperature == 1:
        return function

    def scaled(rows: Rows) -> tuple[Tensor, Tensor]:
        value, gradient = function(rows)
        if squared:
            value = value * temperature**2
        return value, gradient.mul_(temperature if squared else 1 / temperature)

    return scaled
