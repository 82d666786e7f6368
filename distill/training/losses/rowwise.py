"""Losses of a row over a large vocabulary without large temporaries, and gradients in closed form.

What the objectives share: per-row losses over a large vocabulary without large temporaries.

The loss of a token depends on its own row of logits only, so rows can be taken a few at a time, and the
gradient of a chunk can be formed while its temporaries are still in the cache:

    loss = per_row(lambda student, teacher: ..., student_logits, teacher_logits)     # [N], differentiable

What stays until `backward` is one [N, V] tensor of the student's type (float32 for float16), and the only
other tensor of that size ever made is the gradient that `backward` returns. The price: no second derivatives.

Shapes: N rows (kept tokens), V vocabulary, n rows of a chunk.

Closed forms of the objectives that carry most training: value and gradient in few passes over a row.

`distill.training.losses.divergences` states every objective as a formula and lets autograd differentiate it, which
reads a row of 150,000 logits about twice as often as the arithmetic needs. For the objectives below the gradient
with respect to the student's logits z is known; with q = softmax(z / T) and p the teacher's,

    cross_entropy     (q - onehot)                      forward_kl   (q - p) / T
    reverse_kl        q (r - <q, r>) / T with r = log q - log p
    generalized_jsd   (1 - beta) q (r - <q, r>) / T with r = log q - log m, m = beta p + (1 - beta) q
    sparse_forward_kl, sampled_cross_entropy   (q sum w - w) / T, w the stored probabilities or weights, 0 elsewhere

    form = closed("forward_kl", {"temperature": 2.0, "temperature_squared": False})
    value, gradient = form(Rows(student_logits, {"dense": (teacher_logits,)}))      # a chunk, float32 or float64
    gradient() * form.factor                                     # d value / d student_logits, if it is wanted

What is constant in a gradient is its `factor`, one number for all rows, and no pass over them. Nor are rows of log q
or log p made: logits whose largest is 0 and the logarithm of one sum say the same.

A value that is not finite (a logit of -inf somewhere) is for the formula, which knows what to do with it;
`distill.training.losses.fused` asks it then. tests/training/losses/test_fused.py holds both forms to each other.

Shapes: n rows of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config.section import OBJECTIVES
from distill.errors import UserError

# Log-probability of a token whose logit is -inf: zero in float32 arithmetic, and yet finite.
FORBIDDEN = -100.0

# Elements of one chunk of logits: a CPU wants the handful of temporaries of a chunk in its cache, an
# accelerator wants few, large kernels.
CPU_CHUNK = 2**17
ACCELERATOR_CHUNK = 2**24


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last axis, with -inf raised to FORBIDDEN."""
    logs = F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    # Looking first is cheap, and the usual chunk without -inf is spared a slow backward pass. The comparison
    # is negated because a NaN, which must stay one, makes the minimum NaN and would hide a -inf.
    # On an accelerator the look is the dear part: the host would wait for it.
    if logs.numel() and (logits.device.type != "cpu" or not logs.detach().amin() > -torch.inf):
        logs = torch.nan_to_num(logs, nan=torch.nan, posinf=torch.inf, neginf=FORBIDDEN)
    return logs


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) from log-probabilities [n, V] -> [n]."""
    return (a.exp() * (a - b)).sum(-1)


def check_option(objective: str, option: str, value: Any) -> None:
    """Hold a Python caller to the bounds that a recipe is held to. Raises UserError."""
    trouble = OBJECTIVES[objective].options[option].problem(value)
    if trouble is not None:
        raise UserError(f"{option} {trouble}, not {value!r}")


def per_row(formula: Callable[..., Tensor], student: Tensor, *rows: Tensor) -> Tensor:
    """loss[i] = formula(student, *rows)[i] for student [N, V] and rows [N, ...] -> [N].

    `formula` gets chunks of n rows, the student's as float32 (float64 if it is float64), and returns [n] of
    that type; row i of its result may depend on row i of its arguments only. `rows` receive no gradient.
    """
    # Inside the function `needs_input_grad` is blind to `torch.no_grad`, so it is told here.
    student = student if torch.is_grad_enabled() else student.detach()
    return _PerRow.apply(student, formula, *(r.detach() for r in rows))


def _parts(logits: Tensor) -> Iterator[slice]:
    """Slices of rows of [N, V], about one chunk of elements each."""
    elements = CPU_CHUNK if logits.device.type == "cpu" else ACCELERATOR_CHUNK
    size = max(1, elements // logits.shape[1])
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, formula: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        loss = torch.empty(student.shape[0], dtype=wide, device=student.device)
        gradient = None
        if ctx.needs_input_grad[0]:
            # float16 would lose small gradients here: its loss scale multiplies them only in `backward`.
            kept = wide if student.dtype == torch.float16 else student.dtype
            gradient = torch.empty(student.shape, dtype=kept, device=student.device)
        for part in _parts(student):
            chunk = student[part].detach().to(wide)
            with torch.set_grad_enabled(gradient is not None):
                value = formula(chunk.requires_grad_(gradient is not None), *(r[part] for r in rows))
                if gradient is not None:
                    gradient[part] = torch.autograd.grad(value.sum(), chunk)[0]
            loss[part] = value.detach()
        ctx.student_dtype, ctx.others = student.dtype, 1 + len(rows)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.empty(gradient.shape, dtype=ctx.student_dtype, device=gradient.device)
        for part in _parts(gradient):
            # upstream is float32: one weight for all tokens must not be rounded to bfloat16 before use.
            scaled[part] = gradient[part] * upstream[part, None]
        return scaled, *[None] * ctx.others


def check_dense(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.dim() != 2 or teacher_logits.dim() != 2:
        raise UserError(
            "logits must be [kept tokens, vocabulary], not "
            f"{list(student_logits.shape)} (student) and {list(teacher_logits.shape)} (teacher): "
            "select the kept tokens first"
        )
    (tokens, vocabulary), (teacher_tokens, teacher_vocabulary) = student_logits.shape, teacher_logits.shape
    if vocabulary != teacher_vocabulary:
        raise UserError(
            f"the student has {vocabulary} logits per token and the teacher {teacher_vocabulary}: both must "
            "use the same tokenizer; compare the two vocabularies by content, and if they agree cut the "
            "padding rows off the longer one or pad the shorter one with -inf"
        )
    if tokens != teacher_tokens:
        raise UserError(
            f"{tokens} student rows against {teacher_tokens} teacher rows: select the same tokens of both"
        )


# ==== Closed forms of the objectives that carry most training ====

# Makes a gradient [n, V], in new memory or where it is told to.
MakeGradient = Callable[..., Tensor]


class Softmax:
    """softmax of logits [n, V] in parts: probabilities = exps / total = exp(logits - log_sum), the last two [n, 1].

    `logits` are those given but for a number a row. `ours`: those given may be shifted in place, which no objective
    can tell. `alone`: one objective reads this, and what it has read for the last time is written over.
    """

    def __init__(self, logits: Tensor, ours: bool = False, alone: bool = False):
        self._alone = alone
        self._exps: Tensor | None = None
        # On a CPU a row is in the cache, and torch's softmax takes longer than its parts; elsewhere passes are dear.
        if logits.device.type == "cpu":
            self.logits = torch.sub(logits, logits.amax(-1, keepdim=True), out=logits if ours else None)
        else:
            self.logits = F.log_softmax(logits, dim=-1)

    def _exponentiate(self, in_place: bool = False) -> None:
        if self._exps is not None:
            return
        self._exps = self.logits.exp_() if in_place else self.logits.exp()
        if self._exps.device.type == "cpu":
            self._total = self._exps.sum(-1, keepdim=True)
            self._log_sum = self._total.log()
        else:
            self._total = torch.ones_like(self._exps[:, :1])
            self._log_sum = torch.zeros_like(self._total)

    def spend(self) -> None:
        """The logits have been read for the last time: `exps` may take their place."""
        if self._alone and self._exps is None:
            self._exponentiate(in_place=True)
            self.logits = None

    def gap(self, logits: Tensor) -> Tensor:
        """self.logits - logits [n, V], self.logits being read for the last time."""
        self._exponentiate()
        if not self._alone:
            return self.logits - logits
        gap, self.logits = self.logits.sub_(logits), None
        return gap

    @property
    def exps(self) -> Tensor:
        """[n, V]; not to be written to."""
        self._exponentiate()
        return self._exps

    @property
    def total(self) -> Tensor:
        self._exponentiate()
        return self._total

    @property
    def log_sum(self) -> Tensor:
        self._exponentiate()
        return self._log_sum

    def forbid(self) -> None:
        """Tokens whose logit is -inf get the logarithm that the formulas give them, which is finite."""
        self.logits = torch.where(self.logits == -torch.inf, FORBIDDEN + self.log_sum, self.logits)


class RowFormula:
    """A chunk of the student's logits [n, V] and what the teacher says of the same tokens, by signal form.

    Softmaxes are computed once per temperature, whatever the number of objectives that read them. Of "student" and
    "dense" (the teacher's logits), `ours` names what may be shifted in place and `alone` what one objective reads,
    and may write over (see `Softmax`). `sure`: no logit is -inf, but for those of a vocabulary padded to the student's
    width; `padded` says whether the teacher's is (None: look).
    """

    def __init__(
        self,
        student: Tensor,
        given: dict[str, tuple[Tensor, ...]],
        ours: frozenset[str] = frozenset(),
        alone: frozenset[str] = frozenset(),
        sure: bool = False,
        padded: bool | None = None,
    ):
        self.student, self.given = student, given
        self.ours, self.alone, self.sure, self.padded = ours, alone, sure, padded
        self._softmaxes: dict[tuple[str, float], Softmax] = {}

    def _softmax(self, who: str, given: Tensor, temperature: float) -> Softmax:
        if (who, temperature) not in self._softmaxes:
            logits = given.to(self.student.dtype)
            logits = logits if temperature == 1 else logits / temperature
            found = Softmax(logits, who in self.ours or logits is not given, who in self.alone)
            # A vocabulary padded to the student's width (fused.py) counts as the formulas count it.
            if who == "dense" and logits.numel() and self._is_padded(found.logits):
                found.forbid()
            self._softmaxes[who, temperature] = found
        return self._softmaxes[who, temperature]

    def _is_padded(self, logits: Tensor) -> bool:
        return logits[0, -1].item() == -torch.inf if self.padded is None else self.padded

    def q(self, temperature: float) -> Softmax:
        """The student's."""
        return self._softmax("student", self.student, temperature)

    def p(self, temperature: float) -> Softmax:
        """The teacher's."""
        return self._softmax("dense", self.given["dense"][0], temperature)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product [n, V], [n, V] -> [n, 1] without a product of that size."""
    if len(a) == 1:  # the usual case on a CPU with a large vocabulary: one row fills the cache
        return torch.dot(a[0], b[0])[None, None]
    return torch.linalg.vecdot(a, b)[:, None]


# Each takes rows and the objective's options and returns (value [n, 1], how to make the gradient but for its factor).


def _cross_entropy(rows: RowFormula) -> tuple[Tensor, MakeGradient]:
    q, ids = rows.q(1.0), rows.given["targets"][0][:, None]
    at_ids = q.logits.gather(1, ids)
    q.spend()
    return q.log_sum - at_ids, _less(q, ids, torch.ones_like(q.log_sum))


def _less(q: Softmax, ids: Tensor, weights: Tensor) -> MakeGradient:
    """Of q sum w - w, where w is `weights` [n, K] at `ids` [n, K] and 0 elsewhere."""

    def make(out: Tensor | None = None) -> Tensor:
        found = torch.mul(q.exps, weights.sum(-1, keepdim=True) / q.total, out=out)
        return found.scatter_add_(1, ids, -weights)

    return make


def _forward_kl(rows: RowFormula, temperature: float) -> tuple[Tensor, MakeGradient]:
    q, p = rows.q(temperature), rows.p(temperature)
    mean = _dot(p.exps, p.gap(q.logits)) / p.total
    q.spend()

    def make(out: Tensor | None = None) -> Tensor:
        exps = torch.addcmul(q.exps, p.exps, q.total / p.total, value=-1, out=out)
        return exps.mul_(q.total.reciprocal())

    return mean + (q.log_sum - p.log_sum), make


def _reverse_kl(rows: RowFormula, temperature: float) -> tuple[Tensor, MakeGradient]:
    q, p = rows.q(temperature), rows.p(temperature)
    gap = p.gap(q.logits)
    q.spend()
    return _about_the_mean(q, gap, lambda mean: (p.log_sum - q.log_sum) - mean)


def _about_the_mean(q: Softmax, r: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, MakeGradient]:
    """(value(<q, r>), what makes q (r - <q, r>)); r [n, V] is written over."""
    mean = _dot(q.exps, r) / q.total
    return value(mean), lambda out=None: torch.mul(r.sub_(mean).mul_(q.total.reciprocal()), q.exps, out=out)


def _generalized_jsd(rows: RowFormula, temperature: float, beta: float) -> tuple[Tensor, MakeGradient]:
    q, p = rows.q(temperature), rows.p(temperature)
    # m as large as p's exps are, p's total times a distribution: differences of logarithms are then small numbers.
    log_m = torch.mul(q.exps, (1 - beta) * p.total / q.total).add_(p.exps, alpha=beta)
    # A probability that underflows multiplies whatever stands here by 0; only its logarithm must be finite.
    log_m.clamp_(min=torch.finfo(log_m.dtype).tiny).log_()
    from_p = _dot(p.exps, p.gap(log_m)) / p.total
    ratio = torch.sub(q.logits, log_m, out=log_m)
    return _about_the_mean(
        q, ratio, lambda mean: beta * from_p + (1 - beta) * (mean + (p.log_sum - q.log_sum))
    )


def _sparse_forward_kl(rows: RowFormula, temperature: float, tail: str) -> tuple[Tensor, MakeGradient]:
    q, (ids, stored) = rows.q(temperature), rows.given["sparse"]
    stored = stored.to(q.logits.dtype)
    log_p = log_probs(stored, temperature)
    if tail == "zero":
        log_p = log_p + stored.logsumexp(-1, keepdim=True)
    p, at_ids = log_p.exp(), q.logits.gather(1, ids)
    q.spend()
    return (p * (log_p - (at_ids - q.log_sum))).sum(-1, keepdim=True), _less(q, ids, p)


def _sampled_cross_entropy(rows: RowFormula, temperature: float) -> tuple[Tensor, MakeGradient]:
    q, (ids, weights) = rows.q(temperature), rows.given["sampled"]
    weights, at_ids = weights.to(q.logits.dtype), q.logits.gather(1, ids)
    q.spend()
    return (weights * (q.log_sum - at_ids)).sum(-1, keepdim=True), _less(q, ids, weights)


_CLOSED: dict[str, Callable[..., tuple[Tensor, MakeGradient]]] = {
    "cross_entropy": _cross_entropy,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "generalized_jsd": _generalized_jsd,
    "sparse_forward_kl": _sparse_forward_kl,
    "sampled_cross_entropy": _sampled_cross_entropy,
}


@dataclass(frozen=True)
class Closed:
    """rows -> (value [n], make): `make(out=None) * factor` is d value / d logits before the temperature [n, V].

    `make` can be called once; it fills `out`, which may be the student's logits themselves, or new memory.
    """

    function: Callable[[RowFormula], tuple[Tensor, MakeGradient]]
    of_value: float = 1.0
    factor: float = 1.0

    def __call__(self, rows: RowFormula) -> tuple[Tensor, MakeGradient]:
        value, make = self.function(rows)
        value = value.squeeze(1)
        return value if self.of_value == 1 else value * self.of_value, make


def closed(name: str, options: dict[str, Any]) -> Closed | None:
    """The closed form of an objective with its options, or None where it has none."""
    if name not in _CLOSED or options.get("tail") == "tail_bucket":
        return None
    if name == "cross_entropy":
        return Closed(_cross_entropy)
    options = dict(options)
    temperature, squared = options["temperature"], options.pop("temperature_squared")
    of_value = temperature**2 if squared else 1.0
    if options.get("beta") in (0, 1):
        name = "forward_kl" if options.pop("beta") == 0 else "reverse_kl"
    sign_and_share = -1 if name == "reverse_kl" else 1 - options.get("beta", 0)
    return Closed(partial(_CLOSED[name], **options), of_value, sign_and_share * of_value / temperature)
