"""What the objectives share: per-row losses over a large vocabulary without large temporaries.

The loss of a token depends on its own row of logits only, so rows can be taken a few at a time, and the
gradient of a chunk can be formed while its temporaries are still in the cache:

    loss = per_row(lambda student, teacher: ..., student_logits, teacher_logits)     # [N], differentiable

What stays until `backward` is one [N, V] tensor of the student's type (float32 for float16), and the only
other tensor of that size ever made is the gradient that `backward` returns. The price: no second derivatives.

Shapes: N rows (kept tokens), V vocabulary, n rows of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config.objectives import OBJECTIVES
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
